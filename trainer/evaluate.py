"""Evaluation on held-out data, inside a run and of a finished one; and opening a run's newest checkpoint."""

import contextlib
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding

from configs.compare import differences
from configs.schema import Config, ConfigError
from configs.store import from_json
from configs.suggestions import nearest
from data.bad_records import taken_from
from data.dataset import Dataset
from models.params import Spec
from sharding.rules import rules_for
from trainer.saved import SavedSteps
from trainer.storage import StorageError, entries, folder_of
from trainer.tasks import Batch, Task, make_task
from trainer.trees import concrete

Place = Callable[[dict[str, np.ndarray]], Batch]


def evaluate(
    program: Callable, models: dict[str, Any], data: Dataset, batches: int, task: Task, place: Place
) -> dict[str, float]:
    """Metrics of each model over the first `batches` held-out batches (0: all), by their names behind the model's; `program` is
    task.evaluate, jitted or compiled. Where others stand for records that cannot be used, "bad_records" is how many."""
    sums: dict[str, dict[str, Any]] = {name: {} for name in models}
    bad = 0
    for batch in data.held_out_batches(batches or None):
        bad += len(taken_from(batch))
        placed = place(batch)
        for name, model in models.items():
            for sum_of, value in jax.device_get(program(model, placed)).items():
                sums[name][sum_of] = sums[name].get(sum_of, 0.0) + np.float64(value)
    metrics = {name + metric: value for name in models for metric, value in task.summarise(sums[name]).items()}
    return metrics | ({"bad_records": float(bad)} if bad else {})


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh, spec: Spec) -> Batch:
    """This host's rows of a batch, onto the devices, divided along the batch axis."""
    sharding = NamedSharding(mesh, spec("batch"))
    with jax.transfer_guard("allow"):  # jax doesn't count this as asked for where there are several hosts
        return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def read_config(run: str | pathlib.Path) -> Config:
    """The config a run was started with. Raises StorageError if `run` is not a run, and names the run beside it that is meant."""
    file = folder_of(run) / "config.json"
    try:
        return from_json(file.read_text())
    except OSError:
        near = run_like(folder_of(run))
        raise StorageError(
            f"{run} is not a podwright run: there is no {file}{f', perhaps {near}' * bool(near)}"
        ) from None


def run_like(folder: epath.Path) -> epath.Path | None:
    """The run beside a folder that does not exist whose name is most like it."""
    with contextlib.suppress(Exception):  # this only helps to tell what went wrong
        if not folder.exists():
            near = nearest(folder.name, [entry.name for entry in entries(folder.parent)])
            found = [folder.parent / name for name in near]
            return next((run for run in found if (run / "config.json").exists()), None)
    return None


def load_model(run: str | pathlib.Path, config: Config, mesh: Mesh, step: int | None = None) -> tuple[Any, int]:
    """Model and step of a run's newest committed checkpoint, or of the one of `step`, laid out on the current `mesh`; the
    rest is not read. Where the run averages its parameters, the model is the average. Raises StorageError."""
    saved, task = SavedSteps(folder_of(run) / "checkpoints"), make_task(config)
    abstract = jax.eval_shape(lambda key: task.init(key, rules_for(mesh).spec), jax.random.key(0))
    step = saved.newest() if step is None else step
    if step is None:
        raise StorageError(f"{run} has no checkpoint yet")
    part = "ema" if config.optimizer.averages else "model"
    return jax.jit(task.whole)(saved.restore_part(step, part, concrete(abstract, mesh))), step


def open_base(config: Config, mesh: Mesh) -> Any:
    """The model of the run that `config.finetune.base` names. Raises ConfigError if this run's model is another one."""
    run = config.finetune.base
    base = read_config(run)
    unfit = [d for d in differences(base, config) if d.path.startswith("model.") and "checkpoint" in d.effects]
    if config.finetune.new_head:
        unfit = [d for d in unfit if d.path != "model.num_classes"]
    tokenizers = [getattr(c.data, "tokenizer", None) for c in (base, config)]
    if (folder_of(run) / "data_manifest.json").exists() and None not in tokenizers:
        unfit += [d for d in differences(base, config) if d.path == "data.tokenizer"]
    if [d.path for d in unfit] == ["model.num_classes"]:
        raise ConfigError(
            f"finetune.base={run!r} tells {base.model.num_classes} classes apart, but model.num_classes="  # type: ignore[union-attr]
            f"{config.model.num_classes}: finetune.new_head=true starts the classifier anew"  # type: ignore[union-attr]
        )
    if unfit or base.model.kind != config.model.kind:
        listed = "; ".join(str(d) for d in unfit) or f"model.kind={base.model.kind!r} -> {config.model.kind!r}"
        raise ConfigError(
            f"finetune.base={run!r} is another model than this config's, whose arrays or ids mean other things: {listed}"
        )
    return load_model(run, base, mesh)[0]
