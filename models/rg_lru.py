"""The real-gated linear recurrent unit of Griffin (arXiv 2402.19427, equations 1 to 4).

Shapes: B batch, T tokens, L channels, G gate blocks of L/G channels each.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from models.blocks import einsum_float32
from models.kernels.rg_lru_tpu import rg_lru_backward, rg_lru_forward, saved_states
from models.remat import named
from models.scan import Implementation, linear_scan, on_platform
from models.sequence import Axis, carried_in

SHARPNESS = 8.0  # the paper's c: a = rho ** (c * r)
MAX_DERIVATIVE = 1000.0  # of the square root (RecurrentGemma report, section 2)


def rg_lru_scan(
    u: jax.Array,
    segment_pos: jax.Array,
    w_input: jax.Array,
    b_input: jax.Array,
    w_a: jax.Array,
    b_a: jax.Array,
    a_param: jax.Array,
    h0: jax.Array | None = None,
    *,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """h (B T L) in u's dtype and the last state (B L), float32, of

        h_t = a_t h_{t-1} + sqrt(1 - a_t**2) i_t u_t,    log a_t = -8 softplus(a_param) r_t,

    with gates i and r = sigmoid(block-diagonal product of u). u (B T L) is float32 or bfloat16, weights (G L/G L/G),
    biases (G L/G), a_param (L), h0 (B L) float32 or None for 0. Where segment_pos (B T) is 0 a document starts: a = 0
    and the root is 1. Products are of u's dtype; all that follows them is float32.

    For one device's arrays: no channel or time step needs another device's. `implementation` as in `linear_scan`; the
    default keeps no gate for the gradient but computes them again.
    """
    if h0 is None:
        h0 = jnp.zeros_like(u[:, 0], dtype=jnp.float32)
    log_decay = -SHARPNESS * jax.nn.softplus(a_param.astype(jnp.float32))
    arrays = (u, segment_pos, w_input, b_input, w_a, b_a, log_decay, h0)
    if implementation in ("sequential", "associative"):
        return _plain(*arrays, implementation=implementation)
    return _recomputed(implementation, *arrays)


def _plain(u, segment_pos, w_input, b_input, w_a, b_a, log_decay, h0, *, implementation: Implementation):
    gate_input = jax.nn.sigmoid(block_diagonal(u, w_input, b_input))
    gate_a = jax.nn.sigmoid(block_diagonal(u, w_a, b_a))
    log_a = log_decay[None, None] * gate_a
    start = (segment_pos == 0)[:, :, None]
    a = jnp.where(start, 0.0, jnp.exp(log_a))
    multiplier = jnp.where(start, 1.0, sqrt_bounded_derivative(-jnp.expm1(2 * log_a)))
    x = multiplier * gate_input * u.astype(jnp.float32)
    h, h_last = linear_scan(a, x, h0, implementation=implementation)
    return h.astype(u.dtype), h_last


def block_diagonal(u: jax.Array, w: jax.Array, b: jax.Array) -> jax.Array:
    """(B T L) -> (B T L) in float32 by G dense blocks on the diagonal, w (G L/G L/G) and b (G L/G)."""
    blocks = u.reshape(*u.shape[:2], *b.shape)
    here = None  # one device's arrays are not divided
    z = einsum_float32("btgi,gij->btgj", blocks, w.astype(u.dtype), here)  # type: ignore[arg-type]
    return (z + b.astype(jnp.float32)[None, None]).reshape(u.shape)


@jax.custom_jvp
def sqrt_bounded_derivative(x: jax.Array) -> jax.Array:
    """sqrt(x) whose derivative is cut at 1000: it is infinite at a = 1 (RecurrentGemma report, section 2)."""
    return jnp.sqrt(x)


@sqrt_bounded_derivative.defjvp
def _sqrt_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return jnp.sqrt(x), dx * 0.5 * lax.rsqrt(jnp.maximum(x, 1 / (4 * MAX_DERIVATIVE**2)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recomputed(implementation: Implementation | None, *arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The recurrence whose gradient needs, besides its inputs, only a few states."""
    return _values(*arrays, implementation=implementation, save_states=False)[:2]


