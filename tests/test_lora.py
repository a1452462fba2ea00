"""Low-rank adapters: the gradients of arXiv 2106.09685 by hand, a base that never moves, and what is exported."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from configs import EXPERIMENTS
from configs.overrides import resolve
from configs.schema import ConfigError, FinetuneConfig, MeshConfig
from models.convert.tensors import in_memory
from models.params import named_leaves
from sharding.mesh import make_mesh, one_device_mesh
from sharding.rules import rules_for
from trainer.evaluate import load_model, open_base, place_batch, read_config
from trainer.loop import train
from trainer.lora import merged_tensors
from trainer.optimizers import make_optimizer, make_schedule
from trainer.run_folder import read_metrics
from trainer.step import init_state, train_step
from trainer.tasks import make_task

SMALL = "--model.width 32 --model.head_dim 16 --model.mlp_width 64 --model.window 16 --model.pattern local,global"
SMALL += " --model.depth 3 --data.sequence_length 64 --data.batch_size 8"
PLAIN = resolve("gemma-tiny", SMALL.split()).config
LORA = dataclasses.replace(PLAIN, finetune=FinetuneConfig(lora_rank=2, lora_alpha=6.0))
SCALE = 3.0


def random_batch():
    rng = np.random.default_rng(0)
    tokens, targets = (rng.integers(0, 256, (8, 64)).astype(np.int32) for _ in range(2))
    positions = np.broadcast_to(np.arange(64, dtype=np.int32), (8, 64))
    return {"tokens": tokens, "targets": targets, "segment_pos": positions, "weights": np.ones((8, 64), np.float32)}


def moved(model):
    """The adapters away from where they start, so that both factors have gradients."""
    keys = iter(jax.random.split(jax.random.key(5), 100))
    adapters = jax.tree.map(
        lambda leaf: leaf + 0.1 * jax.random.normal(next(keys), leaf.shape, out_sharding=jax.typeof(leaf).sharding),
        model.adapters,
    )
    return dataclasses.replace(model, adapters=adapters)


@pytest.fixture(scope="module")
def adapted():
    mesh = one_device_mesh()
    with jax.set_mesh(mesh):
        yield moved(jax.jit(lambda: make_task(LORA).init(jax.random.key(0), rules_for(mesh).spec))())


def test_training_begins_with_the_outputs_of_the_base():
    mesh = one_device_mesh()
    with jax.set_mesh(mesh):
        model = jax.jit(lambda: make_task(LORA).init(jax.random.key(0), rules_for(mesh).spec))()
        whole = named_leaves(make_task(LORA).whole(model))
        for name, leaf in named_leaves(model.base).items():
            np.testing.assert_array_equal(whole[name], leaf)
        assert any(np.asarray(pair["a"]).any() for pair in model.adapters.values())


def test_gradients_are_those_of_the_matrix_times_the_other_factor(adapted):
    """dA = s dW B', dB = s A' dW, with dW the gradient of the plain model at W + s A B, in numpy."""
    lora, plain, batch, key = make_task(LORA), make_task(PLAIN), random_batch(), jax.random.key(0)
    gradient, _ = jax.jit(jax.grad(lora.loss, has_aux=True))(adapted, batch, key)
    dense = named_leaves(jax.jit(jax.grad(plain.loss, has_aux=True))(lora.whole(adapted), batch, key)[0])
    for path, pair in adapted.adapters.items():
        a, b = (np.asarray(pair[part], np.float64) for part in "ab")
        d_kernel = np.asarray(dense[f"{path}/kernel"], np.float64)
        stacked = a.ndim + b.ndim - 2 > d_kernel.ndim
        for layer in range(len(a)) if stacked else [slice(None)]:
            rank = 2
            left, right = a[layer].reshape(-1, rank), b[layer].reshape(rank, -1)
            d = d_kernel[layer].reshape(len(left), -1)
            for part, expected in (("a", SCALE * d @ right.T), ("b", SCALE * left.T @ d)):
                found = np.asarray(gradient.adapters[path][part][layer]).reshape(expected.shape)
                assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max() + 1e-9, f"{path} {part}"
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient.base))


def test_every_linear_has_an_adapter_and_nothing_else_learns(adapted):
    kernels = {name.removesuffix("/kernel") for name in named_leaves(adapted.base) if name.endswith("/kernel")}
    assert set(adapted.adapters) == kernels
    task = make_task(LORA)
    schedule = make_schedule(LORA.optimizer, 10)
    optimizer = make_optimizer(LORA.optimizer, schedule, task.decays, task.clips, task.learns)
    state = init_state(task, optimizer, 0, rules_for(one_device_mesh()).spec)
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
    assert moments <= 2 * sum(leaf.size for leaf in jax.tree.leaves(adapted.adapters)) + 8
    step = functools.partial(train_step, task=task, optimizer=optimizer, schedule=schedule, seed=0)
    with jax.numpy_dtype_promotion("standard"):  # optax counts on it
        after, _ = jax.jit(lambda s, b: step(step(s, b)[0], b))(state, random_batch())
    for name, leaf in named_leaves(after.model.base).items():
        np.testing.assert_array_equal(leaf, named_leaves(state.model.base)[name])
    assert all(np.asarray(pair["b"]).any() for pair in after.model.adapters.values())


@pytest.mark.parametrize("sizes", [dict(data=2, fsdp=2, tensor=2), dict(data=1, fsdp=4, tensor=2)], ids=str)
def test_eight_devices_learn_what_one_does(adapted, sizes):
    task, key = make_task(LORA), jax.random.key(0)
    value_and_grad = jax.jit(jax.value_and_grad(task.loss, has_aux=True))
    (loss, _), gradient = value_and_grad(adapted, random_batch(), key)
    host = jax.tree.map(np.asarray, adapted)
    mesh = make_mesh(MeshConfig(**sizes))
    with jax.set_mesh(mesh):
        spec = rules_for(mesh).spec
        layout = jax.eval_shape(lambda: task.init(jax.random.key(0), spec))
        placed = jax.tree.map(
            lambda leaf, like: jax.device_put(leaf, jax.NamedSharding(mesh, like.sharding.spec)), host, layout
        )
        (many, _), their = value_and_grad(placed, place_batch(random_batch(), mesh, spec), key)
    np.testing.assert_allclose(many, loss, rtol=1e-5)
    for name, leaf in named_leaves(gradient.adapters).items():
        other = np.asarray(named_leaves(their.adapters)[name])
        assert np.abs(other - np.asarray(leaf)).max() <= 1e-5 * np.abs(np.asarray(leaf)).max() + 1e-8, name


def test_tensors_on_disk_are_merged_piece_by_piece_as_in_memory(adapted):
    on_disk = {name: in_memory(np.asarray(leaf)) for name, leaf in named_leaves(adapted).items()}
    whole = named_leaves(make_task(LORA).whole(adapted))
    found = merged_tensors(on_disk, SCALE)
    assert found.keys() == whole.keys()
    for name, leaf in whole.items():
        pieces = [found[name].read(i, i + 1) for i in range(found[name].shape[0])]
        np.testing.assert_allclose(np.concatenate(pieces), leaf, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run of two steps."""
    run = tmp_path_factory.mktemp("base")
    with jax.numpy_dtype_promotion("standard"):
        train(few_steps(PLAIN, 2), run)
    return run


