"""Whether pairs differ: permutation tests, bootstrap intervals and Holm's correction; how far answers do, and who is selected.
numpy alone."""

import numpy as np

PERMUTATIONS = 9_999
RESAMPLES = 2_000
COVERAGE = (2.5, 97.5)


def permutation_p(
    differences: np.ndarray, units: np.ndarray, rng: np.random.Generator, permutations: int = PERMUTATIONS
) -> float:
    """P of a mean at least as far from 0 if either member of a pair could as well have been the other.

    differences: float [n]; units: int [n], pairs of one unit are exchanged together. Two-sided; with the observed order as one
    of the permutations, so that P(p <= a) <= a under the null (Phipson and Smyth 2010).
    """
    _, unit = np.unique(units, return_inverse=True)
    sums = np.bincount(unit, differences)
    signs = rng.integers(0, 2, size=(permutations, len(sums))) * 2 - 1
    observed, permuted = abs(sums.sum()), np.abs(signs @ sums)
    slack = 1e-9 * np.abs(sums).sum()  # equal sums are equal, in whichever order they were added
    return float(1 + (permuted >= observed - slack).sum()) / (1 + permutations)


def bootstrap(values: np.ndarray, *factors: np.ndarray, seed: int = 0) -> np.ndarray:
    """Means of `values`, float [n], in RESAMPLES samples, float64 [RESAMPLES].

    Each factor, int [n], says which of its levels (a CV, a name) a value belongs to. Levels of each are drawn with replacement,
    and a value counts as often as all of its levels were drawn together (Owen 2007, the pigeonhole bootstrap).
    """
    rng = np.random.default_rng(seed)
    weights = np.ones((RESAMPLES, len(values)))
    for factor in factors:
        levels, level = np.unique(factor, return_inverse=True)
        weights *= rng.multinomial(len(levels), np.full(len(levels), 1 / len(levels)), size=RESAMPLES)[:, level]
    total = weights.sum(axis=1)
    drawn = total > 0  # where no value had all of its levels
    return (weights[drawn] @ values) / total[drawn]


def interval(samples: np.ndarray) -> tuple[float, float]:
    """95 %, by percentiles."""
    low, high = np.percentile(samples, COVERAGE)
    return float(low), float(high)


def with_interval(values: np.ndarray, *factors: np.ndarray) -> dict[str, float]:
    low, high = interval(bootstrap(values, *factors))
    return {"value": float(values.mean()), "low": low, "high": high}


def ratio_with_interval(top: np.ndarray, bottom: np.ndarray, *factors: np.ndarray) -> dict[str, float]:
    """Of the sum of `top` to that of `bottom`, float [n], of which a sample draws the same; 0 where `bottom` is 0 throughout."""
    if not bottom.any():
        return {"value": 0.0, "low": 0.0, "high": 0.0}
    below = bootstrap(bottom, *factors)
    low, high = interval(bootstrap(top, *factors)[below > 0] / below[below > 0])
    return {"value": float(top.sum() / bottom.sum()), "low": low, "high": high}


def selected(p: np.ndarray, share: float) -> np.ndarray:
    """Chance of each value of a rising scale, of probability p [K] among all, to be in the highest `share` of all, float [K].
    Equal ones draw lots."""
    above = p[::-1].cumsum()[::-1] - p
    return np.clip((share - above) / np.maximum(p, np.finfo(float).tiny), 0, 1)


def holm(p: np.ndarray) -> np.ndarray:
    """P values adjusted for as many tests as there are, float [n] -> [n] (Holm 1979)."""
    order = np.argsort(p)
    steps = np.minimum(1, p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty(len(p))
    adjusted[order] = np.maximum.accumulate(steps)
    return adjusted


def js_divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence in bits, between 0 and 1, of distributions (... K), (... K) -> (...) (Lin 1991)."""
    middle = (p + q) / 2
    return (relative_entropy(p, middle) + relative_entropy(q, middle)) / 2


def relative_entropy(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Bits; (... K), (... K) -> (...). Where p is 0 nothing is added."""
    return np.sum(p * np.log2(np.where(p > 0, p, 1) / np.where(p > 0, q, 1)), axis=-1)
