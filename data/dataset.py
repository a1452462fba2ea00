"""What the rest of the house sees of data: batch N of a run as a pure function of (manifest, seed, N).

There is no iterator state to save. Position step * batch_size + i of an endless stream of epochs names an example;
a host computes only its own positions, so resuming needs a step number and a host count may change between runs.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from data.bad_records import FIELD
from data.errors import DataError
from data.left_out import batch_number
from data.order import example_at

Batch = dict[str, np.ndarray]

PREFETCH_THREADS = 2
PREFETCH_BATCHES = 8
WORKER_BATCHES = 2  # that each process has ready


@dataclass(frozen=True)
class Origin:
    """Where a segment of a row, or an image, came from."""

    source: str  # a file
    place: int  # in it: a byte, a row, a line or a number
    position: int = 0  # of the segment's first token in its document

    def __str__(self) -> str:
        return f"{self.source} at {self.place:,}" + (f", from token {self.position:,}" if self.position else "")


class Examples(Protocol):
    """One split: `len()` examples, read by number into arrays whose first axis is the example."""

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray) -> Batch:
        """indices: int64 [n] in [0, len). Returns fields of n rows, in that order."""
        ...

    def origins(self, indices: np.ndarray) -> list[list[Origin]]:
        """Of each row its segments' origins, in their order: for people, never for training."""
        ...


