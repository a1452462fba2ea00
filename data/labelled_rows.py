"""What the sources of labelled sequences give: rows by number, before they are a batch."""

from typing import NamedTuple, Protocol

import numpy as np

from data.dataset import Origin


class Rows(NamedTuple):
    symbols: np.ndarray  # uint8 or uint16 [n, T]; of coloured pixels [n, T, 3]
    lengths: np.ndarray  # int64 [n], from 1: what follows is padding
    labels: np.ndarray  # int64 [n], from 0


class Source(Protocol):
    def __len__(self) -> int: ...

    def rows(self, indices: np.ndarray) -> Rows:
        """int64 [n] in [0, len)."""
        ...

    def origins(self, indices: np.ndarray) -> list[list[Origin]]: ...
