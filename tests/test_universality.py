"""The study of universality: its states, maps and models against loops, closed forms, scipy and scikit-learn; its verdicts
against figures made by hand."""

import copy
import dataclasses
import itertools
import json
import math
import xml.etree.ElementTree as xml

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp
from sklearn.linear_model import LinearRegression

from configs.schema import ConfigError
from launch import study as command
from launch.studies import STUDIES, universality
from launch.studies.linear_states import (
    TARGETS,
    eigenvalues,
    fir,
    fourier,
    recovered,
    states,
    unreachable,
    van_der_pol,
    vandermonde,
    volterra,
)
from launch.studies.shared_mlp import LINEAR, learned, mlp, whitened
from launch.studies.universality import DISK, FULL, MODES, RING, SMALL, criteria, slope


@pytest.mark.parametrize("real", [False, True])
def test_the_state_is_the_vandermonde_map_of_the_inputs_so_far(real):
    """A loop over time in float64, and the matrix of powers."""
    eigenvalue, gamma = eigenvalues(3, 6, RING, real)
    u = np.random.default_rng(0).normal(size=(2, 20))
    wide, scale = np.asarray(eigenvalue).astype(complex), np.asarray(gamma).astype(float)
    x, loop = np.zeros((2, 6), complex), []
    for k in range(20):
        x = wide * x + scale * u[:, k, None]
        loop.append(x)
    loop = np.stack(loop, axis=1)
    numbers = loop.real if real else np.concatenate([loop.real, loop.imag], axis=-1)
    np.testing.assert_allclose(states(eigenvalue, gamma, u), numbers, atol=1e-5)
    for k in (1, 7, 20):
        np.testing.assert_allclose(vandermonde(eigenvalue, gamma, k) @ u[0, :k], numbers[0, k - 1], atol=1e-12)


def test_eigenvalues_are_those_of_an_lru():
    """Uniform in the area of the ring, so that the mean of |lambda|**2 is the middle of its range; gamma is normalising."""
    for ring, real in itertools.product((DISK, RING), (False, True)):
        eigenvalue, gamma = (np.asarray(one, np.complex128) for one in eigenvalues(0, 4000, ring, real))
        square = np.abs(eigenvalue) ** 2
        assert ring[0] <= np.abs(eigenvalue).min()
        assert np.abs(eigenvalue).max() <= ring[1]
        width = ring[1] ** 2 - ring[0] ** 2
        assert abs(square.mean() - (ring[0] ** 2 + ring[1] ** 2) / 2) < 5 * width / math.sqrt(12 * 4000)
        np.testing.assert_allclose(gamma.real**2, 1 - square, atol=1e-6)
        assert abs(eigenvalue.sum() / np.abs(eigenvalue).sum()) < 0.08  # as many on one side as on the other
        assert (np.abs(eigenvalue.imag).max() > 0) != real


def test_equispaced_nodes_on_the_unit_circle_lose_nothing():
    """V is then a Fourier transform: all its singular values are sqrt(L)."""
    length = 32
    nodes = np.exp(2j * np.pi * np.arange(length) / length)
    v = vandermonde(nodes, np.ones(length), length)
    np.testing.assert_allclose(np.linalg.svd(v, compute_uv=False), math.sqrt(length), rtol=1e-12)
    u = np.random.default_rng(1).normal(size=(1, length))
    last = states(jnp.asarray(nodes, jnp.complex64), jnp.ones(length), u)[0, -1]
    np.testing.assert_allclose(v.T @ last / length, u[0], atol=1e-5)


def test_a_state_knows_as_many_dimensions_as_it_has_numbers():
    """Below P/2 complex modes the rest of Gaussian inputs is out of reach, sqrt(1 - 2N/P); from P/2 on all are decoded."""
    psi = fourier(0, 8, 64)
    np.testing.assert_allclose(psi.T @ psi, np.eye(8), atol=1e-12)
    assert unreachable(2, 8) == pytest.approx(math.sqrt(3) / 2)
    for modes in (1, 3):
        errors = [recovered(seed, psi, modes, RING, False)[0] for seed in range(4)]
        assert np.mean(errors) == pytest.approx(math.sqrt(1 - 2 * modes / 8), rel=0.05)
    assert recovered(0, psi, 8, RING, False)[0] < 1e-3
    assert recovered(0, np.eye(16), 8, RING, True)[0] > 0.5


def test_the_targets_are_their_formulas():
    u = np.random.default_rng(0).normal(size=(2, 30))
    taps = np.array([0.5, -1.0, 0.25])
    np.testing.assert_allclose(fir(u, taps)[1], np.convolve(u[1], taps)[:30], atol=1e-12)
    for k in range(30):
        assert volterra(u)[0, k] == pytest.approx(u[0, k - 3] * u[0, k - 7] if k >= 7 else 0.0)


