"""Options of the TPU compiler for production runs, by what jax calls the chips. `train` and `plan` compile with the same;
docs/pods.md says what each changed, and which were tried and rejected.

Further ones can be set in LIBTPU_INIT_ARGS, which the compiler itself reads, under `plan` as under `train`.
"""

from dataclasses import dataclass

from jax.sharding import AbstractMesh, Mesh


@dataclass(frozen=True)
class Flag:
    name: str
    value: str
    purpose: str


FLAGS: dict[str, tuple[Flag, ...]] = {}


def compiler_options(mesh: Mesh | AbstractMesh) -> dict[str, str]:
    """For a program on this mesh; none where the mesh has no devices yet or they are no TPUs."""
    if isinstance(mesh, AbstractMesh):
        return {}
    return {flag.name: flag.value for flag in FLAGS.get(mesh.devices.flat[0].device_kind, ())}
