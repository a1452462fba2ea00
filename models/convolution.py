"""Convolutions and dense layers of images, of which every device computes its own part with the whole kernel.

Shapes: B images, H height, W width, C channels (I in, O out), K kernel side.
"""

import functools
import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from models.params import axes_of
from models.projection import sum_scattered
from models.sequence import left_halo, right_halo

Padding = tuple[tuple[int, int], ...]  # of rows and columns, before and after
NUMBERS = ("NHWC", "HWIO", "NHWC")


def conv(x: jax.Array, kernel: jax.Array, bias: jax.Array, stride: int = 1, groups: int = 1) -> jax.Array:
    """BHWI, KKIO, O -> BHWO in x's dtype. SAME as in TensorFlow: a stride of 2 on an even side pads (0, 1), not (1, 1).

    Each device convolves its own images, or its own rows of images that it shares, to which its neighbours add those that
    the kernel reaches. Left to partition a grouped convolution, XLA gathers the whole batch on every device
    (openxla/xla#47945) and, with jax 0.10.2, multiplies the kernel's gradient by the size of a mesh axis that divides
    nothing.
    """
    rows = spec_of(x)[1]  # the mesh axis that divides an image's rows; None where images are whole
    side, strides = kernel.shape[0], (stride, stride)

    def local(x, kernel, bias):
        padding = lax.padtype_to_pads(x.shape[1:3], (side, side), strides, "SAME")
        if rows:  # the stride divides a device's rows, so each is padded as the whole is: with zeros at the ends
            (above, below), padding = padding[0], [(0, 0), padding[1]]
            x = jnp.concatenate([left_halo(x, above, rows), x, right_halo(x, below, rows)], axis=1)
        return (
            convolve(stride, tuple((before, after) for before, after in padding), groups, x, kernel)
            + bias[None, None, None, :]
        )

    return with_whole(local, x, kernel, bias, dtype=x.dtype)


