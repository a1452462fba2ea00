"""Rows that get one class: read both ways, of numbers in place of tokens, without their padding; the paper's sizes and rates."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_lru import SMALL, layer, model_of, moved, parallel, states, values_of

from configs.overrides import resolve
from configs.parameters import COUNTS
from configs.schema import LRUConfig, MeshConfig
from models.lru import LRUModel, train_flops
from models.params import Init, named_leaves
from sharding.mesh import make_mesh
from sharding.rules import Rules, rules_for
from trainer.optimizers import make_optimizer, make_schedule
from trainer.tasks import make_task

LENGTHS = np.array([12, 7, 1])
POSITION = np.arange(12, dtype=np.int32)[None]
POSITIONS = np.where(LENGTHS[:, None] > POSITION, POSITION, -1)
ON_THE_LEFT = np.sort(POSITIONS, axis=1)
ROWS = {
    "mean": LRUConfig(**SMALL, pooling="mean", num_classes=3),
    "last": LRUConfig(**SMALL, pooling="last", num_classes=3),
    "both ways": LRUConfig(**SMALL, pooling="mean", num_classes=3, bidirectional=True),
    "dense, both ways": LRUConfig(**SMALL, pooling="last", num_classes=3, bidirectional=True, recurrence="relu"),
    "values": LRUConfig(**SMALL, pooling="mean", num_classes=3, bidirectional=True, channels=2),
}


def inputs_of(config: LRUConfig) -> np.ndarray:
    rng = np.random.default_rng(1)
    if config.channels:
        return rng.normal(size=(3, 12, config.channels)).astype(np.float32)
    return rng.integers(0, config.vocab_size, size=(3, 12)).astype(np.int32)


@pytest.mark.parametrize("recurrence", ["tanh", "lru"])
@pytest.mark.parametrize("positions", [POSITIONS, ON_THE_LEFT], ids=["padding behind", "padding before"])
def test_a_row_is_read_both_ways_without_its_padding(recurrence, positions, one_device):
    """C [states; states of the reversed row] + D u, of a row that is by itself and has no padding."""
    unit = moved(layer(LRUConfig(**SMALL, recurrence=recurrence, bidirectional=True, pooling="mean", num_classes=2)))
    u, values = np.random.default_rng(0).normal(size=(3, 12, 6)), values_of(unit)
    got, _ = jax.jit(lambda m, u: m(u, None, positions))(unit, jnp.float32(u))
    c = values["from_state/kernel"]
    for row, real, y in zip(u, positions >= 0, np.asarray(got), strict=True):
        alone = row[real][None]
        position = np.arange(alone.shape[1])[None]
        there = states(recurrence, values, alone, position)
        back = states(recurrence, values, alone[:, ::-1], position)[:, ::-1]
        if recurrence == "tanh":
            expected = there @ c[0] + back @ c[1]
        else:
            expected = (there @ (c[0] + 1j * c[1]) + back @ (c[2] + 1j * c[3])).real
        np.testing.assert_allclose(y[real], (expected + values["skip"] * alone)[0], atol=1e-5)


@pytest.mark.parametrize("kind", ROWS)
def test_a_sequence_is_classified_without_its_padding(kind, one_device):
    config = ROWS[kind]
    model, inputs = model_of(config), inputs_of(config)
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == COUNTS["lru"](config).total
    logits = np.asarray(parallel(model, inputs, POSITIONS))
    features = jax.jit(lambda m, x, p: (m.features(x, p, dtype=jnp.float32), m.embedding(x, jnp.float32)))
    x, embedded = (np.asarray(a) for a in features(model, inputs, POSITIONS))
    if config.channels:
        encoder = values_of(model.embedding.linear)
        np.testing.assert_allclose(embedded, inputs @ encoder["kernel"] + encoder["bias"], atol=1e-6)
    head = values_of(model.head)
    for row, length, got in zip(x, LENGTHS, logits, strict=True):
        pooled = row[:length].mean(axis=0) if config.pooling == "mean" else row[length - 1]
        np.testing.assert_allclose(got, pooled @ head["kernel"] + head["bias"], atol=1e-5)

    def moved_to(positions: np.ndarray, elsewhere: int) -> np.ndarray:
        found = np.full_like(inputs, elsewhere)
        for row, length in enumerate(LENGTHS):
            found[row, positions[row] >= 0] = inputs[row, :length]
        return found

    for positions, elsewhere in ((ON_THE_LEFT, 0), (POSITIONS, 7)):
        np.testing.assert_allclose(parallel(model, moved_to(positions, elsewhere), positions), logits, atol=1e-5)


def test_devices_classify_as_one_does():
    config = LRUConfig(vocab_size=11, width=8, depth=1, state_size=4, pooling="mean", num_classes=3, channels=2,
                       bidirectional=True)  # fmt: skip
    positions, inputs = POSITIONS[[0, 1, 2, 1]], inputs_of(config)[[0, 1, 2, 0]]
    found = []
    for mesh in (make_mesh(MeshConfig(data=1), jax.devices()[:1]), make_mesh(MeshConfig(fsdp=2, sequence=2, tensor=2))):
        with jax.set_mesh(mesh):
            spec = rules_for(mesh).spec
            model = jax.jit(lambda spec=spec: LRUModel(config, Init(jax.random.key(0), spec)))()
            found.append(np.asarray(parallel(model, inputs, positions)))
    np.testing.assert_allclose(*found, atol=1e-5)


def test_a_key_drops_channels_of_a_row_that_is_classified(one_device):
    config = dataclasses.replace(ROWS["values"], dropout=0.5)
    model, inputs = model_of(config), inputs_of(config)
    run = jax.jit(lambda model, key: model(inputs, POSITIONS, dtype=jnp.float32, dropout_key=key))
    one, again, other = (np.asarray(run(model, jax.random.key(seed))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    whole = np.asarray(parallel(model, inputs, POSITIONS))
    assert not np.allclose(one, other, atol=1e-3)
    assert not np.allclose(one, whole, atol=1e-3)


def test_operations_of_rows_are_counted(one_device):
    for config in ROWS.values():
        model = jax.eval_shape(lambda config=config: LRUModel(config, Init(jax.random.key(0), Rules().spec)))
        sizes = {name: leaf.size for name, leaf in named_leaves(model).items()}
        ways = 1 + config.bidirectional
        a_token = sum(size for name, size in sizes.items() if name.endswith("kernel") and not name.startswith("head"))
        a_token += ways * sum(size for name, size in sizes.items() if name.endswith("transition"))
        assert train_flops(config, 12) == pytest.approx(6 * (a_token + sizes["head/kernel"] / 12))


# --- the paper's sizes and rates --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "modes", "both"),
    [(512, 384, False), (128, 256, False), (256, 192, False), (192, 256, True), (128, 256, True)],
    ids=["sCIFAR", "ListOps", "Text", "Pathfinder", "PathX"],
)
def test_a_published_layer_has_the_papers_parameters(width, modes, both, one_device):
    """nu, theta, gamma (N), complex B (N H) and C (H N, or H 2N both ways), D (H): 4 N H + 3 N + H."""
    config = LRUConfig(width=width, state_size=modes, pooling="mean", num_classes=10, bidirectional=both)
    leaves = named_leaves(jax.eval_shape(lambda: layer(config)))
    assert sum(leaf.size for leaf in leaves.values()) == (6 if both else 4) * modes * width + 3 * modes + width


@pytest.mark.parametrize("recurrence", ["relu", "diagonal", "lru"])
def test_one_update_of_the_recurrence_is_a_share_of_the_others(recurrence, one_device):
    """AdamW's first: -rate (g / |g| + decay w), without decay where the paper has none."""
    words = (
        "--model.width 6 --model.state_size 4 --model.depth 1 --model.rate_factor 0.25 --optimizer.learning_rate 0.01 "
    )
    words += (
        "--optimizer.warmup_steps 0 --optimizer.schedule constant --optimizer.clip_norm 0 --optimizer.weight_decay 0.5"
    )
    config = resolve("lru-tiny", [*words.split(), "--model.recurrence", recurrence]).config
    task = make_task(config)
    optimizer = make_optimizer(
        config.optimizer, make_schedule(config.optimizer, 10), task.decays, task.clips, rates=task.rates
    )
    model = jax.jit(lambda: moved(task.init(jax.random.key(0), Rules().spec)))()
    gradient = jax.tree.map(lambda p: jnp.cos(1 + jnp.arange(p.size, dtype=jnp.float32)).reshape(p.shape), model)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        updates, _ = jax.jit(optimizer.update)(gradient, optimizer.init(model), model)
    weights, slopes, found = values_of(model), values_of(gradient), values_of(updates)
    slower = {"nu_log", "theta_log", "gamma_log", "to_state/kernel"}
    slower |= {"transition"} if recurrence == "relu" else {"real", "imaginary"} if recurrence == "diagonal" else set()
    seen = set()
    for name, update in found.items():
        own = name.removeprefix("layers/groups/lru_0/recurrence/")
        rate = 0.01 * (0.25 if own in slower else 1)
        decay = 0.5 if own in ("from_state/kernel", "layers/groups/lru_0/glu/kernel") else 0.0
        np.testing.assert_allclose(
            update, -rate * (np.sign(slopes[name]) + decay * weights[name]), rtol=1e-5, atol=1e-9
        )
        seen.add(own)
    assert len(seen & slower) == {"relu": 2, "diagonal": 3, "lru": 4}[recurrence]
    assert make_task(resolve("lru-tiny", []).config).rates is None
