"""The linear recurrence h_t = a_t * h_{t-1} + x_t, with a gradient of its own.

Three implementations: "sequential" (a loop over time), "associative" (log depth) and "tpu" (a Pallas kernel).
"""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from models.kernels.linear_tpu import linear_scan_backward, linear_scan_forward

Implementation = Literal["sequential", "associative", "tpu"]


def linear_scan(
    a: jax.Array,
    x: jax.Array,
    h0: jax.Array | None = None,
    *,
    reverse: bool = False,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """h (B T L) of h_t = a_t * h_{t-1} + x_t and the last state (B L); h_{-1} = h0 (B L), or 0. Reverse: from T-1 to 0.

    Real a and x in float32 or bfloat16, or complex64; h in x's dtype, states and sums in float32 (complex64).
    The gradient is the same recurrence against time: g_t = dh_t + a_{t+1} g_{t+1}, dx = g, da_t = g_t h_{t-1}
    (griffin paper, appendix A), so only a and h are kept for it.

    Without `implementation` the platform the program is compiled for decides: the loop on CPU, where one step is a
    short vector operation, the kernel on TPU, log depth elsewhere.
    """
    if a.ndim != 3 or a.shape != x.shape:
        raise ValueError(f"linear_scan needs a and x of one shape (B T L), got {a.shape} and {x.shape}")
    state = jnp.complex64 if jnp.iscomplexobj(x) else jnp.float32
    if h0 is None:
        h0 = jnp.zeros_like(x[:, 0], dtype=state)
    if h0.shape != x[:, 0].shape or h0.dtype != state:
        raise ValueError(f"h0 must be {state.__name__} {x[:, 0].shape}, got {h0.dtype} {h0.shape}")
    return _scan(a, x, h0, reverse, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _scan(a, x, h0, reverse: bool, implementation: Implementation | None):
    if implementation == "tpu":
        return linear_scan_forward(a, x, h0, reverse)
    if implementation == "associative":
        return _associative(a, x, h0, reverse)
    if implementation == "sequential":
        return _sequential(a, x, h0, reverse)
    return on_platform(functools.partial(_scan, reverse=reverse), a, x, h0)


def _forward(a, x, h0, reverse: bool, implementation: Implementation | None):
    h, h_last = _scan(a, x, h0, reverse, implementation)
    return (h, h_last), (a, h, h0)


def _backward(reverse: bool, implementation: Implementation | None, residuals, cotangents):
    return _gradient(*residuals, *cotangents, reverse=reverse, implementation=implementation)


_scan.defvjp(_forward, _backward)


def _gradient(a, h, h0, dh, dh_last, *, reverse: bool, implementation: Implementation | None):
    if implementation is None:
        return on_platform(functools.partial(_gradient, reverse=reverse), a, h, h0, dh, dh_last)
    if implementation == "tpu":
        return linear_scan_backward(a, h, h0, dh, dh_last, reverse)
    # c_t = a_t * g_t is the state of the recurrence against time: c_t = a_t * c_{t+1} + a_t * dh_t.
    state = h0.dtype
    c, dh0 = _scan(a, a.astype(state) * dh.astype(state), dh_last, not reverse, implementation)
    g = dh.astype(state) + _neighbours(c, dh_last, not reverse)
    da = g * _neighbours(h.astype(state), h0, reverse)
    return da.astype(a.dtype), g.astype(dh.dtype), dh0


def _neighbours(h: jax.Array, origin: jax.Array, reverse: bool) -> jax.Array:
    """The state one step earlier in the recurrence; before the first step it is `origin`."""
    if reverse:
        return jnp.concatenate([h[:, 1:], origin[:, None]], axis=1)
    return jnp.concatenate([origin[:, None], h[:, :-1]], axis=1)


def on_platform(function: Callable, *arrays: jax.Array):
    """`function` with the implementation of the platform that the program is lowered for, which need not be this host."""
    return lax.platform_dependent(
        *arrays,
        cpu=functools.partial(function, implementation="sequential"),
        tpu=functools.partial(function, implementation="tpu"),
        default=functools.partial(function, implementation="associative"),
    )


def _sequential(a: jax.Array, x: jax.Array, h0: jax.Array, reverse: bool) -> tuple[jax.Array, jax.Array]:
    def step(h, ax):
        a_t, x_t = ax
        h = a_t.astype(h.dtype) * h + x_t.astype(h.dtype)
        return h, h.astype(x.dtype)

    time_major = (jnp.swapaxes(a, 0, 1), jnp.swapaxes(x, 0, 1))
    h_last, h = lax.scan(step, h0, time_major, reverse=reverse)
    return jnp.swapaxes(h, 0, 1), h_last


def _associative(a: jax.Array, x: jax.Array, h0: jax.Array, reverse: bool) -> tuple[jax.Array, jax.Array]:
    def combine(left, right):
        return left[0] * right[0], right[0] * left[1] + right[1]

    pair = (a.astype(h0.dtype), x.astype(h0.dtype))
    products, sums = lax.associative_scan(combine, pair, reverse=reverse, axis=1)
    h = products * h0[:, None] + sums
    return h.astype(x.dtype), h[:, 0 if reverse else -1]
