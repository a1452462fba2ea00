"""What the sources of labelled sequences give: rows by number, before they are a batch."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from configs.long_range_data import LongRangeData
from data.dataset import Origin


class Rows(NamedTuple):
    symbols: np.ndarray  # uint8 or uint16 [n, T]; of coloured pixels [n, T, 3]
    lengths: np.ndarray  # int64 [n], from 1: what follows is padding; of pairs [n, 2], of each half of a row
    labels: np.ndarray  # int64 [n], from 0


class Source(Protocol):
    def __len__(self) -> int: ...

    def rows(self, indices: np.ndarray) -> Rows:
        """int64 [n] in [0, len)."""
        ...

    def origins(self, indices: np.ndarray) -> list[list[Origin]]: ...


def rows_of(texts: Sequence[Sequence[np.ndarray]], labels: np.ndarray, config: LongRangeData) -> Rows:
    """Rows of a text each, or of two: one after the other with a separator between them, or a half of the row each
    (data.inputs='pairs'). What a text has more than there is room for is cut off."""
    symbols, room = np.zeros((len(texts), config.sequence_length), np.uint16), config.text_length
    lengths: list[int | list[int]] = []
    for row, own in zip(symbols, texts, strict=True):
        parts = [text[:room] for text in own]
        if config.inputs == "pairs":
            for half, part in zip(row.reshape(2, room), parts, strict=True):
                half[: len(part)] = part
            lengths.append([len(part) for part in parts])
        else:
            whole = np.concatenate([symbol for part in parts for symbol in ([config.separator], part)][1:])
            row[: len(whole)] = whole
            lengths.append(len(whole))
    return Rows(symbols, np.array(lengths, np.int64), labels)
