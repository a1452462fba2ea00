"""What the mesh of a run does not divide as the rules ask, because a size is not a multiple of the number of devices.

`models.params` decides (`Init.fitted`, `storage`); here the difference is read off the shapes that came of it.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from models.params import axes_of, path_name
from sharding.mesh import field_of, sizes_of
from sharding.rules import rules_for

MIB = 2**20
# What a device computes where others should have had a part of it. The other axes are divided for storage alone.
INSTEAD = {
    "mlp": "each device computes all",
    "heads": "each device computes all",
    "rnn": "each device computes all",
    "gate_blocks": "each device gathers their inputs and computes those that its channels touch",
    "vocab": "each device computes all",
}


@dataclass
class Fallback:
    """One mesh axis that does not divide one logical axis."""

    sizes: set[int] = field(default_factory=set)
    moved: set[str] = field(default_factory=set)  # parameters of which it divides another dimension
    copied: set[str] = field(default_factory=set)  # parameters that it does not divide
    bytes: float = 0  # more on a device than if it divided those, moments included


def fallbacks(state: Any, mesh: Mesh | AbstractMesh) -> list[str]:
    """A sentence for each logical axis of parameters and mesh axis that does not divide it, from the shapes and shardings of
    a run's whole state."""
    rules = rules_for(mesh)
    found: dict[tuple[str, str], Fallback] = {}
    nodes, _ = jax.tree_util.tree_flatten_with_path(state, is_leaf=lambda node: isinstance(node, nnx.Param))
    for path, node in nodes:
        if not isinstance(node, nnx.Param) or not (leaves := jax.tree.leaves(node)):
            continue  # parameters that are not trained have no moments
        (leaf,) = leaves
        entries = [axes_of(entry) for entry in leaf.sharding.spec]
        held = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for logical, size, entry in zip(node.axes, leaf.shape, entries, strict=True):
            asked = axes_of(rules.spec(logical)[0])
            for axis in (axis for axis in asked if axis not in entry and mesh.shape[axis] > 1):
                fallback = found.setdefault((logical, field_of(axis)), Fallback())
                fallback.sizes.add(size)
                moved = any(axis in other for other in entries)
                fallback.bytes += 0 if moved else held * (1 - 1 / mesh.shape[axis])
                where, _, name = path_name(path).partition("/")
                if where == "model":  # a moment has the same name below the optimizer's
                    (fallback.moved if moved else fallback.copied).add(name.removeprefix("layers/"))
    sizes = sizes_of(mesh)
    return [sentence(logical, axis, sizes[axis], f) for (logical, axis), f in found.items()]


def sentence(logical: str, axis: str, parts: int, fallback: Fallback) -> str:
    sizes, divisor = sorted(fallback.sizes), math.gcd(parts, *fallback.sizes)
    given = f"{logical} {', '.join(map(str, sizes))} {'is not a multiple' if len(sizes) == 1 else 'are not multiples'}"
    done = [INSTEAD[logical]] if logical in INSTEAD else []
    if fallback.moved:
        done.append(f"{listed(fallback.moved)} divided along another dimension")
    if fallback.copied:
        done.append(f"{listed(fallback.copied)} copied")
    done.append(f"{fallback.bytes / MIB:,.1f} MiB more a device with moments")
    return f"{given} of {axis} {parts} ({divisor} divides {'it' if len(sizes) == 1 else 'them'}): {', '.join(done)}"


def listed(names: set[str]) -> str:
    first, *rest = sorted(names, key=lambda name: (len(name), name))
    return f"{first} and {len(rest)} more are" if rest else f"{first} is"
