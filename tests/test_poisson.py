"""Poisson samples have the distribution that the accounting assumes, and everybody draws the same."""

import numpy as np
import pytest
from scipy import stats

from data import poisson

SECRET = b"a secret of the tests"


@pytest.fixture(scope="module")
def samples():
    """bool [steps, units]: 4000 steps of 120 units at rate 0.1."""
    taken = np.zeros((4000, 120), bool)
    for step, row in enumerate(taken):
        row[poisson.drawn(SECRET, step, 120, 0.1)] = True
    return taken


def extreme(counts: np.ndarray, trials: int, rate: float) -> float:
    """The least probability of a count so far from its mean on its side, times how many counts there are."""
    side = np.minimum(stats.binom.cdf(counts, trials, rate), stats.binom.sf(counts - 1, trials, rate))
    return float(2 * side.min() * counts.size)


def test_every_unit_is_in_as_often_as_the_rate_says(samples):
    counts = samples.sum(0)
    assert extreme(counts, 4000, 0.1) > 0.01
    spread = ((counts - 400) ** 2 / (4000 * 0.1 * 0.9)).sum()
    assert 0.005 < stats.chi2.sf(spread, 120) < 0.995


def test_units_are_drawn_independently_of_one_another(samples):
    together = (samples.T.astype(int) @ samples)[np.triu_indices(120, 1)]
    assert extreme(together, 4000, 0.01) > 0.01
    normed = (samples - 0.1) / 0.3
    correlations = (normed.T @ normed)[np.triu_indices(120, 1)] / np.sqrt(4000)
    assert stats.kstest(correlations, "norm").pvalue > 0.005


def test_steps_are_drawn_independently_of_one_another(samples):
    for lag in (1, 2, 7):
        again = int((samples[lag:] & samples[:-lag]).sum())
        assert extreme(np.array(again), 120 * (4000 - lag), 0.01) > 0.01


def test_sizes_are_binomial(samples):
    sizes = samples.sum(1)
    edges = np.arange(5, 20)
    found = np.histogram(sizes, [-1, *edges, 121])[0]
    expected = 4000 * np.diff(stats.binom.cdf([-2, *(edges - 1), 120], 120, 0.1))
    assert stats.chisquare(found, expected).pvalue > 0.005


def test_a_step_is_the_same_everywhere_and_other_steps_and_secrets_are_others():
    one = poisson.drawn(SECRET, 3, 1000, 0.2)
    assert one.dtype == np.int64
    assert (np.diff(one) > 0).all()
    assert one[0] >= 0
    assert one[-1] < 1000
    np.testing.assert_array_equal(one, poisson.drawn(SECRET, 3, 1000, 0.2))
    for secret, step in ((SECRET, 4), (SECRET + b"0", 3), (b"", 3)):
        other = poisson.drawn(secret, step, 1000, 0.2)
        assert 0 < len(np.intersect1d(one, other)) < 100  # 40 by chance
    # A run that goes on under another version of anything must draw what it would have drawn.
    assert poisson.drawn(b"golden", 17, 50, 0.1).tolist() == [4, 15, 34]


def test_blocks_of_coins_are_different_coins():
    units = 2 * poisson.BLOCK + 5
    taken = np.zeros(units, bool)
    taken[poisson.drawn(SECRET, 0, units, 0.5)] = True
    assert taken[-5:].any()
    equal = int((taken[: poisson.BLOCK] == taken[poisson.BLOCK : -5]).sum())
    assert extreme(np.array(equal), poisson.BLOCK, 0.5) > 0.01
    np.testing.assert_array_equal(np.flatnonzero(taken[:100]), poisson.drawn(SECRET, 0, 100, 0.5))


def test_ends_of_the_rate():
    assert poisson.drawn(SECRET, 0, 7, 1.0).tolist() == list(range(7))
    assert poisson.drawn(SECRET, 0, 7, 1e-18).tolist() == []
