"""Update rules beyond AdamW and SGD: against optax used directly, the papers' formulas in float64, and what must hold of them; on
8 devices and after a restart they are the same."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from optax import contrib
from test_meshes import batch, small, start

from configs.optimizer import OptimizerConfig
from configs.overrides import resolve
from configs.schema import ConfigError, MeshConfig
from models.params import named_leaves
from sharding.arithmetic import MOMENTS
from sharding.mesh import make_mesh, one_device_mesh
from sharding.rules import rules_for
from trainer.checkpoint import Checkpoints
from trainer.evaluate import place_batch
from trainer.guard import saved_part
from trainer.imported import counts
from trainer.matrices import matrices
from trainer.optimizers import make_optimizer, make_schedule, power_propagated, schedule_free_average
from trainer.program import make_program
from trainer.shampoo import scale_by_shampoo
from trainer.soap import scale_by_soap
from trainer.tasks import make_task

RATE = 0.01
RULES = ("lion", "muon", "schedule-free", "shampoo", "soap")
KERNEL, HEAD, TABLE, NORM = "layers/groups/rec_0/mlp/down/kernel", "head/kernel", "embedding/table", "final_norm"
SHAPES = {KERNEL: (3, 6, 4), HEAD: (6, 5), TABLE: (7, 6), NORM: (6,)}


@pytest.fixture(autouse=True)
def optax_promotes():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def normals(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


PARAMS, GRADIENTS = normals(0), [normals(seed) for seed in range(1, 13)]


def plain(name: str, **fields) -> OptimizerConfig:
    few = dict(learning_rate=RATE, warmup_steps=0, schedule="constant", clip_norm=0.0, weight_decay=0.1)
    return OptimizerConfig(name=name, **(few | fields))


def rule_of(config: OptimizerConfig) -> optax.GradientTransformation:
    return make_optimizer(config, make_schedule(config, 100), lambda name: name.endswith("kernel"), lambda name: True)


def followed(rule, params, gradients) -> list:
    """Parameters after each update."""
    state, update, found = rule.init(params), jax.jit(rule.update), []
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        found.append(params)
    return found


def same(got, expected, tolerance: float = 1e-6) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, expected)


def only(name: str, trees: list, layer: int | None = None) -> list:
    return [tree[name] if layer is None else tree[name][layer] for tree in trees]


# --- optax's own -------------------------------------------------------------------------------------------------------------


def test_lion_is_optaxs():
    theirs = optax.lion(RATE, 0.9, 0.95, weight_decay=0.1, mask={name: name.endswith("kernel") for name in SHAPES})
    same(followed(rule_of(plain("lion")), PARAMS, GRADIENTS), followed(theirs, PARAMS, GRADIENTS))


def test_muon_is_optaxs_on_each_hidden_layers_matrix_and_adamw_elsewhere():
    ours = followed(rule_of(plain("muon")), PARAMS, GRADIENTS)
    theirs = contrib.muon(RATE, beta=0.9, weight_decay=0.1, consistent_rms=0.2)
    for layer in range(3):
        same(only(KERNEL, ours, layer), followed(theirs, PARAMS[KERNEL][layer], only(KERNEL, GRADIENTS, layer)), 1e-5)
    for name, decay in ((HEAD, 0.1), (TABLE, 0.0), (NORM, 0.0)):
        adamw = optax.adamw(RATE, 0.9, 0.95, weight_decay=decay)
        same(only(name, ours), followed(adamw, PARAMS[name], only(name, GRADIENTS)))


def test_schedule_free_is_optaxs_and_so_is_its_average():
    ours, theirs = (
        make_optimizer(config, make_schedule(config, 100), lambda name: True, lambda name: True)
        if config
        else contrib.schedule_free_adamw(RATE, 5, 0.9, 0.95, weight_decay=0.1)
        for config in (plain("schedule-free", warmup_steps=5), None)
    )
    (a, first, our), (b, second, their) = ((PARAMS, rule.init(PARAMS), jax.jit(rule.update)) for rule in (ours, theirs))
    for gradient in GRADIENTS:
        updates, first = our(gradient, first, a)
        a = optax.apply_updates(a, updates)
        updates, second = their(gradient, second, b)
        b = optax.apply_updates(b, updates)
        same(a, b)
        same(schedule_free_average(first, a), contrib.schedule_free_eval_params(second, b))
    assert abs(a[NORM] - schedule_free_average(first, a)[NORM]).max() > 1e-3


def test_schedule_free_averages_what_a_rate_has_scaled():
    """A rate of 0 moves neither parameter nor average; what does not learn is in no average."""
    config = plain("schedule-free")
    rates = {KERNEL: 0.0, HEAD: 0.5, TABLE: 1.0, NORM: 1.0}
    names = lambda name: True  # noqa: E731
    rule = make_optimizer(config, make_schedule(config, 100), names, names, lambda name: name != NORM, rates.get)
    params, state, update = PARAMS, rule.init(PARAMS), jax.jit(rule.update)
    for gradient in GRADIENTS:
        updates, state = update(gradient | {NORM: np.zeros(6, np.float32)}, state, params)
        params = optax.apply_updates(params, updates)
    average = schedule_free_average(state, params)
    same((average[KERNEL], average[NORM]), (PARAMS[KERNEL], PARAMS[NORM]))
    assert abs(average[HEAD] - PARAMS[HEAD]).max() > 1e-3


# --- Shampoo and SOAP ----------------------------------------------------------------------------------------------------------


def test_matrices_are_read_off_names():
    expected = {
        ("layers/groups/attn_1/mixer/q/kernel", (5, 32, 8, 4)): (5, 32, 32),
        ("layers/groups/attn_1/mixer/out/kernel", (5, 8, 4, 24)): (5, 32, 24),
        ("layers/tail/rec_0/mlp/up/kernel", (32, 2, 64)): (1, 32, 128),
        ("layers/groups/rec_0/mixer/a_gate/kernel", (5, 32, 4)): (40, 4, 4),
        ("stages/stage_0/block_1/spatial/kernel", (3, 3, 8, 16)): (1, 72, 16),
        ("adapters/layers/groups/attn_1/mixer/out/a", (5, 8, 4, 2)): (5, 32, 2),
        ("adapters/layers/groups/attn_1/mixer/q/b", (5, 2, 8, 4)): (5, 2, 32),
        ("embedding/table", (19, 32)): (1, 19, 32),
        ("layers/groups/rec_0/mixer/conv_taps", (5, 4, 32)): (0, 0, 0),
        ("layers/groups/rec_0/mixer/a_gate/bias", (5, 8, 4)): (0, 0, 0),
        ("final_norm", (32,)): (0, 0, 0),
    }
    assert {(name, shape): matrices(name, shape) for name, shape in expected} == expected


def shampoo64(start: np.ndarray, gradients: list[np.ndarray], every: int, sides: str = "LR") -> list[np.ndarray]:
    """One matrix: averages of G G^T and G^T G, their roots by eigendecomposition, Adam's length."""
    w, (rows, columns) = start.astype(np.float64), start.shape
    m, v, left, right, found = (
        np.zeros_like(w),
        np.zeros_like(w),
        np.zeros((rows, rows)),
        np.zeros((columns, columns)),
        [],
    )

    def root(matrix):
        values, vectors = np.linalg.eigh(matrix)
        return vectors @ np.diag((np.maximum(values, 0) + 1e-6 * values.max()) ** (-1 / (2 * len(sides)))) @ vectors.T

    for t, g in enumerate(np.asarray(gradients, np.float64), start=1):
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        left, right = 0.95 * left + 0.05 * g @ g.T, 0.95 * right + 0.05 * g.T @ g
        if (t - 1) % every == 0:
            a = root(left) if "L" in sides else np.eye(rows)
            b = root(right) if "R" in sides else np.eye(columns)
        adam = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
        step = a @ m @ b
        w = w - RATE * (step * np.linalg.norm(adam) / np.linalg.norm(step) + 0.1 * w)
        found.append(w)
    return found


