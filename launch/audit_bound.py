"""What one training shows of its privacy: a lower bound on epsilon from guesses at who was in it.

Steinke, Nasr and Jagielski 2023, "Privacy Auditing with One (1) Training Run", arXiv 2305.08846. Of m canaries each is
in by a fair coin of its own. Were the training (epsilon, delta)-DP, guesses at r of them would hardly be right more
often than randomised response: v correct ones reject what makes them too improbable. Pure functions of numbers, no jax.
"""

import numpy as np

CONFIDENCE = 0.95
SHARES = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02)  # of the canaries, guessed at: chosen before any score is seen
TOLERANCE = 1e-6  # of a bound


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """At least the probability of so many correct guesses under (epsilon, delta)-DP (theorem 5.2).

    beta + 2 m delta alpha, with W ~ Binomial(r, e^epsilon / (1 + e^epsilon)), beta = P(W >= v) and
    alpha = max over i of P(v > W >= v - i) / i.
    """
    mass = binomial(guesses, epsilon)
    beta = mass[correct:].sum()
    below = np.cumsum(mass[:correct][::-1])  # [i - 1]: P(v > W >= v - i); more than v are no more
    alpha = (below / np.arange(1, correct + 1)).max(initial=0.0)
    return float(min(1.0, beta + 2 * canaries * delta * alpha))


def binomial(trials: int, epsilon: float) -> np.ndarray:
    """float64 [trials + 1]: the probability of each number of successes, each with odds e^epsilon."""
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, trials + 1)))])  # of factorials
    wins = np.arange(trials + 1)
    choices = logs[-1] - logs - logs[::-1]
    return np.exp(choices - (trials - wins) * epsilon - trials * np.log1p(np.exp(-epsilon)))


def lower_bound(canaries: int, guesses: int, correct: int, delta: float, confidence: float = CONFIDENCE) -> float:
    """The largest epsilon that the observation rejects, 0 if none: with this confidence the training is not
    (epsilon, delta)-DP for it, nor then for any smaller one. At most TOLERANCE below."""
    if not 0 <= correct <= guesses <= canaries:
        raise ValueError(f"{correct} correct of {guesses} guesses at {canaries} canaries cannot be")

    def rejected(epsilon: float) -> bool:
        return p_value(canaries, guesses, correct, epsilon, delta) <= 1 - confidence

    low, high = 0.0, 1.0
    if not rejected(low):
        return low
    while rejected(high):
        low, high = high, 2 * high
    while high - low > TOLERANCE:
        middle = (low + high) / 2
        low, high = (middle, high) if rejected(middle) else (low, middle)
    return low


def best_guesses(
    scores: np.ndarray, included: np.ndarray, delta: float, confidence: float = CONFIDENCE
) -> tuple[int, int, float]:
    """(guesses r, correct v, bound) of the number of guesses that bounds epsilon best.

    scores: float [m], the higher the likelier in; included: bool [m]. Half of the guesses say "in" of the highest
    scores, the other half "out" of the lowest. The best of several bounds holds if each is wrong less often by how many
    there are (Bonferroni). Equal scores are taken in the order of the canaries, which must not depend on who was in.
    """
    order = np.argsort(scores, kind="stable")
    halves = sorted({max(1, round(share * len(scores) / 2)) for share in SHARES if len(scores) > 1})
    halves = [half for half in halves if 2 * half <= len(scores)]
    best = (0, 0, 0.0)
    for half in halves:
        correct = int(included[order[-half:]].sum() + (~included[order[:half]]).sum())
        bound = lower_bound(len(scores), 2 * half, correct, delta, 1 - (1 - confidence) / len(halves))
        if best[0] == 0 or bound >= best[2]:
            best = (2 * half, correct, bound)
    return best
