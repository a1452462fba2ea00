"""Update rules: one line each over optax. Which parameters decay or are clipped is decided by their names."""

import functools
from collections.abc import Callable

import jax
import optax

from configs.schema import OptimizerConfig
from models.params import path_name


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate of each step: linear warm-up from 0, then cosine to `final_fraction` of the peak, or constant."""
    peak, warmup = config.learning_rate, config.warmup_steps
    if config.schedule == "constant":
        after: optax.Schedule = optax.constant_schedule(peak)
    else:
        after = optax.cosine_decay_schedule(peak, max(1, steps - warmup), alpha=config.final_fraction)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup]) if warmup else after


def make_optimizer(
    config: OptimizerConfig,
    schedule: optax.Schedule,
    decays: Callable[[str], bool],
    clips: Callable[[str], bool],
    learns: Callable[[str], bool] | None = None,
    rates: Callable[[str], float] | None = None,
) -> optax.GradientTransformation:
    """Clipping, then weight decay and the update rule. `decays`, `clips`, `learns` and `rates` take a parameter's name; those
    that don't learn (None: all do) must have no gradient, and get no moments."""
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    if config.adaptive_clip:
        clip.append(optax.masked(adaptive_clip(config.adaptive_clip), by_name(clips)))
    rules: dict[str, Callable[[], list[optax.GradientTransformation]]] = {
        "adamw": lambda: [
            optax.adamw(
                schedule, config.beta1, config.beta2, config.eps, weight_decay=config.weight_decay, mask=by_name(decays)
            )
        ],
        # NFNet's order: clip, add coupled weight decay, Nesterov momentum (arXiv 2102.06171).
        "sgd": lambda: [
            optax.add_decayed_weights(config.weight_decay, by_name(decays)),
            optax.sgd(schedule, momentum=config.beta1, nesterov=True),
        ],
    }
    rule = optax.chain(*clip, *rules[config.name](), *([scaled(rates)] if rates else []))
    return optax.masked(rule, by_name(learns)) if learns else rule


def adaptive_clip(ratio: float) -> optax.GradientTransformation:
    """optax's, a layer at a time where layers are stacked: it takes a unit's axes from an array's rank.

    XLA chooses where its norms lie: Explicit axes refuse to compare them with gradients of which the dimension that they sum
    is divided.
    """
    clip = optax.adaptive_grad_clip(ratio, eps=1e-3)

    def one(gradient: jax.Array, parameter: jax.Array) -> jax.Array:
        return clip.update(gradient, optax.EmptyState(), parameter)[0]

    def each(path, gradient, parameter):
        layers = "groups" in path_name(path).split("/")
        return (jax.vmap(one) if layers else one)(gradient, parameter)

    def update(updates, state, params=None):
        shardings = jax.tree.map(lambda leaf: jax.typeof(leaf).sharding, updates)
        clipped = jax.sharding.auto_axes(
            functools.partial(jax.tree_util.tree_map_with_path, each), out_sharding=shardings
        )
        return clipped(updates, params), state

    return optax.GradientTransformation(clip.init, update)


def scaled(rates: Callable[[str], float]) -> optax.GradientTransformation:
    """Each parameter's update times the rate of its name."""

    def update(updates, state, params=None):
        return jax.tree_util.tree_map_with_path(lambda path, leaf: rates(path_name(path)) * leaf, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def by_name(predicate: Callable[[str], bool]) -> Callable:
    """A mask for optax: the tree of `predicate(name)` over a model's parameters."""
    return lambda tree: jax.tree_util.tree_map_with_path(lambda path, _: predicate(path_name(path)), tree)
