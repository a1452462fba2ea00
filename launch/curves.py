"""Curves of runs over their steps, drawn so that a million steps make a small file."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

BINS = 400  # points of a curve at most
FAR = 4  # times the median
COLOURS = ("#2166ac", "#b2182b", "#1b7837", "#e08214", "#762a83", "#01665e", "#8c510a", "#c51b7d")
Curve = tuple[np.ndarray, np.ndarray]  # steps (or what stands for them) and values, float64 [n]


def curve(records: Mapping[int, Mapping[str, Any]], name: str) -> Curve:
    """A metric by step; without the steps at which it was not finite."""
    known = sorted((step, record[name]) for step, record in records.items() if record.get(name) is not None)
    steps, values = zip(*known, strict=True) if known else ((), ())
    return np.array(steps, np.float64), np.array(values, np.float64)


def at_window_ends(records: Mapping[int, Mapping[str, Any]], log_every: int) -> dict[int, Mapping[str, Any]]:
    """The records whose speed was measured over a whole window; all, if there is none."""
    return {step: record for step, record in records.items() if step % log_every == 0} or dict(records)


def draw(axis: Any, found: Curve, colour: str, label: str | None = None) -> None:
    """A line; of more than BINS points, the means of as many stretches, and their least and largest behind it."""
    x, y = found
    if len(x) <= BINS:
        axis.plot(x, y, color=colour, label=label, linewidth=1, marker="o" if len(x) == 1 else None, markersize=3)
        return
    edges = np.linspace(0, len(x), BINS + 1).astype(int)[:-1]
    counts = np.diff(edges, append=len(x))
    at, mean = np.add.reduceat(x, edges) / counts, np.add.reduceat(y, edges) / counts
    low, high = np.minimum.reduceat(y, edges), np.maximum.reduceat(y, edges)
    axis.fill_between(at, low, high, color=colour, alpha=0.2, linewidth=0)
    axis.plot(at, mean, color=colour, label=label, linewidth=1)


def draw_held_out(axis: Any, found: Curve, colour: str, label: str | None = None) -> None:
    x, y = found
    axis.plot(x, y, color=colour, label=label, linewidth=1, marker="o" if len(x) <= 50 else None, markersize=3)


def draw_speed(axis: Any, found: Curve, colour: str) -> None:
    """From 0; what is far above the median, as of a window of one short step, is cut off, so that the rest can be read."""
    draw(axis, found, colour)
    top = FAR * float(np.median(found[1])) if len(found[1]) else 0.0
    axis.set_ylim(0, min(top, 1.05 * float(found[1].max())) if top else None)


def panels(figure: Any, titles: Sequence[str], columns: int = 2) -> list[Any]:
    """An axis for each title, in rows of `columns`, 2.4 inches high."""
    rows = -(-len(titles) // columns)
    figure.set_size_inches(9, 2.4 * rows + 0.3)
    axes = [figure.add_subplot(rows, columns, number + 1) for number in range(len(titles))]
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, loc="left", fontsize=9)
    return axes
