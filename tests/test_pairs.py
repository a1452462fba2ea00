"""Two documents a row: one network encodes each by itself, without its padding, and a head compares them."""

import dataclasses
import functools
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import finish
from test_lru import SMALL, model_of, parallel, values_of

from configs import EXPERIMENTS
from configs.overrides import resolve
from configs.parameters import COUNTS
from configs.schema import ConfigError, LongRangeData, LRUConfig, MeshConfig
from configs.store import to_json
from data import open_data
from data.shapes import batch_fields
from launch.logits import write_logits
from models.heads import one_by_one
from models.lru import LRUModel, train_flops
from models.params import Init, named_leaves
from sharding.mesh import make_mesh
from sharding.rules import Rules, rules_for
from trainer.evaluate import place_batch
from trainer.run_folder import read_metrics
from trainer.tasks import make_task

MATCHING = LongRangeData(task="matching", inputs="pairs", sequence_length=32, held_out_rows=64, batch_size=8)
ROWS = {
    "mean": LRUConfig(**SMALL, pooling="mean", num_classes=3, pairs=True),
    "last": LRUConfig(**SMALL, pooling="last", num_classes=3, pairs=True),
    "both ways": LRUConfig(**SMALL, pooling="mean", num_classes=3, pairs=True, bidirectional=True),
    "dense": LRUConfig(**SMALL, pooling="mean", num_classes=3, pairs=True, recurrence="tanh"),
}
LENGTHS = np.array([[8, 5], [1, 8], [3, 3]])  # of halves of 8 places


# Rows


def documents_of(batch: dict[str, np.ndarray], row: int) -> list[list[int]]:
    """Without their padding."""
    halves = zip(np.split(batch["pairs"][row], 2), np.split(batch["segment_pos"][row], 2), strict=True)
    return [half[place >= 0].tolist() for half, place in halves]


def test_two_documents_match_if_their_keys_do_and_one_alone_tells_nothing():
    batch = open_data(dataclasses.replace(MATCHING, num_symbols=4)).train.read(np.arange(8000))
    keys, lengths, places, shares = [], [], [], []
    for row in range(8000):
        documents = documents_of(batch, row)
        for document in documents:
            (key,) = set(document) & {0, 1, 2, 3}
            places.append((np.array(document) == key) @ np.linspace(0, 1, len(document)) / document.count(key))
            shares.append((document.count(key), len(document)))
        lengths.append([len(document) for document in documents])
        keys.append([min(document) for document in documents])
    (one, two), labels = np.transpose(keys), batch["labels"]
    np.testing.assert_array_equal(labels, one == two)
    assert (np.min(lengths), np.max(lengths)) == (8, 16)
    assert batch["pairs"].max() == 7
    for which in (one, two):  # 8 cells of 1,000: 99.99 % point of chi-squared, 7 degrees
        counts = np.bincount(2 * which + labels, minlength=8)
        assert ((counts - 1000) ** 2 / 1000).sum() < 29.9
    others = np.bincount((two - one)[labels == 0] % 4, minlength=4)
    assert others[0] == 0
    assert ((others[1:] - others.sum() / 3) ** 2 / (others.sum() / 3)).sum() < 18.4  # the same point, 2 degrees
    assert np.mean(places) == pytest.approx(0.5, abs=0.01)
    found, symbols = np.sum(shares, axis=0)  # one place for sure, of the others one in 8
    assert (found - 16000) / (symbols - 16000) == pytest.approx(1 / 8, abs=0.005)


def test_pairs_are_halves_of_a_row_with_positions_of_their_own():
    opened = open_data(MATCHING)
    batch = opened.train_batch(3)
    assert {name: (rows.shape, rows.dtype) for name, rows in batch.items()} == batch_fields(MATCHING)
    lengths = (batch["segment_pos"].reshape(8, 2, 16) >= 0).sum(axis=2)
    assert len(set(lengths.flat)) > 4
    for row, (one, two) in enumerate(lengths):
        assert batch["segment_pos"][row].tolist() == [*range(one), *[-1] * (16 - one), *range(two), *[-1] * (16 - two)]
        assert batch["weights"][row].tolist() == [float(place == 16 + two - 1) for place in range(32)]
        assert batch["targets"][row, 16 + two - 1] == 17 + batch["labels"][row]
        assert not batch["pairs"][row][batch["segment_pos"][row] < 0].any()
    parts = [open_data(MATCHING, rows).train_batch(3) for rows in np.split(np.arange(8), 4)]
    for name, rows in batch.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), rows)
    assert opened.held_out.read(np.arange(0))["pairs"].shape == (0, 32)  # a host without a row of the last batch
    assert "two documents of 16 tokens at most, 2 classes" in opened.describe()[0]


