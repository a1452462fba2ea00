"""Rows of an embedding table by token, with a gradient that is summed in float32."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import reshard

from models.params import Spec, mesh_axes


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def lookup(spec: Spec, dtype: jnp.dtype, table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Rows (B T D) of the table (V D) in `dtype`, for tokens (B T).

    A common token's gradient has thousands of terms: in bfloat16, a sum stops growing after a few hundred equal ones.
    """
    rows = reshard(table.astype(dtype), spec(None, None))
    return rows.at[tokens].get(out_sharding=spec("batch", "seq", None))


def _forward(spec, dtype, table, tokens):
    return lookup(spec, dtype, table, tokens), (table, tokens)


def _backward(spec, dtype, kept, gradient):
    table, tokens = kept
    scatter, divided = mesh_axes(spec, "embed"), mesh_axes(spec, "vocab")
    others = tuple(axis for axis in mesh_axes(spec, "batch", "seq") if axis not in scatter)

    def add(table, tokens, gradient):  # one device's
        own = table.shape[0]
        place = tokens - (lax.axis_index(divided) * own if divided else 0)
        place = jnp.where(place < 0, own, place)  # a negative index would count from the end
        zeros = jnp.zeros((own, gradient.shape[-1]), jnp.float32)
        rows = zeros.at[place].add(gradient.astype(jnp.float32), mode="drop")
        if scatter:
            rows = lax.psum_scatter(rows, scatter, scatter_dimension=1, tiled=True)
        return lax.psum(rows, others) if others else rows

    rows, token, wide = spec("vocab", "embed"), spec("batch", "seq"), spec("batch", "seq", None)
    add = jax.shard_map(add, in_specs=(rows, token, wide), out_specs=rows, check_vma=False)
    return add(table, reshard(tokens, token), reshard(gradient, wide)).astype(table.dtype), None


lookup.defvjp(_forward, _backward)
