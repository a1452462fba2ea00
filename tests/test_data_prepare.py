"""`podwright data prepare`: every format gives the same documents, nothing is lost by a kill, copies and bad ones are counted."""

import gzip
import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from runs import ROOT

from data.dataset import DataError
from data.prepare.formats import Unusable, format_of
from data.prepare.pipeline import WORK, Settings, prepare
from data.prepare.scan import exact_copies
from data.prepare.sources import open_source
from data.prepared import documents_of, files_of, read_manifest
from data.tf_example import features
from data.token_shards import BLOCK, HEADER

TEXTS = [f"document {i}: " + "größe und wert " * (i % 17 + 1) + "\n" for i in range(60)]


def said(line):
    pass


def ready(source, to, **settings):
    return prepare(Settings(str(source), str(to), **{"held_out": 0.2, "workers": 1, **settings}), said)


def as_texts(folder):
    for i, text in enumerate(TEXTS):
        (folder / f"{i:03}.txt").write_text(text)


def lines(texts):
    return "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)).encode()


def as_lines(folder):
    (folder / "a.jsonl").write_bytes(lines(TEXTS[:25]))
    (folder / "b.jsonl").write_bytes(lines(TEXTS[25:]))


def as_gzip(folder):
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines(TEXTS)))


def as_zstd(folder):
    frames = [zstandard.compress(lines(part)) for part in (TEXTS[:40], TEXTS[40:])]
    (folder / "a.jsonl.zst").write_bytes(b"".join(frames))


def as_parquet(folder):
    table = pyarrow.table({"id": range(len(TEXTS)), "text": TEXTS})
    pyarrow.parquet.write_table(table, folder / "train-00000-of-00001.parquet", row_group_size=7)
    (folder / "README.md").write_text("about the data: no document")


def as_arrow_stream(folder):
    """What `datasets.Dataset.save_to_disk` writes."""
    table = pyarrow.table({"text": TEXTS})
    with pyarrow.ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=9)
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text("{}")


def as_records(folder):
    """What TFDS writes: tf.train.Example in ArrayRecord files with numbers at the end of their names."""
    writer = ArrayRecordWriter(str(folder / "c4-train.array_record-00000-of-00001"), "group_size:1")
    for text in TEXTS:
        writer.write(example(text=[text.encode()], length=[len(text)]))
    writer.close()
    (folder / "features.json").write_text("{}")


def example_class():
    """tf.train.Example as TensorFlow declares it, for Google's own protobuf package."""
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")
    kind = descriptor_pb2.FieldDescriptorProto

    def message(name, *fields):
        one = file.message_type.add(name=name)
        for number, (field, what, repeated) in enumerate(fields, start=1):
            added = one.field.add(name=field, number=number)
            added.label = kind.LABEL_REPEATED if repeated else kind.LABEL_OPTIONAL
            added.type = kind.TYPE_MESSAGE if isinstance(what, str) else what
            if isinstance(what, str):
                added.type_name = f".t.{what}"
        return one

    message("BytesList", ("value", kind.TYPE_BYTES, True))
    message("FloatList", ("value", kind.TYPE_FLOAT, True))
    message("Int64List", ("value", kind.TYPE_INT64, True))
    message(
        "Feature",
        ("bytes_list", "BytesList", False),
        ("float_list", "FloatList", False),
        ("int64_list", "Int64List", False),
    )
    features = message("Features", ("feature", "Features.FeatureEntry", True))
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, label=kind.LABEL_OPTIONAL, type=kind.TYPE_STRING)
    entry.field.add(name="value", number=2, label=kind.LABEL_OPTIONAL, type=kind.TYPE_MESSAGE, type_name=".t.Feature")
    message("Example", ("features", "Features", False))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))


def example(**values):
    made = example_class()()
    for name, items in values.items():
        feature = made.features.feature[name]
        kind = {bytes: "bytes_list", float: "float_list", int: "int64_list"}[type(items[0])]
        getattr(feature, kind).value.extend(items)
    return made.SerializeToString()


FORMATS = (as_texts, as_lines, as_gzip, as_zstd, as_parquet, as_arrow_stream, as_records)


