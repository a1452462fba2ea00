"""What the paper of the LRU proves or shows of its parameters (arXiv 2303.06349), in seconds. docs/studies/lru.md has the figures."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_lru import layer, optax_promotes, values_of

from configs.schema import LRUConfig
from models.lru import LRU
from models.params import Init, path_name
from sharding.rules import Rules

RATES = (1e-4, 3e-4, 1e-3, 3e-3)
SOLVED = 1e-2  # of the loss at the start
PROBLEMS = 400
SEEDS = (20, 21, 22)
BANDS = ((0.0, 0.1), (0.2, 0.3), (0.4, 0.5))  # of phases, in units of pi


def growth(values: dict[str, np.ndarray], seed: int) -> float:
    """E|x|**2 over E|B u|**2 after 2000 tokens of white noise, in a loop over time (tests/test_lru.py has the layer's own)."""
    rng = np.random.default_rng(seed)
    eigenvalues = np.exp(-np.exp(values["nu_log"]) + 1j * np.exp(values["theta_log"]))
    b = values["to_state/kernel"][:, 0] + 1j * values["to_state/kernel"][:, 1]
    gamma = np.exp(values["gamma_log"]) if "gamma_log" in values else 1.0
    x = np.zeros((4, len(eigenvalues)), complex)
    for _ in range(2000):
        x = eigenvalues * x + gamma * (rng.normal(size=(4, len(b))) @ b)
    return np.mean(np.abs(x) ** 2) / np.mean(np.sum(np.abs(b) ** 2, axis=0))


@pytest.mark.parametrize(("low", "high", "gain"), [(0.0, 0.99, 4.0), (0.9, 0.99, 13.3), (0.9, 0.999, 24.2)])
def test_gamma_keeps_white_noise_at_its_size_and_without_it_a_state_grows(low, high, gain, one_device):
    """Proposition 3.3: by log((1 - r_min**2) / (1 - r_max**2)) / (r_max**2 - r_min**2); the mean of ten draws of 500 modes."""
    assert np.log((1 - low**2) / (1 - high**2)) / (high**2 - low**2) == pytest.approx(gain, rel=0.01)
    for recurrence, expected, within in (("ring", gain, 0.15), ("lru", 1.0, 0.05)):
        config = LRUConfig(width=8, state_size=500, recurrence=recurrence, r_min=low, r_max=high)
        drawn = jax.jit(lambda key, config=config: LRU(config, Init(key, Rules().spec)))
        found = [growth(values_of(drawn(jax.random.key(seed))), seed) for seed in range(10)]
        print(
            f"[{low}, {high}] {recurrence}: {np.mean(found):.2f} of {expected}, from {min(found):.2f} to {max(found):.2f}"
        )
        assert np.mean(found) == pytest.approx(expected, rel=within)


@pytest.mark.parametrize(("recurrence", "stable"), [("lru", True), ("diagonal", False)])
def test_a_thousand_wild_steps_leave_the_exponential_form_stable_and_the_other_not(recurrence, stable, one_device):
    """Section 3.3: Adam with a rate of 0.1 on gradients that are noise."""
    unit, rng = layer(LRUConfig(width=2, state_size=64, recurrence=recurrence)), np.random.default_rng(3)
    for name in ("nu_log", "theta_log") if stable else ("real", "imaginary"):
        parameter = getattr(unit, name)
        value, first, second = np.asarray(parameter[...], np.float64), 0.0, 0.0
        for step in range(1, 1001):
            noise = rng.normal(size=64)
            first, second = 0.9 * first + 0.1 * noise, 0.999 * second + 0.001 * noise**2
            value = value - 0.1 * (first / (1 - 0.9**step)) / np.sqrt(second / (1 - 0.999**step))
        parameter[...] = jnp.float32(value)
    modulus = np.abs(np.asarray(unit.eigenvalues(), np.complex128))
    assert np.isfinite(modulus).all()
    assert (modulus.max() < 1) == stable, modulus.max()


def shares_solved(recurrence: str) -> np.ndarray:
    """Of 400 problems min |z**100 - z_0**100|**2 / 2, for each band, seed and rate the share that 500 steps of Adam solve
    (section 3.2).

    z starts with z_0's modulus, and a phase 0.005 to 0.03 off; phases of z_0 are in a band. Adam treats each number by itself,
    so all problems are one array.
    """
    shape = (len(BANDS), len(SEEDS), len(RATES), PROBLEMS)
    draws = np.stack([np.random.default_rng(seed).uniform(size=(4, PROBLEMS)) for seed in SEEDS], axis=1)
    u = np.broadcast_to(draws[:, None, :, None], (4, *shape)).reshape(4, -1)
    low, high = np.broadcast_to(np.array(BANDS).T[:, :, None, None, None], (2, *shape)).reshape(2, -1)
    nu, theta = 0.001 + 0.019 * u[0], np.pi * (low + (high - low) * u[1])
    start = np.abs(theta + np.sign(u[2] - 0.5) * (0.005 + 0.025 * u[3]))
    rates = jnp.asarray(np.broadcast_to(np.array(RATES)[:, None], shape).ravel(), jnp.float32)
    target = jnp.asarray(np.exp(100 * (-nu + 1j * theta)), jnp.complex64)
    unit = layer(LRUConfig(width=1, state_size=len(nu), recurrence=recurrence))
    if recurrence == "diagonal":
        names, starts = ("real", "imaginary"), (np.exp(-nu) * np.cos(start), np.exp(-nu) * np.sin(start))
    else:
        names, starts = ("nu_log", "theta_log"), (np.log(nu), np.log(start))

    def losses(values):
        named = dict(zip(names, values, strict=True))
        filled = jax.tree_util.tree_map_with_path(lambda path, leaf: named.get(path_name(path), leaf), unit)
        error = filled.eigenvalues() ** 100 - target
        return 0.5 * (jnp.square(error.real) + jnp.square(error.imag))

    def step(carry, _):
        values, moments = carry
        updates, moments = optimizer.update(jax.grad(lambda values: jnp.sum(losses(values)))(values), moments)
        return (tuple(v - rates * u for v, u in zip(values, updates, strict=True)), moments), None

    optimizer, values = optax.scale_by_adam(), tuple(jnp.asarray(value, jnp.float32) for value in starts)
    with optax_promotes():
        end = jax.jit(lambda values: jax.lax.scan(step, (values, optimizer.init(values)), length=500)[0][0])(values)
    solved = np.asarray(losses(end)) < SOLVED * np.asarray(losses(values))
    return solved.reshape(shape).mean(axis=3)


def test_powers_are_learned_in_the_exponential_form_and_less_surely_by_parts(one_device):
    """Where phases are near pi / 4, with the better rate of each; the criterion stood before these seeds were run."""
    polar, parts = shares_solved("exponential"), shares_solved("diagonal")
    for name, found in (("exponential form", polar), ("real and imaginary part", parts)):
        for band, shares in zip(BANDS, found, strict=True):
            print(f"{name}, phases {band} pi, a seed a row: {np.round(shares, 4).tolist()}")
    best, other = polar[1].max(axis=1), parts[1].max(axis=1)
    assert np.all(best >= 0.99), best
    assert np.all(best - other >= 0.03), other
