"""The Griffin paper's comparison in miniature: Hawk, Griffin and its Transformer at equal training FLOPs (arXiv 2402.19427,
section 3.2), on Python's own sources, byte by byte."""

from collections.abc import Iterator

from configs.griffin import FAMILIES
from configs.schema import CheckpointConfig, Config, EvalConfig, GriffinConfig, OptimizerConfig, TextData, TrainerConfig
from launch.sweeps.grids import grid
from launch.sweeps.planners import isoflop

WIDTHS = {16: 24, 24: 32, 32: 40, 48: 64, 64: 88}  # of the model, and of its recurrence: four thirds, as in the paper
BUDGETS = (1e11, 3e11, 9e11)
FURTHER, LARGER = 3.6e12, (32, 48, 64)  # four times the compute, for what the law of the rest foretells
LENGTH, ROWS, DEPTH = 128, 4, 6


def law() -> Iterator[Config]:
    """Griffin, Hawk and a Transformer at equal FLOPs: five sizes, three budgets, and three sizes at four times the last."""
    for family in FAMILIES:
        yield from isoflop([model(family, width) for width in WIDTHS], BUDGETS)
        yield from isoflop([model(family, width) for width in LARGER], [FURTHER])


def rates() -> Iterator[Config]:
    """Which learning rates the smallest, the middle and the largest Griffin and Transformer of griffin-law want."""
    for family in ("griffin", "transformer"):
        for width in (16, 32, 64):
            (config,) = isoflop([model(family, width)], BUDGETS[1:2])
            yield from grid(config, {"optimizer.learning_rate": [0.005, 0.01, 0.02]})


def model(family: str, width: int) -> Config:
    """Of two groups of three layers. One learning rate for all: see `rates`."""
    pattern, _ = FAMILIES[family]
    return Config(
        name=f"{family}-law-{width}",
        model=GriffinConfig(
            width=width,
            depth=DEPTH,
            rnn_width=WIDTHS[width],
            mlp_width=3 * width,
            num_heads=width // 8,
            pattern=pattern,
            window=LENGTH if family == "transformer" else LENGTH // 2,
        ),
        data=TextData(sequence_length=LENGTH, batch_size=ROWS),
        optimizer=OptimizerConfig(learning_rate=0.01, warmup_steps=100),
        trainer=TrainerConfig(remat="none", log_every=50),
        checkpoint=CheckpointConfig(every=10**6),
        eval=EvalConfig(every=0, batches=64),
    )
