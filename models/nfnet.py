"""NFNet: ResNets without normalisation layers. Brock et al. 2021, arXiv 2102.06171; sections below are that paper's.

This is the variant DeepMind released: SAME padding, a learned skip gain on every block, unscaled ReLU in
squeeze-excite. Shapes: B images, H height, W width, C channels (I in, O out), K kernel side.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from configs.schema import NFNetConfig
from models.convolution import conv, dense, for_stride
from models.params import Init, Initialiser, normal, ones, path_name, truncated_normal, zeros
from models.remat import Remat, named, rematted

# 1 / std(gelu(z)) for z ~ N(0, 1), so that an activation keeps unit variance (sec. 2); the released code's constant.
GELU_GAIN = 1.7015043497085571
STEM_STRIDES = (2, 1, 1, 2)
# A stage with more blocks than this is a loop over all but its first, which compiles one for all. For a few it would compile no
# sooner, and a loop has to copy parameters and gradients together and apart.
MOST_UNROLLED = 6


# --- what the network consists of -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockPlan:
    """One residual block's place in the network; pure arithmetic on the config."""

    stage: int
    block: int
    channels_in: int
    channels_out: int
    mid: int
    groups: int
    stride: int
    expected_variance: float  # of this block's input at initialisation
    drop_rate: float

    @property
    def projects(self) -> bool:
        return self.block == 0  # a stage's first block projects its shortcut, even where widths happen to agree

    @property
    def name(self) -> tuple[str, str]:
        return f"stage_{self.stage}", f"block_{self.block}"


def plan_blocks(config: NFNetConfig) -> Iterator[BlockPlan]:
    """Blocks in order. Variance grows by alpha² a block and falls back to 1 behind a projected shortcut (sec. 2)."""
    channels, variance, index = config.stem_widths[-1], 1.0, 0
    for stage, (width, depth) in enumerate(zip(config.widths, config.depths, strict=True)):
        groups = int(config.bottleneck * width) // config.group_width
        for block in range(depth):
            yield BlockPlan(
                stage=stage,
                block=block,
                channels_in=channels,
                channels_out=width,
                mid=groups * config.group_width,  # "+" variants: 192 is cut to one group of 128
                groups=groups,
                stride=2 if block == 0 and stage > 0 else 1,
                expected_variance=variance,
                drop_rate=config.stochastic_depth * index / sum(config.depths),  # the last block stays below the rate
            )
            # The transition block itself still sees the previous stage's variance: reset after it, not before.
            variance = (1.0 if block == 0 else variance) + config.alpha**2
            channels, index = width, index + 1


def se_width(config: NFNetConfig, channels: int) -> int:
    return max(1, int(config.se_ratio * channels))


def sides(config: NFNetConfig, image_size: int) -> Iterator[tuple[BlockPlan, int, int]]:
    """Each block, and the pixels of a side before and after it."""
    size = image_size
    for stride in STEM_STRIDES:
        size = math.ceil(size / stride)
    for block in plan_blocks(config):
        before, size = size, math.ceil(size / block.stride)
        yield block, before, size


