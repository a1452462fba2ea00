"""Distillation is the cross-entropy to the teacher written out in float64, on every mesh, and a run with a teacher resumes
to the same bits, with the same teacher."""

import dataclasses
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from runs import SMALL, saved_arrays

from configs.overrides import resolve
from configs.schema import Config, ConfigError, DistillConfig, MeshConfig
from models.distillation import Output, log_z_target_and_expected
from sharding.mesh import make_mesh, one_device_mesh
from sharding.rules import rules_for
from trainer.distill import check_teacher, distilled, open_teacher
from trainer.evaluate import read_config
from trainer.loop import train
from trainer.run_folder import read_manifest, read_metrics
from trainer.storage import StorageError
from trainer.tasks import make_task

B, T, V, D, E = 8, 8, 512, 16, 24  # the teacher is wider
WHOLE, TILES = 256, 0  # MiB of logits: all of them, or no more than 128 rows'
MESHES = {
    "one device": None,
    "data 2, fsdp 2, tensor 2": MeshConfig(data=2, fsdp=2, tensor=2),
    "fsdp 2, sequence 2, tensor 2": MeshConfig(data=1, fsdp=2, sequence=2, tensor=2),
}


def example(num_tokens: int, teacher_rows: int = V) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    weights = rng.uniform(0.5, 2.0, (B, T)) * (rng.uniform(size=(B, T)) > 0.3)
    return {
        "x": rng.normal(size=(B, T, D)).astype(np.float32),
        "table": rng.normal(size=(V, D)).astype(np.float32),
        "teacher_x": rng.normal(size=(B, T, E)).astype(np.float32),
        "teacher_table": (0.5 * rng.normal(size=(teacher_rows, E))).astype(np.float32),
        "targets": rng.integers(num_tokens, size=(B, T)).astype(np.int32),
        "weights": weights.astype(np.float32),
    }


def log_softmax(logits: np.ndarray) -> np.ndarray:
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def capped(x, table, cap: float) -> np.ndarray:
    logits = np.asarray(x, np.float64) @ np.asarray(table, np.float64).T
    return cap * np.tanh(logits / cap) if cap else logits


def noise(key: jax.Array, places: int, num_tokens: int) -> np.ndarray:
    """Gumbel noise (places, num_tokens), a hash of key, place and token each, in float64."""

    def words(place, token):
        return jax.random.key_data(jax.random.fold_in(jax.random.fold_in(key, place), token))[0]

    both = jax.vmap(jax.vmap(words, (None, 0)), (0, None))
    bits = np.asarray(both(jnp.arange(places), jnp.arange(num_tokens)), np.float64)
    return -np.log(-np.log1p(-(bits + 0.5) / 2**32))


def teachers(logits: np.ndarray, samples: int, key: jax.Array) -> np.ndarray:
    """The target distribution q (B T V): all of the softmax, or its sample renormalised."""
    if not samples:
        return np.exp(log_softmax(logits))
    noisy = logits + noise(key, logits.shape[0] * logits.shape[1], logits.shape[2]).reshape(logits.shape)
    drawn = np.zeros(logits.shape, bool)
    np.put_along_axis(drawn, np.argsort(-noisy, axis=-1)[..., :samples], True, axis=-1)
    q = np.where(drawn, np.exp(log_softmax(logits)), 0.0)
    return q / q.sum(-1, keepdims=True)


def closed_form(a: dict, *, num_tokens: int, caps: tuple[float, float], samples: int, key: jax.Array) -> dict:
    """sum(weights * (2 * cross-entropy to q + the target's nats)) and its gradients: (2 (p - q) + p - one-hot) a logit."""
    logits = capped(a["x"], a["table"][:num_tokens], caps[0])
    q = teachers(capped(a["teacher_x"], a["teacher_table"][:num_tokens], caps[1]), samples, key)
    log_p, one_hot = log_softmax(logits), np.eye(num_tokens)[a["targets"]]
    d_logits = 2 * (np.exp(log_p) - q) + np.exp(log_p) - one_hot
    if caps[0]:
        d_logits *= 1 - (logits / caps[0]) ** 2
    d_logits *= a["weights"][..., None].astype(np.float64)
    d_table = np.zeros((V, D))
    d_table[:num_tokens] = np.einsum("btv,btd->vd", d_logits, a["x"])
    return {
        "distill": -np.sum(q * log_p, axis=-1),
        "nats": -np.sum(one_hot * log_p, axis=-1),
        "x": d_logits @ a["table"][:num_tokens].astype(np.float64),
        "table": d_table,
    }


