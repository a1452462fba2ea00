"""Batches of private training: units (images, documents, all images of a patient) drawn by Poisson sampling, each with K rows.

Every unit is in a batch with the same probability, independently of all others and of every other step: what the accountant
assumes. Which ones is a function of a secret and the step, so that a run that goes on draws the same.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.bad_records import FIELD
from data.dataset import Batch, DataError, Origin
from data.packing import Part, fill_rows, pieces_of
from data.poisson import drawn
from data.text import Rows

OVERFLOW = 1e-20  # at most, how likely a batch is larger than `most_units`; the guarantee's delta counts it


def most_units(expected: int, multiple: int = 1) -> int:
    """How many units a batch has room for: a multiple that Poisson sampling exceeds with a probability below OVERFLOW.

    Chernoff's bound for a sum of independent Bernoulli variables of mean B, P(X >= c) <= exp(c - B - c log(c / B)), which
    holds for any number of units: so the room follows from the config alone.
    """
    most = expected + 1
    while most - expected - most * math.log(most / expected) > math.log(OVERFLOW):
        most += 1
    return -(-most // multiple) * multiple


def spread(count: int) -> np.ndarray:
    """int64 [count]: an order of the places of a batch in which any first few are evenly over all of it: by their bits in
    reverse. So devices have equally many units, however many devices there are."""
    bits = max(1, (count - 1).bit_length())
    places = np.arange(2**bits)
    reverse = np.zeros_like(places)
    for bit in range(bits):
        reverse |= ((places >> bit) & 1) << (bits - 1 - bit)
    return reverse[reverse < count]


@dataclass(frozen=True)
class DrawnUnits:
    """A training split whose batches are drawn. Position p is row p % rows of step p // rows, as data.dataset counts."""

    examples: (
        Any  # with `views(numbers, draws)`: the rows of these examples, augmented as those numbers say, int64 each
    )
    starts: np.ndarray  # int64 [units + 1]: where the members of each unit begin
    members: np.ndarray  # int64 [examples]: numbers of the examples, unit by unit
    room: int  # units a batch
    rows: int  # of each unit, K
    rate: float
    secret: bytes
    repeat: bool  # where a unit has fewer members than rows: again from the first, or rows without weight

    def __len__(self) -> int:
        return len(self.starts) - 1

    def read(self, positions: np.ndarray) -> Batch:
        """Rows [b] by position, int64 [b]: fields of the source; rows of no unit are zeros, with weights of 0."""
        numbers = self.numbers(positions)
        places = np.flatnonzero(numbers >= 0)
        some = (
            places if len(places) else np.zeros(1, np.int64)
        )  # of an empty batch one row is read, for its shape alone
        found = self.examples.views(np.maximum(numbers[some], 0), self.draws(positions[some]))
        bad = found.pop(FIELD, None)
        batch = {} if bad is None or not len(places) else {FIELD: bad}
        for name, rows in found.items():
            batch[name] = np.zeros((len(positions), *rows.shape[1:]), rows.dtype)
            batch[name][places] = rows[: len(places)]
        return batch

    def numbers(self, positions: np.ndarray) -> np.ndarray:
        """int64 [b]: the example at each position, -1 for none."""
        steps, within = np.divmod(positions, self.room * self.rows)
        found = np.full(len(positions), -1, np.int64)
        for step in np.unique(steps):
            units = np.full(self.room, -1, np.int64)
            chosen = drawn(self.secret, int(step), len(self), self.rate)[: self.room]
            units[spread(self.room)[: len(chosen)]] = chosen
            here = np.flatnonzero(steps == step)
            slots, views = np.divmod(within[here], self.rows)
            for slot in np.unique(slots[units[slots] >= 0]):
                at = here[slots == slot]
                found[at] = self.of_unit(int(step), int(units[slot]))[views[slots == slot]]
        return found

    def draws(self, positions: np.ndarray) -> np.ndarray:
        """int64 [b], of the secret: a unit more moves others to other positions, and who knew how they are augmented there
        would see that it came."""
        digests = (
            hashlib.sha256(f"podwright views {position} ".encode() + self.secret).digest() for position in positions
        )
        return np.array([int.from_bytes(digest[:8], "little") >> 1 for digest in digests], np.int64)

    def of_unit(self, step: int, unit: int) -> np.ndarray:
        """int64 [K]: examples of a unit; some of them, drawn anew each step, where it has more."""
        own = self.members[self.starts[unit] : self.starts[unit + 1]]
        if len(own) > self.rows:
            digest = hashlib.sha256(f"podwright members {step} {unit}".encode() + self.secret).digest()
            rng = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
            return np.sort(rng.choice(own, self.rows, replace=False))
        if self.repeat:
            return np.resize(own, self.rows)
        return np.concatenate([own, np.full(self.rows - len(own), -1, np.int64)])

    def origins(self, positions: np.ndarray) -> list[list[Origin]]:
        raise DataError("which examples a private run drew is what it keeps secret")


@dataclass(frozen=True)
class Stretches:
    """Documents cut into rows of their own, none of which has two: T tokens each, the last one padded."""

    rows: Rows
    document: np.ndarray  # int64 [n], of each stretch
    first: np.ndarray  # int64 [n]: its first token in the document
    places: np.ndarray  # int64 [n]: tokens it has targets for

    def __len__(self) -> int:
        return len(self.document)

    def views(self, numbers: np.ndarray, draws: np.ndarray) -> Batch:
        """Rows [B] by number, with the fields of data.text.Rows; nothing is random."""
        parts = []
        for i in numbers:
            at = self.rows.starts[self.document[i]] + self.first[i]
            ids = self.rows.tokens[at : at + self.places[i] + 1].astype(np.int32)
            parts.append([Part(ids, int(self.first[i]))])
        return fill_rows(parts, self.rows.length, self.rows.token_bytes)


def stretches(rows: Rows) -> Stretches:
    lengths = np.diff(np.append(rows.starts, len(rows.tokens)))
    return Stretches(rows, *pieces_of(lengths, rows.length))


def by_unit(units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The unit of each example, int64 [n] -> starts and members of `DrawnUnits`. Units count from 0, by their numbers."""
    _, counts = np.unique(units, return_counts=True)
    return np.concatenate([[0], np.cumsum(counts)]), np.argsort(units, kind="stable")
