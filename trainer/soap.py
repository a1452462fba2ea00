"""SOAP (Vyas et al. 2024, arXiv 2409.11321): Adam in the eigenbasis of Shampoo's statistics."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from trainer.matrices import PRECISE, Sides, as_matrices, average_outer, between, map_named, new_sides, wherever


class SoapState(NamedTuple):
    step: jax.Array  # updates done
    mu: Any
    nu: Any  # of rotated gradients
    statistics: Any  # in each parameter's place its Sides
    bases: Any  # their eigenvectors, in columns


def scale_by_soap(beta1: float, beta2: float, eps: float, every: int, limit: int) -> optax.GradientTransformation:
    """The paper's algorithm 3. A side longer than `limit` is not rotated; without any, the update is Adam's.

    Bases follow the statistics every `every` updates by one step of power iteration. As in the released code the first
    gradient only finds them (else each would be diagonal in its own basis, and what rounding leaves beside it as long as it).
    """

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        sides = map_named(lambda name, leaf: new_sides(name, leaf, limit), params)
        return SoapState(
            jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.copy, zeros), sides, jax.tree.map(jnp.copy, sides)
        )

    def update(updates, state, params=None):
        first = state.step == 0

        def rotated(name: str, x: jax.Array, bases: Sides, back: bool = False) -> jax.Array:
            return between(as_matrices(name, x), bases, transposed=not back).reshape(x.shape) if bases else x

        def moment(old: jax.Array, new: jax.Array, decay: float, bases: Sides) -> jax.Array:
            new = decay * old + (1 - decay) * new
            return jnp.where(first, old, new) if bases else new

        def step(name: str, m: jax.Array, n: jax.Array, bases: Sides) -> jax.Array:
            steps = jnp.maximum(state.step + (not bases), 1).astype(jnp.float32)
            m = rotated(name, m / (1 - beta1**steps), bases)
            adam = m / (jnp.sqrt(n / (1 - beta2**steps)) + eps)
            return rotated(name, adam, bases, back=True)

        def followed(sides: Sides, bases: Sides) -> Sides:
            return {
                side: jnp.linalg.qr(jnp.einsum("mij,mjk->mik", matrix, bases[side], precision=PRECISE))[0]
                for side, matrix in sides.items()
            }

        mu = jax.tree.map(lambda g, m, q: moment(m, g, beta1, q), updates, state.mu, state.bases)
        nu = map_named(
            lambda name, g, n, q: moment(n, jnp.square(rotated(name, g, q)), beta2, q), updates, state.nu, state.bases
        )
        found = map_named(step, mu, nu, state.bases)
        statistics = map_named(lambda name, g, s: average_outer(name, g, s, beta2), updates, state.statistics)
        bases = jax.lax.switch(
            jnp.where(first, 2, (state.step % every == 0).astype(jnp.int32)),
            [
                lambda: state.bases,
                lambda: map_named(lambda name, _, *sides: followed(*sides), updates, statistics, state.bases),
                lambda: jax.tree.map(lambda matrix: jnp.linalg.eigh(matrix)[1], statistics),
            ],
        )
        return found, SoapState(state.step + 1, mu, nu, statistics, bases)

    return wherever(optax.GradientTransformation(init, update))
