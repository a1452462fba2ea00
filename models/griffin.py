"""Griffin, Hawk and RecurrentGemma (arXiv 2402.19427, 2404.07839): gated linear recurrences and local attention.

Shapes: B batch, T tokens, D model width, L recurrence width, G gate blocks, N heads, H head features, F MLP width.
"""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import reshard

from configs.schema import GriffinConfig
from models.attention import self_attention
from models.blocks import GatedMLP, Linear, rms_norm, rope
from models.language_model import LanguageModel
from models.params import Init, Spec, normal, parts, zeros
from models.remat import named
from models.rg_lru import rg_lru_scan, rg_lru_shared
from models.scan import Implementation
from models.sequence import left_halo
from models.state import KeyValues, RecurrenceState, ring_attention


class Griffin(LanguageModel):
    """Griffin, Hawk, RecurrentGemma, and the paper's Transformer."""

    def __init__(self, config: GriffinConfig, init: Init):
        sizes = {"mlp": config.mlp_width, "heads": config.num_heads, "rnn": config.rnn_width}
        super().__init__(config, init, Block, **sizes, gate_blocks=config.num_gate_blocks)

    def scaled(self, x: jax.Array) -> jax.Array:
        return x * embedding_scale(self.config.width).astype(x.dtype) if self.config.embedding_scale else x


def embedding_scale(width: int) -> np.ndarray:
    """sqrt(D), rounded to bfloat16 in every precision, as the released models were trained."""
    return np.asarray(np.sqrt(width), ml_dtypes.bfloat16).astype(np.float32)


class Block(nnx.Module):
    """Pre-norm residual block: a temporal mixer (recurrence or attention), then a gated MLP."""

    def __init__(self, config: GriffinConfig, kind: str, init: Init):
        final = 2 / config.depth  # variance scale of the kernels that write to the residual stream
        mixer = Recurrence if kind == "rec" else LocalAttention
        self.temporal_norm = init.param("temporal_norm", (config.width,), (None,), zeros)
        self.mixer = mixer(config, init.scope("mixer"), final)
        self.mlp_norm = init.param("mlp_norm", (config.width,), (None,), zeros)
        # The reference's fan-in of `up` counts its leading branch axis: variance 1 / (2 D), not 1 / D.
        self.mlp = GatedMLP(
            init.scope("mlp"),
            config.width,
            config.mlp_width,
            up_variance=1 / (2 * config.width),
            down_variance=final / config.mlp_width,
            bias=True,
        )

    def __call__(self, x: jax.Array, segment_pos: jax.Array) -> jax.Array:
        x = x + self.mixer(rms_norm(x, self.temporal_norm[...]), segment_pos)
        return x + self.mlp(rms_norm(x, self.mlp_norm[...]))

    def step(self, x: jax.Array, state, segment_pos: jax.Array, masks: dict[str, jax.Array]):
        h, state = self.mixer.step(rms_norm(x, self.temporal_norm[...]), state, segment_pos, masks)
        x = x + h
        return x + self.mlp(rms_norm(x, self.mlp_norm[...])), state


class Recurrence(nnx.Module):
    """gelu(x Wy) * RGLRU(conv(x Wx)), projected back to D (figure 2 of the paper)."""

    def __init__(self, config: GriffinConfig, init: Init, final: float):
        width, rnn = config.width, config.rnn_width
        self.linear_x = Linear(init.scope("linear_x"), (width,), (rnn,), ("embed", "rnn"), 1 / width, bias=True)
        self.linear_y = Linear(init.scope("linear_y"), (width,), (rnn,), ("embed", "rnn"), 1 / width, bias=True)
        self.linear_out = Linear(init.scope("linear_out"), (rnn,), (width,), ("rnn", "embed"), final / rnn, bias=True)
        self.conv_taps = init.param(
            "conv_taps", (config.conv_width, rnn), (None, "rnn"), normal(0.01 / config.conv_width)
        )
        self.conv_bias = init.param("conv_bias", (rnn,), ("rnn",), zeros)
        self.input_gate = BlockDiagonal(init.scope("input_gate"), rnn, config.num_gate_blocks)
        self.a_gate = BlockDiagonal(init.scope("a_gate"), rnn, config.num_gate_blocks)
        self.a_param = init.param("a_param", (rnn,), ("rnn",), ring)
        self.spec = init.spec

    @jax.named_scope("mixer")
    def __call__(self, x: jax.Array, segment_pos: jax.Array) -> jax.Array:
        y = jax.nn.gelu(named(self.linear_y(x), "rnn_in"))
        u = shared_conv(
            named(self.linear_x(x), "rnn_in"), self.conv_taps[...], self.conv_bias[...], segment_pos, self.spec
        )
        h, _ = rg_lru(u, None, self.input_gate, self.a_gate, self.a_param[...], segment_pos)
        return named(self.linear_out(h * y), "rnn_out")

    def step(
        self, x: jax.Array, state: RecurrenceState, segment_pos: jax.Array, masks: dict[str, jax.Array]
    ) -> tuple[jax.Array, RecurrenceState]:
        y = jax.nn.gelu(self.linear_y(x))
        # Positions mask the earlier inputs by themselves, of padding and of other documents, too; theirs don't matter.
        earlier = state.conv.shape[1]
        inputs = jnp.concatenate([state.conv, self.linear_x(x)], axis=1)
        positions = jnp.pad(segment_pos, ((0, 0), (earlier, 0)))
        u = causal_conv(inputs, self.conv_taps[...], self.conv_bias[...], positions)[:, earlier:]
        h, last = rg_lru(u, state.h, self.input_gate, self.a_gate, self.a_param[...], segment_pos)
        assert last is not None
        return self.linear_out(h * y), RecurrenceState(inputs[:, x.shape[1] :], last)


