"""A run's state as it is named on disk, and as shapes on a mesh."""

from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from models.params import path_name


def concrete(abstract: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Shapes with shardings on the abstract mesh of the same axes -> the same on these devices (or on none)."""

    def place(leaf):
        spec = leaf.sharding.spec if leaf.sharding is not None else PartitionSpec()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, abstract)


def to_tree(state: Any) -> dict:
    """Nested dicts by our names (model/layers/groups/rec_0/...), for any pytree of a run."""
    tree: dict = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        *folders, last = path_name(path).split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = leaf
    return tree


def from_tree(like: Any, tree: dict) -> Any:
    """The inverse of `to_tree`: the structure of `like` with the leaves of `tree`."""
    paths, structure = jax.tree_util.tree_flatten_with_path(like)
    leaves = []
    for path, _ in paths:
        node = tree
        for part in path_name(path).split("/"):
            node = node[part]
        leaves.append(node)
    return jax.tree.unflatten(structure, leaves)
