"""The LRU and the recurrences that lead to it equal a float64 loop over time written from the paper's formulas."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import reshard

from configs import EXPERIMENTS
from configs.overrides import resolve
from configs.parameters import COUNTS
from configs.schema import Config, ConfigError, LRUConfig, MeshConfig, RecallData
from data import open_data
from models.decode import advance, open_state
from models.lru import LRU, Block, Dense, LRUModel, decays, diagonal_scan, drop, ring, train_flops
from models.params import Init, named_leaves
from sharding.mesh import abstract_mesh, make_mesh
from sharding.rules import Rules, rules_for
from trainer.program import make_program
from trainer.tasks import make_task

SMALL = dict(vocab_size=11, width=6, depth=2, state_size=5)
DENSE = {"tanh": np.tanh, "relu": lambda x: np.maximum(x, 0), "dense": lambda x: x}
STEPS = (*DENSE, "diagonal", "exponential", "ring", "lru")
# One document, several of a few tokens, a row that begins within a document, padding on the left.
POSITIONS = np.array(
    [[*range(12)], [*range(3), 0, *range(5), 0, 1, 2], [*range(4, 9), *range(7)], [-1] * 4 + [*range(8)]], np.int32
)
TOKENS = np.random.default_rng(0).integers(0, 11, POSITIONS.shape).astype(np.int32)


def layer(config: LRUConfig) -> LRU | Dense:
    kind = Dense if config.recurrence in DENSE else LRU
    return kind(config, Init(jax.random.key(1), Rules().spec))


def values_of(module) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf, np.float64) for name, leaf in named_leaves(module).items()}


def states(
    recurrence: str, v: dict[str, np.ndarray], u: np.ndarray, positions: np.ndarray, x: np.ndarray | None = None
) -> np.ndarray:
    """(B T N), step by step in complex128, from parameters by name."""
    nonlinear = DENSE.get(recurrence, lambda x: x)
    if "transition" in v:
        a, b = v["transition"], v["to_state/kernel"].T
    else:
        if "real" in v:
            eigenvalues = v["real"] + 1j * v["imaginary"]
        else:
            eigenvalues = np.exp(-np.exp(v["nu_log"]) + 1j * np.exp(v["theta_log"]))
        a = np.diag(eigenvalues)
        b = v["to_state/kernel"][:, 0].T + 1j * v["to_state/kernel"][:, 1].T
        b = np.exp(v.get("gamma_log", np.zeros(len(a))))[:, None] * b
    x = np.zeros((len(u), len(a)), float if recurrence in DENSE else complex) if x is None else x
    found = []
    for t in range(u.shape[1]):
        x = nonlinear(np.where(positions[:, t, None] == 0, 0, x) @ a.T + u[:, t] @ b.T)
        found.append(x)
    return np.stack(found, axis=1)


def recurrent(recurrence: str, v: dict[str, np.ndarray], u: np.ndarray, positions: np.ndarray, x=None):
    """y (B T D) and the last state."""
    found, c = states(recurrence, v, u, positions, x), v["from_state/kernel"]
    c = c if recurrence in DENSE else c[0] + 1j * c[1]
    return (found @ c).real + v["skip"] * u, found[:, -1]


def logits_of(recurrence: str, v: dict[str, np.ndarray], depth: int) -> np.ndarray:
    """Of the whole model, on TOKENS."""
    x = v["embedding/table"][TOKENS]
    for i in range(depth):
        block = {n.removeprefix("layers/groups/lru_0/"): p[i] for n, p in v.items() if n.startswith("layers/")}
        z = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        z = z * block["norm_scale"] + block["norm_bias"]
        z, _ = recurrent(recurrence, {n.removeprefix("recurrence/"): p for n, p in block.items()}, z, POSITIONS)
        z = z * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
        one, two = np.moveaxis(np.einsum("btd,dke->btke", z, block["glu/kernel"]) + block["glu/bias"], 2, 0)
        x = x + one / (1 + np.exp(-two))
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * (1 + v["final_norm"])
    return x @ v["embedding/table"].T


def moved(module, by: float = 0.3):
    """The module with every parameter moved from where it starts, where some have no effect."""
    return jax.tree.map(lambda p: p + by * jnp.cos(jnp.arange(p.size, dtype=jnp.float32)).reshape(p.shape), module)


def model_of(config: LRUConfig) -> LRUModel:
    return jax.jit(lambda: moved(LRUModel(config, Init(jax.random.key(0), Rules().spec)), 0.1))()


@functools.partial(jax.jit, static_argnames="dtype")
def parallel(model, tokens=TOKENS, positions=POSITIONS, dtype=jnp.float32):
    return model(tokens, positions, dtype=dtype)


# --- the recurrence ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recurrence", STEPS)
def test_each_step_of_the_ablation_is_a_loop_over_time_with_its_gradients(recurrence, one_device):
    unit = moved(layer(LRUConfig(**SMALL, recurrence=recurrence)))
    rng = np.random.default_rng(0)
    u, dy = rng.normal(size=(2, *POSITIONS.shape, 6))
    x0 = rng.normal(size=(4, 5)) + (0 if recurrence in DENSE else 1j * rng.normal(size=(4, 5)))
    dtype, modes = (jnp.float32, None) if recurrence in DENSE else (jnp.complex64, "rnn")
    start = reshard(jnp.asarray(x0, dtype), Rules().spec("batch", modes))
    values, loop = values_of(unit), functools.partial(recurrent, recurrence)
    run = jax.jit(lambda m, u, x0: m(u, x0, POSITIONS))
    for given, expected in ((None, loop(values, u, POSITIONS)), (start, loop(values, u, POSITIONS, x0))):
        for ours, theirs in zip(run(unit, jnp.float32(u), given), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)

    gradient = jax.jit(jax.grad(lambda m: jnp.sum(m(jnp.float32(u), None, POSITIONS)[0] * jnp.float32(dy))))(unit)
    for name, ours in values_of(gradient).items():
        for place in (0, ours.size // 2, ours.size - 1):
            sides = []
            for step in (1e-5, -1e-5):
                changed = values[name].copy()
                changed.flat[place] += step
                sides.append(np.sum(loop(values | {name: changed}, u, POSITIONS)[0] * dy))
            slope = (sides[0] - sides[1]) / 2e-5
            assert ours.flat[place] == pytest.approx(slope, rel=1e-4, abs=1e-4), (name, place)


@pytest.mark.parametrize("recurrence", STEPS)
def test_each_step_starts_as_the_paper_says(recurrence, one_device):
    modes = 400 if recurrence in DENSE else 20_000
    config = LRUConfig(width=2, state_size=modes, recurrence=recurrence, r_min=0.5, r_max=0.9, max_phase=1.0)
    unit = layer(config)
    if isinstance(unit, Dense):
        found = np.linalg.eigvals(np.asarray(unit.transition[...]))
    else:
        found = np.asarray(unit.eigenvalues(), np.complex128)
        assert float(jnp.var(unit.to_state.kernel[...])) == pytest.approx(1 / 4, rel=0.05)
        assert float(jnp.var(unit.from_state.kernel[...])) == pytest.approx(1 / modes, rel=0.05)
    on_ring = recurrence in ("ring", "lru")
    low, high, phase = (0.5, 0.9, 1.0) if on_ring else (0.0, 1.0, 2 * np.pi)
    square, angle = np.abs(found) ** 2, np.angle(found) % (2 * np.pi)
    # Kolmogorov and Smirnov: 99.99 % of samples of n are below 2.2 / sqrt(n); a dense matrix's are exact at n = infinity.
    limit = 2.2 / np.sqrt(modes)
    assert distance((square - low**2) / (high**2 - low**2)) < limit
    assert distance(angle / phase) < limit
    if recurrence == "lru":
        np.testing.assert_allclose(np.exp(2 * np.asarray(unit.gamma_log[...], np.float64)), 1 - square, rtol=1e-5)


def distance(samples: np.ndarray) -> float:
    """Of their empirical distribution from the uniform one on 0 to 1."""
    return np.max(np.abs(np.sort(samples) - (np.arange(len(samples)) + 0.5) / len(samples)))


def test_the_exponential_form_is_stable_whatever_its_parameters_are(one_device):
    unit = layer(LRUConfig(width=2, state_size=4001))
    unit.nu_log[...] = jnp.linspace(-200.0, 200.0, 4001)
    for theta in (-50.0, 0.0, 3.0):
        unit.theta_log[...] = jnp.full(4001, theta)
        modulus = np.abs(np.asarray(unit.eigenvalues(), np.complex128))
        assert np.all(modulus <= 1 + 2e-7)  # where 1 - |lambda| is less than float32 has between 0.5 and 1
        assert np.all(modulus[np.asarray(unit.nu_log[...]) > -14] < 1)
    nu_log = ring(0.0, 1.0)(jax.random.key(0), (1_000_000,))
    assert np.all(np.isfinite(nu_log))


@pytest.mark.parametrize("reverse", [False, True])
def test_devices_that_share_a_sequence_give_the_loop_of_one(reverse):
    """Forwards documents begin on some of the eight devices, several on one, and on none; from the end rows have padding, of
    a device and more."""
    mesh = make_mesh(MeshConfig(data=1, sequence=4, tensor=2))
    rng = np.random.default_rng(0)
    (modulus, phase), (real, imaginary) = rng.uniform(size=(2, 6)), rng.normal(size=(2, 4, 12, 6))
    eigenvalues, inputs = modulus * np.exp(1j * phase), real + 1j * imaginary
    position = np.arange(12, dtype=np.int32)[None]
    positions = np.where(position < np.array([[12], [10], [7], [1]]), position, -1) if reverse else POSITIONS
    expected, x = np.empty_like(inputs), np.zeros((4, 6), complex)
    for t in reversed(range(12)) if reverse else range(12):
        kept, added = (True, positions[:, t, None] >= 0) if reverse else (positions[:, t, None] != 0, True)
        x = kept * eigenvalues * x + added * inputs[:, t]
        expected[:, t] = x
    with jax.set_mesh(mesh):
        spec = rules_for(mesh).spec
        scan = jax.jit(lambda a, x, p: diagonal_scan(a, x, p, None, spec, reverse)[0])
        got = scan(reshard(jnp.complex64(eigenvalues), spec("rnn")), jnp.complex64(inputs), positions)
    np.testing.assert_allclose(got, expected, atol=1e-5)


# --- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recurrence", ["tanh", "dense", "diagonal", "lru"])
def test_the_whole_model_is_the_papers_and_reads_a_text_in_any_pieces(recurrence, one_device):
    config = LRUConfig(**SMALL, recurrence=recurrence)
    model = model_of(config)
    logits = np.asarray(parallel(model))
    np.testing.assert_allclose(logits, logits_of(recurrence, values_of(model), depth=2), atol=2e-5)
    step = jax.jit(functools.partial(advance, dtype=jnp.float32))
    state, at = open_state(model, 4, jnp.float32, 16), 0
    for pieces in (5, 1, 1, 5):
        piece = slice(at, at + pieces)
        last, state = step(model, state, TOKENS[:, piece], POSITIONS[:, piece])
        at += pieces
        if at != 5:  # one row begins within a document, whose state only whole rows lack
            np.testing.assert_allclose(last, logits[:, at - 1], atol=2e-5)


def test_bfloat16_stays_near_float32(one_device):
    model = model_of(LRUConfig(**SMALL))
    exact, rough = (np.asarray(parallel(model, dtype=dtype)) for dtype in (jnp.float32, jnp.bfloat16))
    assert rough.dtype == np.float32
    assert np.std(rough - exact) / np.std(exact) < 0.03


def test_dropout_takes_channels_of_whole_rows_other_ones_in_each_layer_and_keeps_the_mean(one_device):
    dropped = np.asarray(drop(jnp.ones((400, 3, 50)), jax.random.key(0), 0.25))
    assert np.all((dropped == 0) | np.isclose(dropped, 4 / 3))
    assert np.all(dropped == dropped[:, :1])
    assert dropped.mean() == pytest.approx(1, abs=0.02)

    config = LRUConfig(**SMALL, dropout=0.5)
    model, seen = model_of(config), []

    @functools.partial(jax.jit, static_argnames="remat")
    def program(model, key, remat):
        return model.features(TOKENS, POSITIONS, dtype=jnp.float32, dropout_key=key, remat=remat)

    def features(key, remat="none"):
        return program(model, key, remat)

    one, again, other = features(jax.random.key(0)), features(jax.random.key(0), "layer"), features(jax.random.key(1))
    np.testing.assert_allclose(one, again, atol=1e-6)
    assert not np.allclose(one, other, atol=0.1)

    class Seen(Block):
        def __call__(self, x, segment_pos, key=None):
            jax.debug.callback(lambda data: seen.append(tuple(np.asarray(data).tolist())), jax.random.key_data(key))
            return super().__call__(x, segment_pos, key)

    model.layers.groups["lru_0"].__class__ = Seen
    jax.block_until_ready(features(jax.random.key(0)))
    jax.effects_barrier()
    assert len(set(seen)) == len(seen) == 2


@contextlib.contextmanager
def optax_promotes():
    """optax mixes dtypes and ranks itself."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