class BlockDiagonal(nnx.Module):
    """Parameters of G dense blocks on a diagonal, L -> L, so that gates never cross a device.

    The kernel (L L/G) is what the L rows of that matrix have within their block: any number of devices that divides the
    channels divides it, too, while blocks are few and their sides seldom powers of two.
    """

    def __init__(self, init: Init, width: int, num_blocks: int):
        block = width // num_blocks
        # The reference's fan-in counts the blocks too: variance 1 / L.
        self.kernel = init.param("kernel", (width, block), ("gate_rows", None), normal(1 / width))
        self.bias = init.param("bias", (num_blocks, block), ("gate_blocks", None), zeros)
        self.spec = init.spec

    def gathered(self) -> tuple[jax.Array, jax.Array]:
        """Weights (G L/G L/G) and biases (G L/G), of whole blocks on each device: those of its channels, or all."""
        num_blocks, block = self.bias.shape
        rows = reshard(self.kernel[...], self.spec("gate_blocks", None))
        blocks = self.spec("gate_blocks", None, None)
        return jnp.reshape(rows, (num_blocks, block, block), out_sharding=blocks), self.bias[...]


def ring(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """a_param such that rho = sigmoid(-a_param) has rho**2 uniform in [0.9**2, 0.999**2], as the released code does."""
    square = jax.random.uniform(key, shape, minval=0.9**2, maxval=0.999**2) + 1e-8
    log_rho = 0.5 * jnp.log(square)
    return jnp.log(jnp.expm1(-log_rho))


def causal_conv(u: jax.Array, taps: jax.Array, bias: jax.Array, segment_pos: jax.Array) -> jax.Array:
    """Depthwise convolution over time (B T L); the last tap multiplies the current token, none crosses a document start."""
    num_taps, length = taps.shape[0], u.shape[1]
    taps, out = taps.astype(u.dtype), bias.astype(u.dtype)[None, None] + jnp.zeros_like(u)
    for back in range(num_taps):
        shifted = jnp.pad(u, ((0, 0), (back, 0), (0, 0)))[:, :length]
        same_document = (segment_pos >= back)[:, :, None] if back else True
        out = out + jnp.where(same_document, shifted, jnp.zeros_like(u)) * taps[num_taps - 1 - back][None, None]
    return out


def shared_conv(u: jax.Array, taps: jax.Array, bias: jax.Array, segment_pos: jax.Array, spec: Spec) -> jax.Array:
    """`causal_conv`, for which a device fetches from its neighbour the inputs before its own, where they share sequences."""
    axis, earlier = spec("seq")[0], taps.shape[0] - 1
    if axis is None:
        return causal_conv(u, taps, bias, segment_pos)

    def conv(u, taps, bias, segment_pos):
        u = jnp.concatenate([left_halo(u, earlier, axis), u], axis=1)
        return causal_conv(u, taps, bias, jnp.pad(segment_pos, ((0, 0), (earlier, 0))))[:, earlier:]

    channels = spec("batch", "seq", "rnn")
    specs = (channels, spec(None, "rnn"), spec("rnn"), spec("batch", "seq"))
    return jax.shard_map(conv, in_specs=specs, out_specs=channels)(u, taps, bias, segment_pos)


def rg_lru(
    u: jax.Array,
    h0: jax.Array | None,
    input_gate: BlockDiagonal,
    a_gate: BlockDiagonal,
    a_param: jax.Array,
    segment_pos: jax.Array,
) -> tuple[jax.Array, jax.Array | None]:
    """The RG-LRU (B T L) and its last state (B L), from state h0 (B L) or 0.

    Every device has its own channels, and no channel needs another but those of its gate block. Devices that share
    sequences start from 0 and give no last state.
    """
    spec = input_gate.spec
    axis = spec("seq")[0] if h0 is None else None
    time = None if axis is None else "seq"
    channels, row = spec("batch", time, "rnn"), spec("batch", "rnn")
    gate = (spec("gate_blocks", None, None), spec("gate_blocks", None))
    implementation: Implementation | None = None
    if h0 is not None and u.shape[1] == 1:
        implementation = "associative"  # of one step there is nothing to scan

    def scan(u, segment_pos, *rest):
        if axis is None:
            return rg_lru_scan(u, segment_pos, *rest, implementation=implementation)
        return rg_lru_shared(axis, u, segment_pos, *rest), None

    if parts(spec, "gate_blocks") < parts(spec, "rnn"):
        scan = functools.partial(with_whole_blocks, scan, spec("rnn")[0])
    scanned = jax.shard_map(
        scan,
        in_specs=(channels, spec("batch", time), *gate, *gate, spec("rnn"), *(() if h0 is None else (row,))),
        out_specs=(channels, row if axis is None else None),
        check_vma=False,  # Pallas kernels do not say over which mesh axes their results vary
    )
    parameters = (*input_gate.gathered(), *a_gate.gathered(), a_param)
    start = () if h0 is None else (h0,)
    h, last = scanned(reshard(u, channels), reshard(segment_pos, spec("batch", time)), *parameters, *start)
    return reshard(h, spec("batch", "seq", "rnn")), last


def with_whole_blocks(scan, axis, u, segment_pos, *rest):
    """`scan` for a device whose channels begin or end within a gate block: on all blocks they touch, and then cut.

    It has the parameters of all blocks. The inputs of all channels are gathered; the rest of its work grows by the
    channels of others in its first and last block.
    """
    *gates, (a_param, *start) = *rest[:4], rest[4:]
    own, (num_blocks, block) = u.shape[2], gates[1].shape
    touched = [-(-own * (d + 1) // block) - own * d // block for d in range(lax.axis_size(axis))]
    count, begin = max(touched), lax.axis_index(axis) * own
    first = jnp.minimum(begin // block, num_blocks - count)

    def gathered(x):  # (... own channels) -> (... channels of the blocks)
        whole = lax.all_gather(x, axis, axis=x.ndim - 1, tiled=True)
        return lax.dynamic_slice_in_dim(whole, first * block, count * block, axis=x.ndim - 1)

    gates = [lax.dynamic_slice_in_dim(x, first, count) for x in gates]
    out = scan(gathered(u), segment_pos, *gates, gathered(a_param), *map(gathered, start))
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, begin - first * block, own, axis=x.ndim - 1), out)


class LocalAttention(nnx.Module):
    """Multi-query attention over a window, half of each head rotated. A query sees itself and `window` earlier tokens."""

    def __init__(self, config: GriffinConfig, init: Init, final: float):
        width, heads = config.width, config.num_heads
        head = width // heads
        self.q = Linear(init.scope("q"), (width,), (heads, head), ("embed", "heads", None), 1 / width, bias=False)
        self.k = Linear(init.scope("k"), (width,), (1, head), ("embed", "kv_heads", None), 1 / width, bias=False)
        self.v = Linear(init.scope("v"), (width,), (1, head), ("embed", "kv_heads", None), 1 / width, bias=False)
        self.out = Linear(
            init.scope("out"), (heads, head), (width,), ("heads", None, "embed"), final / width, bias=True
        )
        self.window, self.blocks, self.spec = config.window, config.attention_blocks, init.spec

    @jax.named_scope("mixer")
    def __call__(self, x: jax.Array, segment_pos: jax.Array) -> jax.Array:
        q, k, v = self.projected(x, segment_pos)
        return named(self.out(self_attention(q, k, v, segment_pos, self.window, blocks=self.blocks)), "attn_out")

    def step(
        self, x: jax.Array, ring: KeyValues, segment_pos: jax.Array, masks: dict[str, jax.Array]
    ) -> tuple[jax.Array, KeyValues]:
        q, k, v = self.projected(x, segment_pos)
        new = KeyValues(*(reshard(t, self.spec("batch", None, "kv_heads", None)) for t in (k, v)))
        return self.out(ring_attention(q, ring, new, masks["attn"], self.spec)), new

    def projected(self, x: jax.Array, segment_pos: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Scaled queries (B T N H), keys and values (B T 1 H)."""
        q, k, v = (named(project(x), "qkv") for project in (self.q, self.k, self.v))
        q = rope(q, segment_pos, base=1e4, fraction=0.5)
        k = rope(k, segment_pos, base=1e4, fraction=0.5)
        return q * np.asarray(q.shape[-1] ** -0.5, q.dtype), k, v


def decays(name: str) -> bool:
    """Weight decay by name: matrices do, all of the RG-LRU (RecurrentGemma report), norms, biases and the table don't."""
    return name.endswith("kernel") and "gate/" not in name


def train_flops(config: GriffinConfig, length: int) -> float:
    """Matrix FLOPs a token of one training step (backward = 2 x forward); attention counts the keys a query really sees."""
    d, r, f = config.width, config.rnn_width, config.mlp_width
    head, window = d // config.num_heads, min(config.window, length)
    keys = ((window + 1) * (length - window) + window * (window + 1) / 2) / length
    recurrence = 3 * d * r + 2 * r * r / config.num_gate_blocks
    attention_ = 2 * d * d + 2 * d * head + 2 * d * keys
    layers = [config.pattern[i % len(config.pattern)] for i in range(config.depth)]
    mixers = sum(recurrence if kind == "rec" else attention_ for kind in layers)
    return 3 * 2 * (mixers + config.depth * 3 * d * f + d * config.vocab_size)
