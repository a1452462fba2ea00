"""NFNet's training recipe: averages, sharpness-aware steps, losses, metrics and rates, against hand computations and peers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib
from sklearn.metrics import top_k_accuracy_score

from configs import EXPERIMENTS
from configs.finetune import FinetuneConfig
from configs.overrides import resolve
from configs.schema import MeshConfig
from models.params import named_leaves
from sharding.mesh import abstract_mesh, make_mesh
from sharding.rules import rules_for
from trainer.evaluate import place_batch
from trainer.optimizers import adaptive_clip, make_optimizer, make_schedule, scaled
from trainer.program import make_program
from trainer.sam import climbed
from trainer.step import averaged, init_state, train_step
from trainer.tasks import make_task

SMALL = ["--model.widths", "32,32", "--model.depths", "1,1", "--model.head_width", "32", "--data.batch_size", "16"]
RNG = np.random.default_rng(0)
BATCH = {
    "images": RNG.normal(size=(16, 16, 16, 1)).astype(np.float32),
    "labels": RNG.integers(0, 10, 16).astype(np.int32),
    "weights": np.ones(16, np.float32),
}


# --- the published settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "pixels", "dropout", "magnitude"),
    [
        ("nfnet-f0", (192, 256), 0.2, 5),
        ("nfnet-f1", (224, 320), 0.3, 10),
        ("nfnet-f2", (256, 352), 0.4, 10),
        ("nfnet-f3", (320, 416), 0.4, 15),
        ("nfnet-f4", (384, 512), 0.5, 15),
        ("nfnet-f5", (416, 544), 0.5, 15),
        ("nfnet-f6", (448, 576), 0.5, 15),
        ("nfnet-f7", (480, 608), 0.5, 15),
    ],
)
def test_imagenet_from_scratch_is_section_4(name, pixels, dropout, magnitude):
    """arXiv 2102.06171: batch 4096 and learning rate 1.6 for 360 epochs, 5 of them warm-up, everything augmented."""
    config = EXPERIMENTS[name]()
    optimizer, data = config.optimizer, config.data
    assert (data.batch_size, data.image_size, data.eval_size) == (4096, *pixels)
    assert (config.model.dropout, config.model.stochastic_depth) == (dropout, 0.25)
    assert (data.randaugment_layers, data.randaugment_magnitude, data.mixup_alpha, data.cutmix) == (
        4,
        magnitude,
        0.2,
        True,
    )
    assert (data.label_smoothing, data.loss) == (0.1, "softmax")
    assert (optimizer.learning_rate, optimizer.warmup_steps, config.trainer.steps) == (1.6, 1563, 112_602)
    assert (optimizer.beta1, optimizer.weight_decay, optimizer.adaptive_clip, optimizer.ema) == (
        0.9,
        2e-5,
        0.01,
        0.99999,
    )
    assert (optimizer.clip_norm, optimizer.final_fraction, config.trainer.compute_dtype) == (0, 0, "bfloat16")


def test_pretraining_is_that_of_convnets_match_vits_at_scale():
    """arXiv 2310.16764: 4 billion images at 224 pixels, evaluated at 256; one epoch is 976 thousand steps of 4096."""
    config = EXPERIMENTS["nfnet-f7plus-pretrain"]()
    optimizer, data = config.optimizer, config.data
    assert (data.batch_size, data.image_size, data.eval_size, data.augment) == (4096, 224, 256, "crop")
    assert (data.randaugment_layers, data.mixup_alpha, data.cutmix, optimizer.ema) == (0, 0, False, 0)
    assert (optimizer.learning_rate, optimizer.weight_decay, config.trainer.steps // 1000) == (1.6, 1e-6, 976)


def test_transfer_is_appendix_a_5():
    config = EXPERIMENTS["nfnet-f7plus-finetune"]()
    optimizer, data = config.optimizer, config.data
    assert (data.batch_size, data.image_size, data.eval_size, config.trainer.steps) == (2048, 384, 480, 15_000)
    assert (optimizer.learning_rate, optimizer.warmup_steps, optimizer.weight_decay) == (0.1, 5000, 1e-5)
    assert (optimizer.sam_rho, optimizer.sam_share, optimizer.sam_ascent, optimizer.ema) == (0.05, 0.2, "local", 0.9999)
    assert (config.model.dropout, config.model.stochastic_depth) == (0.25, 0.1)
    assert config.finetune == FinetuneConfig(base="runs/nfnet-f7plus-pretrain", new_head=True)


# --- the update ----------------------------------------------------------------------------------------------------------


def test_the_average_follows_its_recursion():
    """x_t = 1/(t+1): the released code's decay is min(d, (1 + t)/(10 + t)), from a copy of the first parameters on."""
    ema, expected = {"w": jnp.float32(5.0)}, 5.0
    for t in range(40):
        ema = averaged(ema, {"w": jnp.float32(1 / (t + 1))}, jnp.int32(t), 0.7)
        decay = min(0.7, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) / (t + 1)
        assert float(ema["w"]) == pytest.approx(expected, rel=1e-5)