class Batches(Protocol):
    """An endless iterator that reads ahead until it is closed."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __next__(self) -> Batch: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Dataset:
    """A source opened for one host. All arrays are numpy; b is the number of rows of a batch that this host reads."""

    manifest: dict[str, Any]  # see manifest_of
    train: Examples
    held_out: Examples
    batch_size: int  # rows a step over all hosts
    seed: int
    summary: tuple[str, ...]  # what was found, a few lines
    skipped: list[tuple[str, str]]  # (path, or file:line of a record, reason), in that order
    unit: str = "file"  # what is skipped
    shuffled: bool = True  # `train` is read in the order of data.order; False: by position, it has an order of its own
    threads: int = PREFETCH_THREADS  # that read batches ahead
    workers: int = 0  # processes that do so instead, for what Python has to work on
    sources: tuple[str, ...] = ()  # names of those that `train` mixes
    max_bad: float = 0.0  # share of the records read that may be unusable
    rows: np.ndarray | None = None  # which rows of a batch this host reads, ascending; None: all
    left_out: tuple[range, ...] = ()  # numbers of batches that no step uses, from 0, as left_out.merged gives them
    canaries: Any = None  # of images, a data.canaries.Canaries

    @property
    def examples_per_epoch(self) -> int:
        return len(self.train)

    def train_batch(self, step: int) -> Batch:
        """This host's rows of batch `step`: arrays [b, ...]. Steps count from 0 and never run out."""
        if step < 0:
            raise ValueError(f"step {step} is before the first batch, 0")
        return self.train.read(self._examples(step))

    def train_origins(self, step: int) -> list[list[Origin]]:
        """Where the rows of train_batch(step) came from."""
        return self.train.origins(self._examples(step))

    def train_batches(self, start_step: int) -> Batches:
        """train_batch(start_step), train_batch(start_step + 1), ...: endless, read ahead from this call on.

        What goes wrong while reading is raised by the batch that
        it happened to; a worker that is killed raises a DataError within seconds.
        """
        import grain  # a second and a half, mostly jax: not paid by those who only look at data

        steps = grain.MapDataset.range(start_step, 2**62).map(self.train_batch)
        if not self.workers:
            options = grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=PREFETCH_BATCHES)
            batches = iter(steps.to_iter_dataset(options))
            batches.start_prefetch()
            return batches
        from absl import flags

        flags.FLAGS.mark_as_parsed()  # grain's workers ask for flags, which nobody here parses
        alone = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        options = grain.MultiprocessingOptions(num_workers=self.workers, per_worker_buffer_size=WORKER_BATCHES)
        return WorkerBatches(iter(steps.to_iter_dataset(alone).mp_prefetch(options)))

    def held_out_batches(self, limit: int | None = None) -> Iterator[Batch]:
        """The held-out examples in their fixed order, at most `limit` batches (None or 0: all of them).

        Every batch has b rows a host; where the examples run out, rows of zeros follow, whose weights are 0.
        """
        count = -(-len(self.held_out) // self.batch_size)
        for step in range(min(limit, count) if limit else count):
            positions = self._positions(step)
            real = positions[positions < len(self.held_out)]
            yield {
                name: rows
                if name == FIELD
                else np.pad(rows, [(0, len(positions) - len(real))] + [(0, 0)] * (rows.ndim - 1))
                for name, rows in self.held_out.read(real).items()
            }

    def epochs(self, steps: int) -> dict[str, float]:
        """How often each source has been gone through after so many steps; empty where there is only one and no name."""
        if not self.sources:
            return {}
        passed = self.train.epochs(batch_number(steps, self.left_out) * self.batch_size)  # type: ignore[attr-defined]
        return dict(zip(self.sources, map(float, passed), strict=True))

    def ahead(self, batch_bytes: int) -> str:
        """What reading ahead takes of the host's memory, for batches of so many bytes on this host."""
        # A worker holds what it makes, and what waits to be fetched from it.
        batches = self.workers * (WORKER_BATCHES + 2) if self.workers else PREFETCH_BATCHES + self.threads
        who = f"{self.workers} processes" if self.workers else f"{self.threads} threads"
        return f"{who} read ahead, at most {batches} batches of {size(batch_bytes)}: {size(batches * batch_bytes)} of host memory"

    def describe(self) -> list[str]:
        """A few lines for the start-up plan: what is there, how it is cut, what was left out and why."""
        return [*self.summary, *([f"skipped {count_reasons(self.skipped, self.unit)}"] if self.skipped else [])]

    def _examples(self, step: int) -> np.ndarray:
        """int64 [b]: what `train` is asked for at a step."""
        positions = self._positions(batch_number(step, self.left_out))
        return example_at(positions, len(self.train), self.seed) if self.shuffled else positions

    def _positions(self, number: int) -> np.ndarray:
        """int64 [b]: this host's share of the positions of a batch."""
        rows = np.arange(self.batch_size) if self.rows is None else self.rows
        return number * self.batch_size + rows.astype(np.int64)


def size(count: int) -> str:
    """`52 KiB`, `9.2 MiB`, `1.3 GiB`"""
    power = next(power for power in (1, 2, 3) if count < 1000 * 1024**power or power == 3)
    return f"{count / 1024**power:.3g} {('KiB', 'MiB', 'GiB')[power - 1]}"


class WorkerBatches:
    """Batches of processes. One that was killed is a sentence, not a traceback of those who wait for it."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def __iter__(self) -> "WorkerBatches":
        return self

    def __next__(self) -> Batch:
        try:
            return next(self.batches)
        except RuntimeError as error:
            if ended := re.search(r"terminated unexpectedly with exit code (-?\d+)", str(error)):
                raise DataError(
                    f"a process that reads data ended with exit code {ended[1]}"
                    + (": the system kills processes so when the host's memory is full" if ended[1] == "-9" else "")
                    + "; data.workers=0 reads in this process, and shows what goes wrong"
                ) from None
            raise

    def close(self) -> None:
        self.batches.close()


def manifest_of(content: dict[str, Any], counts: dict[str, Any]) -> dict[str, Any]:
    """A JSON-able manifest: `content`, which with the seed decides every batch, "hash", the sha256 of content's JSON,
    and "counts" for people. content has "needs": the least a model's config must offer, by field."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    return {**content, "counts": counts, "hash": digest}


def is_held_out(key: str, share: float) -> bool:
    """Whether an example belongs to the held-out split: by hash of its name, so others coming or going don't move it."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def count_reasons(skipped: list[tuple[str, str]], unit: str = "file") -> str:
    """`3 files: 2 not UTF-8 (a.py, ...), 1 empty (b.py)`."""
    parts = []
    for reason, count in sorted(Counter(reason for _, reason in skipped).items()):
        first = next(path for path, why in skipped if why == reason)
        parts.append(f"{count} {reason} ({first}{', ...' if count > 1 else ''})")
    return f"{len(skipped)} {unit}{'s' if len(skipped) != 1 else ''}: {', '.join(parts)}"
