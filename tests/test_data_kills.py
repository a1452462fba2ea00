"""Readers that are killed at random points and started again on other numbers of hosts: each row exactly once an epoch."""

import hashlib
import json
import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest
from pictures import encoded, picture
from runs import ROOT

from configs.schema import ImageData, PreparedData
from data import open_data
from data.prepare.pipeline import Settings, prepare

ROWS, EPOCHS = 8, 3
FIELDS = {"images": "images"}  # by packing; tokens of text
READ = """
import sys, time
import numpy as np
from data import open_data, prepared
from test_data_kills import FIELDS, config_of, names_of
source, packing, cache, log, start, host, hosts = sys.argv[1:]
prepared.CACHE = cache
data = open_data(config_of(source, packing), np.array_split(np.arange(8), int(hosts))[int(host)])
with open(log, "w") as lines:
    for step, batch in enumerate(data.train_batches(int(start)), int(start)):
        names = names_of(batch[FIELDS.get(packing, "tokens")])
        lines.write(" ".join([str(step), *names]) + "\\n")
        lines.flush()
        time.sleep(0.01)
"""


def config_of(source, packing):
    """Of rows of tokens, or of images: as small as tells them apart."""
    if packing == "images":
        return ImageData(source=source, channels=3, image_size=8, batch_size=ROWS)
    return PreparedData(sources=(source,), packing=packing, sequence_length=64, batch_size=ROWS)


def names_of(rows):
    return [hashlib.sha256(row.tobytes()).hexdigest() for row in rows]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("kills") / "images"
    for label in ("ant", "bee"):
        (root / label).mkdir(parents=True)
    for i in range(150):
        (root / ("ant", "bee")[i % 2] / f"{i:03}.png").write_bytes(encoded(picture(i), "PNG"))
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Documents of random words, so that no two rows are alike."""
    root, rng = tmp_path_factory.mktemp("kills"), random.Random(0)
    texts = (" ".join(f"{rng.randrange(10**6)}" for _ in range(rng.randrange(1, 30))) for _ in range(80))
    (root / "raw.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare(Settings(str(root / "raw.jsonl"), str(root / "out"), held_out=0.1, workers=1), lambda line: None)
    return root / "out"


def until_killed(folder, packing, cache, start, hosts, last, enough=any):
    """Starts a reader a host and kills all once any (or all) of them have read step `last`. Returns names of rows by step, of the steps that
    every host has told of: a checkpoint can't be newer."""
    logs = [cache / f"{start}-{host}-of-{hosts}" for host in range(hosts)]
    words = [[str(folder), packing, str(cache), str(log), str(start), str(host)] for host, log in enumerate(logs)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu"}
    readers = [
        subprocess.Popen([sys.executable, "-c", READ, *each, str(hosts)], env=environment, cwd=ROOT) for each in words
    ]
    try:
        while not enough(last in steps_of(log) for log in logs):
            assert all(reader.poll() is None for reader in readers), "a reader ended by itself"
            time.sleep(0.005)
    finally:
        for reader in readers:
            reader.kill()
            reader.wait()
    found = [steps_of(log) for log in logs]
    told = sorted(set.intersection(*map(set, found)))
    return {step: [name for steps in found for name in steps[step]] for step in told}


def steps_of(log):
    """Names by step; a line that a kill cut off counts for nothing."""
    whole = log.read_text().rpartition("\n")[0] if log.exists() else ""
    return {int(line.split()[0]): line.split()[1:] for line in whole.splitlines()}


def check_lives(folder, packing, cache, seed, most_hosts, lives):
    """`lives` kills; before each the readers go on from a step at or before the last that was told of, as from a checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.prepared.CACHE", str(cache))
        data = open_data(config_of(str(folder), packing))
        rows = data.train if packing == "images" else data.train.sources[0]
        names = names_of(rows.read(np.arange(len(rows)))[FIELDS.get(packing, "tokens")])
    assert len(set(names)) == len(names) > 100
    steps = -(-EPOCHS * len(names) // ROWS)
    rng, seen, hosts = random.Random(seed), {}, 0
    for life in range(lives):
        hosts = rng.choice([n for n in range(1, most_hosts + 1) if n != hosts])
        start = max(len(seen) - rng.randrange(3), 0)  # steps after the checkpoint are read once more
        last = steps if life == lives - 1 else rng.randrange(start, start + 2 * steps // lives)
        again = until_killed(folder, packing, cache, start, hosts, last, all if life == lives - 1 else any)
        for step in sorted(again):
            assert seen.setdefault(step, again[step]) == again[step]  # in the order of the rows, on any number of hosts
        assert sorted(seen) == list(range(len(seen)))
    order = [name for step in range(steps) for name in seen[step]]
    for epoch in range(EPOCHS):
        assert sorted(order[epoch * len(names) : (epoch + 1) * len(names)]) == sorted(names)
    assert order[: len(names)] != order[len(names) : 2 * len(names)]


def test_rows_are_read_once_an_epoch_by_readers_that_are_killed(folder, tmp_path):
    check_lives(folder, "concat", tmp_path, seed=1, most_hosts=2, lives=3)


@pytest.mark.slow
@pytest.mark.parametrize(("packing", "seed"), [("concat", 2), ("best-fit", 3)])
def test_rows_are_read_once_an_epoch_however_often_readers_are_killed(folder, packing, seed, tmp_path):
    check_lives(folder, packing, tmp_path, seed, most_hosts=5, lives=6)


def test_images_are_read_once_an_epoch_by_readers_that_are_killed(images, tmp_path):
    """arXiv 2310.16764 blames a loader that did not for a bent curve of its largest model."""
    check_lives(images, "images", tmp_path, seed=4, most_hosts=2, lives=3)


@pytest.mark.slow
def test_images_are_read_once_an_epoch_however_often_readers_are_killed(images, tmp_path):
    check_lives(images, "images", tmp_path, seed=5, most_hosts=5, lives=6)
