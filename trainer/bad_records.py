"""What a run could not use of its data: counted, listed in bad_records.jsonl, and too much of it ends the run."""

import json
import pathlib
from collections import Counter
from collections.abc import Callable

import numpy as np

from data.bad_records import records_in, taken_from
from data.dataset import DataError

FEWEST = 1000  # records that are read before the share of bad ones says anything


class BadRecords:
    """Reads what batches say of records that something else stands for, or, in a private run, nothing. Of several hosts each
    counts its own; those that don't own the run's folder print theirs."""

    def __init__(
        self, folder: pathlib.Path | None, limit: float, say: Callable[[str], None], substitute: str = "another record"
    ) -> None:
        self.file = folder / "bad_records.jsonl" if folder else None
        self.limit, self.say, self.substitute = limit, say, substitute
        self.read = 0
        self.kinds: Counter[str] = Counter()

    def take(self, step: int, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The batch without that field. Raises DataError above `limit`, the share of all records read so far."""
        found = taken_from(batch)
        self.read += records_in(batch) + len(found)
        for record in found:
            line = json.dumps({"step": step, "source": record.source, "place": record.place, "reason": record.reason})
            if self.file is None:
                print(f"bad record: {line}", flush=True)
                continue
            with open(self.file, "a") as lines:
                lines.write(line + "\n")
            if record.reason not in self.kinds:
                where = f"{record.source} at {record.place}"
                self.say(f"step {step}: {where} is {record.reason}; {self.substitute} stands for it")
        self.kinds.update(record.reason for record in found)
        bad = self.kinds.total()
        if bad > self.limit * max(self.read, FEWEST):
            raise DataError(
                f"{bad:,} of {self.read:,} records read were unusable ({self.counts()}), more than data.max_bad={self.limit:g} "
                f"allows{f': {self.file} lists them' if self.file else ''}"
            )
        return batch

    def counts(self) -> str:
        return ", ".join(f"{number:,} {reason}" for reason, number in self.kinds.most_common())
