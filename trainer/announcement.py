"""What a run says before it begins."""

import contextlib
import math

import jax
import numpy as np
from jax.sharding import Mesh

from configs.schema import Config
from data.dataset import Dataset, size
from data.shapes import batch_fields
from sharding.fallbacks import fallbacks
from sharding.mesh import describe
from sharding.topologies import peak_flops
from trainer.offload import notes
from trainer.privacy import laid_out
from trainer.run_folder import RunFolder
from trainer.step import State
from trainer.tasks import Task

TAKES = "; the step takes "  # memory: `podwright report` looks for it


def announced(
    config: Config, folder: RunFolder, mesh: Mesh, data: Dataset, task: Task, abstract: State, latest: int | None
) -> list[str]:
    """What is about to happen, in at most 25 lines."""
    parameters = sum(leaf.size for leaf in jax.tree.leaves(abstract.model))
    state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
    peak = peak_flops(mesh.devices.flat[0].device_kind)
    optimizer, trainer, every = config.optimizer, config.trainer, config.checkpoint
    kept = f"newest {every.keep_last} kept" + (f", and every {every.keep_every}th" if every.keep_every else "")
    return [
        f"run         {folder.address} ({config.name})",
        f"model       {config.model.kind}, {parameters:,} parameters, {trainer.compute_dtype} compute, "
        f"{state_bytes / 2**20:,.1f} MiB of state",
        f"mesh        {describe(mesh)}",
        *(f"{'data' if i == 0 else '':<12}{line}" for i, line in enumerate(data.describe())),
        *([f"epochs      by step {trainer.steps}: {epochs_in_words(data, trainer.steps)}"] if data.sources else []),
        f"input       {data.ahead(host_bytes(config, mesh))}",
        f"step        {task.units_per_step:,} {task.unit}, {task.flops_per_step:.3g} FLOPs; "
        + (f"MFU against {peak:.3g} FLOP/s a device" if peak else "no MFU: no peak is known for this device"),
        f"optimizer   {optimizer.name}, peak learning rate {optimizer.learning_rate:g}, {optimizer.schedule}, "
        f"{optimizer.warmup_steps} of {trainer.steps} steps warm-up"
        + (": too few steps to reach the peak" if optimizer.warmup_steps > trainer.steps else ""),
        f"checkpoints {folder.checkpoints}, every {every.every} steps, {kept}",
        *([f"teacher     {config.distill.teacher}, {amount(config)}"] if config.distill.teacher else []),
        f"state       {origin(config) if latest is None else f'resume from step {latest}'}",
        *(f"note        {note}" for note in [*config.notes(), *notes(config, mesh), *fallbacks(abstract, mesh)]),
        *(f"changed     {change}" for change in folder.changes[:5]),
    ]


def compiled_in(program: jax.stages.Compiled, seconds: float) -> str:
    """With what the step takes of a device's memory, where the compiler tells."""
    memory = None
    with contextlib.suppress(NotImplementedError, jax.errors.JaxRuntimeError):
        memory = program.memory_analysis()
    if memory is None:
        return f"compiled in {seconds:.1f} s"
    own = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    total = own + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    return f"compiled in {seconds:.1f} s{TAKES}{size(total)} a device"


def epochs_in_words(data: Dataset, steps: int) -> str:
    return ", ".join(f"{count:.2f} of {source}" for source, count in data.epochs(steps).items())


def host_bytes(config: Config, mesh: Mesh) -> int:
    """Of a batch on one host."""
    fields = batch_fields(laid_out(config, mesh)).values()
    return sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in fields) // jax.process_count()


def amount(config: Config) -> str:
    samples, weight = config.distill.samples, config.distill.weight
    return (f"{samples} sampled logits a token" if samples else "its whole distribution") + f", {weight:g} of the loss"


def origin(config: Config) -> str:
    base = config.finetune.base
    return f"new, the parameters of {base}" if base else f"new, from seed {config.trainer.seed}"
