"""How many parameters a model has, in closed form: known before jax is imported and before anything is allocated."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from configs.schema import Config, GemmaConfig, GriffinConfig, LRUConfig


@dataclass(frozen=True)
class Count:
    total: int
    embedding: int  # of the table, which the output shares


def griffin(config: GriffinConfig) -> Count:
    d, r, f = config.width, config.rnn_width, config.mlp_width
    head = d // config.num_heads
    mlp = 3 * d * f + 2 * f + d
    gate = r * r // config.num_gate_blocks + r
    # Two ways in, one out, convolution and its bias, two gates and the recurrence's own vector.
    recurrence = 2 * (d * r + r) + (r * d + d) + (config.conv_width * r + r) + 2 * gate + r
    attention = 2 * d * d + 2 * d * head + d
    kinds = [config.pattern[i % len(config.pattern)] for i in range(config.depth)]
    layers = sum((recurrence if kind == "rec" else attention) + mlp + 2 * d for kind in kinds)
    embedding = config.vocab_size * d
    return Count(layers + d + embedding, embedding)


def gemma(config: GemmaConfig) -> Count:
    d, f, h = config.width, config.mlp_width, config.head_dim
    attention = 2 * d * h * (config.num_heads + config.num_kv_heads) + (2 * h if config.qk_norm else 0)
    norms = (4 if config.post_norm else 2) * d
    embedding = config.table_rows * d
    return Count(config.depth * (attention + 3 * d * f + norms) + d + embedding, embedding)


def lru(config: LRUConfig) -> Count:
    d, n, ways = config.width, config.state_size, 1 + config.bidirectional
    if config.dense:
        recurrence = (1 + ways) * d * n + n * n
    else:
        recurrence = 2 * (1 + ways) * d * n + 2 * n + n * (config.recurrence == "lru")
    layer = recurrence + d + 2 * d + 2 * d * d + 2 * d  # with the skip D, the norm and the gated unit
    embedding = 0 if config.channels else config.vocab_size * d
    encoder = d * (config.channels + 1) if config.channels else 0
    head = config.num_classes * (d + 1) + config.pairs * (4 * d * d + d)
    return Count(config.depth * layer + d + head + encoder + embedding, embedding)


COUNTS: dict[str, Callable[[Any], Count]] = {"griffin": griffin, "gemma": gemma, "lru": lru}  # by kind of model


def parameter_lines(config: Config) -> list[str]:
    """For `podwright config`: one line, or none for a kind of model without a closed form here."""
    if config.model.kind not in COUNTS:
        return []
    count = COUNTS[config.model.kind](config.model)
    return [f"{count.total:,} parameters, {count.total - count.embedding:,} without the embedding"]
