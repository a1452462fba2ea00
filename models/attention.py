"""Causal self-attention for training: over a document's whole past or a window of it, on any mesh.

Two implementations, chosen by the platform that a program is lowered for: "tpu" (JAX's Pallas splash attention,
models/kernels/splash_tpu.py) and "xla" (models/attention_blocks.py). Neither builds the square of a long sequence, and
both keep for the gradient, besides their inputs, the result and one number a query and head.

Shapes: B batch, T tokens, N query heads, K key-value heads, H head features; on one device, S keys: its own T and those
before them.
"""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec, reshard

from models import attention_blocks
from models.kernels import splash_tpu
from models.remat import named
from models.sequence import Axis, first_index, left_halo, through_here

Implementation = Literal["tpu", "xla"]


def self_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_pos: jax.Array,
    left: int | None = None,
    soft_cap: float = 0.0,
    *,
    blocks: tuple[int, ...] = (0,),
    implementation: Implementation | None = None,
) -> jax.Array:
    """Softmax attention (B T N H) of q (B T N H), already scaled, to k and v (B T K H). Softmax in float32.

    A query sees the keys of its document up to its own, at most `left` of them before its own if that is given. Where
    segment_pos (B T) is 0 a document starts; padding (-1) belongs to the document before it. Query heads are contiguous
    per key-value head: heads 0..N/K-1 read key-value head 0. `soft_cap` c, if not 0, makes scores c * tanh(scores / c).
    `blocks` are the TPU kernel's, see `splash_tpu.block_sizes`.

    Every device has its own sequences and query heads, and of the key-value heads those that they read. Devices that
    share a sequence fetch the keys and values before their own: `left` of them, or all.
    """
    queries = jax.typeof(q).sharding.spec
    keys, rows = PartitionSpec(queries[0], queries[1], None, None), PartitionSpec(*queries[:2])
    attend = functools.partial(
        _on_one_device,
        num_heads=q.shape[2],
        heads=queries[2],
        axis=queries[1],
        left=None if left is None or left >= q.shape[1] - 1 else left,  # a window that never hides a key is none
        static=(float(soft_cap), blocks, implementation),
    )
    mapped = jax.shard_map(
        attend,
        in_specs=(queries, keys, keys, rows),
        out_specs=queries,
        check_vma=False,  # Pallas kernels do not say over which mesh axes their results vary
    )
    return mapped(q, reshard(k, keys), reshard(v, keys), reshard(segment_pos, rows))


def _on_one_device(q, k, v, segment_pos, *, num_heads: int, heads: Axis, axis: Axis, left: int | None, static: tuple):
    k, v = (heads_read(x, q.shape[2], num_heads, heads) for x in (k, v))
    length = q.shape[1]
    if axis is not None:
        if left is None:
            k, v, segment_pos = (through_here(x, axis) for x in (k, v, segment_pos))
        else:
            reach = min(attention_blocks.reach(left), (lax.axis_size(axis) - 1) * length)
            k, v, segment_pos = (jnp.concatenate([left_halo(x, reach, axis), x], axis=1) for x in (k, v, segment_pos))
    total = segment_pos.shape[1]
    # Only equality counts, so documents may be numbered from this device's first key on. There is none before the sequence.
    index = first_index(length, axis) - (total - length) + jnp.arange(total)
    documents = jnp.where(index[None] >= 0, jnp.cumsum(segment_pos == 0, axis=1), -1)
    return _attend(left, *static, q, k, v, documents)[0]


def heads_read(x: jax.Array, own: int, num_heads: int, axis: Axis) -> jax.Array:
    """Of all key-value heads of x (B T K H), those that this device's `own` of `num_heads` query heads read, in order."""
    if axis is None:
        return x
    group = num_heads // x.shape[2]
    together = math.gcd(own, group)  # query heads that surely read the same
    first, count = lax.axis_index(axis) * own, own // together
    if count == 1 or together == group:  # consecutive ones
        return lax.dynamic_slice_in_dim(x, first // group, count, axis=2)
    return jnp.take(x, (first + jnp.arange(0, own, together)) // group, axis=2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _attend(left: int | None, soft_cap: float, blocks: tuple, implementation: Implementation | None, *arrays):
    """The result (B T N H) and log of the sum of exponentials (B N T), of one device's q, k, v (B S K H), documents (B S)."""
    if implementation == "tpu":
        return splash_tpu.forward(*arrays, left=left, soft_cap=soft_cap, blocks=blocks)
    if implementation == "xla":
        return attention_blocks.forward(*arrays, left=left, soft_cap=soft_cap)
    return _on_platform(functools.partial(_attend, left, soft_cap, blocks), *arrays)


def _attend_forward(left: int | None, soft_cap: float, blocks: tuple, implementation: Implementation | None, *arrays):
    # Called as a whole, it is one operation to a rematerialisation policy, which would otherwise save the products inside.
    out, normaliser = (named(x, "context") for x in _attend(left, soft_cap, blocks, implementation, *arrays))
    return (out, normaliser), (*arrays, out, normaliser)


def _attend_backward(left: int | None, soft_cap: float, blocks: tuple, implementation, residuals, cotangents):
    def gradients(implementation: Implementation, *arrays):
        if implementation == "tpu":
            return splash_tpu.backward(*arrays, left=left, soft_cap=soft_cap, blocks=blocks)
        return attention_blocks.backward(*arrays, left=left, soft_cap=soft_cap)

    arrays = (*residuals, cotangents[0])
    found = gradients(implementation, *arrays) if implementation else _on_platform(gradients, *arrays)
    return *found, None


_attend.defvjp(_attend_forward, _attend_backward)


def _on_platform(function, *arrays: jax.Array):
    """`function(implementation, *arrays)` of the platform that the program is lowered for, which need not be this host."""
    return lax.platform_dependent(
        *arrays, tpu=functools.partial(function, "tpu"), default=functools.partial(function, "xla")
    )
