"""Images that a table lists: labels, units and attributes, and a run that learns several labels."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pictures import encoded, picture, write_table
from runs import finish, train_command

from configs.overrides import resolve
from configs.schema import ConfigError, ImageData
from data import open_data
from data.bad_records import taken_from
from data.dataset import DataError
from data.image_decoding import normalised
from data.shapes import batch_fields
from sharding.mesh import one_device_mesh
from trainer.tasks import make_task

NAMES = ("red", "round", "large")
SEVERAL = dict(labels=NAMES, loss="sigmoid", label_smoothing=0.0)


def config(table, **fields):
    return ImageData(**{"source": str(table), "channels": 3, "image_size": 16, "batch_size": 8, **fields})


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """40 images of 10 people; label `red` is 0.8 of some."""
    root = tmp_path_factory.mktemp("table")
    (root / "images").mkdir()
    found = []
    for i in range(40):
        (root / "images" / f"{i:02}.png").write_bytes(encoded(picture(i, 20, 24), "PNG"))
        labels = {"red": (0, 1, 0.8)[i % 3], "round": i % 2, "large": int(i > 20)}
        row = {"path": f"images/{i:02}.png", "label": "abc"[i % 3], "unit": f"p{i // 4}", "group:age": f"{i // 20}0-"}
        found.append(row | {"group:sex": "fm"[i % 2]} | {f"label:{name}": value for name, value in labels.items()})
    return root, found


@pytest.fixture(scope="module")
def table(rows):
    root, found = rows
    return write_table(root / "all.csv", found)


def everything(split):
    return split.read(np.arange(len(split)))


def test_classes_are_numbered_by_name_and_numbers_by_size(rows, table):
    root, found = rows
    data = open_data(config(table))
    assert data.manifest["needs"] == {"num_classes": 3, "channels": 3}
    for number, label in zip(data.held_out.split.numbers, everything(data.held_out)["labels"], strict=True):
        assert label == number % 3
    numbers = write_table(root / "numbers.csv", [row | {"label": (2, 10, 9)[i % 3]} for i, row in enumerate(found)])
    data = open_data(config(numbers))
    for number, label in zip(data.held_out.split.numbers, everything(data.held_out)["labels"], strict=True):
        assert label == (0, 2, 1)[number % 3]


def test_a_held_out_table_has_the_classes_of_the_training_table(rows, table):
    root, found = rows
    few = write_table(root / "few.csv", [row for row in found if row["label"] == "c"])
    data = open_data(config(table, held_out_source=str(few)))
    assert set(everything(data.held_out)["labels"]) == {2}
    with pytest.raises(DataError, match=r"all.csv has label 'a' in row 2, which no training image has"):
        open_data(config(few, held_out_source=str(table)))


def test_several_labels_may_be_true_together(rows, table):
    _, found = rows
    made = config(table, **SEVERAL, augment="crop", multiplicity=2)
    data = open_data(made)
    assert data.manifest["needs"]["num_classes"] == 3
    expected = np.array([[row[f"label:{name}"] for name in NAMES] for row in found], np.float32)
    np.testing.assert_array_equal(everything(data.held_out)["labels"], expected[data.held_out.split.numbers])
    for held_out, batch in ((False, data.train_batch(0)), (True, next(data.held_out_batches()))):
        fields = batch_fields(made, held_out)
        assert {name: (rows.shape, rows.dtype) for name, rows in batch.items()} == {
            name: (shape, np.dtype(dtype)) for name, (shape, dtype) in fields.items()
        }
    other = open_data(config(table, **{**SEVERAL, "labels": NAMES[::-1]}))
    np.testing.assert_array_equal(everything(other.held_out)["labels"], everything(data.held_out)["labels"][:, ::-1])
    assert other.manifest["hash"] != data.manifest["hash"]


def test_nobody_is_on_both_sides(table):
    data = open_data(config(table, held_out=0.4))
    assert data.train.split.owners is not None
    ours, theirs = set(data.train.split.owners), set(data.held_out.split.owners)
    assert not ours & theirs
    assert len(ours | theirs) == 10
    assert len(data.train) == 4 * len(ours)
    assert len(data.describe()) == 1
    both = open_data(config(table, held_out_source=str(table))).describe()
    assert both[1] == "10 units (p0, ...) have training and held-out images: held-out metrics flatter the model"


def test_units_and_attributes_are_there_for_others(rows, table, tmp_path):
    _, found = rows
    data = open_data(config(table, held_out=0.4))
    units = data.train.units
    assert units.dtype == np.int64
    assert units.shape == (len(data.train),)
    assert set(units) == set(range(len(data.train) // 4))
    owners = [found[i]["unit"] for i in data.train.split.numbers]
    assert len(set(zip(owners, units, strict=True))) == len(set(owners)) == len(set(units))
    attributes = data.held_out.attributes
    assert set(attributes) == {"age", "sex"}
    for name, values in attributes.items():
        assert values.dtype.kind == "U"
        assert list(values) == [found[i][f"group:{name}"] for i in data.held_out.split.numbers]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(5):
            (tmp_path / name / f"{i}.png").write_bytes(encoded(picture(i, 8, 8), "PNG"))
    for other in (config(tmp_path, held_out=0.5), ImageData()):
        data = open_data(other)
        assert data.train.units is None
        assert data.held_out.attributes == {}


def test_attributes_can_be_added_to_a_run(rows, table):
    root, found = rows
    before = open_data(config(table)).manifest["hash"]
    assert (
        open_data(config(write_table(root / "more.csv", [r | {"group:race": "x"} for r in found]))).manifest["hash"]
        == before
    )
    assert (
        open_data(config(write_table(root / "other.csv", [r | {"unit": "x" + r["unit"]} for r in found]))).manifest[
            "hash"
        ]
        != before
    )


def test_old_manifests_keep_their_hash(tmp_path):
    """As they were before tables, several labels and centred images."""
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        for i in range(6):
            (tmp_path / name / f"{i}.png").write_bytes(b"x" * (i + 1))
    folder = config(tmp_path, image_size=32, held_out=0.3, augment="crop", mixup_alpha=0.2, multiplicity=2)
    hashes = [open_data(made).manifest["hash"] for made in (folder, ImageData(batch_size=64, image_size=16))]
    assert hashes == [HASH_OF_FOLDER, "b23c9e40b9a472ebf7afaf20577228059ca49ac4681ca2f2103f58aeca95c7de"]


HASH_OF_FOLDER = "d02ee19568d8d2baab54594587964cc3d38a013f1a1e344e584c350d261befdd"


def test_centred_images_run_from_minus_one_to_one(table):
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5
    np.testing.assert_allclose(normalised(image, to="centred"), image / 127.5 - 1, atol=1e-6)
    made = [config(table, normalise=to) for to in ("centred", "imagenet")]
    assert open_data(made[0]).manifest["hash"] != open_data(made[1]).manifest["hash"]
    images = everything(open_data(made[0]).held_out)["images"]
    from data.image_decoding import DEVIATION, MEAN

    there = everything(open_data(made[1]).held_out)["images"] * DEVIATION + MEAN
    np.testing.assert_allclose(images, there / 127.5 - 1, atol=1e-4)


def test_an_image_that_is_not_there_is_a_bad_record(rows):
    root, found = rows
    gone = write_table(root / "gone.csv", [*found[:12], found[12] | {"path": "images/nowhere.png"}])
    batch = everything(open_data(config(gone, held_out_source=str(gone), **SEVERAL)).held_out)
    assert [(bad.source, bad.reason) for bad in taken_from(batch)] == [("images/nowhere.png", "unreadable")]
    assert (batch["labels"][12] == batch["labels"][:12]).all(axis=1).any()


@pytest.mark.parametrize(
    ("change", "fields", "sentence"),
    [
        ({"path": None}, {}, "has no column path: its columns are label, unit, group:age"),
        ({"label": None}, {}, "has no column label: data.labels can name columns of it (red,round,large)"),
        (
            {"label:round": None},
            SEVERAL,
            "has no column label:round, which data.labels names: there are label:red, label:large",
        ),
        ({"label:red": "2"}, SEVERAL, "has label:red '2' in row 4: 0 or 1 is allowed, or a number between them"),
        ({"label:red": "-1"}, SEVERAL, "has label:red '-1' in row 4"),
        ({"label:red": ""}, SEVERAL, "has label:red '' in row 4"),
        ({"label:red": "nan"}, SEVERAL, "has label:red 'nan' in row 4"),
        ({"label": ""}, {}, "has no label in row 4"),
        ({"unit": ""}, {}, "has no unit in row 4: in its column unit every image has one"),
        ({"path": "./images/00.png"}, {}, "has path './images/00.png' in rows 2 and 4: an image has one row"),
        ({"path": ""}, {}, "has path '' in row 4: a path from the table's folder is allowed"),
        ({"path": "/images/00.png"}, {}, "has path '/images/00.png' in row 4"),
    ],
)
def test_a_wrong_table_is_one_sentence(rows, change, fields, sentence):
    root, found = rows
    ((column, value),) = change.items()
    if value is None:
        changed = [{name: cell for name, cell in row.items() if name != column} for row in found]
    else:
        changed = [row | change if i == 2 else row for i, row in enumerate(found)]
    with pytest.raises(DataError, match=re.escape(sentence)):
        open_data(config(write_table(root / "wrong.csv", changed), **fields))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is empty"),
        ("path,label\n", "has a header and no row"),
        ("path,label\na,1,2\n", "has 3 cells in row 2, but its header has 2"),
        ("path,path,label\na,a,1\n", "has the column path twice"),
        ("path,label\n\xff,1\n", "is not a CSV in UTF-8"),
        ('path,label\n"a,1\n', "is not a CSV in UTF-8: unexpected end of data"),
    ],
)
def test_what_is_no_table_is_one_sentence(tmp_path, text, sentence):
    (tmp_path / "x.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=sentence):
        open_data(config(tmp_path / "x.csv"))
    with pytest.raises(DataError, match=r"nowhere.csv cannot be read: .*No such file"):
        open_data(config(tmp_path / "nowhere.csv"))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            dict(loss="softmax"),
            "data.loss='softmax' is of one class an image, but any of data.labels=('red', 'round', 'large')",
        ),
        (dict(label_smoothing=0.1), "data.label_smoothing=0.1 is not for data.labels="),
        (dict(source="photos"), "does not fit data.source='photos': a .csv has columns label:NAME"),
        (dict(held_out_source="photos"), "does not fit data.held_out_source='photos'"),
        (dict(evaluated=("blue",)), "data.evaluated=('blue',): 'blue' is none of data.labels="),
        (dict(labels=("red", "red")), "data.labels=('red', 'red') has 'red' twice"),
        (dict(labels=("red",)), "data.labels=('red',) is one label"),
        (dict(labels=(), evaluated=("red",)), "data.evaluated=('red',): 'red' is none of data.labels=()"),
        (dict(normalise="none"), "data.normalise='none' is not one of imagenet, centred"),
    ],
)
def test_settings_that_contradict_are_one_sentence(fields, sentence):
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        config("x.csv", **{**SEVERAL, **fields})


def test_a_model_has_as_many_outputs_as_there_are_labels():
    words = ["--data.source", "x.csv", "--data.channels", "3", "--model.channels", "3", *several_words()]
    with pytest.raises(
        ConfigError, match=r"model.num_classes=10 does not fit the 3 labels of data.labels: 3 is allowed"
    ):
        resolve("nfnet-tiny", words)
    resolve("nfnet-tiny", [*words, "--model.num_classes", "3"])


def several_words():
    return ["--data.labels", ",".join(NAMES), "--data.loss", "sigmoid", "--data.label_smoothing", "0"]


@pytest.mark.parametrize("mixed", [False, True])
def test_loss_and_metrics_of_several_labels_are_those_of_their_formula(mixed):
    words = ["--data.source", "x.csv", "--data.channels", "3", "--model.channels", "3", "--model.num_classes", "3"]
    words += [*several_words(), "--data.batch_size", "4", "--data.evaluated", "large,red"]
    words += ["--data.cutmix", "true"] if mixed else []
    task = make_task(resolve("nfnet-tiny", words).config)
    rng = np.random.default_rng(0)
    y, other, mix = rng.uniform(size=(4, 3)), rng.integers(2, size=(4, 3)), rng.uniform(size=4)
    z = rng.normal(size=(4, 3))
    batch = {"images": np.zeros((4, 1, 1, 1)), "labels": y, "weights": np.array([1, 1, 1, 0])}
    batch |= {"labels_b": other, "mix": mix} if mixed else {}
    placed = {name: jnp.asarray(rows, jnp.float32) for name, rows in batch.items()}

    def model(images, **_):
        return jnp.asarray(z, jnp.float32)

    with jax.set_mesh(one_device_mesh()):
        loss, metrics = task.loss(model, placed, jax.random.key(1))
        sums = jax.device_get(task.evaluate(model, placed))

    def nats(y):
        return -y * np.log(1 / (1 + np.exp(-z))) - (1 - y) * np.log(1 / (1 + np.exp(z)))

    target = mix[:, None] * y + (1 - mix[:, None]) * other if mixed else y
    assert float(loss) == float(metrics["loss"]) == pytest.approx(nats(target).mean(), rel=1e-5)
    found = task.summarise(sums)
    assert found["loss"] == pytest.approx(nats(y)[:3, [0, 2]].mean(), rel=1e-5)
    assert found["error_rate"] == pytest.approx(((z > 0) != (y > 0.5))[:3, [0, 2]].mean())


@pytest.mark.multiprocess
def test_a_run_learns_several_labels(table, tmp_path):
    run = tmp_path / "run"
    words = ["--data.source", str(table), "--data.channels", "3", "--model.channels", "3", "--data.image_size", "16"]
    words += [
        *several_words(),
        "--model.num_classes",
        "3",
        "--data.evaluated",
        "round,large",
        "--data.normalise",
        "centred",
    ]
    words += ["--mesh.simulated_devices", "4", "--mesh.data", "2", "--mesh.fsdp", "2"]
    words += ["--data.workers", "1", "--trainer.steps", "3", "--eval.every", "0", "--data.augment", "crop"]
    code, out, err = finish(train_command("nfnet-tiny", run, *words))
    assert code == 0, err
    assert re.search(r"step 3: held-out error_rate \d", out)
    assert "images of 3 labels" in out
    manifest = json.loads((run / "data_manifest.json").read_text())
    assert manifest["labels"] == list(NAMES)
    podwright = train_command("nfnet-tiny", run)[:3]
    code, out, err = finish([*podwright, "replay", str(run), "--step", "2", "--quick"])
    assert code == 0, err
    assert re.search(r"row \d, (no label|red|round|large).* images/\d\d.png", out)
    code, _, err = finish([*podwright, "probe", str(run)])
    assert code == 2
    assert "cannot be probed: that tells one class an image apart" in err