@pytest.mark.parametrize("write", FORMATS, ids=lambda write: write.__name__[3:])
def test_every_format_gives_the_same_shards(write, tmp_path):
    (tmp_path / "raw").mkdir()
    write(tmp_path / "raw")
    manifest = ready(tmp_path / "raw", tmp_path / "out")
    assert manifest["counts"]["documents"]["used"] == len(TEXTS)
    # A closed form: a document is BOS (256) and its bytes, documents of a shard stand in the order of their hashes.
    for split, held_out in (("train", False), ("held_out", True)):
        expected = sorted((key(text), text) for text in TEXTS if is_held(text) is held_out)
        ids = [number for _, text in expected for number in (256, *text.encode())]
        assert stream_of(tmp_path / "out", manifest, split) == ids
        assert manifest["counts"][f"{split} documents"] == len(expected)


def key(text):
    return struct.unpack("<QQ", hashlib.sha256(text.encode()).digest()[:16])


def is_held(text):
    digest = hashlib.sha256(b"%016x%016x" % key(text)).digest()
    return int.from_bytes(digest[:8], "big") < 0.2 * 2**64


def stream_of(folder, manifest, split):
    """Token ids by reading ArrayRecord alone."""
    ids = []
    for shard in manifest["splits"][split]:
        reader = ArrayRecordReader(str(folder / shard["file"]))
        for record in reader.read_all():
            ids += np.frombuffer(record, "<u2", offset=HEADER.itemsize).tolist()
    return ids


