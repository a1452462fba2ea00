"""Long Range Arena (arXiv 2011.04006) with the sizes of arXiv 2303.06349, table 10, and small runs of the same tasks.

The first line of a docstring is what `podwright configs` prints.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

from configs.long_range_data import LongRangeData
from configs.schema import (
    CheckpointConfig,
    Config,
    EvalConfig,
    GriffinConfig,
    LRUConfig,
    OptimizerConfig,
    TrainerConfig,
)


@dataclass(frozen=True)
class Row:
    """Of the paper's table, but for the learning rate, which it does not have: those are of S5's published scripts."""

    data: LongRangeData
    width: int  # H
    state_size: int  # N
    steps: int
    learning_rate: float
    dropout: float
    ring: tuple[float, float]  # least and greatest modulus at the start
    rate_factor: float
    bidirectional: bool = False
    max_phase: float = 2 * math.pi


TABLE = {
    "cifar": Row(
        LongRangeData(task="cifar", files="cifar-10-batches-bin", inputs="values", sequence_length=1024, batch_size=50),
        512,
        384,
        180_000,
        4.5e-3,
        0.1,
        (0.9, 0.999),
        0.25,
    ),
    "listops": Row(LongRangeData(batch_size=32, workers=2), 128, 256, 80_000, 3e-3, 0.0, (0.0, 0.99), 0.5),
    "text": Row(
        LongRangeData(task="text", files="imdb", held_out_split="test", sequence_length=4096, batch_size=32),
        256,
        192,
        50_000,
        4e-3,
        0.1,
        (0.5, 0.9),
        0.1,
    ),
    "retrieval": Row(
        LongRangeData(
            task="retrieval", files="lra_release/tsv_data", inputs="pairs", sequence_length=8000, batch_size=64
        ),
        128,
        256,
        100_000,
        2e-3,
        0.1,
        (0.5, 0.9),
        0.5,
    ),
    "pathfinder": Row(
        LongRangeData(
            task="pathfinder",
            inputs="values",
            sequence_length=1024,
            batch_size=64,
            training_rows=160_000,
            held_out_rows=20_000,
            workers=8,
        ),
        192,
        256,
        500_000,
        4.5e-3,
        0.0,
        (0.9, 0.999),
        0.25,
        bidirectional=True,
    ),
    "pathx": Row(
        LongRangeData(
            task="pathfinder",
            inputs="values",
            sequence_length=16_384,
            batch_size=32,
            training_rows=160_000,
            held_out_rows=20_000,
            workers=8,
        ),
        128,
        256,
        250_000,
        1.8e-3,
        0.0,
        (0.999, 0.9999),
        0.25,
        bidirectional=True,
        max_phase=math.pi / 10,
    ),
}


def published(name: str) -> Callable[[], Config]:
    row = TABLE[name]

    def experiment() -> Config:
        return Config(
            name=f"lra-{name}",
            model=LRUConfig(
                vocab_size=row.data.num_input_symbols + row.data.num_classes,
                width=row.width,
                depth=6,
                state_size=row.state_size,
                r_min=row.ring[0],
                r_max=row.ring[1],
                max_phase=row.max_phase,
                dropout=row.dropout,
                rate_factor=row.rate_factor,
                bidirectional=row.bidirectional,
                channels=row.data.channels,
                pooling="mean",
                num_classes=row.data.num_classes,
                pairs=row.data.inputs == "pairs",
            ),
            data=row.data,
            optimizer=OptimizerConfig(
                learning_rate=row.learning_rate,
                warmup_steps=row.steps // 10,
                final_fraction=0.0,
                beta2=0.999,
                weight_decay=0.05,
                clip_norm=0.0,
            ),
            trainer=TrainerConfig(steps=row.steps, remat="dots", log_every=100),
            checkpoint=CheckpointConfig(every=1000),
            eval=EvalConfig(every=row.steps // 50, batches=0),
        )

    experiment.__doc__ = f"LRU on Long Range Arena's {name}, rows of {row.data.sequence_length:,}: arXiv 2303.06349."
    return experiment


LISTOPS_TINY = LongRangeData(
    sequence_length=100,
    max_depth=4,
    max_args=5,
    min_length=19,
    max_length=101,
    training_rows=96_000,
    held_out_rows=1000,
    batch_size=32,
)
# Data, width, blocks, modes, least modulus, learning-rate factor, pooling, steps.
TINY = {
    "listops": (LISTOPS_TINY, 64, 4, 64, 0.0, 0.5, "mean", 3000),
    "pathfinder": (
        LongRangeData(
            task="pathfinder", sequence_length=1024, contour_length=6, training_rows=10_000, held_out_rows=500
        ),
        64,
        4,
        64,
        0.9,
        0.25,
        "mean",
        3000,
    ),
    "digits": (LongRangeData(task="digits", sequence_length=64), 64, 2, 64, 0.9, 0.25, "mean", 1000),
    "first-token": (
        LongRangeData(task="first-token", sequence_length=128, held_out_rows=512),
        16,
        2,
        16,
        0.99,
        0.25,
        "last",
        500,
    ),
    "matching": (
        LongRangeData(task="matching", inputs="pairs", sequence_length=128, held_out_rows=512),
        32,
        2,
        32,
        0.9,
        0.25,
        "mean",
        1000,
    ),
}


def tiny(name: str) -> Callable[[], Config]:
    data, width, depth, modes, r_min, rate_factor, pooling, steps = TINY[name]

    def experiment() -> Config:
        return Config(
            name=f"lra-{name}-tiny",
            model=LRUConfig(
                vocab_size=data.num_input_symbols + data.num_classes,
                width=width,
                depth=depth,
                state_size=modes,
                r_min=r_min,
                rate_factor=rate_factor,
                pooling=pooling,
                num_classes=data.num_classes,
                pairs=data.inputs == "pairs",
            ),
            data=data,
            optimizer=OptimizerConfig(warmup_steps=steps // 10, weight_decay=0.05),
            trainer=TrainerConfig(steps=steps, log_every=100),
            checkpoint=CheckpointConfig(every=1000),
            eval=EvalConfig(every=steps // 5, batches=0),
        )

    experiment.__doc__ = f"LRU of {depth} layers on {name} rows of {data.sequence_length:,}, minutes on a CPU."
    return experiment


MLP_WIDTHS = {"listops": 80, "first-token": 22}  # with which a Transformer has the size of the LRU


def transformer(name: str) -> Callable[[], Config]:
    def experiment() -> Config:
        config = tiny(name)()
        lru = config.model
        assert isinstance(lru, LRUConfig)
        model = GriffinConfig(
            vocab_size=lru.vocab_size,
            width=lru.width,
            depth=lru.depth,
            rnn_width=lru.width,
            mlp_width=MLP_WIDTHS[name],
            pattern=("attn",),
            window=512,  # more than any row, the longer ones of the study included
        )
        return dataclasses.replace(config, name=f"{config.name}-transformer", model=model)

    experiment.__doc__ = f"Transformer of the size of lra-{name}-tiny, for which the label is the token after the row."
    return experiment


LONG_RANGE = {
    **{f"lra-{name}": published(name) for name in TABLE},
    **{f"lra-{name}-tiny": tiny(name) for name in TINY},
    **{f"lra-{name}-tiny-transformer": transformer(name) for name in MLP_WIDTHS},
}