def test_a_language_model_gets_the_same_documents_in_one_row():
    config = dataclasses.replace(MATCHING, inputs="tokens", sequence_length=33)
    pairs, rows = (open_data(one).train.read(np.arange(50)) for one in (MATCHING, config))
    for row in range(50):
        one, two = documents_of(pairs, row)
        length = (rows["segment_pos"][row] >= 0).sum()
        assert rows["tokens"][row, :length].tolist() == [*one, 16, *two]
        assert rows["segment_pos"][row, :length].tolist() == [*range(length)]
        assert rows["targets"][row, length - 1] == 17 + pairs["labels"][row]
    np.testing.assert_array_equal(pairs["labels"], rows["labels"])
    assert open_data(MATCHING).manifest["hash"] != open_data(config).manifest["hash"]


def test_each_text_of_retrieval_is_cut_to_4000_bytes(tmp_path):
    one, two = b"a" * 4000 + b"b" * 900, b"c" * 3999 + b"d" + b"e"
    for split in ("train", "eval"):
        (tmp_path / f"new_aan_pairs.{split}.tsv").write_bytes(
            b"1.0\tA1\tB2\t%b\t%b\n0.0\tA1\tB2\t%b\t\n0\tA1\tB2\tshort\t%b\r\n" % (one, two, one, two)
        )
    config = dataclasses.replace(EXPERIMENTS["lra-retrieval"]().data, files=str(tmp_path))
    opened = open_data(config)
    batch = opened.train.read(np.arange(2))
    assert bytes(batch["pairs"][0].tolist()) == b"a" * 4000 + b"c" * 3999 + b"d"
    assert bytes(batch["pairs"][1].tolist()) == b"short" + bytes(3995) + b"c" * 3999 + b"d"
    assert [len(document) for document in documents_of(batch, 1)] == [5, 4000]
    assert batch["labels"].tolist() == [1, 0]
    assert opened.skipped == [(f"new_aan_pairs.{split}.tsv:2", "without a text") for split in ("train", "eval")]
    assert [origin.place for (origin,) in opened.train.origins(np.arange(2))] == [1, 3]


# Model


def pairs_of(
    lengths: np.ndarray, room: int, elsewhere: int = 0
) -> tuple[list[list[np.ndarray]], np.ndarray, np.ndarray]:
    """Random documents of these lengths, and rows and positions that hold them."""
    rng = np.random.default_rng(1)
    documents = [[rng.integers(0, 11, length) for length in row] for row in lengths]
    place = np.arange(room)[None, None]
    positions = np.where(place < lengths[:, :, None], place, -1)
    tokens = np.full(positions.shape, elsewhere)
    for row, both in enumerate(documents):
        for half, document in enumerate(both):
            tokens[row, half, : len(document)] = document
    return documents, *(a.reshape(len(lengths), -1).astype(np.int32) for a in (tokens, positions))


def compared(model: LRUModel, documents: list[list[np.ndarray]]) -> np.ndarray:
    """Logits: each document by itself, through the layers, the rest from the formula in float64."""
    features = jax.jit(functools.partial(type(model).features, dtype=jnp.float32))
    head, found = values_of(model.head), []
    for both in documents:
        pooled = []
        for document in both:
            position = np.arange(len(document), dtype=np.int32)[None]
            x = np.asarray(features(model, document[None].astype(np.int32), position), np.float64)[0]
            pooled.append(x.mean(axis=0) if model.config.pooling == "mean" else x[-1])
        e1, e2 = pooled
        z = np.concatenate([e1, e2, e1 * e2, e1 - e2]) @ head["comparison/kernel"].reshape(-1, len(e1))
        z = z + head["comparison/bias"]
        z = z * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
        found.append(z @ head["kernel"] + head["bias"])
    return np.stack(found)


