"""The audit's bound is below the true epsilon as often as it says, and not far below."""

import math

import numpy as np
import pytest
from scipy import stats

from launch import audit_bound
from launch.audit_bound import best_guesses, lower_bound


def accuracy(epsilon: float) -> float:
    return 1 / (1 + math.exp(-epsilon))


@pytest.mark.parametrize(("guesses", "correct"), [(1000, 600), (1000, 1000), (100, 60), (37, 30), (20_000, 11_000)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.999])
def test_without_delta_it_is_the_interval_of_clopper_and_pearson(guesses, correct, confidence):
    least = stats.beta.ppf(1 - confidence, correct, guesses - correct + 1)
    expected = max(0.0, math.log(least / (1 - least)))
    assert lower_bound(20_000, guesses, correct, 0.0, confidence) == pytest.approx(expected, abs=1.1e-6)


@pytest.mark.parametrize(
    ("canaries", "guesses", "correct"), [(1000, 1000, 700), (1000, 100, 90), (50, 10, 9), (5, 5, 0)]
)
@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("delta", [0.0, 1e-5, 1e-3])
def test_the_p_value_is_theorem_5_2_spelled_out(canaries, guesses, correct, epsilon, delta):
    wins = stats.binom(guesses, accuracy(epsilon))
    alpha = max((wins.cdf(correct - 1) - wins.cdf(correct - i - 1)) / i for i in range(1, canaries + 1))
    expected = min(1.0, wins.sf(correct - 1) + 2 * canaries * delta * alpha)
    found = audit_bound.p_value(canaries, guesses, correct, epsilon, delta)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-14)


def test_a_larger_delta_bounds_less_and_few_right_guesses_nothing():
    found = [lower_bound(1000, 200, 180, delta) for delta in (0.0, 1e-5, 1e-4, 1e-3, 0.1)]
    assert found == sorted(found, reverse=True)
    assert found[0] - found[1] < 0.02
    assert found[-1] == 0
    for guesses, correct in ((0, 0), (100, 0), (100, 50), (100, 55)):
        assert lower_bound(1000, guesses, correct, 0.0) == 0
    with pytest.raises(ValueError, match="11 correct of 10 guesses at 20 canaries cannot be"):
        lower_bound(20, 10, 11, 0.0)


def released(rng: np.random.Generator, canaries: int, epsilon: float, delta: float) -> tuple[np.ndarray, np.ndarray]:
    """Scores and who was in: each canary's bit by randomised response, and itself with probability delta."""
    included = rng.random(canaries) < 0.5
    told = np.where(rng.random(canaries) < accuracy(epsilon), included, ~included)
    plain = rng.random(canaries) < delta
    scores = np.where(plain, np.where(included, 9.0, -9.0), np.where(told, 1.0, -1.0)) + 0.1 * rng.normal(size=canaries)
    return scores, included


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 3.0])
def test_the_bound_holds_for_randomised_response(epsilon):
    """In at least 95 % of 1000 audits with every canary guessed, within three standard errors; and it is not far."""
    correct = np.random.default_rng(0).binomial(1000, accuracy(epsilon), 1000)
    of_each = {int(v): lower_bound(1000, 1000, int(v), 0.0) for v in np.unique(correct)}
    bounds = np.array([of_each[int(v)] for v in correct])
    assert (bounds <= epsilon).mean() >= 0.95 - 3 * math.sqrt(0.05 * 0.95 / 1000)
    assert np.median(bounds) > 0.7 * epsilon


@pytest.mark.parametrize("delta", [0.0, 1e-5, 0.005])
def test_the_best_of_several_numbers_of_guesses_holds(delta):
    rng = np.random.default_rng(1)
    bounds = np.array([best_guesses(*released(rng, 400, 1.0, delta), delta)[2] for _ in range(300)])
    assert (bounds <= 1.0).mean() >= 0.95
    if delta < 1e-3:
        assert np.median(bounds) > 0.5


def test_scores_that_know_nothing_bound_nothing():
    rng = np.random.default_rng(2)
    bounds = [best_guesses(rng.normal(size=1000), rng.random(1000) < 0.5, 1e-5)[2] for _ in range(100)]
    assert np.mean(np.array(bounds) > 0) <= 0.1
    assert max(bounds) < 0.4
    constant = best_guesses(np.zeros(1000), rng.random(1000) < 0.5, 1e-5)
    assert constant[2] < 0.4


def test_scores_that_know_all_bound_as_much_as_there_are_canaries():
    included = np.random.default_rng(3).permutation(1000) < 500  # or some of 1000 guesses would have to be wrong
    guesses, correct, bound = best_guesses(included.astype(float), included, 0.0)
    assert (guesses, correct) == (1000, 1000)
    assert bound == pytest.approx(-math.log((len(audit_bound.SHARES) / 0.05) ** (1 / 1000) - 1), abs=2e-6)
    assert bound > 5
    assert 3 < best_guesses(included.astype(float), included, 1e-5)[2] < bound


def test_a_few_canaries_that_stand_out_are_best_guessed_alone():
    rng = np.random.default_rng(4)
    included = rng.random(1000) < 0.5
    scores = rng.normal(size=1000)
    known = rng.permutation(1000)[:100]
    scores[known] = np.where(included[known], 10.0, -10.0) + rng.normal(size=100)
    guesses, correct, bound = best_guesses(scores, included, 1e-6)
    assert guesses in (50, 100)
    assert correct >= 0.97 * guesses
    assert bound > 2 * lower_bound(1000, 1000, int(((scores > 0) == included).sum()), 1e-6)


def test_hardly_any_canaries():
    assert best_guesses(np.zeros(0), np.zeros(0, bool), 0.0) == (0, 0, 0.0)
    assert best_guesses(np.zeros(1), np.ones(1, bool), 0.0) == (0, 0, 0.0)
    assert best_guesses(np.array([0.0, 1.0]), np.array([False, True]), 0.0) == (2, 2, 0.0)
