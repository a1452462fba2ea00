"""What is measured of solutions: arrays alone and curvature, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch import solutions
from trainer.sharpness import hessian_product, top_eigenvalue, trace

pytestmark = pytest.mark.usefixtures("optax_promotes")


# --- arrays alone ------------------------------------------------------------------------------------------------------------


def test_forgetting_is_counted_from_the_best_and_transfer_from_the_first():
    accuracies = np.array([[0.9, 0.1, 0.2], [0.95, 0.8, 0.2], [0.5, 0.7, 1.0]])
    assert solutions.new_accuracy(accuracies) == pytest.approx((0.9 + 0.8 + 1.0) / 3)
    assert solutions.final_accuracy(accuracies) == pytest.approx((0.5 + 0.7 + 1.0) / 3)
    assert solutions.forgetting(accuracies) == pytest.approx((0.45 + 0.1) / 2)
    assert solutions.backward_transfer(accuracies) == pytest.approx((-0.4 - 0.1) / 2)


def test_interference_is_of_the_new_tasks_gradient_with_each_before_it():
    """At 45, 90 and 180 degrees; those of tasks to come, and of old ones among themselves, do not matter."""
    other = np.array([7.0, -5])
    gradients = np.array([[other, other, other], [[1, 1], [3, 0], other], [[2, 0], [0, -1], [0, 0.5]]])
    assert solutions.interference(gradients) == pytest.approx((1 / np.sqrt(2) + 0 - 1) / 3)
    gradients[2, 0] = 0
    gradients[1, 1] *= 1e-30
    assert solutions.interference(gradients) == pytest.approx((1 / np.sqrt(2) + 0 - 1) / 3)


def with_singular_values(*values: float) -> np.ndarray:
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(size, len(values))))[0] for size in (9, 6))
    return left * np.array(values) @ right.T


def test_ranks_of_matrices_of_known_singular_values():
    assert solutions.effective_rank(with_singular_values(2, 2, 2)) == pytest.approx(3)
    assert solutions.effective_rank(with_singular_values(5)) == pytest.approx(1)
    # Shares 1/2, 1/4, 1/4: an entropy of 1.5 bits.
    assert solutions.effective_rank(with_singular_values(2, 1, 1)) == pytest.approx(2**1.5)
    assert solutions.stable_rank(with_singular_values(2, 1, 1)) == pytest.approx(6 / 4)
    assert solutions.effective_rank(np.zeros((3, 2))) == solutions.stable_rank(np.zeros((3, 2))) == 0
    # Features of mean 0 and covariance diag(4, 1, 1): (4 + 1 + 1)^2 / (16 + 1 + 1); a shift of all changes nothing.
    features = np.concatenate([np.diag([2.0, 1, 1]), -np.diag([2.0, 1, 1])])
    assert solutions.participation_ratio(features + 7) == pytest.approx(2)
    assert solutions.participation_ratio(np.ones((4, 3))) == 0


def test_cosines_of_class_means():
    """Means (1 0), (0 2) and (1 1), pairs at 90, 45 and 45 degrees."""
    features = np.array([[2.0, 0], [0, 0], [0, 2], [1, 1]])
    assert solutions.class_cosine(features, np.array([3, 3, 5, 8])) == pytest.approx(2 / 3 / np.sqrt(2))
    assert solutions.class_cosine(np.array([[1.0, 0], [0, 0]]), np.array([0, 1])) == 0
    assert solutions.dead_share(np.array([[0, 1, 0, 0], [0, 0, -1, 0]])) == 0.5


def test_sparsity_of_known_weights():
    assert solutions.hoyer(np.array([[3.0, -3], [3, 3]])) == pytest.approx(0)
    assert solutions.hoyer(np.array([0, 0, -5.0, 0])) == pytest.approx(1)
    assert solutions.hoyer(np.array([3.0, 4, 0, 0])) == pytest.approx(2 - 7 / 5)
    assert solutions.near_zero_share(np.array([-200, 1.9, -2.1, 0])) == 0.5
    weights = np.array([[0.1, -3], [2, -0.5], [1, 0]])
    np.testing.assert_array_equal(solutions.pruned(weights, 0.5), [[0, -3], [2, 0], [1, 0]])
    np.testing.assert_array_equal(solutions.pruned(weights, 1), weights)
    assert np.count_nonzero(solutions.pruned(weights, 0.01)) == 1
    # Of equal ones no more are kept than were asked for.
    assert np.count_nonzero(solutions.pruned(np.ones((4, 4)), 0.25)) == 4


# --- curvature ---------------------------------------------------------------------------------------------------------------


def symmetric(values: np.ndarray) -> np.ndarray:
    basis = np.linalg.qr(np.random.default_rng(1).normal(size=(len(values), len(values))))[0]
    return (basis * values @ basis.T).astype(np.float32)


def test_products_are_those_of_a_quadratics_hessian():
    """Of x^T H x / 2, in two leaves; away from 0, where a linear term does not matter."""
    hessian = symmetric(np.array([3.0, -1, 0.5, 2, 1]))

    def loss(tree):
        x = jnp.concatenate([tree["a"].ravel(), tree["b"]])
        return x @ hessian @ x / 2 + 3 * x[0]

    product, size = hessian_product(loss, {"a": jnp.ones((1, 2)), "b": jnp.array([1.0, -2, 0.5])})
    assert size == 5
    np.testing.assert_allclose(jax.vmap(product)(jnp.eye(5)), hessian, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "steps", "tolerance"),
    [
        (np.array([5.0, -9, 1, 2]), 4, 1e-5),  # all: exact, and the largest, not the largest in size
        (np.array([-5.0, -1, -2]), 30, 1e-5),  # no more steps than there are
        (np.repeat([4.0, 1.0], 20), 2, 1e-4),  # two different ones
        (np.repeat([-4.0, -1.0], 20), 9, 1e-4),  # a space that is used up must not add a 0
        (np.append(np.linspace(0, 1, 199), 3.0), 20, 1e-3),
    ],
)
def test_lanczos_finds_the_largest_eigenvalue(values, steps, tolerance):
    hessian = symmetric(values)
    found = top_eigenvalue(lambda v: hessian @ v, len(values), jax.random.key(0), steps)
    assert float(found) == pytest.approx(values.max(), rel=tolerance)


def test_lanczos_of_nothing_is_nothing():
    assert float(top_eigenvalue(lambda v: 0 * v, 5, jax.random.key(0), 5)) == 0
    assert float(top_eigenvalue(lambda v: -2 * v, 5, jax.random.key(0), 5)) == pytest.approx(-2)


def test_hutchinsons_estimate():
    """Exact of a diagonal; else it scatters about the trace by its known variance, neither more nor less."""
    diagonal = jnp.array([1.0, -2, 5])
    assert float(trace(lambda v: diagonal * v, 3, jax.random.key(0), 1)) == pytest.approx(4)
    hessian = symmetric(np.array([3.0, 1, 0.5, -1, 2, 7, 0, 0, 1, 4]))
    keys = jax.random.split(jax.random.key(1), 100)
    estimates = np.asarray(jax.jit(jax.vmap(lambda key: trace(lambda v: hessian @ v, 10, key, 20)))(keys))
    error = np.sqrt(2 * np.sum(np.square(hessian - np.diag(np.diag(hessian)))) / 20)
    assert abs(estimates.mean() - 17.5) < 4 * error / 10
    assert 0.75 < estimates.std() / error < 1.25
