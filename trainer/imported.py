"""A run that starts from somebody else's parameters: its config, and a checkpoint of step 0 that was never in memory."""

import functools
import json
import pathlib
from collections.abc import Callable, Mapping

import jax
import numpy as np
import orbax.checkpoint as ocp

from configs.schema import Config
from configs.store import FILE_NAME, to_json
from models.convert.tensors import Tensor, in_memory
from models.params import named_leaves
from sharding.mesh import one_device_mesh
from sharding.rules import Rules
from trainer.array_folder import fill, placeholders
from trainer.checkpoint import JOURNAL, describe, write_whole
from trainer.checksums import Fingerprint, observed, together
from trainer.optimizers import make_optimizer, make_schedule
from trainer.saved import MANIFEST
from trainer.step import State, init_state
from trainer.storage import StorageError, reason
from trainer.tasks import make_task


def abstract_arrays(config: Config) -> dict[str, jax.Array]:
    """Every array of a run's state by its name on disk: shapes and dtypes, nothing is allocated."""
    with jax.set_mesh(one_device_mesh()):
        return named_leaves(jax.eval_shape(first_state(config)))


def first_state(config: Config) -> Callable[[], State]:
    task = make_task(config)
    schedule = make_schedule(config.optimizer, config.trainer.steps)
    optimizer = make_optimizer(config.optimizer, schedule, task.decays, task.clips, task.learns, task.rates)
    averages = config.optimizer.averages
    return functools.partial(init_state, task, optimizer, config.trainer.seed, Rules().spec, averages)


def write_first_state(run: pathlib.Path, config: Config, parameters: Mapping[str, Tensor]) -> None:
    """Makes `run` a run at step 0 with these parameters, by our names without `model/`. Raises StorageError."""

    def value(name: str, leaf: jax.Array) -> Tensor:
        kind, _, parameter = name.partition("/")
        if kind in ("model", "ema"):
            return parameters[parameter]
        _, newest, parameter = name.rpartition("/z/")  # where schedule-free begins
        if newest and config.optimizer.name == "schedule-free":
            return parameters[parameter]
        return in_memory(known[name]) if name in known else zeros(leaf.shape, leaf.dtype)

    known = counts(config)
    arrays = {name: value(name, leaf) for name, leaf in abstract_arrays(config).items()}
    checkpoints = run / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    step = checkpoints / "0"
    seen: dict[str, dict[int, Fingerprint]] = {name: {} for name in arrays}
    items = ocp.args.Composite(state=ocp.args.StandardSave(placeholders(arrays)), meta=ocp.args.JsonSave({}))
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
            writer.save(step.absolute(), args=items)
    except Exception as error:
        raise StorageError(f"{step} could not be written: {reason(error)}") from error
    fill(step / "state", {name.replace("/", "."): observed(tensor, seen[name]) for name, tensor in arrays.items()})
    manifest = describe(0, arrays, {name: together(pieces.values()) for name, pieces in seen.items()})
    write_whole(step.joinpath(*MANIFEST), json.dumps(manifest))
    write_whole(checkpoints / JOURNAL, json.dumps({"0": "saved"}))
    (run / FILE_NAME).write_text(to_json(config))


def counts(config: Config) -> dict[str, np.ndarray]:
    """The few numbers of an optimizer's state that belong to no parameter; XLA drops the rest of the program."""

    def few() -> dict[str, jax.Array]:
        found = named_leaves(first_state(config)())
        return {name: leaf for name, leaf in found.items() if name.startswith("opt_state/") and leaf.size <= 3}

    with jax.set_mesh(one_device_mesh()):
        return jax.device_get(jax.jit(few)())


def zeros(shape: tuple[int, ...], dtype: np.dtype) -> Tensor:
    """What every optimizer here starts with but for `counts`."""
    return in_memory(np.broadcast_to(np.zeros((), dtype), shape))