def test_adaptive_clipping_of_stacked_layers_is_that_of_each():
    tall = {"layers/groups/rec_0/up": 5.0 * RNG.normal(size=(3, 6, 4)).astype(np.float32)}
    tree = {
        "layers": {"groups": {"up": tall["layers/groups/rec_0/up"], "gain": RNG.normal(size=(3, 4)).astype(np.float32)}}
    }
    params = jax.tree.map(lambda x: RNG.normal(size=x.shape).astype(np.float32), tree)
    got, _ = jax.jit(adaptive_clip(0.01).update)(tree, optax.EmptyState(), params)
    one = optax.adaptive_grad_clip(0.01)
    for layer in range(3):
        pick = functools.partial(jax.tree.map, lambda x, layer=layer: x[layer])
        expected, _ = one.update(pick(tree), optax.EmptyState(), pick(params))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), pick(got), expected)


def test_the_learning_rate_falls_from_the_head_down(one_device):
    task = make_task(resolve("nfnet-tiny", [*SMALL, "--finetune.layer_decay", "0.5"]).config)
    model = task.init(jax.random.key(0), rules_for(one_device).spec)
    ones = jax.tree.map(jnp.ones_like, model)
    updates, _ = scaled(task.rates).update(ones, optax.EmptyState())
    rates = {name: float(jnp.max(leaf)) for name, leaf in named_leaves(updates).items()}
    assert {rates[name] for name in rates if name.startswith("head/")} == {1.0}
    assert rates["final_conv/kernel"] == 0.5
    assert rates["stages/stage_1/block_0/reduce/kernel"] == 0.25
    assert rates["stages/stage_0/block_0/skip_gain"] == 0.125
    assert rates["stem/conv_3/bias"] == rates["stem/conv_0/kernel"] == 0.0625


# --- sharpness-aware steps -------------------------------------------------------------------------------------------------


def small(*words: str) -> tuple:
    config = resolve("nfnet-tiny", [*SMALL, "--optimizer.weight_decay", "0.01", *words]).config
    schedule = make_schedule(config.optimizer, 10)
    task = make_task(config)
    return config, task, schedule, make_optimizer(config.optimizer, schedule, task.decays, task.clips)


def steps(mesh, count: int, *words: str):
    """The model after `count` steps on BATCH, and the one it began with."""
    config, task, schedule, optimizer = small(*words)
    spec = rules_for(mesh).spec
    with jax.set_mesh(mesh):
        state = first = jax.jit(functools.partial(init_state, task, optimizer, 0, spec))()
        step = jax.jit(
            functools.partial(
                train_step, task=task, optimizer=optimizer, schedule=schedule, seed=0, config=config.optimizer,
                microbatches=config.trainer.microbatches,
            )
        )  # fmt: skip
        for _ in range(count):
            state, _ = step(state, place_batch(BATCH, mesh, spec))
        return state.model, first.model


WARM = ("--optimizer.warmup_steps", "0", "--optimizer.schedule", "constant", "--optimizer.sam_rho", "0.05")


