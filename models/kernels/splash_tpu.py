"""JAX's Pallas splash attention on one device's arrays, padded and laid out as its kernels need them.

Shapes: B batch, T queries, S keys, of which the last T are the queries' own, N query heads, K key-value heads, H features.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask

LANES, ROUND = 128, 512  # a block is whole lanes; long sequences are padded to what many blocks divide
# Blocks of queries and keys by the longest sequence they are for: of the forward pass (queries, keys, keys of a product),
# of dk and dv (the same three) and of dq (queries, keys). MaxText's published ones for Gemma on v6e: Gemma 2 at 8k tokens,
# with 1024 queries in place of 2048, for which v5e and v5p have too little of VMEM by default; Gemma 3 12B at 32k.
RECORDS = {
    8192: (1024, 512, 512, 1024, 512, 512, 1024, 512),
    None: (1024, 1024, 1024, 512, 2048, 512, 1024, 1024),
}


def block_sizes(blocks: tuple[int, ...], length: int, keys: int, dtype: jnp.dtype) -> splash.BlockSizes:
    """The kernels' blocks for padded numbers of queries and keys. `blocks` has one number, for all eight, or eight as in
    `RECORDS`; 0 takes the record, half of it in float32. Each is cut to the largest divisor, in whole lanes, of what it
    divides."""
    eight = tuple(blocks) * (8 if len(blocks) == 1 else 1)
    record = next(sizes for longest, sizes in RECORDS.items() if longest is None or keys <= longest)
    share = 2 / jnp.dtype(dtype).itemsize
    q, kv, kv_compute, q_dkv, kv_dkv, kv_dkv_compute, q_dq, kv_dq = (
        own or int(share * default) for own, default in zip(eight, record, strict=True)
    )
    kv, kv_dkv = divisor(keys, kv), divisor(keys, kv_dkv)
    return splash.BlockSizes(
        block_q=divisor(length, q),
        block_kv=kv,
        block_kv_compute=divisor(kv, kv_compute),
        block_q_dkv=divisor(length, q_dkv),
        block_kv_dkv=kv_dkv,
        block_kv_dkv_compute=divisor(kv_dkv, kv_dkv_compute),
        block_q_dq=divisor(length, q_dq),
        block_kv_dq=divisor(keys, kv_dq),
    )


def divisor(number: int, most: int) -> int:
    """The largest multiple of 128 that divides `number`, itself one, and is at most `most` (or 128)."""
    return next(d for d in range(max(LANES, min(number, most) // LANES * LANES), 0, -LANES) if number % d == 0)


class Window(splash_attention_mask.LocalMask):
    """A query sees its own key and at most `left` before it. Says in a moment what all of a block sees."""

    def __getitem__(self, idx) -> np.ndarray:
        """Only whether any and whether all of a block's pairs are seen: the kernels compute the mask itself."""
        queries, keys = idx
        left = self.shape[1] if self.window_size[0] is None else self.window_size[0]
        least = queries.start + self.offset - (keys.stop - 1)  # of a query's distance from a key before it
        most = queries.stop - 1 + self.offset - keys.start
        return np.array([[least >= 0 and most <= left, most >= 0 and least <= left]])


@functools.lru_cache
def window(length: int, keys: int, left: int | None) -> Window:
    return Window((length, keys), window_size=(left, 0), offset=keys - length)


@functools.lru_cache
def computed_pairs(length: int, keys: int, left: int | None, block_q: int, block_kv: int) -> int:
    """Queries times keys of the blocks of which anything is seen: a kernel computes these whole."""
    first_query = np.arange(0, length, block_q)[:, None] + keys - length
    first_key = np.arange(0, keys, block_kv)[None]
    least, most = first_query - (first_key + block_kv - 1), first_query + block_q - 1 - first_key
    return int(((most >= 0) & (least <= (keys if left is None else left))).sum()) * block_q * block_kv