def test_a_file_cut_into_pieces_gives_each_line_once(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(lines(TEXTS))
    found = format_of("a.jsonl")
    for size in (1, 7, 100, 1000, 10**6):
        pieces = found.split(str(file), "a.jsonl", size)
        read = [one for piece in pieces for one in found.read(str(file), piece, "text")]
        assert [text for _, text in read] == TEXTS
        starts = [0, *np.cumsum([len(line) for line in file.read_bytes().splitlines(keepends=True)])[:-1]]
        assert [place for place, _ in read] == starts


def test_features_of_an_example_are_those_of_protobuf():
    made = example(a=[b"x", b"\n\xff"], b=[1, -1, 2**62, -(2**63)], c=[0.5, -1e30])
    assert features(made) == {"a": [b"x", b"\n\xff"], "b": [1, -1, 2**62, -(2**63)], "c": pytest.approx([0.5, -1e30])}
    for cut in range(1, len(made)):
        with pytest.raises(ValueError, match=r"."):
            features(made[:cut])


def test_shards_do_not_depend_on_the_number_of_processes(tmp_path, monkeypatch):
    monkeypatch.setattr("data.prepare.sources.SMALLEST_UNIT", 1500)
    (tmp_path / "raw").mkdir()
    as_lines(tmp_path / "raw")
    one = ready(tmp_path / "raw", tmp_path / "one")
    two = ready(tmp_path / "raw", tmp_path / "two", workers=2)
    assert len(one["splits"]["train"]) > 4
    assert one["hash"] == two["hash"]
    assert one["splits"] == two["splits"]


def test_blocks_know_their_document_and_place(tmp_path):
    """Documents longer than a block, read one block at a time."""
    (tmp_path / "raw.jsonl").write_bytes(lines(["a" * 10_000, "b" * 5_000, "c" * 3, "d" * 20_000, "e", "f"]))
    manifest = ready(tmp_path / "raw.jsonl", tmp_path / "out", held_out=0.3)
    for split in ("train", "held_out"):
        ids = stream_of(tmp_path / "out", manifest, split)
        starts = [i for i, token in enumerate(ids) if token == 256]
        for shard in manifest["splits"][split]:
            records = ArrayRecordReader(str(tmp_path / "out" / shard["file"])).read_all()
            for number, record in enumerate(records):
                at = number * BLOCK
                before = [start for start in starts if start <= at]
                assert struct.unpack("<qq", record[:16]) == (len(before) - 1, at - before[-1])


def test_where_each_document_came_from_is_kept(tmp_path):
    (tmp_path / "raw").mkdir()
    as_lines(tmp_path / "raw")
    manifest = ready(tmp_path / "raw", tmp_path / "out")
    files = files_of(str(tmp_path / "out"))
    shard = manifest["splits"]["train"][0]
    ids = np.array(stream_of(tmp_path / "out", manifest, "train"))
    table = documents_of(str(tmp_path / "out"), shard)
    assert len(table) == shard["documents"] > 40
    for row, end in zip(table, [*table["start"][1:], len(ids)], strict=True):
        line = (tmp_path / "raw" / files[row["file"]]).read_bytes()[row["place"] :].splitlines()[0]
        assert bytes(ids[row["start"] + 1 : end].tolist()).decode() == json.loads(line)["text"]
        assert row["bytes"] == end - row["start"] - 1


def test_copies_are_dropped_wherever_they_are(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.jsonl").write_bytes(lines([*TEXTS, TEXTS[3]]))
    (tmp_path / "raw" / "b.jsonl").write_bytes(lines([TEXTS[0], "new", TEXTS[59]]))
    manifest = ready(tmp_path / "raw", tmp_path / "out")
    assert manifest["counts"]["documents"] == {
        "found": 64,
        "used": 61,
        "exact copies": 3,
        "near copies": 0,
        "unusable": 0,
    }
    assert manifest["counts"]["train documents"] + manifest["counts"]["held_out documents"] == 61


def test_exact_copies_are_those_after_the_first():
    keys = np.random.default_rng(0).integers(0, 6, (500, 2)).astype(np.uint64)
    seen = set()
    expected = [tuple(one) in seen or seen.add(tuple(one)) or False for one in keys.tolist()]
    assert exact_copies(keys).tolist() == expected


def test_near_copies_are_dropped_from_the_similarity_asked_for(tmp_path):
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in rng.integers(0, 5000, 400)]
    changed = [*words]
    changed[200] = "another"  # 5 of 396 runs of five words differ: Jaccard 391 / 401
    other = [f"v{i}" for i in rng.integers(0, 5000, 400)]
    half = [*words[:200], *other[:200]]  # Jaccard 196 / 596 with either
    texts = [" ".join(one) for one in (words, changed, other, half)] + TEXTS[:1]
    (tmp_path / "raw.jsonl").write_bytes(lines(texts))
    counts = {
        limit: ready(tmp_path / "raw.jsonl", tmp_path / str(limit), near_duplicates=limit, held_out=0.5)["counts"]
        for limit in (0.0, 0.8)
    }
    assert counts[0.0]["documents"]["near copies"] == 0
    assert counts[0.8]["documents"] == {"found": 5, "used": 4, "exact copies": 0, "near copies": 1, "unusable": 0}


def test_bad_documents_are_counted_by_kind_and_listed(tmp_path):
    (tmp_path / "raw").mkdir()
    good = lines(TEXTS)
    bad = b'{"text": ""}\nnot json\n{"other": 1}\n{"text": 5}\n\xff\xfe\n{"text": "\\ud800"}\n\n[1]\n'
    (tmp_path / "raw" / "a.jsonl").write_bytes(good + bad)
    (tmp_path / "raw" / "b.jsonl").write_bytes(lines(["x" * 2000]))
    (tmp_path / "raw" / "c.jsonl.gz").write_bytes(gzip.compress(lines(["one more, " + "y" * 50]))[:-20])
    os.mkfifo(tmp_path / "raw" / "pipe.jsonl")
    with pytest.raises(DataError, match=r"9 of 69 documents are unusable, more than --max-bad 0.1 allows"):
        ready(tmp_path / "raw", tmp_path / "refused", max_bytes=1000)
    manifest = ready(tmp_path / "raw", tmp_path / "out", max_bytes=1000, max_bad=0.5)
    assert manifest["counts"]["unusable"] == {
        "damaged or cut off from here on": 1,
        "empty": 1,
        "half a character in it": 1,
        "longer than 1000 bytes": 1,
        "not JSON": 1,
        "not UTF-8": 1,
        "without a text field 'text'": 3,
    }
    listed = [json.loads(line) for line in (tmp_path / "out" / "bad_records.jsonl").read_text().splitlines()]
    assert listed[0] == {"file": "pipe.jsonl", "reason": "not a regular file"}
    empty = next(line for line in listed if line["reason"] == "empty")
    assert empty == {"file": "a.jsonl", "place": len(good), "reason": "empty"}
    assert manifest["counts"]["documents"]["used"] == len(TEXTS)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.parquet", b"PAR1 this is none", "damaged or cut off from here on"),
        ("a.arrow", b"none", "damaged or cut off from here on"),
        ("a.array_record", b"none", "damaged or cut off from here on"),
        ("a.jsonl.zst", zstandard.compress(lines(TEXTS))[:60], "damaged or cut off from here on"),
        ("a.txt", b"\xff\xff", "not UTF-8"),
    ],
    ids=["parquet", "arrow", "records", "zstd", "text"],
)
def test_a_damaged_file_is_one_bad_document(name, content, reason, tmp_path):
    (tmp_path / name).write_bytes(content)
    source = open_source(str(tmp_path / name), "", "text")
    read = [found for unit in range(len(source.units)) for _, (_, found) in source.read(unit)]
    assert read[-1] == Unusable(reason)


