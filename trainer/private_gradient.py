"""The gradient of a private step: DP-SGD (Abadi et al. 2016, arXiv 1607.00133) in the form of arXiv 2204.13650.

Each unit's gradient is clipped by itself and divided by the clip, so that its norm is at most 1; their sum gets noise once; the
mean is over the units that a batch has in expectation, since how many it has is private, too. Clipping is jax-privacy's.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from configs.privacy import PrivacyConfig
from configs.section import ConfigError
from models.params import path_name
from trainer.own_rows import summed_over_devices
from trainer.tasks import Batch, Task

Filled = Callable[[list[jax.Array], Callable[[jax.Array], jax.Array]], Any]


def private_mean(
    config: PrivacyConfig,
    noise: float,
    expected: int,
    task: Task,
    model: Any,
    batch: Batch,
    key: jax.Array,
    noise_key: jax.Array,
) -> tuple[Any, dict[str, jax.Array]]:
    """The gradient, and of `config.log_private` metrics that nothing hides. `noise` is its multiplier, `expected` the units of a
    batch in expectation; each unit has `config.rows` rows of the batch, one after the other."""
    total, sums = clipped_sum(task, config, model, batch, key)
    gradient = jax.tree.map(lambda leaf: leaf / expected, noised(total, noise, noise_key, task))
    if not config.log_private:
        return gradient, {}
    units = jnp.maximum(sums["units"], 1.0)
    return gradient, {name: sums[name] / units for name in ("loss", "clipped")}


def clipped_sum(
    task: Task, config: PrivacyConfig, model: Any, batch: Batch, key: jax.Array
) -> tuple[Any, dict[str, jax.Array]]:
    """Sum over the units of a batch of their clipped gradients, float32. One unit more or less changes its norm by at most 1."""
    one = functools.partial(own_units, task, config)
    return summed_over_devices(one, task, model, batch, key)


def own_units(
    task: Task,
    config: PrivacyConfig,
    model: Any,
    batch: Batch,
    key: jax.Array,
    devices: tuple[str, ...],
) -> tuple[Any, dict[str, jax.Array]]:
    """A device's units, some at a time; groups without any are passed over."""
    clipped_grad = jax_privacy_clipping().clipped_grad
    units = jax.tree.map(lambda rows: rows.reshape(-1, config.rows, *rows.shape[1:]), batch)
    count = len(units["weights"])
    # Numbered over all devices, so that a unit's random bits don't depend on where it is.
    numbers = jax.lax.axis_index(devices) * count + jnp.arange(count)
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(numbers)
    real = jnp.any(units["weights"].reshape(count, -1) > 0, axis=1)
    order = jnp.argsort(~real, stable=True)

    def group(rows: jax.Array) -> jax.Array:
        return rows[order].reshape(-1, config.together, *rows.shape[1:])

    learning, filled = split(task, model)

    def loss(learning: list[jax.Array], unit: Batch, key: jax.Array) -> jax.Array:
        whole = filled(learning, jax.lax.stop_gradient)
        return task.loss(task.prepare(whole) if task.prepare else whole, unit, key)[0]

    gradient = clipped_grad(
        loss,
        l2_clip_norm=config.clip,
        rescale_to_unit_norm=True,
        batch_argnums=(1, 2),
        keep_batch_dim=False,
        return_values=True,
        return_grad_norms=True,
        dtype=jnp.float32,
    )

    def some(some_units: Batch, keys: jax.Array, real: jax.Array) -> tuple[list[jax.Array], dict[str, jax.Array]]:
        found, about = gradient(learning, some_units, keys, is_padding_example=~real)
        own = real.astype(jnp.float32)
        # A unit whose loss is no number must not end the run, or have its step skipped: that would tell of it.
        losses = jnp.nan_to_num(about.values.astype(jnp.float32), posinf=0.0, neginf=0.0)
        clipped = (about.grad_norms > config.clip).astype(jnp.float32)
        sums = {"loss": losses @ own, "clipped": clipped @ own, "units": jnp.sum(own)}
        return found, sums

    def add(sums: Any, part: Any) -> tuple[Any, None]:
        def with_part() -> Any:
            return jax.tree.map(jnp.add, sums, some(*part))

        return jax.lax.cond(jnp.any(part[2]), with_part, lambda: sums), None

    zeros = [jnp.zeros_like(leaf, jnp.float32) for leaf in learning]
    nothing = dict.fromkeys(("loss", "clipped", "units"), jnp.zeros_like(numbers[0], jnp.float32))
    parts = jax.tree.map(group, (units, keys, real))
    (found, sums), _ = jax.lax.scan(add, (zeros, nothing), parts)
    found, sums = jax.lax.psum((found, sums), devices)
    return filled(found, lambda leaf: jnp.zeros(leaf.shape, leaf.dtype)), sums


def split(task: Task, model: Any) -> tuple[list[jax.Array], Filled]:
    """What learns of a model, or of a tree like it, as a list; and what puts such a list back, with `rest(leaf)` of all others."""
    paths, structure = jax.tree_util.tree_flatten_with_path(model)
    learns = [task.learns is None or task.learns(path_name(path)) for path, _ in paths]

    def filled(values: list[jax.Array], rest: Callable[[jax.Array], jax.Array]) -> Any:
        own = iter(values)
        leaves = [next(own) if learn else rest(leaf) for learn, (_, leaf) in zip(learns, paths, strict=True)]
        return jax.tree.unflatten(structure, leaves)

    return [leaf for learn, (_, leaf) in zip(learns, paths, strict=True) if learn], filled


@jax.named_scope("noise")
def noised(total: Any, noise: float, key: jax.Array, task: Task) -> Any:
    """Gaussian noise of this standard deviation on every element that learns, each array's from a key of its own. It is the
    same however the arrays are divided over devices."""
    learning, filled = split(task, total)
    keys = jax.random.split(key, len(learning))
    noisy = [
        leaf + noise * jax.random.normal(keys[i], leaf.shape, out_sharding=jax.typeof(leaf).sharding.spec)
        for i, leaf in enumerate(learning)
    ]
    return filled(noisy, lambda leaf: leaf)


def jax_privacy_clipping() -> Any:
    try:
        from jax_privacy import clipping
    except ImportError:
        raise ConfigError(
            "private training needs jax-privacy, which is not installed: pip install 'podwright[dp]'"
        ) from None
    return clipping