def ours(a: dict, sizes: MeshConfig | None, *, caps=(0.0, 0.0), key=None, **options) -> dict[str, np.ndarray]:
    mesh = make_mesh(sizes) if sizes else one_device_mesh()
    spec = rules_for(mesh).spec
    wide, rows, token = spec("batch", "seq", None), spec("vocab", "embed"), spec("batch", "seq")

    def loss(x, table, teacher_x, teacher_table, targets, weights):
        log_z, target, expected = log_z_target_and_expected(
            Output(x, table, caps[0]),
            Output(teacher_x, teacher_table, caps[1]),
            targets,
            jax.random.key(0) if key is None else key,
            spec=spec,
            **options,
        )
        distill, nats = log_z - expected, log_z - target
        return jnp.sum(weights * (2 * distill + nats)), {"distill": distill, "nats": nats}

    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(a[name], NamedSharding(mesh, s))
            for name, s in zip(
                ("x", "table", "teacher_x", "teacher_table", "targets", "weights"),
                (wide, rows, wide, rows, token, token),
                strict=True,
            )
        ]
        found, slopes = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(*placed)[::-1]
        assert not any(jnp.any(slope) for slope in slopes[2:])  # nothing flows to the teacher
        return {name: np.asarray(v) for name, v in {**found, "x": slopes[0], "table": slopes[1]}.items()}


def check(got: dict, expected: dict) -> None:
    for name in ("distill", "nats"):
        np.testing.assert_allclose(got[name], expected[name], rtol=2e-6, atol=5e-6)
    for name in ("x", "table"):
        error = np.linalg.norm(got[name] - expected[name]) / np.linalg.norm(expected[name])
        assert error < 1e-5, (name, error)


@pytest.mark.parametrize("samples", [0, 40])
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(
    ("caps", "num_tokens", "teacher_rows", "logits_mib"),
    [((0.0, 0.0), V, V, WHOLE), ((3.0, 2.0), 200, 384, TILES)],
    ids=["whole", "tiles, caps, other padding"],
)
def test_loss_and_gradients_are_the_closed_form(mesh, samples, caps, num_tokens, teacher_rows, logits_mib):
    """Of 512 rows 200 are tokens: with tensor 2, one device has nothing but padding, and the teacher has fewer rows."""
    arrays, key = example(num_tokens, teacher_rows), jax.random.key(3)
    options = dict(num_tokens=num_tokens, caps=caps, samples=samples, key=key)
    check(ours(arrays, MESHES[mesh], logits_mib=logits_mib, **options), closed_form(arrays, **options))


def test_a_table_with_more_padding_than_the_students_is_cut():
    arrays = example(500, 640)
    options = dict(num_tokens=500, caps=(0.0, 0.0), samples=0, key=jax.random.key(3))
    check(ours(arrays, MESHES["data 2, fsdp 2, tensor 2"], logits_mib=TILES, **options), closed_form(arrays, **options))


def test_all_tokens_sampled_are_the_whole_distribution():
    arrays = example(200)
    whole, sampled = (ours(arrays, None, num_tokens=200, samples=n, logits_mib=TILES) for n in (0, 200))
    check(sampled, whole)


P = np.array([0.4, 0.25, 0.15, 0.1, 0.06, 0.03, 0.007, 0.003])