def train_flops(config: NFNetConfig, image_size: int) -> float:
    """Floating-point operations of one image's training step: 2 a multiply-add, the backward pass twice the forward.

    Counts convolutions and dense layers, as the paper's "#FLOPs" (which are multiply-adds) do.
    """
    macs, size, channels = 0, image_size, config.channels
    for width, stride in zip(config.stem_widths, STEM_STRIDES, strict=True):
        size = math.ceil(size / stride)
        macs += size**2 * 9 * channels * width
        channels = width
    for b, before, size in sides(config, image_size):
        macs += before**2 * b.channels_in * b.mid
        macs += size**2 * b.mid * (2 * 9 * b.mid // b.groups + b.channels_out)
        macs += size**2 * b.channels_in * b.channels_out if b.projects else 0
        macs += 2 * b.channels_out * se_width(config, b.channels_out)
        channels = b.channels_out
    macs += size**2 * channels * config.head_width + config.head_width * config.num_classes
    return 3.0 * 2.0 * macs


def decays(name: str) -> bool:
    """Weight decay: kernels, the classifier's included; not gains, biases and skip gains (the released recipe)."""
    return name.endswith("kernel")


def clips(name: str) -> bool:
    """Adaptive gradient clipping: everything but the classifier's kernel (sec. 4.1); its bias is clipped."""
    return not name.endswith("head/kernel")


def below_head(config: NFNetConfig, name: str) -> int:
    """How many blocks below the classifier a parameter lies: 0 in the head, 1 in the final convolution, most in the stem."""
    places = [f"stages/{'/'.join(plan.name)}/" for plan in plan_blocks(config)]
    order = ["stem/", *places, "final_conv/", "head/"]
    return next(i for i, place in enumerate(reversed(order)) if name.startswith(place))


# --- functions over arrays --------------------------------------------------------------------------------------------


def standardise_weight(kernel: jax.Array, gain: jax.Array, eps_mode: str) -> jax.Array:
    """Scaled weight standardisation (eq. 1) of a KKIO kernel: every output channel gets mean 0, variance gain² / fan-in.

    The two rules for eps are not interchangeable: with a fan-in of 1536, timm's shrinks the kernel by 0.8 %.
    """
    kernel = kernel.astype(jnp.float32)
    fan_in = math.prod(kernel.shape[:-1])
    mean = jnp.mean(kernel, axis=(0, 1, 2), keepdims=True)
    variance = jnp.var(kernel, axis=(0, 1, 2), keepdims=True)
    if eps_mode == "max_nvar":  # DeepMind: eps is a floor
        scale = lax.rsqrt(jnp.maximum(variance * fan_in, 1e-4))
    else:  # "add_var", timm: eps is added
        scale = lax.rsqrt(variance + 1e-5) * fan_in**-0.5
    return (kernel - mean) * (scale * gain[None, None, None, :])


def scaled_gelu(x: jax.Array, approximate: bool) -> jax.Array:
    return GELU_GAIN * jax.nn.gelu(x, approximate=approximate)


def halve(x: jax.Array) -> jax.Array:
    """Means of 2x2 windows, BHWC -> B ceil(H/2) ceil(W/2) C; an odd side's padding does not count in the mean.

    Not `reduce_window`: XLA:CPU of jax 0.10.2 quadruples maps of one pixel (compare openxla/xla#48714).
    """
    mean = x.astype(jnp.float32)
    for axis in (1, 2):
        if mean.shape[axis] % 2:  # the mean of the last row and its copy is that row
            mean = jnp.concatenate([mean, lax.slice_in_dim(mean, -1, None, axis=axis)], axis=axis)
        pairs = (*mean.shape[:axis], mean.shape[axis] // 2, 2, *mean.shape[axis + 1 :])
        mean = jnp.mean(mean.reshape(pairs), axis=axis + 1)
    return mean.astype(x.dtype)


def squeeze_excite(x: jax.Array, squeeze: "Dense", excite: "Dense") -> jax.Array:
    """Scales channels by gates in (0, 2) from the image's mean, BHWC -> BHWC. Gates in float32: they cost little.

    Plain ReLU, as in the released code; the GELU in the paper's appendix is not what was trained.
    """
    hidden = jax.nn.relu(squeeze(jnp.mean(x, axis=(1, 2), dtype=jnp.float32), x.dtype))
    gates = 2 * jax.nn.sigmoid(excite(hidden, x.dtype))
    return x * gates.astype(x.dtype)[:, None, None, :]


def keep_mask(key: jax.Array, drop_rate: jax.Array | float, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.bernoulli(key, 1 - drop_rate, shape)


def drop_branches(x: jax.Array, key: jax.Array, drop_rate: jax.Array) -> jax.Array:
    """Stochastic depth: zeroes whole images of a residual branch. The released code does not divide by the keep rate."""
    keep = keep_mask(key, drop_rate, (x.shape[0], 1, 1, 1))
    return x * keep.astype(x.dtype)


def dropout(x: jax.Array, key: jax.Array, drop_rate: float) -> jax.Array:
    return x * keep_mask(key, drop_rate, x.shape).astype(x.dtype) / (1 - drop_rate)


# --- modules own parameters -------------------------------------------------------------------------------------------

DIVIDED = (None, None, "channels_in", "channels_out")
WHOLE = (None, None, None, None)  # the stem: 0.1 M parameters, and 16 channels do not divide over many devices


class Conv(nnx.Module):
    """Weight-standardised convolution with gain and bias, BHWI -> BHWO."""

    def __init__(
        self,
        init: Init,
        side: int,
        channels_in: int,
        channels_out: int,
        eps_mode: str,
        *,
        stride: int = 1,
        groups: int = 1,
        axes: tuple[str | None, ...] = DIVIDED,
    ):
        fan_in = side * side * channels_in // groups
        self.kernel = init.param("kernel", (side, side, channels_in // groups, channels_out), axes, normal(1 / fan_in))
        self.gain = init.param("gain", (channels_out,), (None,), ones)
        self.bias = init.param("bias", (channels_out,), (None,), zeros)
        self.eps_mode, self.stride, self.groups = eps_mode, stride, groups

    def standardised(self) -> jax.Array:
        """Statistics belong to one output channel, so each device standardises the channels it stores."""
        return standardise_weight(self.kernel[...], self.gain[...], self.eps_mode)

    def __call__(self, x: jax.Array) -> jax.Array:
        """With the kernel as it is: see `Standardised`."""
        return conv(x, self.kernel[...], self.bias[...], self.stride, self.groups)


class Dense(nnx.Module):
    """Dense layer with bias, BI -> BO in float32."""

    def __init__(
        self, init: Init, features_in: int, features_out: int, axes: tuple[str | None, ...], initialiser: Initialiser
    ):
        self.kernel = init.param("kernel", (features_in, features_out), axes, initialiser)
        self.bias = init.param("bias", (features_out,), (None,), zeros)

    def __call__(self, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
        return dense(x, self.kernel[...], self.bias[...], dtype)


class Block(nnx.Module):
    """Pre-activation bottleneck block (sec. 3, appendix C): h + alpha * skip_gain * branch(h), skip_gain 0 at first."""

    def __init__(self, config: NFNetConfig, plan: BlockPlan, init: Init):
        self.config, self.stride, self.stage = config, plan.stride, plan.name[0]
        out, mid, groups, eps_mode = plan.channels_out, plan.mid, plan.groups, config.ws_eps_mode
        hidden, dense_axes = se_width(config, out), ("channels_in", "channels_out")
        self.reduce = Conv(init.scope("reduce"), 1, plan.channels_in, mid, eps_mode)
        self.spatial_0 = Conv(init.scope("spatial_0"), 3, mid, mid, eps_mode, stride=plan.stride, groups=groups)
        self.spatial_1 = Conv(init.scope("spatial_1"), 3, mid, mid, eps_mode, groups=groups)
        self.expand = Conv(init.scope("expand"), 1, mid, out, eps_mode)
        self.squeeze = Dense(init.scope("squeeze"), out, hidden, dense_axes, truncated_normal(1 / out))
        self.excite = Dense(init.scope("excite"), hidden, out, dense_axes, truncated_normal(1 / hidden))
        self.skip_gain = init.param("skip_gain", (), (), zeros)
        self.shortcut = Conv(init.scope("shortcut"), 1, plan.channels_in, out, eps_mode) if plan.projects else None

    def __call__(
        self, x: jax.Array, key: jax.Array | None, expected_variance: jax.Array, drop_rate: jax.Array
    ) -> jax.Array:
        """BHWI -> BHWO. `key` of None: nothing is dropped. The variance is the input's at initialisation."""
        x, activate = self.named(x, "input"), partial(scaled_gelu, approximate=self.config.gelu_approximate)
        x = for_stride(x, self.stride)
        h = activate(x) * lax.rsqrt(expected_variance).astype(x.dtype)
        if self.shortcut is None:
            shortcut = x
        else:  # a projected shortcut starts from the activated, rescaled input, an identity one from the raw input
            shortcut = self.shortcut(halve(h) if self.stride == 2 else h)
        h = self.named(self.reduce(h), "reduce")
        h = self.named(self.spatial_0(activate(h)), "spatial")
        h = self.named(self.spatial_1(activate(h)), "spatial")
        h = self.named(self.expand(activate(h)), "expand")
        h = squeeze_excite(h, self.squeeze, self.excite)
        if key is not None and self.config.stochastic_depth:
            h = drop_branches(h, key, drop_rate)
        return shortcut + self.config.alpha * self.skip_gain[...].astype(h.dtype) * h

    def named(self, x: jax.Array, name: str) -> jax.Array:
        """By what it is and by its stage: early stages keep most and cost least to compute again."""
        return named(named(x, name), self.stage)


class NFNet(nnx.Module):
    """Image classifier, NFNet-F0 to F7+ by config."""

    def __init__(self, config: NFNetConfig, init: Init):
        self.config, self.spec = config, init.spec
        eps_mode = config.ws_eps_mode
        stem, channels = {}, config.channels
        for i, (width, stride) in enumerate(zip(config.stem_widths, STEM_STRIDES, strict=True)):
            scope = init.scope("stem").scope(f"conv_{i}")
            stem[f"conv_{i}"] = Conv(scope, 3, channels, width, eps_mode, stride=stride, axes=WHOLE)
            channels = width
        self.stem = nnx.Dict(stem)
        stages: dict[str, dict[str, Block]] = {}
        for plan in plan_blocks(config):
            stage, block = plan.name
            stages.setdefault(stage, {})[block] = Block(config, plan, init.scope("stages").scope(stage).scope(block))
        self.stages = nnx.Dict({stage: nnx.Dict(blocks) for stage, blocks in stages.items()})
        self.final_conv = Conv(init.scope("final_conv"), 1, config.widths[-1], config.head_width, eps_mode)
        # Divided by its inputs, final_conv's output channels: the number of classes need not divide over devices.
        head_axes = ("channels_out", None)
        self.head = Dense(init.scope("head"), config.head_width, config.num_classes, head_axes, normal(0.01**2))

    def __call__(self, images: jax.Array, **options) -> jax.Array:
        return standardised(self)(images, **options)

    def logits(
        self, images: jax.Array, *, dtype=jnp.float32, dropout_key: jax.Array | None = None, remat: Remat = "none"
    ) -> jax.Array:
        """Of `Standardised`, which says what is what."""
        *keys, last = (None,) if dropout_key is None else jax.random.split(dropout_key, sum(self.config.depths) + 1)
        features = self.pooled(images, dtype, keys or None, remat)
        if last is not None and self.config.dropout:
            features = dropout(features, last, self.config.dropout)
        return jax.sharding.reshard(self.head(features, dtype), self.spec("batch", None))

    def features(self, images: jax.Array, *, dtype=jnp.float32) -> jax.Array:
        """Images BHWC -> what the classifier sees of them, (B head_width), in float32."""
        return standardised(self).network.pooled(images, dtype, None, "none")

    def pooled(self, images: jax.Array, dtype: jnp.dtype, keys: Sequence[jax.Array] | None, remat: Remat) -> jax.Array:
        """With the kernels as they are; a key for each block, or None."""
        config = self.config
        x = jax.sharding.reshard(images.astype(dtype), self.spec("batch", "seq", None, None))
        for i, stride in enumerate(STEM_STRIDES):  # no activation after the last one: blocks start with theirs
            x = x if i == 0 else scaled_gelu(x, config.gelu_approximate)
            x = self.stem[f"conv_{i}"](for_stride(x, stride))
        plans = list(plan_blocks(config))
        variances = jnp.asarray([plan.expected_variance for plan in plans], jnp.float32)
        drop_rates = jnp.asarray([plan.drop_rate for plan in plans], jnp.float32)

        def run(x, block, rest, in_scan=False):
            return rematted(lambda block, x, rest: block(x, *rest), remat, in_scan=in_scan)(block, x, rest)

        end = 0
        for s, depth in enumerate(config.depths):
            first, end = end, end + depth
            blocks = [self.stages[f"stage_{s}"][f"block_{b}"] for b in range(depth)]
            rests = [(None if keys is None else keys[i], variances[i], drop_rates[i]) for i in range(first, end)]
            alone = 1 if depth > MOST_UNROLLED else depth
            for b in range(alone):
                with jax.named_scope(f"stage_{s}/block_{b}"):
                    x = run(x, blocks[b], rests[b])
            if alone < depth:  # they differ in nothing but these: compiled once for all
                stacked = jax.tree.map(
                    lambda *leaves: jnp.stack(leaves), *zip(blocks[alone:], rests[alone:], strict=True)
                )
                with jax.named_scope(f"stage_{s}/blocks"):
                    x, _ = lax.scan(lambda x, one: (run(x, one[0], one[1], in_scan=True), None), x, stacked)
        x = scaled_gelu(self.final_conv(x), config.gelu_approximate)
        return jnp.mean(x, axis=(1, 2), dtype=jnp.float32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Standardised:
    """A network whose convolutions have standardised kernels, in float32 and divided over the devices as their own are."""

    network: NFNet

    def __call__(self, images: jax.Array, **options) -> jax.Array:
        """Images BHWC -> logits [B, classes] in float32. `dropout_key` of None is evaluation: nothing is dropped.

        `remat` of "layer", or of names, recomputes each block in the backward pass.
        """
        return self.network.logits(images, **options)


def standardised(network: NFNet) -> Standardised:
    """Done once a step, before there are microbatches and layers that the backward pass computes again."""

    def ready(conv: Conv) -> Conv:
        kernel = conv.standardised()
        return jax.tree_util.tree_map_with_path(lambda path, w: kernel if path_name(path) == "kernel" else w, conv)

    def is_conv(node: object) -> bool:
        return isinstance(node, Conv)

    return Standardised(jax.tree.map(lambda node: ready(node) if is_conv(node) else node, network, is_leaf=is_conv))
