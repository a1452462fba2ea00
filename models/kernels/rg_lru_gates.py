"""The RG-LRU's gates inside a kernel: elementwise mathematics of eight time segments (8 128), all in float32."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from models.kernels.segments import LANES, STEPS, SUBLANES, read

MAX_DERIVATIVE = 1000.0  # of the square root (RecurrentGemma report, section 2)
LN2 = math.log(2)
ZERO = -1000.0  # a logarithm of 0: 2 ** ZERO is 0, and 1 - 0 ** 2 is 1, as a document's start wants it


class Gate:
    """One step of eight segments (8 128), float32: u, input gate i, decay a, multiplier m, 1 / m cut, and tanh(z / 2).

    Written for what a chip has in hardware (exp2, log, tanh; not division or roots). `z_input` and `z_a` are halves of
    the pre-activations, since sigmoid(z) = (1 + tanh(z / 2)) / 2; log2 a = half_decay * (1 + tanh(z_a)).
    """

    def __init__(self, u, z_input, z_a, half_decay, reset, pad):
        self.u, self.tanh_i, self.tanh_r = u, jnp.tanh(z_input), jnp.tanh(z_a)
        self.i = 0.5 * self.tanh_i + 0.5
        self.iu = self.i * u
        log2_a = jnp.where(reset, ZERO, half_decay * (1 + self.tanh_r))
        if pad is not None:
            log2_a = jnp.where(pad, 0.0, log2_a)  # a = 1, m = 0: a step after the end changes nothing
        self.a = jnp.exp2(log2_a)
        log2_m = jnp.log(one_minus_square(log2_a, self.a)) * (0.5 / LN2)
        self.m = jnp.exp2(log2_m)
        self.inverse_m = jnp.minimum(jnp.exp2(-log2_m), 2 * MAX_DERIVATIVE)


def one_minus_square(log2_a: jax.Array, a: jax.Array) -> jax.Array:
    """1 - a**2 = -expm1(2 log a) without cancellation near a = 1, to about 1e-6 of itself."""
    c1, c2, c3, c4 = (-((2 * LN2) ** n) / math.factorial(n) for n in (1, 2, 3, 4))
    series = log2_a * (c1 + log2_a * (c2 + log2_a * (c3 + log2_a * c4)))
    return jnp.where(log2_a > -0.07, series, 1 - a * a)


def gates_of(stages: Sequence, tile: int, bi_ref, ba_ref, decay_ref, resets, pads) -> list[Gate]:
    """The gates of each step of one lane tile, from stages of u and of both products."""
    lanes = slice(tile * LANES, (tile + 1) * LANES)
    bi, ba, decay = (jnp.broadcast_to(ref[:, lanes], (SUBLANES, LANES)) for ref in (bi_ref, ba_ref, decay_ref))
    numbers = read(stages, tile)
    pads = pads or [None] * STEPS
    return [
        Gate(u, zi + bi, za + ba, decay, reset, pad)
        for (u, zi, za), reset, pad in zip(numbers, resets, pads, strict=True)
    ]


def flags_of(flag_ref, c, padded: bool):
    """Booleans (8 128) for each step of the chunk's segments: does it begin a document, does it lie after the end?"""
    row = lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0)
    lane = lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 1)
    # Segment j's bits lie in lane j; each sublane picks its own and spreads it over the lanes.
    spread = jnp.where(row == lane, jnp.broadcast_to(flag_ref[pl.ds(c, 1), :], (SUBLANES, LANES)), 0.0)
    bits = jnp.broadcast_to(jnp.sum(spread, axis=1, keepdims=True), (SUBLANES, LANES)).astype(jnp.int32)
    resets = [(bits & (1 << k)) != 0 for k in range(STEPS)]
    pads = [(bits & (1 << (k + STEPS))) != 0 for k in range(STEPS)] if padded else None
    return resets, pads
