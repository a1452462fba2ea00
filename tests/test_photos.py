"""Images of folders and records: the same batches on any host, bad ones replaced, and a run that trains on them."""

import dataclasses
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from pictures import encoded, picture
from runs import SMALL, finish, train_command
from test_data_prepare import example

from configs.schema import ConfigError, ImageData
from data import open_data
from data.bad_records import BadRecord, taken_from, with_bad
from data.dataset import DataError
from data.image_decoding import decoded, for_evaluation, normalised
from data.image_sources import open_source
from trainer.bad_records import BadRecords

CLASSES = ("ant", "bee", "cat")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """20 images of each class, as JPEG, PNG and WebP."""
    root = tmp_path_factory.mktemp("images") / "train"
    kinds = [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("JPEG", "JPEG")]
    for label, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for i in range(20):
            kind, suffix = kinds[i % 4]
            (root / name / f"{i:02}.{suffix}").write_bytes(encoded(picture(20 * label + i), kind))
        (root / name / "notes.txt").write_text("no image")
    return root


def config(folder, **fields):
    return ImageData(**{"source": str(folder), "channels": 3, "image_size": 32, "batch_size": 8, **fields})


EVERYTHING = dict(augment="crop", randaugment_layers=4, randaugment_magnitude=5.0, mixup_alpha=0.2, cutmix=True)


def test_labels_are_the_folders_by_name(folder):
    data = open_data(config(folder, held_out=0.3))
    assert data.manifest["needs"] == {"num_classes": 3, "channels": 3}
    batch = data.held_out.read(np.arange(len(data.held_out)))
    for number, image, label in zip(data.held_out.split.numbers, batch["images"], batch["labels"], strict=True):
        origin = data.held_out.split.source.origin(int(number))
        assert origin.source.startswith(CLASSES[label])
        pixels = for_evaluation(decoded((folder / origin.source).read_bytes()), 32)
        np.testing.assert_allclose(image, normalised(pixels), atol=1e-5)
    assert len(data.train) + len(data.held_out) == 60


def test_batches_are_the_same_on_any_number_of_hosts_and_new_in_each_epoch(folder):
    made = config(folder, **EVERYTHING)
    whole = open_data(made)
    for step in (0, 3, 40):
        batch = whole.train_batch(step)
        assert {name: rows.shape for name, rows in batch.items()} == {
            "images": (8, 32, 32, 3),
            "labels": (8,),
            "weights": (8,),
            "labels_b": (8,),
            "mix": (8,),
        }
        for hosts in (2, 4):
            parts = [open_data(made, rows).train_batch(step) for rows in np.split(np.arange(8), hosts)]
            for name, rows in batch.items():
                assert np.array_equal(np.concatenate([part[name] for part in parts]), rows)
    train, count = whole.train, len(whole.train)
    first, second = np.arange(count), np.arange(count, 2 * count)
    for epoch in (first, second):
        assert sorted(train.indices(epoch)) == list(range(count))
        assert (train.indices(epoch) != train.partners(epoch)).all()
    train = open_data(config(folder, augment="crop")).train
    same = {int(i): p for p, i in enumerate(train.indices(first))}
    again = train.indices(second)
    here = [same[int(i)] for i in again]
    assert not any(map(np.array_equal, train.read(second)["images"], train.read(np.array(here))["images"]))


def test_with_a_multiplicity_a_batch_has_each_of_its_images_so_often_and_never_alike(folder):
    once, often = (open_data(config(folder, augment="crop", multiplicity=n)).train for n in (1, 4))
    count = len(once)
    assert np.array_equal(often.indices(np.arange(4 * count)), np.repeat(once.indices(np.arange(count)), 4))
    batch = often.read(np.arange(8))
    assert len({image.tobytes() for image in batch["images"]}) == 8
    assert (batch["labels"].reshape(2, 4) == batch["labels"][::4, None]).all()


def test_mixing_goes_by_turns(folder):
    batch = open_data(config(folder, mixup_alpha=0.2, cutmix=True)).train_batch(1)
    only = {
        name: open_data(config(folder, **fields)).train_batch(1)
        for name, fields in (("up", dict(mixup_alpha=0.2)), ("cut", dict(cutmix=True)))
    }
    for place in range(8):
        assert batch["mix"][place] == only["cut" if place % 2 else "up"]["mix"][place]
    assert "mix" not in open_data(config(folder)).train_batch(1)


