"""Fine-tuning on prompts and responses. The first line of a docstring is what `podwright configs` prints."""

import dataclasses
from collections.abc import Callable

from configs.schema import ChatData, Config, EvalConfig, OptimizerConfig


def chat(pretraining: Callable[[], Config]) -> Callable[[], Config]:
    """The same model on records of `data.files`, starting from `finetune.base`."""

    def experiment() -> Config:
        config = pretraining()
        return dataclasses.replace(
            config,
            name=f"{config.name}-chat",
            data=ChatData(sequence_length=min(getattr(config.data, "sequence_length", 256), 4096), batch_size=8),
            # Gentle, for weights that know something already; adapters alone bear ten times as much (arXiv 2106.09685).
            optimizer=OptimizerConfig(learning_rate=2e-5, warmup_steps=20, weight_decay=0.0),
            trainer=dataclasses.replace(config.trainer, steps=300),
            eval=EvalConfig(every=50, batches=0),
        )

    experiment.__doc__ = (
        f"{pretraining().name} on prompts and responses: give data.files, data.tokenizer and finetune.base."
    )
    return experiment
