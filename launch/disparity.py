"""Accuracy and AUC by group, the disparities of arXiv 2308.10888, and bootstrap intervals of all of them; numpy alone.

Scores are probabilities, float [N, L]. Labels are int [N], or float [N, L] of 0 and 1 with NaN where nothing is known.
Every metric comes as `Values`, so that what is computed from metrics, differences of runs among it, has its interval, too.
"""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Values = np.ndarray  # float64 [1 + R]: of all examples, then of each resample; NaN where not determined
RESAMPLES = 1000
LEAST_RESAMPLES = 200
RANKED = 2e9  # (example, label) pairs that a micro AUC ranks over all resamples: a few minutes at most
CHUNK = 1 << 24  # numbers in memory at a time
FEWEST = 2  # examples of a group


@dataclass(frozen=True)
class Group:
    """The examples that share a class or a value of an attribute; of many labels, those where one is known."""

    name: str
    count: int
    metrics: dict[str, Values]
    one_kind: tuple[int, ...] = ()  # labels without both kinds here, which have no AUC


def probabilities(logits: np.ndarray, loss: str) -> np.ndarray:
    """float [N, L] -> float64 [N, L]: a softmax over labels, or a sigmoid of each."""
    logits = logits.astype(np.float64)
    if loss == "sigmoid":
        return np.exp(-np.logaddexp(0, -logits))
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


def resamples_for(pairs: int) -> int:
    """How many resamples so many (example, label) pairs can afford."""
    return int(np.clip(RANKED / max(pairs, 1), LEAST_RESAMPLES, RESAMPLES))


def example_counts(examples: int, resamples: int) -> np.ndarray:
    """How often each example is in each sample, uint16 [1 + R, N]. Row 0 has each once; the others, drawn with replacement,
    are the same for all runs, so that their differences are paired."""
    rng = np.random.default_rng(0)
    counts = np.ones((1 + resamples, examples), np.uint16)
    for row in counts[1:]:
        row[:] = np.bincount(rng.integers(examples, size=examples), minlength=examples)
    return counts


def interval(values: Values) -> tuple[float, float]:
    """95 %, by percentiles of the resamples; NaN if fewer than half of them determine it."""
    known = values[1:][np.isfinite(values[1:])]
    if np.isnan(values[0]) or not len(known) or 2 * len(known) < len(values) - 1:
        return np.nan, np.nan
    low, high = np.percentile(known, [2.5, 97.5])
    return float(low), float(high)


