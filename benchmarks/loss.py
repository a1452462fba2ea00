"""Memory and time of the loss over 256,000 words: from whole logits, and as training does it, from tiles.

Run as `python -m benchmarks.loss [--out FILE]`. Memory is what a compiled loss with both gradients asks for beyond its
arguments and results, on CPU and, with the extra `tpu`, on v5e without one of them. Time is measured, on CPU only.
"""

import importlib.util
import math
import os
import statistics
import sys
import time
from collections.abc import Callable

from benchmarks.scan import ENVIRONMENT
from benchmarks.tables import arguments, machine, publish, table

TOKENS, VOCABULARY, WIDTH, SOFT_CAP = 8192, 256_000, 2304, 30.0  # Gemma 2 2B, one row a device
TIMED = (4096, 32_000, 128)  # two tiles
ROUNDS = 3
# Name, topology, and sizes of the mesh's axes (replica, data, fsdp, sequence, tensor).
MESHES = (
    ("CPU", None, (1, 1, 1, 1, 1)),
    ("v5e, 1 chip", "v5e:2x2", (1, 1, 1, 1, 1)),
    ("v5e 4x4, fsdp 16", "v5e:4x4", (1, 1, 16, 1, 1)),
    ("v5e 4x4, fsdp 4, tensor 4", "v5e:4x4", (1, 1, 4, 1, 4)),
    ("v5e 4x4, fsdp 4, sequence 4", "v5e:4x4", (1, 1, 4, 4, 1)),
)
SIDES = ("whole", "tiles")


def main() -> None:
    options = arguments(__doc__)
    os.environ.update(ENVIRONMENT)  # before jax is imported
    libtpu = importlib.util.find_spec("libtpu") is not None
    rows = []
    for name, topology, sizes in MESHES:
        if topology and not libtpu:
            rows.append((name, "libtpu is not installed", "", ""))
            continue
        whole, tiles = (temporary(side, topology, sizes) for side in SIDES)
        rows.append((name, f"{whole / 2**20:,.0f}", f"{tiles / 2**20:,.0f}", f"{whole / tiles:.1f}"))
        print(*rows[-1], sep="  ", file=sys.stderr, flush=True)
    wall, cpu = times()
    lines = [
        "# The loss of a language model",
        "",
        f"{TOKENS:,} tokens a device, {VOCABULARY:,} x {WIDTH:,} table, bfloat16 products, soft cap, forward and backward.",
        "",
        *table(("device", "whole logits, MiB", "tiles, MiB", "ratio"), rows),
        "",
        f"Time on CPU, {' x '.join(f'{n:,}' for n in TIMED)} in float32, tiles over whole, median of {ROUNDS} turns (range): "
        f"{wall}; processor time {cpu}. Tiles multiply four times where whole logits are kept and multiply three times.",
        machine(),
    ]
    publish(lines, options.out)


def program(side: str, mesh, tokens: int, vocabulary: int, width: int, dtype: str) -> tuple[Callable, tuple]:
    """A loss with both gradients, and its abstract arguments: `tokens` of them on every device that has its own."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, reshard

    from models.token_loss import log_z_and_target
    from sharding.rules import rules_for
    from trainer.tasks import cross_entropy

    rules = rules_for(mesh)
    spec = rules.spec

    def tiles(x, table, targets):
        log_z, target = log_z_and_target(x, table, targets, spec=spec, soft_cap=SOFT_CAP)
        return jnp.mean(log_z - target)

    def whole(x, table, targets):
        rows = reshard(table.astype(x.dtype), spec("vocab", None))
        out = spec("batch", "seq", "vocab")
        logits = jnp.einsum("btd,vd->btv", x, rows, out_sharding=out, preferred_element_type=jnp.float32)
        return jnp.mean(cross_entropy(SOFT_CAP * jnp.tanh(logits / SOFT_CAP), targets))

    def array(shape, dtype, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec(*axes)))

    batch, length = rules.size("batch", mesh), tokens * rules.size("seq", mesh)
    abstract = (
        array((batch, length, width), dtype, "batch", "seq", None),
        array((vocabulary, width), "float32", "vocab", "embed"),
        array((batch, length), "int32", "batch", "seq"),
    )
    return jax.value_and_grad({"whole": whole, "tiles": tiles}[side], argnums=(0, 1)), abstract


def temporary(side: str, topology: str | None, sizes: tuple[int, ...]) -> int:
    """Bytes of a device for intermediate results."""
    import jax
    import numpy as np
    from jax.experimental import topologies

    from configs.schema import MESH_FIELDS

    if topology:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    else:
        devices = jax.devices("cpu")
    shaped: np.ndarray = np.asarray(devices[: math.prod(sizes)]).reshape(sizes)
    mesh = jax.sharding.Mesh(shaped, MESH_FIELDS, axis_types=(jax.sharding.AxisType.Explicit,) * len(sizes))
    with jax.set_mesh(mesh):
        function, abstract = program(side, mesh, TOKENS, VOCABULARY, WIDTH, "bfloat16")
        lowered = jax.jit(function).trace(*abstract).lower(lowering_platforms=("tpu" if topology else "cpu",))
        memory = lowered.compile().memory_analysis()
    assert memory
    return memory.temp_size_in_bytes


def times() -> tuple[str, str]:
    """Wall and processor time of tiles over those of whole logits, taking turns."""
    import jax
    import numpy as np

    from sharding.mesh import one_device_mesh

    mesh, rng = one_device_mesh(), np.random.default_rng(0)
    taken: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    with jax.set_mesh(mesh):
        programs = {}
        for side in SIDES:
            function, abstract = program(side, mesh, *TIMED, "float32")
            programs[side] = jax.jit(function).lower(*abstract).compile()
        x, rows, targets = (
            rng.integers(TIMED[1], size=a.shape).astype("int32") if a.dtype == "int32" else rng.normal(size=a.shape)
            for a in abstract
        )
        placed = [
            jax.device_put(v.astype(a.dtype), a.sharding) for v, a in zip((x, rows, targets), abstract, strict=True)
        ]
        for turn in range(ROUNDS + 1):
            for side in SIDES if turn % 2 else reversed(SIDES):
                start, used = time.perf_counter(), time.process_time()
                jax.block_until_ready(programs[side](*placed))
                if turn:  # the first warms up
                    taken[side].append((time.perf_counter() - start, time.process_time() - used))
    whole, tiles = taken["whole"], taken["tiles"]
    ratios = [[b[i] / a[i] for a, b in zip(whole, tiles, strict=True)] for i in range(2)]
    wall, cpu = (f"{statistics.median(r):.2f} ({min(r):.2f} to {max(r):.2f})" for r in ratios)
    return wall, cpu


if __name__ == "__main__":
    main()