def test_nothing_to_prepare_is_one_sentence(tmp_path):
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(DataError, match=r"the files of .* are all empty: nothing to prepare"):
        open_source(str(tmp_path), "", "text")
    with pytest.raises(DataError, match=r"holds no file that matches \*\*/\*.md: nothing to prepare"):
        open_source(str(tmp_path), "**/*.md", "text")


def test_a_table_without_the_field_says_what_it_has(tmp_path):
    as_parquet(tmp_path)
    source = open_source(str(tmp_path), "", "body")
    assert next(source.read(0))[1][1] == Unusable("a table without a column 'body': it has id, text")


def test_a_killed_preparation_goes_on_where_it_was(tmp_path):
    """SIGKILL at several moments: what was done stays, what comes out is the same."""
    (tmp_path / "raw").mkdir()
    for number in range(8):
        texts = [f"{number} {i} " + "wort " * 400 for i in range(2500)]
        (tmp_path / "raw" / f"{number}.jsonl").write_bytes(lines(texts))
    source, out = tmp_path / "raw", tmp_path / "out"
    command = [sys.executable, "-m", "launch", "data", "prepare", str(source), "--to", str(out), "--held-out", "0.2"]
    kills = 0
    for seen in ("scan-00001.npz", "scan-00003.npz", "shards-00001.json", "shards-00004.json"):
        before = {file.name: file.stat().st_mtime_ns for file in (out / WORK).glob("*-*") if file.suffix != ".partial"}
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while not (out / WORK / seen).exists() and process.poll() is None:
            time.sleep(0.002)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
        after = {file.name: file.stat().st_mtime_ns for file in (out / WORK).glob("*-*") if file.suffix != ".partial"}
        assert before.items() <= after.items()  # nothing that was done is done again
        assert not (out / "manifest.json").exists()
        time.sleep(1.2)  # the pool's processes notice within a second
    assert kills == 4
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert read_manifest(str(out))["splits"] == ready(source, tmp_path / "undisturbed")["splits"]
    assert sorted(file.name for file in out.iterdir() if file.name.startswith(".")) == []
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "holds them already: nothing to do" in again.stdout


def test_what_is_there_is_never_overwritten(tmp_path):
    (tmp_path / "raw").mkdir()
    as_texts(tmp_path / "raw")
    ready(tmp_path / "raw", tmp_path / "out")
    with pytest.raises(DataError, match="already holds prepared data, of other settings or files: give another --to"):
        ready(tmp_path / "raw", tmp_path / "out", held_out=0.3)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(DataError, match=r"mine holds thesis.tex: give --to an empty or a new folder"):
        ready(tmp_path / "raw", tmp_path / "mine")
    (tmp_path / "half" / WORK).mkdir(parents=True)
    (tmp_path / "half" / WORK / "asked.json").write_text('{"tokenizer": "bytes", "source": "elsewhere"}')
    with pytest.raises(DataError, match=r"half was begun with another source, pattern, field"):
        ready(tmp_path / "raw", tmp_path / "half")


