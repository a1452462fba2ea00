"""Gemma experiments. The first line of a docstring is what `podwright configs` prints.

The three families differ in the fields of one config class. The published sizes train on whatever `data.corpus` and
`data.tokenizer` name; by default that is Python's own sources, byte by byte, which shows that a size runs and nothing
more.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from configs.pods import on_a_pod
from configs.schema import Config, GemmaConfig, OptimizerConfig, TextData, TrainerConfig

# What a family's models have in common; Gemma 3's are the defaults of the schema.
GEMMA1: dict[str, Any] = dict(pattern=("global",), qk_norm=False, post_norm=False, rope_base_global=1e4)
GEMMA2: dict[str, Any] = dict(
    pattern=("local", "global"), qk_norm=False, rope_base_global=1e4, attention_soft_cap=50.0, logits_soft_cap=30.0
)
GEMMA3: dict[str, Any] = {}


def tiny() -> Config:
    """Gemma 3 of 6 layers on Python's own sources, bytes as tokens: minutes on a CPU."""
    return on_a_laptop("gemma-tiny", GemmaConfig())


def gemma1_tiny() -> Config:
    """Gemma 1 of 6 layers on Python's own sources, bytes as tokens: minutes on a CPU."""
    return on_a_laptop("gemma1-tiny", GemmaConfig(num_kv_heads=1, **GEMMA1))


def gemma2_tiny() -> Config:
    """Gemma 2 of 6 layers on Python's own sources, bytes as tokens: minutes on a CPU."""
    return on_a_laptop("gemma2-tiny", GemmaConfig(**GEMMA2))


def on_a_laptop(name: str, model: GemmaConfig) -> Config:
    return Config(name=name, model=model, data=TextData(), trainer=TrainerConfig(remat="dots"))


@dataclasses.dataclass(frozen=True)
class Size:
    """A published model: sizes and number of training tokens as in the reports, and a recipe of ours."""

    report: str  # words for the family, and arXiv number
    family: dict[str, Any]
    shape: tuple[int, int, int, int, int, int]  # depth, width, query heads, key-value heads, head features, MLP width
    rest: dict[str, Any]  # fields that neither the family nor the shape sets
    length: int  # tokens of a row
    tokens: float  # of pretraining
    rows: int  # a step
    learning_rate: float


SHAPE = ("depth", "width", "num_heads", "num_kv_heads", "head_dim", "mlp_width")
REPORTS = ("Gemma 1, arXiv 2403.08295", "Gemma 2, arXiv 2408.00118", "Gemma 3, arXiv 2503.19786")
# The tables of Gemma 1 and 2 have 128 rows that no token of the tokenizer reaches.
VOCAB12: dict[str, Any] = dict(vocab_size=256_000, padding_rows=128)
G1 = VOCAB12
G2: dict[str, Any] = dict(window=4096, **VOCAB12)
G3_SMALL: dict[str, Any] = dict(vocab_size=262_144, window=512)
G3: dict[str, Any] = dict(vocab_size=262_144, window=1024, rope_divisor_global=8.0)
# The query scale is head_dim**-0.5 except in the two 27Bs: (width / num_heads)**-0.5, of 144 and 168.
G2_27B: dict[str, Any] = dict(query_scale=144**-0.5, **G2)
G3_27B: dict[str, Any] = dict(query_scale=168**-0.5, **G3)
# Batch sizes, learning rates and schedules were never published: these follow common practice, with rows for a pod whose
# every device has one.
SIZES = {
    "gemma-2b": Size(REPORTS[0], GEMMA1, (18, 2048, 8, 1, 256, 16384), G1, 8192, 3e12, 256, 3e-4),
    "gemma-7b": Size(REPORTS[0], GEMMA1, (28, 3072, 16, 16, 256, 24576), G1, 8192, 6e12, 512, 2e-4),
    "gemma2-2b": Size(REPORTS[1], GEMMA2, (26, 2304, 8, 4, 256, 9216), G2, 8192, 2e12, 256, 3e-4),
    "gemma2-9b": Size(REPORTS[1], GEMMA2, (42, 3584, 16, 8, 256, 14336), G2, 8192, 8e12, 512, 2e-4),
    "gemma2-27b": Size(REPORTS[1], GEMMA2, (46, 4608, 32, 16, 128, 36864), G2_27B, 8192, 13e12, 512, 1e-4),
    "gemma3-270m": Size(REPORTS[2], GEMMA3, (18, 640, 4, 1, 256, 2048), G3_SMALL, 32768, 6e12, 64, 6e-4),
    "gemma3-1b": Size(REPORTS[2], GEMMA3, (26, 1152, 4, 1, 256, 6912), G3_SMALL, 32768, 2e12, 64, 4e-4),
    "gemma3-4b": Size(REPORTS[2], GEMMA3, (34, 2560, 8, 4, 256, 10240), G3, 32768, 4e12, 128, 3e-4),
    "gemma3-12b": Size(REPORTS[2], GEMMA3, (48, 3840, 16, 8, 256, 15360), G3, 32768, 12e12, 256, 1.5e-4),
    "gemma3-27b": Size(REPORTS[2], GEMMA3, (62, 5376, 32, 16, 128, 21504), G3_27B, 32768, 14e12, 256, 1e-4),
}


def published(name: str) -> Callable[[], Config]:
    """The function of one model of the reports."""
    size = SIZES[name]

    def experiment() -> Config:
        fields: dict[str, Any] = dict(zip(SHAPE, size.shape, strict=True)) | size.family | size.rest
        model = GemmaConfig(**fields)
        steps = round(size.tokens / (size.rows * size.length))
        optimizer = OptimizerConfig(learning_rate=size.learning_rate, warmup_steps=2000)
        return on_a_pod(name, model, size.length, size.rows, steps, optimizer)

    experiment.__doc__ = f"{size.report}: the text model of {name.rpartition('-')[2].upper()}."
    return experiment


PUBLISHED = {name: published(name) for name in SIZES}
