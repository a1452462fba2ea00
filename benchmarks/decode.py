"""Decoding with griffin-tiny: is token 20,000 as fast as token 100, and what is kept of the tokens before it?

Run as `python -m benchmarks.decode [--out FILE]`. Random parameters, float32; the text before a position is really read.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.tables import arguments, machine, publish, table
from configs.griffin import tiny
from configs.schema import GriffinConfig
from models.decode import CHUNK, Draw, open_state, prefill, step
from models.griffin import Griffin
from models.params import Init
from models.state import state_bytes, transformer_bytes
from sharding.mesh import one_device_mesh
from sharding.rules import Rules

EARLY, LATE = 100, 20_000
TOKENS, ROUNDS = 200, 9
DTYPE = jnp.dtype(jnp.float32)


def main() -> None:
    options = arguments(__doc__)
    config = tiny().model
    assert isinstance(config, GriffinConfig)
    with jax.set_mesh(one_device_mesh()):
        model = jax.jit(lambda key: Griffin(config, Init(key, Rules().spec)))(jax.random.key(0))
        sides = {position: read(model, position) for position in (EARLY, LATE)}
        kept = state_bytes(sides[LATE])
        rates: dict[int, list[float]] = {EARLY: [], LATE: []}
        for turn in range(1 + ROUNDS):  # the first compiles and warms up; they take turns, so that both see one machine
            for position, state in sides.items():
                seconds, sides[position] = decode(model, state, position + turn * TOKENS)
                if turn:
                    rates[position].append(TOKENS / seconds)
    publish(report(config, rates, kept), options.out)


def read(model: Griffin, length: int):
    """The state after `length` random tokens of one document."""
    state = open_state(model, 1, DTYPE, length)
    tokens = np.random.default_rng(0).integers(0, 256, (1, length), dtype=np.int32)
    positions = np.arange(length, dtype=np.int32)[None]
    padding = -length % CHUNK
    tokens = np.pad(tokens, ((0, 0), (padding, 0)))
    positions = np.pad(positions, ((0, 0), (padding, 0)), constant_values=-1)
    for start in range(0, length + padding, CHUNK):
        chunk = slice(start, start + CHUNK)
        state = prefill(model, state, tokens[:, chunk], positions[:, chunk], DTYPE)
    return state


def decode(model: Griffin, state, position: int):
    """Seconds that TOKENS tokens took from `position` on, each read before the next is asked for, and the state."""
    token, key, draw = jnp.zeros((1, 1), jnp.int32, out_sharding=Rules().spec(None, None)), jax.random.key(0), Draw(0.8)
    start = time.perf_counter()
    for i in range(TOKENS):
        place = np.full((1, 1), position + i, np.int32)
        token, state = step(model, state, token, place, key, DTYPE, draw, model.config.vocab_size)
        np.asarray(token)
    return time.perf_counter() - start, state


def report(config: GriffinConfig, rates: dict[int, list[float]], kept: int) -> list[str]:
    ratios = [late / early for early, late in zip(rates[EARLY], rates[LATE], strict=True)]
    rows = []
    for position in (EARLY, LATE):
        shared = transformer_bytes(config, position, DTYPE)
        whole = shared * config.num_heads
        rate = statistics.median(rates[position])
        rows.append((f"{position:,}", f"{rate:,.0f}", *(f"{size / 1e3:,.0f} kB" for size in (kept, shared, whole))))
    heads = ("position", "tokens/s", "state", "Transformer, one key-value head", f"{config.num_heads} key-value heads")
    return [
        "# Decoding with griffin-tiny",
        "",
        *table(heads, rows),
        "",
        f"Speed at {LATE:,} over speed at {EARLY}: {statistics.median(ratios):.2f} (median of {ROUNDS} rounds of {TOKENS} "
        f"tokens in turns, {min(ratios):.2f} to {max(ratios):.2f}). One sequence, float32; the state is all that is kept of "
        f"a sequence, beside it the keys and values of a Transformer of the same depth, width and query heads.",
        machine(),
    ]


if __name__ == "__main__":
    main()
