"""Options of the TPU compiler for production runs, by what jax calls the chips. `train` and `plan` compile with the same;
docs/pods.md says what each changed, and which were tried and rejected.

Others can be set in LIBTPU_INIT_ARGS, which the compiler itself reads, under `plan` as under `train`.
"""

import re
from dataclasses import dataclass

import jax
from jax.sharding import AbstractMesh, Mesh

from configs.schema import ConfigError


@dataclass(frozen=True)
class Flag:
    name: str
    value: str
    purpose: str


GATHERS = Flag(
    "xla_tpu_prefer_async_allgather_to_allreduce",
    "true",
    "a layer's smaller parameters are gathered beside computation, not by an all-reduce of twice the bytes that holds it up",
)
OFFLOAD = tuple(
    Flag(
        f"xla_tpu_enable_sparse_core_collective_offload_{kind}",
        "true",
        f"SparseCores {does} while the core computes, which would wait for it otherwise",
    )
    for kind, does in (("all_gather", "gather"), ("reduce_scatter", "reduce and scatter"), ("all_reduce", "reduce"))
)
FLAGS: dict[str, tuple[Flag, ...]] = {
    "TPU v5 lite": (GATHERS,),
    "TPU v6 lite": (GATHERS, *OFFLOAD),  # TPU7x does by itself, as MaxText's library of flags says
}


def compiler_options(mesh: Mesh | AbstractMesh) -> dict[str, str]:
    """For a program on this mesh; none where the mesh has no devices yet or they are no TPUs."""
    if isinstance(mesh, AbstractMesh):
        return {}
    return {flag.name: flag.value for flag in FLAGS.get(mesh.devices.flat[0].device_kind, ())}


def compiled(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Raises ConfigError where this compiler lacks an option."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        unknown = re.search(r"No such compile option: '(\w+)'", str(error))
        if unknown is None:
            raise
        raise ConfigError(
            f"the installed libtpu does not know the compiler option {unknown[1]} of sharding/flags.py: install the one that "
            f"belongs to jax {jax.__version__} (pip install 'jax[tpu]=={jax.__version__}')"
        ) from None
