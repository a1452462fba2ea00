"""The one place where a device mesh is made."""

import math

import jax
from jax.sharding import AxisType, Mesh

from configs.schema import MESH_FIELDS, ConfigError, MeshConfig


def simulate_devices(mesh: MeshConfig) -> None:
    """Split the CPU into `mesh.simulated_devices` devices. Must run before jax starts its backend."""
    if mesh.simulated_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", mesh.simulated_devices)


def make_mesh(mesh: MeshConfig) -> Mesh:
    """A mesh over all devices with every axis present, also at size 1, all in Explicit mode.

    Raises ConfigError if the sizes don't multiply to the number of devices.
    """
    devices = jax.device_count()
    sizes = {axis: getattr(mesh, axis) for axis in MESH_FIELDS}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    filled = [axis for axis, size in sizes.items() if size == -1]
    if filled and devices % fixed == 0:
        sizes[filled[0]] = devices // fixed
    if math.prod(sizes.values()) != devices:
        given = " * ".join(f"{axis} {size}" for axis, size in sizes.items() if size not in (1, -1)) or "1"
        raise ConfigError(
            f"mesh: {given} does not fill the {devices} {jax.devices()[0].platform} device{'s' * (devices > 1)} here: "
            f"the axes must multiply to {devices}; set one to -1, or simulate with --mesh.simulated_devices {max(fixed, 1)}"
        )
    return jax.make_mesh(tuple(sizes.values()), MESH_FIELDS, axis_types=(AxisType.Explicit,) * len(sizes))


def one_device_mesh() -> Mesh:
    """A mesh over the first device alone, with every axis present."""
    axes = (AxisType.Explicit,) * len(MESH_FIELDS)
    return jax.make_mesh((1,) * len(MESH_FIELDS), MESH_FIELDS, axis_types=axes, devices=jax.devices()[:1])


def describe(mesh: Mesh) -> str:
    """For example `8 cpu devices: data 2, fsdp 2, tensor 2`."""
    kind = mesh.devices.flat[0].device_kind
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    return f"{mesh.size} {kind} device{'s' * (mesh.size > 1)}" + (f": {axes}" if axes else "")
