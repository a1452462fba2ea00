"""The linear recurrence, whoever computes it, equals a float64 loop: values and every gradient."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from models.scan import linear_scan

IMPLEMENTATIONS = ["sequential", "associative", "tpu"]


def loop(a, x, h0, reverse):
    """h and the last state, one step after the other."""
    h, out = h0, np.zeros_like(x)
    for t in order(x, reverse):
        h = a[:, t] * h + x[:, t]
        out[:, t] = h
    return out, h


def loop_gradients(a, x, h0, dh, dh_last, reverse):
    """Cotangents of a, x and h0, each step's from the step after it."""
    h, _ = loop(a, x, h0, reverse)
    steps = order(x, reverse)
    da, dx, c = np.zeros_like(a), np.zeros_like(x), dh_last
    for i in reversed(range(len(steps))):
        t = steps[i]
        g = dh[:, t] + c
        dx[:, t], da[:, t], c = g, g * (h[:, steps[i - 1]] if i else h0), g * a[:, t]
    return da, dx, c


def order(x, reverse):
    return list(range(x.shape[1]))[:: -1 if reverse else 1]


def problem(shape, dtype, seed, resets=True):
    """a, x, h0, dh and dh_last in float64 (complex128), already rounded to `dtype` where they will be."""
    rng = np.random.default_rng(seed)
    batch, _, width = shape

    def values(*shape):
        real = rng.normal(size=shape)
        return real + 1j * rng.normal(size=shape) if dtype == jnp.complex64 else real

    a = rng.uniform(0, 1, shape)
    if dtype == jnp.complex64:
        a = a * np.exp(1j * rng.uniform(-3, 3, shape))
    if resets:
        a = np.where(rng.uniform(size=(*shape[:2], 1)) < 0.1, 0, a)
    rounded = [np.asarray(jnp.asarray(v).astype(dtype)).astype(v.dtype) for v in (a, values(*shape), values(*shape))]
    a, x, dh = rounded
    return a, x, values(batch, width), dh, values(batch, width)


def run(a, x, h0, dh, dh_last, dtype, reverse, implementation):
    """Values and gradients (h, h_last, da, dx, dh0) as we compute them."""
    state = jnp.complex64 if dtype == jnp.complex64 else jnp.float32

    def both(a, x, h0, dh, dh_last):
        out, pullback = jax.vjp(lambda *t: linear_scan(*t, reverse=reverse, implementation=implementation), a, x, h0)
        return *out, *pullback((dh, dh_last))

    dtypes = (dtype, dtype, state, dtype, state)
    arrays = [jnp.asarray(v).astype(d) for v, d in zip((a, x, h0, dh, dh_last), dtypes, strict=True)]
    with pltpu.force_tpu_interpret_mode() if implementation == "tpu" else contextlib.nullcontext():
        out = jax.jit(both)(*arrays)
    assert [v.dtype for v in out] == [dtype, state, dtype, dtype, state]
    return [np.asarray(v.astype(state)) for v in out]


def check(shape, dtype, reverse, implementation, seed=0, rtol=0.0, atol=2e-5):
    a, x, h0, dh, dh_last = problem(shape, dtype, seed)
    ours = run(a, x, h0, dh, dh_last, dtype, reverse, implementation)
    exact = [*loop(a, x, h0, reverse), *loop_gradients(a, x, h0, dh, dh_last, reverse)]
    for name, ours_, exact_ in zip(("h", "h_last", "da", "dx", "dh0"), ours, exact, strict=True):
        np.testing.assert_allclose(ours_, exact_, rtol=rtol, atol=atol, err_msg=name)


def test_the_loops_gradients_are_its_finite_differences():
    a, x, h0, dh, dh_last = problem((1, 5, 2), jnp.float32, 0)
    for reverse in (False, True):
        gradients = loop_gradients(a, x, h0, dh, dh_last, reverse)

        def loss(*inputs, reverse=reverse):
            h, last = loop(*inputs, reverse)
            return np.sum(h * dh) + np.sum(last * dh_last)

        for which, gradient in enumerate(gradients):
            for index in np.ndindex(gradient.shape):
                up, down = [v.copy() for v in (a, x, h0)], [v.copy() for v in (a, x, h0)]
                up[which][index] += 1e-6
                down[which][index] -= 1e-6
                assert (loss(*up) - loss(*down)) / 2e-6 == pytest.approx(gradient[index], abs=1e-7)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.complex64])
