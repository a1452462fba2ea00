"""Sampling from a language model: prompts are read in chunks, then a token a step from a state of fixed size.

Shapes: B prompts, T tokens of a call, V vocabulary.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import reshard

from configs.schema import ConfigError
from models import FAMILIES
from models.params import cast_kernels

CHUNK = 128  # tokens of a prompt read at once
ENDED = -1  # in place of a token, in rows that have ended


@dataclass(frozen=True)
class Draw:
    """How a token is chosen. Temperature 0 takes the likeliest; `top_k` and `top_p` leave out unlikely ones."""

    temperature: float = 0.0
    top_k: int | None = None  # only the k likeliest
    top_p: float = 1.0  # of those, the fewest likeliest that have this probability together


def open_state(model: Any, batch: int, dtype: jnp.dtype, capacity: int) -> Any:
    """The state before the first of at most `capacity` tokens."""
    init = FAMILIES[model.config.kind].init_state
    assert init is not None, f"{model.config.kind} does not decode"
    return init(model.config, batch, dtype, model.embedding.spec, capacity)


def advance(model: Any, state: Any, tokens: jax.Array, positions: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, Any]:
    """Logits (B V) after the last of these tokens (B T), the same on every device, and the new state."""
    logits, state = model(tokens, positions, dtype=dtype, state=state)
    return reshard(logits[:, -1], model.embedding.spec(None, None)), state


@functools.partial(jax.jit, static_argnames="dtype", donate_argnames="state")
def prefill(model, state, tokens, positions, dtype):
    """The state after a chunk of the prompts; nobody asks for its logits, so none are computed."""
    return advance(model, state, tokens, positions, dtype)[1]


@functools.partial(jax.jit, static_argnames=("dtype", "draw", "vocab_size"), donate_argnames="state")
def step(model, state, token, position, key, dtype, draw: Draw, vocab_size: int):
    """Tokens (B, 1) that follow `token` (B, 1), and the new state."""
    logits, state = advance(model, state, token, position, dtype)
    return choose(logits[:, :vocab_size], key, draw)[:, None], state


def choose(logits: jax.Array, key: jax.Array, draw: Draw) -> jax.Array:
    """Tokens (B) from logits (B V). Each row has its own random numbers, which no other row's presence changes."""
    if draw.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(len(logits)))
    logits = logits / draw.temperature
    if draw.top_k is None and draw.top_p == 1:
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
    logits, tokens = likeliest(logits, draw)
    place = jax.vmap(jax.random.categorical)(keys, logits)
    return jnp.sum(jnp.where(jnp.arange(logits.shape[1])[None] == place[:, None], tokens, 0), axis=-1)


def likeliest(logits: jax.Array, draw: Draw) -> tuple[jax.Array, jax.Array]:
    """Logits in falling order, -inf where top-k or top-p leave a token out, and the tokens they are of (B k)."""
    logits, tokens = lax.top_k(logits, min(draw.top_k or logits.shape[1], logits.shape[1]))
    probabilities = jax.nn.softmax(logits, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # of all likelier ones
    within = (before < draw.top_p) | (jnp.arange(logits.shape[1]) == 0)[None]
    return (logits if draw.top_p == 1 else jnp.where(within, logits, -jnp.inf)), tokens


def generate(
    model: Any,
    prompts: Sequence[np.ndarray],
    num_tokens: int,
    *,
    dtype: jnp.dtype,
    draw: Draw,
    vocab_size: int,
    seed: int = 0,
    eos_id: int | None = None,
) -> Iterator[np.ndarray]:
    """Yields up to `num_tokens` times the next token of every prompt (B), ENDED after a row's `eos_id`.

    A prompt (T,) starts with BOS. Ids from `vocab_size` on, which pad the table and stand for nothing, are never drawn.
    The same prompts, options and seed give the same tokens; a row's do not depend on those beside it.
    Raises ConfigError if there is no prompt.
    """
    if not prompts:
        raise ConfigError("there are 0 prompts to continue: at least one is needed")
    model = jax.jit(cast_kernels, static_argnums=1)(model, dtype)  # once, and not for every token
    tokens, positions = left_padded(prompts)
    # A power of two, so that few texts of other lengths are another program.
    capacity = 1 << (tokens.shape[1] + num_tokens - 1).bit_length()
    state = open_state(model, len(prompts), dtype, capacity)
    for start in range(0, tokens.shape[1] - 1, CHUNK):
        chunk = slice(start, start + CHUNK)
        state = prefill(model, state, tokens[:, chunk], positions[:, chunk], dtype)
    # Laid out as `step` returns it, or the second step would be compiled again.
    token = reshard(jnp.asarray(tokens[:, -1:]), model.embedding.spec(None, None))
    position, key = positions[:, -1:], jax.random.key(seed)
    running = np.ones(len(prompts), bool)
    for i in range(num_tokens):
        token, state = step(
            model, state, token, position + np.int32(i), jax.random.fold_in(key, i), dtype, draw, vocab_size
        )
        drawn = np.asarray(token)[:, 0]
        yield np.where(running, drawn, ENDED)
        running &= drawn != eos_id
        if not running.any():
            return


def left_padded(prompts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and positions (B T), T - 1 whole chunks, so that prompts of every length run the same two programs."""
    lengths = np.array([len(prompt) for prompt in prompts])
    width = -(-(lengths.max() - 1) // CHUNK) * CHUNK + 1
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[width - len(prompt) :] = prompt
    positions = np.arange(width) - (width - lengths)[:, None]
    return tokens, np.maximum(positions, -1).astype(np.int32)
