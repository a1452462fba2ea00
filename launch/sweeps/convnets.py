"""The grid of "ConvNets Match Vision Transformers at Scale" (arXiv 2310.16764, section 2): sizes, budgets of epochs, and learning
rates in factors of two, of which the best stands for its budget."""

from collections.abc import Iterator

from configs.image_studies import SIZES
from configs.overrides import resolve
from configs.schema import Config
from launch.sweeps.grids import grid
from launch.sweeps.planners import epochs

EPOCHS, RATES, DIGITS = (4, 8, 16, 32), (0.05, 0.1, 0.2), 1423
FULL_SIZES = ("f0", "f1", "f3", "f7", "f3plus", "f7plus")
FULL_EPOCHS, FULL_RATES, FULL_IMAGES = (0.25, 0.5, 1, 2, 4, 8), (0.4, 0.8, 1.6), 4_000_000_000


def small() -> Iterator[Config]:
    """NFNets of four sizes on digits, 4 to 32 epochs at three learning rates each."""
    return trained([f"convnets-scale-{size}" for size in SIZES], DIGITS, EPOCHS, RATES)


def published() -> Iterator[Config]:
    """F0 to F7+ on four billion images, a quarter of an epoch to 8 at three learning rates each, as published."""
    return trained([f"nfnet-{size}-pretrain" for size in FULL_SIZES], FULL_IMAGES, FULL_EPOCHS, FULL_RATES)


def trained(names: list[str], images: int, passes: tuple[float, ...], rates: tuple[float, ...]) -> Iterator[Config]:
    for config in epochs([resolve(name).config for name in names], images, passes):
        yield from grid(config, {"optimizer.learning_rate": rates})
