"""Griffin's state and sampling: whatever pieces a text is read in, the logits are those of one parallel forward pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_griffin import BLOCKS, CONFIG, GOLDEN, golden

from models.state import init_state
from sharding.rules import Rules

WINDOW = CONFIG.window
TOKENS = np.random.default_rng(0).integers(0, 48, (2, 21), dtype=np.int32)  # more than two windows


@pytest.fixture
def model(one_device):
    return golden()


@functools.partial(jax.jit, static_argnames="dtype")
def parallel(model, tokens, positions, dtype=jnp.float32):
    return model(tokens, positions, dtype=dtype)


@functools.partial(jax.jit, static_argnames="dtype")
def advance(model, state, tokens, positions, dtype=jnp.float32):
    return model(tokens, positions, dtype=dtype, state=state)


def fresh(batch, dtype=jnp.float32):
    return init_state(CONFIG, batch, dtype, Rules().spec)


def in_pieces(model, tokens, positions, cuts):
    """Logits (B T V) and the last state, read in the pieces between `cuts`."""
    state, logits = fresh(len(tokens)), []
    for start, end in zip([0, *cuts], [*cuts, tokens.shape[1]], strict=True):
        some, state = advance(model, state, tokens[:, start:end], positions[:, start:end])
        logits.append(np.asarray(some))
    return np.concatenate(logits, axis=1), state


def plain_positions(tokens):
    return np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)


def test_every_split_of_a_text_gives_the_logits_of_one_pass(model):
    positions = plain_positions(TOKENS)
    whole = parallel(model, TOKENS, positions)
    for cut in range(1, TOKENS.shape[1]):
        np.testing.assert_allclose(in_pieces(model, TOKENS, positions, [cut])[0], whole, atol=2e-5, err_msg=str(cut))