@pytest.mark.parametrize("kind", ROWS)
def test_documents_are_encoded_one_by_one_without_their_padding_and_compared(kind, one_device):
    model = model_of(ROWS[kind])
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == COUNTS["lru"](ROWS[kind]).total
    documents, tokens, positions = pairs_of(LENGTHS, 8)
    expected = compared(model, documents)
    np.testing.assert_allclose(parallel(model, tokens, positions), expected, atol=1e-5)
    for room, elsewhere in ((8, 7), (12, 3)):  # other tokens, and more, behind a document
        _, tokens, positions = pairs_of(LENGTHS, room, elsewhere)
        np.testing.assert_allclose(parallel(model, tokens, positions), expected, atol=1e-5)


def test_both_documents_go_through_the_same_network(one_device):
    model, (_, tokens, positions) = model_of(ROWS["mean"]), pairs_of(LENGTHS, 8)
    swapped = [np.roll(rows, 8, axis=1) for rows in (tokens, positions)]
    there, back = (np.asarray(parallel(model, *rows)) for rows in ((tokens, positions), swapped))
    assert np.abs(there - back).max() > 1e-2
    kernel = model.head.comparison.kernel[...]
    alike = (kernel[0] + kernel[1]) / 2  # of e1 and e2 the same, nothing of e1 - e2: what is left is symmetric
    model.head.comparison.kernel[...] = jnp.stack([alike, alike, kernel[2], jnp.zeros_like(alike)])
    there, back = (np.asarray(parallel(model, *rows)) for rows in ((tokens, positions), swapped))
    np.testing.assert_allclose(there, back, atol=1e-6)
    assert np.std(there, axis=0).min() > 1e-2  # the documents do count


def test_a_key_drops_channels_of_each_document_by_itself(one_device):
    """Two equal documents: without a key all that depends on e1 - e2 is nothing."""
    model = model_of(dataclasses.replace(ROWS["mean"], dropout=0.5))
    kernel = model.head.comparison.kernel[...]
    model.head.comparison.kernel[...] = jnp.zeros_like(kernel).at[3].set(kernel[3])
    tokens, positions = np.tile(np.arange(8, dtype=np.int32), (3, 2)), np.tile(np.arange(8, dtype=np.int32), (3, 2))
    run = jax.jit(lambda model, key: model(tokens, positions, dtype=jnp.float32, dropout_key=key))
    whole = np.asarray(parallel(model, tokens, positions))
    np.testing.assert_allclose(whole, whole[:1].repeat(3, axis=0), atol=1e-6)
    assert np.abs(np.asarray(run(model, jax.random.key(0))) - whole).max(axis=1).min() > 1e-3


def test_eight_devices_compare_as_one_does():
    documents, tokens, positions = pairs_of(np.array([[16, 3], [9, 16], [1, 1], [7, 12]]), 16)
    config, found = (
        LRUConfig(vocab_size=11, width=8, depth=2, state_size=4, pooling="mean", num_classes=2, pairs=True),
        [],
    )
    for mesh in (
        make_mesh(MeshConfig(data=1), jax.devices()[:1]),
        make_mesh(MeshConfig(fsdp=2, sequence=2, tensor=2)),
        make_mesh(MeshConfig(data=4, sequence=2)),
    ):
        spec = rules_for(mesh).spec
        with jax.set_mesh(mesh):
            model = jax.jit(lambda spec=spec: LRUModel(config, Init(jax.random.key(0), spec)))()
            batch = place_batch({"pairs": tokens, "segment_pos": positions}, mesh, spec)
            found.append(np.asarray(parallel(model, batch["pairs"], batch["segment_pos"])))
            if not found[1:]:
                np.testing.assert_allclose(found[0], compared(model, documents), atol=1e-5)
    np.testing.assert_allclose(found[1:], np.stack(found[:1] * 2), atol=1e-5)


def test_devices_take_their_own_pairs_apart():
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    rows = np.arange(8 * 6, dtype=np.int32).reshape(8, 6)
    with jax.set_mesh(mesh):
        placed = place_batch({"pairs": rows}, mesh, rules_for(mesh).spec)["pairs"]
        program = jax.jit(one_by_one).lower(placed).compile()
        np.testing.assert_array_equal(program(placed), rows.reshape(16, 3))
    words = program.as_text()
    assert not [name for name in ("all-", "collective", "scatter") if name in words]


