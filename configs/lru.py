"""LRU experiments. The first line of a docstring is what `podwright configs` prints."""

from configs.schema import Config, LRUConfig, TextData, TrainerConfig


def tiny() -> Config:
    """LRU of 6 layers (arXiv 2303.06349) on Python's own sources, bytes as tokens: minutes on a CPU."""
    return Config(name="lru-tiny", model=LRUConfig(), data=TextData(), trainer=TrainerConfig(remat="dots"))