def soap64(start: np.ndarray, gradients: list[np.ndarray], every: int, sides: str = "LR") -> list[np.ndarray]:
    """Algorithm 3 of the paper with one power iteration and QR, after a first gradient that only finds the bases."""
    w, (rows, columns) = start.astype(np.float64), start.shape
    m, v, a, b, found = np.zeros_like(w), np.zeros_like(w), np.eye(rows), np.eye(columns), []
    left, right = np.zeros((rows, rows)), np.zeros((columns, columns))
    for t, g in enumerate(np.asarray(gradients, np.float64)):
        if t > 0:
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * (a.T @ g @ b) ** 2
            rotated = a.T @ m @ b / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
            w = w - RATE * a @ rotated @ b.T
        w = w - RATE * 0.1 * (found[-1] if found else start)
        left, right = 0.95 * left + 0.05 * g @ g.T, 0.95 * right + 0.05 * g.T @ g
        if t == 0:
            a = np.linalg.eigh(left)[1] if "L" in sides else a
            b = np.linalg.eigh(right)[1] if "R" in sides else b
        elif t % every == 0:
            a = np.linalg.qr(left @ a)[0] if "L" in sides else a
            b = np.linalg.qr(right @ b)[0] if "R" in sides else b
        found.append(w)
    return found


