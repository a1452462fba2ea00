"""Attention over a window, in blocks: memory is tokens times twice the window, never the square of the tokens.

Shapes: B batch, T tokens, N query heads, K key-value heads, H head features; on one device, C blocks of S queries.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec, reshard

from models.blocks import MASKED, attention, attention_mask
from models.sequence import Axis, first_index, left_halo


def local_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_pos: jax.Array, left: int, soft_cap: float = 0.0
) -> jax.Array:
    """Softmax attention (B T N H) of q (B T N H, scaled) to k and v (B T K H): `attention` with the mask that
    `attention_mask(segment_pos, left)` gives, a query's own key and at most `left` earlier ones of its document.

    Devices that share a sequence fetch the `left` keys and values before their own from their neighbours.
    """
    queries = jax.typeof(q).sharding.spec
    axis = queries[1]
    if axis is None and q.shape[1] <= 2 * _reach(left):  # the blocks would be no smaller than the square
        return attention(q, k, v, attention_mask(segment_pos, left), soft_cap)
    keys = jax.typeof(k).sharding.spec
    if k.shape[2] > 1:  # a device's query heads need not be those of its key-value heads
        keys = queries
        k, v = (reshard(jnp.repeat(t, q.shape[2] // k.shape[2], axis=2), keys) for t in (k, v))
    blocked = jax.shard_map(
        functools.partial(_blocked, left=left, soft_cap=soft_cap, axis=axis),
        in_specs=(queries, keys, keys, PartitionSpec(*queries[:2])),
        out_specs=queries,
    )
    return blocked(q, k, v, segment_pos)


def _reach(left: int) -> int:
    """How many earlier keys a block of queries is given: `left`, rounded up to whole rows of TPU memory."""
    return max(8, -(-left // 8) * 8)


def _blocked(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_pos: jax.Array, *, left: int, soft_cap: float, axis: Axis
) -> jax.Array:
    """Blocks of as many queries as they reach back, each against the block of keys before it and its own."""
    batch, length, reach = *q.shape[:2], _reach(left)
    k, v, segment_pos = (jnp.concatenate([left_halo(t, reach, axis), t], axis=1) for t in (k, v, segment_pos))
    index = first_index(length, axis) - reach + jnp.arange(reach + length)
    # Only equality counts, so documents may be numbered from this device's first key on. There is none before the sequence.
    documents = jnp.where(index[None] >= 0, jnp.cumsum(segment_pos == 0, axis=1), -1)

    size = min(reach, length)
    blocks = -(-length // size)
    # Whole blocks: the added queries are cut off again, the added keys come too late for the others.
    missing = blocks * size - length

    def padded(x):
        return jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2))

    def split(x):  # (B T ...) -> (B C S ...)
        return padded(x).reshape(batch, blocks, size, *x.shape[2:])

    def seen(x):  # (B reach+T ...) -> (B C reach+S ...)
        if blocks == 1:
            return x[:, None]
        x = padded(x).reshape(batch, blocks + 1, size, *x.shape[2:])
        return jnp.concatenate([x[:, :-1], x[:, 1:]], axis=2)

    distance = reach + jnp.arange(size)[:, None] - jnp.arange(reach + size)[None, :]
    near = (distance >= 0) & (distance <= left)
    mask = (split(documents[:, reach:])[..., :, None] == seen(documents)[..., None, :]) & near[None, None]
    grouped = split(q.reshape(batch, length, k.shape[2], -1, q.shape[3]))  # (B C S K N/K H)
    scores = jnp.einsum("bctkgh,bcskh->bckgts", grouped, seen(k)).astype(jnp.float32)
    if soft_cap:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    weights = jax.nn.softmax(jnp.where(mask[:, :, None, None], scores, MASKED), axis=-1).astype(v.dtype)
    out = jnp.einsum("bckgts,bcskh->bctkgh", weights, seen(v))
    return out.reshape(batch, blocks * size, *q.shape[2:])[:, :length]