def is_right(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """float64 of 0 and 1: [N], whether the label is the likeliest; of many labels [N, L], on the right side of a half, or NaN."""
    if labels.ndim == 1:
        return (scores.argmax(axis=1) == labels).astype(np.float64)
    return np.where(np.isnan(labels), np.nan, (scores > 0.5) == (labels == 1))


def accuracy(right: np.ndarray, counts: np.ndarray) -> Values:
    """The share of 1 in `right`, [N] or [N, L], NaN left out."""
    rows = right.reshape(len(right), -1)
    sums = np.stack([np.nansum(rows, axis=1), (~np.isnan(rows)).sum(axis=1)], axis=1)
    return np.concatenate([ratio(*(part @ sums).T) for part in chunks(counts, counts.shape[1])])


def auc(scores: np.ndarray, positive: np.ndarray, counts: np.ndarray, examples: np.ndarray | None = None) -> Values:
    """P(a positive's score > a negative's) + P(equal) / 2, the rank statistic. scores, positive [M]; `examples` int [M] says
    whose they are, columns of `counts`; each its own if not given."""
    order = np.argsort(scores)
    ordered, truth = scores[order], positive[order].astype(bool)
    at = np.flatnonzero(truth)
    low, high = (np.searchsorted(ordered, ordered[at], side) for side in ("left", "right"))
    columns = order if examples is None else examples[order]
    found = []
    for part in chunks(counts, 2 * len(order)):
        weights = part[:, columns]
        below = np.zeros((len(part), len(order) + 1))  # negatives before each place
        np.cumsum(weights * ~truth, axis=1, out=below[:, 1:])
        positives = weights[:, at]
        wins = (positives * (below[:, low] + below[:, high])).sum(axis=1) / 2
        found.append(ratio(wins, positives.sum(axis=1) * below[:, -1]))
    return np.concatenate(found)


def label_auc(scores: np.ndarray, labels: np.ndarray, counts: np.ndarray, label: int) -> Values:
    """One label against the rest, among the examples where it is known."""
    truth = labels == label if labels.ndim == 1 else labels[:, label]
    known = np.flatnonzero(~np.isnan(truth))
    return auc(scores[known, label], truth[known] == 1, counts, known)


def macro_auc(scores: np.ndarray, labels: np.ndarray, counts: np.ndarray) -> tuple[Values, tuple[int, ...]]:
    """The mean over the labels that have both kinds; and those that have not."""
    total, some = np.zeros(len(counts)), np.zeros(len(counts))
    one_kind = []
    for label in range(scores.shape[1]):
        values = label_auc(scores, labels, counts, label)
        if np.isnan(values[0]):
            one_kind.append(label)
            continue
        total += np.nan_to_num(values)
        some += ~np.isnan(values)
    return ratio(total, some), tuple(one_kind)


def micro_auc(scores: np.ndarray, labels: np.ndarray, counts: np.ndarray) -> Values:
    """Of all (example, label) pairs together."""
    truth = labels[:, None] == np.arange(scores.shape[1]) if labels.ndim == 1 else labels
    examples, of = np.nonzero(~np.isnan(truth))
    return auc(scores[examples, of], truth[examples, of] == 1, counts, examples)


def measured(name: str, scores: np.ndarray, labels: np.ndarray, counts: np.ndarray, rows: np.ndarray) -> Group:
    """Accuracy, macro and micro AUC of some rows, int [n]. Of many labels, rows without any are not counted."""
    if labels.ndim == 2:
        rows = rows[~np.isnan(labels[rows]).all(axis=1)]
    if len(rows) < FEWEST:
        return Group(name, len(rows), {metric: unknown(counts) for metric in ("accuracy", "macro AUC", "micro AUC")})
    scores, labels, counts = scores[rows], labels[rows], counts[:, rows]
    macro, one_kind = macro_auc(scores, labels, counts)
    metrics = {
        "accuracy": accuracy(is_right(scores, labels), counts),
        "macro AUC": macro,
        "micro AUC": micro_auc(scores, labels, counts),
    }
    return Group(name, len(rows), metrics, one_kind)


def by_label(scores: np.ndarray, labels: np.ndarray, counts: np.ndarray, names: Sequence[str]) -> list[Group]:
    """Of each class its accuracy, the share of its examples that is right, and its AUC against the rest; of many labels each."""
    right, groups = is_right(scores, labels), []
    for label, name in enumerate(names):
        rows = np.flatnonzero(labels == label if labels.ndim == 1 else ~np.isnan(labels[:, label]))
        if len(rows) < FEWEST:
            groups.append(Group(name, len(rows), {"accuracy": unknown(counts), "AUC": unknown(counts)}))
            continue
        own = right[rows] if labels.ndim == 1 else right[rows, label]
        curve = label_auc(scores, labels, counts, label)
        one_kind = (label,) if np.isnan(curve[0]) else ()
        groups.append(Group(name, len(rows), {"accuracy": accuracy(own, counts[:, rows]), "AUC": curve}, one_kind))
    return groups


def by_value(scores: np.ndarray, labels: np.ndarray, counts: np.ndarray, values: np.ndarray) -> list[Group]:
    """A group for each value of an attribute, str [N]; the empty one is nobody's."""
    return [
        measured(value, scores, labels, counts, np.flatnonzero(values == value))
        for value in sorted(set(values.tolist()) - {""}, key=in_order)
    ]


def worst_gap(groups: np.ndarray, overall: Values) -> Values:
    """min over groups of (group - overall); groups [G, 1 + R]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of resamples in which no group has a value
        return np.nanmin(groups - overall, axis=0)


def relative_error(groups: np.ndarray, overall: Values) -> Values:
    """max over groups of (1 - group) / (1 - overall)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmax(ratio(1 - groups, np.broadcast_to(1 - overall, groups.shape)), axis=0)


MEASURES = {"worst gap": worst_gap, "largest relative error": relative_error}


def disparities(overall: Mapping[str, Values], groups: list[Group], metric: str) -> dict[str, tuple[Values, str]]:
    """Each measure's values and the group that they are of. A label's AUC is held against the macro AUC."""
    known = [group for group in groups if not np.isnan(group.metrics[metric][0])]
    whole = overall["macro AUC" if metric == "AUC" else metric]
    if not known:
        return {name: (np.full(len(whole), np.nan), "") for name in MEASURES}
    table = np.stack([group.metrics[metric] for group in known])
    lowest = known[int(np.argmin(table[:, 0]))].name
    return {name: (measure(table, whole), lowest) for name, measure in MEASURES.items()}


def ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, NaN where b is 0."""
    return np.divide(a, b, out=np.full(np.shape(a), np.nan), where=b != 0)


def chunks(counts: np.ndarray, width: int) -> Iterator[np.ndarray]:
    """Some rows at a time, as float64: so many that `width` numbers for each fit in memory."""
    step = max(1, CHUNK // max(width, 1))
    for first in range(0, len(counts), step):
        yield counts[first : first + step].astype(np.float64)


def unknown(counts: np.ndarray) -> Values:
    return np.full(len(counts), np.nan)


def in_order(name: str) -> list[tuple[int, str]]:
    """A key that has 9 before 10, and 80-99 before 100 and more."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
