"""A product with a matrix that is kept in parts: gathered where it is used, its gradient summed and divided again.

Left to XLA, the sum of a gradient over the devices that share a matrix is an all-reduce of the whole and a slice of it. Here
it is one reduce-scatter an axis of the mesh, half the bytes, and each on a ring of the chips' network (sharding/mesh.py).
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec, reshard

from models.params import Spec, axes_of, mesh_axes


@dataclass(frozen=True)
class Projection:
    """x (B T in) times a kernel (in out); `inner` and `outer` are the kernel's logical axes as it is multiplied."""

    spec: Spec
    inner: tuple[str | None, ...]
    outer: tuple[str | None, ...]

    @property
    def names(self) -> tuple[str, str]:
        return "xyz"[: len(self.inner)], "uvw"[: len(self.outer)]

    def whole(self, kernel: jax.Array) -> jax.Array:
        return reshard(kernel, self.spec(*self.inner, *self.outer))

    def product(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        (ins, outs), out = self.names, self.spec("batch", "seq", *self.outer)
        return jnp.einsum(f"bt{ins},{ins}{outs}->bt{outs}", x, self.whole(kernel), out_sharding=out)

    def back(self, dy: jax.Array, kernel: jax.Array) -> jax.Array:
        (ins, outs), out = self.names, self.spec("batch", "seq", *self.inner)
        return jnp.einsum(f"bt{outs},{ins}{outs}->bt{ins}", dy, self.whole(kernel), out_sharding=out)

    def gradient(self, x: jax.Array, dy: jax.Array, stored: PartitionSpec) -> jax.Array:
        """Of the kernel, divided as `stored`."""
        ins, outs = self.names
        summed = mesh_axes(self.spec, "batch", "seq")
        scattered: dict[int, tuple[str, ...]] = {}
        divided = []
        for place, (entry, own) in enumerate(zip(stored, self.spec(*self.inner, *self.outer), strict=True)):
            here = tuple(axis for axis in axes_of(entry) if axis in summed)
            scattered |= {place: here} if here else {}
            divided.append((*axes_of(own), *here) or None)

        def one(x, dy):
            d = jnp.einsum(f"bt{ins},bt{outs}->{ins}{outs}", x, dy)
            for place, axes in scattered.items():
                d = sum_scattered(d, axes, place)
            rest = tuple(axis for axis in summed if axis not in itertools.chain(*scattered.values()))
            return lax.psum(d, rest) if rest else d

        specs = self.spec("batch", "seq", *self.inner), self.spec("batch", "seq", *self.outer)
        add = jax.shard_map(one, in_specs=specs, out_specs=PartitionSpec(*divided), check_vma=False)
        return reshard(add(*(reshard(a, s) for a, s in zip((x, dy), specs, strict=True))), stored)


def sum_scattered(x: jax.Array, axes: Sequence[str | tuple[str, ...]], dimension: int) -> jax.Array:
    """One device's part along `dimension` of the sum of x over the devices of these mesh axes, one axis after another.

    That dimension first, and none of size 1: otherwise XLA:TPU reduces everything.
    """
    x = jnp.moveaxis(x, dimension, 0)
    others = x.shape[1:]
    x = x.reshape(x.shape[0], *(size for size in others if size > 1))
    for axis in axes:
        x = lax.psum_scatter(x, axis, scatter_dimension=0, tiled=True)
    return jnp.moveaxis(x.reshape(-1, *others), 0, dimension)


def project(how: Projection, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x (B T in) times the kernel (in out), in x's dtype; what is kept for the gradient is x and the kernel in parts."""
    if not mesh_axes(how.spec, "embed"):
        return how.product(x, kernel)  # of which XLA knows the gradient, and on one device fuses it better
    return _project(how, x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _project(how: Projection, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return how.product(x, kernel)


def _forward(how, x, kernel):
    return how.product(x, kernel), (x, kernel)


def _backward(how, kept, dy):
    x, kernel = kept
    return how.back(dy, kernel), how.gradient(x, dy, jax.typeof(kernel).sharding.spec)


_project.defvjp(_forward, _backward)
