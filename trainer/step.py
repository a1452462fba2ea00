"""The state of a run, and the program that takes it from one step to the next."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from configs.guard import UNGUARDED, GuardConfig
from configs.optimizer import PLAIN, OptimizerConfig
from models.params import Spec
from trainer.guard import judge, on_device
from trainer.offload import moments_away, moments_here
from trainer.optimizers import is_schedule_free, schedule_free_average
from trainer.sam import Gradient, climbed, local_gradient, of_share
from trainer.tasks import Batch, Task


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """All that changes while training. Random keys derive from the seed and `step`, so none is kept."""

    step: jax.Array  # optimizer updates done
    model: Any
    opt_state: Any
    ema: Any | None = None  # average of the model's parameters; None if none is kept
    recent: jax.Array | None = None  # see guard.judge; None if nothing is compared with it
    noise: jax.Array | None = None  # uint32 [2], key of a private run's noise; never saved


def init_state(
    task: Task,
    optimizer: optax.GradientTransformation,
    seed: int,
    spec: Spec,
    averages: bool = False,
    base: Any | None = None,
) -> State:
    """The state before the first step; with the parameters of `base`, if one is given, in place of random ones."""
    model = task.init(jax.random.key(seed), spec)
    if base is not None:
        model = task.with_base(model, base)
    ema = jax.tree.map(jnp.copy, model) if averages else None
    return State(step=jnp.zeros((), jnp.int32), model=model, opt_state=optimizer.init(model), ema=ema)


def train_step(
    state: State,
    batch: Batch,
    teacher: Any | None = None,
    *,
    task: Task,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    seed: int,
    microbatches: int = 1,
    config: OptimizerConfig = PLAIN,
    guard: GuardConfig = UNGUARDED,
    private: Callable[..., tuple[Any, dict[str, jax.Array]]] | None = None,
) -> tuple[State, dict[str, jax.Array]]:
    """One optimizer update. Metrics: the task's, norm of the gradient before clipping, learning rate (float32 scalars).

    A teacher, if there is one, goes to the loss of a distilled task. With `config.offload` the moments come from the host's
    memory and go back there; with `config.sam_rho` the gradient is that of another place, and so are loss and norm. Where `guard`
    judges on the device its verdict is among the metrics, and with its policy `skip` a bad step leaves parameters and moments as
    they were. `private` finds the gradient in place of the batch's mean, with noise; then there is no loss among the metrics.
    """
    key = jax.random.fold_in(jax.random.key(seed + 1), state.step)
    loss = task.loss if teacher is None else functools.partial(task.loss, teacher=teacher)
    local = bool(config.sam_rho) and config.sam_ascent == "local"
    one, prepare = (local_gradient(task, config), None) if local else (jax.grad(loss, has_aux=True), task.prepare)

    def find(one: Gradient, model: Any) -> tuple[Any, dict[str, jax.Array]]:
        return mean_gradient(one, task.weight, model, batch, key, microbatches, prepare)

    at = state.model
    if config.sam_rho and not local:
        at = climbed(at, find(of_share(one, config.sam_share), at)[0], config.sam_rho)
    if private is None:
        gradient, metrics = find(one, at)
    else:
        assert state.noise is not None
        # Dropout's key is a secret, too: a unit more moves others to other places, whose bits must not be known in advance.
        secret = jax.random.split(jax.random.fold_in(jax.random.wrap_key_data(state.noise), state.step))
        gradient, metrics = private(task, at, batch, secret[0], secret[1])
    norm = optax.tree.norm(gradient)
    metrics |= {"grad_norm": norm}
    bad, recent = ~jnp.isfinite(norm), None
    if on_device(guard):
        bad, recent, verdict = judge(metrics, state.recent, guard.threshold)
        metrics |= verdict

    @jax.named_scope("optimizer")
    def update(model, opt_state):
        updates, opt_state = optimizer.update(gradient, moments_here(opt_state) if config.offload else opt_state, model)
        return optax.apply_updates(model, updates), moments_away(opt_state) if config.offload else opt_state

    def keep(model, opt_state):
        return model, counted_on(opt_state)

    if config.offload:
        # XLA would fetch the moments at the start of the step, and it drops barriers before it decides. Into a branch whose
        # condition is the gradient's it cannot look ahead. After the other branch the run ends, goes back or skips.
        model, opt_state = jax.lax.cond(bad, keep, update, state.model, state.opt_state)
    else:
        model, opt_state = update(state.model, state.opt_state)
        if guard.policy == "skip":
            kept = keep(state.model, state.opt_state)
            model, opt_state = jax.tree.map(lambda old, new: jnp.where(bad, old, new), kept, (model, opt_state))
    ema = averaged(state.ema, model, state.step, config.ema) if config.ema else None
    if config.name == "schedule-free":
        ema = schedule_free_average(opt_state, model)
    if ema is not None and guard.policy == "skip":
        ema = jax.tree.map(lambda old, new: jnp.where(bad, old, new), state.ema, ema)
    metrics |= {"learning_rate": schedule(state.step)}
    return State(state.step + 1, model, opt_state, ema, recent, state.noise), metrics


def averaged(ema: Any, model: Any, step: jax.Array, decay: float) -> Any:
    """The average once `model` is the result of update `step` (from 0). Its decay warms up: arXiv 2102.06171's released code."""
    updates = step.astype(jnp.float32)
    rest = 1 - jnp.minimum(decay, (1 + updates) / (10 + updates))
    return jax.tree.map(lambda old, new: old + rest * (new - old), ema, model)


