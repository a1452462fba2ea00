"""Several sources in fixed shares: which source and which of its rows stand at a position is known from the position alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.bad_records import FIELD, packed, taken_from
from data.dataset import Batch, Examples, Origin
from data.order import example_at

WINDOW = 10_000  # positions after which the pattern of sources repeats: shares are exact in each, to 1 / WINDOW


@dataclass(frozen=True)
class Stage:
    """From a position on: the pattern of sources, and how often each has been read before."""

    first: int  # position
    pattern: np.ndarray  # int64 [WINDOW]: the source at each place of a window
    rank: np.ndarray  # int64 [WINDOW]: how often it stood in the window before
    quotas: np.ndarray  # int64 [S]: how often in the whole window
    read: np.ndarray  # int64 [S]: rows read of each source before this stage

    def count(self, positions: int) -> np.ndarray:
        """int64 [S]: rows read of each source in the stage's first `positions`."""
        windows, rest = divmod(positions, WINDOW)
        return windows * self.quotas + np.bincount(self.pattern[:rest], minlength=len(self.quotas))


class Mixture:
    """Rows of several sources by their position in the endless stream. Each source goes through its own epochs, in an
    order of its own (`seeds`)."""

    def __init__(
        self, sources: Sequence[Examples], seeds: Sequence[int], stages: Sequence[tuple[int, Sequence[float]]]
    ) -> None:
        """stages: (first position, shares) in order; the first begins at 0. Shares are positive or 0, not all 0."""
        self.sources, self.seeds = sources, seeds
        self.stages: list[Stage] = []
        read = np.zeros(len(sources), np.int64)
        for first, shares in stages:
            if self.stages:
                before = self.stages[-1]
                read = before.read + before.count(first - before.first)
            quotas = quotas_of(shares)
            pattern = spread(quotas)
            rank = np.empty(WINDOW, np.int64)
            for source in range(len(sources)):
                rank[pattern == source] = np.arange(quotas[source])
            self.stages.append(Stage(first, pattern, rank, quotas, read))

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def place(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source, and how many of its rows came before, of each position, int64 [n] each."""
        source, before = np.empty_like(positions), np.empty_like(positions)
        numbers = np.searchsorted([stage.first for stage in self.stages], positions, side="right") - 1
        for number in np.unique(numbers):
            here, stage = numbers == number, self.stages[number]
            window, place = np.divmod(positions[here] - stage.first, WINDOW)
            chosen = stage.pattern[place]
            source[here] = chosen
            before[here] = stage.read[chosen] + window * stage.quotas[chosen] + stage.rank[place]
        return source, before

    def examples(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source and row in it of each position, int64 [n] each."""
        source, before = self.place(positions)
        row = np.empty_like(before)
        for number in np.unique(source):
            here = source == number
            row[here] = example_at(before[here], len(self.sources[number]), self.seeds[number])
        return source, row

    def read(self, positions: np.ndarray) -> Batch:
        """Rows [B] by position, int64 [B]. Fields as of the sources."""
        source, row = self.examples(positions)
        if len(source) and (source == source[0]).all():
            return self.sources[source[0]].read(row)
        batch: Batch = {}
        for number in np.unique(source):
            here = source == number
            scatter(batch, here, self.sources[number].read(row[here]))
        return batch

    def origins(self, positions: np.ndarray) -> list[list[Origin]]:
        return [self.sources[s].origins(np.array([row]))[0] for s, row in zip(*self.examples(positions), strict=True)]

    def epochs(self, positions: int) -> np.ndarray:
        """float64 [S]: how often each source has been gone through after so many positions."""
        stage = next(stage for stage in reversed(self.stages) if stage.first <= positions)
        read = stage.read + stage.count(positions - stage.first)
        return read / np.array([max(len(source), 1) for source in self.sources])


class InOrder:
    """Sources one example after another, each spread evenly over the whole: any beginning has all of them."""

    def __init__(self, sources: Sequence[Examples]) -> None:
        self.sources = sources
        numbers = np.concatenate([np.full(len(source), i) for i, source in enumerate(sources)])
        rows = np.concatenate([np.arange(len(source)) for source in sources])
        at = np.concatenate([(np.arange(len(source)) + 0.5) / max(len(source), 1) for source in sources])
        order = np.argsort(at, kind="stable")
        self.numbers, self.rows = numbers[order], rows[order]

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, indices: np.ndarray) -> Batch:
        batch: Batch = {}
        numbers, rows = self.numbers[indices], self.rows[indices]
        for number in np.unique(numbers):
            here = numbers == number
            scatter(batch, here, self.sources[number].read(rows[here]))
        return batch

    def origins(self, indices: np.ndarray) -> list[list[Origin]]:
        pairs = zip(self.numbers[indices], self.rows[indices], strict=True)
        return [self.sources[number].origins(np.array([row]))[0] for number, row in pairs]


def scatter(batch: Batch, here: np.ndarray, part: Batch) -> None:
    """Put the rows of `part` where `here`, bool [B], is true; bad records of both are those of the batch."""
    bad = taken_from(batch) + taken_from(part)
    for name, rows in part.items():
        batch.setdefault(name, np.empty((len(here), *rows.shape[1:]), rows.dtype))[here] = rows
    if bad:
        batch[FIELD] = packed(bad)


def quotas_of(shares: Sequence[float]) -> np.ndarray:
    """int64 [S]: positions of a window for each source, in proportion to its share by largest remainders; a source with
    any share has at least one."""
    exact = np.asarray(shares, np.float64) / sum(shares) * WINDOW
    quotas = np.floor(exact).astype(np.int64)
    quotas[(exact > 0) & (quotas == 0)] = 1
    order = np.argsort(quotas - exact, kind="stable")  # who is owed most
    missing = WINDOW - int(quotas.sum())
    if missing >= 0:
        quotas[order[:missing]] += 1
    else:
        quotas[np.argmax(quotas)] += missing
    return quotas


def spread(quotas: np.ndarray) -> np.ndarray:
    """int64 [sum of quotas]: an order of the sources in which after every place each stands as often as its share says, to
    less than one. R. Tijdeman, The chairman assignment problem, Discrete Mathematics 32 (1980)."""
    present = np.flatnonzero(quotas)
    total = int(quotas.sum())
    if len(present) == 1:
        return np.full(total, present[0])
    share = quotas[present] / total
    slack = 1 / (2 * len(present) - 2)
    counts = np.zeros(len(present), np.int64)
    order = np.empty(total, np.int64)
    for place in range(total):
        due = share * (place + 1) - counts >= slack - 1e-9
        deadline = np.where(due, (counts + 1 - slack) / share, np.inf)
        chosen = int(np.argmin(deadline))
        counts[chosen] += 1
        order[place] = present[chosen]
    return order
