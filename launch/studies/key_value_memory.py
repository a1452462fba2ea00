"""A memory of keys and values (arXiv 2503.21676, appendix F.4): an MLP of one hidden layer learns pairs, and then new ones.

A key is a random direction, its value one of a few classes. Functions take one memory, those with `seeds` several side by side.
Shapes: N pairs, of which old ones come first, K numbers of a key, E looks at what is known, S seeds.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from configs.optimizer import OptimizerConfig
from launch.studies.small_mlps import Params, Split, activations, initial, make_rule, update
from trainer.optimizers import make_optimizer, make_schedule

KEY, HIDDEN, VALUES = 64, 256, 30
OLD, NEW = 8192, 2048  # pairs at most
BATCH, STEPS, TUNING_STEPS = 128, 16_000, 4000
# Each a tenth later than the one before: the first steps are seen one by one.
LOOKS = (*sorted({200, *(round(1.1**i) for i in range(87))}), TUNING_STEPS)


def rule_of(beta2: float) -> OptimizerConfig:
    """The paper's AdamW; it doesn't say the betas."""
    return OptimizerConfig(
        learning_rate=0.03, warmup_steps=0, final_fraction=0.0, clip_norm=0.0, weight_decay=0.01, beta2=beta2
    )


def pairs(seed: int) -> Split:
    """Keys (N K), uniform on the unit sphere, float32, and values (N), uniform, int32: OLD of them and then NEW."""
    rng = np.random.default_rng((seed, 6))
    keys = rng.normal(size=(OLD + NEW, KEY))
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    return Split(keys.astype(np.float32), rng.integers(VALUES, size=OLD + NEW, dtype=np.int32))


def learn(config: OptimizerConfig, steps: int, key: jax.Array, data: Split, params: Params, old: jax.Array) -> Params:
    """The memory after batches of the first `old` pairs."""
    schedule = make_schedule(config, steps)
    rule = make_optimizer(config, schedule, decays=lambda name: name.endswith("kernel"), clips=lambda name: True)

    def step(number: jax.Array, now: tuple[Params, Any]) -> tuple[Params, Any]:
        rows = jax.random.randint(jax.random.fold_in(key, number), (BATCH,), 0, old)
        return update(config, rule, now, Split(data.images[rows], data.labels[rows]))

    return jax.lax.fori_loop(0, steps, step, (params, rule.init(params)))[0]


def share_of_old(arm: dict[str, Any]) -> jax.Array:
    """Of the rows of a batch, where each old pair has the weight arm["replay"] and each new one 1."""
    old, new, weight = (jnp.asarray(arm[name], jnp.float32) for name in ("old", "new", "replay"))
    return weight * old / (weight * old + new)


def drawn(arm: dict[str, jax.Array], key: jax.Array) -> jax.Array:
    """A batch of fine-tuning: numbers of pairs int32 (BATCH)."""
    which, one, other = jax.random.split(key, 3)
    old = jax.random.randint(one, (BATCH,), 0, arm["old"])
    new = OLD + jax.random.randint(other, (BATCH,), 0, arm["new"])
    return jnp.where(jax.random.uniform(which, (BATCH,)) < share_of_old(arm), old, new)


def known(params: Params, data: Split, arm: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Of the arm's old and of its new pairs the share that is right, and the loss in nats."""
    logits, place = activations(params, data.images)[-1], jnp.arange(OLD + NEW)
    right = (jnp.argmax(logits, axis=-1) == data.labels).astype(jnp.float32)
    nats = optax.losses.softmax_cross_entropy_with_integer_labels(logits, data.labels)
    found = {}
    for name, own in (("old", place < arm["old"]), ("new", (place >= OLD) & (place < OLD + arm["new"]))):
        found[f"{name}_right"], found[f"{name}_loss"] = jnp.mean(right, where=own), jnp.mean(nats, where=own)
    return found


def tune(
    config: OptimizerConfig,
    looks: tuple[int, ...],
    arm: dict[str, jax.Array],
    key: jax.Array,
    data: Split,
    params: Params,
) -> dict[str, jax.Array]:
    """What is `known` before and at each of `looks` (E + 1) while a memory learns arm["new"] pairs at a constant arm["rate"], with
    a new optimizer."""
    rule = make_rule(config, arm["rate"])

    def step(number: jax.Array, now: tuple[Params, Any]) -> tuple[Params, Any]:
        rows = drawn(arm, jax.random.fold_in(key, number))
        return update(config, rule, now, Split(data.images[rows], data.labels[rows]))

    def look(now, between):
        start, end = between
        now = jax.lax.fori_loop(start, end, step, now)
        return now, known(now[0], data, arm)

    starts, ends = (jnp.array(column, jnp.int32) for column in zip(*itertools.pairwise((0, *looks)), strict=True))
    seen = jax.lax.scan(look, (params, rule.init(params)), (starts, ends))[1]
    return jax.tree.map(lambda first, later: jnp.concatenate([first[None], later]), known(params, data, arm), seen)


# --- several seeds -----------------------------------------------------------------------------------------------------------


def started(seeds: tuple[int, ...]) -> tuple[Split, Params]:
    """Pairs and memories that know none, each with a leading axis of seeds."""
    each = [(pairs(seed), initial(seed, (KEY, HIDDEN, VALUES))) for seed in seeds]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)


@functools.cache
def learner(beta2: float, steps: int):
    return jax.jit(jax.vmap(functools.partial(learn, rule_of(beta2), steps), in_axes=(0, 0, 0, None)))


@functools.cache
def tuner(beta2: float, looks: tuple[int, ...]):
    return jax.jit(jax.vmap(functools.partial(tune, rule_of(beta2), looks), in_axes=(None, 0, 0, 0)))


def keys_of(seeds: tuple[int, ...], purpose: int) -> jax.Array:
    return jnp.stack([jax.random.key(seed + 1000 * purpose) for seed in seeds])


def learned(seeds: tuple[int, ...], data: Split, params: Params, old: int, beta2: float, steps: int = STEPS) -> Params:
    return learner(beta2, steps)(keys_of(seeds, 1), data, params, jnp.int32(old))


def tuned(
    seeds: tuple[int, ...], data: Split, params: Params, arm: dict[str, Any], looks: tuple[int, ...] = LOOKS
) -> dict[str, np.ndarray]:
    """Curves (S, E + 1) of an arm of the study."""
    given = {name: jnp.int32(arm[name]) for name in ("old", "new")}
    given |= {name: jnp.float32(arm[name]) for name in ("rate", "replay")}
    return jax.device_get(tuner(arm["beta2"], looks)(given, keys_of(seeds, 2), data, params))