def drawn(samples: int, rows: int = 512) -> np.ndarray:
    """q (N V) of a teacher whose distribution is P everywhere, read off the gradient of a student whose logits are 0."""
    n, places = len(P), (rows, 64)
    arrays = {
        "x": np.zeros((*places, n), np.float32),
        "table": np.eye(n, dtype=np.float32),
        "teacher_x": np.broadcast_to(np.log(P).astype(np.float32), (*places, n)),
        "teacher_table": np.eye(n, dtype=np.float32),
        "targets": np.zeros(places, np.int32),
        "weights": np.ones(places, np.float32),
    }
    slope = ours(arrays, None, num_tokens=n, samples=samples, logits_mib=WHOLE, key=jax.random.key(1))["x"]
    one_hot = np.eye(n)[0]
    return (((3 / n - one_hot) - slope) / 2).reshape(-1, n)  # 2 (p - q) + p - one-hot


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_samples_are_drawn_by_the_teachers_probability_without_replacement(samples):
    """Their average is that over all orders of drawing, of which one token after the other has p over what is left; with
    one sample that is P itself: its gradient is that of the whole distribution, on average."""
    q = drawn(samples)
    assert set(np.sum(q > 1e-6, axis=1)) == {samples}
    np.testing.assert_allclose(q.sum(axis=1), 1, atol=1e-5)
    mean, square = np.zeros(len(P)), np.zeros(len(P))
    for order in itertools.permutations(range(len(P)), samples):
        chance, left = 1.0, 1.0
        for token in order:
            chance, left = chance * P[token] / left, left - P[token]
        of_order = np.zeros(len(P))
        of_order[list(order)] = P[list(order)] / P[list(order)].sum()
        mean, square = mean + chance * of_order, square + chance * of_order**2
    if samples == 1:
        np.testing.assert_allclose(mean, P)
    sigma = np.sqrt((square - mean**2) / len(q))
    np.testing.assert_array_less(np.abs(q.mean(axis=0) - mean), 4.5 * sigma)