def test_a_synced_step_is_optaxs(one_device):
    """optax.contrib.sam in its opaque mode, around the same clipping, decay and momentum."""
    ours, first = steps(one_device, 3, *WARM)
    _, task, _, optimizer = small("--optimizer.warmup_steps", "0", "--optimizer.schedule", "constant")
    theirs = contrib.sam(optimizer, optax.chain(contrib.normalize(), optax.sgd(0.05)), sync_period=2, opaque_mode=True)
    batch = jax.tree.map(jnp.asarray, BATCH)

    @jax.jit
    def step(model, state):
        def gradient(model, _):
            return jax.grad(lambda m: task.loss(m, batch, jax.random.key(0))[0])(model)

        updates, state = theirs.update(gradient(model, 0), state, model, grad_fn=gradient)
        return optax.apply_updates(model, updates), state

    model, state = first, theirs.init(first)
    for _ in range(3):
        model, state = step(model, state)
    expected = named_leaves(model)
    for name, leaf in named_leaves(ours).items():
        np.testing.assert_allclose(leaf, expected[name], rtol=1e-5, atol=1e-7, err_msg=name)
    plain, _ = steps(one_device, 3, "--optimizer.warmup_steps", "0", "--optimizer.schedule", "constant")
    kernel = "stages/stage_0/block_0/shortcut/kernel"
    assert abs(named_leaves(plain)[kernel] - expected[kernel]).max() > 1e-4  # it climbed at all


def test_where_the_gradient_is_zero_nothing_climbs_and_nothing_is_nan():
    model = {"w": jnp.ones(3), "v": jnp.zeros(2)}
    for gradient in (jax.tree.map(jnp.zeros_like, model), {"w": jnp.zeros(3), "v": jnp.array([0.0, 2.0])}):
        there = climbed(model, gradient, 0.05)
        moved = jnp.sqrt(sum(jnp.sum((a - b) ** 2) for a, b in ((there[name], model[name]) for name in model)))
        assert float(moved) in (0.0, pytest.approx(0.05))
        assert jax.tree.all(jax.tree.map(lambda x: bool(jnp.isfinite(x).all()), there))


@pytest.mark.slow
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_devices_that_climb_alone_average_what_they_find_there(one_device, share):
    """Against a loop over the devices' rows; on a mesh that divides parameters, too."""
    rows = np.arange(16).reshape(8, 2)
    _, task, _, optimizer = small("--optimizer.warmup_steps", "0", "--optimizer.schedule", "constant")
    words = (*WARM, "--optimizer.sam_ascent", "local", "--optimizer.sam_share", str(share))
    sharded, first = steps(make_mesh(MeshConfig(data=4, fsdp=2)), 1, *words)
    model = jax.device_put(jax.device_get(first))

    @jax.jit
    def gradient(model, batch):
        return jax.grad(lambda m: task.loss(m, batch, jax.random.key(0))[0])(model)

    found = []
    for own in rows:
        few = {name: jnp.asarray(rows[own][: max(1, round(2 * share))]) for name, rows in BATCH.items()}
        up = gradient(model, few)
        found.append(gradient(climbed(model, up, 0.05), {name: jnp.asarray(rows[own]) for name, rows in BATCH.items()}))
    mean = jax.tree.map(lambda *g: sum(g) / len(g), *found)
    updates, _ = optimizer.update(mean, optimizer.init(model), model)
    expected = named_leaves(optax.apply_updates(model, updates))
    for name, leaf in named_leaves(sharded).items():
        np.testing.assert_allclose(leaf, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
    synced, _ = steps(one_device, 1, *WARM)
    kernel = "stages/stage_0/block_0/shortcut/kernel"
    assert abs(named_leaves(synced)[kernel] - expected[kernel]).max() > 1e-6


def test_microbatches_climb_to_the_same_place(one_device):
    whole, _ = steps(one_device, 2, *WARM)
    parts, _ = steps(one_device, 2, *WARM, "--trainer.microbatches", "4")
    for (name, a), b in zip(named_leaves(whole).items(), named_leaves(parts).values(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    "name", ["nfnet-f0", "nfnet-f0-finetune", "nfnet-f3-imagenet-private", "nfnet-f3-chexpert-private"]
)
def test_a_published_step_fits_together_on_a_pod(name):
    """Shapes and shardings of 64 chips, none of them there; the second climbs with parameters that are whole on each, the others find
    the gradients of units with them."""
    config = EXPERIMENTS[name]()
    mesh = abstract_mesh(config.mesh, 64)
    with jax.sharding.use_abstract_mesh(mesh), jax.numpy_dtype_promotion("standard"):  # optax's cosine wants that
        program = make_program(config, make_task(config), mesh)
        state, metrics = program.trace().out_info
    before, after = (
        {name: (leaf.shape, leaf.sharding.spec) for name, leaf in named_leaves(tree).items()}
        for tree in (program.state, state)
    )
    assert before == after
    assert "ema/stem/conv_0/kernel" in after
    assert metrics["grad_norm"].shape == ()


# --- losses and metrics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_losses_are_optaxs(one_device, kind):
    """On smoothed labels, a third of them mixed; 30 classes, as web collections have many."""
    config = resolve(
        "nfnet-tiny", ["--data.loss", kind, "--data.label_smoothing", "0.1", "--model.num_classes", "30"]
    ).config
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, source="x", channels=3, cutmix=True))
    task = make_task(config)
    logits = 3 * RNG.normal(size=(6, 30)).astype(np.float32)
    a, b = RNG.integers(0, 30, (2, 6)).astype(np.int32)
    mix = np.array([1, 1, 0.3, 0.6, 1, 0.0], np.float32)
    batch = {"images": np.zeros((6, 1, 1, 1), np.float32), "labels": a, "labels_b": b, "mix": mix}
    loss, _ = task.loss(lambda *args, **rest: jnp.asarray(logits), jax.tree.map(jnp.asarray, batch), jax.random.key(0))
    target = mix[:, None] * np.eye(30)[a] + (1 - mix[:, None]) * np.eye(30)[b]
    target = optax.smooth_labels(jnp.asarray(target, jnp.float32), 0.1)
    if kind == "softmax":
        expected = optax.losses.softmax_cross_entropy(logits, target).mean()
    else:
        expected = optax.losses.sigmoid_binary_cross_entropy(logits, target).sum(axis=-1).mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)


