"""Parameters as matrices, for optimizers that tell rows from columns. An array's name says which of its axes are inputs."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from models.params import axes_of, path_name

Sides = dict[
    str, jax.Array
]  # "left" (M I I) and "right" (M O O) of M matrices (I O); without those that are left alone
PRECISE = jax.lax.Precision.HIGHEST  # a TPU's default rounds to bfloat16


def map_named(change: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """`change(name, leaf, ...)` of every parameter; what `rest` has in a leaf's place may be a tree."""
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: change(path_name(path), *leaves), tree, *rest)


def stacked(name: str) -> int:
    """The number of leading axes that count layers."""
    return int("groups" in name.split("/"))


def inputs(name: str, ndim: int) -> int:
    """How many axes, after that of the layers, a matrix reads; 0 if the array is none: norms, biases, taps of channels."""
    rank, (*_, owner, last) = ndim - stacked(name), ("", *name.split("/"))
    if rank < 2 or last not in ("kernel", "table", "a", "b"):
        return 0
    return rank - 1 if rank == 4 or owner == "out" or last == "a" else 1  # HWIO, (N H D) and adapters (in r)


def matrices(name: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(M I O) for M matrices of I inputs and O outputs; all 0 if the array is none."""
    layers, count = stacked(name), inputs(name, len(shape))
    if not count:
        return 0, 0, 0
    if "gate/" in name:  # blocks of a diagonal, row below row
        return math.prod(shape[:-1]) // shape[-1], shape[-1], shape[-1]
    split = layers + count
    return math.prod(shape[:layers]), math.prod(shape[layers:split]), math.prod(shape[split:])


def new_sides(name: str, parameter: jax.Array, limit: int) -> Sides:
    """Zeros for each side of at most `limit`. Their rows are divided by the mesh axes that divide the parameter."""
    count, rows, columns = matrices(name, parameter.shape)
    found = {side: size for side, size in (("left", rows), ("right", columns)) if 0 < size <= limit}
    return {side: zeros_divided_as(parameter, (count, size, size)) for side, size in found.items()}


def zeros_divided_as(parameter: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    sizes, rest, axes = jax.sharding.get_abstract_mesh().shape, shape[1], []
    for axis in [axis for entry in jax.typeof(parameter).sharding.spec for axis in axes_of(entry)]:
        if rest % sizes[axis] == 0:
            rest //= sizes[axis]
            axes.append(axis)
    return jnp.zeros(shape, out_sharding=PartitionSpec(None, tuple(axes), None) if axes else None)


def as_matrices(name: str, x: jax.Array) -> jax.Array:
    return x.reshape(matrices(name, x.shape))


def outer(x: jax.Array, side: str) -> jax.Array:
    """x x^T (left) or x^T x (right) of each matrix (M I O)."""
    return jnp.einsum("mik,mjk->mij" if side == "left" else "mki,mkj->mij", x, x, precision=PRECISE)


def average_outer(name: str, gradient: jax.Array, sides: Sides, decay: float) -> Sides:
    """The statistics of Shampoo with this gradient."""
    if not sides:
        return sides
    x = as_matrices(name, gradient)
    return {side: decay * old + (1 - decay) * outer(x, side) for side, old in sides.items()}


def between(x: jax.Array, sides: Sides, transposed: bool = False) -> jax.Array:
    """left x right^T of each matrix, or left^T x right."""
    for side, (plain, other) in {
        "left": ("mij,mjk->mik", "mji,mjk->mik"),
        "right": ("mkj,mij->mki", "mki,mij->mkj"),
    }.items():
        if side in sides:
            equation = other if transposed else plain
            x = jnp.einsum(equation, *((sides[side], x) if side == "left" else (x, sides[side])), precision=PRECISE)
    return x


def wherever(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """The rule, in which XLA chooses where products lie: Explicit axes refuse those over a dimension that is divided, and
    merging it with others. Updates end up where gradients are, and the state where it was."""

    def update(updates, state, params=None):
        shardings = jax.tree.map(lambda leaf: jax.typeof(leaf).sharding, (updates, state))
        return jax.sharding.auto_axes(rule.update, out_sharding=shardings)(updates, state, params)

    return optax.GradientTransformation(rule.init, update)
