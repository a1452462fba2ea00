"""Batches of units: room for whoever is drawn, each once, with rows of its own and nobody else's, on any number of hosts."""

import contextlib
import dataclasses
import itertools

import numpy as np
import pytest
from pictures import encoded, picture
from runs import open_privacy
from scipy import stats

from configs.overrides import resolve
from data import open_data
from data.bad_records import taken_from
from data.dataset import DataError, Dataset
from data.poisson import drawn
from data.units import OVERFLOW, DrawnUnits, by_unit, most_units, spread
from sharding.mesh import one_device_mesh
from trainer.privacy import Privacy
from trainer.run_folder import RunFolder

PRIVATE = "--privacy.epsilon 8 --privacy.delta 1e-5 --privacy.noise 1 --privacy.seed 3"
IMAGES = "--optimizer.adaptive_clip 0 --model.channels 3 --data.channels 3 --data.image_size 16"


# --- room --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("expected", "units"), [(1, 2), (1, 10**6), (8, 60), (64, 1423), (256, 50_000), (4096, 50_000),
                                                 (4096, 10**9), (16_384, 1_271_167)])  # fmt: skip
@pytest.mark.parametrize("multiple", [1, 8, 96])
def test_a_batch_has_room_for_whoever_is_drawn(expected, units, multiple):
    """By scipy's tail of the binomial distribution; and for hardly more than that of the Poisson distribution asks for."""
    room = most_units(expected, multiple)
    assert room % multiple == 0
    assert stats.binom.sf(room, units, expected / units) <= OVERFLOW == 1e-20
    assert stats.poisson.sf((room - multiple) / 1.05 - 3, expected) > OVERFLOW


@pytest.mark.parametrize("count", [1, 2, 8, 24, 40, 64, 100])
def test_the_first_few_places_are_evenly_over_the_batch(count):
    order = spread(count)
    assert sorted(order) == list(range(count))
    for size in 2 ** np.arange(7):
        blocks = count // size  # whole ones
        if not blocks:
            break
        inside = order[order < blocks * size] // size
        taken = np.cumsum(inside[:, None] == np.arange(blocks), axis=0)
        assert (np.ptp(taken, axis=1) <= 1).all()


def test_devices_have_about_equally_many_units():
    """Of 512 expected, on 64 devices."""
    room = most_units(512, 64)
    shares = np.bincount(spread(room)[:512] // (room // 64), minlength=64)
    assert shares.sum() == 512
    assert np.ptp(shares) <= 2


# --- what is in a batch ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Numbered:
    """Examples that say who they are, and how they would be augmented."""

    units: np.ndarray

    def __len__(self) -> int:
        return len(self.units)

    def views(self, numbers, draws):
        return {"example": numbers.astype(np.int32), "draw": draws, "weights": np.ones(len(numbers), np.float32)}


def opened(tmp_path, name: str, words: str, units: np.ndarray | None = None) -> tuple[Privacy, Dataset]:
    """The data of a private run; of `Numbered` ones, if it is said whose they are."""
    config = resolve(name, f"{PRIVATE} {words}".split()).config
    data = open_data(config.data)
    if units is not None:
        data = dataclasses.replace(data, train=Numbered(units))
    with contextlib.closing(RunFolder(tmp_path / "run", config)) as folder:
        return open_privacy(config, one_device_mesh(), data, folder)


def patients(tmp_path, rows: int = 3, secret: int = 3) -> tuple[Privacy, Dataset, np.ndarray]:
    """Groups of 1 to 6 examples, whose numbers are anywhere."""
    owners = np.repeat(np.arange(80), np.random.default_rng(0).integers(1, 7, 80)) * 7
    owners = np.random.default_rng(1).permutation(owners)
    words = f"--optimizer.adaptive_clip 0 --privacy.unit group --privacy.rows {rows} --data.batch_size 16 --privacy.seed {secret}"
    return *opened(tmp_path, "nfnet-tiny", words, owners), owners


def by_rows(batch: dict[str, np.ndarray], rows: int) -> dict[str, np.ndarray]:
    return {name: field.reshape(-1, rows, *field.shape[1:]) for name, field in batch.items()}


def test_whoever_is_drawn_is_in_the_batch_once_with_rows_of_its_own(tmp_path):
    privacy, data, owners = patients(tmp_path)
    people, sizes = np.unique(owners, return_counts=True)
    assert (privacy.units, privacy.rate) == (80, 16 / 80)
    seen: dict[int, set[int]] = {}
    for step in range(60):
        batch = by_rows(data.train_batch(step), 3)
        real = batch["weights"].any(axis=1)
        assert (batch["weights"][real] == 1).all()
        assert not any(field[~real].any() for field in batch.values())
        groups = owners[batch["example"][real]]
        assert (groups == groups[:, :1]).all()  # rows are of one unit
        chosen = people[drawn(privacy.secret, step, 80, 0.2)]
        assert sorted(groups[:, 0]) == sorted(chosen)  # which is there once, and nobody else is
        for unit, rows in zip(groups[:, 0], batch["example"][real], strict=True):
            assert len(set(rows)) == min(3, sizes[people == unit][0])  # and as many members as there are
            seen.setdefault(int(unit), set()).update(rows.tolist())
    for unit, members in seen.items():
        own = np.flatnonzero(owners == unit)
        assert members <= set(own)
        assert len(members) == len(own) or len(own) > 4  # in time all
    assert sum(len(members) for members in seen.values()) > 0.95 * len(owners)


def test_numbers_of_units_that_are_drawn_are_binomial(tmp_path):
    _, data, _ = patients(tmp_path, rows=1)
    found = np.array([np.count_nonzero(data.train_batch(step)["weights"]) for step in range(300)])
    assert stats.binomtest(int(found.sum()), 300 * 80, 0.2).pvalue > 1e-3
    spreads = np.sum((found - 16) ** 2) / (80 * 0.2 * 0.8)
    assert 1e-3 < stats.chi2.sf(spreads, 300) < 1 - 1e-3


@pytest.mark.parametrize("count", [2, 3, 8])
def test_hosts_together_read_what_one_reads(tmp_path, count):
    _, data, _ = patients(tmp_path)
    parts = np.array_split(np.arange(data.batch_size), count)
    for step in (0, 5, 1000):
        whole = data.train_batch(step)
        read = [dataclasses.replace(data, rows=rows).train_batch(step) for rows in parts]
        for name, field in whole.items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in read]), field)