def test_workers_change_no_pixel(folder):
    made = config(folder, **EVERYTHING)
    batches = open_data(dataclasses.replace(made, workers=2)).train_batches(5)
    try:
        for step in (5, 6, 7):
            there, here = next(batches), open_data(made).train_batch(step)
            for name, rows in here.items():
                assert np.array_equal(there[name], rows)
    finally:
        batches.close()


def records(folder, to, classes=CLASSES):
    to.mkdir()
    (to / "label.labels.txt").write_text("".join(f"{name}\n" for name in classes))
    files = sorted(folder.glob("*/*.[jpJw]*"))
    for shard, part in enumerate(np.array_split(files, 3)):
        writer = ArrayRecordWriter(str(to / f"pets-train.array_record-{shard:05}-of-00003"), "group_size:1")
        for file in part:
            label = CLASSES.index(file.parent.name)
            writer.write(example(image=[file.read_bytes()], label=[label], file_name=[file.name.encode()]))
        writer.close()
    return to


def test_records_as_tfds_writes_them_hold_the_same_images(folder, tmp_path):
    source, there = open_source(str(records(folder, tmp_path / "records"))), open_source(str(folder))
    assert len(source) == len(there) == 60
    assert source.classes == 3
    assert list(source.read(np.arange(60))) == list(there.read(np.arange(60)))
    data = open_data(config(tmp_path / "records", held_out_source=str(tmp_path / "records")))
    assert len(data.train) == len(data.held_out) == 60


def test_bad_images_are_reported_and_replaced(folder, tmp_path):
    copy = tmp_path / "copy"
    for name in CLASSES:
        (copy / name).mkdir(parents=True)
        for file in (folder / name).iterdir():
            (copy / name / file.name).write_bytes(file.read_bytes())
    (copy / "ant" / "00.jpg").write_bytes((copy / "ant" / "00.jpg").read_bytes()[:-60])
    (copy / "bee" / "01.png").write_bytes(b"")
    train = open_data(config(copy, held_out_source=str(folder))).train
    batch = train.read(np.arange(60))
    found = {(record.source, record.reason) for record in taken_from(batch)}
    assert found == {("ant/00.jpg", "damaged or cut off"), ("bee/01.png", "empty")}
    assert len(batch["images"]) == 60
    bad = [p for p in range(60) if train.origins(np.array([p]))[0][0].source in ("ant/00.jpg", "bee/01.png")]
    for place in bad:
        alone = train.read(np.array([place]))
        assert np.array_equal(alone["images"][0], batch["images"][place])


def test_images_smaller_than_the_crop_are_enlarged(tmp_path):
    """One of one pixel, too; grey, CMYK and transparent ones are in test_image_operations.py."""
    (tmp_path / "ant").mkdir()
    for i, (height, width) in enumerate([(1, 1), (3, 5), (2, 30), (31, 32)] * 6):
        (tmp_path / "ant" / f"{i}.png").write_bytes(encoded(picture(i)[:height, :width], "PNG"))
    data = open_data(config(tmp_path, held_out=0.3, **EVERYTHING))
    for batch in (data.train_batch(0), data.train_batch(1), data.held_out.read(np.arange(len(data.held_out)))):
        assert taken_from(batch) == []
        assert batch["images"].shape[1:] == (32, 32, 3)
        assert np.isfinite(batch["images"]).all()
    point = data.held_out.read(np.arange(len(data.held_out)))["images"]
    assert any(np.ptp(image, axis=(0, 1)).max() < 1e-5 for image in point)  # that of one pixel has one colour


def test_the_share_of_bad_images_is_of_all_that_are_read(folder):
    """Of mixed ones two a row, and the bad ones themselves."""
    for fields, read in ((dict(augment="crop"), 8), (dict(mixup_alpha=0.2), 16)):
        batch = open_data(config(folder, **fields)).train_batch(0)
        records = BadRecords(None, 0.0, print)
        records.take(0, dict(batch))
        assert records.read == read
        with pytest.raises(DataError, match=f"1 of {2 * read + 1} records read were unusable"):
            records.take(1, with_bad(batch, [BadRecord("a", 0, "empty")]))


def test_a_magnitude_that_moves_images_out_of_sight_is_told(folder):
    said = open_data(config(folder, image_size=64, randaugment_layers=1, randaugment_magnitude=3.3)).describe()
    assert said[1] == (
        "data.randaugment_magnitude=3.3 moves images by 33 pixels, more than half of data.image_size=64: little of them is "
        "left to see"
    )
    assert (
        len(open_data(config(folder, image_size=64, randaugment_layers=1, randaugment_magnitude=3.2)).describe()) == 1
    )
    assert len(open_data(config(folder, image_size=32, randaugment_magnitude=5.0)).describe()) == 1


