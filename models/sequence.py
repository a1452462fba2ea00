"""What devices that share a sequence, or an image's rows, tell one another. For one device's arrays, inside `jax.shard_map`.

`axis` is the mesh axis (or axes) that divides time or rows, as `spec("seq")` gives it; None where sequences are whole.
"""

import jax
import jax.numpy as jnp
from jax import lax

Axis = str | tuple[str, ...] | None


def left_halo(x: jax.Array, width: int, axis: Axis) -> jax.Array:
    """The `width` entries (B width ...) of x (B T ...) that lie before this device's own; zeros before the sequence."""
    length, devices = x.shape[1], 1 if axis is None else lax.axis_size(axis)
    parts: list[jax.Array] = []
    for distance in range(1, devices):
        taken = min(width, length)
        if taken:
            pairs = [(i, i + distance) for i in range(devices - distance)]  # who is sent nothing gets zeros
            parts.insert(0, lax.ppermute(x[:, length - taken :], axis, pairs))
        width -= taken
    return jnp.concatenate([jnp.zeros((x.shape[0], width, *x.shape[2:]), x.dtype), *parts], axis=1)


def right_halo(x: jax.Array, width: int, axis: Axis) -> jax.Array:
    """The `width` entries (B width ...) of x (B T ...) that lie behind this device's own, on its neighbour; zeros behind the
    end. No more than a device has."""
    if axis is None or not width:
        return jnp.zeros((x.shape[0], width, *x.shape[2:]), x.dtype)
    return lax.ppermute(x[:, :width], axis, [(i + 1, i) for i in range(lax.axis_size(axis) - 1)])


def through_here(x: jax.Array, axis: Axis) -> jax.Array:
    """Of x (B T ...) on `axis` devices, all that lies before this device's part and that part; zeros before the sequence.

    As long as the whole sequence on every device, so that the part is the end of all of them.
    """
    length = x.shape[1]
    whole = lax.all_gather(x, axis, axis=1, tiled=True)
    none = jnp.zeros((x.shape[0], whole.shape[1] - length, *x.shape[2:]), x.dtype)
    start = (lax.axis_index(axis) * length, whole.shape[1])
    return lax.dynamic_slice_in_dim(jnp.concatenate([none, whole], axis=1), *start, axis=1)


def first_index(length: int, axis: Axis) -> jax.Array | int:
    """Place in the sequence of the first of this device's `length` tokens."""
    return 0 if axis is None else lax.axis_index(axis) * length


def carried_in(decay: jax.Array, end: jax.Array, axis: Axis, *, reverse: bool = False) -> jax.Array:
    """The state (B L) with which the recurrence reaches this device's tokens, from its left or in reverse its right.

    A device's tokens take a state h to decay * h + end, both (B L) in float32: these two are all that is exchanged.
    """
    decays, ends = lax.all_gather((decay, end), axis)

    def over(state, summary):
        return summary[0] * state + summary[1], state

    _, before = lax.scan(over, jnp.zeros_like(end), (decays, ends), reverse=reverse)
    return lax.dynamic_index_in_dim(before, lax.axis_index(axis), keepdims=False)
