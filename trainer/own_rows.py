"""What each device finds by itself, with whole parameters and its own rows of a batch, before all add it up."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec, reshard

from models.params import axes_of
from trainer.tasks import Batch, Task


def summed_over_devices(
    one: Callable[..., tuple[Any, Any]],
    task: Task,
    model: Any,
    batch: Batch,
    key: jax.Array,
) -> tuple[Any, Any]:
    """`one(model, own rows, key, devices=axes)` returns what is like the model, and anything else: already summed over
    those axes. The first comes back divided over the devices as the model is."""
    devices = axes_of(jax.typeof(batch["weights"]).sharding.spec[0])
    # The same model, told that nothing of it is divided.
    like = jax.eval_shape(lambda key: task.init(key, whole), key)
    leaves, structure = jax.tree.flatten(model)
    everywhere = jax.tree.unflatten(jax.tree.structure(like), [reshard(leaf, PartitionSpec()) for leaf in leaves])
    rows = PartitionSpec(devices)
    # Unchecked, as language models have parts that forget what differs between devices; `one` sums by itself.
    found, rest = jax.shard_map(
        functools.partial(one, devices=devices),
        in_specs=(PartitionSpec(), rows, PartitionSpec()),
        out_specs=PartitionSpec(),
        check_vma=False,
    )(everywhere, batch, key)
    stored = [
        reshard(leaf, jax.typeof(old).sharding.spec) for leaf, old in zip(jax.tree.leaves(found), leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, stored), rest


def whole(*names: str | None) -> PartitionSpec:
    return PartitionSpec(*(None,) * len(names))
