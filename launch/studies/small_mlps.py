"""Multilayer perceptrons with ReLUs, small enough to train one for every seed and learning rate side by side, by our update rules.

Functions take one model; the study maps them over seeds and rates. Parameters are {"hidden_0": {"kernel" (I O), "bias" (O)},
..., "head": ...}, images (N I), labels int32 (N).
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from configs.optimizer import OptimizerConfig
from trainer.optimizers import make_optimizer, schedule_free_average
from trainer.sam import climbed

Params = dict[str, dict[str, Any]]


class Split(NamedTuple):
    images: Any
    labels: Any


class Counted(NamedTuple):
    """Rows int32 (N) of images, and which of them count for each task, float32 (T N)."""

    rows: Any
    counts: Any


def initial(seed: int, sizes: tuple[int, ...]) -> Params:
    """Kernels of variance 2 / I (He et al. 2015), biases 0: float32, a function of the seed."""
    rng = np.random.default_rng((seed, 0))
    names = [*(f"hidden_{i}" for i in range(len(sizes) - 2)), "head"]
    return {
        name: {
            "kernel": (rng.normal(size=(rows, columns)) * (2 / rows) ** 0.5).astype(np.float32),
            "bias": np.zeros(columns, np.float32),
        }
        for name, (rows, columns) in zip(names, itertools.pairwise(sizes), strict=True)
    }


def activations(params: Params, images: jax.Array) -> list[jax.Array]:
    """Of each hidden layer (N O), then the logits (N V)."""
    found = [images]
    for i in range(len(params) - 1):
        layer = params[f"hidden_{i}"]
        found.append(jax.nn.relu(found[-1] @ layer["kernel"] + layer["bias"][None]))
    return [*found[1:], found[-1] @ params["head"]["kernel"] + params["head"]["bias"][None]]


def loss(params: Params, images: jax.Array, labels: jax.Array, counts: jax.Array | None = None) -> jax.Array:
    """Mean nats of the right label; of the images that count, if not all do."""
    logits = activations(params, images)[-1]
    return jnp.average(optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels), weights=counts)


def right(params: Params, split: Split) -> jax.Array:
    """1.0 where the likeliest label is the right one, (N)."""
    return (jnp.argmax(activations(params, split.images)[-1], axis=-1) == split.labels).astype(jnp.float32)


def make_rule(config: OptimizerConfig, rate: jax.Array) -> optax.GradientTransformation:
    """Our update rule at a constant learning rate, which may be traced; adaptive clipping leaves the classifier out, as
    NFNet's does (arXiv 2102.06171)."""
    return make_optimizer(
        config,
        lambda step: rate,
        decays=lambda name: name.endswith("kernel"),
        clips=lambda name: not name.startswith("head/"),
    )


def update(config: OptimizerConfig, rule: optax.GradientTransformation, now: tuple[Params, Any], batch: Split):
    params, state = now
    gradient = jax.grad(loss)(params, *batch)
    if config.sam_rho:
        gradient = jax.grad(loss)(climbed(params, gradient, config.sam_rho), *batch)
    updates, state = rule.update(gradient, state, params)
    return optax.apply_updates(params, updates), state


def solution(config: OptimizerConfig, params: Params, state: Any) -> Params:
    """What a run would evaluate: schedule-free's average, or the parameters."""
    return schedule_free_average(state, params) if config.averages else params


def learn_in_turn(
    config: OptimizerConfig,
    data: Split,
    rate: jax.Array,
    params: Params,
    rows: jax.Array,
    orders: jax.Array,
    train: Counted,
    test: Counted,
) -> tuple[jax.Array, jax.Array, Params]:
    """Learns tasks one after the other. Task t has the batches `rows` int32 (T S B) and the order of pixels `orders` int32
    (T I), and is tested on `test`.

    Returns, of all tasks after each, test accuracies (T T) and gradients (T T P) of the losses on `train`, and the solution at
    the end. Moments stay from task to task.
    """
    rule = make_rule(config, rate)

    def measured(found: Params, given: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        order, trained, tested = given
        hits = right(found, Split(data.images[test.rows][:, order], data.labels[test.rows]))
        gradient = jax.grad(loss)(found, data.images[train.rows][:, order], data.labels[train.rows], trained)
        return jnp.average(hits, weights=tested), in_one_row(gradient)

    def task(carry, given):
        rows, order = given

        def step(carry, rows):
            return update(config, rule, carry, Split(data.images[rows][:, order], data.labels[rows])), None

        carry, _ = jax.lax.scan(step, carry, rows)
        found = solution(config, *carry)
        return carry, jax.lax.map(functools.partial(measured, found), (orders, train.counts, test.counts))

    carry, (accuracies, gradients) = jax.lax.scan(task, (params, rule.init(params)), (rows, orders))
    return accuracies, gradients, solution(config, *carry)


def in_one_row(params: Params) -> jax.Array:
    """All parameters, (P)."""
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(params)])


def learn_until(
    config: OptimizerConfig,
    data: Split,
    target: float,
    rate: jax.Array,
    params: Params,
    train: jax.Array,
    rows: jax.Array,
) -> tuple[jax.Array, Params, Any]:
    """Learns batches `rows` int32 (E S B) and looks after every S of them whether the solution's loss on the images `train`
    int32 (N) is at most `target`.

    Returns the steps when it first was, or 0 where it never was, and parameters and state of that moment.
    """
    rule, everything = make_rule(config, rate), Split(data.images[train], data.labels[train])

    def look(carry, rows):
        now, kept, reached, done = carry

        def step(now, rows):
            return update(config, rule, now, Split(data.images[rows], data.labels[rows])), None

        now, _ = jax.lax.scan(step, now, rows)
        done = done + rows.shape[0]
        first = (reached == 0) & (loss(solution(config, *now), *everything) <= target)
        kept = jax.tree.map(lambda new, old: jnp.where(first, new, old), now, kept)
        return (now, kept, jnp.where(first, done, reached), done), None

    now = params, rule.init(params)
    (_, kept, reached, _), _ = jax.lax.scan(look, (now, now, jnp.int32(0), jnp.int32(0)), rows)
    return reached, *kept


def next_updates(
    config: OptimizerConfig, data: Split, rate: jax.Array, params: Params, state: Any, rows: jax.Array
) -> jax.Array:
    """The updates (S P) of the next batches `rows` int32 (S B)."""
    rule = make_rule(config, rate)

    def step(now, rows):
        new = update(config, rule, now, Split(data.images[rows], data.labels[rows]))
        return new, in_one_row(jax.tree.map(jnp.subtract, new[0], now[0]))

    return jax.lax.scan(step, (params, state), rows)[1]


def learn(config: OptimizerConfig, data: Split, rate: jax.Array, params: Params, rows: jax.Array) -> Params:
    """The solution after batches `rows` int32 (S B)."""
    rule = make_rule(config, rate)

    def step(now, rows):
        return update(config, rule, now, Split(data.images[rows], data.labels[rows])), None

    return solution(config, *jax.lax.scan(step, (params, rule.init(params)), rows)[0])


def side_by_side(function: Callable, of_seeds: int) -> Callable:
    """function(rate, ...) compiled for every rate and seed: of `of_seeds` arguments after the rates, each has a leading axis of
    seeds; results are (rates seeds ...)."""
    seeds = jax.vmap(function, in_axes=(None, *(0,) * of_seeds))
    return jax.jit(jax.vmap(seeds, in_axes=(0, *(None,) * of_seeds)))