def test_metrics_are_scikit_learns_and_the_papers(one_device):
    """Top-1 and top-5 of scikit-learn; expected calibration error by its definition in arXiv 1706.04599, 15 bins."""
    task = make_task(resolve("nfnet-tiny", []).config)
    logits = 2 * RNG.normal(size=(500, 10)).astype(np.float32)
    labels = np.where(RNG.random(500) < 0.4, logits.argmax(1), RNG.integers(0, 10, 500)).astype(np.int32)
    weights = np.ones(500, np.float32)
    weights[450:] = 0  # padding counts for nothing
    batch = {"images": np.zeros((500, 1, 1, 1), np.float32), "labels": labels, "weights": weights}
    sums = task.evaluate(lambda *args, **rest: jnp.asarray(logits), jax.tree.map(jnp.asarray, batch))
    metrics = task.summarise({name: np.float64(value) for name, value in sums.items()})
    logits, labels = logits[:450], labels[:450]
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert metrics["error_rate"] == pytest.approx(1 - top_k_accuracy_score(labels, logits, k=1))
    assert metrics["top_5_error"] == pytest.approx(1 - top_k_accuracy_score(labels, logits, k=5))
    assert metrics["loss"] == pytest.approx(-np.log(p[np.arange(450), labels]).mean(), rel=1e-5)
    sure, right, error = p.max(axis=1), p.argmax(axis=1) == labels, 0.0
    for low in np.arange(15) / 15:
        here = (sure > low) & (sure <= low + 1 / 15)
        if here.any():
            error += here.mean() * abs(right[here].mean() - sure[here].mean())
    assert metrics["calibration_error"] == pytest.approx(error, rel=1e-4)
    assert metrics["calibration_error"] > 0.05


def test_an_equal_logit_of_an_earlier_class_is_ahead(one_device):
    task = make_task(resolve("nfnet-tiny", []).config)
    batch = {"images": jnp.zeros((2, 1, 1, 1)), "labels": jnp.array([0, 1]), "weights": jnp.ones(2)}
    sums = task.evaluate(lambda *args, **rest: jnp.zeros((2, 10)), batch)
    assert float(sums["wrong"]) == 1.0
