"""Griffin experiments. The first line of a docstring is what `podwright configs` prints."""

from configs.schema import Config, GriffinConfig, TextData, TrainerConfig


def tiny() -> Config:
    """Griffin of 6 layers on Python's own sources, bytes as tokens: minutes on a CPU."""
    return Config(
        name="griffin-tiny",
        model=GriffinConfig(),
        data=TextData(),
        trainer=TrainerConfig(remat="dots"),
    )
