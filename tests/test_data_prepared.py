"""Prepared data: rows are those of a loop over tokens, the same on any host and after any restart; damage is told."""

import json
import pathlib
import re

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from runs import finish, train_command
from test_data_text import expected_rows

from configs.schema import PreparedData
from data import open_data, prepared
from data.bad_records import BadRecord, substituted, taken_from
from data.dataset import DataError
from data.prepare.pipeline import Settings, prepare

RNG = np.random.default_rng(0)
TEXTS = {
    name: [f"{name} {i} " + "".join(RNG.choice(list("abcdé 漢"), RNG.integers(1, size))) for i in range(count)]
    for name, count, size in (("books", 300, 200), ("code", 40, 3000))
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two prepared folders, of several shards each."""
    root = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.prepare.sources.SMALLEST_UNIT", 30_000)
        for name, texts in TEXTS.items():
            (root / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
            prepare(Settings(str(root / f"{name}.jsonl"), str(root / name), held_out=0.1, workers=1), lambda line: None)
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(prepared, "CACHE", str(tmp_path / "cache"))


def config(root, *names, **fields):
    return PreparedData(
        sources=tuple(str(root / name) for name in names), **{"sequence_length": 50, "batch_size": 8, **fields}
    )


def documents(root, name, split="train"):
    """Texts in the order of their shards, by reading ArrayRecord alone."""
    manifest = json.loads((root / name / "manifest.json").read_text())
    ids = []
    for shard in manifest["splits"][split]:
        for record in ArrayRecordReader(str(root / name / shard["file"])).read_all():
            ids += np.frombuffer(record, "<u2", offset=16).tolist()
    text = [[]]
    for token in ids[1:]:
        if token == 256:
            text.append([])
        else:
            text[-1].append(token)
    return [bytes(one).decode() for one in text]


def test_rows_are_those_of_a_loop_over_tokens(folders):
    for name in TEXTS:
        expected = expected_rows(documents(folders, name), 50)
        rows = open_data(config(folders, name)).train.sources[0]
        assert len(rows) == len(expected) > 300
        batch = rows.read(np.arange(len(rows)))
        for field, values in batch.items():
            np.testing.assert_array_equal(values, [row[field] for row in expected], err_msg=field)


def test_shards_hold_every_document_once(folders):
    for name, texts in TEXTS.items():
        assert len(json.loads((folders / name / "manifest.json").read_text())["splits"]["train"]) > 1
        found = documents(folders, name) + documents(folders, name, "held_out")
        assert sorted(found) == sorted(texts)


@pytest.mark.parametrize("packing", ["first-fit", "best-fit"])
def test_packed_rows_learn_every_token_once_in_its_document(packing, folders):
    data = open_data(config(folders, "books", packing=packing))
    rows = data.train.sources[0]
    batch = rows.read(np.arange(len(rows)))
    learned = batch["weights"] > 0
    texts = documents(folders, "books")
    assert np.count_nonzero(learned) == sum(len(text.encode()) for text in texts)
    pieces = []
    for tokens, targets, ids, positions in zip(
        batch["tokens"], batch["targets"], batch["segment_ids"], batch["segment_pos"], strict=True
    ):
        for segment in range(1, ids.max() + 1):
            here = ids == segment
            assert np.array_equal(positions[here], positions[here][0] + np.arange(here.sum()))
            assert (tokens[here][0] == 256) == (positions[here][0] == 0)
            pieces.append((int(positions[here][0]), bytes(targets[here].tolist())))
    whole = [piece for position, piece in pieces if position == 0]
    assert sorted(whole) == sorted(text.encode()[:50] for text in texts)
    assert sorted(piece for position, piece in pieces if position == 50) == sorted(
        text.encode()[50:100] for text in texts if len(text.encode()) > 50
    )
    filled = np.count_nonzero(learned) / learned.size
    assert f"{filled:.1%} full by {packing}" in data.summary[0]


def test_a_packing_plan_is_made_once(folders, tmp_path, monkeypatch):
    first = open_data(config(folders, "code", packing="best-fit")).train_batch(3)
    monkeypatch.setattr(prepared, "pack_shard", None)
    again = open_data(config(folders, "code", packing="best-fit")).train_batch(3)
    for name in first:
        assert np.array_equal(first[name], again[name])
    assert len(list((tmp_path / "cache").iterdir())) == 2  # a split each


def test_no_random_state_travels_with_the_data(folders):
    """The batch of step N from a fresh process' point of view: other reads before it change nothing."""
    for packing in ("concat", "best-fit"):
        made = config(folders, "books", "code", weights=(0.8, 0.2), stages=("20:0.5:0.5",), packing=packing)
        one, two = open_data(made), open_data(made)
        for step in (0, 7, 19, 20, 21, 400):
            two.train_batch(step + 1)
            for name, rows in one.train_batch(step).items():
                assert np.array_equal(rows, two.train_batch(step)[name])


def test_the_manifest_tells_content_and_not_place(folders, tmp_path):
    (tmp_path / "moved").symlink_to(folders / "books")
    here, there = open_data(config(folders, "books")), open_data(config(tmp_path, "moved"))
    assert here.manifest["hash"] == there.manifest["hash"]
    others = (config(folders, "code"), config(folders, "books", packing="best-fit"), config(folders, "books", "code"))
    assert len({here.manifest["hash"], *(open_data(other).manifest["hash"] for other in others)}) == 4


def damaged_copy(folders, tmp_path, name="books", at=2000):
    """A folder whose first training shard has one damaged block."""
    tmp_path.mkdir()
    for file in (folders / name).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shard = tmp_path / "train-00000.arrayrecord"
    content = bytearray(shard.read_bytes())
    content[at : at + 8] = bytes(8)
    shard.write_bytes(content)


@pytest.mark.parametrize("packing", ["concat", "best-fit"])
def test_a_damaged_block_is_reported_and_something_else_stands_for_it(packing, folders, tmp_path):
    damaged_copy(folders, tmp_path / "copy")
    right = open_data(config(folders, "books", packing=packing)).train.sources[0]
    wrong = open_data(config(tmp_path, "copy", packing=packing)).train.sources[0]
    good, rows = right.read(np.arange(len(right))), wrong.read(np.arange(len(wrong)))
    found = taken_from(rows)
    same = (good["tokens"] == rows["tokens"]).all(axis=1)
    assert len(found) > 0
    assert {(pathlib.Path(one.source).name, one.reason) for one in found} == {
        ("train-00000.arrayrecord", "a damaged block")
    }
    assert 0 < (~same).sum() <= len(found)
    everything = {tuple(row) for row in good["tokens"].tolist()}
    assert all(tuple(row) in everything for row in rows["tokens"].tolist())
    # Read alone, a bad row has the same substitute.
    for number in np.flatnonzero(~same)[:5]:
        alone = wrong.read(np.array([number]))
        assert np.array_equal(alone["tokens"][0], rows["tokens"][number])


def test_substitutes_are_themselves_substituted_and_end():
    def read(bad):
        return lambda indices: [BadRecord("f", int(i), "bad") if i in bad else int(i) for i in indices]

    items, found = substituted(read(set(range(50))), np.arange(100), 100)
    assert items[50:] == list(range(50, 100))
    assert all(50 <= item < 100 for item in items)
    assert {one.place for one in found} == set(range(50))
    assert substituted(read({3}), np.array([3]), 100)[0] == substituted(read({3, 5}), np.array([3, 4]), 100)[0][:1]
    with pytest.raises(DataError, match="20 records one after the other are bad"):
        substituted(read(set(range(100))), np.arange(4), 100)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda root: config(root, "nowhere"), r"nowhere holds no prepared data \(no manifest.json\)"),
        (lambda root: config(root, "books", sequence_length=10**6), r"has fewer training tokens than one row of"),
        (lambda root: config(root, "books", sequence_length=10_000), r"are fewer tokens than one row of"),
    ],
)
def test_what_cannot_be_opened_is_one_sentence(change, sentence, folders):
    with pytest.raises(DataError, match=sentence):
        open_data(change(folders))


