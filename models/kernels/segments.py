"""How the TPU kernels walk through time: eight segments at once, one in each sublane of a vector register.

Time lies on sublanes, so the rows of one register depend on each other. Instead of a prefix inside every register, a
chunk of 64 time steps is read with stride 8: register k holds step k of eight consecutive segments. The segments are
scanned side by side with plain multiply-adds, their eight summaries are combined by one log-step prefix over sublanes,
and a second pass runs each segment from its true state. That is five operations an element and no shuffle but the
prefix's, one register in eight.

Numbers are tuples of arrays: (real,) or (real, imaginary).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

SUBLANES, LANES = 8, 128
STEPS = 8  # of a segment
CHUNK = SUBLANES * STEPS  # time steps walked at once

Number = tuple[jax.Array, ...]


def multiply(p: Number, q: Number) -> Number:
    if len(p) == 1:
        return (p[0] * q[0],)
    return p[0] * q[0] - p[1] * q[1], p[0] * q[1] + p[1] * q[0]


def add(p: Number, q: Number) -> Number:
    return tuple(x + y for x, y in zip(p, q, strict=True))


def put(stage, rows: jax.Array, start: int = 0) -> None:
    """Rows (R n*128) into float32 scratch (n, ., 128) from row `start`: strided reads need rows of 128 lanes."""
    rows = rows.astype(jnp.float32)
    for tile in range(stage.shape[0]):
        stage[tile, start : start + rows.shape[0], :] = rows[:, tile * LANES : (tile + 1) * LANES]


def take(stage) -> jax.Array:
    """The chunk (64 n*128) that lies in a stage."""
    return jnp.concatenate([stage[tile, :CHUNK, :] for tile in range(stage.shape[0])], axis=1)


def step(k: int, start: int = 0):
    """Index of step k of every segment in one lane tile of a stage whose chunk begins at row `start`."""
    return pl.ds(start + k, SUBLANES, stride=STEPS)


def read(stages: Sequence, tile: int, start: int = 0) -> list[Number]:
    """The steps of the eight segments, one number (8 128) each."""
    return [tuple(stage.at[tile][step(k, start), :] for stage in stages) for k in range(STEPS)]


def order(reverse: bool) -> list[int]:
    """Steps of a segment in the order of the recurrence."""
    return list(range(STEPS))[:: -1 if reverse else 1]


def entering(decay: Number, local: Number, carry: Number, reverse: bool) -> tuple[Number, Number]:
    """State (8 128) in which each segment begins, and the state after all eight, in every row.

    Row j of `decay` and `local`: segment j maps a state s to decay * s + local. `carry`: the state before the chunk.
    """
    row = lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0)

    def shifted(number: Number, by: int, fill: Number) -> Number:
        keep = row < SUBLANES - by if reverse else row >= by
        shift = SUBLANES - by if reverse else by
        return tuple(jnp.where(keep, pltpu.roll(x, shift, 0), f) for x, f in zip(number, fill, strict=True))

    zeros = tuple(jnp.float32(0) for _ in carry)
    one = (jnp.float32(1), *zeros[1:])
    for by in (1, 2, 4):
        local = add(local, multiply(decay, shifted(local, by, zeros)))
        decay = multiply(decay, shifted(decay, by, one))
    after = add(multiply(decay, carry), local)
    last = 0 if reverse else SUBLANES - 1
    return shifted(after, 1, carry), tuple(jnp.broadcast_to(x[last : last + 1], x.shape) for x in after)


def walk(a: list[Number], x: list[Number], carry: Number, reverse: bool) -> tuple[list[Number], list[Number], Number]:
    """s = a * s + x over a chunk. Returns s before each step, s after each step (by k) and the state after the chunk."""
    ks = order(reverse)
    decay, local = a[ks[0]], x[ks[0]]
    for k in ks[1:]:
        local = add(multiply(a[k], local), x[k])
        decay = multiply(a[k], decay)
    state, carry = entering(decay, local, carry, reverse)
    before, after = [state] * STEPS, [state] * STEPS
    for k in ks:
        before[k] = state
        state = after[k] = add(multiply(a[k], state), x[k])
    return before, after, carry


def walk_back(a: list[Number], x: list[Number], carry: Number, reverse: bool) -> tuple[list[Number], Number]:
    """g = x + c, c = a * g over a chunk, against time unless `reverse`: the adjoint of `walk`. Returns g by k and c."""
    # c = a * c + a * x is the same recurrence; g is what c was before the step, plus x.
    before, _, carry = walk(a, [multiply(p, q) for p, q in zip(a, x, strict=True)], carry, not reverse)
    return [add(p, q) for p, q in zip(x, before, strict=True)], carry