@pytest.mark.parametrize("implementation", ["sequential", "associative", None])
def test_off_tpu_values_and_gradients_equal_a_float64_loop(implementation, dtype, reverse):
    check((2, 13, 3), dtype, reverse, implementation)


@pytest.mark.parametrize(
    ("shape", "dtype", "reverse"),
    [
        ((2, 70, 130), jnp.float32, False),  # neither time nor channels fill the last tile
        ((1, 130, 48), jnp.float32, True),
        ((1, 64, 128), jnp.complex64, False),
    ],
)
def test_kernel_values_and_gradients_equal_a_float64_loop(shape, dtype, reverse):
    check(shape, dtype, reverse, "tpu")


@pytest.mark.slow
@settings(max_examples=25)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 200), st.integers(1, 260)),
    dtype=st.sampled_from([jnp.float32, jnp.complex64]),
    reverse=st.booleans(),
    seed=st.integers(0, 10),
)
def test_kernel_equals_a_float64_loop_for_any_shape(shape, dtype, reverse, seed):
    check(shape, dtype, reverse, "tpu", seed)


@settings(max_examples=10)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 5)),
    dtype=st.sampled_from([jnp.float32, jnp.complex64]),
    reverse=st.booleans(),
    implementation=st.sampled_from(["sequential", "associative"]),
)
def test_any_shape_equals_a_float64_loop(shape, dtype, reverse, implementation):
    check(shape, dtype, reverse, implementation)


def test_time_longer_than_a_block_carries_the_state_on(monkeypatch):
    import models.kernels.linear_tpu as kernel

    monkeypatch.setattr(kernel, "BLOCK_BYTES", 64 * 128 * 4)  # blocks of 64 steps, so three of them
    for reverse in (False, True):
        check((1, 192, 128), jnp.float32, reverse, "tpu")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_costs_only_the_rounding_of_what_is_written(implementation):
    """Sums are float32, so h and dx are off by half a step of bfloat16 (2**-8) and da, made from that h, by two halves."""
    check((1, 64, 128), jnp.bfloat16, False, implementation, rtol=2.01 * 2**-8, atol=1e-5)


def test_no_first_state_is_a_zero_one():
    a, x, h0, _, _ = problem((2, 9, 3), jnp.float32, 0)
    a, x = jnp.asarray(a, jnp.float32), jnp.asarray(x, jnp.float32)
    for ours, zero in zip(linear_scan(a, x), linear_scan(a, x, jnp.zeros(h0.shape)), strict=True):
        assert jnp.array_equal(ours, zero)


def test_two_scans_chained_by_their_state_are_one():
    a, x, h0, _, _ = (jnp.asarray(v, jnp.float32) for v in problem((2, 12, 3), jnp.float32, 0))
    whole, last = linear_scan(a, x, h0)
    first, middle = linear_scan(a[:, :5], x[:, :5], h0)
    second, end = linear_scan(a[:, 5:], x[:, 5:], middle)
    np.testing.assert_allclose(jnp.concatenate([first, second], axis=1), whole, atol=1e-6)
    np.testing.assert_allclose(end, last, atol=1e-6)


def test_the_platform_compiled_for_chooses_the_implementation():
    x = jax.ShapeDtypeStruct((2, 64, 128), jnp.float32)
    program = jax.jit(jax.value_and_grad(lambda a, x: jnp.sum(linear_scan(a, x)[0]))).trace(x, x)
    text = {p: program.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "tpu", "cuda")}
    assert text["tpu"].count("tpu_custom_call") >= 2  # forward and backward
    for platform in ("cpu", "cuda"):
        assert "tpu_custom_call" not in text[platform]
    assert "stablehlo.while" in text["cpu"]
    assert "stablehlo.while" not in text["cuda"]
    assert "stablehlo.while" not in text["tpu"]


def test_wrong_shapes_and_states_are_refused_with_their_values():
    x = jnp.ones((2, 4, 3))
    with pytest.raises(ValueError, match=r"one shape \(B T L\), got \(2, 4, 1\) and \(2, 4, 3\)"):
        linear_scan(jnp.ones((2, 4, 1)), x)
    with pytest.raises(ValueError, match=r"h0 must be float32 \(2, 3\), got bfloat16"):
        linear_scan(x, x, jnp.ones((2, 3), jnp.bfloat16))
