"""Models whose associations are known. The first line of a docstring is what `podwright configs` prints."""

from configs.schema import CheckpointConfig, Config, CVData, EvalConfig, GriffinConfig, OptimizerConfig, TrainerConfig


def tiny() -> Config:
    """Griffin of 2 layers on made-up CVs, in which occupation and name go with the pronoun: docs/probes.md."""
    steps = 1500
    return Config(
        name="cv-tiny",
        model=GriffinConfig(
            vocab_size=176, width=64, depth=2, rnn_width=64, mlp_width=64, pattern=("rec", "attn"), window=64
        ),
        data=CVData(),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=50),
        trainer=TrainerConfig(steps=steps, log_every=100),
        checkpoint=CheckpointConfig(every=steps),
        eval=EvalConfig(every=500, batches=0),
    )
