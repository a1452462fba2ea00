"""Prepared data in cloud storage: the batches of a local copy, whatever the storage does in between."""

import hashlib
import json
import os
import subprocess
import sys

import pytest
from cloud import cloud
from pictures import encoded, picture
from runs import ROOT, finish, train_command
from test_photos import CLASSES, records

from configs.schema import ImageData, PreparedData
from data import open_data
from data.prepare.pipeline import Settings, prepare

STEPS = 3
READ = f"""
import hashlib, sys
from configs.schema import PreparedData
from data import open_data, prepared
prepared.CACHE = sys.argv[3]
data = open_data(PreparedData(sources=(sys.argv[1],), packing=sys.argv[2]))
found = hashlib.sha256()
batches = data.train_batches(0)
for step in range({STEPS}):
    for name, rows in sorted(next(batches).items()):
        found.update(rows.tobytes())
print(found.hexdigest())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("cloud")
    lines = (json.dumps({"text": f"{i} " + "tekst og ord " * (i % 40)}) + "\n" for i in range(2000))
    (root / "raw.jsonl").write_text("".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.prepare.sources.SMALLEST_UNIT", 100_000)
        prepare(Settings(str(root / "raw.jsonl"), str(root / "out"), held_out=0.1, workers=1), lambda line: None)
    return root / "out"


@pytest.fixture(scope="module")
def storage(folder):
    with cloud() as running:
        running.upload(folder, "texts")
        yield running


@pytest.fixture(autouse=True)
def no_faults(storage):
    storage.proxy.fault = lambda line: None
    storage.proxy.seen.clear()
    storage.proxy.injected.clear()


def read(storage, tmp_path, source="gs://bucket/texts", packing="concat"):
    """What a process of its own finds there: clients look for their storage when they are imported."""
    command = [sys.executable, "-c", READ, source, packing, str(tmp_path)]
    environment = {**os.environ, **storage.environment, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)


def local(folder, packing="concat"):
    data = open_data(PreparedData(sources=(str(folder),), packing=packing))
    found = hashlib.sha256()
    for step in range(STEPS):
        for _, rows in sorted(data.train_batch(step).items()):
            found.update(rows.tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("packing", ["concat", "best-fit"])
def test_batches_are_those_of_a_local_copy_and_shards_are_asked_for_by_ranges(
    packing, folder, storage, tmp_path, monkeypatch
):
    monkeypatch.setattr("data.prepared.CACHE", str(tmp_path / "local"))
    done = read(storage, tmp_path, packing=packing)
    assert done.stdout.strip() == local(folder, packing), done.stderr
    shards = [line for line in storage.proxy.seen if "arrayrecord" in line]
    assert shards
    assert all(" bytes=" in line for line in shards)


@pytest.mark.parametrize("fault", [429, 503, "cut", "reset", "slow"])
def test_requests_that_go_wrong_are_tried_again(fault, folder, storage, tmp_path):
    """The first request of every kind that the reader makes (the manifest, the end of a shard, a block), and some more."""
    tried = set()

    def once(line):
        kind = line.split("?")[0] + line[-6:]
        if kind in tried or len(tried) >= 5:
            return None
        tried.add(kind)
        return fault

    storage.proxy.fault = once
    done = read(storage, tmp_path)
    assert done.stdout.strip() == local(folder), done.stderr
    assert len(storage.proxy.injected) == len(tried) >= 4


def test_a_run_reads_from_cloud_storage(storage, tmp_path):
    words = [
        "--data.kind",
        "prepared",
        "--data.sources",
        "gs://bucket/texts",
        "--trainer.steps",
        "2",
        "--eval.every",
        "0",
    ]
    code, out, err = finish(train_command("griffin-tiny", tmp_path / "run", *words), env=storage.environment)
    assert code == 0, err
    assert "gs://bucket/texts: " in out


@pytest.mark.parametrize(
    ("source", "fault", "sentence"),
    [
        ("gs://bucket/nothing", None, "gs://bucket/nothing holds no prepared data (no manifest.json)"),
        ("gs://bucket/texts", 403, "gs://bucket/texts/manifest.json cannot be read: "),
    ],
)
def test_what_cannot_be_opened_is_one_sentence(source, fault, sentence, storage, tmp_path):
    storage.proxy.fault = lambda line: fault
    words = ["data", "inspect", source]
    code, _, err = finish([sys.executable, "-m", "launch", *words], env=storage.environment)
    assert code == 3
    assert sentence in err
    assert "Traceback" not in err


IMAGES = dict(channels=3, image_size=16, batch_size=6, augment="crop", mixup_alpha=0.2, held_out=0.3)
READ_IMAGES = f"""
import hashlib, sys
from configs.schema import ImageData
from data import open_data
data = open_data(ImageData(source=sys.argv[1], **{IMAGES}))
found = hashlib.sha256(data.manifest["hash"].encode())
batches = data.train_batches(0)
for batch in [*(next(batches) for _ in range({STEPS})), *data.held_out_batches(1)]:
    for name, rows in sorted(batch.items()):
        found.update(rows.tobytes())
