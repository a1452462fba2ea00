"""Sums of clipped gradients are those of a loop over units, one unit moves them by 1 at most, and the noise is normal and fresh.

`TOY`, a linear model with gradients in closed form, stands for large models where thousands of numbers are needed.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import reshard
from scipy import stats

from configs.overrides import resolve
from configs.schema import Config, FinetuneConfig, MeshConfig
from models.params import named_leaves
from sharding.mesh import make_mesh, one_device_mesh
from sharding.rules import rules_for
from trainer.evaluate import place_batch
from trainer.privacy import Privacy, with_noise
from trainer.private_gradient import clipped_sum, private_mean
from trainer.program import make_program
from trainer.tasks import Task, make_task
from trainer.trees import concrete

pytest.importorskip("jax_privacy")

SMALL = {
    "nfnet-tiny": "--model.widths 16 --model.depths 1 --model.stem_widths 4,4,4,8 --model.group_width 4 "
    "--model.head_width 16 --data.image_size 8 --optimizer.adaptive_clip 0",
    "griffin-tiny": "--model.width 16 --model.rnn_width 16 --model.mlp_width 16 --model.num_heads 2 --model.window 8 "
    "--model.num_gate_blocks 2 --model.pattern rec,attn --model.depth 2 --model.vocab_size 32 "
    "--data.sequence_length 16 --optimizer.clip_norm 0",
}
PRIVATE = "--privacy.epsilon 8 --privacy.delta 1e-5"
EIGHT = MeshConfig(data=2, fsdp=4)
NONE_REAL = np.array([1, 4])  # places of a batch of 6 units that have none


def private(name: str, words: str = "") -> Config:
    return resolve(name, f"{SMALL[name]} {PRIVATE} {words}".split()).config


def filled(task: Task, mesh) -> object:
    """A model with other parameters than it starts with, among which there are gains of 0; needs no compilation."""
    rng = np.random.default_rng(3)
    like = concrete(jax.eval_shape(lambda: task.init(jax.random.key(0), rules_for(mesh).spec)), mesh)

    def fill(leaf):
        values = 0.3 * rng.normal(size=leaf.shape) + (leaf.ndim < 2)
        return jax.device_put(values.astype(np.float32), leaf.sharding)

    return jax.tree.map(fill, like)


def random_rows(name: str, count: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    if name == "nfnet-tiny":
        return {
            "images": rng.normal(size=(count, 8, 8, 1)).astype(np.float32),
            "labels": rng.integers(0, 10, count).astype(np.int32),
            "weights": np.ones(count, np.float32),
        }
    tokens, targets = (rng.integers(0, 32, (count, 16)).astype(np.int32) for _ in range(2))
    positions = np.broadcast_to(np.arange(16, dtype=np.int32), (count, 16)).copy()
    weights = (rng.random((count, 16)) < 0.8).astype(np.float32)
    return {"tokens": tokens, "targets": targets, "segment_pos": positions, "weights": weights}


def without_units(batch: dict[str, np.ndarray], rows: int, units: np.ndarray) -> dict[str, np.ndarray]:
    """The places of these units hold no unit, and rubbish."""
    at = (units[:, None] * rows + np.arange(rows)).ravel()
    batch = {name: field.copy() for name, field in batch.items()}
    batch["weights"][at] = 0
    if "images" in batch:
        batch["images"][at] = np.nan
    return batch


def arrays(tree) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in named_leaves(tree).items()}


def norm(tree: dict[str, np.ndarray]) -> float:
    return float(np.sqrt(sum(np.sum(leaf.astype(np.float64) ** 2) for leaf in tree.values())))


def difference(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: a[name].astype(np.float64) - b[name] for name in a}


def gradients_of_units(
    task: Task, model, batch: dict[str, np.ndarray], rows: int
) -> list[dict[str, np.ndarray] | None]:
    """One after the other, None for places without a unit."""

    @jax.jit
    def gradient(model, unit):
        return jax.grad(lambda m: task.loss(task.prepare(m) if task.prepare else m, unit, jax.random.key(0))[0])(model)

    units = ({n: f[u * rows : (u + 1) * rows] for n, f in batch.items()} for u in range(len(batch["weights"]) // rows))
    return [arrays(gradient(model, unit)) if unit["weights"].any() else None for unit in units]


def summed(gradients: list[dict[str, np.ndarray] | None], clip: float) -> dict[str, np.ndarray]:
    """Each clipped to the norm `clip` and divided by it."""
    real = [g for g in gradients if g is not None]
    return {name: sum(g[name] * min(1, clip / norm(g)) / clip for g in real) for name in real[0]}


def assert_close(got: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float) -> None:
    """Of each array, against its largest element."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        error = np.abs(got[name] - value).max()
        assert error <= tolerance * np.abs(value).max() + 1e-7, f"{name}: {error:.1e}"