@pytest.mark.parametrize(("name", "oracle"), [("shampoo", shampoo64), ("soap", soap64)])
@pytest.mark.parametrize("every", [1, 4])
def test_it_is_the_papers_in_float64(name, oracle, every):
    """6 x 4 matrices, with both sides and, above the limit, with the shorter alone; vectors take AdamW's steps."""
    # Of full rank from the first gradient on: where eigenvalues are zero, float32 finds another basis of that space.
    start, gradients = PARAMS[KERNEL][:, :4], [tree[KERNEL][:, :4] for tree in GRADIENTS]
    ours = followed(rule_of(plain(name, precondition_every=every)), {KERNEL: start}, [{KERNEL: g} for g in gradients])
    for layer in range(3):
        same(only(KERNEL, ours, layer), oracle(start[layer], [g[layer] for g in gradients], every), 2e-4)
    ours = followed(rule_of(plain(name, precondition_every=every, precondition_limit=5)), PARAMS, GRADIENTS)
    for layer in range(3):
        expected = oracle(PARAMS[KERNEL][layer], only(KERNEL, GRADIENTS, layer), every, "R")
        same(only(KERNEL, ours, layer), expected, 2e-4)
    same(only(NORM, ours), followed(optax.adamw(RATE, 0.9, 0.95, weight_decay=0), PARAMS[NORM], only(NORM, GRADIENTS)))


@pytest.mark.parametrize("name", ["shampoo", "soap"])
def test_with_no_side_within_the_limit_it_is_adamw(name):
    ours = followed(rule_of(plain(name, precondition_limit=3)), PARAMS, GRADIENTS)
    same(ours, followed(rule_of(plain("adamw")), PARAMS, GRADIENTS))


def rotation(size: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0].astype(np.float32)


