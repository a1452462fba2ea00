"""Shampoo (Gupta et al. 2018, arXiv 1802.09568) as it is used at scale (Anil et al. 2020, arXiv 2002.09018)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from trainer.matrices import PRECISE, Sides, as_matrices, average_outer, between, map_named, new_sides, wherever

DAMPING = 1e-6  # of the largest eigenvalue, added to all: what float32 cannot tell from zero


class ShampooState(NamedTuple):
    step: jax.Array  # updates done
    mu: Any
    nu: Any
    statistics: Any  # in each parameter's place its Sides
    roots: Any


def scale_by_shampoo(
    beta1: float, beta2: float, eps: float, every: int, limit: int, graft: bool = True
) -> optax.GradientTransformation:
    """L^(-1/2k) M R^(-1/2k) of each matrix, as long as Adam's update (`graft`), with L and R averages of G G^T and G^T G.

    M is the average of gradients G, k the number of sides of at most `limit`, the others being left alone. Where k is 0 the
    update is Adam's. Roots are found anew every `every` updates. Without `graft` L and R are free of their zero start, as M is.
    """

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        sides = map_named(lambda name, leaf: new_sides(name, leaf, limit), params)
        return ShampooState(
            jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.copy, zeros), sides, jax.tree.map(jnp.copy, sides)
        )

    def update(updates, state, params=None):
        done = state.step + 1
        mu = jax.tree.map(lambda g, m: beta1 * m + (1 - beta1) * g, updates, state.mu)
        nu = jax.tree.map(lambda g, n: beta2 * n + (1 - beta2) * g * g, updates, state.nu)
        statistics = map_named(lambda name, g, s: average_outer(name, g, s, beta2), updates, state.statistics)
        roots = jax.lax.cond(
            state.step % every == 0,
            lambda: map_named(lambda name, _, sides: inverse_roots(sides), updates, statistics),
            lambda: state.roots,
        )
        steps = done.astype(jnp.float32)
        seen = (state.step - state.step % every + 1).astype(jnp.float32)  # gradients that the roots are of

        def step(name: str, m: jax.Array, n: jax.Array, roots: Sides) -> jax.Array:
            m = m / (1 - beta1**steps)
            adam = m / (jnp.sqrt(n / (1 - beta2**steps)) + eps)
            if not roots:
                return adam
            found = between(as_matrices(name, m), roots)
            if not graft:
                # k roots of order -1/2k of averages that are each too small by 1 - beta2^seen.
                return (found * jnp.sqrt(1 - beta2**seen)).reshape(m.shape)
            return (found * lengths(as_matrices(name, adam)) / jnp.maximum(lengths(found), TINY)).reshape(m.shape)

        return map_named(step, mu, nu, roots), ShampooState(done, mu, nu, statistics, roots)

    return wherever(optax.GradientTransformation(init, update))


TINY = 1e-30


def lengths(x: jax.Array) -> jax.Array:
    """Frobenius norms (M 1 1), of what may be too small to be squared."""
    largest = jnp.maximum(jnp.max(jnp.abs(x), axis=(1, 2), keepdims=True), TINY)
    return largest * jnp.sqrt(jnp.sum(jnp.square(x / largest), axis=(1, 2), keepdims=True))


def inverse_roots(sides: Sides) -> Sides:
    def root(matrix: jax.Array) -> jax.Array:
        values, vectors = jnp.linalg.eigh(matrix)
        values = jnp.maximum(values, 0) + DAMPING * jnp.maximum(values[:, -1:], TINY)
        powers = values ** (-0.5 / len(sides))
        return jnp.einsum("mij,mj,mkj->mik", vectors, powers, vectors, precision=PRECISE)

    return {side: root(matrix) for side, matrix in sides.items()}
