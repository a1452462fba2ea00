"""The program of a run before anything is allocated: what `train` compiles and runs, and what `plan` compiles for a cluster
that isn't there."""

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from configs.schema import Config
from data.shapes import batch_fields
from sharding.flags import compiler_options
from sharding.rules import rules_for
from trainer.frozen import check_learns
from trainer.guard import JUDGED
from trainer.offload import moments_on_host
from trainer.optimizers import make_optimizer, make_schedule
from trainer.privacy import laid_out
from trainer.private_gradient import private_mean
from trainer.step import State, init_state, train_step
from trainer.tasks import Task
from trainer.trees import concrete


@dataclass(frozen=True)
class Program:
    init: Callable[..., State]  # the state before the first step; `base` may bring its parameters
    state: State  # shapes, dtypes and shardings
    batch: dict[str, jax.ShapeDtypeStruct]
    held_out: dict[str, jax.ShapeDtypeStruct]
    step: Any  # the jitted train_step: (state, batch, teacher) -> (state, metrics); the state is donated

    def trace(self, teacher: Any | None = None):
        return self.step.trace(self.state, self.batch, teacher)


def make_program(config: Config, task: Task, mesh: Mesh | AbstractMesh, noise: float = 1.0) -> Program:
    """To be called, and traced, with `mesh` set. `noise` is a private run's multiplier, which costs nothing to change."""
    spec = rules_for(mesh).spec
    schedule = make_schedule(config.optimizer, config.trainer.steps)
    optimizer: optax.GradientTransformation = make_optimizer(
        config.optimizer, schedule, task.decays, task.clips, task.learns, task.rates
    )
    init = functools.partial(init_state, task, optimizer, config.trainer.seed, spec, config.optimizer.averages)
    state = concrete(jax.eval_shape(init), mesh)
    check_learns(config.finetune.learns, state.model)
    if config.optimizer.offload:
        state = dataclasses.replace(state, opt_state=moments_on_host(state.opt_state))
    if config.guard.threshold:
        values = jax.ShapeDtypeStruct((config.guard.window, len(JUDGED)), jnp.float32)
        state = dataclasses.replace(state, recent=concrete(values, mesh))
    trainer, private = config.trainer, None
    if config.privacy.epsilon:
        everywhere = NamedSharding(mesh, spec(None))
        state = dataclasses.replace(state, noise=jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=everywhere))
        private = functools.partial(private_mean, config.privacy, noise, config.data.batch_size)
    step = functools.partial(
        train_step,
        task=task,
        optimizer=optimizer,
        schedule=schedule,
        seed=trainer.seed,
        microbatches=trainer.microbatches,
        config=config.optimizer,
        guard=config.guard,
        private=private,
    )
    rows, data = NamedSharding(mesh, spec("batch")), laid_out(config, mesh)
    batch, held_out = (
        {name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for name, (shape, dtype) in fields.items()}
        for fields in (batch_fields(data), batch_fields(data, held_out=True))
    )
    return Program(
        init, state, batch, held_out, jax.jit(step, donate_argnums=0, compiler_options=compiler_options(mesh))
    )


def bytes_per_device(tree: Any, memory: str = "device") -> int:
    """Of shapes with shardings: what the first device holds in memory of this kind."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if (leaf.sharding.memory_kind or "device") == memory]
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
