"""A checksum of an array that devices compute on the shards they hold, and that doesn't depend on how it is divided.

Each element's bits and its place are mixed to 32 bits (the finalizer of MurmurHash3), and the results are summed modulo
2^32. Any one changed element changes the sum; several changes cancel with a chance of 2^-32. It finds damage, not fraud.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.convert.tensors import Tensor
from models.params import named_leaves
from trainer.offload import HOST

BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32}  # by bytes of an element
PLACE, FIRST, SECOND = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35
PIECE = 1 << 20  # elements that a host looks at together


@dataclass(frozen=True)
class Fingerprint:
    checksum: int
    finite: bool  # every element is


def fingerprints(tree: Any) -> dict[str, Fingerprint]:
    """Of every array of a state by its name on disk. The devices compute them; waits for the results."""
    leaves = named_leaves(tree)
    # What is kept in the host's memory visits the devices an array at a time: together it may not fit there.
    away = [name for name, leaf in leaves.items() if leaf.sharding.memory_kind == HOST]
    found = {name: _of_one(leaves.pop(name)) for name in away} | _of_all(leaves)
    return {
        name: Fingerprint(int(checksum), bool(finite)) for name, (checksum, finite) in jax.device_get(found).items()
    }


@jax.jit
def _of_all(leaves: Mapping[str, jax.Array]) -> dict[str, tuple[jax.Array, jax.Array]]:
    return {name: (checksum(leaf), jnp.all(jnp.isfinite(leaf))) for name, leaf in leaves.items()}


@jax.jit
def _of_one(leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
    here = jax.device_put(leaf, jax.memory.Space.Device)
    return checksum(here), jnp.all(jnp.isfinite(here))


def checksum(array: jax.Array) -> jax.Array:
    """Any shape, elements of at most four bytes -> () uint32. Inside a program."""
    if array.dtype == jnp.bool_:
        bits = array.astype(jnp.uint32)
    else:
        bits = jax.lax.bitcast_convert_type(array, BITS[array.dtype.itemsize]).astype(jnp.uint32)
    place = jnp.zeros(array.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(array.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= array.shape[axis]
    return jnp.sum(mixed(bits, place), dtype=jnp.uint32)


def mixed(bits: Any, place: Any) -> Any:
    """uint32 arrays of one shape, of jax or numpy -> the same."""
    value = bits ^ (place * np.uint32(PLACE))
    for multiplier, shift in ((FIRST, 16), (SECOND, 13)):
        value = (value ^ (value >> np.uint32(shift))) * np.uint32(multiplier)
    return value ^ (value >> np.uint32(16))


def checksum_of(array: np.ndarray, first: int = 0) -> int:
    """The same on a host, without devices; of a part of an array whose elements start at place `first` of the whole."""
    flat = np.ascontiguousarray(array).reshape(-1).view(BITS[array.dtype.itemsize])
    total = 0
    for start in range(0, flat.size, PIECE):
        bits = flat[start : start + PIECE].astype(np.uint32)
        place = np.arange(first + start, first + start + bits.size, dtype=np.uint64).astype(np.uint32)
        total += int(mixed(bits, place).sum(dtype=np.uint64))
    return total % 2**32


def fingerprint_of(tensor: Tensor) -> Fingerprint:
    """Of an array that is read a piece at a time."""
    seen: dict[int, Fingerprint] = {}
    for _ in observed(tensor, seen).pieces():
        pass
    return together(seen.values())


def observed(tensor: Tensor, seen: dict[int, Fingerprint]) -> Tensor:
    """The same tensor; `seen` gets the fingerprint of every piece that is read of it, by its first row."""
    row = int(np.prod(tensor.shape[1:], dtype=np.int64))

    def read(first: int, end: int) -> np.ndarray:
        piece = tensor.read(first, end)
        seen[first] = Fingerprint(checksum_of(piece, first * row), finite(piece))
        return piece

    return Tensor(tensor.shape, tensor.dtype, read)


def together(pieces: Iterable[Fingerprint]) -> Fingerprint:
    """Of an array, from those of its pieces."""
    found = list(pieces)
    return Fingerprint(sum(it.checksum for it in found) % 2**32, all(it.finite for it in found))


def finite(array: np.ndarray) -> bool:
    return bool(np.isfinite(array.astype(np.float32)).all())