def test_a_rotated_problem_has_soaps_rotated_trajectory():
    """Least squares in W and in U^T W V: SOAP's steps are the same, Adam's are not."""
    rng = np.random.default_rng(0)
    a, c, u, v = rng.normal(size=(40, 5)), rng.normal(size=(40, 5)), rotation(5, 1), rotation(5, 2)
    start = rng.normal(size=(5, 5)).astype(np.float32)

    def trajectory(rule, left, right):
        x = {"kernel": left.T @ start @ right}
        state, found = rule.init(x), []

        def loss(x, noise):
            w = left @ x["kernel"] @ right.T
            return jnp.mean(jnp.square(a @ w - c)) + jnp.sum(noise * w)

        @jax.jit
        def step(x, state, noise):
            updates, state = rule.update(jax.grad(loss)(x, noise), state, x)
            return jax.tree.map(lambda w, d: w - 0.05 * d, x, updates), state

        for seed in range(12):
            x, state = step(x, state, np.random.default_rng(seed).normal(size=(5, 5)).astype(np.float32))
            found.append(left @ x["kernel"] @ right.T)
        return np.stack(found)

    one = np.eye(5, dtype=np.float32)
    soap, adam = scale_by_soap(0.9, 0.95, 1e-8, 3, 16), optax.scale_by_adam(0.9, 0.95)
    np.testing.assert_allclose(trajectory(soap, u, v), trajectory(soap, one, one), atol=1e-4)
    assert abs(trajectory(adam, u, v) - trajectory(adam, one, one)).max() > 0.05


def directions(gradients: list[np.ndarray], limit: int = 16) -> list[np.ndarray]:
    """Shampoo's updates, all of length 1."""
    rule, found = scale_by_shampoo(0.0, 0.95, 1e-8, 1, limit), []
    state, update = rule.init({"kernel": gradients[0]}), jax.jit(rule.update)
    for gradient in gradients:
        updates, state = update({"kernel": gradient}, state)
        found.append(updates["kernel"] / jnp.linalg.norm(updates["kernel"]))
    return found


def test_shampoos_directions_rotate_with_gradients():
    """Not their lengths, which are Adam's."""
    u, v, gradients = rotation(4, 1), rotation(4, 2), [tree[KERNEL][0, :4] for tree in GRADIENTS]
    rotated = directions([u.T @ g @ v for g in gradients])
    same([u @ step @ v.T for step in rotated], directions(gradients), 1e-4)


@pytest.mark.parametrize(("columns", "expected"), [(3, 256.0), (8, 1.0)])
def test_shampoo_takes_the_root_of_a_kronecker_covariance_and_with_one_side_whitens(columns, expected):
    """G = A Z B with white Z has L ~ A^2 and R ~ B^2, so L^-1/4 G R^-1/4 = A^1/2 Z B^1/2, and L^-1/2 A Z = Z."""
    rng, limit = np.random.default_rng(0), 3
    a, b = (rotation(n, 1) @ np.diag(np.geomspace(4.0, 0.25, n)) @ rotation(n, 1).T for n in (3, columns))
    b = b if columns <= limit else np.eye(columns)
    gradients = np.stack([(a @ rng.normal(size=(3, columns)) @ b).astype(np.float32) for _ in range(4000)])
    rule = scale_by_shampoo(0.0, 0.999, 1e-8, 4000, limit)
    state = rule.init({"kernel": gradients[0]})
    state, _ = jax.lax.scan(lambda state, g: rule.update({"kernel": g}, state)[::-1], state, gradients)
    _, state = rule.update({"kernel": gradients[0]}, state)  # the second time that roots are found
    roots = {side: np.asarray(root[0], np.float64) for side, root in state.roots["kernel"].items()}
    found = roots["left"] @ gradients @ roots.get("right", np.eye(columns))
    condition = np.linalg.cond(np.cov(found.reshape(len(found), -1).T))
    assert expected / 1.5 < condition < 1.5 * expected


def test_shampoo_of_a_gradient_of_rank_one_keeps_its_direction():
    gradient = np.outer([1.0, 2.0, -1.0], [0.5, 3.0]).astype(np.float32)
    same(directions([gradient])[0], gradient / np.linalg.norm(gradient), 1e-4)


def test_shampoo_of_one_side_is_full_matrix_adagrad():
    """With averages for sums: G (G^T G)^-1/2, of a gradient of full rank the nearest matrix with orthonormal columns."""
    gradient = GRADIENTS[0][KERNEL][0]
    u, _, v = np.linalg.svd(gradient, full_matrices=False)
    same(directions([gradient], limit=4)[0], u @ v / 2, 1e-4)


