"""Gemma experiments. The first line of a docstring is what `podwright configs` prints."""

from configs.schema import Config, GemmaConfig, TextData, TrainerConfig


def tiny() -> Config:
    """Gemma 3 of 6 layers on Python's own sources, bytes as tokens: minutes on a CPU."""
    return Config(
        name="gemma-tiny",
        model=GemmaConfig(),
        data=TextData(),
        trainer=TrainerConfig(remat="dots"),
    )
