"""Mixtures: exact shares in every window, each source in epochs of its own, known from the position alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import ConfigError, PreparedData
from data.bad_records import BadRecord, packed, taken_from
from data.dataset import Dataset, manifest_of
from data.mixture import WINDOW, InOrder, Mixture, quotas_of, spread


class Numbers:
    """Examples that say which they are."""

    def __init__(self, source, count):
        self.source, self.count = source, count

    def __len__(self):
        return self.count

    def read(self, indices):
        return {"source": np.full(len(indices), self.source), "row": indices, "wide": np.stack([indices] * 3, 1)}


def mixture(counts, stages):
    return Mixture([Numbers(i, n) for i, n in enumerate(counts)], range(10, 10 + len(counts)), stages)


@settings(deadline=None, max_examples=10)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6).filter(lambda shares: sum(shares) > 0.1))
def test_after_every_place_each_source_stood_as_often_as_its_share_says_to_less_than_one(shares):
    """Tijdeman's theorem: 1 - 1 / (2 S - 2) at most."""
    quotas = quotas_of(shares)
    order = spread(quotas)
    assert np.array_equal(np.bincount(order, minlength=len(shares)), quotas)
    stood = np.cumsum(order[:, None] == np.arange(len(shares)), axis=0)
    expected = np.arange(1, WINDOW + 1)[:, None] * quotas / WINDOW
    present = max(np.count_nonzero(quotas), 2)
    assert np.abs(stood - expected).max() <= 1 - 1 / (2 * present - 2) + 1e-6


@pytest.mark.parametrize("shares", [[1], [3, 1], [1, 1, 1], [0.7, 0.2999, 1e-4, 0], [1e-9, 1], [1e-9] * 3 + [1]])
def test_quotas_are_shares_to_one_place_of_a_window(shares):
    quotas = quotas_of(shares)
    exact = np.array(shares) / sum(shares) * WINDOW
    assert quotas.sum() == WINDOW
    assert np.abs(quotas - exact).max() <= max(1, np.count_nonzero(quotas) - 1)
    assert np.array_equal(quotas > 0, exact > 0)


def test_a_single_source_is_read_in_the_order_of_its_seed():
    from data.order import example_at

    positions = np.arange(1000)
    assert np.array_equal(mixture([77], [(0, [1])]).read(positions)["row"], example_at(positions, 77, 10))


@settings(deadline=None, max_examples=8)
@given(
    counts=st.lists(st.integers(1, 400), min_size=1, max_size=4),
    data=st.data(),
    batch=st.integers(1, 64),
)
def test_each_source_goes_through_its_epochs_across_stages(counts, data, batch):
    shares = st.lists(st.integers(0, 5), min_size=len(counts), max_size=len(counts)).filter(any)
    steps = data.draw(st.lists(st.integers(1, 300), max_size=3, unique=True).map(sorted))
    stages = [(step * batch, data.draw(shares)) for step in [0, *steps]]
    made = mixture(counts, stages)
    total = stages[-1][0] + 3000
    stream = made.read(np.arange(total))
    for number, count in enumerate(counts):
        rows = stream["row"][stream["source"] == number]
        for epoch in range(len(rows) // count):
            assert sorted(rows[epoch * count : (epoch + 1) * count]) == list(range(count))
        assert made.epochs(total)[number] == pytest.approx(len(rows) / count)
    assert np.array_equal(stream["wide"], np.stack([stream["row"]] * 3, 1))


def test_a_third_stage_goes_on_where_the_second_left_off():
    stream = mixture([53, 7], [(0, [1, 1]), (100, [1, 1]), (300, [1, 2])]).read(np.arange(900))
    rows = stream["row"][stream["source"] == 0]
    for epoch in range(len(rows) // 53):
        assert sorted(rows[epoch * 53 : (epoch + 1) * 53]) == list(range(53))


def test_shares_change_at_their_step_and_not_before():
    made = mixture([1000, 1000], [(0, [1, 0]), (640, [1, 3]), (1280, [0, 1])])
    source = made.read(np.arange(2000))["source"]
    assert source[:640].sum() == 0
    assert abs(source[640:1280].mean() - 0.75) < 1 / 640
    assert source[1280:].all()


def test_any_part_of_the_stream_is_that_of_the_whole():
    made = mixture([300, 50, 7], [(0, [5, 3, 1]), (12_345, [1, 1, 1])])
    whole = made.read(np.arange(30_000))
    rng = np.random.default_rng(0)
    some = rng.integers(0, 30_000, 500)
    part = made.read(some)
    for name in whole:
        assert np.array_equal(part[name], whole[name][some])


@pytest.mark.parametrize("hosts", [2, 3, 16])
def test_hosts_side_by_side_see_the_batch_of_one(hosts):
    made = mixture([300, 50], [(0, [5, 3]), (96, [1, 1])])

    def dataset(rows):
        return Dataset(manifest_of({}, {}), made, made, 48, 0, (), [], shuffled=False, rows=rows)

    for step in (0, 1, 2, 999):
        whole = dataset(None).train_batch(step)["row"]
        parts = [dataset(rows).train_batch(step)["row"] for rows in np.array_split(np.arange(48), hosts)]
        assert np.array_equal(np.concatenate(parts), whole)


def test_held_out_examples_of_all_sources_are_spread_evenly():
    found = InOrder([Numbers(0, 90), Numbers(1, 10)]).read(np.arange(100))
    assert found["source"].reshape(10, 10).sum(axis=1).tolist() == [1] * 10
    for number, count in enumerate((90, 10)):
        assert found["row"][found["source"] == number].tolist() == list(range(count))


def test_bad_records_of_all_sources_come_with_the_batch():
    class Bad(Numbers):
        def read(self, indices):
            return {**super().read(indices), "bad_records": packed([BadRecord(f"file {self.source}", 3, "bad")])}

    batch = Mixture([Bad(0, 5), Numbers(1, 5), Bad(2, 5)], [0, 0, 0], [(0, [1, 1, 1])]).read(np.arange(9))
    assert [one.source for one in taken_from(batch)] == ["file 0", "file 2"]
    assert set(batch) == {"source", "row", "wide"}


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (dict(weights=(1.0,)), r"data.weights=\(1.0,\) has 1 weights for the 2 of data.sources"),
        (dict(weights=(0.0, 0.0)), "must have weights of at least 0, one of them above it"),
        (dict(stages=("5:1",)), r"data.stages=\('5:1',\) has 1 weights for the 2"),
        (dict(stages=("five:1:1",)), "'five:1:1' is not STEP:WEIGHT:WEIGHT..."),
        (dict(stages=("5:1:1", "5:1:2")), "has step 5 after step 5: later steps must follow, from step 1 on"),
        (dict(stages=("0:1:1",)), "from step 1 on"),
        (dict(stages=("5:1:-1",)), "must have weights of at least 0"),
        (dict(packing="best"), "data.packing='best' is not one of concat, first-fit, best-fit, perhaps best-fit"),
    ],
)
def test_a_wrong_mixture_is_one_sentence(fields, sentence):
    with pytest.raises(ConfigError, match=sentence):
        PreparedData(sources=("a", "b"), **fields)