def test_a_gradient_of_zeros_moves_nothing():
    zeros = jax.tree.map(np.zeros_like, PARAMS)
    for name in RULES:
        end = followed(rule_of(plain(name, weight_decay=0.0)), PARAMS, [zeros] * 3)[-1]
        same(end, PARAMS)


# --- power-propagation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [1.0, 2.0, 3.5])
def test_power_propagation_is_sgd_on_the_reparametrised_loss(alpha):
    """jax.grad finds the way through phi |phi|^(alpha - 1); momentum and decay are phi's."""
    x, y = (np.random.default_rng(seed).normal(size=(20, 6)).astype(np.float32) for seed in (1, 2))

    def loss(weights):
        return jnp.mean(jnp.square(x @ weights["kernel"] + weights["bias"] - y))

    def powered(phi):
        return phi | {"kernel": phi["kernel"] * jnp.abs(phi["kernel"]) ** (alpha - 1)}

    theta = {"kernel": PARAMS[TABLE][:6], "bias": PARAMS[NORM]}
    phi = theta | {"kernel": np.sign(theta["kernel"]) * np.abs(theta["kernel"]) ** (1 / alpha)}
    config = plain("sgd", power=alpha)
    ours, theirs = rule_of(config), rule_of(dataclasses.replace(config, power=1.0))
    if alpha == 1:
        ours = power_propagated(theirs, 1.0, lambda name: True)
    first, second = ours.init(theta), theirs.init(phi)
    for _ in range(20):
        updates, first = ours.update(jax.grad(loss)(theta), first, theta)
        theta = optax.apply_updates(theta, updates)
        updates, second = theirs.update(jax.grad(lambda phi: loss(powered(phi)))(phi), second, phi)
        phi = optax.apply_updates(phi, updates)
    same(theta, powered(phi), 1e-5)


def test_zeros_stay_zeros_only_where_power_propagation_reaches():
    params = PARAMS | {name: np.where(PARAMS[name] > 0, PARAMS[name], 0) for name in (KERNEL, TABLE)}
    end = followed(rule_of(plain("sgd", power=2.0)), params, GRADIENTS)[-1]
    assert np.array_equal(end[KERNEL] == 0, params[KERNEL] == 0)
    assert not np.any(end[TABLE] == 0)


# --- configs -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (
            "--optimizer.name schedule-free",
            "optimizer.schedule='cosine' contradicts optimizer.name='schedule-free': its average takes the place of a decay; "
            "'constant' is allowed",
        ),
        (
            "--optimizer.name schedule-free --optimizer.schedule constant --optimizer.ema 0.9",
            "optimizer.ema=0.9 contradicts optimizer.name='schedule-free': it has an average of its own; 0 is allowed",
        ),
        (
            "--optimizer.name schedule-free --optimizer.schedule constant --optimizer.beta1 0",
            "optimizer.beta1=0.0 contradicts optimizer.name='schedule-free': gradients are taken there between average and "
            "newest; a number above 0 is allowed",
        ),
        (
            "--optimizer.name schedule-free --optimizer.schedule constant --optimizer.offload true",
            "optimizer.offload=True contradicts optimizer.name='schedule-free': its average is found with every step; false "
            "is allowed",
        ),
        (
            "--optimizer.power 2",
            "optimizer.power=2.0 contradicts optimizer.name='adamw', which divides by what keeps small weights small: 1 is "
            "allowed, or optimizer.name='sgd'",
        ),
        (
            "--optimizer.precondition_every 5 --optimizer.name lion",
            "optimizer.precondition_every=5 contradicts optimizer.name='lion': only shampoo and soap have it",
        ),
    ],
)
def test_a_wrong_combination_is_one_sentence(line, sentence):
    with pytest.raises(ConfigError) as error:
        resolve("griffin-tiny", line.split())
    assert str(error.value) == sentence


