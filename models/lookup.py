"""Rows of an embedding table by token, with a gradient that is summed in float32.

A device has a part of each row (axis `embed`) of its part of the table (axis `vocab`). What travels are tokens there and
their rows back, never the table: of 4,096 tokens a device, a sixtieth of a table of 256,000 rows, and no device has a whole
table or a whole gradient of one in its memory.
"""

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
    embed, vocab = mesh_axes(spec, "embed"), mesh_axes(spec, "vocab")

    def take(table, tokens):  # one device's
        place = places(table, of_all(tokens, embed), vocab)
        rows = table.at[place].get(mode="fill", fill_value=0).astype(dtype)
        if vocab:  # one device has the row, the others 0
            rows = lax.psum(rows, vocab)
        return lax.all_to_all(rows, embed, split_axis=0, concat_axis=2, tiled=True) if embed else rows

    return on_each_device(spec, take, ("rows", "token"), "wide")(table, tokens)


def _forward(spec, dtype, table, tokens):
    return lookup(spec, dtype, table, tokens), (table, tokens)


def _backward(spec, dtype, kept, gradient):
    table, tokens = kept
    embed, vocab = mesh_axes(spec, "embed"), mesh_axes(spec, "vocab")
    others = tuple(axis for axis in mesh_axes(spec, "batch", "seq") if axis not in embed)

    def add(table, tokens, gradient):  # one device's
        if embed:
            gradient = lax.all_to_all(gradient, embed, split_axis=2, concat_axis=0, tiled=True)
        place = places(table, of_all(tokens, embed), vocab)
        rows = jnp.zeros(table.shape, jnp.float32).at[place].add(gradient.astype(jnp.float32), mode="drop")
        return lax.psum(rows, others) if others else rows

    add = on_each_device(spec, add, ("rows", "token", "wide"), "rows")
    return add(table, tokens, gradient).astype(table.dtype), None


lookup.defvjp(_forward, _backward)


def of_all(tokens: jax.Array, embed: tuple[str, ...]) -> jax.Array:
    """The tokens of all devices that have parts of the same rows."""
    return lax.all_gather(tokens, embed, axis=0, tiled=True) if embed else tokens


def places(table: jax.Array, tokens: jax.Array, vocab: tuple[str, ...]) -> jax.Array:
    """Where in one device's part of the table the tokens' rows are, past its end for what another has."""
    own = table.shape[0]
    place = tokens - (lax.axis_index(vocab) * own if vocab else 0)
    return jnp.where(place < 0, own, place)  # a negative index would count from the end


def on_each_device(spec: Spec, function, given: tuple[str, ...], result: str):
    specs = {"rows": spec("vocab", "embed"), "token": spec("batch", "seq"), "wide": spec("batch", "seq", None)}
    shares = tuple(specs[name] for name in given)
    whole = jax.shard_map(function, in_specs=shares, out_specs=specs[result], check_vma=False)
    return lambda *arrays: whole(*map(reshard, arrays, shares))