# --- the trainer ------------------------------------------------------------------------------------------------------


def test_decay_is_for_matrices_but_those_of_the_recurrence_itself(one_device):
    for recurrence in ("tanh", "dense", "lru"):
        config = LRUConfig(**SMALL, recurrence=recurrence)
        names = named_leaves(jax.eval_shape(functools.partial(model_of, config)))
        decaying = {name.removeprefix("layers/groups/lru_0/") for name in names if decays(name)}
        assert decaying == {"recurrence/from_state/kernel", "glu/kernel"}


@pytest.mark.parametrize("recurrence", STEPS)
def test_parameters_and_operations_are_counted(recurrence, one_device):
    config = LRUConfig(vocab_size=64, width=64, depth=3, state_size=48, recurrence=recurrence)
    model = jax.eval_shape(lambda: LRUModel(config, Init(jax.random.key(0), Rules().spec)))
    leaves, count = named_leaves(model), COUNTS["lru"](config)
    assert (sum(leaf.size for leaf in leaves.values()), leaves["embedding/table"].size) == (
        count.total,
        count.embedding,
    )
    matrices = sum(leaf.size for name, leaf in leaves.items() if name.endswith(("kernel", "table", "transition")))
    assert train_flops(config, 100) == 6 * matrices


def test_a_step_type_checks_on_64_chips_that_are_not_there():
    words = "--mesh.data 2 --mesh.fsdp 4 --mesh.sequence 2 --mesh.tensor 4 --data.batch_size 64 --model.dropout 0.1"
    config = resolve("lru-tiny", words.split()).config
    mesh = abstract_mesh(config.mesh, 64)
    with jax.sharding.use_abstract_mesh(mesh), optax_promotes():
        program = make_program(config, make_task(config), mesh)
        (state, metrics) = jax.eval_shape(program.step, program.state, program.batch, None)
    assert jax.tree.map(lambda a, b: a.shape == b.shape, state, program.state)
    assert metrics["loss"].shape == ()