def test_plans_know_every_rules_moments():
    assert tuple(MOMENTS) == dataclasses.fields(OptimizerConfig)[0].metadata["choices"]


# --- runs ------------------------------------------------------------------------------------------------------------------------


def config_of(family: str, name: str, mesh: MeshConfig):
    # With an eps beside which what rounding leaves of a gradient is nothing: Adam and SOAP would make it as long as the rest.
    fields = dict(precondition_every=2) if name in ("shampoo", "soap") else dict(power=2.0) if name == "sgd" else {}
    rate = 0.03 if name == "sgd" else 3e-3
    optimizer = plain(name, learning_rate=rate, eps=1e-3, adaptive_clip=0.1 if name == "sgd" else 0.0, **fields)
    config = small(family, mesh)
    return dataclasses.replace(config, optimizer=optimizer)


@functools.cache
def program_of(family: str, name: str, devices: int):
    config = config_of(family, name, MeshConfig(data=2, fsdp=4) if devices > 1 else MeshConfig(data=1))
    mesh = make_mesh(config.mesh) if devices > 1 else one_device_mesh()
    with jax.set_mesh(mesh):
        program = make_program(config, make_task(config), mesh)
        return config, mesh, program, program.trace().lower().compile()


def stepped(compiled, state, config, mesh, count: int):
    with jax.set_mesh(mesh):
        for _ in range(count):
            state, _ = compiled(state, place_batch(batch(config), mesh, rules_for(mesh).spec), None)
    return state


def fresh(family: str, program, mesh):
    """From parameters that all have gradients, see `start`."""
    with jax.set_mesh(mesh):
        own = named_leaves(program.state.model)
        base = {name: jax.device_put(leaf, own[name].sharding) for name, leaf in start(family).items()}
        return jax.jit(program.init, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, program.state))(base=base)


DIVIDED = {KERNEL: P(None, "fsdp", "tensor"), HEAD: P("fsdp"), TABLE: P(None, ("fsdp", "tensor")), NORM: P()}


@pytest.mark.parametrize("name", [*RULES, "adamw", "sgd"])
def test_updates_of_divided_parameters_are_those_of_whole_ones(eight_devices, name):
    shapes = {KERNEL: (3, 4, 4), HEAD: (4, 4), TABLE: (8, 4), NORM: (4,)}

    def normals(seed: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}

    few = dict(precondition_every=2, precondition_limit=4) if name in ("shampoo", "soap") else {}
    rule = rule_of(plain(name, **few, **(dict(power=2.0, adaptive_clip=0.1) if name == "sgd" else {})))
    trees = [normals(seed) for seed in range(9)]
    params, *gradients = [
        jax.device_put(t, {n: NamedSharding(eight_devices, DIVIDED[n]) for n in shapes}) for t in trees
    ]
    state = rule.init(params)
    for leaf_name, leaf in named_leaves(state).items():
        parameter = next((n for n in shapes if leaf_name.endswith(n)), None)
        if parameter:  # moments, averages, traces
            assert leaf.sharding.is_equivalent_to(params[parameter].sharding, leaf.ndim), leaf_name
        elif leaf_name.endswith(("left", "right")) and NORM not in leaf_name:
            assert leaf.sharding.shard_shape(leaf.shape)[1] < leaf.shape[1], leaf_name
    got = followed(rule, params, gradients)
    with jax.set_mesh(one_device_mesh()):
        params, *gradients = jax.device_put(trees, NamedSharding(one_device_mesh(), P()))
        same(got, followed(rule, params, gradients), 1e-5)


def from_there(state, program, mesh):
    """The state, on this program's devices."""
    with jax.set_mesh(mesh):
        return jax.device_put(jax.device_get(state), jax.tree.map(lambda leaf: leaf.sharding, program.state))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*RULES, "adamw", "sgd"])