def dense(x: jax.Array, kernel: jax.Array, bias: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """BI, IO, O -> BO in float32; the kernel is rounded to `dtype` where it is gathered."""

    def local(x, kernel, bias):
        return x @ kernel.astype(x.dtype) + bias.astype(x.dtype)[None, :]

    return with_whole(local, x, kernel, bias, dtype=dtype)


# --- weights that are kept in parts -----------------------------------------------------------------------------------


def with_whole(local: Callable, x: jax.Array, *weights: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`local(x, *weights)` of every device's own part of x (B ...) with the whole weights in `dtype`."""
    images = spec_of(x)
    devices = axes_in(images)
    # A weight of which devices with the same part of x keep different parts is gathered before.
    weights = tuple(
        w if set(axes_in(spec_of(w))) <= set(devices) else jax.sharding.reshard(w, PartitionSpec()) for w in weights
    )
    stored = tuple(map(spec_of, weights))

    def one(x, *parts):
        return local(x, *(whole(spec, devices, dtype, w) for spec, w in zip(stored, parts, strict=True)))

    return jax.shard_map(one, in_specs=(images, *stored), out_specs=images)(x, *weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def whole(stored: PartitionSpec, devices: tuple[str, ...], dtype: jnp.dtype, w: jax.Array) -> jax.Array:
    """The array of which this device keeps w, divided as `stored`, for use on all `devices`; inside `jax.shard_map`.

    It travels in `dtype`, and its gradient is summed over the devices in float32. Both go over all axes at once: a pod's
    compiler makes that an all-reduce of twice the bytes, but on the links of all axes of the torus; axis after axis each
    would wait for two of them.
    """
    w = w.astype(dtype)
    for dimension, entry in enumerate(stored):
        if axes := several(axes_of(entry)):
            w = lax.all_gather(w, axes, axis=dimension, tiled=True)
    return lax.pcast(w, sharing(stored, devices), to="varying")


def _whole_forward(stored, devices, dtype, w):
    return whole(stored, devices, dtype, w), None


def _whole_backward(stored, devices, dtype, _, gradient):
    gradient = gradient.astype(jnp.float32)
    for dimension, entry in enumerate(stored):
        if axes := several(axes_of(entry)):
            gradient = sum_scattered(gradient, (axes,), dimension)
    return (lax.psum(gradient, sharing(stored, devices)),)


whole.defvjp(_whole_forward, _whole_backward)


def sharing(stored: PartitionSpec, devices: tuple[str, ...]) -> tuple[str, ...]:
    """The mesh axes along which all devices keep the same part."""
    return tuple(axis for axis in devices if axis not in axes_in(stored))


def axes_in(spec: PartitionSpec) -> tuple[str, ...]:
    return tuple(itertools.chain(*map(axes_of, spec)))


def spec_of(x: jax.Array) -> PartitionSpec:
    return jax.typeof(x).sharding.spec


def several(axes: tuple[str, ...]) -> tuple[str, ...]:
    """Those of more than one device."""
    return tuple(axis for axis in axes if lax.axis_size(axis) > 1)


def for_stride(x: jax.Array, stride: int) -> jax.Array:
    """x (BHWC) such that every device's rows are a multiple of the stride. Where devices that share an image have others, from
    here on each takes whole images: its own part of them, or, if there are too few, all of them."""
    batch, rows, *_ = spec_of(x)
    mesh = jax.sharding.get_abstract_mesh()
    sharing = math.prod(mesh.shape[axis] for axis in axes_of(rows))
    if x.shape[1] % (sharing * stride) == 0 or not rows:
        return x
    everyone = axes_of(batch) + axes_of(rows)
    enough = x.shape[0] % math.prod(mesh.shape[axis] for axis in everyone) == 0
    return jax.sharding.reshard(x, PartitionSpec(everyone if enough else batch, None, None, None))


# --- one device's convolution, by platform ----------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def convolve(stride: int, padding: Padding, groups: int, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """BHWI, KKI/GO -> BHWO on one device. The gradient is written out so that the platform chooses in each pass, and nothing
    is kept but x and the kernel."""
    forms = (functools.partial(form, stride, padding, groups) for form in (on_cpu, native))
    return lax.platform_dependent(x, kernel, **dict(zip(("cpu", "default"), forms, strict=True)))


def _convolve_forward(stride, padding, groups, x, kernel):
    return convolve(stride, padding, groups, x, kernel), (x, kernel)


def _convolve_backward(stride, padding, groups, kept, dy):
    def gradient(form):
        return lambda x, kernel, dy: jax.vjp(functools.partial(form, stride, padding, groups), x, kernel)[1](dy)

    return lax.platform_dependent(*kept, dy, cpu=gradient(on_cpu), default=gradient(native))


convolve.defvjp(_convolve_forward, _convolve_backward)


def native(stride: int, padding: Padding, groups: int, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=NUMBERS, feature_group_count=groups
    )


def on_cpu(stride: int, padding: Padding, groups: int, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """One group after another: XLA:CPU takes 15 times as long for the kernel's gradient of all groups at once. And where the
    map is no larger than the kernel, or the kernel is one pixel, as a matrix product."""
    kernel, padding = reached(stride, padding, x, kernel)
    sides = [
        side_out(size, k, stride, pads) for size, k, pads in zip(x.shape[1:3], kernel.shape, padding, strict=False)
    ]
    if max(kernel.shape[:2]) == 1 or min(sides) <= max(kernel.shape[:2]):
        return product(stride, padding, groups, x, kernel)
    pairs = zip(jnp.split(x, groups, axis=-1), jnp.split(kernel, groups, axis=-1), strict=True)
    return jnp.concatenate([one_group(stride, padding, *pair) for pair in pairs], axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def one_group(stride: int, padding: Padding, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """BHWI, KKIO -> BHWO. In a loop XLA:CPU has fast convolutions only for arrays in this order, so that its gradients are
    written as such, by whose transposes it would otherwise multiply one number at a time."""
    return native(stride, padding, 1, x, kernel)


def _one_group_forward(stride, padding, x, kernel):
    return one_group(stride, padding, x, kernel), (x, kernel)


def _one_group_backward(stride, padding, kept, dy):
    x, kernel = kept
    back, around = [], []  # the padding of each product
    for axis, (before, _) in enumerate(padding):
        size, side, reach = x.shape[1 + axis], kernel.shape[axis], (dy.shape[1 + axis] - 1) * stride
        back.append((side - 1 - before, size - 1 - reach + before))
        around.append((before, side - size - before + reach))
    convolution = functools.partial(lax.conv_general_dilated, window_strides=(1, 1), dimension_numbers=NUMBERS)
    dx = convolution(dy, jnp.swapaxes(kernel[::-1, ::-1], 2, 3), padding=back, lhs_dilation=(stride, stride))
    x, dy = jnp.swapaxes(x, 0, 3), jnp.moveaxis(dy, 0, 2)  # IHWB, HWBO
    return dx, jnp.moveaxis(convolution(x, dy, padding=around, rhs_dilation=(stride, stride)), 0, 2)


one_group.defvjp(_one_group_forward, _one_group_backward)


def side_out(size: int, kernel: int, stride: int, pads: tuple[int, int]) -> int:
    return (size + sum(pads) - kernel) // stride + 1


def reached(stride: int, padding: Padding, x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, Padding]:
    """The kernel without the rows and columns that see nothing but padding, as the outer ones on a map of one pixel."""
    cut: list[tuple[int, int]] = []
    for axis, (before, after) in enumerate(padding):
        size, side = x.shape[1 + axis], kernel.shape[axis]
        last = (side_out(size, side, stride, (before, after)) - 1) * stride  # where the last window begins
        taps = [tap for tap in range(side) if tap - before < size and last + tap - before >= 0]
        kernel = lax.slice_in_dim(kernel, taps[0], taps[-1] + 1, axis=axis)
        cut.append((before - taps[0], after - (side - 1 - taps[-1])))
    return kernel, tuple(cut)


def product(stride: int, padding: Padding, groups: int, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """BHWI, KKI/GO -> BHWO: of each group G one matrix product, of what the windows see with the kernel."""
    (images, *sizes, channels_in), (*sides, _, channels_out) = x.shape, kernel.shape
    height, width = (side_out(*args) for args in zip(sizes, sides, (stride, stride), padding, strict=True))
    x = jnp.moveaxis(x.reshape(images, *sizes, groups, channels_in // groups), 3, 0)  # GBHWI
    x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (0, 0, 0), *((*pads, 0) for pads in padding), (0, 0, 0)))
    # First the columns of a window, then its rows: one concatenation of nine would take XLA:CPU long to compile.
    x = jnp.stack([x[:, :, :, j : j + (width - 1) * stride + 1 : stride] for j in range(sides[1])], axis=4)
    x = jnp.stack([x[:, :, i : i + (height - 1) * stride + 1 : stride] for i in range(sides[0])], axis=4)
    kernel = jnp.moveaxis(kernel.reshape(-1, groups, channels_out // groups), 1, 0)
    y = jnp.einsum("gnk,gko->gno", x.reshape(groups, images * height * width, -1), kernel)
    return jnp.moveaxis(y, 0, 1).reshape(images, height, width, channels_out)