def counted_on(opt_state: Any) -> Any:
    """The same but for the schedule's count: the learning rate of a step does not depend on updates skipped before it."""

    def count(node: Any) -> Any:
        if is_schedule_free(node):
            inner = counted_on(node.base_optimizer_state)
            return node._replace(step_count=node.step_count + 1, base_optimizer_state=inner)
        return node._replace(count=node.count + 1) if isinstance(node, optax.ScaleByScheduleState) else node

    def counts(node: Any) -> bool:
        return is_schedule_free(node) or isinstance(node, optax.ScaleByScheduleState)

    return jax.tree.map(count, opt_state, is_leaf=counts)


def mean_gradient(
    gradient: Gradient,
    weight: Callable[[Batch], jax.Array],
    model: Any,
    batch: Batch,
    key: jax.Array,
    microbatches: int,
    prepare: Callable[[Any], Any] | None = None,
) -> tuple[Any, dict[str, jax.Array]]:
    """Gradient and metrics over a batch; with several microbatches, of one after another.

    A microbatch counts by its share of the batch's weight, so that the sums are those of the whole batch. What a task
    prepares, and the way back through it, which is linear in the gradient, is done once for all.
    """
    if prepare:
        prepared, back = jax.vjp(prepare, model)
        found, metrics = mean_gradient(gradient, weight, prepared, batch, key, microbatches)
        return back(found)[0], metrics
    if microbatches == 1:
        return gradient(model, batch, key)
    total = jnp.maximum(weight(batch), 1.0)

    def add(sums, part):
        number, rows = part
        share = weight(rows) / total
        found = gradient(model, rows, jax.random.fold_in(key, number))
        return jax.tree.map(lambda a, b: a + share * b, sums, found), None

    parts = jnp.arange(microbatches), jax.tree.map(functools.partial(split, count=microbatches), batch)
    _, metrics = jax.eval_shape(gradient, model, jax.tree.map(lambda rows: rows[0], parts[1]), key)
    zeros = jax.tree.map(jnp.zeros_like, (model, metrics))
    return jax.lax.scan(add, zeros, parts)[0]


def split(rows: jax.Array, count: int) -> jax.Array:
    """(B ...) -> (count B/count ...): each device cuts its own rows, and none moves."""
    devices = jax.typeof(rows).sharding.spec[0]
    cut = jax.shard_map(
        lambda own: own.reshape(count, -1, *own.shape[1:]),
        in_specs=PartitionSpec(devices),
        out_specs=PartitionSpec(None, devices),
    )
    return cut(rows)