@pytest.mark.parametrize("kind", ROWS)
def test_operations_of_both_documents_and_of_the_head_are_counted(kind, one_device):
    config = ROWS[kind]
    model = jax.eval_shape(lambda: LRUModel(config, Init(jax.random.key(0), Rules().spec)))
    sizes = {name: math.prod(leaf.shape) for name, leaf in named_leaves(model).items()}
    matrices = {name: size for name, size in sizes.items() if name.endswith(("kernel", "transition"))}
    a_row = sum(size for name, size in matrices.items() if name.startswith("head"))
    assert a_row == 4 * 6 * 6 + 6 * 3
    assert train_flops(config, 16) == pytest.approx(6 * (sum(matrices.values()) - a_row + a_row / 16))
    run = resolve("lra-retrieval", []).config
    task, (rows, length) = make_task(run), batch_fields(run.data)["pairs"][0]
    assert (rows, length, task.units_per_step) == (64, 8000, 64 * 8000)
    assert task.flops_per_step == pytest.approx(64 * 8000 * train_flops(run.model, 8000))


# Configs


@pytest.mark.parametrize(
    ("name", "words", "sentence"),
    [
        ("lra-matching-tiny", "--data.inputs tokens", r"model\.pairs=True contradicts data\.inputs='tokens': False is"),
        ("lra-matching-tiny", "--model.pairs false", r"model\.pairs=False contradicts data\.inputs='pairs': True is"),
        ("lra-matching-tiny", "--data.sequence_length 33", r"sequence_length=33 is odd: with data\.inputs='pairs' a doc"),
        ("lra-matching-tiny", "--mesh.sequence 3 --data.sequence_length 72", None),
        (
            "lra-matching-tiny",
            "--mesh.sequence 8 --data.sequence_length 72",
            r"sequence_length=72 has documents of 36, not a multiple of mesh\.sequence=8, the devices that share",
        ),
        ("lra-matching-tiny", "--model.channels 1", r"channels=1 does not fit data\.task='matching': 0 is allowed"),
        (
            "lra-matching-tiny",
            "--data.inputs tokens --model.pairs false --data.sequence_length 2",
            r"sequence_length=2 has no room for two documents and a separator: at least 3 is allowed",
        ),
        ("lra-listops-tiny", "--data.inputs pairs", r"inputs='pairs' contradicts data\.task='listops': its rows are no"),
        ("lra-listops-tiny-transformer", "--data.task matching --data.inputs pairs", r"kind='griffin', which reads tok"),
        ("lru-tiny", "--model.pairs true", r"pairs=True contradicts model\.pooling='none': two documents have one cl"),
        ("lra-matching-tiny", "--data.inputs tokens --model.pairs false", None),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence(name, words, sentence):
    if sentence is None:
        assert resolve(name, words.split()).config
        return
    with pytest.raises(ConfigError, match=sentence):
        resolve(name, words.split())


def test_a_model_of_rows_has_no_logits_of_tokens(tmp_path):
    (tmp_path / "config.json").write_text(to_json(EXPERIMENTS["lra-matching-tiny"]()))
    with pytest.raises(ConfigError, match=r"classifies whole rows: only text runs have logits of tokens$"):
        write_logits(str(tmp_path), tmp_path / "tokens.npy", tmp_path / "out.npy")


def test_retrieval_is_read_in_pairs_of_4000():
    config = EXPERIMENTS["lra-retrieval"]()
    assert (config.data.inputs, config.data.text_length, config.model.pairs) == ("pairs", 4000, True)
    others = [EXPERIMENTS[f"lra-{task}"]() for task in ("listops", "text", "cifar", "pathfinder", "pathx")]
    assert not any(config.model.pairs or config.data.inputs == "pairs" for config in others)


# Learning


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_small_lru_learns_which_documents_match(tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "launch", "train", "lra-matching-tiny", "--run", str(run)]
    code, _, err = finish(command, timeout=900)
    assert code == 0, err
    last = read_metrics(run, "eval")
    assert last[max(last)]["error_rate"] < 0.05  # guessing gives 0.5
