"""The state of a run, and the program that takes it from one step to the next."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from models.params import Spec
from trainer.tasks import Batch, Task


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """All that changes while training. Random keys derive from the seed and `step`, so none is kept."""

    step: jax.Array  # optimizer updates done
    model: Any
    opt_state: Any


def init_state(
    task: Task, optimizer: optax.GradientTransformation, seed: int, spec: Spec, base: Any | None = None
) -> State:
    """The state before the first step; with the parameters of `base`, if one is given, in place of random ones."""
    model = task.init(jax.random.key(seed), spec)
    if base is not None:
        model = task.with_base(model, base)
    return State(step=jnp.zeros((), jnp.int32), model=model, opt_state=optimizer.init(model))


def train_step(
    state: State,
    batch: Batch,
    teacher: Any | None = None,
    *,
    task: Task,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    seed: int,
) -> tuple[State, dict[str, jax.Array]]:
    """One optimizer update. Metrics: the task's, norm of the gradient before clipping, learning rate (float32 scalars).

    A teacher, if there is one, goes to the loss of a distilled task.
    """
    key = jax.random.fold_in(jax.random.key(seed + 1), state.step)
    loss = task.loss if teacher is None else functools.partial(task.loss, teacher=teacher)
    gradient, metrics = jax.grad(loss, has_aux=True)(state.model, batch, key)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.model)
    metrics |= {"grad_norm": optax.tree.norm(gradient), "learning_rate": schedule(state.step)}
    return State(state.step + 1, optax.apply_updates(state.model, updates), opt_state), metrics
