"""Tensors that are read in pieces, and the one sentence about a set of them that isn't what a config needs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

PIECE = 2**27  # bytes of one piece, unless a single row is more


class ConversionError(RuntimeError):
    """A checkpoint that cannot be read or does not fit: one sentence for the user."""


@dataclass(frozen=True)
class Tensor:
    """Shape and dtype of an array, and how to read rows [first, end) of its leading axis (a scalar has one row)."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[int, int], np.ndarray]

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    def whole(self) -> np.ndarray:
        return self.read(0, self.rows)

    def rows_a_piece(self) -> int:
        row_bytes = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        return max(1, min(self.rows, PIECE // max(1, row_bytes)))

    def pieces(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """(first, end, rows [first, end)), to the last row."""
        step = self.rows_a_piece()
        for first in range(0, self.rows, step):
            end = min(first + step, self.rows)
            yield first, end, self.read(first, end)

    def cast(self, dtype: np.dtype) -> "Tensor":
        return Tensor(self.shape, np.dtype(dtype), lambda a, b: self.read(a, b).astype(dtype, copy=False))


def rows_of(array: np.ndarray, first: int, end: int) -> np.ndarray:
    return array[first:end] if array.shape else array


def in_memory(array: np.ndarray) -> Tensor:
    return Tensor(array.shape, array.dtype, lambda first, end: rows_of(array, first, end))


def resized(tensor: Tensor, rows: int) -> Tensor:
    """Its first `rows` rows, or all of them and then zeros."""
    if rows == tensor.rows:
        return tensor

    def read(first: int, end: int) -> np.ndarray:
        held = min(end, tensor.rows)
        parts = [tensor.read(first, held)] if first < held else []
        missing = end - max(first, held)
        return np.concatenate([*parts, np.zeros((missing, *tensor.shape[1:]), tensor.dtype)])

    return Tensor((rows, *tensor.shape[1:]), tensor.dtype, read)


def split(tensor: Tensor) -> list[Tensor]:
    """The entries of its leading axis, each a tensor that reads no other."""

    def entry(i: int) -> Tensor:
        return Tensor(tensor.shape[1:], tensor.dtype, lambda a, b: tensor.read(i, i + 1)[0][a:b])

    return [entry(i) for i in range(tensor.rows)]


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """The tensor of which `split` gives these."""
    first = tensors[0]
    return Tensor(
        (len(tensors), *first.shape), first.dtype, lambda a, b: np.stack([tensor.whole() for tensor in tensors[a:b]])
    )


def check_tensors(source: str, found: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ConversionError unless exactly the expected tensors are there."""
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    shaped = [
        f"{name} is {found[name].shape}, not {shape}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("mis-shaped", shaped))
    parts = [f"{len(names)} {kind} ({first_of(names)})" for kind, names in kinds if names]
    if parts:
        raise ConversionError(f"{source} does not hold the tensors of this model: {', '.join(parts)}")


def first_of(names: list[str], number: int = 3) -> str:
    return "; ".join(names[:number]) + ("; ..." if len(names) > number else "")
