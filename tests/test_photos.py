"""Images of folders and records: decoded, cropped, changed, mixed and judged as arXiv 2102.06171 says, the same on any host."""

import dataclasses
import io
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image, ImageEnhance, ImageOps
from runs import finish, train_command
from test_data_prepare import example

from configs.schema import ConfigError, ImageData
from data import open_data
from data.augment import OPS, TABLES, crop_and_flip, distorted_box, operate, rand_augment
from data.bad_records import BadRecord, taken_from, with_bad
from data.dataset import DataError
from data.image_decoding import BadImage, cubic, decoded, for_evaluation, normalised, resized
from data.image_sources import open_source
from data.mixing import cut_mix, mix_up
from trainer.bad_records import BadRecords

RNG = np.random.default_rng(0)
CLASSES = ("ant", "bee", "cat")


def picture(number, height=48, width=40):
    """Smooth, and another for each number."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin((number + 1) * x / 17 + c) + np.cos(y / (9 + c) + number) for c in range(3)]
    return np.uint8(np.clip(127 + 60 * np.stack(waves, -1), 0, 255))


def encoded(image, kind="JPEG", **options):
    out = io.BytesIO()
    Image.fromarray(image).save(out, kind, **options)
    return out.getvalue()


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


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_images_are_decoded_as_pillow_decodes_them(kind):
    content = encoded(picture(3), kind)
    assert np.array_equal(decoded(content), np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))


def test_a_changed_byte_of_a_png_is_found():
    content = bytearray(encoded(picture(1), "PNG"))
    content[len(content) // 2] ^= 255
    with pytest.raises(BadImage, match="damaged or cut off"):
        decoded(bytes(content))


def test_grey_cmyk_and_transparent_images_become_rgb():
    grey = encoded(picture(1)[..., 0])
    assert decoded(grey).shape == (48, 40, 3)
    out = io.BytesIO()
    Image.fromarray(picture(1)).convert("CMYK").save(out, "JPEG")
    assert np.abs(decoded(out.getvalue()).astype(int) - picture(1)).mean() < 5
    assert decoded(encoded(np.dstack([picture(1), picture(2)[..., :1]]), "PNG")).shape == (48, 40, 3)


@pytest.mark.parametrize("content", [b"", b"no image", encoded(picture(1))[:400], encoded(picture(1), "PNG")[:300]])
def test_what_cannot_be_decoded_is_told(content):
    with pytest.raises(BadImage):
        decoded(content)


@pytest.mark.parametrize(("old", "new"), [((48, 40), (32, 32)), ((7, 90), (33, 21)), ((20, 20), (50, 61))])
def test_resizing_is_that_of_jax(old, new):
    """Keys's cubic without antialiasing, as in TensorFlow; another implementation of it."""
    image = RNG.integers(0, 256, (*old, 3)).astype(np.uint8)
    expected = jax.image.resize(jnp.asarray(image, jnp.float32), (*new, 3), "cubic", antialias=False)
    np.testing.assert_allclose(resized(image, *new), expected, atol=2e-3)


def test_cubic_weights_are_those_of_the_paper():
    """Half-way between pixels: -1/16, 9/16, 9/16, -1/16."""
    weights = cubic(8, 4).toarray()[1]  # its centre lies between pixels 2 and 3
    np.testing.assert_allclose(weights, [0, -1 / 16, 9 / 16, 9 / 16, -1 / 16, 0, 0, 0], atol=1e-6)


def test_evaluation_squashes_both_sides_and_cuts_the_centre():
    image = picture(2, 90, 60)
    whole = jax.image.resize(jnp.asarray(image, jnp.float32), (64, 64, 3), "cubic", antialias=False)
    np.testing.assert_allclose(for_evaluation(image, 32), whole[16:48, 16:48], atol=2e-3)


def test_normalisation_is_imagenets():
    image = np.full((1, 1, 3), 255.0)
    np.testing.assert_allclose(
        normalised(image)[0, 0], [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225], rtol=1e-6
    )


def test_distorted_boxes_have_the_areas_and_aspects_asked_for():
    rng = np.random.default_rng(1)
    boxes = np.array([distorted_box(300, 400, 224, rng) for _ in range(4000)])
    top, left, height, width = boxes.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 300).all()
    assert (left + width <= 400).all()
    area, aspect = height * width / 120_000, width / height
    assert area.min() >= 0.1
    assert area.max() > 0.9
    assert aspect.min() > 0.74
    assert aspect.max() < 1.35
    # A height is drawn evenly among those that give an allowed area, so that small areas are the more frequent.
    assert 0.35 < area.mean() < 0.5
    assert abs((left + width / 2).mean() - 200) < 6
    assert abs((top + height / 2).mean() - 150) < 5


