"""What the sides of `benchmarks.step` have in common: a case, its batch, and the figures of a step."""

import pathlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from configs.schema import Config, NFNetConfig, TextData
from trainer.tasks import make_task

Batch = dict[str, np.ndarray]
Figures = dict[str, float]


@dataclass(frozen=True)
class Case:
    """What is compared, and how many steps of it a process measures after how many that it doesn't."""

    title: str
    config: Callable[[], Config]
    warm_up: int
    steps: int

    def figures(self, step: Callable[[], Any]) -> Figures:
        """Of steps that end when their results are there."""
        wall, cpu = [], []
        for _ in range(self.warm_up):
            step()
        resident = memory("VmRSS")
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now on
        for _ in range(self.steps):
            start, used = time.perf_counter(), time.process_time()
            step()
            wall.append(time.perf_counter() - start)
            cpu.append(time.process_time() - used)
        data = self.config().data
        assert isinstance(data, TextData)
        return {
            "tokens_per_second": data.batch_size * data.sequence_length / statistics.median(wall),
            "cpu_seconds": statistics.median(cpu),
            "peak_mib": memory("VmHWM"),
            "resident_mib": resident,
            "rows": data.batch_size,
            "length": data.sequence_length,
        }


def memory(field: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at most."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def random_batch(config: Config) -> Batch:
    """One document a row; which tokens they are makes no difference to speed. None is 0, whose lookup transformers gives no
    gradient."""
    data, model = config.data, config.model
    assert isinstance(data, TextData)
    assert not isinstance(model, NFNetConfig)
    shape = (data.batch_size, data.sequence_length)
    rng = np.random.default_rng(0)
    tokens, targets = (rng.integers(1, model.vocab_size, size=shape).astype(np.int32) for _ in range(2))
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    return {"tokens": tokens, "targets": targets, "segment_pos": positions, "weights": np.ones(shape, np.float32)}


def our_loss(config: Config) -> Callable[[Any, Batch], jax.Array]:
    """As the trainer calls it."""
    task = make_task(config)
    return lambda model, batch: task.loss(model, batch, jax.random.key(0))[0]


def jax_figures(case: Case, parameters: Any, loss: Callable[[Any, Batch], jax.Array]) -> Figures:
    batch = random_batch(case.config())
    start = time.perf_counter()
    program = jax.jit(jax.value_and_grad(loss)).lower(parameters, batch).compile()
    compile_seconds = time.perf_counter() - start
    found = case.figures(lambda: jax.block_until_ready(program(parameters, batch)))
    value, gradient = program(parameters, batch)
    needed = program.memory_analysis()
    assert needed
    return found | {
        "compile_seconds": compile_seconds,
        "temporary_mib": needed.temp_size_in_bytes / 2**20,
        "loss": float(value),
        "grad_norm": float(optax.tree.norm(gradient)),
        "parameters": sum(jnp.size(leaf) for leaf in jax.tree.leaves(parameters)),
    }
