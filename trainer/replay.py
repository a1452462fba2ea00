"""One step of a run once more: the very batch, the parameters that it met, its losses and gradients."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs.schema import Config, ImageData, LongRangeData
from data import open_data
from data.bad_records import taken_from
from data.dataset import DataError, Dataset, Origin
from models.params import path_name
from sharding.flags import compiled
from sharding.mesh import make_mesh, simulate_devices
from sharding.rules import rules_for
from trainer.distill import distilled, open_teacher
from trainer.evaluate import open_base, place_batch, read_config
from trainer.guard import read_rollbacks, recent_values, saved_part, with_recent, without_left_out
from trainer.program import Program, make_program
from trainer.run_folder import changed_entries, read_manifest, read_metrics
from trainer.saved import SavedSteps
from trainer.step import State, mean_gradient
from trainer.storage import folder_of
from trainer.tasks import Task, cross_entropy, make_task, token_losses, yes_or_no


@dataclass(frozen=True)
class Replay:
    config: Config
    step: int
    start: int  # step of the checkpoint whose parameters began it, 0 for the first ones
    exact: bool  # whether all steps between were run again
    batch: dict[str, np.ndarray]
    origins: list[list[Origin]]  # of each row its segments'
    nats: np.ndarray  # float32, of each token (B T), or of each image (B)
    metrics: dict[str, float]  # of the step itself
    logged: dict[str, float]  # what metrics.jsonl has of it; empty if nothing
    norms: dict[str, np.ndarray]  # gradient norm by parameter; of stacked layers one each


def replay(run: str, step: int, quick: bool, say: Callable[[str], None]) -> Replay:
    """Step `step` of a run, as the log counts them. With `quick` it meets the parameters of the newest checkpoint before
    it, else all steps from there on are run again. Raises ConfigError, DataError, StorageError."""
    config = read_config(run)
    simulate_devices(config.mesh)
    data = open_data(config.data)
    check_same_data(run, data)
    data = without_left_out(data, config.guard, read_rollbacks(run))
    mesh, task = make_mesh(config.mesh), make_task(config)
    if config.distill.teacher:
        task = distilled(task, config, data.manifest)
    place = functools.partial(place_batch, mesh=mesh, spec=rules_for(mesh).spec)
    with jax.set_mesh(mesh):
        program = make_program(config, task, mesh)
        state, start, meta = state_before(run, config, program, step, mesh)
        teacher, _ = open_teacher(config, mesh, meta)
        run_step = compiled(program.trace(teacher).lower())
        if not quick:
            for number in range(start + 1, step):
                state, _ = run_step(state, place(batch_of(data, number)), teacher)
                if number % 10 == 0:
                    say(f"step {number} again, on the way to {step}")
        batch = batch_of(data, step)
        placed = place(batch)
        nats = jax.jit(functools.partial(losses, config))(state.model, placed)
        norms = jax.jit(functools.partial(gradient_norms, task, config))(state, placed, teacher)
        _, metrics = run_step(state, placed, teacher)
        fetched = jax.device_get((nats, norms, metrics))
    return Replay(
        config=config,
        step=step,
        start=start,
        exact=not quick or start == step - 1,
        batch=batch,
        origins=data.train_origins(step - 1),
        nats=fetched[0],
        metrics={name: float(value) for name, value in fetched[2].items()},
        logged=read_metrics(run, "train").get(step, {}),
        norms=fetched[1],
    )


def batch_of(data: Dataset, step: int) -> dict[str, np.ndarray]:
    """Steps of the log count from 1, batches from 0."""
    batch = data.train_batch(step - 1)
    taken_from(batch)
    return batch


def check_same_data(run: str, data: Dataset) -> None:
    saved = read_manifest(run)
    if saved["hash"] != data.manifest["hash"]:
        raise DataError(
            f"the data of {run} changed since it was trained ({changed_entries(saved, data.manifest)}): its steps cannot be "
            f"rebuilt without the old data"
        )


def state_before(run: str, config: Config, program: Program, step: int, mesh: Any) -> tuple[State, int, dict]:
    """The newest saved state before `step`, or the first one, which was never saved; its step, and what was noted of it."""
    saved = SavedSteps(folder_of(run) / "checkpoints")
    if before := [found for found in saved.steps() if found < step]:
        state, manifest = saved.restore(before[-1], saved_part(program.state))
        values = recent_values(run, before[-1], config.guard.window)
        return with_recent(state, program.state, values), before[-1], manifest
    shardings = jax.tree.map(lambda leaf: leaf.sharding, saved_part(program.state))
    base = open_base(config, mesh) if config.finetune.base else None
    init = jax.jit(lambda base: program.init(base=base), out_shardings=shardings, donate_argnums=0)
    return with_recent(init(base), program.state, []), 0, {}


def losses(config: Config, model: Any, batch: dict[str, jax.Array]) -> jax.Array:
    """-log p of each target, float32: (B T) of tokens, (B) of images and of pooled rows; without dropout and smoothing."""
    if isinstance(config.data, ImageData):
        logits = model(batch["images"], dtype=jnp.dtype(config.trainer.compute_dtype), dropout_key=None)
        if config.data.labels:
            return jnp.mean(yes_or_no(logits, batch["labels"]), axis=-1)
        return cross_entropy(logits, batch["labels"])
    if isinstance(config.data, LongRangeData) and getattr(config.model, "pooling", "none") != "none":
        dtype = jnp.dtype(config.trainer.compute_dtype)
        return cross_entropy(model(batch[config.data.inputs], batch["segment_pos"], dtype=dtype), batch["labels"])
    return token_losses(config, model, batch)[0]


def gradient_norms(
    task: Task, config: Config, state: State, batch: dict[str, jax.Array], teacher: Any | None
) -> dict[str, jax.Array]:
    """Norm of the gradient before clipping, by parameter; () or, of a stack of layers, (layers,)."""
    key = jax.random.fold_in(jax.random.key(config.trainer.seed + 1), state.step)
    loss = task.loss if teacher is None else functools.partial(task.loss, teacher=teacher)
    one = jax.grad(loss, has_aux=True)
    gradient, _ = mean_gradient(one, task.weight, state.model, batch, key, config.trainer.microbatches, task.prepare)
    found = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(gradient)[0]:
        name = path_name(path)
        axes = tuple(range(1 if "groups" in name.split("/") else 0, leaf.ndim))
        found[name] = jnp.sqrt(jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis=axes))
    return found