def test_an_image_too_long_for_a_box_gives_its_centre():
    assert distorted_box(2, 4000, 224, np.random.default_rng(0))[2:] == (1, 1)


def test_half_of_the_crops_are_flipped():
    image = np.zeros((40, 40, 3), np.uint8)
    image[:, 20:] = 255
    crops = [crop_and_flip(image, 16, np.random.default_rng(i)) for i in range(600)]
    brighter = [crop[:, 8:].mean() - crop[:, :8].mean() for crop in crops]
    right, left = sum(b > 1 for b in brighter), sum(b < -1 for b in brighter)
    assert abs(right - left) < 5 * np.sqrt(right + left)


BASE = picture(7, 64, 64)


def blend(a, b, factor):
    return np.clip(a + factor * (b.astype(float) - a), 0, 255)


def by_hand(name, m, image):
    """What the published table says, in numpy where it can be, else by Pillow."""
    i, pil = image.astype(int), Image.fromarray(image)
    factor = 1.8 * m + 0.1
    return {
        "autocontrast": lambda: np.asarray(ImageOps.autocontrast(pil)),
        "equalize": lambda: np.asarray(ImageOps.equalize(pil)),
        "invert": lambda: 255 - i,
        "posterize": lambda: i & ~((1 << (8 - int(4 * m))) - 1),
        "solarize": lambda: np.where(i < int(256 * m), i, 255 - i),
        "solarize_add": lambda: np.where(i < 128, np.minimum(i + int(110 * m), 255), i),
        "color": lambda: np.asarray(ImageEnhance.Color(pil).enhance(factor)),
        "contrast": lambda: blend(np.full_like(i, 64 * 64 // 256), i, factor),
        "brightness": lambda: np.clip(factor * i, 0, 255),
        "sharpness": lambda: np.asarray(ImageEnhance.Sharpness(pil).enhance(factor)),
    }[name]()


@pytest.mark.parametrize("magnitude", [5, 10])
@pytest.mark.parametrize("name", [*TABLES, "color", "sharpness"])
def test_colour_operations_are_those_of_the_table(name, magnitude):
    m = magnitude / 10
    changed = operate(BASE, [name], m, np.random.default_rng(0))
    assert np.abs(changed.astype(float) - by_hand(name, m, BASE)).max() <= 1


@pytest.mark.parametrize("magnitude", [5, 10])
def test_moves_are_those_of_the_table_in_either_direction(magnitude):
    """A cross on grey: where its arms end up tells angle, shear and shift."""
    m = magnitude / 10
    canvas = np.full((301, 301, 3), 128, np.uint8)
    canvas[140:161, 150], canvas[150, 140:161] = 255, 0
    canvas[100, 150] = (255, 0, 0)  # 50 above the centre
    found = {name: set() for name in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")}
    for name, places in found.items():
        for seed in range(12):
            changed = operate(canvas, [name], m, np.random.default_rng(seed))
            red = np.argwhere((changed[..., 0] > 200) & (changed[..., 1] < 50))
            if len(red):
                places.add(tuple(red.mean(axis=0).round().astype(int)))
    angle = np.deg2rad(30 * m)
    away, up = round(50 * np.sin(angle)), round(50 * np.cos(angle))
    assert {(150 - up, 150 - away), (150 - up, 150 + away)} == found["rotate"]
    shift = 100 * m
    assert {(100, 150 - shift), (100, 150 + shift)} == found["translate_x"]
    assert {place for place in {(100 - shift, 150), (100 + shift, 150)} if place[0] >= 0} == found["translate_y"]
    # x' such that x = x' + 0.3 m y': the pixel at (x, y) comes from 0.3 m y further on.
    assert {(100, round(150 - 0.3 * m * 100.5)), (100, round(150 + 0.3 * m * 100.5))} == found["shear_x"]
    assert {(round(100 - 0.3 * m * 150.5), 150), (round(100 + 0.3 * m * 150.5), 150)} == found["shear_y"]


def sampled(image, x, y):
    """Pixels (H W 3) at places (H W), the nearest one, and grey where there is none."""
    column, row = np.floor(x).astype(int), np.floor(y).astype(int)
    inside = (column >= 0) & (column < image.shape[1]) & (row >= 0) & (row < image.shape[0])
    return np.where(inside[..., None], image[np.where(inside, row, 0), np.where(inside, column, 0)], 128)


@pytest.mark.parametrize("magnitude", [5, 10])
@pytest.mark.parametrize("name", ["rotate", "shear_x", "shear_y", "translate_x", "translate_y"])
def test_moves_take_the_nearest_pixel_of_where_the_table_says(name, magnitude):
    """Every pixel, beside the table's maps from new places to old ones; those between two pixels may be either."""
    image = RNG.integers(0, 256, (90, 120, 3)).astype(np.uint8)
    y, x = np.mgrid[:90, :120] + 0.5
    fits = []
    for sign in (1, -1):
        m = sign * magnitude / 10
        angle = np.deg2rad(30 * m)
        left, top = x - 60, y - 45
        places = {
            "rotate": (
                60 + left * np.cos(angle) - top * np.sin(angle),
                45 + left * np.sin(angle) + top * np.cos(angle),
            ),
            "shear_x": (x + 0.3 * m * y, y),
            "shear_y": (x, y + 0.3 * m * x),
            "translate_x": (x + 100 * m, y),
            "translate_y": (x, y + 100 * m),
        }
        fits.append(sampled(image, *places[name]))
    seen = set()
    for seed in range(8):
        changed = operate(image, [name], magnitude / 10, np.random.default_rng(seed))
        agree = [(changed == fit).all(axis=-1).mean() for fit in fits]
        assert max(agree) > 0.99
        seen.add(int(np.argmax(agree)))
    assert seen == {0, 1} or np.array_equal(*fits)  # moved out of sight either way


def test_operations_one_after_the_other_are_each_applied():
    """Tables in a row become one, and neither that nor what comes between changes a pixel."""
    chains = [
        ["autocontrast", "posterize", "equalize", "invert"],
        ["solarize_add", "rotate", "equalize", "autocontrast", "shear_x", "brightness"],
        ["equalize", "contrast", "color", "solarize", "cutout", "autocontrast"],
    ]
    for chain in chains:
        rng, alone = np.random.default_rng(1), BASE
        for name in chain:
            alone = operate(alone, [name], 0.7, rng)
        assert np.array_equal(operate(BASE, chain, 0.7, np.random.default_rng(1)), alone)


def test_cutout_is_a_square_of_twice_the_magnitude():
    for seed in range(20):
        changed = operate(np.zeros((301, 301, 3), np.uint8), ["cutout"], 0.5, np.random.default_rng(seed))
        rows, columns = np.nonzero(changed[..., 0])
        assert rows.max() - rows.min() + 1 == min(40, rows.max() + 1, 301 - rows.min())
        assert columns.max() - columns.min() + 1 == min(40, columns.max() + 1, 301 - columns.min())


def test_each_operation_is_drawn_as_often(monkeypatch):
    assert len(OPS) == 16
    drawn = []
    monkeypatch.setattr("data.augment.operate", lambda image, names, m, rng: drawn.extend(names))
    for seed in range(4000):
        rand_augment(picture(1, 8, 8), 4, 5.0, np.random.default_rng(seed))
    counts = np.array([drawn.count(name) for name in OPS])
    assert counts.sum() == 16_000
    assert counts.min() > 850
    monkeypatch.undo()
    image = picture(1, 32, 32)
    kinds = {rand_augment(image, 1, 5.0, np.random.default_rng(seed)).tobytes() for seed in range(200)}
    assert len(kinds) >= 16
    assert np.array_equal(rand_augment(image, 0, 5.0, np.random.default_rng(0)), image)


def test_mixed_shares_are_the_true_ones():
    black, white = np.zeros((31, 50, 3)), np.full((31, 50, 3), 255.0)
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(500):
        mixed, share = cut_mix(white, black, rng)
        assert mixed.mean() == pytest.approx(255 * share)
        shares.append(share)
    assert 0.25 < np.mean(shares) < 0.45  # half the area before borders cut it
    shares = []
    for _ in range(2000):
        mixed, share = mix_up(white, black, 0.2, rng)
        assert mixed == pytest.approx(255 * share)
        shares.append(share)
    assert np.mean(shares) == pytest.approx(0.5, abs=0.05)
    assert np.var(shares) == pytest.approx(0.25 / 1.4, rel=0.1)  # of Beta(0.2, 0.2)


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

    words = [
        "--data.source",
        "photos",
        "--data.channels",
        "3",
        "--model.channels",
        "3",
        "--data.mixup_alpha",
        "0.2",
        "--data.batch_size",
        "4",
    ]
    task = make_task(resolve("nfnet-tiny", words).config)
    rng, mesh = np.random.default_rng(0), one_device_mesh()
    with jax.set_mesh(mesh):
        model = task.init(jax.random.key(0), rules_for(mesh).spec)
        batch = {"images": rng.normal(size=(4, 16, 16, 3)).astype(np.float32), "weights": np.ones(4, np.float32)}
        a, b, mix = np.array([0, 1, 2, 3]), np.array([4, 5, 6, 7]), np.array([0.25, 1.0, 0.0, 0.5], np.float32)

        def loss(labels, others, shares):
            rows = {"labels": labels.astype(np.int32), "labels_b": others.astype(np.int32), "mix": np.float32(shares)}
            placed = jax.tree.map(jnp.asarray, batch | rows)
            return float(task.loss(model, placed, jax.random.key(1))[0])

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
