"""The RG-LRU, plain and as a kernel, equals its equations in a float64 loop: values and every gradient."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from models.kernels.gate_tiles import GateTiles
from models.rg_lru import rg_lru_scan

NAMES = ("h", "h_last", "du", "dw_input", "db_input", "dw_a", "db_a", "da_param", "dh0")


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def reference(u, positions, w_input, b_input, w_a, b_a, a_param, h0, dh, dh_last):
    """Values and gradients, time step by time step, as the equations and the chain rule have them."""
    batch, length, _ = u.shape
    groups = w_input.shape[0]

    def gate(u_t, w, b):
        return (np.einsum("bgi,gij->bgj", u_t.reshape(batch, groups, -1), w) + b).reshape(batch, -1)

    softplus = np.log1p(np.exp(a_param))
    h, steps, out = h0, [], np.zeros_like(u)
    for t in range(length):
        i, r = sigmoid(gate(u[:, t], w_input, b_input)), sigmoid(gate(u[:, t], w_a, b_a))
        start = (positions[:, t] == 0)[:, None]
        log_a = -8 * softplus * r
        a, m = np.exp(log_a), np.sqrt(-np.expm1(2 * log_a))
        before = h
        h = np.where(start, i * u[:, t], a * before + m * i * u[:, t])
        out[:, t] = h
        steps.append((i, r, a, m, start, before))
    du, g = np.zeros_like(u), dh_last
    dw_i, db_i, dw_a, db_a = (np.zeros_like(v) for v in (w_input, b_input, w_a, b_a))
    da_param = np.zeros_like(a_param)
    for t in reversed(range(length)):
        i, r, a, m, start, before = steps[t]
        g = g + dh[:, t]
        di = g * np.where(start, 1, m) * u[:, t]
        dm = np.where(start, 0, g * i * u[:, t])
        # The root's derivative 1 / (2 m) is cut at 1000; the square below it falls by 2 a**2 a unit of log a.
        dlog_a = np.where(start, 0, g * before * a) - dm * np.minimum(1 / (2 * m), 1000) * 2 * a**2
        dz = di * i * (1 - i), dlog_a * -8 * softplus * r * (1 - r)
        da_param += np.sum(dlog_a * -8 * r * sigmoid(a_param), axis=0)
        du[:, t] = g * np.where(start, 1, m) * i
        for dz_t, w, dw, db in zip(dz, (w_input, w_a), (dw_i, dw_a), (db_i, db_a), strict=True):
            dz_t = dz_t.reshape(batch, groups, -1)
            dw += np.einsum("bgi,bgj->gij", u[:, t].reshape(dz_t.shape), dz_t)
            db += dz_t.sum(axis=0)
            du[:, t] += np.einsum("bgj,gij->bgi", dz_t, w).reshape(batch, -1)
        g = np.where(start, 0, g * a)
    return out, h, du, dw_i, db_i, dw_a, db_a, da_param, g


def problem(batch, length, groups, width, dtype=jnp.float32, seed=0, start=True):
    """Arguments of `reference`, in float64 but rounded to `dtype` where they will be; documents of about 20 steps."""
    rng = np.random.default_rng(seed)
    channels = groups * width
    resets = rng.uniform(size=(batch, length)) < 0.05
    resets[:, 0] = start
    positions = np.full((batch, length), 7)
    positions[resets] = 0
    positions[rng.uniform(size=(batch, length)) < 0.02] = -1  # padding is no start

    def rounded(v):
        return np.asarray(jnp.asarray(v).astype(dtype)).astype(np.float64)

    gates = [
        v
        for _ in range(2)
        for v in (
            rounded(rng.normal(size=(groups, width, width)) / width**0.5),
            rng.normal(size=(groups, width)),
        )
    ]
    a_param = rng.uniform(-7, -2, channels)  # where the published initialiser puts it
    u, dh = (rounded(rng.normal(size=(batch, length, channels))) for _ in range(2))
    h0, dh_last = rng.normal(size=(2, batch, channels))
    return u, positions, *gates, a_param, h0, dh, dh_last


def run(arguments, dtype, implementation):
    u, positions, *rest, dh, dh_last = arguments
    positions = jnp.asarray(positions, jnp.int32)
    parameters = [jnp.asarray(v, jnp.float32) for v in rest]

    def both(u, dh, dh_last, *parameters):
        scan = lambda u, *p: rg_lru_scan(u, positions, *p, implementation=implementation)  # noqa: E731
        out, pullback = jax.vjp(scan, u, *parameters)
        return *out, *pullback((dh, dh_last))

    with pltpu.force_tpu_interpret_mode() if implementation == "tpu" else contextlib.nullcontext():
        out = jax.jit(both)(
            jnp.asarray(u).astype(dtype), jnp.asarray(dh).astype(dtype), jnp.asarray(dh_last, jnp.float32), *parameters
        )
    assert [v.dtype for v in out] == [dtype, jnp.float32, dtype, *[jnp.float32] * 6]
    return dict(zip(NAMES, [np.asarray(v.astype(jnp.float32)) for v in out], strict=True))


def check(shape, implementation, seed=0, start=True):
    arguments = problem(*shape, seed=seed, start=start)
    ours = run(arguments, jnp.float32, implementation)
    for name, exact in zip(NAMES, reference(*arguments), strict=True):
        scale = max(1.0, np.abs(exact).max())
        np.testing.assert_allclose(ours[name] / scale, exact / scale, atol=2e-5, err_msg=name)


def test_the_references_gradients_are_its_finite_differences():
    arguments = list(problem(1, 6, 2, 2, start=False))
    gradients = reference(*arguments)[2:]
    dh, dh_last = arguments[-2:]

    def loss(arguments):
        h, last, *_ = reference(*arguments)
        return np.sum(h * dh) + np.sum(last * dh_last)

    for which, gradient in zip((0, 2, 3, 4, 5, 6, 7), gradients, strict=True):
        for index in np.ndindex(gradient.shape):
            ends = []
            for sign in (1, -1):
                changed = [np.array(v) for v in arguments]
                changed[which][index] += sign * 1e-6
                ends.append(loss(changed))
            assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(gradient[index], abs=1e-6)


@pytest.mark.parametrize("implementation", ["sequential", "associative", None])
def test_off_tpu_values_and_gradients_equal_a_float64_loop(implementation):
    check((2, 40, 2, 3), implementation)
    check((1, 1, 1, 4), implementation, start=False)


@pytest.mark.parametrize("shape", [(2, 70, 2, 64), (1, 20, 1, 48)])
def test_kernel_values_and_gradients_equal_a_float64_loop(shape):
    check(shape, "tpu", start=shape[2] == 2)


@pytest.mark.slow
@settings(max_examples=8)
@given(
    shape=st.tuples(
        st.integers(1, 2), st.integers(1, 300), st.integers(1, 3), st.sampled_from([16, 64, 96, 128, 160, 256, 352])
    ),
    start=st.booleans(),
    seed=st.integers(0, 10),
)
def test_kernel_equals_a_float64_loop_for_any_shape(shape, start, seed):
    check(shape, "tpu", seed, start)


@pytest.mark.slow
def test_kernel_equals_a_float64_loop_where_gate_blocks_are_grown_by_zeros():
    assert GateTiles(4, 352).width == 384
    check((1, 20, 4, 352), "tpu", start=False)


@pytest.mark.slow
def test_time_longer_than_a_block_carries_state_and_gradients_on(monkeypatch):
    import models.kernels.rg_lru_tpu as kernel

    monkeypatch.setattr(kernel, "BLOCK", 256)
    check((2, 700, 1, 128), "tpu", start=False)


def test_bfloat16_kernel_is_a_float32_recurrence_between_rounded_ends():
    """h and states as exact as their format; gradients of u and of the weights also round dz before its products.

    The first half of the channels has a = 0.99999, which bfloat16 would round to 1: the multiplier 0.0045 would vanish.
    """
    arguments = list(problem(1, 64, 1, 128, dtype=jnp.bfloat16))
    arguments[6] = np.where(np.arange(128) < 64, -13.5, arguments[6])
    ours = run(arguments, jnp.bfloat16, "tpu")
    exact = dict(zip(NAMES, reference(*arguments), strict=True))
    np.testing.assert_allclose(ours["h"], exact["h"], rtol=2**-8, atol=1e-5)
    for name in ("h_last", "db_input", "db_a", "da_param", "dh0"):
        np.testing.assert_allclose(ours[name], exact[name], rtol=1e-4, atol=1e-4, err_msg=name)
    np.testing.assert_allclose(ours["da_param"][:64], exact["da_param"][:64], rtol=1e-2, atol=1e-6)
    for name in ("du", "dw_input", "dw_a"):
        assert np.linalg.norm(ours[name] - exact[name]) < 2**-8 * np.linalg.norm(exact[name]), name


@pytest.mark.parametrize(
    ("blocks", "width", "lanes", "number"),
    [
        (16, 64, 256, 4),
        (16, 96, 384, 4),
        (10, 96, 384, 3),  # two blocks of zeros at the end
        (16, 128, 256, 8),
        (16, 160, 640, 4),
        (10, 256, 256, 10),
        (8, 320, 640, 4),
        (16, 352, 384, 16),  # each block grown by 32 channels of zeros
        (3, 100, 384, 1),
        (16, 100, 256, 8),
        (1, 352, 384, 1),
        (16, 512, 512, 16),
    ],
)
def test_tiles_hold_every_gate_block_once(blocks, width, lanes, number):
    tiles = GateTiles(blocks, width)
    assert (tiles.lanes, tiles.number) == (lanes, number)
    w = np.random.default_rng(0).normal(size=(blocks, width, width)).astype(np.float32)
    u = np.random.default_rng(1).normal(size=(3, blocks * width)).astype(np.float32)
    panels = tiles.weights(jnp.asarray(w))
    padded = np.asarray(tiles.channels(jnp.asarray(u))).reshape(3, number, lanes)
    z = np.stack([np.asarray(tiles.multiply(jnp.asarray(padded[:, n]), panels[n])) for n in range(number)], axis=1)
    expected = np.einsum("bgi,gij->bgj", u.reshape(3, blocks, width), w).reshape(3, -1)
    np.testing.assert_allclose(tiles.unpadded(jnp.asarray(z.reshape(3, -1))), expected, atol=1e-4)
    assert np.array_equal(tiles.unpadded(tiles.channels(jnp.asarray(u))), u)