def few_steps(config, steps, **finetune):
    return dataclasses.replace(
        config,
        finetune=dataclasses.replace(config.finetune, **finetune),
        trainer=dataclasses.replace(config.trainer, steps=steps, compilation_cache="", seed=7),
        optimizer=dataclasses.replace(config.optimizer, schedule="constant", warmup_steps=0),
        eval=dataclasses.replace(config.eval, every=0, batches=1),
    )


@pytest.mark.slow
def test_a_run_starts_from_its_base_and_resumes_to_the_same_bits(base, tmp_path):
    config = few_steps(LORA, 4, base=str(base))
    with jax.numpy_dtype_promotion("standard"):
        train(config, tmp_path / "straight")
        train(few_steps(LORA, 2, base=str(base)), tmp_path / "halves")
        train(config, tmp_path / "halves", allow=["trainer.steps"])
    logs = [read_metrics(tmp_path / name, "train") for name in ("straight", "halves")]
    assert [logs[0][step]["loss"] for step in range(1, 5)] == [logs[1][step]["loss"] for step in range(1, 5)]
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        before, _ = load_model(base, read_config(base), mesh)
        after, step = load_model(tmp_path / "halves", config, mesh)
    before, after = ({n: np.asarray(leaf) for n, leaf in named_leaves(m).items()} for m in (before, after))
    assert step == 4
    same = {name: np.array_equal(leaf, after[name]) for name, leaf in before.items()}
    assert not any(same[name] for name in same if name.endswith("kernel"))
    assert all(same[name] for name in same if not name.endswith("kernel"))


def test_all_parameters_may_start_from_a_base(base, tmp_path):
    config = few_steps(PLAIN, 1, base=str(base))
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        expected = open_base(config, mesh)
        task = make_task(config)
        optimizer = make_optimizer(config.optimizer, make_schedule(config.optimizer, 1), task.decays, task.clips)
        state = init_state(task, optimizer, 7, rules_for(mesh).spec, base=expected)
    for name, leaf in named_leaves(expected).items():
        np.testing.assert_array_equal(named_leaves(state.model)[name], leaf)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["--model.mlp_width", "128"], "model.mlp_width: 64 → 128"),
        (["--data.tokenizer", "sentencepiece:300"], "data.tokenizer: bytes → sentencepiece:300"),
    ],
)
def test_a_base_that_is_another_model_is_refused(base, changes, sentence):
    config = resolve("gemma-tiny", [*SMALL.split(), "--finetune.base", str(base), *changes]).config
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh), pytest.raises(ConfigError, match=sentence):
        open_base(config, mesh)


def test_a_base_of_another_family_is_refused(base):
    config = dataclasses.replace(EXPERIMENTS["griffin-tiny"](), finetune=FinetuneConfig(base=str(base)))
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh), pytest.raises(ConfigError, match="is another model"):
        open_base(config, mesh)
