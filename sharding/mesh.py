"""The one place where a device mesh is made."""

import math
from collections.abc import Mapping, Sequence

import jax
from jax.experimental.mesh_utils import create_hybrid_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh

from configs.schema import MESH_FIELDS, ConfigError, MeshConfig
from sharding.hosts import on_this_machine


def simulate_devices(mesh: MeshConfig) -> None:
    """Split the CPU into `mesh.simulated_devices` devices. Must run before jax starts its backend.

    Raises ConfigError if they don't divide among the processes of this machine.
    """
    if mesh.simulated_devices:
        processes = on_this_machine()
        if mesh.simulated_devices % processes:
            raise ConfigError(
                f"{mesh.show('simulated_devices')} does not divide among {processes} processes: give a multiple of {processes}"
            )
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", mesh.simulated_devices // processes)


def make_mesh(mesh: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices (or these) with every axis present, also at size 1, all in Explicit mode.

    The outer axes run across slices. Raises ConfigError if the sizes don't multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = axis_sizes(mesh, len(devices), devices[0].platform)
    types = (AxisType.Explicit,) * len(sizes)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return jax.make_mesh(tuple(sizes.values()), MESH_FIELDS, axis_types=types, devices=devices)
    outer = across_slices(sizes, slices)
    inner = [size // share for size, share in zip(sizes.values(), outer, strict=True)]
    return Mesh(create_hybrid_device_mesh(inner, outer, devices), MESH_FIELDS, axis_types=types)


def across_slices(sizes: Mapping[str, int], slices: int) -> list[int]:
    """How many parts of each axis are on different slices: as many as an axis holds, from the outermost on.

    Raises ConfigError where a slice would hold part of a group.
    """
    outer, left = [], slices
    for size in sizes.values():
        share = math.gcd(size, left)
        outer.append(share)
        left //= share
    if left > 1:
        raise ConfigError(f"mesh: no axis divides among {slices} slices: set mesh.replica to {slices}")
    return outer


def slice_notes(sizes: Mapping[str, int], slices: int) -> list[str]:
    """A sentence for each axis but the replicas' that runs across slices."""
    shares = dict(zip(sizes, across_slices(sizes, slices), strict=True))
    return [
        f"{axis} {sizes[axis]} runs across slices, over the slow network: mesh.replica={slices} keeps it inside"
        for axis, share in shares.items()
        if share > 1 and axis != "replica"
    ]


def axis_sizes(mesh: MeshConfig, devices: int, platform: str) -> dict[str, int]:
    """Every axis's size on so many devices. Raises ConfigError if they don't multiply to that."""
    sizes = {axis: getattr(mesh, axis) for axis in MESH_FIELDS}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    filled = [axis for axis, size in sizes.items() if size == -1]
    if filled and devices % fixed == 0:
        sizes[filled[0]] = devices // fixed
    if math.prod(sizes.values()) != devices:
        given = " * ".join(f"{axis} {size}" for axis, size in sizes.items() if size not in (1, -1)) or "1"
        simulate = "" if platform == "tpu" else f", or simulate with --mesh.simulated_devices {max(fixed, 1)}"
        raise ConfigError(
            f"mesh: {given} does not fill the {devices} {platform} device{'s' * (devices > 1)} here: "
            f"the axes must multiply to {devices}; set one to -1{simulate}"
        )
    return sizes


def abstract_mesh(mesh: MeshConfig, devices: int) -> AbstractMesh:
    """The mesh of so many devices without any. Raises ConfigError as `make_mesh` does."""
    sizes = axis_sizes(mesh, devices, "tpu")
    return AbstractMesh(tuple(sizes.values()), MESH_FIELDS, axis_types=(AxisType.Explicit,) * len(sizes))


def one_device_mesh() -> Mesh:
    """A mesh over the first device alone, with every axis present."""
    axes = (AxisType.Explicit,) * len(MESH_FIELDS)
    return jax.make_mesh((1,) * len(MESH_FIELDS), MESH_FIELDS, axis_types=axes, devices=jax.devices()[:1])


def describe(mesh: Mesh) -> str:
    """For example `8 cpu devices: data 2, fsdp 2, tensor 2`."""
    kind = mesh.devices.flat[0].device_kind
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    return f"{mesh.size} {kind} device{'s' * (mesh.size > 1)}" + (f": {axes}" if axes else "")