@pytest.mark.parametrize("family", ["griffin", "nfnet"])
def test_devices_share_the_state_and_a_restart_goes_on_bit_for_bit(tmp_path, family, name):
    """Six steps on eight devices, with a checkpoint after three and without, and on one.

    Of directions that gradients have not had, Shampoo and SOAP know only what rounding left, so that on other devices they take
    other steps there. Of these the fourth step is compared, from one state and before roots and bases change.
    """
    config, mesh, program, compiled = program_of(family, name, 8)
    own = named_leaves(program.state.model)
    for leaf_name, leaf in named_leaves(program.state.opt_state).items():
        parameter = next((own[n] for n in own if leaf_name.endswith(f"/{n}")), None)
        if parameter is not None:
            assert leaf.shape == parameter.shape
            assert leaf.sharding.is_equivalent_to(parameter.sharding, leaf.ndim), leaf_name
    first = jax.device_get(fresh(family, program, mesh))
    half = stepped(compiled, from_there(first, program, mesh), config, mesh, 3)
    before, done = (jax.device_get(half), 1) if name in ("shampoo", "soap") else (first, 6)
    checkpoints = Checkpoints(tmp_path, config.checkpoint)
    checkpoints.save(3, saved_part(half), {})
    checkpoints.finish()
    whole = jax.device_get(named_leaves(stepped(compiled, half, config, mesh, 3)))
    with jax.set_mesh(mesh):
        restored, _ = checkpoints.saved.restore(3, saved_part(program.state))
    resumed = jax.device_get(named_leaves(stepped(compiled, restored, config, mesh, 3)))
    checkpoints.close()
    assert whole.keys() == resumed.keys()
    for leaf_name in whole:
        assert whole[leaf_name].tobytes() == resumed[leaf_name].tobytes(), leaf_name
    there = jax.device_get(named_leaves(stepped(compiled, from_there(before, program, mesh), config, mesh, done)))
    config, mesh, program, compiled = program_of(family, name, 1)
    alone = jax.device_get(named_leaves(stepped(compiled, from_there(before, program, mesh), config, mesh, done)))
    for leaf_name in there:
        if leaf_name.startswith(("model/", "ema/")):
            np.testing.assert_allclose(there[leaf_name], alone[leaf_name], rtol=0, atol=1e-5, err_msg=leaf_name)
    assert np.mean([abs(whole[f"model/{n}"] - leaf).max() > 1e-3 for n, leaf in start(family).items()]) > 0.5
    for leaf_name, leaf in named_leaves(before).items():
        if "/bases/" in leaf_name:
            identity = np.broadcast_to(np.eye(leaf.shape[1]), leaf.shape)
            np.testing.assert_allclose(leaf @ leaf.swapaxes(1, 2), identity, atol=1e-5, err_msg=leaf_name)
        if "/roots/" in leaf_name:  # of both sides the fourth, found in the third step
            statistic = named_leaves(before)[leaf_name.replace("/roots/", "/statistics/")].astype(np.float64)
            values, vectors = np.linalg.eigh(statistic)
            powers = (np.maximum(values, 0) + 1e-6 * values[:, -1:]) ** -0.25
            expected = (vectors * powers[:, None]) @ vectors.swapaxes(1, 2)
            assert np.linalg.norm(leaf - expected) < 0.05 * np.linalg.norm(expected), leaf_name


def test_an_imported_run_begins_as_any_other():
    """With zeros, but for the first parameters of schedule-free, and for `counts`."""
    config = config_of("nfnet", "schedule-free", MeshConfig(data=1))
    known = {name.split("/")[-1] for name in counts(config)}
    for name in RULES:
        for leaf_name, leaf in named_leaves(rule_of(plain(name)).init(PARAMS)).items():
            _, newest, parameter = leaf_name.rpartition("/z/")
            if leaf_name.split("/")[-1] not in known | {"ns_coeffs"}:
                assert np.array_equal(leaf, PARAMS[parameter] if newest else np.zeros_like(leaf)), leaf_name
