"""Which documents share a row, so that few places stay empty; and the rows themselves."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from data.dataset import Batch


class Part(NamedTuple):
    """What a row holds of one document: ids, one more than the places it takes, since the last is only a target."""

    ids: np.ndarray  # int32 [places + 1]
    position: int  # of the first id in its document
    learned_from: int = 1  # index of the first id that is learned


def fill_rows(rows: Sequence[Sequence[Part]], length: int, token_bytes: np.ndarray) -> Batch:
    """Rows of `length` places, each of parts one after the other, then padding. Fields as of `data.text.Rows`; segment_pos
    is -1 and segment_ids 0 in padding, weights are 1 where a target is learned."""
    shape = (len(rows), length)
    tokens, targets, segment_ids = (np.zeros(shape, np.int32) for _ in range(3))
    segment_pos, weights = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
    for row, parts in enumerate(rows):
        start = 0
        for number, part in enumerate(parts, start=1):
            places = len(part.ids) - 1
            here = (row, slice(start, start + places))
            tokens[here], targets[here] = part.ids[:-1], part.ids[1:]
            segment_pos[here], segment_ids[here] = np.arange(part.position, part.position + places), number
            weights[row, start + part.learned_from - 1 : start + places] = 1
            start += places
    return {
        "tokens": tokens,
        "targets": targets,
        "segment_pos": segment_pos,
        "segment_ids": segment_ids,
        "weights": weights,
        "target_bytes": (token_bytes[targets] * (weights > 0)).sum(axis=1, dtype=np.int32),
    }


def pieces_of(lengths: np.ndarray, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Documents of so many ids (int64 [n], BOS among them) as pieces of at most `row` places: whole rows, and what is left.

    Returns, of each piece, the document, the first id and the places, int64 each. Every id but BOS is a target once.
    """
    places = np.maximum(lengths - 1, 0)
    count = -(-places // row)
    document = np.repeat(np.arange(len(lengths)), count)
    number = np.arange(len(document)) - np.repeat(np.cumsum(count) - count, count)
    first = number * row
    return document, first, np.minimum(places[document] - first, row)


def first_fit(places: np.ndarray, row: int) -> np.ndarray:
    """Row of each piece, int64 [n]: the first row that has room for it, in the pieces' order."""
    size = 1
    while size < max(len(places), 1):
        size *= 2
    room = [row] * (2 * size)  # a tree: room[1] is the most that any row has, room[size + r] that of row r
    chosen = np.empty(len(places), np.int64)
    for piece, needed in enumerate(places.tolist()):
        node = 1
        while node < size:
            node *= 2
            if room[node] < needed:
                node += 1
        chosen[piece] = node - size
        room[node] -= needed
        node //= 2
        while node:
            most = max(room[2 * node], room[2 * node + 1])
            if room[node] == most:
                break
            room[node] = most
            node //= 2
    return chosen


def best_fit(places: np.ndarray, row: int) -> np.ndarray:
    """Row of each piece, int64 [n]: the longest pieces first, each into the fullest row that has room (best-fit
    decreasing; for training rows H. Ding et al., Fewer truncations improve language modeling, 2024)."""
    chosen = np.empty(len(places), np.int64)
    by_room: list[list[int]] = [[] for _ in range(row + 1)]
    open_rooms = 0  # bit r: some row has room for r more
    rows = 0
    for piece in np.argsort(-places, kind="stable").tolist():
        needed = int(places[piece])
        fitting = open_rooms >> needed
        if fitting:
            room = needed + (fitting & -fitting).bit_length() - 1
            number = by_room[room].pop()
            if not by_room[room]:
                open_rooms &= ~(1 << room)
        else:
            number, room, rows = rows, row, rows + 1
        chosen[piece] = number
        left = room - needed
        if left:
            by_room[left].append(number)
            open_rooms |= 1 << left
    return chosen


PACKINGS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {"first-fit": first_fit, "best-fit": best_fit}
