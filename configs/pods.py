"""What the published sizes of all families have in common: how they are trained on a TPU pod."""

from configs.schema import (
    CheckpointConfig,
    Config,
    EvalConfig,
    GemmaConfig,
    GriffinConfig,
    MeshConfig,
    OptimizerConfig,
    TextData,
    TrainerConfig,
)


def on_a_pod(
    name: str, model: GriffinConfig | GemmaConfig, length: int, rows: int, steps: int, optimizer: OptimizerConfig
) -> Config:
    """bfloat16 products, every layer recomputed, and parameters divided over all devices."""
    return Config(
        name=name,
        model=model,
        data=TextData(sequence_length=length, batch_size=rows),
        optimizer=optimizer,
        mesh=MeshConfig(data=1, fsdp=-1),
        checkpoint=CheckpointConfig(every=500),
        trainer=TrainerConfig(steps=steps, compute_dtype="bfloat16", remat="layer"),
        eval=EvalConfig(every=500, batches=16),
    )
