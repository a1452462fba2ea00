"""Records that could not be used: what they say of themselves travels with the batch in which something else stands for them."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.errors import DataError
from data.order import permuted

ATTEMPTS = 20  # records that are tried in place of a bad one
SUBSTITUTES = 0x5AB5  # seed of the order in which they are tried
FIELD = "bad_records"  # of a batch as a source reads it; taken out before the batch goes to devices


@dataclass(frozen=True)
class BadRecord:
    source: str  # a file
    place: int  # in it: a record, a row or a byte
    reason: str  # in a few words, the same for all of a kind


def packed(found: list[BadRecord]) -> np.ndarray:
    """As an array, uint8 [n], which passes between processes like the rest of a batch."""
    return np.frombuffer(json.dumps([dataclasses.astuple(one) for one in found]).encode(), np.uint8)


def taken_from(batch: dict[str, np.ndarray]) -> list[BadRecord]:
    """Removes the field from a batch and returns what it held."""
    return [BadRecord(*one) for one in json.loads(batch.pop(FIELD).tobytes())] if FIELD in batch else []


def records_in(batch: dict[str, np.ndarray]) -> int:
    """How many records its rows are made of: of mixed images, two each."""
    rows = len(next(iter(batch.values())))
    return 2 * rows if "labels_b" in batch else rows


def substituted(
    read: Callable[[np.ndarray], Sequence[Any]], indices: np.ndarray, count: int
) -> tuple[list[Any], list[BadRecord]]:
    """What `read` gives for the indices, int64 [n] below `count`, in a list; another index stands for each that it gives a
    BadRecord for. Which one depends on the bad index alone. Also returns the bad records.

    Raises DataError if there is no end of them.
    """
    indices = indices.copy()
    found: list[BadRecord] = []
    items = list(read(indices))
    for attempt in range(ATTEMPTS):
        bad = [i for i, item in enumerate(items) if isinstance(item, BadRecord)]
        if not bad:
            return items, found
        found += [items[i] for i in bad]
        indices[bad] = permuted(indices[bad], count, SUBSTITUTES, attempt)
        for i, item in zip(bad, read(indices[bad]), strict=True):
            items[i] = item
    last = found[-1]
    raise DataError(
        f"{ATTEMPTS} records one after the other are bad, the last {last.source} at {last.place} ({last.reason}): no other can "
        f"stand for them"
    )


def with_bad(batch: dict[str, np.ndarray], bad: list[BadRecord]) -> dict[str, np.ndarray]:
    return {**batch, FIELD: packed(bad)} if bad else batch