def test_van_der_pol_is_scipys():
    """Forced by inputs that are held; strongly enough that the damping changes its sign."""
    u = np.random.default_rng(0).normal(size=(1, 64)) * 2
    z, all_ = [0.0, 0.0], []
    for held in u[0]:
        solved = solve_ivp(
            lambda t, z, held=held: [z[1], (1 - z[0] ** 2) * z[1] - z[0] + held], (0, 0.1), z, rtol=1e-10
        )
        z = solved.y[:, -1]
        all_.append(z)
    assert np.abs(np.array(all_)[:, 0]).max() > 1
    np.testing.assert_allclose(van_der_pol(u)[0], all_, atol=1e-3)
    fine = van_der_pol(np.repeat(u, 5, axis=1), 0.02)[0, 4::5]
    np.testing.assert_allclose(fine, all_, atol=1e-5)  # of fourth order: a fifth of the step, a 600th of the error


def test_whitening_keeps_every_linear_readout():
    """Covariance 1 over what it was taken from; least squares after it is scikit-learn's before it."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(50, 10, 4)) @ rng.normal(size=(4, 4)) + 3).astype(np.float32)
    white = whitened(x, 40)
    rows, others = white[:40].reshape(-1, 4), white[40:].reshape(-1, 4)
    np.testing.assert_allclose(rows.T @ rows / len(rows), np.eye(4), atol=1e-4)
    np.testing.assert_allclose(rows.mean(axis=0), 0, atol=1e-5)
    y = np.sin(x).sum(axis=-1).reshape(-1, 1)
    y = ((y - y[:400].mean()) / y[:400].std()).astype(np.float32)
    flat = x.reshape(-1, 4)
    score = LinearRegression().fit(flat[:400], y[:400]).score(flat[400:], y[400:])
    found = learned((rows, y[:400]), (others, y[400:]), LINEAR, 0, 1)
    assert found**2 == pytest.approx(1 - score, abs=1e-4)
    twice = np.concatenate([x, x[..., :1]], axis=-1)  # a direction without any variance is left out
    assert whitened(twice, 40).shape == (50, 10, 4)


def test_the_mlp_is_its_formula_and_learns_what_least_squares_cannot():
    rng = np.random.default_rng(0)
    weights = {
        "in": rng.normal(size=(3, 5)),
        "bias": rng.normal(size=5),
        "out": rng.normal(size=(5, 2)),
        "shift": [1, 2],
    }
    weights = {name: np.asarray(one, np.float32) for name, one in weights.items()}
    x = rng.normal(size=(4, 3)).astype(np.float32)
    z = x @ weights["in"] + weights["bias"]
    z = 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    wide = jax.tree.map(jnp.asarray, weights)
    np.testing.assert_allclose(mlp(wide, jnp.asarray(x)), z @ weights["out"] + weights["shift"], atol=1e-5)

    x = rng.normal(size=(3000, 2)).astype(np.float32)
    y = x[:, :1] * x[:, 1:]
    given, judged = (x[:2000], y[:2000]), (x[2000:], y[2000:])
    assert learned(given, judged, LINEAR, 0, 300) > 0.95
    with jax.numpy_dtype_promotion("standard"):  # optax counts in int32
        found = learned(given, judged, 32, 0, 300)
        assert found < 0.4
        assert learned(given, judged, 32, 0, 300) == found


def made(sizes=SMALL):
    """Figures of a study in which all went as predicted."""
    reconstruction = []
    for ring, nodes, length in itertools.product((DISK, RING), MODES, sizes.lengths):
        good = nodes == "complex, N = L"
        error, condition = (1e-3, 1e3) if good else (0.5, 1e9)
        one = {"nodes": nodes, "moduli": list(ring), "length": length, "errors": [error, error]}
        reconstruction.append({**one, "conditions": [condition / 10 if ring == RING else condition] * 2})
    thresholds = [
        {"dimensions": p, "real": real, "numbers": 2 * n, "errors": [max(unreachable(2 * n, p), 1e-3)], "bound": 0.0}
        for p, real, n in itertools.product((sizes.dimensions, sizes.length), (False, True), sizes.threshold_modes)
    ]
    most, widest, maps = sizes.modes[-1], sizes.widths[-1], []
    linear = {"FIR": 0.01, "Volterra": 1.0, "Van der Pol": 0.5}
    for target in TARGETS:
        arms = [(False, n, LINEAR, linear[target]) for n in sizes.modes]
        arms += [(False, n, widest, widest**-0.5 * most / n) for n in sizes.modes]
        arms += [(False, most, d, d**-0.5) for d in sizes.widths[:-1]]
        arms += [(True, 2 * most, LINEAR, 0.9), (True, 2 * most, widest, 0.8)]
        maps += [{"target": target, "real": r, "modes": n, "width": d, "errors": [e]} for r, n, d, e in arms]
    figures = {
        "sizes": json.loads(json.dumps(dataclasses.asdict(sizes))),
        "reconstruction": reconstruction,
        "thresholds": thresholds,
        "maps": maps,
    }
    return {**figures, "criteria": criteria(figures)}


def test_every_criterion_is_met_by_what_was_predicted():
    for sizes in (SMALL, FULL):
        rows = made(sizes)["criteria"]
        assert len(rows) == 19
        assert all(row["met"] for row in rows)


SPOILT = {  # what is changed in one record -> the criteria that then are not met
    ("reconstruction", ("real, N = 2L", 0.0, 64), "errors", 0.2): ["real modes, N = 2L"],
    ("reconstruction", ("complex, N = L", 0.9, 128), "errors", 0.02): ["complex modes, N = L on the ring"],
    ("reconstruction", ("real, N = 2L", 0.0, 16), "conditions", 5e4): ["condition of real"],
    ("reconstruction", ("complex, N = L", 0.9, 32), "conditions", 2e3): ["condition of complex"],
    ("thresholds", (8, False, 6), "errors", 0.005): ["inputs in P = 8"],
    ("thresholds", (8, False, 16), "errors", 0.3): ["inputs in P = 8"],
    ("thresholds", (64, False, 48), "errors", 0.05): ["white noise: least error at N < L/2"],
    ("maps", ("FIR", 16, LINEAR), "errors", 0.2): ["FIR: R2 of a linear"],
    ("maps", ("Volterra", 16, LINEAR), "errors", 0.5): ["Volterra: R2 of a linear"],
    ("maps", ("Van der Pol", 16, LINEAR), "errors", 0.05): ["Van der Pol: R2 of a linear"],
    ("maps", ("Volterra", 16, 32), "errors", 0.4): ["Volterra: largest ratio"],
    ("maps", ("FIR", 4, 512), "errors", 0.1): ["FIR: error at N = 4"],
    ("maps", ("Van der Pol", 16, 512), "errors", 0.4): [
        "Van der Pol: largest ratio",
        "Van der Pol: R2 at D = 512",
        "Van der Pol: error at N = 4",
    ],
}


@pytest.mark.parametrize("change", SPOILT, ids=str)
def test_a_criterion_that_is_not_met_is_reported(change):
    panel, which, field, value = change
    keys = {
        "reconstruction": lambda one: (one["nodes"], one["moduli"][0], one["length"]),
        "thresholds": lambda one: (one["dimensions"], one["real"], one["numbers"]),
        "maps": lambda one: (one["target"], one["modes"], one["width"]),
    }
    figures = copy.deepcopy(made())
    [one] = [one for one in figures[panel] if keys[panel](one) == which]
    one[field] = [value]
    missed = [row["criterion"] for row in criteria(figures) if not row["met"]]
    assert len(missed) == len(SPOILT[change])
    assert all(what.startswith(start) for what, start in zip(missed, SPOILT[change], strict=True))


def test_white_noise_that_is_never_recovered_is_reported():
    figures = copy.deepcopy(made())
    for one in figures["thresholds"]:
        one["errors"] = [0.9 if one["dimensions"] == 64 else one["errors"][0]]
    assert [row["criterion"] for row in criteria(figures) if not row["met"]] == [
        "white noise: least error at N >= L/2 < 0.1"
    ]


def test_the_slope_is_that_of_a_power():
    assert slope([2, 8, 32], [3 * d**-0.5 for d in (2, 8, 32)]) == pytest.approx(-0.5)


@pytest.mark.parametrize("words", [[], ["--full"]])
def test_a_study_without_runs_measures_tabulates_and_draws(words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(universality, "measure", made)
    assert command.main(["universality", "--to", str(tmp_path / "s"), *words]) == 0
    told = capsys.readouterr().out
    assert f"R2 at D = {8192 if words else 512} > 0.9" in told
    assert "error falls as D to the power -0.50" in told
    assert "  NO" not in told
    assert json.loads((tmp_path / "s" / "figures.json").read_text())["sizes"]["length"] == (256 if words else 64)
    drawn = {element.text for element in xml.parse(tmp_path / "s" / "plot.svg").iter() if element.text}
    assert {"complex, N = L", "Volterra, D^-0.50", "white noise, real"} <= drawn


def test_a_study_without_runs_has_nothing_to_override(tmp_path):
    assert STUDIES["universality"].configs == ()
    with pytest.raises(ConfigError, match=r"--trainer.steps 4 is not for the study universality"):
        command.main(["universality", "--to", str(tmp_path / "s"), "--trainer.steps", "4"])
    assert not (tmp_path / "s").exists()
