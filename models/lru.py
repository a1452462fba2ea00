"""Linear recurrent units, and the recurrences that lead to them (arXiv 2303.06349).

Shapes: B batch, T tokens, D model width (the paper's H), N modes of the state, V vocabulary, K classes.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import reshard

from configs.schema import LRUConfig
from models.blocks import Linear
from models.heads import Head, one_by_one
from models.language_model import LanguageModel
from models.params import Init, Initialiser, Spec, cast_kernels, normal, ones, zeros
from models.remat import Remat, named
from models.scan import Implementation, linear_scan
from models.sequence import Axis, carried_in
from models.state import State


class LRUModel(LanguageModel):
    """Residual blocks of recurrence and gated unit; logits of tokens, or of whole sequences (`config.pooling`).

    The norm before the head is of this house: the paper has none, and a table as head is lost without it. Rows of values
    (B T C) are read through a matrix in place of the table (`config.channels`). The two documents of a row (`config.pairs`)
    are rows of their own, to all layers, until they are pooled and compared.
    """

    def __init__(self, config: LRUConfig, init: Init):
        super().__init__(config, init, Block, rnn=config.state_size, mlp=config.width)
        pooled, whole = config.pooling != "none", init.fitted(embed=config.width)
        self.head = Head(config, whole.scope("head")) if pooled else None
        if config.channels:
            self.embedding = Encoder(config, whole.scope("embedding"))  # type: ignore[assignment]  # no table
        self.drops = config.dropout > 0

    def __call__(
        self,
        tokens: jax.Array,
        segment_pos: jax.Array,
        *,
        dtype: jnp.dtype,
        remat: Remat = "none",
        state: State | None = None,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array | tuple[jax.Array, State]:
        """As a language model's call. Where sequences are pooled, `tokens` may be values (B T C), logits are those of rows
        (B K), no state is passed on, and a key drops channels. Pairs are (B 2T), a document and its padding a half."""
        if self.head is None:
            return super().__call__(tokens, segment_pos, dtype=dtype, remat=remat, state=state)
        if self.config.pairs:
            tokens, segment_pos = one_by_one(tokens), one_by_one(segment_pos)
        x = self.features(tokens, segment_pos, dtype=dtype, remat=remat, dropout_key=dropout_key)
        assert isinstance(x, jax.Array)
        return self.head(x, reshard(segment_pos, self.spec("batch", "seq")))


class Encoder(nnx.Module):
    """Values (B T C) to the first block's input (B T D): the paper's linear encoder."""

    def __init__(self, config: LRUConfig, init: Init):
        channels, width = config.channels, config.width
        self.linear = Linear(init, (channels,), (width,), (None, "embed"), 1 / channels, bias=True)
        self.spec = init.spec

    @jax.named_scope("embedding")
    def __call__(self, values: jax.Array, dtype: jnp.dtype) -> jax.Array:
        return cast_kernels(self.linear, dtype)(reshard(values.astype(dtype), self.spec("batch", "seq", None)))


class Block(nnx.Module):
    """x + drop(GLU(drop(gelu(recurrence(norm(x)))))) (the paper's figure 1).

    The norm is layer norm. The paper always used batch norm, whose running averages would be a state that no gradient
    trains, which the trainer has no place for.
    """

    def __init__(self, config: LRUConfig, kind: str, init: Init):
        width, recurrence = config.width, Dense if config.dense else LRU
        self.norm_scale = init.param("norm_scale", (width,), (None,), ones)
        self.norm_bias = init.param("norm_bias", (width,), (None,), zeros)
        self.recurrence = recurrence(config, init.scope("recurrence"))
        self.glu = Linear(init.scope("glu"), (width,), (2, width), ("embed", None, "mlp"), 1 / width, bias=True)
        self.dropout, self.spec = config.dropout, init.spec

    def __call__(self, x: jax.Array, segment_pos: jax.Array, key: jax.Array | None = None) -> jax.Array:
        y, _ = self.recurrence(self.normed(x), None, segment_pos)
        return x + self.mixed(y, key)

    def step(self, x: jax.Array, state: jax.Array, segment_pos: jax.Array, masks: dict[str, jax.Array]):
        y, last = self.recurrence(self.normed(x), state, segment_pos)
        return x + self.mixed(y, None), last

    def normed(self, x: jax.Array) -> jax.Array:
        return layer_norm(x, self.norm_scale[...], self.norm_bias[...])

    @jax.named_scope("glu")
    def mixed(self, y: jax.Array, key: jax.Array | None) -> jax.Array:
        """(z W1 + b1) sigmoid(z W2 + b2) of z = gelu(y)."""
        keys = (None, None) if key is None else jax.random.split(key)
        z = named(self.glu(drop(jax.nn.gelu(y), keys[0], self.dropout)), "mlp_up")
        z = reshard(z[:, :, 0] * jax.nn.sigmoid(z[:, :, 1]), self.spec("batch", "seq", None))
        return drop(z, keys[1], self.dropout)


class LRU(nnx.Module):
    """x_k = lambda x_{k-1} + gamma B u_k,  y_k = Re(C x_k) + D u_k  with complex lambda, B, C and x (sections 3.2 to 3.4).

    Branches 0 and 1 of B's and C's kernels are real and imaginary parts. Where a row is read both ways, the same
    lambda, gamma and B run over it from its end, too, and C (D 2N) reads both states: branches 2 and 3 those from the end.
    """

    def __init__(self, config: LRUConfig, init: Init):
        width, modes = config.width, config.state_size
        on_ring = config.recurrence in ("ring", "lru")
        # Without a ring, the eigenvalues of a dense matrix: uniform in the unit disk (theorem 3.1).
        low, high, phase = (config.r_min, config.r_max, config.max_phase) if on_ring else (0.0, 1.0, 2 * jnp.pi)
        self.to_state = Linear(
            init.scope("to_state"), (width,), (2, modes), ("embed", None, "rnn"), 1 / (2 * width), bias=False
        )
        ways = 1 + config.bidirectional
        self.from_state = Linear(
            init.scope("from_state"),
            (2 * ways, modes),
            (width,),
            (None, "rnn", "embed"),
            1 / (ways * modes),
            bias=False,
        )
        self.skip = init.param("skip", (width,), (None,), normal(1.0))
        self.cartesian = config.recurrence == "diagonal"
        if self.cartesian:
            self.real = init.param("real", (modes,), ("rnn",), in_disk(jnp.cos), draw="lambda")
            self.imaginary = init.param("imaginary", (modes,), ("rnn",), in_disk(jnp.sin), draw="lambda")
        else:
            self.nu_log = init.param("nu_log", (modes,), ("rnn",), ring(low, high), draw="nu")
            self.theta_log = init.param("theta_log", (modes,), ("rnn",), phases(phase))
        normalised = config.recurrence == "lru"
        self.gamma_log = (
            init.param("gamma_log", (modes,), ("rnn",), gammas(low, high), draw="nu") if normalised else None
        )
        self.bidirectional, self.spec = config.bidirectional, init.spec

    def eigenvalues(self) -> jax.Array:
        """lambda (N), complex64; in the exponential form within the unit circle, whatever the parameters are."""
        if self.cartesian:
            return lax.complex(self.real[...], self.imaginary[...])
        modulus, phase = jnp.exp(-jnp.exp(self.nu_log[...])), jnp.exp(self.theta_log[...])
        return lax.complex(modulus * jnp.cos(phase), modulus * jnp.sin(phase))

    @jax.named_scope("recurrence")
    def __call__(
        self, u: jax.Array, x0: jax.Array | None, segment_pos: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]:
        """y (B T D) and the last state (B N), complex64, from state x0 (B N) or 0. Where segment_pos is 0 the state is 0 before
        the token."""
        inputs = named(self.to_state(u), "rnn_in").astype(jnp.float32)
        if self.gamma_log is not None:
            inputs = inputs * jnp.exp(self.gamma_log[...])[None, None, None]
        inputs = lax.complex(inputs[:, :, 0], inputs[:, :, 1])
        x, last = diagonal_scan(self.eigenvalues(), inputs, segment_pos, x0, self.spec)
        parts = [x.real, -x.imag]
        if self.bidirectional:
            x, _ = diagonal_scan(self.eigenvalues(), inputs, segment_pos, None, self.spec, reverse=True)
            parts += [x.real, -x.imag]
        y = named(self.from_state(jnp.stack(parts, axis=2).astype(u.dtype)), "rnn_out")
        return y + self.skip[...].astype(u.dtype)[None, None] * u, last


class Dense(nnx.Module):
    """x_k = f(A x_{k-1} + B u_k),  y_k = C x_k + D u_k, all real: a vanilla RNN with f = tanh or relu (section 2), and the
    same without its nonlinearity (section 3.1).

    Each step is a matrix product that needs all of a state, so every device has whole states, and time is a loop.
    """

    def __init__(self, config: LRUConfig, init: Init):
        width, modes = config.width, config.state_size
        self.to_state = Linear(init.scope("to_state"), (width,), (modes,), ("embed", None), 1 / width, bias=False)
        ways = (2,) if config.bidirectional else ()
        self.from_state = Linear(
            init.scope("from_state"), (*ways, modes), (width,), (None,) * len(ways) + (None, "embed"),
            1 / math.prod((*ways, modes)), bias=False,
        )  # fmt: skip
        self.transition = init.param("transition", (modes, modes), (None, None), normal(1 / modes))
        self.skip = init.param("skip", (width,), (None,), normal(1.0))
        self.recurrence, self.bidirectional, self.spec = config.recurrence, config.bidirectional, init.spec

    def nonlinear(self, x: jax.Array) -> jax.Array:
        return {"tanh": jnp.tanh, "relu": jax.nn.relu, "dense": lambda x: x}[self.recurrence](x)

    @jax.named_scope("recurrence")
    def __call__(self, u: jax.Array, x0: jax.Array | None, segment_pos: jax.Array) -> tuple[jax.Array, jax.Array]:
        """As an LRU; the last state is float32."""
        inputs = named(self.to_state(u), "rnn_in").astype(jnp.float32)
        x, last = self.scanned(inputs, segment_pos, x0)
        if self.bidirectional:
            x = jnp.stack([x, self.scanned(inputs, segment_pos, None, reverse=True)[0]], axis=2)
        y = named(self.from_state(x.astype(u.dtype)), "rnn_out")
        return y + self.skip[...].astype(u.dtype)[None, None] * u, last

    def scanned(
        self, inputs: jax.Array, segment_pos: jax.Array, x0: jax.Array | None, reverse: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """States (B T N) and the last one (B N) of inputs (B T N), as `diagonal_scan` has them."""
        row = self.spec("batch", None)
        if x0 is None:
            x0 = jnp.zeros((inputs.shape[0], self.transition.shape[0]), jnp.float32, out_sharding=row)
        inputs, starts = ready(inputs, segment_pos, reverse)

        def one(x, now):
            bu, start = now
            ax = jnp.einsum("bn,mn->bm", jnp.where(start[:, None], 0.0, x), self.transition[...], out_sharding=row)
            x = self.nonlinear(ax + bu)
            return x, x

        last, x = lax.scan(one, x0, (jnp.swapaxes(inputs, 0, 1), jnp.swapaxes(starts, 0, 1)), reverse=reverse)
        return jnp.swapaxes(x, 0, 1), last


def ready(inputs: jax.Array, segment_pos: jax.Array, reverse: bool) -> tuple[jax.Array, jax.Array]:
    """Inputs (B T N) of a scan, and before which tokens (B T) its state is 0.

    A scan from the end is of a row that is one sequence: nothing starts within it, and padding behind it adds nothing.
    """
    if not reverse:
        return inputs, segment_pos == 0
    return jnp.where((segment_pos >= 0)[:, :, None], inputs, 0), jnp.zeros_like(segment_pos, bool)


def diagonal_scan(
    eigenvalues: jax.Array,
    inputs: jax.Array,
    segment_pos: jax.Array,
    x0: jax.Array | None,
    spec: Spec,
    reverse: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """States (B T N) and the last one (B N), complex64, of inputs (B T N); each device has its own modes.

    Devices that share sequences start from 0 and give no last state.
    """
    axis = spec("seq")[0] if x0 is None else None
    time = None if axis is None else "seq"
    modes, row = spec("batch", time, "rnn"), spec("batch", "rnn")
    implementation: Implementation | None = None
    if x0 is not None and inputs.shape[1] == 1:
        implementation = "associative"  # of one step there is nothing to scan

    def scan(eigenvalues, inputs, segment_pos, *start):
        inputs, starts = ready(inputs, segment_pos, reverse)
        a = jnp.where(starts[:, :, None], 0, eigenvalues[None, None])
        if axis is None:
            return linear_scan(a, inputs, *start, reverse=reverse, implementation=implementation)
        h0 = arriving(axis, eigenvalues, a, inputs, starts, reverse)
        return linear_scan(a, inputs, h0, reverse=reverse)[0], None

    scanned = jax.shard_map(
        scan,
        in_specs=(spec("rnn"), modes, spec("batch", time), *(() if x0 is None else (row,))),
        out_specs=(modes, row if axis is None else None),
        check_vma=False,  # Pallas kernels do not say over which mesh axes their results vary
    )
    start = () if x0 is None else (x0,)
    x, last = scanned(eigenvalues, reshard(inputs, modes), reshard(segment_pos, spec("batch", time)), *start)
    return reshard(x, spec("batch", "seq", "rnn")), last


def arriving(
    axis: Axis, eigenvalues: jax.Array, a: jax.Array, inputs: jax.Array, starts: jax.Array, reverse: bool
) -> jax.Array:
    """The state (B N) that reaches this device's tokens, each device having run its own from 0 (docs/architecture.md)."""
    _, end = linear_scan(a, inputs, reverse=reverse)
    whole = eigenvalues ** inputs.shape[1]
    decay = jnp.where(jnp.any(starts, axis=1)[:, None], 0, whole[None])
    return carried_in(decay, end, axis, reverse=reverse)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """x (... D) without its mean, over its deviation, times scale (D) plus bias (D), in float32; result in x's dtype."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + 1e-6)
    ahead = tuple(range(x.ndim - 1))
    return (y * jnp.expand_dims(scale, ahead) + jnp.expand_dims(bias, ahead)).astype(x.dtype)


def drop(x: jax.Array, key: jax.Array | None, rate: float) -> jax.Array:
    """Dropout of x (B T D), of a channel in a whole row or not at all, as in the code of S5 that the paper builds on."""
    if key is None or not rate:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, (x.shape[0], 1, x.shape[2]))
    keep = reshard(keep, jax.sharding.PartitionSpec(jax.typeof(x).sharding.spec[0], None, None))
    return x * keep.astype(x.dtype) / (1 - rate)


def squares(key: jax.Array, shape: tuple[int, ...], low: float, high: float) -> jax.Array:
    """|lambda|**2, uniform: then lambda is uniform in the area between two circles (lemma 3.2). No modulus is 0 or 1."""
    return jnp.clip(jax.random.uniform(key, shape, minval=low**2, maxval=high**2), 1e-12, 1 - 1e-7)


def ring(low: float, high: float) -> Initialiser:
    """nu_log, with |lambda| = exp(-exp(nu_log))."""
    return lambda key, shape: jnp.log(-0.5 * jnp.log(squares(key, shape, low, high)))


def gammas(low: float, high: float) -> Initialiser:
    """gamma_log = log sqrt(1 - |lambda|**2) of the lambda that `ring` draws with the same key (section 3.4)."""
    return lambda key, shape: 0.5 * jnp.log1p(-squares(key, shape, low, high))


def phases(highest: float) -> Initialiser:
    """theta_log, with theta uniform from 0 to `highest`."""
    return lambda key, shape: jnp.log(jax.random.uniform(key, shape, minval=1e-7, maxval=1.0) * highest)


def in_disk(part) -> Initialiser:
    """The real (cos) or imaginary (sin) part of lambda, uniform in the unit disk: both, if drawn with the same key."""

    def draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        square, phase = jax.random.uniform(key, (2, *shape))
        return jnp.sqrt(square) * part(2 * jnp.pi * phase)

    return draw


def decays(name: str) -> bool:
    """Weight decay by name: matrices do, but for B; eigenvalues, gamma, A, norms, biases and the table don't."""
    return name.endswith("kernel") and not name.endswith("to_state/kernel")


def rates(config: LRUConfig) -> Callable[[str], float] | None:
    """By name, of the learning rate: `config.rate_factor` for eigenvalues, gamma and B (of a dense unit A and B), 1 for the rest."""
    if config.rate_factor == 1:
        return None
    slower = ("nu_log", "theta_log", "gamma_log", "real", "imaginary", "transition", "to_state/kernel")
    return lambda name: config.rate_factor if name.endswith(tuple(f"/{own}" for own in slower)) else 1.0


def train_flops(config: LRUConfig, length: int) -> float:
    """Matrix FLOPs a token of one training step (backward = 2 x forward)."""
    d, n, ways = config.width, config.state_size, 1 + config.bidirectional
    recurrence = (1 + ways) * d * n + ways * n * n if config.dense else 2 * (1 + ways) * d * n
    a_row = d * config.num_classes + config.pairs * 4 * d * d
    ends = d * config.channels + a_row / length if config.num_classes else d * config.vocab_size
    return 3 * 2 * (config.depth * (recurrence + 2 * d * d) + ends)
