"""Which tensors of a layer a config may ask to keep for the backward pass, and the sentences about those it may not."""

from typing import Any

from configs.section import ConfigError, perhaps

ATTENTION, RECURRENCE = ("qkv", "context", "attn_out"), ("rnn_in", "rnn", "rnn_out")


def check_remat(model: Any, trainer: Any) -> None:
    """Raises ConfigError where `trainer.remat`, `save` and `offload` contradict each other or the model."""
    if model.kind == "nfnet" and trainer.remat == "dots":
        raise ConfigError(
            f"{trainer.show('remat')} contradicts model.kind={model.kind!r}: "
            f"only language models know it, 'none' and 'layer' are for all"
        )
    for field in ("save", "offload"):
        given = getattr(trainer, field)
        if given and trainer.remat != "layer":
            raise ConfigError(
                f"{trainer.show(field)} contradicts {trainer.show('remat')}: names say what trainer.remat='layer' keeps"
            )
        for name in given:
            if name not in model.tensors:
                raise ConfigError(
                    f"{trainer.show(field)}: {name!r} is not a tensor of this {model.kind}'s layers, which have "
                    f"{', '.join(model.tensors)}{perhaps(name.lower(), model.tensors)}"
                )
    if twice := [name for name in trainer.save if name in trainer.offload]:
        raise ConfigError(
            f"{trainer.show('offload')} contradicts {trainer.show('save')}: {twice[0]} can be kept on the host or on the "
            f"device, not on both"
        )