def test_what_is_random_comes_from_the_secret_alone(tmp_path):
    """Where a unit is in the batch depends on who else is: how it is augmented there must be nobody's to know."""
    _, data, _ = patients(tmp_path / "a")
    _, same, _ = patients(tmp_path / "b")
    _, other, _ = patients(tmp_path / "c", secret=4)
    draws = []
    for step in range(5):
        one, two, three = (it.train_batch(step) for it in (data, same, other))
        for name, field in one.items():
            np.testing.assert_array_equal(two[name], field)
        assert not np.array_equal(one["example"], three["example"])
        both = (one["weights"] > 0) & (three["weights"] > 0)
        assert not (one["draw"][both] == three["draw"][both]).any()
        draws += one["draw"][one["weights"] > 0].tolist()
    assert len(set(draws)) == len(draws)
    assert min(draws) >= 0


def test_an_empty_batch_has_every_field_and_nobody(tmp_path):
    words = "--optimizer.adaptive_clip 0 --data.batch_size 1"
    privacy, data = opened(tmp_path, "nfnet-tiny", words)
    assert (privacy.units, data.batch_size) == (1423, most_units(1))
    empty = next(step for step in range(100) if not len(drawn(privacy.secret, step, 1423, 1 / 1423)))
    batch = data.train_batch(empty)
    assert batch["images"].shape == (data.batch_size, 16, 16, 1)
    assert not any(field.any() for field in batch.values())


def test_who_was_drawn_is_not_told(tmp_path):
    _, data, _ = patients(tmp_path)
    with pytest.raises(DataError, match="which examples a private run drew is what it keeps secret"):
        data.train_origins(0)


def test_members_are_found_by_unit_whatever_units_are_called():
    units = np.array([70, 2, 70, 900, 2, 2])
    starts, members = by_unit(units)
    groups = [set(members[a:b]) for a, b in itertools.pairwise(starts)]
    assert groups == [{1, 4, 5}, {0, 2}, {3}]


def test_a_unit_with_fewer_members_than_rows(tmp_path):
    """Images are seen again; of documents the rest of the rows have no weight."""
    for repeat, expected in ((True, [4, 9, 4, 9, 4]), (False, [4, 9, -1, -1, -1])):
        units = DrawnUnits(None, np.array([0, 2]), np.array([4, 9]), 1, 5, 1.0, b"", repeat)
        assert units.of_unit(0, 0).tolist() == expected


# --- documents -------------------------------------------------------------------------------------------------------------------