def test_it_learns_to_copy(one_device):
    data = RecallData(sequence_length=12, num_copied=2, num_symbols=6, batch_size=32)
    config = Config(name="copy", model=LRUConfig(vocab_size=6, width=32, depth=2, state_size=32), data=data)
    task, rows = make_task(config), open_data(data)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(model, moments, batch):
        gradient, metrics = jax.grad(task.loss, has_aux=True)(model, batch, jax.random.key(0))
        updates, moments = optimizer.update(gradient, moments)
        return optax.apply_updates(model, updates), moments, metrics["loss"]

    with optax_promotes():
        model = jax.jit(lambda: task.init(jax.random.key(0), Rules().spec))()
        moments, losses = optimizer.init(model), []
        for n in range(150):
            model, moments, loss = step(model, moments, rows.train_batch(n))
            losses.append(float(loss))
    assert losses[0] > 1.3
    assert np.mean(losses[-10:]) < 0.7  # 1.39 is to know that noise and the marker are no answers


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--model.r_min 0.9 --model.r_max 0.9", r"r_min=0\.9 is not below model\.r_max=0\.9: the ring has no area"),
        ("--model.num_classes 3", r"num_classes=3 contradicts model\.pooling='none': tokens have 0 classes"),
        ("--model.pooling mean", r"num_classes=0 contradicts model\.pooling='mean': a sequence has 2 or more"),
        ("--model.pooling last --model.num_classes 2", r"pooling='last' contradicts data\.kind='text', whose labels"),
        ("--model.bidirectional true", r"bidirectional=True contradicts model\.pooling='none': a token would see"),
        ("--model.channels 3", r"channels=3 contradicts model\.pooling='none': numbers are no vocabulary, 'mean' or"),
        ("--model.rate_factor 0", r"rate_factor=0\.0 is out of range"),
        (
            "--model.recurrence gru",
            r"recurrence='gru' is not one of tanh, relu, dense, diagonal, exponential, ring, lru",
        ),
        ("--model.recurrence tanh --mesh.sequence 2", r"mesh\.sequence=2 contradicts model\.recurrence='tanh'"),
        ("--model.recurrence dense --mesh.sequence 2", r"mesh\.sequence=2 contradicts model\.recurrence='dense'"),
    ],
)
def test_a_mistake_is_one_sentence(words, sentence):
    with pytest.raises(ConfigError, match=sentence):
        resolve("lru-tiny", words.split())


def test_lru_tiny_is_a_config():
    config = EXPERIMENTS["lru-tiny"]()
    assert (config.name, config.model, config.notes()) == ("lru-tiny", LRUConfig(), [])
