"""Griffin experiments. The first line of a docstring is what `podwright configs` prints.

The published sizes train on whatever `data.corpus` and `data.tokenizer` name; by default that is Python's own sources,
byte by byte, which shows that a size runs and nothing more.
"""

import dataclasses
from collections.abc import Callable

from configs.pods import on_a_pod
from configs.schema import Config, GriffinConfig, OptimizerConfig, TextData, TrainerConfig


def tiny() -> Config:
    """Griffin of 6 layers on Python's own sources, bytes as tokens: minutes on a CPU."""
    return Config(
        name="griffin-tiny",
        model=GriffinConfig(),
        data=TextData(),
        trainer=TrainerConfig(remat="dots"),
    )


@dataclasses.dataclass(frozen=True)
class Size:
    """One row of table 2 of arXiv 2402.19427, and the recipe for it."""

    width: int
    rnn_width: int
    depth: int
    tokens: float  # compute-optimal number of training tokens
    rows: int  # of 2048 tokens a step
    learning_rate: float


# Width, recurrence width, depth and tokens are the paper's. Batch sizes and learning rates were never published: these
# follow common practice for the size, half a million to two million tokens a step.
SIZES = {
    "100m": Size(768, 1024, 12, 1.9e9, 256, 6e-4),
    "200m": Size(1024, 1536, 12, 3.9e9, 256, 6e-4),
    "400m": Size(1536, 2048, 12, 7.8e9, 256, 4e-4),
    "1b": Size(2048, 2560, 24, 25e9, 512, 3e-4),
    "3b": Size(3072, 4096, 24, 60e9, 512, 2e-4),
    "7b": Size(4096, 5632, 32, 132.5e9, 1024, 1.5e-4),
    "14b": Size(5120, 8192, 40, 300e9, 1024, 1e-4),
}
PAPER_LENGTH = 2048
FAMILIES = {
    "hawk": (("rec",), "Hawk: recurrence alone"),
    "griffin": (("rec", "rec", "attn"), "Griffin: recurrence and local attention"),
    "transformer": (("attn",), "Transformer with multi-query attention"),
}


def paper(family: str, size: str) -> Callable[[], Config]:
    """The function of one model of the Griffin paper."""
    row, (pattern, words) = SIZES[size], FAMILIES[family]

    def experiment() -> Config:
        model = GriffinConfig(
            vocab_size=256_000,
            width=row.width,
            depth=row.depth,
            rnn_width=row.rnn_width,
            mlp_width=3 * row.width,
            num_heads=row.width // 128,
            num_gate_blocks=16,
            pattern=pattern,
            # The Transformer sees everything: a window as long as its rows never hides a key.
            window=PAPER_LENGTH if family == "transformer" else 1024,
        )
        steps = round(row.tokens / (row.rows * PAPER_LENGTH))
        optimizer = OptimizerConfig(learning_rate=row.learning_rate, warmup_steps=min(1000, steps // 10))
        return on_a_pod(f"{family}-{size}", model, PAPER_LENGTH, row.rows, steps, optimizer)

    experiment.__doc__ = f"{words}: the {size.upper()} of arXiv 2402.19427, table 2."
    return experiment


def recurrentgemma_2b() -> Config:
    """RecurrentGemma 2B, arXiv 2404.07839, to be fine-tuned after `podwright import`."""
    return recurrentgemma("recurrentgemma-2b", width=2560, depth=26, num_heads=10)


def recurrentgemma_9b() -> Config:
    """RecurrentGemma 9B, arXiv 2404.07839, to be fine-tuned after `podwright import`."""
    return recurrentgemma("recurrentgemma-9b", width=4096, depth=38, num_heads=16)


def recurrentgemma(name: str, width: int, depth: int, num_heads: int) -> Config:
    model = GriffinConfig(
        vocab_size=256_000,
        width=width,
        depth=depth,
        rnn_width=width,
        mlp_width=3 * width,
        num_heads=num_heads,
        num_gate_blocks=num_heads,
        window=2048,
        embedding_scale=True,
        logits_soft_cap=30.0,
    )
    # DeepMind's published fine-tuning: AdamW at 1e-4 with beta2 0.96 for 100 steps. Pretraining's figures are not public.
    optimizer = OptimizerConfig(learning_rate=1e-4, beta2=0.96, warmup_steps=10)
    return on_a_pod(name, model, length=8192, rows=64, steps=100, optimizer=optimizer)


PAPER = {
    f"{family}-{size}": paper(family, size)
    for family in FAMILIES
    for size in SIZES
    if size != "14b" or family == "griffin"  # the paper has 14B of Griffin alone
}
