"""Packing: every token is a target once, no row overflows, and rows are as full as the textbook algorithms make them."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data.packing import Part, best_fit, fill_rows, first_fit, pieces_of

PLACES = st.lists(st.integers(1, 20), min_size=1, max_size=80).map(np.array)


def naive_first_fit(places, row):
    room, chosen = [], []
    for piece in places:
        number = next((i for i, left in enumerate(room) if left >= piece), len(room))
        if number == len(room):
            room.append(row)
        room[number] -= piece
        chosen.append(number)
    return chosen


def naive_best_fit_rows(places, row):
    """How many rows best-fit decreasing needs."""
    room = []
    for piece in sorted(places, reverse=True):
        fitting = [i for i, left in enumerate(room) if left >= piece]
        if fitting:
            room[min(fitting, key=lambda i: room[i])] -= piece
        else:
            room.append(row - piece)
    return len(room)


@settings(deadline=None, max_examples=100)
@given(PLACES)
def test_first_fit_is_that_of_a_loop(places):
    assert first_fit(places, 20).tolist() == naive_first_fit(places, 20)


@settings(deadline=None, max_examples=100)
@given(PLACES)
def test_best_fit_needs_as_many_rows_as_a_loop_and_overfills_none(places):
    chosen = best_fit(places, 20)
    assert np.bincount(chosen, weights=places).max() <= 20
    assert sorted(set(chosen)) == list(range(naive_best_fit_rows(places, 20)))


def test_best_fit_leaves_little_empty_in_documents_of_real_lengths():
    lengths = np.exp(np.random.default_rng(0).normal(6, 1.3, 20_000)).astype(int) + 2
    _, _, places = pieces_of(lengths, 2048)
    rows = {pack.__name__: pack(places, 2048).max() + 1 for pack in (first_fit, best_fit)}
    filled = {name: places.sum() / (count * 2048) for name, count in rows.items()}
    assert filled["best_fit"] > 0.999
    assert filled["first_fit"] > 0.98


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(2, 20), st.sampled_from([first_fit, best_fit])
)
def test_every_token_but_bos_is_a_target_once_with_its_own_place(lengths, row, pack):
    documents = [np.arange(1000 * i, 1000 * i + n) for i, n in enumerate(lengths)]
    document, first, places = pieces_of(np.array(lengths), row)
    assert places.min(initial=1) >= 1
    chosen = pack(places, row)
    rows = [[] for _ in range(chosen.max(initial=-1) + 1)]
    for piece in np.argsort(chosen, kind="stable"):
        at = slice(first[piece], first[piece] + places[piece] + 1)
        rows[chosen[piece]].append(Part(documents[document[piece]][at].astype(np.int32), int(first[piece])))
    batch = fill_rows(rows, row, np.ones(100_000, np.int32))
    learned = batch["weights"] > 0
    expected = [token for ids in documents for token in ids[1:]]
    assert sorted(batch["targets"][learned]) == expected
    assert np.array_equal(batch["targets"][learned], batch["tokens"][learned] + 1)
    assert np.array_equal(batch["segment_pos"][learned], batch["tokens"][learned] % 1000)
    assert (batch["segment_pos"][~learned] == -1).all()
    assert (batch["segment_ids"][~learned] == 0).all()
    assert np.array_equal(batch["target_bytes"], learned.sum(axis=1))
    for ids, tokens, here in zip(batch["segment_ids"], batch["tokens"], learned, strict=True):
        # One segment a piece, numbered from 1: its tokens follow one another.
        same = ids[1:][here[1:]] == ids[:-1][here[1:]]
        assert np.array_equal(same, tokens[1:][here[1:]] == tokens[:-1][here[1:]] + 1)
