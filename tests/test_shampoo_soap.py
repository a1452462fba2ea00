"""Shampoo and SOAP: the papers' formulas in float64, and what must hold of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from update_rules import (
    GRADIENTS,
    KERNEL,
    NORM,
    PARAMS,
    RATE,
    followed,
    only,
    plain,
    rule_of,
    same,
)

from trainer.matrices import matrices
from trainer.shampoo import scale_by_shampoo
from trainer.soap import scale_by_soap

pytestmark = pytest.mark.usefixtures("optax_promotes")


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


def shampoo64(
    start: np.ndarray, gradients: list[np.ndarray], every: int, sides: str = "LR", graft: bool = True
) -> list[np.ndarray]:
    """One matrix: averages of G G^T and G^T G, their roots by eigendecomposition, Adam's length or the step's own."""
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
            a = root(left / (1 - 0.95**t)) if "L" in sides else np.eye(rows)
            b = root(right / (1 - 0.95**t)) if "R" in sides else np.eye(columns)
        adam = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
        step = a @ m @ b / (1 - 0.9**t)
        w = w - RATE * (step * (np.linalg.norm(adam) / np.linalg.norm(step) if graft else 1) + 0.1 * w)
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


@pytest.mark.parametrize(
    ("name", "fields", "oracle"),
    [
        ("shampoo", {}, shampoo64),
        ("shampoo", {"graft": False}, functools.partial(shampoo64, graft=False)),
        ("soap", {}, soap64),
    ],
)
@pytest.mark.parametrize("every", [1, 4])
def test_it_is_the_papers_in_float64(name, fields, oracle, every):
    """6 x 4 matrices, with both sides and, above the limit, with the shorter alone; vectors take AdamW's steps."""
    # Of full rank from the first gradient on: where eigenvalues are zero, float32 finds another basis of that space.
    start, gradients = PARAMS[KERNEL][:, :4], [tree[KERNEL][:, :4] for tree in GRADIENTS]
    rule = rule_of(plain(name, precondition_every=every, **fields))
    ours = followed(rule, {KERNEL: start}, [{KERNEL: g} for g in gradients])
    for layer in range(3):
        same(only(KERNEL, ours, layer), oracle(start[layer], [g[layer] for g in gradients], every), 2e-4)
    ours = followed(rule_of(plain(name, precondition_every=every, precondition_limit=5, **fields)), PARAMS, GRADIENTS)
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


@pytest.mark.parametrize("limit", [16, 4])
def test_without_grafting_a_gradient_that_stays_gives_orthogonal_steps_of_one_length(limit):
    """(G G^T)^-1/4 G (G^T G)^-1/4 = G (G^T G)^-1/2 = U V^T, however long G is and however often it was seen."""
    gradient = 300 * GRADIENTS[0][KERNEL][0]
    u, _, v = np.linalg.svd(gradient, full_matrices=False)
    rule = scale_by_shampoo(0.9, 0.95, 1e-8, 3, limit, graft=False)
    state, update = rule.init({"kernel": gradient}), jax.jit(rule.update)
    for _ in range(7):
        updates, state = update({"kernel": gradient}, state)
        same(updates["kernel"], u @ v, 2e-4)
