"""Attention in blocks is the masked softmax over the whole square, for any window, heads and documents."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.attention_local import local_attention


def inputs(length: int, heads: int, kv_heads: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(2, length, heads, 4))
    k, v = (rng.normal(size=(2, length, kv_heads, 4)) for _ in range(2))
    positions = np.stack([packed([7, 1, 30, length - 38]), packed([-3, length - 3])])
    return q, k, v, positions


def packed(lengths: list[int]) -> np.ndarray:
    """Positions of documents of these lengths in a row; a negative one is padding."""
    return np.concatenate([np.arange(n) if n > 0 else np.full(-n, -1) for n in lengths]).astype(np.int32)


def by_hand(q, k, v, positions, left: int, soft_cap: float) -> np.ndarray:
    """Query by query, in float64."""
    out = np.zeros_like(q)
    for row in range(q.shape[0]):
        document = np.cumsum(positions[row] == 0)
        for t in range(q.shape[1]):
            keys = [s for s in range(max(0, t - left), t + 1) if document[s] == document[t]]
            for head in range(q.shape[2]):
                kv_head = head * k.shape[2] // q.shape[2]
                scores = k[row, keys, kv_head] @ q[row, t, head]
                scores = soft_cap * np.tanh(scores / soft_cap) if soft_cap else scores
                weights = np.exp(scores - scores.max())
                out[row, t, head] = weights / weights.sum() @ v[row, keys, kv_head]
    return out


@functools.partial(jax.jit, static_argnums=(4, 5))
def blocked(q, k, v, positions, left, soft_cap):
    return local_attention(q, k, v, positions, left, soft_cap)


@pytest.mark.parametrize(
    ("length", "left", "kv_heads", "soft_cap"),
    [(64, 8, 1, 0.0), (61, 7, 2, 0.0), (50, 15, 4, 2.0), (50, 16, 1, 0.0), (45, 0, 2, 0.0), (64, 40, 1, 0.0)],
)
def test_blocks_give_every_query_its_window(one_device, length, left, kv_heads, soft_cap):
    q, k, v, positions = inputs(length, 4, kv_heads)
    expected = by_hand(q, k, v, positions, left, soft_cap)
    got = blocked(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)), jnp.asarray(positions), left, soft_cap)
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_memory_grows_with_the_tokens_not_with_their_square(one_device):
    def temporaries(length: int) -> int:
        q, k, v, positions = (
            jnp.asarray(x, x.dtype if x.dtype == np.int32 else np.float32) for x in inputs(length, 4, 1)
        )
        gradient = jax.grad(lambda q: jnp.sum(blocked(q, k, v, positions, 32, 0.0) ** 2))
        return jax.jit(gradient).lower(q).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(2048) < 2.5 * temporaries(1024)
