"""Models that learn facts about people, arXiv 2503.21676: a Transformer, and Griffin and Hawk, equal but for their mixers.

The first line of a docstring is what `podwright configs` prints. `podwright study facts` trains the tiny ones.
"""

import dataclasses
from collections.abc import Callable

from configs.pods import on_a_pod
from configs.schema import (
    BiographyData,
    CheckpointConfig,
    Config,
    EvalConfig,
    GriffinConfig,
    OptimizerConfig,
    TrainerConfig,
)

MIXERS = {
    "transformer": (("attn",), "Transformer"),
    "griffin": (("rec", "rec", "attn"), "Griffin"),
    "hawk": (("rec",), "Hawk"),
}
TINY_DATA = BiographyData()
# The paper's people; a word of a template, a name's part and a value's are one token each here.
DATA = BiographyData(
    population=65_536,
    unseen=16_384,
    names=(900, 900, 1000),
    attributes=("800", "800", "200", "100", "500", "200x12x31"),
    templates=25,
    training_templates=20,
    template_tokens=12,
    sequence_length=512,
    batch_size=128,
    held_out_rows=2048,
)


def tiny(family: str) -> Callable[[], Config]:
    pattern, words = {**MIXERS, "griffin": (("rec", "attn"), "Griffin")}[family]

    def experiment() -> Config:
        return Config(
            name=f"facts-{family}-tiny",
            model=facts_model(TINY_DATA, family, pattern, width=64, depth=2, num_heads=4),
            data=TINY_DATA,
            optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=0, final_fraction=0.0),
            trainer=TrainerConfig(steps=2000, log_every=100),
            checkpoint=CheckpointConfig(every=2000),
            eval=EvalConfig(every=25, batches=0),
        )

    experiment.__doc__ = f"{words} of 2 layers on biographies of 1,024 people with 3 attributes: 2503.21676 in small."
    return experiment


def full(family: str) -> Callable[[], Config]:
    pattern, words = MIXERS[family]

    def experiment() -> Config:
        model = facts_model(DATA, family, pattern, width=512, depth=8, num_heads=8)
        optimizer = OptimizerConfig(learning_rate=4e-4, warmup_steps=0, final_fraction=0.0)
        run = on_a_pod(f"facts-{family}", model, DATA.sequence_length, DATA.batch_size, 16_000, optimizer)
        return dataclasses.replace(run, data=DATA, eval=EvalConfig(every=50, batches=0))

    experiment.__doc__ = (
        f"{words} of 8 layers on biographies of 65,536 people with 6 attributes: 2503.21676, section 2."
    )
    return experiment


def facts_model(
    data: BiographyData, family: str, pattern: tuple[str, ...], width: int, depth: int, num_heads: int
) -> GriffinConfig:
    """The Transformer sees whole rows, Griffin's attention half of one."""
    return GriffinConfig(
        vocab_size=data.vocab_size,
        width=width,
        depth=depth,
        rnn_width=width,
        mlp_width=3 * width,
        num_heads=num_heads,
        pattern=pattern,
        window=data.sequence_length // (1 if family == "transformer" else 2),
    )


FACTS = {
    **{f"facts-{family}-tiny": tiny(family) for family in MIXERS},
    **{f"facts-{family}": full(family) for family in MIXERS},
}
