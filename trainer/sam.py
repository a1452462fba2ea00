"""Sharpness-aware minimisation (Foret et al. 2020, arXiv 2010.01412): the gradient of where the loss climbs to within `sam_rho`.

The way up may come from a share of the batch (arXiv 2102.06171: a fifth). "synced" climbs with the gradient over all devices;
"local" lets each device climb with that of its own rows and averages only the gradients found there, which is what that
paper's accelerated SAM does, and needs the parameters whole on every device.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from configs.optimizer import OptimizerConfig
from trainer.own_rows import summed_over_devices
from trainer.tasks import Batch, Sums, Task

Gradient = Callable[[Any, Batch, jax.Array], tuple[Any, Sums]]  # (model, batch, key) -> gradient, metrics


def climbed(model: Any, gradient: Any, rho: float) -> Any:
    """The parameters rho further along the gradient, all together; unmoved where it is zero."""
    norm = optax.tree.norm(gradient)
    scale = jnp.where(norm > 0, rho / jnp.where(norm > 0, norm, 1.0), 0.0)
    return jax.tree.map(lambda w, g: w + scale * g, model, gradient)


def first_rows(batch: Batch, share: float) -> Batch:
    """Of every device's rows the first ones, at least one: (B ...) -> (about share B, ...)."""

    def cut(rows: jax.Array) -> jax.Array:
        devices = jax.typeof(rows).sharding.spec[0]
        return jax.shard_map(
            lambda own: own[: max(1, round(share * own.shape[0]))],
            in_specs=PartitionSpec(devices),
            out_specs=PartitionSpec(devices),
        )(rows)

    return batch if share == 1 else jax.tree.map(cut, batch)


def of_share(gradient: Gradient, share: float) -> Gradient:
    return lambda model, batch, key: gradient(model, first_rows(batch, share), key)


def local_gradient(task: Task, config: OptimizerConfig) -> Gradient:
    """The mean over devices of gradients, each where the device's own rows led it."""
    one = functools.partial(one_device, task, config)
    return lambda model, batch, key: summed_over_devices(one, task, model, batch, key)


def one_device(
    task: Task, config: OptimizerConfig, model: Any, batch: Batch, key: jax.Array, devices: tuple[str, ...]
) -> tuple[Any, Sums]:
    """What a device does by itself, and the weighted mean over all of them."""
    gradient = jax.grad(task.loss, has_aux=True)
    key = jax.random.fold_in(key, jax.lax.axis_index(devices))
    ascent, _ = gradient(model, first_rows(batch, config.sam_share), key)
    found = gradient(climbed(model, ascent, config.sam_rho), batch, key)
    weight = task.weight(batch)
    share = weight / jnp.maximum(jax.lax.psum(weight, devices), 1.0)
    return jax.lax.psum(jax.tree.map(lambda x: share * x, found), devices)
