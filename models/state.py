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

from configs.schema import GemmaConfig, GriffinConfig, LRUConfig
from models.blocks import MASKED
from models.params import Spec

ModelConfig = GriffinConfig | GemmaConfig | LRUConfig
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
    """Token number i, counted from the state's beginning and over padding, too, is in slot i mod W of a ring of W."""

    layers: Any  # as the Stack: groups and tail by name, stacked groups with a leading axis of layers
    index: jax.Array  # (): tokens so far
    document: jax.Array  # (B): documents started so far
    slots: dict[str, jax.Array]  # by kind of attention (B W): number of the document that each slot's token belongs to


@dataclass(frozen=True)
class Ring:
    """What the attention layers of one kind remember."""

    size: int  # W
    num_heads: int  # K
    head: int  # H


def reaches(config: ModelConfig) -> dict[str, int | None]:
    """By kind of attention, how many tokens before its own a query sees; None: all."""
    if isinstance(config, LRUConfig):
        return {}
    if isinstance(config, GriffinConfig):
        found: dict[str, int | None] = {"attn": config.window}
    else:
        found = {"local": config.window - 1, "global": None}
    return {kind: left for kind, left in found.items() if kind in config.pattern}


def rings(config: ModelConfig, capacity: int) -> dict[str, Ring]:
    """By kind of attention. A window bounds what there is to remember; without one it is `capacity` tokens."""
    if isinstance(config, LRUConfig):
        return {}
    if isinstance(config, GriffinConfig):
        heads, head = 1, config.width // config.num_heads
    else:
        heads, head = config.num_kv_heads, config.head_dim
    # At least one slot, though a window of 1 needs none.
    sizes = {kind: capacity if left is None else max(min(left, capacity), 1) for kind, left in reaches(config).items()}
    return {kind: Ring(size, heads, head) for kind, size in sizes.items()}


def init_state(config: ModelConfig, batch: int, dtype: jnp.dtype, spec: Spec, capacity: int) -> State:
    """The state before the first token, for activations in `dtype`, divided over the mesh like them.

    `capacity`: tokens that will be read in all, padding included; attention without a window forgets the rest.
    """
    known = rings(config, capacity)

    def zeros(shape, dtype, axes, num_layers):
        if num_layers is not None:
            shape, axes = (num_layers, *shape), ("layers", *axes)
        return jnp.zeros(shape, dtype, out_sharding=spec(*axes))

    def layer(kind: str, num_layers: int | None):
        if isinstance(config, LRUConfig):
            kept, modes = (jnp.float32, None) if config.dense else (jnp.complex64, "rnn")
            return zeros((batch, config.state_size), kept, ("batch", modes), num_layers)
        if kind == "rec":
            assert isinstance(config, GriffinConfig)
            return RecurrenceState(
                zeros((batch, config.conv_width - 1, config.rnn_width), dtype, ("batch", None, "rnn"), num_layers),
                zeros((batch, config.rnn_width), jnp.float32, ("batch", "rnn"), num_layers),
            )
        # Two arrays, since a donated buffer can be given away only once.
        ring = known[kind]
        shape, axes = (batch, ring.size, ring.num_heads, ring.head), ("batch", None, "kv_heads", None)
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
        slots={
            kind: jnp.full((batch, ring.size), EMPTY, jnp.int32, out_sharding=spec("batch", None))
            for kind, ring in known.items()
        },
    )


def visible(state: State, segment_pos: jax.Array, config: ModelConfig) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Documents (B T) of the tokens of a call, and which keys each sees, by kind of attention (B T W+T): the ring's slots,
    then the call's.

    The rule is `self_attention`'s: keys of its document, not after it and at most `left` tokens before it.
    """
    documents = state.document[:, None] + jnp.cumsum(segment_pos == 0, axis=1)
    now = state.index + jnp.arange(segment_pos.shape[1], dtype=jnp.int32)
    masks = {}
    for kind, left in reaches(config).items():
        slots = state.slots[kind]
        keys = jnp.concatenate([held(state.index, slots.shape[1]), now])
        distance = now[:, None] - keys[None, :]
        near = (distance >= 0) if left is None else (distance >= 0) & (distance <= left)
        of_keys = jnp.concatenate([slots, documents], axis=1)
        masks[kind] = (documents[:, :, None] == of_keys[:, None, :]) & near[None]
    return documents, masks


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
        if not isinstance(old, KeyValues):
            return new
        axis = old.keys.ndim - 3
        return KeyValues(*(write(o, n, state.index, axis) for o, n in ((old.keys, new.keys), (old.values, new.values))))

    return State(
        layers=jax.tree.map(put, state.layers, layers, is_leaf=lambda n: isinstance(n, RecurrenceState | KeyValues)),
        index=state.index + documents.shape[1],
        document=documents[:, -1],
        slots={kind: write(slots, documents, state.index, axis=1) for kind, slots in state.slots.items()},
    )


def ring_attention(
    q: jax.Array, ring: KeyValues, new: KeyValues, mask: jax.Array, spec: Spec, soft_cap: float = 0.0
) -> jax.Array:
    """Softmax attention (B T N H) over the ring's keys and then a call's own, mask (B T W+T).

    The two parts are never joined, nor repeated for the query heads: that would copy the ring for every token. Query heads
    are contiguous per key-value head, and divided among devices only where they all share one.
    """
    batch, length, heads, head = q.shape
    kv_heads = ring.keys.shape[2]
    axis = "heads" if kv_heads == 1 else None
    grouped = spec("batch", "seq", None, axis, None)
    q = jnp.reshape(q, (batch, length, kv_heads, heads // kv_heads, head), out_sharding=grouped)
    parts, out = (ring, new), spec("batch", None, axis, None, None)
    products = [jnp.einsum("btkgh,bskh->bkgts", q, part.keys, out_sharding=out) for part in parts]
    scores = jnp.concatenate(products, axis=-1).astype(jnp.float32)
    if soft_cap:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, MASKED), axis=-1).astype(q.dtype)
    old, own = (
        jnp.einsum("bkgts,bskh->btkgh", w, part.values, out_sharding=grouped)
        for w, part in zip(jnp.split(weights, [ring.keys.shape[1]], axis=-1), parts, strict=True)
    )
    return jnp.reshape(old + own, (batch, length, heads, head), out_sharding=spec("batch", "seq", "heads", None))


def state_bytes(state: State) -> int:
    """Bytes a sequence."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state) if leaf.ndim) // state.document.size


def transformer_bytes(config: ModelConfig, length: int, dtype: jnp.dtype) -> int:
    """Keys and values of `length` tokens in a Transformer of this depth and these heads, all of whose layers are global."""
    ring = next(iter(rings(config, length).values()), None)
    if ring:
        heads, head = ring.num_heads, ring.head
    else:  # as Griffin's attention would have them; an LRU has no heads to go by
        heads, head = 1, config.width // getattr(config, "num_heads", 1)
    return config.depth * 2 * heads * head * length * jnp.dtype(dtype).itemsize
