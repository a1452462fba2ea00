"""What a run prints and records: aligned lines and a progress bar, metrics.jsonl, TensorBoard."""

import contextlib
import json
import math
import pathlib
import resource
import sys
import time
from collections.abc import Iterator
from types import TracebackType

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sharding.topologies import peak_flops
from trainer.storage import StorageError, reason

FLUSH_SECONDS = 10.0  # that a point may be missing from TensorBoard


class Reporter:
    """Writes to the terminal, log.txt, metrics.jsonl and TensorBoard. Appends; nothing logged is ever rewritten.

    Of several hosts all but one are `silent`: they write nothing.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        unit: str,
        units_per_step: int,
        flops_per_step: float,
        steps: int,
        log_every: int,
        silent: bool = False,
    ):
        self.unit, self.units_per_step, self.flops_per_step = unit, units_per_step, flops_per_step
        self.steps, self.log_every = steps, log_every
        self.console = Console(highlight=False, soft_wrap=True)
        self.folder = folder
        self.silent = silent
        if not silent:
            self._open()
        self.peak = peak_flops(jax.devices()[0].device_kind)
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=silent or not self.console.is_terminal,
            transient=True,
        )
        self.bar = self.progress.add_task("training", total=steps)
        self._window_start: float | None = None
        self._window_steps, self._window_wait = 0, 0.0

    def _open(self) -> None:
        # Not its SummaryWriter: that writes in a thread, and once a full disk has ended the thread, the next points wait for
        # it for ever. Imported here, so that reading a run's metrics doesn't need it.
        from tensorboardX.event_file_writer import EventsWriter

        with self._explained():
            self.log_file = open(self.folder / "log.txt", "a", buffering=1)  # noqa: SIM115
            self.metrics_file = open(self.folder / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115
            if self.metrics_file.tell() and not (self.folder / "metrics.jsonl").read_bytes().endswith(b"\n"):
                self.metrics_file.write("\n")  # a kill left half a line: keep it, start a new one
            (self.folder / "tensorboard").mkdir(exist_ok=True)
            self.curves = EventsWriter(str(self.folder / "tensorboard" / "events"))
        self._curves_flushed = time.monotonic()

    def __enter__(self) -> "Reporter":
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()
        if self.silent:
            return
        for file in (self.curves, self.metrics_file, self.log_file):
            with contextlib.suppress(OSError):  # lines are written as they come: a failed one has been told
                file.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(f"{self.folder} could not be written: {reason(error)}") from error

    def say(self, *lines: str) -> None:
        if self.silent:
            return
        for line in lines:
            self.console.print(line, markup=False)
            with self._explained():
                self.log_file.write(line + "\n")
        if not self.console.is_terminal:
            sys.stdout.flush()

    def record(self, kind: str, step: int, values: dict[str, float]) -> None:
        """A line of metrics.jsonl (a value that is not finite becomes null there) and points of TensorBoard's curves."""
        if self.silent:
            return
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with self._explained():
            self.metrics_file.write(json.dumps({"kind": kind, "step": step, **finite}) + "\n")
            for name, value in finite.items():
                if value is not None:
                    point = scalar(f"{kind}/{name}", value)
                    self.curves.write_event(Event(wall_time=time.time(), step=step, summary=point))
            if time.monotonic() - self._curves_flushed > FLUSH_SECONDS:
                self.curves.flush()
                self._curves_flushed = time.monotonic()

    def start_clock(self) -> None:
        """Start (or, after an evaluation or save, restart) timing, so that throughput counts training alone."""
        self._window_start, self._window_steps, self._window_wait = time.perf_counter(), 0, 0.0

    def train(self, step: int, values: dict[str, float], data_wait: float) -> None:
        """Record update `step`; `data_wait` is seconds spent waiting for its batch."""
        assert self._window_start is not None
        now = time.perf_counter()
        self._window_steps += 1
        self._window_wait += data_wait
        seconds = max(now - self._window_start, 1e-9)
        step_seconds = seconds / self._window_steps
        speed = {
            f"{self.unit}_per_second": self.units_per_step / step_seconds,
            "step_ms": 1e3 * step_seconds,
            # A batch may have been waited for while the step before was still timed.
            "data_wait_percent": min(100.0, 100 * self._window_wait / seconds),
            "memory_gib": memory_gib(),
        }
        if self.peak:
            speed["mfu_percent"] = 100 * self.flops_per_step / step_seconds / (self.peak * jax.device_count())
        self.record("train", step, values | speed)
        self.progress.update(self.bar, completed=step)
        if step % self.log_every == 0 or step == self.steps:
            self.say(self._line(step, values, speed, step_seconds))
            self.start_clock()

    def _line(self, step: int, values: dict[str, float], speed: dict[str, float], step_seconds: float) -> str:
        eta = int((self.steps - step) * step_seconds)
        mfu = f"{speed['mfu_percent']:.1f}%" if self.peak else "n/a"
        # A private run logs what it spent, and its loss only if that is asked for.
        loss = f"loss {values['loss']:7.4f}  " if "loss" in values else ""
        loss += f"epsilon {values['epsilon']:6.3f}  " if "epsilon" in values else ""
        return (
            f"step {step:>{len(str(self.steps))}}/{self.steps}  {loss}grad {values['grad_norm']:8.3g}  "
            f"{speed[f'{self.unit}_per_second']:>9,.0f} {self.unit}/s  {speed['step_ms']:7.1f} ms  "
            f"wait {speed['data_wait_percent']:5.1f}%  mem {speed['memory_gib']:5.2f}G  mfu {mfu:>5}  "
            f"eta {eta // 3600}:{eta // 60 % 60:02d}:{eta % 60:02d}"
        )


def memory_gib() -> float:
    """Peak GiB in use: of the first device where it tells, else of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
