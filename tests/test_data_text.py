"""Text: which files, in what order, cut into rows whose positions, segments, weights and bytes are exactly right."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import sysconfig

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import TextData
from data import DataError, open_data, tokenizers
from data.corpus import Document, matches, open_corpus
from data.dataset import count_reasons, is_held_out
from data.text import bigram_entropy, held_out_bytes, lay_out
from data.tokenizers import ByteTokenizer

TEXTS = {f"{'deep/er/' if i % 3 else ''}doc{i:02}.py": f"# {i}\n" + "x = 'größe'\n" * (i % 7 + 1) for i in range(40)}


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "corpus", TEXTS)
    return tmp_path / "corpus"


def write(root, files):
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content if isinstance(content, bytes) else content.encode())


def config(folder, **changes):
    return TextData(**{"corpus": str(folder), "sequence_length": 16, "batch_size": 4, "held_out": 0.2, **changes})


def expected_rows(texts, length):
    """The rows of a split by a plain loop over tokens: (token, position, document, byte count) one after the other."""
    stream = []
    for number, text in enumerate(texts):
        stream.append((256, 0, number, 0))
        stream += [(byte, position + 1, number, 1) for position, byte in enumerate(text.encode())]
    rows = []
    for first in range(0, len(stream) - length, length):
        inputs, targets = stream[first : first + length], stream[first + 1 : first + length + 1]
        rows.append(
            {
                "tokens": [token for token, *_ in inputs],
                "targets": [token for token, *_ in targets],
                "segment_pos": [position for _, position, *_ in inputs],
                "segment_ids": [number - inputs[0][2] + 1 for _, _, number, _ in inputs],
                "weights": [0.0 if position == 0 else 1.0 for _, position, *_ in targets],
                "target_bytes": sum(size for *_, size in targets),
            }
        )
    return rows


@settings(deadline=None, max_examples=80)
@given(texts=st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=12), length=st.integers(2, 20))
def test_rows_agree_with_a_loop_over_tokens(texts, length):
    documents = [Document(f"{i}", text, "", len(text.encode()), False) for i, text in enumerate(texts)]
    rows = lay_out(documents, ByteTokenizer(), length)
    expected = expected_rows(texts, length)
    assert len(rows) == len(expected)
    if expected:
        batch = rows.read(np.arange(len(rows)))
        for name, values in batch.items():
            np.testing.assert_array_equal(values, [row[name] for row in expected], err_msg=name)


def test_batches_have_the_promised_fields(folder):
    batch = open_data(config(folder)).train_batch(0)
    assert {name: (rows.shape, rows.dtype.name) for name, rows in batch.items()} == {
        "tokens": ((4, 16), "int32"),
        "targets": ((4, 16), "int32"),
        "segment_pos": ((4, 16), "int32"),
        "segment_ids": ((4, 16), "int32"),
        "weights": ((4, 16), "float32"),
        "target_bytes": ((4,), "int32"),
    }


def test_each_row_comes_once_an_epoch_and_the_next_epoch_in_another_order(folder):
    data = open_data(config(folder, batch_size=7))
    rows = data.examples_per_epoch
    batches = [data.train_batch(step) for step in range(-(-2 * rows // 7))]
    seen = np.concatenate([np.concatenate([b["tokens"], b["targets"][:, -1:]], 1) for b in batches])
    everything = data.train.read(np.arange(rows))["tokens"]
    first, second = seen[:rows, :-1].tolist(), seen[rows : 2 * rows, :-1].tolist()
    assert sorted(first) == sorted(second) == sorted(everything.tolist())
    assert first != second


def test_another_seed_gives_another_order_of_the_same_data(folder):
    one, two = open_data(config(folder, seed=1)), open_data(config(folder, seed=2))
    assert one.manifest == two.manifest
    assert not np.array_equal(one.train_batch(0)["tokens"], two.train_batch(0)["tokens"])


def test_training_and_held_out_documents_are_disjoint_by_file(folder):
    corpus = open_corpus(config(folder))
    train, held_out = ({d.path for d in corpus.split(part)} for part in (False, True))
    assert not train & held_out
    assert train | held_out == set(TEXTS)
    assert held_out == {path for path in TEXTS if is_held_out(path, 0.2)}


def test_documents_come_in_order_of_their_paths(folder):
    paths = [f["path"] for f in open_data(config(folder)).manifest["files"]]
    assert paths == sorted(TEXTS)


def test_the_manifest_lists_every_file(folder):
    manifest = open_data(config(folder)).manifest
    for file in manifest["files"]:
        content = TEXTS[file["path"]].encode()
        assert file["bytes"] == len(content)
        assert file["sha256"] == hashlib.sha256(content).hexdigest()
    assert manifest == json.loads(json.dumps(manifest))
    assert manifest["needs"] == {"vocab_size": 257}


def test_the_same_files_elsewhere_have_the_same_hash(folder, tmp_path):
    write(tmp_path / "elsewhere", dict(reversed(TEXTS.items())))
    first, again = open_data(config(folder)), open_data(config(folder))
    moved = open_data(config(tmp_path / "elsewhere"))
    assert first.manifest == again.manifest
    assert moved.manifest["hash"] == first.manifest["hash"]


@pytest.mark.parametrize("change", ["byte", "name", "gone", "new"])
def test_any_change_of_a_file_changes_the_hash(folder, change):
    before = open_data(config(folder)).manifest["hash"]
    file = folder / "doc03.py"
    if change == "byte":
        file.write_bytes(file.read_bytes().replace(b"# 3", b"# 4"))
    elif change == "name":
        file.rename(folder / "doc03b.py")
    elif change == "gone":
        file.unlink()
    else:
        (folder / "new.py").write_text("new")
    assert open_data(config(folder)).manifest["hash"] != before


@pytest.mark.parametrize("change", [{"sequence_length": 17}, {"batch_size": 5}, {"held_out": 0.4}])
def test_settings_that_decide_the_batches_change_the_hash(folder, change):
    assert open_data(config(folder, **change)).manifest["hash"] != open_data(config(folder)).manifest["hash"]


@pytest.mark.parametrize("length", [5, 16, 33])
def test_held_out_bytes_are_all_counted_up_to_the_cut_tail(folder, length):
    data = open_data(config(folder, sequence_length=length))
    counted = sum(int(batch["target_bytes"].sum()) for batch in data.held_out_batches())
    weights = sum(float(batch["weights"].sum()) for batch in data.held_out_batches())
    documents = [d.text.encode() for d in open_corpus(config(folder)).split(held_out=True)]
    stream = b"".join(b"\0" + text.replace(b"\0", b"?") for text in documents)  # one byte a token, BOS as \0
    covered = stream[1 : 1 + (len(stream) - 1) // length * length]
    assert counted == weights == len(covered) - covered.count(b"\0")
    assert 0 <= sum(map(len, documents)) - counted < length


def test_sentencepiece_counts_the_same_held_out_bytes(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizers, "CACHE", str(tmp_path / "cache"))
    settings = config(folder, tokenizer="sentencepiece:290")
    data = open_data(settings)
    counted = sum(int(batch["target_bytes"].sum()) for batch in data.held_out_batches())
    rows = data.held_out
    cut = rows.token_bytes[rows.tokens[len(rows) * rows.length + 1 :]].sum()
    assert counted + cut == len(held_out_bytes(settings))
    assert data.manifest["needs"] == {"vocab_size": 290}
    assert data.manifest["tokenizer"]["trained_on"] == open_corpus(settings).training_hash()
    assert open_data(settings).manifest == data.manifest


def test_another_process_makes_the_same_batches(folder):
    settings = config(folder, seed=4)
    script = (
        "import hashlib; from configs.schema import TextData; from data import open_data\n"
        f"data = open_data(TextData(**{dataclasses.asdict(settings)!r}))\n"
        "print(data.manifest['hash'], [data.train_batch(s)['tokens'].tolist() for s in range(30, 33)])"
    )
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=root, env=env, capture_output=True, text=True, check=True
    )
    data = open_data(settings)
    assert (
        result.stdout.strip()
        == f"{data.manifest['hash']} {[data.train_batch(s)['tokens'].tolist() for s in range(30, 33)]}"
    )


def test_skipped_files_are_reported_by_reason(folder):
    write(folder, {"latin.py": b"gr\xf6\xdfe", "latin2.py": b"\xff", "empty.py": b"", "notes.txt": b"not asked for"})
    os.symlink(folder / "gone", folder / "dangling.py")
    os.symlink(folder / "deep", folder / "link")
    os.mkfifo(folder / "pipe.py")
    (folder / "folder.py").mkdir()
    data = open_data(config(folder))
    assert data.skipped == [
        ("dangling.py", "unreadable"),
        ("empty.py", "empty"),
        ("latin.py", "not UTF-8"),
        ("latin2.py", "not UTF-8"),
        ("link", "linked folder"),
        ("pipe.py", "not a regular file"),
    ]
    assert len(data.manifest["files"]) == len(TEXTS)
    assert len(data.describe()) == 3
    assert data.describe()[2] == (
        "skipped 6 files: 1 empty (empty.py), 1 linked folder (link), 1 not UTF-8 (latin.py, ...), "
        "1 not a regular file (pipe.py), 1 unreadable (dangling.py)"
    ).replace("1 not UTF-8", "2 not UTF-8")


def test_the_plan_counts_files_bytes_tokens_and_rows(folder):
    data = open_data(config(folder))
    counts = data.manifest["counts"]
    held_out = sum(is_held_out(path, 0.2) for path in TEXTS)
    assert counts["bytes"] == sum(len(text.encode()) for text in TEXTS.values())
    assert counts["train_tokens"] + counts["held_out_tokens"] == counts["bytes"] + len(TEXTS)
    assert len(data.describe()) == 2
    assert f"{40 - held_out} training and {held_out} held-out files" in data.describe()[0]
    assert f"{counts['train_rows']:,} rows of 16" in data.describe()[1]


@pytest.mark.parametrize(
    ("path", "pattern", "expected"),
    [
        ("a.py", "**/*.py", True),
        ("x/y/a.py", "**/*.py", True),
        ("x/y/a.py", "*.py", False),
        ("x/a.py", "*/*.py", True),
        ("x/y/a.py", "x/**/a.py", True),
        ("x/a.py", "x/**/a.py", True),
        ("x/a.txt", "**", True),
        ("x/a.py", "y/**", False),
        ("x/a.py", "x", False),
    ],
)
def test_patterns_are_globs_with_any_depth(path, pattern, expected):
    assert matches(tuple(path.split("/")), tuple(pattern.split("/"))) is expected


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=f"corpus folder {tmp_path}/none does not exist"):
        open_data(config(tmp_path / "none"))


def test_a_file_is_no_corpus_folder(folder):
    with pytest.raises(DataError, match=r"doc00.py is not a folder"):
        open_data(config(folder / "doc00.py"))


def test_a_pattern_that_matches_nothing_is_named(folder):
    with pytest.raises(DataError, match=rf"folder {folder} with pattern \*.rs has no file"):
        open_data(config(folder, pattern="*.rs"))


def test_a_corpus_of_unusable_files_says_why(tmp_path):
    write(tmp_path, {"a.py": b"", "b.py": b"\xff", "c.py": b"\xfe"})
    with pytest.raises(DataError) as error:
        open_data(config(tmp_path))
    assert str(error.value) == (
        f"folder {tmp_path} with pattern **/*.py has no usable document: "
        f"skipped 3 files: 1 empty (a.py), 2 not UTF-8 (b.py, ...)"
    )


@pytest.mark.parametrize(("share", "missing"), [(1e-9, "held-out"), (1 - 1e-9, "training")])
def test_a_split_without_a_document_is_refused(folder, share, missing):
    with pytest.raises(DataError, match=f"has 40 usable documents, but data.held_out=.* leaves no {missing} one"):
        open_data(config(folder, held_out=share))


def test_a_corpus_shorter_than_a_row_is_refused(folder):
    (folder / "empty.py").touch()
    with pytest.raises(DataError) as error:
        open_data(config(folder, sequence_length=10_000))
    assert "40 usable documents (skipped 1 file: 1 empty (empty.py))" in str(error.value)
    assert "training tokens are fewer than the 10001 of one row" in str(error.value)


def test_held_out_documents_shorter_than_a_row_are_refused(folder):
    rows = open_data(config(folder)).manifest["counts"]
    with pytest.raises(DataError, match=f"its {rows['held_out_tokens']} held-out tokens are fewer"):
        open_data(config(folder, sequence_length=rows["held_out_tokens"]))


def test_the_standard_library_comes_without_tests_and_packages():
    data = open_data(TextData())
    paths = [f["path"] for f in data.manifest["files"]]
    assert data.manifest["counts"]["folder"] == sysconfig.get_path("stdlib")
    assert {"abc.py", "json/decoder.py"} <= set(paths)
    assert not [p for p in paths if {"test", "tests", "idle_test", "site-packages"} & set(p.split("/"))]
    assert data.manifest["counts"]["bytes"] > 5e6


def test_no_source_imports_jax_or_a_heavy_library_before_it_needs_it(folder):
    script = (
        f"import sys; from configs.schema import TextData; from data import open_data\n"
        f"open_data(TextData(**{dataclasses.asdict(config(folder))!r})).train_batch(0)\n"
        f"print([m for m in ('jax', 'grain', 'sentencepiece', 'sklearn') if m in sys.modules])"
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    result = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_bigram_entropy_agrees_with_closed_forms():
    assert bigram_entropy(b"ab" * 1000) == 0
    noise = np.random.default_rng(0).integers(0, 2, 200_000, dtype=np.uint8).tobytes()
    assert bigram_entropy(noise) == pytest.approx(1, abs=1e-3)


def test_reasons_are_counted_in_one_line():
    assert count_reasons([("a", "empty")]) == "1 file: 1 empty (a)"
