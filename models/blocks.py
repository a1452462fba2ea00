"""Mathematics shared by the language models: functions over arrays, and the layers that own their parameters.

Shapes: B batch, T tokens, D model width, F hidden width, N query heads, K key-value heads, H head features, V vocabulary.
Activations are divided along batch, sequence and hidden axes; a kernel's `embed` axis is gathered before it multiplies.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec, reshard

from models.lookup import lookup
from models.params import Init, normal, zeros
from models.projection import Projection, project
from models.remat import Remat, named, rematted

MASKED = -2.3819763e38  # the reference's finite stand-in for minus infinity


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """x (... D) over its root mean square, times 1 + scale (D), in float32; result in x's dtype."""
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + 1e-6)
    return (y * jnp.expand_dims(1 + scale, tuple(range(x.ndim - 1)))).astype(x.dtype)


def rope(x: jax.Array, positions: jax.Array, base: float, fraction: float = 1.0, divisor: float = 1.0) -> jax.Array:
    """Rotary embedding of the first `fraction` of each head's features, in split halves.

    x (B T N H), positions (B T) within the document; angles in float32. They are quotients, as in the reference: products
    with reciprocals round otherwise, which at position 8000 moves logits by 1e-4.
    """
    rotated = int(x.shape[-1] * fraction)
    timescale = np.asarray(base ** (2 * np.arange(rotated // 2) / rotated), np.float32)
    angles = (positions.astype(jnp.float32) / divisor)[:, :, None, None] / timescale[None, None, None, :]
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    first, second, rest = jnp.split(x, (rotated // 2, rotated), axis=-1)
    first, second, dtype = first.astype(jnp.float32), second.astype(jnp.float32), x.dtype
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate([*(half.astype(dtype) for half in turned), rest], axis=-1)


def einsum_float32(equation: str, x: jax.Array, y: jax.Array, out_sharding: PartitionSpec) -> jax.Array:
    """Products of x and y in their own dtype, summed and returned in float32."""
    if (
        jax.default_backend() == "cpu"
    ):  # XLA:CPU has no bf16 product with a float32 sum; in float32 the products are exact
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return jnp.einsum(equation, x, y, out_sharding=out_sharding, preferred_element_type=jnp.float32)


class Linear(nnx.Module):
    """x (B T in) -> (B T out). `axes` are the kernel's logical axes; `out_shape` may hold several dimensions."""

    def __init__(
        self,
        init: Init,
        in_shape: tuple[int, ...],
        out_shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        variance: float,
        bias: bool,
    ):
        self.kernel = init.param("kernel", (*in_shape, *out_shape), axes, normal(variance))
        self.bias = init.param("bias", out_shape, gathered(axes[len(in_shape) :]), zeros) if bias else None
        self.axes, self.spec, self.num_in = axes, init.spec, len(in_shape)

    def __call__(self, x: jax.Array) -> jax.Array:
        axes = gathered(self.axes)
        y = project(Projection(self.spec, axes[: self.num_in], axes[self.num_in :]), x, self.kernel[...])
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)[None, None]


def gathered(axes: tuple[str | None, ...]) -> tuple[str | None, ...]:
    """A kernel's logical axes once its `embed` axis, divided for storage only, has been gathered."""
    return tuple(None if axis == "embed" else axis for axis in axes)


class GatedMLP(nnx.Module):
    """GeGLU: (gelu_tanh(x gate) * (x up)) down; gate and up are one kernel (D 2 F), branch 0 the gated one."""

    def __init__(self, init: Init, width: int, hidden: int, up_variance: float, down_variance: float, bias: bool):
        self.up = Linear(init.scope("up"), (width,), (2, hidden), ("embed", None, "mlp"), up_variance, bias)
        self.down = Linear(init.scope("down"), (hidden,), (width,), ("mlp", "embed"), down_variance, bias)

    @jax.named_scope("mlp")
    def __call__(self, x: jax.Array) -> jax.Array:
        u = named(self.up(x), "mlp_up")
        return named(self.down(jax.nn.gelu(u[:, :, 0]) * u[:, :, 1]), "mlp_out")


class Embedding(nnx.Module):
    """Token table (V D), read at the input and, transposed, at the output. Its last `padding_rows` are no tokens."""

    def __init__(self, init: Init, vocab_size: int, width: int, padding_rows: int = 0):
        self.table = init.param("table", (vocab_size + padding_rows, width), ("vocab", "embed"), normal(1 / width))
        self.spec, self.vocab_size, self.padding_rows = init.spec, vocab_size, padding_rows

    @jax.named_scope("embedding")
    def __call__(self, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """(B T D) in `dtype`, of the float32 table: its gradient is summed in float32."""
        table = reshard(self.table[...], self.spec("vocab", "embed"))  # where it is kept otherwise, see `storage`
        return lookup(self.spec, dtype, table, tokens)

    def logits(self, x: jax.Array, soft_cap: float) -> jax.Array:
        """(B T V) in float32; `soft_cap` 0 is none. Padding rows have no probability: their logits are MASKED."""
        table = reshard(self.table[...].astype(x.dtype), self.spec("vocab", None))
        logits = einsum_float32("btd,vd->btv", x, table, self.spec("batch", "seq", "vocab"))
        logits = soft_cap * jnp.tanh(logits / soft_cap) if soft_cap else logits
        if not self.padding_rows:
            return logits
        tokens = reshard(jnp.arange(table.shape[0]) < self.vocab_size, self.spec("vocab"))
        return jnp.where(tokens[None, None], logits, MASKED)

    def without_logits(self, function: Callable, x: jax.Array, targets: jax.Array, soft_cap: float, logits_mib: int):
        """What a function of `models.token_loss` says of the logits that x (B T D) would have, for targets (B T)."""
        options = dict(spec=self.spec, num_tokens=self.vocab_size, soft_cap=soft_cap, logits_mib=logits_mib)
        return function(x, self.table[...], targets, **options)


def runs(kinds: Sequence[str], together: bool) -> list[list[str]]:
    """Names of the layers of these kinds, neighbours of one kind together ([rec_0, rec_1], [attn_2]) or each alone."""
    groups = itertools.groupby(enumerate(kinds), key=lambda layer: layer[1] if together else layer)
    return [[f"{kind}_{place}" for place, kind in group] for _, group in groups]


def stacked(layers: Mapping[str, nnx.Module], runs: list[list[str]], axis: int) -> list[nnx.Module]:
    """Each run's layers as one, its parameters stacked along `axis`: a copy of what a device stores, in the compute dtype."""

    def join(run: list[str]) -> nnx.Module:
        return jax.tree.map(lambda *leaves: jnp.stack(leaves, axis), *(layers[name] for name in run))

    return [layers[run[0]] if len(run) == 1 else join(run) for run in runs]


class Stack(nnx.Module):
    """Layers of several kinds in a repeated pattern: whole groups stacked and scanned, the remainder unrolled.

    `make(kind, init)` builds one layer; layers are called as `layer(x, *context)`. Parameter names are
    `groups/<kind>_<place in the pattern>/...` with a leading `layers` axis, and `tail/<kind>_<place>/...`.
    """

    def __init__(self, init: Init, pattern: tuple[str, ...], depth: int, make: Callable[[str, Init], nnx.Module]):
        self.pattern, self.num_groups = pattern, depth // len(pattern)
        names = [f"{kind}_{place}" for place, kind in enumerate(pattern)]
        self.groups = nnx.Dict(
            {
                name: make(kind, init.scope("groups").scope(name).stacked(self.num_groups))
                for name, kind in zip(names, pattern, strict=True)
                if self.num_groups
            }
        )
        tail = list(zip(names, pattern, strict=True))[: depth % len(pattern)]
        self.tail = nnx.Dict({name: make(kind, init.scope("tail").scope(name)) for name, kind in tail})

    def __call__(self, x: jax.Array, *context, remat: Remat = "none", key: jax.Array | None = None) -> jax.Array:
        """`remat` says what of a layer is kept for the gradient, see models/remat.py. With a key, a layer takes one of its own.

        Where whole layers are computed again, neighbours of one kind are a scan of their own inside that of the groups: a
        layer, not a group, is then what the backward pass has in memory. What such a scan keeps is copied into what the
        outer one keeps, and cannot come back from the host, so where more is kept than inputs there is none.
        docs/memory.md has figures.
        """
        inner = remat == "layer"

        def apply(layer, carry):
            x, key = carry
            if key is None:
                return layer(named(x, "input"), *context), None
            key, own = jax.random.split(key)
            return layer(named(x, "input"), *context, key=own), key

        def through(carry, runs: list[list[str]], layers: list, in_scan: bool):
            for run, layer in zip(runs, layers, strict=True):
                with jax.named_scope(run[0]):
                    if len(run) == 1:
                        carry = rematted(apply, remat, in_scan=in_scan)(layer, carry)
                        continue
                    carry, _ = lax.scan(
                        lambda c, one: (rematted(apply, remat, in_scan=True)(one, c), None), carry, layer
                    )
            return carry

        carry = (x, key)
        if self.num_groups:
            several = self.num_groups > 1  # XLA unrolls a loop over one group
            own = runs(self.pattern, together=inner and several)
            groups = stacked(self.groups, own, axis=1)
            carry, _ = lax.scan(lambda c, group: (through(c, own, group, in_scan=several), None), carry, groups)
        own = runs(self.pattern[: len(self.tail)], together=inner)
        return through(carry, own, stacked(self.tail, own, axis=0), in_scan=False)[0]

    def step(self, x: jax.Array, states: dict, *context) -> tuple[jax.Array, dict]:
        """Layers are called as `layer.step(x, its state, *context)` and return x and what they have to remember.

        `states` and what comes back are laid out as the layers: {"groups": {name: ...}, "tail": {name: ...}}.
        """

        def through(x, layers, states):
            kept = {}
            for place, kind in enumerate(self.pattern[: len(layers)]):
                name = f"{kind}_{place}"
                x, kept[name] = layers[name].step(x, states[name], *context)
            return x, kept

        groups: dict = {}
        if self.num_groups:
            x, groups = lax.scan(lambda x, group: through(x, *group), x, (self.groups, states["groups"]))
        x, tail = through(x, self.tail, states["tail"])
        return x, {"groups": groups, "tail": tail}
