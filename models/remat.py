"""What the backward pass keeps of a layer, and what it computes again: one of three rungs, or tensors by their names.

A layer's input is always kept, or nothing could be computed again. Which further names a family has is
`config.tensors`; docs/memory.md says what each costs and saves.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
from jax.ad_checkpoint import checkpoint_name

from configs.schema import TrainerConfig


@dataclass(frozen=True)
class Named:
    """Of a layer only tensors of these names are kept: on the device, or in the host's pinned memory."""

    save: tuple[str, ...] = ()
    offload: tuple[str, ...] = ()


# "none" of a layer is computed again, all but its matrix products and what attention returns ("dots"), all of it
# ("layer"), or all that is not named.
Remat = str | Named


def remat_of(trainer: TrainerConfig) -> Remat:
    named = trainer.save or trainer.offload
    return Named(trainer.save, trainer.offload) if named else trainer.remat


def named(x: jax.Array, name: str) -> jax.Array:
    """x, which a `Named` can ask to keep. A product is named as it comes, before a norm or a rotation, whose gradients ask
    for their input; what follows it is cheap to compute again."""
    return checkpoint_name(x, name)


def rematted(layer: Callable, remat: Remat, *, in_scan: bool = False) -> Callable:
    """The function `layer` of arrays, of which a gradient keeps what `remat` says."""
    if remat == "none":
        return layer
    # A scan's backward pass is a loop of its own: XLA cannot merge it with the forward pass and need not be kept from
    # trying, which would cost fusions.
    return jax.checkpoint(layer, policy=policy(remat), prevent_cse=not in_scan)


def policy(remat: Remat) -> Callable | None:
    """Which results `jax.checkpoint` keeps; None for none but the arguments."""
    policies = jax.checkpoint_policies
    if isinstance(remat, Named):
        if not remat.offload:
            return policies.save_only_these_names(*remat.save)
        return policies.save_and_offload_only_these_names(
            names_which_can_be_saved=remat.save,
            names_which_can_be_offloaded=remat.offload,
            offload_src="device",
            offload_dst="pinned_host",
        )
    if remat == "dots":
        # "rnn" is left out: its two inputs are kept, and on a TPU the fused kernel makes it again sooner than it is worth
        # the memory of one more (B T L).
        return policies.save_from_both_policies(policies.dots_saveable, policies.save_only_these_names("context"))
    return None
