"""The linear recurrence h_t = a_t * h_{t-1} + x_t, with a gradient of its own."""

import jax
import jax.numpy as jnp
from jax import lax


@jax.custom_vjp
def linear_scan(a: jax.Array, x: jax.Array) -> jax.Array:
    """h (B T L) of h_t = a_t * h_{t-1} + x_t with h_{-1} = 0; a and x (B T L), float32.

    The gradient is the same recurrence run backwards: g_t = dh_t + a_{t+1} * g_{t+1}, dx = g, da_t = g_t * h_{t-1}
    (griffin paper, appendix A), so nothing but h is kept for it.
    """
    return _scan(a, x, reverse=False)


def _forward(a: jax.Array, x: jax.Array):
    h = _scan(a, x, reverse=False)
    return h, (a, h)


def _backward(residuals, dh: jax.Array):
    a, h = residuals
    a_next = jnp.pad(a[:, 1:], ((0, 0), (0, 1), (0, 0)))
    g = _scan(a_next, dh, reverse=True)
    h_before = jnp.pad(h[:, :-1], ((0, 0), (1, 0), (0, 0)))
    return g * h_before, g


linear_scan.defvjp(_forward, _backward)


def _scan(a: jax.Array, x: jax.Array, reverse: bool) -> jax.Array:
    # One step of a CPU is a short vector operation, so the sequential loop wins there; a parallel machine wants
    # log-depth. The TPU kernel will take this place.
    if jax.default_backend() == "cpu":
        return _sequential(a, x, reverse)
    return _associative(a, x, reverse)


def _sequential(a: jax.Array, x: jax.Array, reverse: bool) -> jax.Array:
    def step(h, ax):
        h = ax[0] * h + ax[1]
        return h, h

    time_major = (jnp.swapaxes(a, 0, 1), jnp.swapaxes(x, 0, 1))
    _, h = lax.scan(step, jnp.zeros_like(x[:, 0]), time_major, reverse=reverse)
    return jnp.swapaxes(h, 0, 1)


def _associative(a: jax.Array, x: jax.Array, reverse: bool) -> jax.Array:
    def combine(left, right):
        return left[0] * right[0], right[0] * left[1] + right[1]

    return lax.associative_scan(combine, (a, x), reverse=reverse, axis=1)[1]