def _forward(implementation: Implementation | None, *arrays: jax.Array):
    # The gradient reads the states, not h, but to keep only one of them would still run the forward pass again.
    h, h_last, states = (named(x, "rnn") for x in _values(*arrays, implementation=implementation, save_states=True))
    return (h, h_last), (arrays, states)


def _backward(implementation: Implementation | None, residuals, cotangents):
    arrays, states = residuals
    gradients = _gradients(states, *cotangents, *arrays, implementation=implementation)
    du, *others = gradients
    return du, None, *(d.astype(array.dtype) for d, array in zip(others, arrays[2:], strict=True))


_recomputed.defvjp(_forward, _backward)


def rg_lru_shared(
    axis: Axis,
    u: jax.Array,
    segment_pos: jax.Array,
    w_input: jax.Array,
    b_input: jax.Array,
    w_a: jax.Array,
    b_a: jax.Array,
    a_param: jax.Array,
) -> jax.Array:
    """h (B T L) of `rg_lru_scan`, from state 0, where the devices along the mesh axis `axis` hold T tokens each.

    All run at once: first from 0, to learn where their tokens take a state; then from the state that reaches them. The
    gradient does the same against time. Only those summaries cross devices, two (B L) in float32 from each, each way.
    """
    log_decay = -SHARPNESS * jax.nn.softplus(a_param.astype(jnp.float32))
    return _shared(axis, u, segment_pos, w_input, b_input, w_a, b_a, log_decay)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _shared(axis: Axis, *arrays: jax.Array) -> jax.Array:
    return _shared_forward(axis, *arrays)[0]


def _shared_forward(axis: Axis, *arrays: jax.Array):
    decay = total_decay(*arrays)
    _, end, _ = _values(*arrays, jnp.zeros_like(decay), implementation=None, save_states=False)
    decay, h0 = named(decay, "rnn"), named(carried_in(decay, end, axis), "rnn")
    arrays = (*arrays, h0)
    h, _, states = (named(x, "rnn") for x in _values(*arrays, implementation=None, save_states=True))
    return h, (arrays, decay, states)


def _shared_backward(axis: Axis, residuals, dh):
    arrays, decay, states = residuals
    *_, dh0 = _gradients(states, dh, jnp.zeros_like(decay), *arrays, implementation=None)
    dh_last = carried_in(decay, dh0, axis, reverse=True)
    du, *others, _ = _gradients(states, dh, dh_last, *arrays, implementation=None)
    return du, None, *(d.astype(array.dtype) for d, array in zip(others, arrays[2:-1], strict=True))


_shared.defvjp(_shared_forward, _shared_backward)


def total_decay(u, segment_pos, w_input, b_input, w_a, b_a, log_decay) -> jax.Array:
    """The product of all T decays (B L) in float32, 0 where a document starts among them."""
    gates = jnp.sum(jax.nn.sigmoid(block_diagonal(u, w_a, b_a)), axis=1)
    return jnp.where(jnp.any(segment_pos == 0, axis=1)[:, None], 0.0, jnp.exp(log_decay[None] * gates))


def _values(*arrays, implementation: Implementation | None, save_states: bool):
    if implementation is None:
        return on_platform(functools.partial(_values, save_states=save_states), *arrays)
    if implementation == "tpu":
        return rg_lru_forward(*arrays, save_states=save_states)  # type: ignore[misc]
    h, h_last = _plain(*arrays, implementation=implementation)
    # Only the kernel saves states; the other platforms' programs agree in shape and never read them.
    states = jnp.zeros(saved_states(arrays[0], arrays[2]), jnp.float32) if save_states else None
    return h, h_last, states


def _gradients(states, dh, dh_last, *arrays, implementation: Implementation | None):
    """Cotangents of u, both gates' weights and biases, log_decay and h0."""
    if implementation is None:
        return on_platform(_gradients, states, dh, dh_last, *arrays)
    if implementation == "tpu":
        return rg_lru_backward(states, dh, dh_last, *arrays[:-1])
    u, segment_pos, *rest = arrays
    plain = functools.partial(_plain, implementation=implementation)
    _, pullback = jax.vjp(lambda u, *rest: plain(u, segment_pos, *rest), u, *rest)
    du, *others = pullback((dh, dh_last))
    return du, *(d.astype(jnp.float32) for d in others)