def test_a_trained_tokenizer_lies_beside_the_shards_and_is_trained_on_training_documents(tmp_path):
    (tmp_path / "raw").mkdir()
    as_texts(tmp_path / "raw")
    manifest = ready(tmp_path / "raw", tmp_path / "out", tokenizer="sentencepiece:300")
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "out" / "tokenizer.model"))
    assert manifest["tokenizer"]["vocab_size"] == model.get_piece_size() == 300
    ids = stream_of(tmp_path / "out", manifest, "held_out")
    expected = sorted((key(text), text) for text in TEXTS if is_held(text))
    assert ids == [i for _, text in expected for i in (model.bos_id(), *model.encode(text))]


def test_verify_finds_a_changed_token_and_a_cut_file(tmp_path, capsys):
    from launch.cli import main

    (tmp_path / "raw").mkdir()
    as_texts(tmp_path / "raw")
    out = tmp_path / "out"
    manifest = ready(tmp_path / "raw", out)
    assert main(["data", "verify", str(out)]) == 0
    shard = out / manifest["splits"]["train"][0]["file"]
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    assert main(["data", "verify", str(out)]) == 3
    records = ArrayRecordReader(str(out / manifest["splits"]["held_out"][0]["file"])).read_all()
    writer = ArrayRecordWriter(str(shard), "group_size:1")
    writer.write(records[0])
    writer.close()
    assert main(["data", "verify", str(out)]) == 3
    assert "holds other tokens than were written" in capsys.readouterr().err
    shard.write_bytes(content)
    assert main(["data", "verify", str(out)]) == 0
    table = out / shard.name.replace(".arrayrecord", ".documents.npy")
    table.write_bytes(table.read_bytes()[:-8] + b"\1" * 8)
    assert main(["data", "verify", str(out)]) == 3
    assert "table of documents" in capsys.readouterr().err


def test_inspect_shows_lengths_and_documents(tmp_path, capsys):
    from launch.cli import main

    (tmp_path / "raw").mkdir()
    as_texts(tmp_path / "raw")
    ready(tmp_path / "raw", tmp_path / "out", license="CC0")
    assert main(["data", "inspect", str(tmp_path / "out"), "--samples", "60"]) == 0
    out = capsys.readouterr().out
    training = [text for text in TEXTS if not is_held(text)]
    assert all(text.strip() in out for text in training)
    sizes = [1 + len(text.encode()) for text in training]
    rows = {line.split()[0]: line.split()[3] for line in out.splitlines() if " to " in line and "tokens" in line}
    assert rows == {
        f"{low:,}": str(sum(low <= size < 2 * low for size in sizes))
        for low in (2**power for power in range(4, 10))
        if f"{low:,}" in rows
    }
    assert sum(map(int, rows.values())) == len(training)
    assert "licence     CC0" in out


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["prepare", "gs://bucket/x", "--to", "x"], 3, "gs://bucket/x is not on this machine: copy it here first"),
        (["prepare", "/nowhere", "--to", "x"], 3, "/nowhere is neither a file nor a folder"),
        (["prepare", "stdlib"], 2, "required: --to"),
        (["prepare", "stdlib", "--to", "gs://bucket/x"], 2, "--to gs://bucket/x is not a folder of this machine"),
        (["prepare", "stdlib", "--to", "x", "--held-out", "2"], 2, "argument --held-out: invalid share value: '2'"),
        (["prepare", "stdlib", "--to", "x", "--tokenizer", "bites"], 2, "tokenizer='bites' is not known"),
        (["inspect", "/nowhere"], 3, "/nowhere holds no prepared data (no manifest.json)"),
        (["verfiy", "x"], 2, "there is no command data 'verfiy', perhaps verify"),
    ],
)
def test_a_mistake_is_one_sentence(words, code, sentence, tmp_path, monkeypatch, capsys):
    from launch.cli import main

    monkeypatch.chdir(tmp_path)
    assert main(["data", *words]) == code
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "x" / "manifest.json").exists()
