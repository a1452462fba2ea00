"""Which learning rates the models of the small runs of Long Range Arena's kind want, with a seed that no study has."""

from collections.abc import Iterator

from configs.overrides import resolve
from configs.schema import Config
from launch.studies.long_range import MODELS, STEPS
from launch.sweeps.grids import grid

SEED = "9"


def first_token() -> Iterator[Config]:
    """Four learning rates for every model of the study first-token."""
    return tried(STEPS, (1e-3, 3e-3, 1e-2, 3e-2))


def listops() -> Iterator[Config]:
    """Three learning rates for every model of the study listops, in a quarter of its steps."""
    return tried(MODELS, (1e-3, 3e-3, 1e-2), "--trainer.steps", "750", "--optimizer.warmup_steps", "75")


def tried(arms: dict[str, str], rates: tuple[float, ...], *more: str) -> Iterator[Config]:
    for words in arms:
        name, *overrides = words.split()
        config = resolve(name, [*overrides, *more, "--trainer.seed", SEED, "--data.seed", SEED], {}).config
        yield from grid(config, {"optimizer.learning_rate": rates})
