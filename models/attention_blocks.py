"""Attention in blocks of queries, in plain XLA: memory is a block's queries times the keys they may see.

Shapes, of one device's arrays: B batch, T queries, S keys, of which the last T are the queries' own, N = K G query heads,
K key-value heads, H head features; C blocks of Q queries.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from models.blocks import MASKED, einsum_float32

QUERIES = 64  # of a block: on a CPU its scores then stay in the cache, which a larger block pays for up to threefold


def reach(left: int) -> int:
    """How many earlier keys a block of queries is given: `left`, rounded up to whole rows of TPU memory."""
    return max(8, -(-left // 8) * 8)


@dataclass(frozen=True)
class Tiling:
    """Which keys the blocks see. Block i has queries i * size on and sees `span` keys, from key i * step on."""

    count: int  # blocks C
    size: int  # queries of a block Q
    span: int
    step: int
    first: int  # place of block 0's first query among the keys it sees
    pad: tuple[int, int]  # keys to be added before and after those there are

    @classmethod
    def of(cls, length: int, keys: int, left: int | None) -> "Tiling":
        before = keys - length
        size = min(QUERIES, length)
        count = -(-length // size)
        if left is None or count == 1 or size + reach(left) >= keys:
            return cls(count, size, keys, 0, before, (0, 0))
        pad = (reach(left) - before, count * size - length)
        return cls(count, size, reach(left) + size, size, reach(left), pad)

    def blocks(self, x: jax.Array) -> jax.Array:
        """(B T ...) -> (C B Q ...)"""
        x = self.padded(x, (0, self.count * self.size - x.shape[1]))
        return jnp.moveaxis(x.reshape(x.shape[0], self.count, self.size, *x.shape[2:]), 1, 0)

    def joined(self, x: jax.Array, length: int) -> jax.Array:
        """(C B Q ...) -> (B T ...)"""
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]

    def padded(self, x: jax.Array, pad: tuple[int, int] | None = None, value: int = 0) -> jax.Array:
        widths = ((0, 0), pad or self.pad) + ((0, 0),) * (x.ndim - 2)
        return jnp.pad(x, widths, constant_values=value)

    def seen(self, x: jax.Array, i: jax.Array) -> jax.Array:
        """Of padded keys (B .. ...) those that block i sees (B span ...)."""
        return lax.dynamic_slice_in_dim(x, i * self.step, self.span, axis=1)

    def mask(self, i: jax.Array, queries: jax.Array, keys: jax.Array, left: int | None) -> jax.Array:
        """(B Q span): which keys a query sees, from the documents of the block's queries and keys."""
        start = self.first + i * (self.size - self.step)
        distance = start + jnp.arange(self.size)[:, None] - jnp.arange(self.span)[None, :]
        near = (distance >= 0) if left is None else (distance >= 0) & (distance <= left)
        return (queries[:, :, None] == keys[:, None, :]) & near[None]


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, documents: jax.Array, *, left: int | None, soft_cap: float
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention (B T N H) and the log of each softmax's denominator (B N T) in float32.

    q (B T N H), k and v (B S K H), documents (B S): equal numbers see each other, no later key and none more than `left`
    before. No query's own document may be -1.
    """
    (batch, length, heads, _), kv_heads = q.shape, k.shape[2]
    tiling = Tiling.of(length, k.shape[1], left)
    keys, values, of_keys = tiling.padded(k), tiling.padded(v), tiling.padded(documents, value=-1)

    def block(_, xs):
        i, q, of_queries = xs
        mask = tiling.mask(i, of_queries, tiling.seen(of_keys, i), left)
        scores, _ = _scores(q, tiling.seen(keys, i), mask, soft_cap)
        largest = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        out = _product("bkgts,bskh->btkgh", (weights / total).astype(v.dtype), tiling.seen(values, i))
        return None, (out.astype(q.dtype), (largest + jnp.log(total))[..., 0])

    _, (out, normaliser) = _scan(block, None, tiling, _grouped(q, kv_heads), documents[:, -length:])
    normaliser = jnp.moveaxis(normaliser.reshape(-1, batch, heads, tiling.size), 0, 2)  # (B N C Q)
    return tiling.joined(out, length).reshape(q.shape), normaliser.reshape(batch, heads, -1)[:, :, :length]


def backward(q, k, v, documents, out, normaliser, dout, *, left: int | None, soft_cap: float):
    """Gradients with respect to q, k and v; weights are computed again from the normaliser (FlashAttention, section 3.1)."""
    length, kv_heads = q.shape[1], k.shape[2]
    tiling = Tiling.of(length, k.shape[1], left)
    keys, values, of_keys = tiling.padded(k), tiling.padded(v), tiling.padded(documents, value=-1)
    along = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1)  # (B T N): sum of weights * dweights

    def block(sums, xs):
        i, q, of_queries, dout, along, normaliser = xs
        mask = tiling.mask(i, of_queries, tiling.seen(of_keys, i), left)
        k, v = tiling.seen(keys, i), tiling.seen(values, i)
        scores, slope = _scores(q, k, mask, soft_cap)
        weights = jnp.exp(scores - _rows(normaliser))
        dscores = weights * (_product("btkgh,bskh->bkgts", dout, v) - _rows(along)) * slope
        dscores = dscores.astype(q.dtype)
        dq = _product("bkgts,bskh->btkgh", dscores, k).astype(q.dtype)
        found = (
            _product("bkgts,btkgh->bskh", dscores, q),
            _product("bkgts,btkgh->bskh", weights.astype(dout.dtype), dout),
        )
        return tuple(
            lax.dynamic_update_slice_in_dim(total, tiling.seen(total, i) + part, i * tiling.step, axis=1)
            for total, part in zip(sums, found, strict=True)
        ), dq

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (keys, values))
    q_, dout, along, normaliser = (_grouped(x, kv_heads) for x in (q, dout, along, jnp.moveaxis(normaliser, 1, 2)))
    sums, dq = _scan(block, zeros, tiling, q_, documents[:, -length:], dout, along, normaliser)
    start = tiling.pad[0]
    dk, dv = (total[:, start : start + k.shape[1]].astype(x.dtype) for total, x in zip(sums, (k, v), strict=True))
    return tiling.joined(dq, length).reshape(q.shape), dk, dv


def _product(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    here = None  # one device's arrays are not divided
    return einsum_float32(equation, x, y, here)  # type: ignore[arg-type]


def _grouped(x: jax.Array, kv_heads: int) -> jax.Array:
    """(B T N ...) -> (B T K G ...)"""
    return x.reshape(*x.shape[:2], kv_heads, -1, *x.shape[3:])


def _rows(x: jax.Array) -> jax.Array:
    """A number for each of a block's queries and heads (B Q K G), as its scores are laid out (B K G Q 1)."""
    return jnp.moveaxis(x, 1, 3)[..., None]


def _scores(q: jax.Array, k: jax.Array, mask: jax.Array, soft_cap: float) -> tuple[jax.Array, jax.Array | float]:
    """Masked scores (B K G Q span) in float32, and their derivative with respect to those before the cap."""
    scores = _product("btkgh,bskh->bkgts", q, k)
    slope: jax.Array | float = 1.0
    if soft_cap:
        tanh = jnp.tanh(scores / soft_cap)
        scores, slope = soft_cap * tanh, 1 - tanh**2
    return jnp.where(mask[:, None, None], scores, MASKED), slope


def _scan(block, carry, tiling: Tiling, *arrays: jax.Array):
    """`block(carry, (i, arrays of block i))` over all blocks."""
    xs = (jnp.arange(tiling.count), *(tiling.blocks(x) for x in arrays))
    if tiling.count > 1:
        return lax.scan(block, carry, xs)
    carry, ys = block(carry, jax.tree.map(lambda x: x[0], xs))
    return carry, jax.tree.map(lambda y: y[None], ys)
