"""What a language model remembers between calls: a state of one size, however many tokens have gone before.

It is passed in and returned, never kept by a module. All layers are written to at the end of a call, in one place.
Shapes: B batch, T tokens of this call, L recurrence width, W window, K key-value heads, H head features.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import register_dataclass

from configs.schema import GriffinConfig
from models.params import Spec

EMPTY = -1  # the document of a slot that holds no token yet; real ones count from 0


@register_dataclass
@dataclass(frozen=True)
class RecurrenceState:
    conv: jax.Array  # (B, taps - 1, L): the convolution's latest inputs, in the activations' dtype
    h: jax.Array  # (B L) float32


@register_dataclass
@dataclass(frozen=True)
class KeyValues:
    """Of an attention layer: a ring of the W latest tokens in a state, or the T tokens of a call. Keys are rotated."""

    keys: jax.Array  # (B W K H)
    values: jax.Array  # (B W K H)


@register_dataclass
@dataclass(frozen=True)
class State:
    """Token number i, counted from the state's beginning and over padding, too, is in slot i mod W of every ring."""

    layers: Any  # as the Stack: groups and tail by name, stacked groups with a leading axis of layers
    index: jax.Array  # (): tokens so far
    document: jax.Array  # (B): documents started so far
    slots: jax.Array  # (B W): number of the document that each slot's token belongs to


def init_state(config: GriffinConfig, batch: int, dtype: jnp.dtype, spec: Spec) -> State:
    """The state before the first token, for activations in `dtype`, divided over the mesh like them."""
    head = config.width // config.num_heads

    def zeros(shape, dtype, axes, num_layers):
        if num_layers is not None:
            shape, axes = (num_layers, *shape), ("layers", *axes)
        return jnp.zeros(shape, dtype, out_sharding=spec(*axes))

    def layer(kind: str, num_layers: int | None):
        if kind == "rec":
            return RecurrenceState(
                zeros((batch, config.conv_width - 1, config.rnn_width), dtype, ("batch", None, "rnn"), num_layers),
                zeros((batch, config.rnn_width), jnp.float32, ("batch", "rnn"), num_layers),
            )
        # Two arrays, since a donated buffer can be given away only once.
        shape, axes = (batch, config.window, 1, head), ("batch", None, "kv_heads", None)
        return KeyValues(zeros(shape, dtype, axes, num_layers), zeros(shape, dtype, axes, num_layers))

    num_groups, rest = divmod(config.depth, len(config.pattern))
    names = [(f"{kind}_{place}", kind) for place, kind in enumerate(config.pattern)]
    return State(
        layers={
            "groups": {name: layer(kind, num_groups) for name, kind in names if num_groups},
            "tail": {name: layer(kind, None) for name, kind in names[:rest]},
        },
        index=jnp.zeros((), jnp.int32, out_sharding=spec()),
        document=jnp.zeros((batch,), jnp.int32, out_sharding=spec("batch")),
        slots=jnp.full((batch, config.window), EMPTY, jnp.int32, out_sharding=spec("batch", None)),
    )


def visible(state: State, segment_pos: jax.Array, left: int) -> tuple[jax.Array, jax.Array]:
    """Documents (B T) of the tokens of a call, and which keys each sees (B T W+T): the ring's slots, then the call's.

    The rule is `attention_mask`'s: keys of its document, not after it and at most `left` tokens before it.
    """
    documents = state.document[:, None] + jnp.cumsum(segment_pos == 0, axis=1)
    now = state.index + jnp.arange(segment_pos.shape[1], dtype=jnp.int32)
    keys = jnp.concatenate([held(state.index, state.slots.shape[1]), now])
    distance = now[:, None] - keys[None, :]
    near = (distance >= 0) & (distance <= left)
    of_keys = jnp.concatenate([state.slots, documents], axis=1)
    return documents, (documents[:, :, None] == of_keys[:, None, :]) & near[None]


def held(index: jax.Array, window: int) -> jax.Array:
    """(W): number of the token in each slot of a ring after `index` tokens; negative in slots not written yet."""
    return index - 1 - (index - 1 - jnp.arange(window, dtype=jnp.int32)) % window


def write(ring: jax.Array, new: jax.Array, index: jax.Array, axis: int) -> jax.Array:
    """The ring with `new` (of T along `axis`, the ring of W) in place of its oldest entries, from token `index` on."""
    window, length = ring.shape[axis], new.shape[axis]
    if length == 1:  # decoding: one slot is overwritten in place
        return lax.dynamic_update_slice_in_dim(ring, new, index % window, axis)
    source = held(index + length, window) - index  # which new entry a slot gets; negative: it keeps its own
    place, sharding = (slice(None),) * axis, jax.typeof(ring).sharding
    taken = new.at[(*place, jnp.maximum(source, 0))].get(out_sharding=sharding)
    return jnp.where(lax.broadcast_in_dim(source >= 0, ring.shape, (axis,), out_sharding=sharding), taken, ring)


def advance(state: State, layers: Any, documents: jax.Array) -> State:
    """The state after a call. `layers` holds each recurrence's new state and each attention's keys and values (B T K H)."""

    def put(old, new):
        if isinstance(old, RecurrenceState):
            return new
        axis = old.keys.ndim - 3
        return KeyValues(*(write(o, n, state.index, axis) for o, n in ((old.keys, new.keys), (old.values, new.values))))

    return State(
        layers=jax.tree.map(put, state.layers, layers, is_leaf=lambda n: isinstance(n, RecurrenceState | KeyValues)),
        index=state.index + documents.shape[1],
        document=documents[:, -1],
        slots=write(state.slots, documents, state.index, axis=1),
    )


def state_bytes(state: State) -> int:
    """Bytes a sequence."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state) if leaf.ndim) // state.document.size


def transformer_bytes(config: GriffinConfig, length: int, dtype: jnp.dtype) -> int:
    """Keys and values of `length` tokens in a Transformer of this depth and these heads, sharing one key-value head."""
    return config.depth * 2 * (config.width // config.num_heads) * length * jnp.dtype(dtype).itemsize
