"""The runs behind docs/studies: Hawk, Griffin and a Transformer, equal but for their mixers, on the same task.

The first line of a docstring is what `podwright configs` prints. `podwright study NAME` trains the three and compares them.
"""

from collections.abc import Callable

from configs.schema import (
    CheckpointConfig,
    Config,
    EvalConfig,
    GriffinConfig,
    OptimizerConfig,
    RecallData,
    TextData,
    TrainerConfig,
)

MIXERS = {
    "hawk": (("rec",), "Hawk"),
    "griffin": (("rec", "rec", "attn", "rec", "rec"), "Griffin with attention in block 3 alone"),
    "transformer": (("attn",), "Transformer"),
}
EVERYTHING = 2**20  # a window longer than any row


# Rows, batch, steps and peak learning rate: as published where the paper says so, and for two cores in minutes.
RECALL = {
    "selective-copy": (RecallData(sequence_length=1040, batch_size=64), 100_000, 1e-3),
    "selective-copy-tiny": (RecallData(sequence_length=72, num_copied=8, batch_size=64), 1500, 3e-3),
    "induction": (RecallData(task="induction", sequence_length=256, batch_size=64), 100_000, 1e-3),
    "induction-tiny": (RecallData(task="induction", sequence_length=64, batch_size=64), 1000, 3e-3),
}


def recall(task: str, family: str, size: str) -> Callable[[], Config]:
    """Five layers of width 64, about 250 thousand parameters (arXiv 2402.19427, section 6.2)."""
    (data, steps, learning_rate), (pattern, words) = RECALL[task + size], MIXERS[family]

    def experiment() -> Config:
        context = data.sequence_length - (data.num_copied if data.task == "selective-copy" else 0)
        model = GriffinConfig(
            vocab_size=data.num_symbols,
            width=64,
            depth=5,
            rnn_width=64,
            mlp_width=192,
            pattern=pattern,
            window=EVERYTHING if family == "transformer" else context // 2,
        )
        return Config(
            name=f"{task}-{family}{size}",
            model=model,
            data=data,
            optimizer=OptimizerConfig(learning_rate=learning_rate, warmup_steps=min(1000, steps // 10)),
            trainer=TrainerConfig(steps=steps, remat="dots", log_every=100),
            checkpoint=CheckpointConfig(every=steps // 4),
            eval=EvalConfig(every=steps // 40, batches=0),
        )

    what, length = "selective copying" if data.task == "selective-copy" else "induction heads", data.sequence_length
    experiment.__doc__ = f"{words} on {what}, rows of {length}: section 6.2 of arXiv 2402.19427."
    return experiment


def long_context(family: str) -> Callable[[], Config]:
    """griffin-tiny on rows of 512 tokens, and its rivals of the same depth and width."""
    pattern, words = {**MIXERS, "griffin": (("rec", "rec", "attn"), "Griffin")}[family]

    def experiment() -> Config:
        return Config(
            name=f"long-context-{family}",
            model=GriffinConfig(pattern=pattern, window=EVERYTHING if family == "transformer" else 256),
            data=TextData(sequence_length=512, held_out=0.1),
            trainer=TrainerConfig(steps=400, remat="dots"),
        )

    experiment.__doc__ = (
        f"{words} of 6 layers on rows of 512 tokens, to read longer ones: section 6.1 of arXiv 2402.19427."
    )
    return experiment


STUDIES = {
    **{f"long-context-{family}": long_context(family) for family in MIXERS},
    **{
        f"{task}-{family}{size}": recall(task, family, size)
        for task in ("selective-copy", "induction")
        for size in ("-tiny", "")
        for family in MIXERS
    },
}
