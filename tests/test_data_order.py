"""The order of examples: a fresh permutation every epoch, known from (seed, step) alone, the same on any host count."""

import itertools
import pathlib
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.dataset import DataError, Dataset, is_held_out, manifest_of
from data.order import example_at, permuted


class Numbers:
    """Examples that say their own number."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def read(self, indices):
        return {
            "number": indices,
            "square": np.outer(indices, indices[:1]),
            "weights": np.ones(len(indices), np.float32),
        }


def dataset(train=10, held_out=5, batch_size=4, seed=0, **hosts):
    return Dataset(manifest_of({}, {}), Numbers(train), Numbers(held_out), batch_size, seed, (), [], **hosts)


def numbers(data, steps):
    return np.concatenate([data.train_batch(step)["number"] for step in steps])


@settings(deadline=None, max_examples=60)
@given(examples=st.integers(1, 300), batch_size=st.integers(1, 40), seed=st.integers(0, 2**40))
@example(examples=1, batch_size=3, seed=0)
@example(examples=64, batch_size=7, seed=1)  # exactly the cipher's range
@example(examples=65, batch_size=7, seed=1)  # just above it
def test_each_example_comes_exactly_once_an_epoch_across_batch_borders(examples, batch_size, seed):
    epochs = 3
    data = dataset(train=examples, batch_size=batch_size, seed=seed)
    stream = numbers(data, range(-(-epochs * examples // batch_size)))[: epochs * examples]
    for epoch in stream.reshape(epochs, examples):
        assert sorted(epoch) == list(range(examples))


def test_a_corpus_beyond_32_bits_is_still_permuted():
    examples = 2**40 + 3
    chosen = example_at(np.arange(examples - 500, examples + 500), examples, seed=0)
    assert chosen.min() >= 0
    assert examples // 2 < chosen.max() < examples
    assert len(set(chosen[:500])) == len(set(chosen[500:])) == 500


def test_seeds_and_epochs_give_orders_that_have_nothing_to_do_with_each_other():
    """In grain's shuffle seed 0's second epoch is seed 1's first."""
    n = 500
    orders = [tuple(example_at(np.arange(n) + epoch * n, n, seed)) for seed in range(6) for epoch in range(6)]
    assert len(set(orders)) == len(orders)
    agreements = [np.sum(np.array(a) == np.array(b)) for i, a in enumerate(orders) for b in orders[:i]]
    assert max(agreements) < 10  # independent ones agree in one place on average


def test_few_examples_come_in_every_order_equally_often():
    counts = {}
    for seed in range(1200):
        order = tuple(example_at(np.arange(4), 4, seed))
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    assert sum((c - 50) ** 2 / 50 for c in counts.values()) < 60  # chi-squared, 23 degrees: one in 40,000


def irregularity(order):
    """Largest chi-squared (15 degrees of freedom) of differences modulo n between places a fixed lag apart."""
    n = len(order)
    worst = 0.0
    for lag in (1, 2, 3, 16, 64, 256):
        counts = np.bincount((order[lag:] - order[:-lag]) % n * 16 // n, minlength=16)
        worst = max(worst, float(np.sum((counts - (n - lag) / 16) ** 2 / ((n - lag) / 16))))
    return worst


def linear_bits(order):
    """Bits of the order that are sums modulo 2 of bits of the place (and a constant), of all whose range is a power of two."""
    n, bits = len(order), len(order).bit_length() - 1
    places = np.arange(n)
    design = np.stack([(places >> b) & 1 for b in range(bits)] + [np.ones(n, int)], 1)
    base = order[0]
    predicted = np.full(n, base)
    for b in range(bits):
        predicted = predicted ^ np.where(design[:, b], order[1 << b] ^ base, 0)
    return sum(np.all(((predicted ^ order) >> b) & 1 == 0) for b in range(bits))


@pytest.mark.parametrize("examples", [1797, 4096, 42_557, 65_536])
def test_the_order_is_not_a_linear_congruential_one(examples):
    bound = 80  # 15 degrees of freedom: one in 10 ** 10
    for seed in range(3):
        assert irregularity(permuted(np.arange(examples), examples, seed, epoch=0)) < bound
    assert irregularity(np.random.default_rng(0).permutation(examples)) < bound
    multiplier = next(m for m in range(int(examples * 0.618), examples) if np.gcd(m, examples) == 1)
    assert irregularity((multiplier * np.arange(examples) + 12345) % examples) > 100 * bound


def test_the_order_is_not_linear_in_the_bits_of_the_place():
    n = 4096
    assert linear_bits(permuted(np.arange(n), n, seed=0, epoch=0)) == 0
    assert linear_bits(np.arange(n) ^ (np.arange(n) >> 1) ^ 5) == 12  # a Gray code, for comparison


def test_consecutive_epochs_are_not_correlated():
    n = 20_000
    first, second = (example_at(np.arange(n) + e * n, n, 7) for e in range(2))
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / np.sqrt(n)
    assert abs(np.corrcoef(first, np.arange(n))[0, 1]) < 5 / np.sqrt(n)


def test_the_order_never_changes_between_versions():
    """Runs are resumed by later versions: a change here must change data.order.ALGORITHM, and with it the manifests."""
    assert example_at(np.arange(8), 1000, seed=0).tolist() == [772, 469, 573, 296, 282, 132, 485, 507]
    assert example_at(np.arange(2**40, 2**40 + 2), 2**40, seed=1).tolist() == [924430941284, 611998527768]


@pytest.mark.parametrize("start", [0, 1, 7, 1000])
def test_the_iterator_gives_the_same_batches_from_any_start(start):
    data = dataset(train=13, batch_size=5, seed=3)
    batches = data.train_batches(start)
    for step in range(start, start + 20):
        batch, expected = next(batches), data.train_batch(step)
        assert batch.keys() == expected.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], expected[name])
    batches.close()


