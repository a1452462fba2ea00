"""The one place where a device mesh is made."""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh

from configs.schema import MESH_FIELDS, ConfigError, MeshConfig
from sharding.hosts import on_this_machine
from sharding.rules import FSDP


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

    The outer axes run across slices. `fsdp` is an axis for each ring of the network that its devices are on (fsdp,
    fsdp_2, ...): XLA reduces and scatters along a ring, but over devices of two it reduces everything everywhere and then
    cuts, for twice the bytes. Raises ConfigError if the sizes don't multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = axis_sizes(mesh, len(devices), devices[0].platform)
    types = (AxisType.Explicit,) * len(sizes)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        try:
            whole = jax.make_mesh(tuple(sizes.values()), MESH_FIELDS, axis_types=types, devices=devices).devices
        except NotImplementedError:  # no axis is a product of whole rings, as 64 x 64 on 16 x 16 x 16: a ring is cut
            whole = create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
        return on_rings(whole)
    outer = across_slices(sizes, slices)
    inner = [size // share for size, share in zip(sizes.values(), outer, strict=True)]
    return on_rings(create_hybrid_device_mesh(inner, outer, devices))


def on_rings(devices: np.ndarray) -> Mesh:
    """The mesh of devices that are laid out by the config's axes."""
    place = MESH_FIELDS.index(FSDP)
    line = [where(device) for device in np.moveaxis(devices, place, -1).reshape(-1, devices.shape[place])[0]]
    order = sorted(range(len(line)), key=lambda i: line[i])  # of a small slice jax makes one winding ring
    sizes = rings([line[i] for i in order])
    shape = (*devices.shape[:place], *sizes, *devices.shape[place + 1 :])
    names = [f"{FSDP}_{i + 1}" if i else FSDP for i in range(len(sizes))]
    names = [*MESH_FIELDS[:place], *names, *MESH_FIELDS[place + 1 :]]
    devices = np.take(devices, order, axis=place).reshape(shape)
    return Mesh(devices, names, axis_types=(AxisType.Explicit,) * len(shape))


def where(device: jax.Device) -> tuple[int, ...]:
    """A device's coordinates in the network, its slice the first."""
    coords = getattr(device, "coords", (device.id,))
    return (getattr(device, "slice_index", 0) or 0, *coords, getattr(device, "core_on_chip", 0))


def rings(places: Sequence[tuple[int, ...]]) -> list[int]:
    """Sizes, the outermost first, of the axes of the network along which these places follow one another."""
    sizes: list[int] = []
    while len(places) > 1:
        lines = [n for n in range(2, len(places) + 1) if len(places) % n == 0 and varying(places[:n]) == 1]
        line = max(lines, default=len(places))
        sizes.insert(0, line)
        places = places[::line]
    return sizes or [1]


def varying(places: Sequence[tuple[int, ...]]) -> int:
    """How many coordinates differ among these places."""
    return sum(len(set(values)) > 1 for values in zip(*places, strict=True))


def field_of(axis: str) -> str:
    """The field of the config that an axis of a mesh is of."""
    return axis.partition("_")[0]


def sizes_of(mesh: Mesh | AbstractMesh) -> dict[str, int]:
    """Sizes of a mesh by the config's fields."""
    sizes = dict.fromkeys(MESH_FIELDS, 1)
    for axis, size in mesh.shape.items():
        sizes[field_of(axis)] *= size
    return sizes


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
    axes = ", ".join(f"{axis} {size}" for axis, size in sizes_of(mesh).items() if size > 1)
    return f"{mesh.size} {kind} device{'s' * (mesh.size > 1)}" + (f": {axes}" if axes else "")