@pytest.mark.parametrize("samples", [0, 64])
def test_neither_logits_nor_table_exist_whole(samples):
    """A device has 1024 tokens and 2048 of 4096 rows; with 1 MiB, tiles are of 128, and noise is two words a logit."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    spec = rules_for(mesh).spec
    wide, rows = ("batch", "seq", None), ("vocab", "embed")
    shapes = [((32, 128, 64), wide), ((4096, 64), rows), ((32, 128, 32), wide), ((4096, 32), rows)]

    def loss(x, table, teacher_x, teacher_table, targets, key):
        log_z, _, expected = log_z_target_and_expected(
            Output(x, table, 30.0),
            Output(teacher_x, teacher_table, 0.0),
            targets,
            key,
            spec=spec,
            num_tokens=4096,
            samples=samples,
            logits_mib=1,
        )
        return jnp.sum(log_z - expected)

    with jax.set_mesh(mesh):
        arrays = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=NamedSharding(mesh, spec(*n))) for s, n in shapes]
        targets = jax.ShapeDtypeStruct((32, 128), jnp.int32, sharding=NamedSharding(mesh, spec("batch", "seq")))
        program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*arrays, targets, jax.random.key(0)).compile()
    text = program.as_text()
    sizes = {s: math.prod(map(int, s.split(","))) for s in re.findall(r"(?:f32|bf16|u32|s32)\[([\d,]+)\]", text)}
    assert max(sizes.values()) <= (2 * 1024 * 128 if not samples else 2 * 1024 * (128 + 65)), sizes
    for width in (64, 32):  # of either table
        others = {
            s: size for s, size in sizes.items() if s.endswith(f",{width}") and "1024" not in s and "128" not in s
        }
        assert all(size < 2048 * width for size in others.values()), others


# --- the task -----------------------------------------------------------------------------------------------------------


def small(name: str, *words: str) -> Config:
    return resolve(name, [*SMALL[name].split(), "--data.batch_size", "8", *words]).config


def taught(student: Config, teacher: Config, run, **fields) -> Config:
    """The student's config with a teacher in the folder `run`, which then holds the teacher's config."""
    from configs.store import to_json

    (run / "config.json").write_text(to_json(teacher))
    return dataclasses.replace(student, distill=DistillConfig(teacher=str(run), **fields))


def random_batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    tokens, targets = (rng.integers(0, 256, (8, 64)).astype(np.int32) for _ in range(2))
    positions = np.tile(np.arange(64, dtype=np.int32) % 23, (8, 1))
    weights = (rng.uniform(size=(8, 64)) > 0.3).astype(np.float32)
    weights[3] = 0.0  # a row of padding
    return {"tokens": tokens, "targets": targets, "segment_pos": positions, "weights": weights}


def manifest(config: Config) -> dict:
    return {"tokenizer": {"fingerprint": "bytes-1"}}


def loss_and_gradient(config: Config, teacher: Config, sizes: MeshConfig | None, same: bool = False):
    """Total, metrics, gradient, and the logits of both, with random parameters from two seeds (or one)."""
    mesh, batch = make_mesh(sizes) if sizes else one_device_mesh(), random_batch()
    spec, task = rules_for(mesh).spec, distilled(make_task(config), config, manifest(config))
    with jax.set_mesh(mesh):
        placed = {n: jax.device_put(v, NamedSharding(mesh, spec("batch"))) for n, v in batch.items()}
        models = [
            jax.jit(lambda key, c=c: make_task(c).init(key, spec))(jax.random.key(seed))
            for seed, c in ((0, config), (0 if same else 1, teacher))
        ]
        program = jax.jit(jax.value_and_grad(task.loss, has_aux=True))
        (total, metrics), gradient = program(models[0], placed, jax.random.key(5), teacher=models[1])
        logits = [
            np.asarray(jax.jit(lambda m, b: m(b["tokens"], b["segment_pos"], dtype=jnp.float32))(m, placed), np.float64)
            for m in models
        ]
    return float(total), {n: float(v) for n, v in metrics.items()}, jax.device_get(gradient), logits


@pytest.mark.slow
@pytest.mark.parametrize(
    ("samples", "sizes"),
    [
        pytest.param(0, MeshConfig(data=2, fsdp=2, tensor=2), id="all"),
        pytest.param(40, MeshConfig(data=1, fsdp=8), id="40 samples"),
    ],  # 8 don't divide the teacher's width
)
def test_a_griffin_teaches_a_gemma(tmp_path, samples, sizes):
    """Value against the logits of both models; the mean is over tokens that count; the same on eight devices."""
    words = ["--model.padding_rows", "56", "--model.logits_soft_cap", "2", "--trainer.z_loss", "0.01"]
    shape = ["--model.width", "36", "--model.num_heads", "3"]
    teacher = small("griffin-tiny", *shape, "--model.logits_soft_cap", "1.5")
    config = taught(small("gemma-tiny", *words), teacher, tmp_path, samples=samples, weight=0.3)
    total, metrics, gradient, (logits, teacher_logits) = loss_and_gradient(config, teacher, None)
    batch = random_batch()
    log_p = log_softmax(logits[..., :264])
    q = teachers(teacher_logits, samples, jax.random.key(5))
    nats = -np.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0]
    log_z = np.log(np.exp(logits[..., :264]).sum(-1))
    expected = {"loss": nats, "distill_loss": -np.sum(q * log_p, -1), "z_loss": 0.01 * log_z**2}
    expected = {name: np.average(value, weights=batch["weights"]) for name, value in expected.items()}
    assert metrics == pytest.approx(expected, rel=2e-6)
    assert total == pytest.approx(
        0.3 * expected["distill_loss"] + 0.7 * expected["loss"] + expected["z_loss"], rel=2e-6
    )
    many = loss_and_gradient(config, teacher, sizes)
    assert many[1] == pytest.approx(metrics, rel=5e-6)
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(many[2]), strict=True):
        np.testing.assert_allclose(other, one, rtol=2e-4, atol=2e-6)


def test_who_is_its_own_teacher_has_nothing_to_learn(tmp_path):
    student = small("gemma-tiny")
    config = taught(student, student, tmp_path)
    _, metrics, gradient, (logits, _) = loss_and_gradient(config, student, None, same=True)
    log_p = log_softmax(logits)
    entropy = np.average(-np.sum(np.exp(log_p) * log_p, -1), weights=random_batch()["weights"])
    assert metrics["distill_loss"] == pytest.approx(entropy, rel=1e-6)
    assert metrics["loss"] > metrics["distill_loss"] + 0.05
    assert math.sqrt(sum(float(np.sum(leaf**2)) for leaf in jax.tree.leaves(gradient))) < 1e-6


def test_work_counts_the_teachers_forward_pass(tmp_path):
    student = small("gemma-tiny")
    task = make_task(student)
    whole = distilled(task, taught(student, student, tmp_path), manifest(student))
    assert whole.flops_per_step == pytest.approx(task.flops_per_step * 4 / 3)


# --- runs ---------------------------------------------------------------------------------------------------------------


def few_steps(config: Config, steps: int, **distill) -> Config:
    return dataclasses.replace(
        config,
        distill=DistillConfig(**distill),
        trainer=dataclasses.replace(config.trainer, steps=steps, compilation_cache=""),
        optimizer=dataclasses.replace(config.optimizer, schedule="constant", warmup_steps=0),
        eval=dataclasses.replace(config.eval, every=0, batches=1),
    )


def learn(config: Config, run, allow=()) -> dict[str, float]:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # optax mixes them
        return train(config, run, allow)


@pytest.fixture(scope="module")
def teacher_run(tmp_path_factory):
    """A Griffin of two steps."""
    run = tmp_path_factory.mktemp("teacher")
    learn(few_steps(small("griffin-tiny"), 2), run)
    return run


@pytest.mark.slow
def test_a_taught_run_resumes_to_the_same_bits_with_the_teacher_it_had(teacher_run, tmp_path):
    student, distill = small("gemma-tiny"), dict(teacher=str(teacher_run), samples=16)
    config = few_steps(student, 4, **distill)
    learn(config, tmp_path / "straight")
    learn(few_steps(student, 2, **distill), tmp_path / "halves")
    learn(few_steps(small("griffin-tiny"), 3), teacher_run, allow=["trainer.steps"])  # the teacher learns on
    learn(config, tmp_path / "halves", allow=["trainer.steps"])
    learn(few_steps(student, 4), tmp_path / "alone")
    logs = [read_metrics(tmp_path / name, "train") for name in ("straight", "halves", "alone")]
    for name in ("loss", "distill_loss", "grad_norm"):
        assert [logs[0][step][name] for step in range(1, 5)] == [logs[1][step][name] for step in range(1, 5)]
    assert logs[0][1]["loss"] == pytest.approx(logs[2][1]["loss"], rel=1e-6)  # of the data, whoever teaches
    assert logs[0][4]["loss"] != pytest.approx(logs[2][4]["loss"], rel=1e-6)
    assert saved_arrays(tmp_path / "straight", 4).keys() == saved_arrays(tmp_path / "alone", 4).keys()
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        assert open_teacher(config, mesh, {})[1] == {"teacher_step": 3}  # a new run would have the newer teacher
        with pytest.raises(StorageError, match="step 7"):
            open_teacher(config, mesh, {"teacher_step": 7})


def test_a_teacher_is_kept_in_the_compute_dtype(teacher_run):
    config = few_steps(small("gemma-tiny", "--trainer.compute_dtype", "bfloat16"), 1, teacher=str(teacher_run))
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        teacher, _ = open_teacher(config, mesh, {})
    assert teacher.embedding.table.dtype == jnp.bfloat16
    assert teacher.final_norm.dtype == jnp.float32


def test_a_teacher_of_another_vocabulary_or_tokenizer_is_refused(teacher_run):
    def refused(student: Config, manifest: dict) -> str:
        config = few_steps(student, 1, teacher=str(teacher_run))
        with pytest.raises(ConfigError) as error:
            check_teacher(config, read_config(teacher_run), manifest)
        return str(error.value)

    ours = read_manifest(teacher_run)
    check_teacher(few_steps(small("gemma-tiny"), 1, teacher=str(teacher_run)), read_config(teacher_run), ours)
    said = refused(small("gemma-tiny", "--model.vocab_size", "300"), ours)
    assert "has model.vocab_size=264, but the student has model.vocab_size=300" in said
    other = {"tokenizer": {"fingerprint": "0123456789abcdef0123"}}
    said = refused(small("gemma-tiny", "--data.tokenizer", "sentencepiece:264"), other)
    assert "tokenizer bytes (bytes-1), but the student's is sentencepiece:264 (0123456789abcdef0123)" in said


def test_an_imported_teachers_tokenizer_is_its_file(tmp_path):
    from data.tokenizers import tokenizer_from_file, train_sentencepiece

    for name, text in (
        ("a", "the cat sat on the mat while it rained "),
        ("b", "the dog ran in the rain while he sat "),
    ):
        (tmp_path / f"{name}.model").write_bytes(train_sentencepiece(280, [text * 50]))
    run = tmp_path / "imported"
    run.mkdir()
    teacher = small("gemma-tiny", "--model.vocab_size", "280", "--data.tokenizer", str(tmp_path / "a.model"))
    student = small("gemma-tiny", "--model.vocab_size", "280", "--data.tokenizer", str(tmp_path / "b.model"))
    config = taught(student, teacher, run)
    prints = [tokenizer_from_file(str(tmp_path / f"{name}.model")).fingerprint for name in "ab"]
    check_teacher(config, teacher, {"tokenizer": {"fingerprint": prints[0]}})
    with pytest.raises(ConfigError, match=r"a\.model .*b\.model"):
        check_teacher(config, teacher, {"tokenizer": {"fingerprint": prints[1]}})


@pytest.mark.parametrize(
    ("name", "words", "sentence"),
    [
        ("gemma-tiny", "--distill.samples 256", "distill.samples=256 has no teacher: give distill.teacher"),
        ("gemma-tiny", "--distill.weight 0.5", "distill.weight=0.5 has no teacher"),
        ("gemma-tiny", "--distill.teacher x --distill.weight 0", "distill.weight=0.0 is out of range"),
        ("gemma-tiny", "--distill.teacher x --distill.samples 265", "is more than model.vocab_size=264 tokens"),
        ("nfnet-tiny", "--distill.teacher x", "distill.teacher='x' contradicts model.kind='nfnet'"),
    ],
)
def test_a_mistake_is_one_sentence(name, words, sentence):
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        resolve(name, words.split())


@pytest.mark.slow
def test_a_student_learns_faster_from_a_teacher_than_from_the_data(tmp_path):
    """A narrow Gemma, 200 steps: alone, from a wider one of 600 steps, and from 32 sampled logits of it."""
    words = "--data.batch_size 8 --data.sequence_length 128 --model.depth 2 --model.pattern local,global --eval.every 0"
    words += " --model.window 64 --eval.batches 32 --trainer.log_every 50"
    shapes = {"teacher": "--model.width 96 --model.head_dim 24 --model.mlp_width 288 --trainer.steps 600"}
    shapes |= {"student": "--model.width 32 --model.head_dim 8 --model.mlp_width 96 --trainer.steps 200"}
    configs = {who: resolve("gemma-tiny", [*words.split(), *shape.split()]).config for who, shape in shapes.items()}
    found = {"teacher": learn(configs["teacher"], tmp_path / "teacher")["bits_per_byte"]}
    for who, samples in (("alone", None), ("whole", 0), ("sampled", 32)):
        distill = (
            DistillConfig() if samples is None else DistillConfig(teacher=str(tmp_path / "teacher"), samples=samples)
        )
        config = dataclasses.replace(configs["student"], distill=distill)
        found[who] = learn(config, tmp_path / who)["bits_per_byte"]
    print(found)
    assert found["teacher"] < found["whole"] < found["alone"] - 0.02, found
    assert found["sampled"] < found["alone"] - 0.02, found
