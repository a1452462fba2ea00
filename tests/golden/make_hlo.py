"""Small programs as libtpu compiles them, for the tests of sharding/hlo*.py, which need no libtpu then.

Run as `python tests/golden/make_hlo.py [FOLDER]` with the extra `tpu`. Written with jax 0.10.2 and libtpu 0.0.42.1.
"""

import functools
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from sharding import aot  # noqa: E402

if __name__ == "__main__":
    aot.prepare()  # before jax is imported

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding  # noqa: E402

from sharding.topologies import find_topology  # noqa: E402

FOLDER = pathlib.Path(__file__).resolve().parent / "hlo"
PROGRAMS = {
    **{f"matmul_{chip}": (chip, 1) for chip in ("v5e-4", "v5p-8", "v6e-4")},
    "add": ("v5e-4", 1),
    "scanned_mlp": ("v5e-4", 1),
    "scanned_mlp_gradient": ("v5e-4", 1),
    "gather": ("v5e-8", 1),
    "layers_over_fsdp": ("v5e-8", 1),
    "mean_over_slices": ("v5e-4", 2),
}


def compiled(name: str) -> str:
    """Text of the program."""
    topology = find_topology(*PROGRAMS[name])
    devices = aot.topology_devices(topology)
    function, arguments, mesh = program(name.split("_v")[0], devices)
    with jax.set_mesh(mesh):
        return aot.compile_for_tpu(jax.jit(function).trace(*arguments)).as_text()


def program(name: str, devices: list):
    """A function, its arguments and the mesh it runs on."""
    count = 1 if name.startswith(("matmul", "add", "scanned")) else len(devices)
    mesh = Mesh(devices[:count], ("x",), axis_types=(AxisType.Explicit,))

    divided, whole = PartitionSpec("x"), PartitionSpec()

    def array(*shape: int, spec: PartitionSpec = whole):
        where = SingleDeviceSharding(devices[0]) if count == 1 else NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=where)

    over = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
    if name == "matmul":
        return jnp.matmul, (array(4096, 4096), array(4096, 4096)), mesh
    if name == "add":
        return jnp.add, (array(8192, 8192), array(8192, 8192)), mesh
    if name.startswith("scanned_mlp"):
        x, weights = array(1024, 512), (array(6, 512, 2048), array(6, 2048, 512))
        return (mlp, (weights, x), mesh) if name == "scanned_mlp" else (jax.grad(total), (weights, x), mesh)
    if name == "gather":
        gather = functools.partial(jax.lax.all_gather, axis_name="x", tiled=True)
        return over(gather, in_specs=divided, out_specs=whole), (array(8192, 4096, spec=divided),), mesh
    if name == "layers_over_fsdp":
        x, weights = array(8 * 2048, 2048, spec=divided), [array(2048, 2048, spec=divided) for _ in range(3)]
        return over(layers, in_specs=(divided, divided), out_specs=divided), (x, weights), mesh
    if name == "mean_over_slices":
        mean = functools.partial(jax.lax.pmean, axis_name="x")
        return over(mean, in_specs=divided, out_specs=whole), (array(8 * 1024, 1024, spec=divided),), mesh
    raise ValueError(name)


def mlp(weights, x):
    """Six layers of 512 -> 2048 -> 512, scanned."""
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w[0]) @ w[1], None), x, weights)[0]


def total(weights, x):
    return mlp(weights, x).astype(jnp.float32).sum()


def layers(x, weights):
    """Three layers whose weights are gathered where they are needed."""
    for w in weights:
        x = jnp.tanh(x @ jax.lax.all_gather(w, "x", tiled=True))
    return x


def without_source_lines(text: str) -> str:
    """The machine's paths and the tables that they are in."""
    text = re.sub(r"(?ms)^FileNames\n.*?(?=^(%|ENTRY))", "", text)
    text = re.sub(r", metadata=\{[^}]*\}", "", text)
    return re.sub(r"(?m)[ \t]+$", "", text)


if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    for name in PROGRAMS:
        (folder / f"{name}.txt").write_text(without_source_lines(compiled(name)))
