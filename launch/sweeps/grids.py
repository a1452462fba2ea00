"""Several configs from one: what a sweep is made of. Each function yields configs, which differ in nothing else."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from configs.fields import build, fields_of, kinds_of, values_of
from configs.schema import Config
from configs.suggestions import unknown_field


def changed(config: Config, values: Mapping[str, Any]) -> Config:
    """With these values by dotted path, {"optimizer.learning_rate": 0.1}. Raises ConfigError."""
    kinds = kinds_of(config)
    for path in values:
        if path not in fields_of(kinds):
            raise unknown_field(path, path, kinds, [])
    return build(kinds, values_of(config) | dict(values))


def grid(config: Config, values: Mapping[str, Sequence[Any]]) -> Iterator[Config]:
    """Every combination of the values of some fields; the last field changes fastest."""
    for chosen in itertools.product(*values.values()):
        yield changed(config, dict(zip(values, chosen, strict=True)))


def together(config: Config, values: Mapping[str, Sequence[Any]]) -> Iterator[Config]:
    """The first values of all fields, then the second ones, ... Raises ValueError where they are not equally many."""
    for chosen in zip(*values.values(), strict=True):
        yield changed(config, dict(zip(values, chosen, strict=True)))


def random(config: Config, ranges: Mapping[str, tuple[float, float]], count: int, seed: int = 0) -> Iterator[Config]:
    """`count` configs whose fields are drawn independently, uniformly in the logarithm, from [low, high)."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        drawn = {path: math.exp(rng.uniform(math.log(low), math.log(high))) for path, (low, high) in ranges.items()}
        yield changed(config, drawn)
