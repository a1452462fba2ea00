"""The goodput ledger, RUN/ledger.jsonl: what every second of a run was spent on, over all its attempts.

A row covers about a minute of one attempt and is rewritten in place every second, so that a kill loses no more than that:
    {"attempt": 2, "start": 1764415829.1, "end": 1764415889.1, "step": 310, "devices": 8, "device_kind": "TPU v5 lite",
     "seconds": {"step": 58.2, "data wait": 1.8}}
`start` and `end` are Unix times, `step` is the last one trained. What lies between two attempts was idle.
"""

import contextlib
import json
import os
import pathlib
import threading
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
from etils import epath

from trainer.phases import IDLE, INIT, Phases
from trainer.storage import StorageError, reason

FILE = "ledger.jsonl"
EVERY, ROW_SECONDS = 1.0, 60.0
TAIL = 1 << 16  # bytes of metrics.jsonl in which its last step is


class Ledger:
    """Books the phases of this attempt, from `open` on every second in a thread of its own, to the end of its `with`."""

    def __init__(self, phases: Phases):
        self.phases = phases
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._keeper: threading.Thread | None = None

    def open(self, folder: pathlib.Path) -> None:
        """Once the run's folder is this process's. Raises StorageError if the file cannot be opened; those who write what
        matters more tell later failures."""
        rows = list(read_rows(folder))
        last = rows[-1] if rows else {"attempt": 0, "end": 0.0}
        self.attempt = last["attempt"] + 1
        self.devices, self.device_kind = jax.device_count(), jax.devices()[0].device_kind
        self.phases.reached = max(self.phases.reached, last_trained(folder), *(row["step"] for row in rows), 0)
        # A process that trains the same run again began before the last attempt ended: that time is booked already.
        overlap = max(0.0, last["end"] - self.phases.began)
        self._row_from = min(overlap, self.phases.totals()[0])
        self._booked: dict[str, float] = {INIT: self._row_from}
        self._zero = self.phases.began + (overlap - self._row_from)  # later than that only where the clock was set back
        try:
            self._file = os.open(folder / FILE, os.O_RDWR | os.O_CREAT, 0o644)
            self._offset = os.lseek(self._file, 0, os.SEEK_END)
            if self._offset and os.pread(self._file, 1, self._offset - 1) != b"\n":
                self._offset += os.pwrite(self._file, b"\n", self._offset)  # half a row: keep it, start a new one
        except OSError as error:
            raise StorageError(f"{folder / FILE} could not be opened: {reason(error)}") from error
        self._written = 0  # bytes of the row under way
        self._keeper = threading.Thread(target=self._keep, name="ledger", daemon=True)
        self._keeper.start()

    def _keep(self) -> None:
        while True:
            self.book()
            if self._ending.wait(EVERY):
                return

    def book(self) -> None:
        """Write what has passed."""
        with self._lock, contextlib.suppress(OSError):
            passed, seconds = self.phases.totals()
            row = {
                "attempt": self.attempt,
                "start": self._zero + self._row_from,
                "end": self._zero + passed,
                "step": self.phases.reached,
                "devices": self.devices,
                "device_kind": self.device_kind,
                "seconds": {
                    k: s - self._booked.get(k, 0.0) for k, s in seconds.items() if s > self._booked.get(k, 0.0)
                },
            }
            line = json.dumps(row).ljust(self._written - 1) + "\n"  # as long as what it replaces, at least
            self._written = max(self._written, os.pwrite(self._file, line.encode(), self._offset))
            if passed - self._row_from > ROW_SECONDS:
                self._row_from, self._booked = passed, seconds
                self._offset, self._written = self._offset + self._written, 0

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._keeper is not None:
            self._ending.set()
            self._keeper.join()
            self.book()
            os.close(self._file)


def read_rows(folder: epath.Path | pathlib.Path) -> Iterator[dict]:
    """The rows of a run, none if it has no ledger; half a row, which a kill can leave, is skipped."""
    if (folder / FILE).exists():
        with (folder / FILE).open() as lines:
            for line in lines:
                with contextlib.suppress(json.JSONDecodeError):
                    yield json.loads(line)


def last_trained(folder: pathlib.Path) -> int:
    """The last step in metrics.jsonl, which has every one, while the ledger can lack the last second's; 0 for none."""
    found = 0
    with contextlib.suppress(FileNotFoundError), open(folder / "metrics.jsonl", "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
        for line in file.read().split(b"\n"):
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if record["kind"] == "train":
                    found = max(found, record["step"])
    return found


@dataclass(frozen=True)
class Goodput:
    """Seconds of a run by cause; they add up to `end` - `start`."""

    seconds: dict[str, float]
    start: float  # Unix times
    end: float
    attempts: int
    step: int  # the last one trained
    devices: int
    device_kind: str


def goodput(rows: list[dict]) -> Goodput:
    """Of at least one row, in the file's order."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for before, row in zip([None, *rows], rows, strict=False):
        if before is not None:
            seconds[IDLE] += row["start"] - before["end"]  # nothing between the rows of one attempt
        for cause, spent in row["seconds"].items():
            seconds[cause] += spent
    last = rows[-1]
    return Goodput(
        {cause: s for cause, s in sorted(seconds.items(), key=lambda item: -item[1]) if s > 0},
        rows[0]["start"],
        last["end"],
        len({row["attempt"] for row in rows}),
        max(row["step"] for row in rows),
        last["devices"],
        last["device_kind"],
    )