print(found.hexdigest())
"""


@pytest.fixture(scope="module")
def images(storage, tmp_path_factory):
    """Twelve of each class, in folders and in three files of records; here and there."""
    root = tmp_path_factory.mktemp("pictures")
    for label, name in enumerate(CLASSES):
        (root / "folders" / name).mkdir(parents=True)
        for i in range(12):
            (root / "folders" / name / f"{i:02}.jpg").write_bytes(encoded(picture(20 * label + i)))
    records(root / "folders", root / "records")
    (root / "tables").mkdir()
    rows = [f"../folders/{name}/{i:02}.jpg,{name},{i}" for name in CLASSES for i in range(12)]
    (root / "tables" / "all.csv").write_text("\n".join(["path,label,unit", *rows]))
    for kind in ("folders", "records", "tables"):
        storage.upload(root / kind, f"pictures/{kind}")
    return root


def read_images(storage, source):
    environment = {**os.environ, **storage.environment, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", READ_IMAGES, source]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)


def local_images(source):
    data = open_data(ImageData(source=str(source), **IMAGES))
    found = hashlib.sha256(data.manifest["hash"].encode())
    for batch in [*map(data.train_batch, range(STEPS)), *data.held_out_batches(1)]:
        for _, rows in sorted(batch.items()):
            found.update(rows.tobytes())
    return found.hexdigest()


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        ("folders", 429),
        ("folders", 503),
        ("folders", "cut"),
        ("folders", "reset"),
        ("records", 503),
        ("records", "cut"),
        ("tables/all.csv", 503),
    ],
)
def test_images_are_those_of_a_local_copy_whatever_goes_wrong(kind, fault, images, storage):
    """The first request of every kind fails once: the list, the labels, ends of records, an image; and some more."""
    tried = set()

    def once(line):
        if line in tried or len(tried) >= 5:
            return None
        tried.add(line)
        return fault

    storage.proxy.fault = once
    done = read_images(storage, f"gs://bucket/pictures/{kind}")
    assert done.stdout.strip() == local_images(images / kind), done.stderr
    assert len(storage.proxy.injected) == 5


@pytest.mark.parametrize(
    ("source", "fault", "sentence"),
    [
        ("gs://bucket/nothing", None, "gs://bucket/nothing is neither a folder of images nor of ArrayRecord files"),
        ("gs://bucket/pictures/folders", 403, "gs://bucket/pictures/folders cannot be read: "),
    ],
)
def test_images_that_cannot_be_opened_are_one_sentence(source, fault, sentence, images, storage, tmp_path):
    storage.proxy.fault = lambda line: fault
    words = ["nfnet-tiny", "--data.source", source, "--data.channels", "3", "--model.channels", "3"]
    code, _, err = finish([sys.executable, "-m", "launch", "data", "bench", *words], env=storage.environment)
    assert code == 3
    assert sentence in err
    assert "Traceback" not in err
