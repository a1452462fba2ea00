"""Rows of Long Range Arena are what the published procedures make, whoever reads them, and their labels reach every family."""

import dataclasses
import functools
import hashlib
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import finish
from sklearn.datasets import load_digits

import data.kept_rows
from configs import EXPERIMENTS
from configs.overrides import resolve
from configs.schema import Config, ConfigError, GriffinConfig, LongRangeData, LRUConfig
from data import DataError, open_data
from data.kept_rows import KeptRows
from data.shapes import batch_fields
from sharding.mesh import one_device_mesh
from sharding.rules import rules_for
from trainer.evaluate import evaluate, place_batch
from trainer.run_folder import read_metrics
from trainer.tasks import make_task

SHORT = LongRangeData(sequence_length=100, max_depth=4, max_args=5, min_length=19, max_length=101, held_out_rows=64)
EASY = LongRangeData(task="pathfinder", sequence_length=1024, contour_length=6, held_out_rows=8, batch_size=8)
FIRST = LongRangeData(task="first-token", sequence_length=16, held_out_rows=64)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> pathlib.Path:
    monkeypatch.setattr(data.kept_rows, "CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# All tasks


@pytest.mark.parametrize("config", [SHORT, EASY, FIRST, LongRangeData(task="digits", sequence_length=64)])
def test_batches_are_the_same_on_any_number_of_hosts(config, cache, monkeypatch):
    config = dataclasses.replace(config, batch_size=8)
    whole = open_data(config).train_batch(3)
    monkeypatch.setattr(data.kept_rows, "CACHE", str(cache / "other"))
    parts = [open_data(config, rows).train_batch(3) for rows in np.split(np.arange(8), 4)]
    for name, rows in whole.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), rows)
    fields = batch_fields(config)
    assert {name: (rows.shape, rows.dtype) for name, rows in whole.items()} == fields
    if config.task != "digits":
        other = open_data(dataclasses.replace(config, seed=1))
        assert (other.train_batch(3)["tokens"] != whole["tokens"]).any()
        assert other.manifest["hash"] != open_data(config).manifest["hash"]


@pytest.mark.parametrize("config", [SHORT, EASY, FIRST])
def test_the_label_is_the_token_after_the_rows_last(config):
    batch = open_data(config).train.read(np.arange(8))
    for row in range(8):
        length = (batch["segment_pos"][row] >= 0).sum()
        assert batch["segment_pos"][row].tolist() == [*range(length), *[-1] * (config.sequence_length - length)]
        assert batch["weights"][row].tolist() == [float(place == length - 1) for place in range(config.sequence_length)]
        assert batch["targets"][row, length - 1] == config.num_input_symbols + batch["labels"][row]
        assert not batch["tokens"][row, length:].any()
    assert batch["tokens"].max() < config.num_input_symbols
    assert 0 <= batch["labels"].min() <= batch["labels"].max() < config.num_classes


def test_a_first_token_is_its_rows_label_and_all_are_as_frequent():
    batch = open_data(FIRST).train.read(np.arange(8000))
    np.testing.assert_array_equal(batch["tokens"][:, 0], batch["labels"])
    assert (batch["tokens"][:, 1:] >= 8).all()
    for column in (batch["tokens"][:, 0], batch["tokens"][:, 9] - 8):
        counts = np.bincount(column, minlength=8)
        assert ((counts - 1000) ** 2 / 1000).sum() < 29.9  # 99.99 % point of chi-squared, 7 degrees


def test_digits_are_scikit_learns_as_levels_or_from_minus_one_to_one():
    peer = {image.tobytes(): label for image, label in zip(*load_digits(return_X_y=True), strict=True)}
    config = LongRangeData(task="digits", sequence_length=64)
    sizes = []
    for split in ("validation", "test"):
        opened = open_data(dataclasses.replace(config, held_out_split=split))
        sizes.append(len(opened.held_out))
        batch = opened.held_out.read(np.arange(sizes[-1]))
        assert [peer[row.astype(float).tobytes()] for row in batch["tokens"]] == batch["labels"].tolist()
    assert sum(sizes) + len(opened.train) == 1797
    values = open_data(dataclasses.replace(config, inputs="values", held_out_split="test"))
    np.testing.assert_array_equal(
        values.held_out.read(np.arange(sizes[1]))["values"][..., 0], batch["tokens"] / np.float32(8) - 1
    )


