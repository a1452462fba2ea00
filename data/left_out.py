"""Batches that a run leaves out: the batch of a step stays a pure function, of which batches those are, too."""

from collections.abc import Iterable


def merged(windows: Iterable[range]) -> tuple[range, ...]:
    """The same numbers in ascending ranges that neither overlap nor touch."""
    joined: list[range] = []
    for window in sorted(windows, key=lambda window: window.start):
        if joined and window.start <= joined[-1].stop:
            joined[-1] = range(joined[-1].start, max(joined[-1].stop, window.stop))
        else:
            joined.append(window)
    return tuple(joined)


def batch_number(step: int, left_out: Iterable[range]) -> int:
    """Number of the batch that `step` others are used before, all from 0; `left_out` as `merged` gives them."""
    for window in left_out:
        if step < window.start:
            break
        step += len(window)
    return step