# --- the sum of real models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rows", "together"),
    [
        ("nfnet-tiny", 3, 2),
        ("griffin-tiny", 3, 1),
        pytest.param("nfnet-tiny", 1, 1, marks=pytest.mark.slow),
        pytest.param("griffin-tiny", 1, 2, marks=pytest.mark.slow),
    ],
)
def test_the_sum_is_that_of_a_loop_over_units(one_device, name, rows, together):
    """Of six places two without a unit, with NaN or rubbish in them; three rows of a unit count as their mean, and of one unit a
    row has no weight."""
    config = private(name, f"--privacy.rows {rows} --privacy.together {together}")
    task = make_task(config)
    model = filled(task, one_device)
    batch = without_units(random_rows(name, 6 * rows), rows, NONE_REAL)
    if rows > 1:
        batch["weights"][2 * rows] = 0
    plain = make_task(dataclasses.replace(config, privacy=dataclasses.replace(config.privacy, epsilon=0.0)))
    weighted = dataclasses.replace(plain, loss=task.loss) if name == "nfnet-tiny" else plain
    gradients = gradients_of_units(weighted, model, batch, rows)
    norms = [norm(g) for g in gradients if g is not None]
    clip = float(np.median(norms))
    assert min(norms) < clip < max(norms)

    settings = dataclasses.replace(config.privacy, clip=clip)
    program = jax.jit(functools.partial(clipped_sum, task, settings))

    def found(batch):
        total, sums = program(model, place_batch(batch, one_device, rules_for(one_device).spec), jax.random.key(1))
        return arrays(total), {name: float(value) for name, value in sums.items()}

    total, sums = found(batch)
    assert_close(total, summed(gradients, clip), 2e-5)
    assert sums["units"] == 4
    assert sums["clipped"] == sum(n > clip for n in norms)

    # In other places the units are the same, and what stands where there are none does not matter.
    order = np.array([4, 3, 1, 5, 0, 2])
    moved = (order[:, None] * rows + np.arange(rows)).ravel()
    elsewhere = {name: field[moved] for name, field in batch.items()}
    if "images" in batch:
        elsewhere["images"] = np.nan_to_num(elsewhere["images"], nan=1e30)
    assert_close(found(elsewhere)[0], total, 1e-5)

    # One unit more or less moves the sum by 1 at most, one that makes no sense included; and by its own gradient.
    for unit in (0, 2, 3, 5):
        rest = found(without_units(batch, rows, np.array([unit])))[0]
        moved_by = difference(total, rest)
        assert norm(moved_by) <= 1 + 1e-5
        own = gradients[unit]
        assert own is not None
        assert norm(moved_by) == pytest.approx(min(1, norm(own) / clip), abs=1e-4)
    if "images" in batch:
        for value in (np.nan, np.inf, 1e30):
            broken = {name: field.copy() for name, field in batch.items()}
            broken["images"][2 * rows + rows - 1] = value
            whole, rest = found(broken)[0], found(without_units(batch, rows, np.array([2])))[0]
            assert all(np.isfinite(leaf).all() for leaf in whole.values())
            assert norm(difference(whole, rest)) <= 1 + 1e-5
    nobody = found(without_units(batch, rows, np.arange(6)))
    assert not any(leaf.any() for leaf in nobody[0].values())
    assert nobody[1]["units"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_eight_devices_find_what_one_does(name):
    """The noise included, and of images dropout; devices have three units each, and some none that is real."""
    config = private(name, "--privacy.rows 2 --privacy.clip 0.5" + (" --model.dropout 0.5" * (name == "nfnet-tiny")))
    task, batch = make_task(config), without_units(random_rows(name, 48), 2, np.array([0, 1, 2, 7, 9, 23]))
    found = []
    for mesh in (one_device_mesh(), make_mesh(EIGHT)):
        with jax.set_mesh(mesh):
            program = jax.jit(functools.partial(private_mean, config.privacy, 0.7, 10, task))
            placed = place_batch(batch, mesh, rules_for(mesh).spec)
            gradient, _ = program(filled(task, mesh), placed, jax.random.key(1), jax.random.key(2))
            found.append(arrays(gradient))
    assert_close(found[1], found[0], 1e-5)


def test_of_adapters_alone_there_are_gradients_and_noise(one_device):
    """The norm that is clipped is theirs, too."""
    config = private("griffin-tiny", "--model.pattern rec --model.depth 1")
    config = dataclasses.replace(config, finetune=FinetuneConfig(lora_rank=2, lora_alpha=6.0))
    task, batch = make_task(config), random_rows("griffin-tiny", 3)
    model = filled(task, one_device)

    def is_adapter(name: str) -> bool:
        return name.startswith("adapters/")

    gradients = [
        {name: leaf for name, leaf in g.items() if is_adapter(name)}
        for g in gradients_of_units(task, model, batch, 1)
        if g is not None
    ]
    settings = dataclasses.replace(config.privacy, clip=min(map(norm, gradients)) / 2)
    placed = place_batch(batch, one_device, rules_for(one_device).spec)

    @jax.jit
    def found(noise):
        return private_mean(settings, noise, 4, task, model, placed, jax.random.key(1), jax.random.key(2))[0]

    clean, noisy = arrays(found(0.0)), arrays(found(3.0))
    adapters = {name: leaf for name, leaf in clean.items() if is_adapter(name)}
    assert_close(adapters, {name: leaf / 4 for name, leaf in summed(gradients, settings.clip).items()}, 2e-5)
    assert any(is_adapter(name) for name in clean)
    assert not all(is_adapter(name) for name in clean)
    for name in clean:
        if is_adapter(name):
            added = (noisy[name] - clean[name]).ravel()
            assert 0.75 / 4 < added.std() < 0.75 * 1.5 or added.size < 50
            assert (added != 0).all()
        else:
            assert not clean[name].any()
            assert not noisy[name].any()


# --- noise and sensitivity, of the toy ------------------------------------------------------------------------------------------

SHAPE = (8, 64)
CLIP, EXPECTED, NOISE, ROOM, ROWS = 0.25, 10, 2.5, 24, 2


def toy(config: Config) -> Task:
    """Half the squared error of <a, x> + <b, z>, meant over rows with weight: its gradient is the error times x and z."""

    def init(key, spec):
        return {name: reshard(jnp.full(SHAPE, 0.01), spec("embed", None)) for name in "ab"}

    def loss(model, batch, key):
        guess = sum(jnp.sum(batch[x] * model[name][None], axis=(1, 2)) for name, x in zip("ab", "xz", strict=True))
        halves = 0.5 * jnp.square(guess - batch["y"])
        mean = jnp.sum(batch["weights"] * halves) / jnp.maximum(jnp.sum(batch["weights"]), 1.0)
        return mean, {"loss": mean}

    return dataclasses.replace(make_task(config), init=init, loss=loss, prepare=None, learns=None, rates=None)


CONFIG = private(
    "nfnet-tiny",
    f"--privacy.clip {CLIP} --privacy.rows {ROWS} --privacy.together 3 --data.batch_size {EXPECTED} "
    "--optimizer.name sgd --optimizer.learning_rate 1 --optimizer.schedule constant --optimizer.warmup_steps 0 "
    "--optimizer.beta1 0 --optimizer.weight_decay 0",
)
TOY = toy(CONFIG)


def toy_units(rng: np.random.Generator, count: int) -> dict[str, np.ndarray]:
    """Of very different sizes. Fields [units, rows, ...]."""
    sizes = 10.0 ** rng.uniform(-4, 4, (count, 1, 1, 1))
    x, z = (sizes * rng.normal(size=(count, ROWS, *SHAPE)) / 20 for _ in range(2))
    weights = np.ones((count, ROWS))
    weights[:, 1] = rng.random(count) < 0.7
    return {"x": x, "z": z, "y": rng.normal(size=(count, ROWS)), "weights": weights}


def toy_batch(units: dict[str, np.ndarray], places: np.ndarray) -> dict[str, np.ndarray]:
    batch = {}
    for name, field in units.items():
        rows = np.zeros((ROOM, *field.shape[1:]), np.float32)
        rows[places[: len(field)]] = field
        batch[name] = rows.reshape(-1, *field.shape[2:])
    return batch


def toy_gradients(units: dict[str, np.ndarray], model: float = 0.01) -> np.ndarray:
    """float64 [units, 2, 8, 64], not clipped."""
    inputs = np.stack([units["x"], units["z"]], axis=2)
    errors = model * inputs.sum(axis=(2, 3, 4)) - units["y"]
    shares = units["weights"] / units["weights"].sum(axis=1, keepdims=True)
    return np.einsum("uk,ukirc->uirc", shares * errors, inputs)


def clipped_norms(gradients: np.ndarray) -> np.ndarray:
    return np.minimum(1, np.sqrt((gradients**2).sum(axis=(1, 2, 3))) / CLIP)


@functools.cache
def toy_sum(mesh=None):
    """The sum of a batch, float64 [2, 8, 64]."""
    mesh = mesh or one_device_mesh()
    with jax.set_mesh(mesh):
        model = jax.jit(lambda: TOY.init(jax.random.key(0), rules_for(mesh).spec))()
        program = jax.jit(functools.partial(clipped_sum, TOY, CONFIG.privacy))

    def found(batch):
        with jax.set_mesh(mesh):
            total, _ = program(model, place_batch(batch, mesh, rules_for(mesh).spec), jax.random.key(0))
            return np.stack([np.asarray(total[name], np.float64) for name in "ab"])

    return found


@pytest.mark.parametrize("mesh", [None, EIGHT], ids=["one device", "eight"])
def test_one_unit_more_or_less_moves_the_sum_by_1_at_most(mesh):
    """Whoever the others are, and wherever they then stand; and by no less than what the accountant takes it for."""
    total, rng, furthest = toy_sum(make_mesh(mesh) if mesh else None), np.random.default_rng(7), 0.0
    for trial in range(60):
        units = toy_units(rng, int(rng.integers(1, ROOM + 1)))
        count, wild = len(units["y"]), trial % 4
        if wild:
            units["x"][0] = (1e30, np.inf, np.nan)[wild - 1]
        whole = total(toy_batch(units, rng.permutation(ROOM)))
        rest = total(toy_batch({name: field[1:] for name, field in units.items()}, rng.permutation(ROOM)))
        assert np.isfinite(whole).all()
        moved = np.sqrt(np.sum((whole - rest) ** 2))
        assert moved <= 1 + 1e-5, (trial, moved)
        furthest = max(furthest, moved)
        if not wild:
            expected = toy_gradients(units)
            assert moved == pytest.approx(clipped_norms(expected)[0], rel=1e-3, abs=1e-5)
            scale = 1 / np.maximum(CLIP, np.sqrt((expected**2).sum(axis=(1, 2, 3), keepdims=True)))
            np.testing.assert_allclose(whole, (scale * expected).sum(axis=0), atol=1e-5 * count)
    assert furthest > 1 - 1e-5


def toy_steps(count: int, secret: bytes, mesh=None, units: dict[str, np.ndarray] | None = None) -> np.ndarray:
    """The gradient of each step of a run, float64 [count, 2, 8, 64]: with a learning rate of 1 it is what parameters lose. Without
    `units` its batches are empty."""
    mesh = mesh or one_device_mesh()
    batch = toy_batch(units or toy_units(np.random.default_rng(0), 0), np.arange(ROOM))
    privacy = Privacy(8.0, 1e-5, 1e-5, 1000, EXPECTED, NOISE, secret, True)
    found = []
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("standard"):
        program = make_program(CONFIG, TOY, mesh, privacy.noise)
        state = with_noise(jax.jit(program.init)(), program.state, privacy)
        placed = place_batch(batch, mesh, rules_for(mesh).spec)
        before = np.zeros((2, *SHAPE)) + np.float32(0.01)
        for _ in range(count):
            state, metrics = program.step(state, placed, None)
            assert "loss" not in metrics
            after = np.stack([np.asarray(state.model[name], np.float64) for name in "ab"])
            found.append(before - after)
            before = after
    return np.stack(found)


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    """Of 40 steps without a unit, over what its standard deviation should be."""
    return toy_steps(40, b"secret") / (NOISE / EXPECTED)


def test_an_empty_batch_gives_noise_alone_of_the_right_size(noise):
    """Whatever norm units are clipped to, as they are divided by it; over the units expected, and not those that came."""
    values = noise.ravel()
    assert abs(values.mean()) < 4 / np.sqrt(values.size)
    low, high = stats.chi2.ppf([1e-4, 1 - 1e-4], values.size)
    assert low < np.sum(values**2) < high
    assert stats.kstest(values, "norm").pvalue > 1e-3


def test_noise_is_independent_between_elements_arrays_and_steps(noise):
    def related(a: np.ndarray, b: np.ndarray) -> float:
        """The correlation in its own standard deviations."""
        return abs(np.sum(a * b)) / np.sqrt(a.size)

    assert related(noise[:, 0], noise[:, 1]) < 4  # arrays
    for lag in (1, 2, 3):
        assert related(noise[lag:], noise[:-lag]) < 4  # steps
    assert related(noise[1:, 0], noise[:-1, 1]) < 4
    for axis in (2, 3):  # neighbours in an array
        first, second = np.split(noise, 2, axis)
        assert related(first, second) < 4
        assert related(np.delete(noise, 0, axis), np.delete(noise, -1, axis)) < 4
    other = toy_steps(3, b"another") / (NOISE / EXPECTED)
    assert related(other, noise[:3]) < 4


def test_noise_is_that_of_the_secret_and_the_step_on_any_mesh(noise):
    """What lies in the way of a difference in the last digits: parameters that were subtracted from one another."""
    again = toy_steps(3, b"secret") / (NOISE / EXPECTED)
    np.testing.assert_array_equal(again, noise[:3])
    many = toy_steps(3, b"secret", make_mesh(EIGHT)) / (NOISE / EXPECTED)
    np.testing.assert_allclose(many, noise[:3], atol=1e-5)


def test_the_mean_is_over_the_units_expected_and_not_over_those_that_came(noise):
    """5 units where 10 were expected, and the noise of an empty batch."""
    units = toy_units(np.random.default_rng(5), 5)
    gradients = toy_gradients(units)
    scale = 1 / np.maximum(CLIP, np.sqrt((gradients**2).sum(axis=(1, 2, 3), keepdims=True)))
    found = toy_steps(1, b"secret", units=units)[0] - noise[0] * NOISE / EXPECTED
    np.testing.assert_allclose(found, (scale * gradients).sum(axis=0) / 10, atol=1e-6)
    assert np.abs(found).max() > 1e-3


def test_losses_are_told_only_where_that_is_asked_for(one_device):
    settings = dataclasses.replace(CONFIG.privacy, log_private=True)
    units = toy_units(np.random.default_rng(6), 7)
    placed = place_batch(toy_batch(units, np.arange(ROOM)), one_device, rules_for(one_device).spec)
    model = jax.jit(lambda: TOY.init(jax.random.key(0), rules_for(one_device).spec))()
    program = jax.jit(functools.partial(private_mean, settings, NOISE, EXPECTED, TOY))
    _, metrics = program(model, placed, jax.random.key(0), jax.random.key(1))
    errors = 0.01 * np.stack([units["x"], units["z"]], axis=2).sum(axis=(2, 3, 4)) - units["y"]
    losses = (units["weights"] * errors**2 / 2).sum(axis=1) / units["weights"].sum(axis=1)
    assert float(metrics["loss"]) == pytest.approx(losses.mean(), rel=1e-4)
    assert float(metrics["clipped"]) == pytest.approx((clipped_norms(toy_gradients(units)) == 1).mean())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_loss_that_is_no_number_is_not_told_of(one_device, value):
    """A guard that saw it would end the run, or skip the step, because of one unit."""
    settings = dataclasses.replace(CONFIG.privacy, log_private=True)
    units = toy_units(np.random.default_rng(6), 7)
    units["y"][2] = value
    placed = place_batch(toy_batch(units, np.arange(ROOM)), one_device, rules_for(one_device).spec)
    model = jax.jit(lambda: TOY.init(jax.random.key(0), rules_for(one_device).spec))()
    program = jax.jit(functools.partial(private_mean, settings, NOISE, EXPECTED, TOY))
    gradient, metrics = program(model, placed, jax.random.key(0), jax.random.key(1))
    for leaf in jax.tree.leaves((gradient, metrics)):
        assert np.isfinite(leaf).all()
