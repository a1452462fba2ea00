"""How sharply a loss curves where its parameters are: the Hessian's largest eigenvalue and its trace, without the Hessian.

Both take a function v -> H v of vectors (P), as `hessian_product` makes one.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

ROUNDING = 1e-6  # what is left of a product, relative to it, that is nothing
Product = Callable[[jax.Array], jax.Array]  # v (P) -> H v (P)


def hessian_product(loss: Callable[[Any], jax.Array], parameters: Any) -> tuple[Product, int]:
    """v -> H v of the loss at the parameters, flattened, and how many P they are: the derivative of the gradient along v."""
    flat, unravel = ravel_pytree(parameters)

    def product(vector: jax.Array) -> jax.Array:
        return jax.jvp(jax.grad(lambda flat: loss(unravel(flat))), (flat,), (vector,))[1]

    return product, flat.size


def top_eigenvalue(product: Product, size: int, key: jax.Array, steps: int) -> jax.Array:
    """The largest (not the largest in size) eigenvalue of H, from below, by Lanczos' method with as many products as `steps`.

    Every new vector is made orthogonal to all before it, twice, as rounding would bring converged ones back. Exact where
    `steps` is at least the number of different eigenvalues.
    """
    steps = min(steps, size)

    def step(carry, number):
        basis, vector, first = carry
        basis = basis.at[number].set(vector)
        found = product(vector)
        # A vector of zeros: the space is used up. What its row then says must not exceed the answer, as the first row cannot.
        diagonal = jnp.where(jnp.any(vector != 0), vector @ found, first)
        rounding = ROUNDING * jnp.linalg.norm(found)
        for _ in range(2):
            found = found - basis.T @ (basis @ found)
        length = jnp.linalg.norm(found)
        beside = jnp.where(length > rounding, length, 0.0)
        following = jnp.where(beside > 0, found / jnp.where(beside > 0, beside, 1.0), 0.0)
        return (basis, following, jnp.where(number == 0, diagonal, first)), (diagonal, beside)

    start = jax.random.normal(key, (size,))
    carry = jnp.zeros((steps, size)), start / jnp.linalg.norm(start), jnp.float32(0)
    _, (diagonal, beside) = jax.lax.scan(step, carry, jnp.arange(steps))
    return jnp.linalg.eigvalsh(jnp.diag(diagonal) + jnp.diag(beside[:-1], 1) + jnp.diag(beside[:-1], -1))[-1]


def trace(product: Product, size: int, key: jax.Array, probes: int) -> jax.Array:
    """Hutchinson's estimate of the trace of H: the mean of v^T H v over vectors of random signs. Its variance is
    2 sum of H_ij^2 over i != j, divided by `probes`."""

    def one(key: jax.Array) -> jax.Array:
        signs = jax.random.rademacher(key, (size,), jnp.float32)
        return signs @ product(signs)

    return jnp.mean(jax.lax.map(one, jax.random.split(key, probes)))
