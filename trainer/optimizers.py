"""Update rules: one line each over optax. Which parameters decay or are clipped is decided by their names."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from configs.schema import OptimizerConfig
from models.params import named_leaves, path_name
from trainer.matrices import inputs, map_named, matrices, stacked, wherever
from trainer.shampoo import scale_by_shampoo
from trainer.soap import scale_by_soap


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
    scaling = [scaled(rates)] if rates else []
    moments = config.beta1, config.beta2, config.eps, config.precondition_every, config.precondition_limit

    def decayed(rule: optax.GradientTransformation) -> list[optax.GradientTransformation]:
        """As optax.adamw: weights decay by the learning rate, whatever the rule makes of the gradient."""
        weights = optax.add_decayed_weights(config.weight_decay, by_name(decays))
        return [rule, weights, optax.scale_by_learning_rate(schedule)]

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
        "lion": lambda: decayed(optax.scale_by_lion(config.beta1, config.beta2)),
        "muon": lambda: decayed(by_muon(config, decays)),
        "shampoo": lambda: decayed(scale_by_shampoo(*moments, config.graft)),
        "soap": lambda: decayed(scale_by_soap(*moments)),
        # Averages hold only for the steps that are taken, so these are scaled inside.
        "schedule-free": lambda: [
            contrib.schedule_free(
                optax.chain(
                    *decayed(optax.scale_by_rms(config.beta2, config.eps, eps_in_sqrt=False, bias_correction=True)),
                    *scaling,
                ),
                schedule,
                config.beta1,
            )
        ],
    }
    rule = optax.chain(*clip, *rules[config.name](), *([] if config.name == "schedule-free" else scaling))
    if config.power != 1:
        rule = power_propagated(rule, config.power, decays)
    return optax.masked(rule, by_name(learns)) if learns else rule


def by_muon(config: OptimizerConfig, decays: Callable[[str], bool]) -> optax.GradientTransformation:
    """Muon for the hidden layers' matrices, Adam for the rest: tables, the classifier, gates, vectors.

    Updates are as long as Adam's usually are (Liu et al. 2025, arXiv 2502.16982), so that both take one learning rate.
    """

    def hidden(name: str, leaf: Any) -> bool:
        return decays(name) and not name.startswith("head/") and inputs(name, leaf.ndim) > 0

    def dimensions(tree: Any) -> Any:
        def of(name: str, leaf: jax.Array) -> contrib.MuonDimensionNumbers:
            split = stacked(name) + inputs(name, leaf.ndim)
            return contrib.MuonDimensionNumbers(tuple(range(stacked(name), split)), tuple(range(split, leaf.ndim)))

        return map_named(of, tree)

    def lengthened(updates, state, params=None):
        return map_named(lambda name, u: 0.2 * max(matrices(name, u.shape)[1:]) ** 0.5 * u, updates), state

    orthogonal = contrib.scale_by_muon(beta=config.beta1, weight_dimension_numbers=dimensions)
    rules = {
        "muon": optax.chain(
            wherever(orthogonal), optax.GradientTransformation(lambda params: optax.EmptyState(), lengthened)
        ),
        "adam": optax.scale_by_adam(config.beta1, config.beta2, config.eps),
    }
    return optax.partition(
        rules, lambda tree: map_named(lambda name, leaf: "muon" if hidden(name, leaf) else "adam", tree)
    )


def power_propagated(
    rule: optax.GradientTransformation, alpha: float, reaches: Callable[[str], bool]
) -> optax.GradientTransformation:
    """The rule for phi, where a parameter that it reaches is phi |phi|^(alpha - 1) (Schwarz et al. 2021, arXiv 2110.00296).

    Gradients are those for phi, and the step is the one that phi takes; the model, its checkpoints and what is evaluated know
    only the parameter.
    """

    def phi_of(params: Any) -> Any:
        return map_named(lambda name, w: jnp.sign(w) * jnp.abs(w) ** (1 / alpha) if reaches(name) else w, params)

    def update(updates, state, params=None):
        phi = phi_of(params)
        inner = map_named(
            lambda name, g, p: alpha * jnp.abs(p) ** (alpha - 1) * g if reaches(name) else g, updates, phi
        )
        steps, state = rule.update(inner, state, phi)

        def back(name: str, w: jax.Array, p: jax.Array, step: jax.Array) -> jax.Array:
            return (p + step) * jnp.abs(p + step) ** (alpha - 1) - w if reaches(name) else step

        return map_named(back, params, phi, steps), state

    return optax.GradientTransformation(lambda params: rule.init(phi_of(params)), update)


def schedule_free_average(opt_state: Any, model: Any) -> Any:
    """optax.contrib.schedule_free_eval_params, in a state that has more than that; what does not learn is as it is."""
    found = jax.tree.leaves(opt_state, is_leaf=is_schedule_free)
    state = next(filter(is_schedule_free, found))
    z = named_leaves(state.z)
    return map_named(lambda name, y: (y - (1 - state.b1) * z[name]) / state.b1 if name in z else y, model)


def is_schedule_free(node: Any) -> bool:
    return isinstance(node, contrib.ScheduleFreeState)


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