def test_documents_are_units_whose_rows_are_their_own(tmp_path):
    """Rows against the bytes of the files: 257 symbols, of which the last begins a document."""
    corpus, rng = tmp_path / "corpus", np.random.default_rng(0)
    corpus.mkdir()
    texts = [rng.integers(97, 123, size).astype(np.uint8).tobytes() for size in rng.integers(1, 200, 50)]
    for number, text in enumerate(texts):
        (corpus / f"{number:02}.py").write_bytes(text)
    words = f"--optimizer.clip_norm 0 --data.corpus {corpus} --data.sequence_length 32 --data.batch_size 10 --privacy.rows 3"
    privacy, data = opened(tmp_path, "griffin-tiny", words)
    held_out = {file["path"] for file in data.manifest["files"] if file["split"] == "held_out"}
    train = [text for number, text in enumerate(texts) if f"{number:02}.py" not in held_out]
    assert privacy.units == len(train)

    stretches = {}  # targets of a row -> document, place
    for number, text in enumerate(train):
        for first in range(0, len(text), 32):
            stretches.setdefault(text[first : first + 32], []).append((number, first))
    seen = set()
    for step in range(40):
        batch = by_rows(data.train_batch(step), 3)
        units = np.flatnonzero(batch["weights"].any(axis=(1, 2)))
        documents = []
        for unit in units:
            candidates: set[int] | None = None
            places = []
            for row in range(3):
                taken = batch["weights"][unit, row] > 0
                count = int(taken.sum())
                if not count:
                    assert not batch["tokens"][unit, row].any()
                    continue
                assert taken[:count].all()
                targets = batch["targets"][unit, row, :count].astype(np.uint8).tobytes()
                first = int(batch["segment_pos"][unit, row, 0])
                of = {number for number, at in stretches[targets] if at == first}
                candidates = of if candidates is None else candidates & of
                places.append(first)
                assert batch["segment_pos"][unit, row, :count].tolist() == list(range(first, first + count))
                assert not batch["targets"][unit, row, count:].any()
            assert len(candidates) == 1  # one document
            [number] = candidates
            documents.append(number)
            text = train[number]
            assert len(set(places)) == len(places) == min(3, -(-len(text) // 32))
            for row, first in enumerate(sorted(places)):
                before = [256] if first == 0 else [text[first - 1]]
                ids = [*before, *text[first : first + 32]]
                assert batch["tokens"][unit, row, : len(ids) - 1].tolist() == ids[:-1]
            seen |= {(number, first) for first in places}
        assert sorted(documents) == drawn(privacy.secret, step, len(train), 10 / len(train)).tolist()
    everything = {(number, first) for number, text in enumerate(train) for first in range(0, len(text), 32)}
    assert len(seen) > 0.95 * len(everything)


# --- images that cannot be used ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """24 images, of which the first and another cannot be read."""
    root = tmp_path_factory.mktemp("broken") / "train"
    for i in range(24):
        folder = root / ("ant", "bee")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:02}.png").write_bytes(encoded(picture(i), "PNG"))
    (root / "ant" / "00.png").write_bytes(b"")
    (root / "bee" / "05.png").write_bytes((root / "bee" / "05.png").read_bytes()[:-60])
    return root


def test_nobody_stands_for_an_image_that_cannot_be_used(broken, tmp_path):
    """Drawn with a probability of 1, all are there; two without weight, which are reported."""
    words = (
        f"{IMAGES} --model.num_classes 2 --data.source {broken} --data.held_out_source {broken} --data.batch_size 24"
    )
    privacy, data = opened(tmp_path, "nfnet-tiny", f"{words} --data.augment crop --privacy.rows 2")
    assert privacy.rate == 1
    for step in range(3):
        batch = data.train_batch(step)
        bad = taken_from(batch)
        assert sorted((one.source, one.reason) for one in bad) == [
            *[("ant/00.png", "empty")] * 2,
            *[("bee/05.png", "damaged or cut off")] * 2,
        ]
        units = by_rows(batch, 2)
        assert units["weights"].sum() == 2 * 22
        assert not units["images"][units["weights"] == 0].any()
        real = units["weights"].all(axis=1)
        assert np.count_nonzero(real) == 22
        assert sorted(units["labels"][real, 0]) == [0] * 11 + [1] * 11
        # Two views of a unit are of one image, and seldom alike.
        assert (units["labels"][real, 0] == units["labels"][real, 1]).all()
        assert np.abs(units["images"][real, 0] - units["images"][real, 1]).max(axis=(1, 2, 3)).min() > 1e-3


def test_views_are_of_the_units_image(broken, tmp_path):
    """Not augmented, they are the pixels that other training sees."""
    words = f"{IMAGES} --model.num_classes 2 --data.source {broken} --data.held_out_source {broken} --data.batch_size 6"
    privacy, data = opened(tmp_path, "nfnet-tiny", f"{words} --privacy.rows 2")
    other = data.train.examples
    alone = dict(zip(other.indices(np.arange(24)).tolist(), other.read(np.arange(24))["images"], strict=True))
    for step in range(6):
        batch = data.train_batch(step)
        bad = len(taken_from(batch)) // 2
        units = by_rows(batch, 2)
        chosen = [int(n) for n in drawn(privacy.secret, step, 24, 0.25) if n not in (0, 14)]
        real = units["weights"].any(axis=1)
        assert np.count_nonzero(real) == len(chosen)
        assert bad == len(drawn(privacy.secret, step, 24, 0.25)) - len(chosen)
        found = sorted(image.tobytes() for view in (0, 1) for image in units["images"][real, view])
        assert found == sorted(alone[n].tobytes() for n in chosen for _ in range(2))


def test_of_an_empty_batch_nothing_bad_is_reported(broken, tmp_path):
    """One example is read for its shape alone: here it cannot be."""
    words = f"{IMAGES} --model.num_classes 2 --data.source {broken} --data.held_out_source {broken} --data.batch_size 1"
    privacy, data = opened(tmp_path, "nfnet-tiny", words)
    empty = next(step for step in range(100) if not len(drawn(privacy.secret, step, 24, 1 / 24)))
    batch = data.train_batch(empty)
    assert taken_from(batch) == []
    assert not any(field.any() for field in batch.values())
    assert batch["images"].shape == (data.batch_size, 16, 16, 3)