def test_a_folder_of_another_tokenizer_is_refused(folders, tmp_path):
    prepare(
        Settings(
            str(folders / "code.jsonl"),
            str(tmp_path / "pieces"),
            tokenizer="sentencepiece:300",
            held_out=0.1,
            workers=1,
        ),
        lambda line: None,
    )
    made = PreparedData(sources=(str(folders / "books"), str(tmp_path / "pieces")))
    with pytest.raises(DataError, match=r"pieces was tokenised by sentencepiece-\w+, but .*books by bytes-1"):
        open_data(made)


def words(folders, *more):
    sources = f"{folders / 'books'},{folders / 'code'}"
    return ("--data.kind", "prepared", "--data.sources", sources, "--data.sequence_length", "64", *more)


def test_a_run_trains_on_a_mixture_and_is_sampled_from(folders, tmp_path):
    mix = words(folders, "--data.weights", "0.7,0.3", "--data.stages", "2:0.2:0.8", "--data.packing", "best-fit")
    command = train_command("griffin-tiny", tmp_path / "run", *mix, "--eval.every", "0", "--trainer.steps", "4")
    code, out, err = finish(command)
    assert code == 0, err
    assert "30 % then 80 % of the rows read" in out
    assert "bits_per_byte" in out
    code, out, err = finish([*command[:3], "sample", str(tmp_path / "run"), "--prompt", "ab", "--tokens", "3"])
    assert code == 0, err


def test_a_run_lists_bad_records_and_stops_above_their_share(folders, tmp_path):
    copy = tmp_path / "copy"
    damaged_copy(folders, copy)
    run = tmp_path / "run"
    made = ("--data.kind", "prepared", "--data.sources", str(copy), "--trainer.steps", "30", "--eval.every", "0")
    code, out, err = finish(train_command("griffin-tiny", run, *made, "--data.max_bad", "0.9"))
    assert code == 0, err
    listed = [json.loads(line) for line in (run / "bad_records.jsonl").read_text().splitlines()]
    assert {one["reason"] for one in listed} == {"a damaged block"}
    assert "is a damaged block; another record stands for it" in out
    evaluated = next(line for line in out.splitlines() if line.startswith("step 30: held-out"))
    assert "bad_records" not in evaluated  # all of the held-out ones can be read
    code, out, err = finish(train_command("griffin-tiny", tmp_path / "strict", *made, "--data.max_bad", "0"))
    assert code == 3
    assert re.search(r"1 of 8 records read were unusable \(1 a damaged block\)|of \d+ records read were unusable", err)


def test_other_data_is_refused_on_resume(folders, tmp_path):
    run = tmp_path / "run"
    made = ("--data.kind", "prepared", "--trainer.steps", "1", "--eval.every", "0", "--data.sources")
    code, _, err = finish(train_command("griffin-tiny", run, *made, str(folders / "books")))
    assert code == 0, err
    (tmp_path / "books").symlink_to(folders / "code")
    code, _, err = finish(train_command("griffin-tiny", run, *made, str(tmp_path / "books"), "--allow", "data.sources"))
    assert code == 3
    assert "the data of" in err
    assert "changed since it was started (counts, sources" in err
