"""Sampling from a language model by running the whole context again for each token: plain, for small models.

A state of fixed size (recurrence, convolution, ring-buffer window) will replace the repeated context.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def generate(
    model: Any, prompt: np.ndarray, num_tokens: int, *, context: int, vocab_size: int, temperature: float, seed: int
) -> Iterator[int]:
    """Yields `num_tokens` token ids after `prompt` (T,), which starts with BOS.

    The model sees at most the last `context` tokens. Ids from `vocab_size` on, which pad the table and stand for
    nothing, are never drawn. Temperature 0 takes the likeliest token.
    """

    @jax.jit
    def draw(model, tokens, positions, last, key):
        logits = model(tokens, positions, dtype=jnp.float32)
        row = jnp.sum(jnp.where(jnp.arange(context)[:, None] == last, logits[0], 0.0), axis=0)
        row = jnp.where(jnp.arange(row.size) < vocab_size, row, -jnp.inf)
        if temperature == 0:
            return jnp.argmax(row)
        return jax.random.categorical(key, row / temperature)

    tokens = [int(t) for t in prompt]
    for i in range(num_tokens):
        seen = tokens[-context:]
        buffer = np.zeros((1, context), np.int32)
        buffer[0, : len(seen)] = seen
        positions = np.arange(context, dtype=np.int32)[None] + (len(tokens) - len(seen))
        token = int(draw(model, buffer, positions, len(seen) - 1, jax.random.fold_in(jax.random.key(seed), i)))
        tokens.append(token)
        yield token
