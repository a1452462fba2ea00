"""What chips can do, and what the products that are rented are made of. Figures are of makers' data sheets or derived from
them; the comment says which."""

import math
import re
from dataclasses import dataclass

from configs.schema import ConfigError

# Dense bf16 peaks, FLOP/s a device as jax counts devices.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,  # v5e
    "TPU v5": 459e12,  # v5p
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,  # v6e
    "TPU7x": 2307e12 / 2,  # a chip is two devices
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Peak of a jax device kind, or None where no honest figure exists (a CPU, an unknown chip)."""
    if device_kind in PEAK_FLOPS:
        return PEAK_FLOPS[device_kind]
    return next(
        (peak for kind, peak in PEAK_FLOPS.items() if kind.startswith("NVIDIA") and device_kind.startswith(kind)), None
    )


@dataclass(frozen=True)
class Chip:
    """One generation of TPU. FLOP/s, bytes and bytes/s are of a whole chip."""

    kind: str  # what jax calls its devices
    libtpu: str  # what libtpu calls it
    peak: float  # dense bf16
    hbm: float  # GiB
    bandwidth: float  # of HBM
    link: float  # one ICI link, one way
    dcn: float  # network between slices, one way
    clock: float  # Hz: what the compiler's estimated_cycles tick by
    counts_cores: bool  # whether the number in the product's name counts TensorCores, two a chip, rather than chips
    torus: int  # an axis whose length is a multiple of this has links around
    shapes: tuple[str, ...]
    price: float | None  # USD a chip-hour
    devices: int = 1  # of jax, a chip
    options: tuple[tuple[str, str], ...] = ()  # for libtpu


SQUARE = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")
PRICES_OF = "2025"
# Bytes/s between a chip and its host's memory, one way: PCIe 3.0 with 16 lanes less a little, which is what "How to Scale
# Your Model" (part 2) reckons with for v6e. It is taken for all; newer hosts may have twice that.
HOST_BANDWIDTH = 15e9

# Peak, HBM, its bandwidth and shapes: docs.cloud.google.com/tpu/docs/{v5p,v6e,tpu7x} (v6e also has v5e's), as stored in
# 2026; v5e's 819 GB/s and v4: the same documents' earlier pages, for v4 also arXiv 2304.01433.
# Links: 45 and 90 GB/s one way are what "How to Scale Your Model" (jax-ml.github.io/scaling-book, part 2) measured of the
# 50 and 100 GB/s in those documents (bandwidth a chip in both directions / links / 2); v4 and TPU7x take the same tenth off.
# DCN: those documents' "data center network bandwidth per chip" (v5p 50, v6e and TPU7x 100 Gb/s); v5e two 100 Gb/s cards a
# host of 8 chips; v4 as the scaling book's v5p.
# Clock: v5e, v5p, v6e reproduce the peak from a large product's estimated_cycles; v4 and TPU7x: peak / (2 FLOPs x elements of
# all matrix units), 1.05 and 2.2 GHz.
# Links around: v5e and v6e documents name a torus only for the full axis of 16; the others close axes of multiples of 4.
# Prices: on-demand list prices of cloud.google.com/tpu/pricing, cheapest United States region, as quoted in public in 2025;
# the page itself was not read for this, so check before you rely on them. TPU7x has no public price that we know of.
CHIPS = {
    "v4": Chip(
        "TPU v4", "v4", 275e12, 32, 1228e9, 45e9, 6.25e9, 1.05e9, True, 4, CUBE[:-1], 3.22,
        options=(("chip_config_name", "megacore"),),
    ),
    "v5e": Chip("TPU v5 lite", "v5e", 197e12, 16, 819e9, 45e9, 3.125e9, 1.5e9, False, 16, SQUARE, 1.20),
    "v5p": Chip(
        "TPU v5", "v5p", 459e12, 95, 2765e9, 90e9, 6.25e9, 1.75e9, True, 4, (*CUBE, "16x16x24"), 4.20
    ),
    "v6e": Chip("TPU v6 lite", "v6e", 918e12, 32, 1638e9, 90e9, 12.5e9, 1.75e9, False, 16, SQUARE, 2.70),
    "tpu7x": Chip("TPU7x", "tpu7x", 2307e12, 192, 7380e9, 90e9, 12.5e9, 2.2e9, True, 4, CUBE, None, devices=2),
}  # fmt: skip
ALIASES = {"v5litepod": "v5e", "v7x": "tpu7x"}


@dataclass(frozen=True)
class Topology:
    """A product: `slices` equal slices of one generation."""

    name: str
    chip: Chip
    shape: tuple[int, ...]  # chips along each axis of a slice
    slices: int = 1

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        return self.chips * self.chip.devices

    @property
    def hosts(self) -> int:
        """Of one slice: a host has 4 chips, but up to 8 of v5e and v6e share one."""
        chips = math.prod(self.shape)
        return 1 if chips <= (8 if len(self.shape) == 2 else 4) else chips // 4

    @property
    def libtpu_name(self) -> str:
        return f"{self.chip.libtpu}:{'x'.join(map(str, self.shape))}"

    @property
    def libtpu_options(self) -> dict:
        options: dict = dict(self.chip.options)
        if self.slices > 1:
            options["num_slices"] = self.slices
        if math.prod(self.shape) == 1:
            options["chips_per_host_bounds"] = self.shape + (1,) * (3 - len(self.shape))
        return options

    # Of one jax device.
    @property
    def peak(self) -> float:
        return self.chip.peak / self.chip.devices

    @property
    def hbm(self) -> float:
        """Bytes."""
        return self.chip.hbm * 2**30 / self.chip.devices

    @property
    def bandwidth(self) -> float:
        return self.chip.bandwidth / self.chip.devices

    def describe(self) -> str:
        """For example `4 slices of v5e-256: 1,024 chips, 16x16 each`."""
        shape = "x".join(map(str, self.shape))
        chips = f"{self.chips:,} chip{'s' * (self.chips > 1)}, {shape}"
        return f"{self.slices} slices of {self.name}: {chips} each" if self.slices > 1 else f"{self.name}: {chips}"


def products(generation: str) -> dict[int, tuple[int, ...]]:
    """The number in a product's name -> chips along each axis."""
    chip = CHIPS[generation]
    shapes = [tuple(map(int, shape.split("x"))) for shape in chip.shapes]
    return {math.prod(shape) * (2 if chip.counts_cores else 1): shape for shape in shapes}


def find_topology(name: str, slices: int = 1) -> Topology:
    """The product called `name`: generation and number, as in v5e-256 (chips) or v5p-128 (TensorCores, two a chip).

    Raises ConfigError with the nearest there is.
    """
    match = re.fullmatch(r"(\w+?)-(\d+)", name.strip().lower())
    generation = ALIASES.get(match[1], match[1]) if match else ""
    if not match or generation not in CHIPS:
        listed = ", ".join(f"{g}-{max(products(g))}" for g in CHIPS)
        raise ConfigError(f"--topology {name} is not known: give a generation and a size, up to {listed}")
    sizes, size = products(generation), int(match[2])
    if size not in sizes:
        near = min(sizes, key=lambda known: abs(math.log(known / max(size, 0.5))))
        counted = "TensorCores" if CHIPS[generation].counts_cores else "chips"
        raise ConfigError(
            f"--topology {name} is not known, perhaps {generation}-{near}: {generation} is known with "
            f"{', '.join(map(str, sizes))} {counted}"
        )
    if slices < 1:
        raise ConfigError(f"--slices {slices} leaves nothing: give 1 or more")
    return Topology(f"{generation}-{size}", CHIPS[generation], sizes[size], slices)
