"""Parameters: shape, logical axes and initialiser on one line; initial values, shardings and restore targets follow.

A model is a `flax.nnx.Module` used as an immutable pytree: it owns parameters and calls functions over arrays.
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

Initialiser = Callable[[jax.Array, tuple[int, ...]], jax.Array]  # (key, shape) -> float32 array
Spec = Callable[..., PartitionSpec]  # logical axis names -> PartitionSpec, see sharding.rules.Rules.spec
STORED = ("embed", "gate_rows", "channels_in", "channels_out")  # divided for storage only: gathered before use


@dataclass(frozen=True)
class Fitted:
    """A Spec without the logical axes that the mesh does not divide evenly: they are whole on every device."""

    spec: Spec
    whole: tuple[tuple[str, int], ...]  # those axes and their sizes

    def __call__(self, *names: str | None) -> PartitionSpec:
        whole = dict(self.whole)
        return self.spec(*(None if name in whole else name for name in names))


def fitted(spec: Spec, **sizes: int) -> Spec:
    """The spec for logical axes of these sizes: what the current mesh does not divide evenly is whole in it."""
    whole = tuple((name, size) for name, size in sizes.items() if size % parts(spec, name))
    if not whole:
        return spec
    return Fitted(spec.spec, spec.whole + whole) if isinstance(spec, Fitted) else Fitted(spec, whole)


@dataclass(frozen=True)
class Init:
    """Makes parameters below one name. Keys fold in names, never positions, so adding a parameter moves no other."""

    key: jax.Array
    spec: Spec
    num_layers: int | None = None  # number of stacked layers, or None for a single one

    def scope(self, name: str) -> "Init":
        return replace(self, key=_fold_name(self.key, name))

    def stacked(self, num_layers: int) -> "Init":
        """Every parameter below gets a leading `layers` axis, each layer with a key of its own."""
        return replace(self, num_layers=num_layers)

    def fitted(self, **sizes: int) -> "Init":
        return replace(self, spec=fitted(self.spec, **sizes))

    def param(
        self,
        name: str,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        initialiser: Initialiser,
        draw: str | None = None,
    ) -> nnx.Param:
        """A float32 parameter of `shape`, divided over the mesh by its logical `axes` (one per dimension), see `storage`.

        Parameters of one `draw`, by default their name, start from the same random numbers.
        """
        if len(shape) != len(axes):
            raise ValueError(f"parameter {name}: shape {shape} has {len(shape)} axes, {axes} names {len(axes)}")
        key, spec = _fold_name(self.key, draw or name), storage(self.spec, shape, axes)
        if self.num_layers is None:
            value = initialiser(key, shape)
        else:
            keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(self.num_layers))
            value = jax.vmap(lambda k: initialiser(k, shape))(keys)
            axes, spec = ("layers", *axes), PartitionSpec(*self.spec("layers"), *spec)
        return nnx.Param(jax.sharding.reshard(value.astype(jnp.float32), spec), axes=axes)


def storage(spec: Spec, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> PartitionSpec:
    """How a parameter is kept. One with an axis of `STORED` is gathered before use, so that a mesh axis that does not divide
    its own dimension divides another: the largest it can. Only where there is none is the parameter whole.
    """
    if not any(axis in STORED for axis in axes):
        return spec(*axes)
    wanted = (spec.spec if isinstance(spec, Fitted) else spec)(*axes)
    sizes, rest = jax.sharding.get_abstract_mesh().shape, list(shape)
    found: list[list[str]] = [[] for _ in shape]

    def put(place: int, axis: str) -> bool:
        if fits := rest[place] % sizes.get(axis, 1) == 0:
            rest[place] //= sizes.get(axis, 1)
            found[place].append(axis)
        return fits

    asked = [(place, axis) for place, entry in enumerate(wanted) for axis in axes_of(entry)]
    for axis in [axis for place, axis in asked if not put(place, axis)]:
        any(put(place, axis) for place in sorted(range(len(shape)), key=lambda i: -rest[i]))
    return PartitionSpec(*(tuple(entry) if len(entry) > 1 else entry[0] if entry else None for entry in found))


def axes_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes in one entry of a PartitionSpec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else entry


def mesh_axes(spec: Spec, *logical: str) -> tuple[str, ...]:
    """The axes of the current mesh that divide these logical axes: those of more than one device, since XLA carries out a
    collective over one device, too, with all its copies."""
    axes = (axis for name in logical for axis in axes_of(spec(name)[0]))
    sizes = jax.sharding.get_abstract_mesh().shape
    return tuple(axis for axis in axes if sizes.get(axis, 1) > 1)


def parts(spec: Spec, name: str) -> int:
    """Into how many parts the current mesh divides the logical axis `name`."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes.get(axis, 1) for axis in mesh_axes(spec, name))


def _fold_name(key: jax.Array, name: str) -> jax.Array:
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def normal(variance: float) -> Initialiser:
    return lambda key, shape: jax.random.normal(key, shape) * variance**0.5


def truncated_normal(variance: float) -> Initialiser:
    """Normal cut at two standard deviations, widened so that the variance is as asked (0.8796 = std of the cut normal)."""
    return lambda key, shape: jax.random.truncated_normal(key, -2, 2, shape) * (variance**0.5 / 0.87962566)


def zeros(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.zeros(shape)


def ones(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.ones(shape)


def named_leaves(tree) -> dict[str, jax.Array]:
    """Arrays of a model by stable slash-joined names (`groups/rec_0/mlp/up`): no framework class, no `.value`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path_name(path): leaf for path, leaf in leaves}


def path_name(path) -> str:
    """Slash-joined name of a pytree path; nnx's own `.value` step is left out."""
    parts = []
    for step in path:
        part = getattr(step, "name", getattr(step, "key", getattr(step, "idx", None)))
        if part != "value":
            parts.append(str(part))
    return "/".join(parts)


def refilled(model, values, keep=lambda name: False):
    """The model with the arrays of another one that has the same names, but for those whose names are to be kept."""
    found = named_leaves(values)

    def fill(path, leaf):
        name = path_name(path)
        return leaf if keep(name) else found[name]

    return jax.tree_util.tree_map_with_path(fill, model)


def cast_kernels(model, dtype):
    """The model with its matrices in the compute dtype; vectors (norms, biases, recurrence) stay float32.

    Done once before the layers are scanned, so that what is gathered over the mesh is already narrow.
    """

    def cast(path, leaf):
        return leaf.astype(dtype) if path_name(path).endswith(("kernel", "table")) else leaf

    return jax.tree_util.tree_map_with_path(cast, model)
