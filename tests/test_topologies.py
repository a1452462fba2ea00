"""Products are found by the names that users write, with the sizes that each generation's names count."""

from dataclasses import dataclass
from unittest import mock

import jax
import numpy as np
import pytest

from configs.schema import ConfigError, MeshConfig
from sharding.mesh import across_slices, axis_sizes, on_rings, rings, slice_notes, where
from sharding.topologies import CHIPS, PEAK_FLOPS, find_topology, products

# Name, chips, devices of jax, libtpu's name: Cloud TPU's tables of configurations; v4, v5p and TPU7x count TensorCores.
KNOWN = [
    ("v4-32", 16, 16, "v4:2x2x4"),
    ("v4-128", 64, 64, "v4:4x4x4"),
    ("v5e-16", 16, 16, "v5e:4x4"),
    ("v5litepod-256", 256, 256, "v5e:16x16"),
    ("v5p-8", 4, 4, "v5p:2x2x1"),
    ("v5p-128", 64, 64, "v5p:4x4x4"),
    ("v5p-12288", 6144, 6144, "v5p:16x16x24"),
    ("V6E-16", 16, 16, "v6e:4x4"),
    ("tpu7x-8", 4, 8, "tpu7x:2x2x1"),
    ("tpu7x-128", 64, 128, "tpu7x:4x4x4"),
]


@pytest.mark.parametrize(("name", "chips", "devices", "libtpu"), KNOWN)
def test_products_are_what_their_names_say(name, chips, devices, libtpu):
    found = find_topology(name)
    assert (found.chips, found.devices, found.libtpu_name) == (chips, devices, libtpu)


def test_several_slices_are_as_many_of_everything():
    found = find_topology("v5e-256", 4)
    assert (found.chips, found.libtpu_options) == (1024, {"num_slices": 4})
    assert "4 slices of v5e-256: 1,024 chips, 16x16 each" in found.describe()


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("v5e-17", "v5e-16"), ("v5p-120", "v5p-128"), ("v6e-512", "v6e-256"), ("v4-1", "v4-8"), ("tpu7x-0", "tpu7x-8")],
)
def test_an_unknown_size_is_told_the_nearest(name, nearest):
    with pytest.raises(ConfigError, match=rf"--topology {name} is not known, perhaps {nearest}:"):
        find_topology(name)


@pytest.mark.parametrize("name", ["v5", "v9-16", "256", "v5e", "h100-8"])
def test_another_generation_is_told_which_there_are(name):
    with pytest.raises(ConfigError, match=f"--topology {name} is not known: .*v5e-256, v5p-12288"):
        find_topology(name)


def test_no_slices_are_refused():
    with pytest.raises(ConfigError, match="--slices 0"):
        find_topology("v5e-16", 0)


def test_peaks_of_chips_are_those_that_a_run_reports():
    for generation in CHIPS:
        topology = find_topology(f"{generation}-{max(products(generation))}")
        assert topology.peak == PEAK_FLOPS[topology.chip.kind]


@pytest.mark.parametrize("generation", CHIPS)
def test_clocks_tick_a_whole_number_of_matrix_units_at_peak(generation):
    """Peak / clock is 2 FLOPs times the elements of all matrix units: of 128x128, from v6e on of 256x256."""
    chip = CHIPS[generation]
    side = 256 if generation in ("v6e", "tpu7x") else 128
    units = chip.peak / chip.clock / (2 * side**2)
    assert units == pytest.approx(round(units), rel=0.01)
    assert round(units) in (4, 8)


def sizes(**given: int) -> dict[str, int]:
    return axis_sizes(MeshConfig(**given), 64, "tpu")


def test_slices_divide_the_outermost_axes():
    assert across_slices(sizes(replica=2, data=1, fsdp=32), 2) == [2, 1, 1, 1, 1]
    assert across_slices(sizes(replica=2, data=4, fsdp=8), 4) == [2, 2, 1, 1, 1]
    assert slice_notes(sizes(replica=2, data=1, fsdp=32), 2) == []
    (note,) = slice_notes(sizes(data=1, fsdp=64), 2)
    assert "fsdp 64 runs across slices" in note


def test_a_mesh_that_slices_do_not_divide_is_refused():
    with pytest.raises(ConfigError, match=r"no axis divides among 3 slices: set mesh.replica to 3"):
        across_slices(sizes(data=1, fsdp=64), 3)


@pytest.mark.parametrize(
    ("slices", "torus", "expected"),
    [
        (1, (4, 4, 1), [4, 4]),
        (1, (16, 16, 1), [16, 16]),
        (1, (4, 4, 8), [4, 4, 8]),
        (1, (2, 2, 1), [2, 2]),
        (1, (1, 8, 1), [8]),
        (4, (4, 4, 1), [4, 4, 4]),
        (1, (1, 1, 1), [1]),
    ],
)
def test_rings_are_the_axes_of_the_torus(slices, torus, expected):
    places = [(s, *place) for s in range(slices) for place in np.ndindex(*torus)]
    assert rings(places) == expected


def test_places_on_no_common_axis_are_one_ring():
    assert rings([(0, 0), (1, 1)]) == [2]
    assert rings([(0, 0), (0, 1), (1, 1), (1, 2)]) == [2, 2]


def test_a_winding_order_of_devices_is_put_along_the_axes():
    """jax numbers a 4 x 4 slice along one winding ring; neighbours on an axis of the mesh must be on one of the torus."""
    winding = [(x, y if x % 2 else 3 - y, 0) for x in range(4) for y in range(4)]
    devices = np.empty((1, 2, 16, 1, 1), object)
    for i, place in enumerate(winding):
        for data in range(2):
            devices[0, data, i, 0, 0] = Chip((*place[:2], data))
    with mock.patch("sharding.mesh.Mesh", lambda devices, names, axis_types: (devices, names)):
        laid_out, names = on_rings(devices)
    assert names == ["replica", "data", "fsdp", "fsdp_2", "sequence", "tensor"]
    for data, x, y in np.ndindex(2, 4, 4):
        assert laid_out[0, data, x, y, 0, 0].coords == (x, y, data)


@dataclass(frozen=True)
class Chip:
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    id: int = 0


def test_a_device_without_coordinates_is_where_its_number_says():
    assert [where(device) for device in jax.devices()[:2]] == [(0, 0, 0), (0, 1, 0)]
