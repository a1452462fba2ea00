"""Evaluation on held-out data, inside a run and of a finished one; and opening a run's newest checkpoint."""

import contextlib
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from configs.schema import Config
from configs.store import from_json
from data.dataset import Dataset
from models.params import Spec
from sharding.rules import rules_for
from trainer.checkpoint import Checkpoints, StorageError, concrete
from trainer.tasks import Batch, Task, make_task

Place = Callable[[dict[str, np.ndarray]], Batch]


def evaluate(program: Callable, model: Any, data: Dataset, batches: int, task: Task, place: Place) -> dict[str, float]:
    """Metrics over the first `batches` held-out batches (0: all); `program` is the jitted task.evaluate."""
    sums: dict[str, float] = {}
    for batch in data.held_out_batches(batches or None):
        for name, value in jax.device_get(program(model, place(batch))).items():
            sums[name] = sums.get(name, 0.0) + float(value)
    return task.summarise(sums)


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh, spec: Spec) -> Batch:
    """This host's rows of a batch, onto the devices, divided along the batch axis."""
    sharding = NamedSharding(mesh, spec("batch"))
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def read_config(run: str | pathlib.Path) -> Config:
    """The config a run was started with. Raises StorageError if `run` is not a run."""
    file = pathlib.Path(run).expanduser() / "config.json"
    try:
        return from_json(file.read_text())
    except OSError:
        raise StorageError(f"{run} is not a podwright run: there is no {file}") from None


def load_model(run: str | pathlib.Path, config: Config, mesh: Mesh) -> tuple[Any, int]:
    """Model and step of a run's newest committed checkpoint, laid out on the current `mesh`; the rest is not read."""
    folder = pathlib.Path(run).expanduser() / "checkpoints"
    abstract = jax.eval_shape(lambda key: make_task(config).init(key, rules_for(mesh).spec), jax.random.key(0))
    if not folder.is_dir():
        raise StorageError(f"{run} has no checkpoint yet")
    with contextlib.closing(Checkpoints(folder, config.checkpoint)) as checkpoints:
        step = checkpoints.latest()
        if step is None:
            raise StorageError(f"{run} has no committed checkpoint yet")
        return checkpoints.restore_part(step, "model", concrete(abstract, mesh)), step
