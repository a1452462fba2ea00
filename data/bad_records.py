"""Records that could not be used: what they say of themselves travels with the batch in which something else stands for them."""

import dataclasses
import json
from dataclasses import dataclass

import numpy as np

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
