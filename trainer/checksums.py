"""A checksum of an array that devices compute on the shards they hold, and that doesn't depend on how it is divided.

Each element's bits and its place are mixed to 32 bits (the finalizer of MurmurHash3), and the results are summed modulo
2^32. Any one changed element changes the sum; several changes cancel with a chance of 2^-32. It finds damage, not fraud.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.convert.tensors import Tensor
from models.params import named_leaves
from sharding import hosts
from trainer.offload import HOST

BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32}  # by bytes of an element
PLACE, FIRST, SECOND = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35
PIECE = 1 << 16  # elements that a host looks at together: its caches hold them


@dataclass(frozen=True)
class Fingerprint:
    checksum: int
    finite: bool  # every element is


def fingerprints(tree: Any) -> dict[str, Fingerprint]:
    """Of every array of a state by its name on disk; waits for the arrays. The same on every host."""
    leaves = named_leaves(tree)
    # XLA:CPU would write what it adds up into memory, as much as all arrays have, and compile for seconds.
    return (on_host if jax.default_backend() == "cpu" else on_devices)(leaves)


def on_devices(leaves: Mapping[str, jax.Array]) -> dict[str, Fingerprint]:
    # What is kept in the host's memory visits the devices one array after the other: together it may not fit there.
    here = {name: leaf for name, leaf in leaves.items() if leaf.sharding.memory_kind != HOST}
    found = jax.device_get(_of_all(here))
    found |= {name: jax.device_get(_of_one(leaf)) for name, leaf in leaves.items() if name not in here}
    return {name: Fingerprint(int(total), bool(whole)) for name, (total, whole) in found.items()}


def on_host(leaves: Mapping[str, jax.Array]) -> dict[str, Fingerprint]:
    """Each host adds up the shards that it holds, of copies the first."""
    own = []
    for leaf in leaves.values():
        shards = [shard for shard in leaf.addressable_shards if shard.replica_id == 0]
        own.append(together(of_part(jax.device_get(it.data), starts(it.index), leaf.shape) for it in shards))
    sums = hosts.gathered(np.array([[it.checksum, it.finite] for it in own], np.uint32)).astype(np.uint64)
    return {
        name: Fingerprint(int(sums[:, i, 0].sum() % 2**32), bool(sums[:, i, 1].all())) for i, name in enumerate(leaves)
    }


def starts(index: tuple[slice, ...]) -> tuple[int, ...]:
    return tuple(part.start or 0 for part in index)


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


def of_part(part: np.ndarray, start: tuple[int, ...], shape: tuple[int, ...]) -> Fingerprint:
    """The same on a host, of a part of an array of `shape` that begins at `start` in it."""
    part = part.reshape(part.shape or (1,))
    start, shape = start or (0,), shape or (1,)
    # The place of an element is the sum over its axes of these.
    places = [
        ((start[axis] + np.arange(part.shape[axis], dtype=np.uint64)) * math.prod(shape[axis + 1 :])).astype(np.uint32)
        for axis in range(len(shape))
    ]
    inner = np.zeros((), np.uint32)
    for place in places[1:]:
        inner = np.add.outer(inner, place)
    total, whole, rows = 0, True, max(1, PIECE // max(1, inner.size))
    for first in range(0, len(part), rows):
        piece = part[first : first + rows]
        place = np.add.outer(places[0][first : first + rows], inner)
        bits = np.ascontiguousarray(piece).view(BITS[part.dtype.itemsize]).astype(np.uint32)
        total += int(mixed(bits, place).sum(dtype=np.uint64))
        whole = whole and finite(piece)
    return Fingerprint(total % 2**32, whole)


def fingerprint_of(tensor: Tensor) -> Fingerprint:
    """Of an array that is read a piece at a time."""
    seen: dict[int, Fingerprint] = {}
    for _ in observed(tensor, seen).pieces():
        pass
    return together(seen.values())


def observed(tensor: Tensor, seen: dict[int, Fingerprint]) -> Tensor:
    """The same tensor; `seen` gets the fingerprint of every piece that is read of it, by its first row."""

    def read(first: int, end: int) -> np.ndarray:
        piece = tensor.read(first, end)
        seen[first] = of_part(piece, (first, *[0] * (len(tensor.shape) - 1)), tensor.shape)
        return piece

    return Tensor(tensor.shape, tensor.dtype, read)


def together(parts: Iterable[Fingerprint]) -> Fingerprint:
    """Of an array, from those of its parts."""
    found = list(parts)
    return Fingerprint(sum(it.checksum for it in found) % 2**32, all(it.finite for it in found))


def finite(array: np.ndarray) -> bool:
    return bool(np.isfinite(array if array.dtype.kind in "fiub" else array.astype(np.float32)).all())