def test_rows_are_made_once_and_again_where_the_file_is_damaged(cache):
    calls = []

    @dataclasses.dataclass(frozen=True)
    class Counting:
        source: object

        def __len__(self):
            return len(self.source)

        def rows(self, indices):
            calls.append(indices.tolist())
            return self.source.rows(indices)

    kept = open_data(SHORT).train.source
    counting = KeptRows(Counting(kept.source), "here", SHORT.sequence_length)
    first = counting.rows(np.array([5, 2, 9]))
    again = counting.rows(np.array([2, 5, 7]))
    assert calls == [[5, 2, 9], [7]]
    np.testing.assert_array_equal(again.symbols[:2], first.symbols[[1, 0]])
    np.testing.assert_array_equal(again.labels[:2], first.labels[[1, 0]])
    np.testing.assert_array_equal(again.lengths[:2], first.lengths[[1, 0]])
    content = bytearray((cache / "here").read_bytes())
    content[len(content) // 10 * 5 + 3] ^= 1  # of ten rows the sixth
    (cache / "here").write_bytes(content)
    np.testing.assert_array_equal(counting.rows(np.array([2, 5])).symbols, first.symbols[[1, 0]])
    assert calls[2:] == [[5]]


def test_nowhere_to_keep_rows_is_no_reason_to_stop(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(data.kept_rows, "CACHE", str(tmp_path / "file" / "cache"))
    assert len(open_data(SHORT).train.read(np.arange(2))["labels"]) == 2


# Files of a user


def filed(task: str, folder: pathlib.Path, **fields) -> LongRangeData:
    length = {"cifar": 1024, "text": 8, "retrieval": 11}[task]
    return LongRangeData(task=task, files=str(folder), sequence_length=length, batch_size=2, **fields)


def test_texts_are_bytes_cut_to_the_row(tmp_path):
    (tmp_path / "train.tsv").write_bytes(b"1\tgood\n0\tmuch too long\n\n2\tlabel\n1\tone\ttwo\n0\t\n1\t\xc3\xa9\r\n")
    (tmp_path / "test.jsonl").write_text('{"label": 0, "text": "bad"}\n{"label": 1}\n[1]\n{"label": 1, "text": "é"}\n')
    opened = open_data(filed("text", tmp_path, held_out_split="test"))
    batch = opened.train.read(np.arange(3))
    texts = [
        bytes(row[: (place >= 0).sum()].tolist())
        for row, place in zip(batch["tokens"], batch["segment_pos"], strict=True)
    ]
    assert texts == [b"good", b"much too", "é".encode()]
    assert batch["labels"].tolist() == [1, 0, 1]
    assert [origin.place for (origin,) in opened.train.origins(np.arange(3))] == [1, 2, 7]
    assert opened.held_out.read(np.arange(2))["labels"].tolist() == [0, 1]
    assert opened.skipped == [
        ("train.tsv:3", "of 1 columns"),
        ("train.tsv:4", "without a label that is 0 or 1"),
        ("train.tsv:5", "of 3 columns"),
        ("train.tsv:6", "without a text"),
        ("test.jsonl:2", "not JSON with a label and a text"),
        ("test.jsonl:3", "not JSON with a label and a text"),
    ]
    digest = hashlib.sha256((tmp_path / "train.tsv").read_bytes()).hexdigest()
    assert opened.manifest["files"]["train.tsv"] == digest
    assert "6 rows" in " ".join(opened.describe())


def test_two_texts_are_one_row_with_a_separator_for_a_language_model(tmp_path):
    for split in ("train", "eval"):
        (tmp_path / f"new_aan_pairs.{split}.tsv").write_text(
            "1.0\tA1\tB2\tfirst text\tab\n0.0\tA1\tB2\tx\ty\n1\tA1\tx\ty\n"
        )
    opened = open_data(filed("retrieval", tmp_path))
    batch = opened.held_out.read(np.arange(2))
    assert batch["tokens"].tolist() == [[*b"first", 256, *b"ab", 0, 0, 0], [*b"x", 256, *b"y", *[0] * 8]]
    assert batch["labels"].tolist() == [1, 0]
    assert batch["targets"][0, 7] == 258
    assert [why for _, why in opened.skipped] == ["of 4 columns"] * 2


def test_cifar_is_read_from_its_binary_files_as_colours_or_grey(tmp_path):
    random = np.random.default_rng(0)
    written = random.integers(0, 256, (6, 4, 3073), dtype=np.uint8)
    written[:, :, 0] %= 10
    written[0, 1, 0] = 11
    for name, part in zip([*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"], written, strict=True):
        part.tofile(tmp_path / name)
    opened = open_data(filed("cifar", tmp_path, inputs="values", held_out_split="test"))
    assert len(opened.train) == 18  # of 20 one is bad, and a tenth is for validation
    assert opened.skipped == [("data_batch_1.bin:1", "of no class from 0 to 9")]
    batch = opened.held_out.read(np.array([3]))
    assert batch["labels"] == written[5, 3, 0]
    image = written[5, 3, 1:].reshape(3, 32, 32) / 255  # colour, row, column
    mean, deviation = np.array([0.4914, 0.4822, 0.4465]), np.array([0.247, 0.2435, 0.2616])
    np.testing.assert_allclose(
        batch["values"][0].reshape(32, 32, 3), (image.transpose(1, 2, 0) - mean) / deviation, atol=2e-3
    )
    grey = open_data(filed("cifar", tmp_path)).train.read(np.array([0]))["tokens"][0]
    colours = written[0, 0, 1:].reshape(3, 1024).astype(float)
    np.testing.assert_allclose(grey, colours[0] * 0.299 + colours[1] * 0.587 + colours[2] * 0.114, atol=0.51)


@pytest.mark.parametrize(
    ("files", "task", "sentence"),
    [
        ({}, "text", r"has no train\.tsv or train\.jsonl$"),
        (
            {"train.tsv": "1\ta\n"},
            "text",
            r"has no validation\.tsv or validation\.jsonl; data\.held_out_split='test' takes",
        ),
        (
            {"train.tsv": "a\n", "validation.tsv": "1\tb\n"},
            "text",
            r"no row for train: all 1 lines are unusable, train\.tsv:1 is of 1",
        ),
        ({"new_aan_pairs.train.tsv": ""}, "retrieval", r"new_aan_pairs\.train\.tsv has no row for train$"),
        ({}, "cifar", r"data_batch_1\.bin cannot be read: No such file"),
        ({"data_batch_1.bin": "short"}, "cifar", r"has 5 bytes, not 3,073 an image"),
    ],
)
def test_what_is_wrong_with_files_is_one_sentence(tmp_path, files, task, sentence):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=sentence):
        open_data(filed(task, tmp_path))
    with pytest.raises(DataError, match=r"files='.*nowhere' is not a folder"):
        open_data(filed(task, tmp_path / "nowhere"))


# Configs


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--data.task text", r"data\.files='' contradicts data\.task='text': the folder of its files is missing"),
        ("--data.files x", r"data\.files='x' contradicts data\.task='listops': it has no files, '' is allowed"),
        ("--data.inputs values", r"inputs='values' contradicts data\.task='listops': symbols are no numbers"),
        ("--data.task pathfinder", r"sequence_length=100 contradicts .* its images have 1024, 4096, 16384 pixels"),
        ("--data.max_length 102", r"max_length=102 does not fit data\.sequence_length=100: at most 101 is allowed"),
        ("--data.min_length 100", r"max_length=101 leaves no length above data\.min_length=100"),
        ("--model.num_classes 9", r"num_classes=9 does not fit data\.task='listops', which has 10 classes"),
        (
            "--trainer.z_loss 0.1",
            r"trainer\.z_loss=0\.1 contradicts model\.pooling='mean': it is about tokens' successors",
        ),
        (
            "--distill.teacher runs/x",
            r"teacher='runs/x' contradicts model\.pooling='mean': it is about tokens' successors",
        ),
        ("--data.held_out_split dev", r"held_out_split='dev' is not one of validation, test"),
    ],
)
def test_a_mistake_is_one_sentence(words, sentence):
    with pytest.raises(ConfigError, match=sentence):
        resolve("lra-listops-tiny", words.split(), {})


def test_the_table_of_the_paper_is_there():
    """Table 10 of arXiv 2303.06349: length, H, N, steps, batch, dropout, ring; and parameters as 4 N H + 3 N + H a layer with
    norm, gated unit, table and head."""
    table = {
        "cifar": (1024, 512, 384, 180_000, 50, 0.1, 0.9, 0.999),
        "listops": (2048, 128, 256, 80_000, 32, 0.0, 0.0, 0.99),
        "text": (4096, 256, 192, 50_000, 32, 0.1, 0.5, 0.9),
        "retrieval": (8000, 128, 256, 100_000, 64, 0.1, 0.5, 0.9),
        "pathfinder": (1024, 192, 256, 500_000, 64, 0.0, 0.9, 0.999),
        "pathx": (16384, 128, 256, 250_000, 32, 0.0, 0.999, 0.9999),
    }
    for name, (length, h, n, steps, batch, dropout, low, high) in table.items():
        config = EXPERIMENTS[f"lra-{name}"]()
        model = config.model
        assert (config.data.sequence_length, config.data.batch_size, config.trainer.steps) == (length, batch, steps)
        assert (model.depth, model.width, model.state_size, model.dropout) == (6, h, n, dropout)
        assert (model.r_min, model.r_max, config.optimizer.weight_decay) == (low, high, 0.05)
        assert config.optimizer.warmup_steps == steps / 10


# Learning


def placed(config: Config):
    task, mesh = make_task(config), one_device_mesh()
    spec = rules_for(mesh).spec
    return task, mesh, spec, functools.partial(place_batch, mesh=mesh, spec=spec)


@pytest.mark.parametrize("kind", ["lru", "griffin"])
def test_error_rate_and_loss_are_those_of_the_logits_where_the_label_is_asked_for(kind):
    model = (
        LRUConfig(vocab_size=25, width=8, depth=1, state_size=4, pooling="mean", num_classes=10)
        if kind == "lru"
        else GriffinConfig(vocab_size=25, width=8, depth=1, num_heads=2, mlp_width=8, pattern=("attn",), window=100)
    )
    rows = dataclasses.replace(
        SHORT, batch_size=48
    )  # 64 held out: the second batch is filled up with rows that don't count
    config = Config(name="x", model=model, data=rows)
    task, mesh, spec, place = placed(config)
    opened = open_data(rows)
    with jax.set_mesh(mesh):
        model = jax.jit(lambda: task.init(jax.random.key(0), spec))()
        found = evaluate(jax.jit(task.evaluate), {"": model}, opened, 0, task, place)
        batch = opened.held_out.read(np.arange(64))
        logits = np.asarray(model(batch["tokens"], batch["segment_pos"], dtype=jnp.float32), np.float64)
        loss, metrics = task.loss(model, place(batch), jax.random.key(1))
    answers = batch["labels"]
    if kind == "griffin":
        logits, answers = logits[np.arange(64), (batch["segment_pos"] >= 0).sum(axis=1) - 1], answers + 15
    nats = np.log(np.exp(logits).sum(axis=-1)) - logits[np.arange(64), answers]
    assert found["error_rate"] == np.mean(np.argmax(logits, axis=-1) != answers)
    assert found["loss"] == pytest.approx(nats.mean(), rel=1e-5)
    assert float(loss) == pytest.approx(nats.mean(), rel=1e-5) == float(metrics["loss"])


def test_channels_are_dropped_in_training_alone():
    model = LRUConfig(vocab_size=25, width=8, depth=1, state_size=4, pooling="mean", num_classes=10, dropout=0.5)
    config = Config(name="x", model=model, data=dataclasses.replace(SHORT, batch_size=8))
    task, mesh, spec, place = placed(config)
    with jax.set_mesh(mesh):
        model = jax.jit(lambda: task.init(jax.random.key(0), spec))()
        batch = place(open_data(config.data).train.read(np.arange(8)))
        losses = {float(task.loss(model, batch, jax.random.key(key))[0]) for key in range(3)}
        whole = task.evaluate(model, batch)
        assert len(losses) == 3
        assert float(whole["nats"]) / 8 not in losses


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_small_lru_learns_to_name_the_first_token(tmp_path):
    run = tmp_path / "run"
    words = "train lra-first-token-tiny --data.sequence_length 32 --trainer.steps 300 --run"
    code, _, err = finish([sys.executable, "-m", "launch", *words.split(), str(run)], timeout=900)
    assert code == 0, err
    assert read_metrics(run, "eval")[300]["error_rate"] < 0.05
    assert json.loads((run / "data_manifest.json").read_text())["task"] == "first-token"