def test_reading_ahead_starts_before_the_first_batch_is_asked_for():
    import threading

    read = threading.Event()

    class Noted(Numbers):
        def read(self, indices):
            read.set()
            return super().read(indices)

    data = Dataset({}, Noted(10), Numbers(5), 4, 0, (), [])
    batches = data.train_batches(0)
    assert read.wait(timeout=10)
    batches.close()


def test_what_goes_wrong_while_reading_ahead_reaches_the_reader():
    with pytest.raises(OSError, match="the disk is gone"):
        next(Dataset({}, Broken(10), Numbers(5), 4, 0, (), []).train_batches(0))


@pytest.mark.multiprocess
def test_worker_processes_give_the_same_batches_and_one_that_is_killed_ends_the_run():
    data = dataset(97, seed=5, workers=2)
    batches = data.train_batches(40)
    try:
        for step in range(40, 50):
            np.testing.assert_array_equal(next(batches)["square"], dataset(97, seed=5).train_batch(step)["square"])
        children = psutil.Process().children(recursive=True)
        workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        assert len(workers) >= 2
        for worker in workers:
            worker.kill()
        began = time.monotonic()
        with pytest.raises(DataError, match="ended with exit code -9: the system kills processes so when"):
            list(itertools.islice(batches, 100))
        assert time.monotonic() - began < 30
    finally:
        batches.close()


class Broken(Numbers):
    def read(self, indices):
        raise OSError("the disk is gone")


@pytest.mark.multiprocess
def test_what_goes_wrong_in_a_worker_is_raised_with_its_traceback():
    batches = Dataset({}, Broken(10), Numbers(5), 4, 0, (), [], workers=1).train_batches(0)
    try:
        with pytest.raises(OSError, match="the disk is gone") as raised:
            next(batches)
        assert raised.traceback[-1].name == "read"  # of the worker, not of who waits for it
    finally:
        batches.close()


def test_another_process_sees_the_same_batches():
    script = "from tests.test_data_order import dataset, numbers; print(numbers(dataset(97, seed=5), range(50, 60)).tolist())"
    root = pathlib.Path(__file__).parent.parent
    result = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str(numbers(dataset(97, seed=5), range(50, 60)).tolist())


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_side_by_side_see_the_batch_of_a_single_host(hosts):
    shares = [dataset(11, 10, 8, rows=rows) for rows in np.split(np.arange(8), hosts)]
    whole = dataset(11, 10, 8)
    for step in range(6):
        parts = [share.train_batch(step)["number"] for share in shares]
        np.testing.assert_array_equal(np.concatenate(parts), whole.train_batch(step)["number"])
    for parts in zip(*[share.held_out_batches() for share in shares], whole.held_out_batches(), strict=True):
        for name in ("number", "weights"):
            np.testing.assert_array_equal(np.concatenate([p[name] for p in parts[:-1]]), parts[-1][name])


def test_steps_before_the_first_are_refused():
    with pytest.raises(ValueError, match="step -1"):
        dataset().train_batch(-1)


def test_held_out_batches_keep_their_order_and_shape_and_pad_with_weight_zero():
    batches = list(dataset(held_out=10, batch_size=4).held_out_batches())
    assert [b["number"].tolist() for b in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 0]]
    assert [b["weights"].sum() for b in batches] == [4, 4, 2]
    assert {b["square"].shape for b in batches} == {(4, 1)}


@pytest.mark.parametrize(("limit", "count"), [(None, 3), (0, 3), (2, 2), (9, 3)])
def test_the_number_of_held_out_batches_can_be_limited(limit, count):
    assert len(list(dataset(held_out=10, batch_size=4).held_out_batches(limit))) == count


@given(share=st.floats(0.05, 0.95))
@settings(max_examples=20)
def test_the_held_out_share_is_what_was_asked_for(share):
    held_out = sum(is_held_out(f"file {i}", share) for i in range(2000))
    assert abs(held_out - 2000 * share) < 5 * np.sqrt(2000 * share * (1 - share))


def test_a_larger_held_out_share_keeps_what_was_held_out():
    for i in range(200):
        assert is_held_out(f"{i}", 0.2) <= is_held_out(f"{i}", 0.3)