class Call:
    """One layer's arrays and kernel. The kernel wants heads before tokens and whole blocks, so S - T and T are padded."""

    def __init__(self, q, k, documents, left: int | None, soft_cap: float, blocks: tuple[int, ...]):
        self.length, self.keys, self.heads = q.shape[1], k.shape[1], q.shape[2]
        self.before = up_to(self.keys - self.length, ROUND)
        self.padded = up_to(self.length, ROUND if self.length > ROUND else LANES)
        if self.before:  # both kinds of blocks are found in a multiple of 512
            self.padded = up_to(self.padded, ROUND)
        self.left, self.soft_cap = left, soft_cap
        self.blocks = block_sizes(blocks, self.padded, self.before + self.padded, q.dtype)
        after = self.padded - self.length
        # Added keys are of document -1, with the queries added behind them, which so see at least themselves.
        of_keys = jnp.pad(documents, ((0, 0), (self.before - self.keys + self.length, after)), constant_values=-1)
        self.documents = splash.SegmentIds(q=of_keys[:, self.before :], kv=of_keys)

    def kernel(self, save_residuals: bool = False):
        mask = window(self.padded, self.before + self.padded, self.left)
        kernel = splash.make_splash_mha(
            splash_attention_mask.MultiHeadMask([mask] * self.heads),
            block_sizes=self.blocks,
            head_shards=1,
            q_seq_shards=1,
            attn_logits_soft_cap=self.soft_cap or None,
            save_residuals=save_residuals,
        )
        pairs = [computed_pairs(self.padded, self.before + self.padded, self.left, *b) for b in self.passes()]
        # The kernels have no cost estimate: `podwright plan` reads their work off this name.
        name = "pairs_" + "_".join(map(str, pairs))

        def call(q, k, v):
            with jax.named_scope(name):
                return jax.vmap(kernel)(q, k, v, self.documents)

        return call

    def passes(self) -> list[tuple[int, int]]:
        """Queries and keys of a block: in the forward pass, in that for dk and dv, in that for dq."""
        b = self.blocks
        return [(b.block_q, b.block_kv), (b.block_q_dkv, b.block_kv_dkv), (b.block_q_dq, b.block_kv_dq)]  # type: ignore[list-item]

    def queries(self, x: jax.Array) -> jax.Array:
        """(B T N H) -> (B N padded T H)"""
        return pad_tokens(jnp.swapaxes(x, 1, 2), 0, self.padded - self.length)

    def of_keys(self, x: jax.Array) -> jax.Array:
        """(B S K H) -> (B K padded S H)"""
        before = self.before - (self.keys - self.length)
        return pad_tokens(jnp.swapaxes(x, 1, 2), before, self.padded - self.length)

    def back(self, x: jax.Array, count: int) -> jax.Array:
        """(B . padded H) -> (B count . H): of queries or keys the last `count` that were not added behind."""
        stop = x.shape[2] - (self.padded - self.length)
        return jnp.swapaxes(x[:, :, stop - count : stop], 1, 2)


def up_to(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def pad_tokens(x: jax.Array, before: int, after: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, 0), (before, after), *((0, 0),) * (x.ndim - 3)))


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    documents: jax.Array,
    *,
    left: int | None,
    soft_cap: float,
    blocks: tuple[int, ...],
) -> tuple[jax.Array, jax.Array]:
    """As `attention_blocks.forward`."""
    call = Call(q, k, documents, left, soft_cap, blocks)
    out, (normaliser,) = call.kernel(save_residuals=True)(call.queries(q), call.of_keys(k), call.of_keys(v))
    return call.back(out, call.length), normaliser[:, :, : call.length]


def backward(q, k, v, documents, out, normaliser, dout, *, left: int | None, soft_cap: float, blocks: tuple[int, ...]):
    """As `attention_blocks.backward`."""
    call = Call(q, k, documents, left, soft_cap, blocks)
    again, pullback = jax.vjp(call.kernel(), call.queries(q), call.of_keys(k), call.of_keys(v))
    kept = call.queries(out), pad_tokens(normaliser, 0, call.padded - call.length)

    def replaced(x):
        """JAX has no name for the kernel's gradient alone. With what the forward pass kept in place of its results here,
        nothing needs it a second time, and it is not compiled."""
        if x is again:
            return kept[0]
        return kept[1] if x.shape == kept[1].shape and x.dtype == kept[1].dtype else x

    dq, dk, dv = jax.tree.map(replaced, pullback)(call.queries(dout))
    return call.back(dq, call.length), call.back(dk, call.keys), call.back(dv, call.keys)