def test_without_pillow_the_sentence_names_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(DataError, match="photos needs the package pillow: pip install"):
        open_data(ImageData(source="photos", channels=3))


def test_a_record_without_its_features_is_bad(tmp_path):
    (tmp_path / "label.labels.txt").write_text("a\nb")
    writer = ArrayRecordWriter(str(tmp_path / "x.array_record"), "group_size:1")
    for content in (
        example(image=[b"x"], label=[2]),
        example(label=[0]),
        example(image=[b"x"]),
        b"\xff\xff",
        example(image=[b"x"], label=[1]),
    ):
        writer.write(content)
    writer.close()
    source = open_source(str(tmp_path))
    reasons = [getattr(found, "reason", found) for found in source.read(np.arange(5))]
    assert reasons == [
        "without a label from 0 to 1",
        "without an image",
        "without a label from 0 to 1",
        "no tf.train.Example",
        (b"x", 1),
    ]


def test_a_run_trains_with_everything_on(folder, tmp_path):
    words = ["--data.source", str(folder), "--data.channels", "3", "--model.channels", "3", "--data.image_size", "16"]
    words += [
        "--data.augment",
        "crop",
        "--data.randaugment_layers",
        "2",
        "--data.mixup_alpha",
        "0.2",
        "--data.cutmix",
        "true",
    ]
    words += ["--data.eval_size", "24", "--data.workers", "1", "--trainer.steps", "3", "--eval.every", "0"]
    code, out, err = finish(train_command("nfnet-tiny", tmp_path / "run", *words))
    assert code == 0, err
    assert "1 processes read ahead" in out
    assert re.search(r"step 3: held-out error_rate \d", out)
    manifest = json.loads((tmp_path / "run" / "data_manifest.json").read_text())
    assert manifest["image_size"] == [16, 24]


def test_the_loss_of_mixed_labels_is_their_weighted_mean():
    from configs.overrides import resolve
    from sharding.mesh import one_device_mesh
    from sharding.rules import rules_for
    from trainer.tasks import make_task

    words = "--data.source photos --data.channels 3 --model.channels 3 --data.mixup_alpha 0.2 --data.batch_size 4"
    task = make_task(resolve("nfnet-tiny", [*words.split(), *SMALL["nfnet-tiny"].split()]).config)
    rng, mesh = np.random.default_rng(0), one_device_mesh()
    with jax.set_mesh(mesh):
        model = jax.jit(lambda: task.init(jax.random.key(0), rules_for(mesh).spec))()
        mean = jax.jit(task.loss)
        batch = {"images": rng.normal(size=(4, 16, 16, 3)).astype(np.float32), "weights": np.ones(4, np.float32)}
        a, b, mix = np.array([0, 1, 2, 3]), np.array([4, 5, 6, 7]), np.array([0.25, 1.0, 0.0, 0.5], np.float32)

        def loss(labels, others, shares):
            rows = {"labels": labels.astype(np.int32), "labels_b": others.astype(np.int32), "mix": np.float32(shares)}
            placed = jax.tree.map(jnp.asarray, batch | rows)
            return float(mean(model, placed, jax.random.key(1))[0])

        ones = np.ones(4)
        each = [(loss(a, a, ones), loss(b, b, ones))]
        # The loss is linear in the shares; of a half everywhere it is the mean of both.
        assert loss(a, b, 0.5 * ones) == pytest.approx(np.mean(each[0]), rel=1e-5)
        swapped = loss(b, a, 1 - mix)
        assert loss(a, b, mix) == pytest.approx(swapped, rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            dict(source="digits", augment="crop"),
            "data.augment='crop' is not for data.source='digits': 'none' is allowed",
        ),
        (dict(source="photos"), "data.channels=1 does not fit data.source='photos': colour images have 3"),
    ],
)
def test_settings_that_contradict_are_one_sentence(fields, sentence):
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        ImageData(**fields)


def test_a_source_without_images_is_one_sentence(tmp_path):
    with pytest.raises(DataError, match="nowhere is neither a folder of images nor of ArrayRecord files"):
        open_data(config(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="has no images in folders, one a class"):
        open_data(config(tmp_path))
    (tmp_path / "x.array_record").touch()
    with pytest.raises(DataError, match=r"has no label.labels.txt"):
        open_data(config(tmp_path))
