"""The sections `model` of a config, one a family. See configs/schema.py."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from configs.remat import ATTENTION, RECURRENCE
from configs.section import ConfigError, Section, divides, setting

_ARCH = ("recompile", "checkpoint", "result")  # another architecture: nothing saved fits
_MATH = ("recompile", "result")  # same arrays, another computation


def attention_blocks() -> Any:
    return setting(
        (0,),
        "queries and keys of a block of TPU attention, one number or eight (see models/kernels/splash_tpu.py); 0 for "
        "those of published records",
        low=0,
        changes=("recompile",),
    )


def check_attention_blocks(section: "Section") -> None:
    blocks = section.attention_blocks  # type: ignore[attr-defined]
    if len(blocks) not in (1, 8) or any(size % 128 for size in blocks):
        raise ConfigError(
            f"{section.show('attention_blocks')} is not one or eight multiples of 128 (0 for the default)"
        )


@dataclass(frozen=True, kw_only=True)
class GriffinConfig(Section):
    """Griffin, Hawk (pattern rec) and RecurrentGemma: arXiv 2402.19427, 2404.07839."""

    section: ClassVar[str] = "model"
    kind: ClassVar[str] = "griffin"
    vocab_size: int = setting(264, "rows of the embedding table", low=2, changes=_ARCH)
    width: int = setting(128, "model width D", low=1, changes=_ARCH)
    depth: int = setting(6, "residual blocks N", low=1, changes=_ARCH)
    rnn_width: int = setting(128, "recurrence width L", low=1, changes=_ARCH)
    mlp_width: int = setting(384, "hidden width F of one MLP branch (3 D in the paper)", low=1, changes=_ARCH)
    num_heads: int = setting(4, "query heads of the local attention (one key-value head)", low=1, changes=_ARCH)
    num_gate_blocks: int = setting(4, "diagonal blocks of the RG-LRU gates", low=1, changes=_ARCH)
    pattern: tuple[str, ...] = setting(
        ("rec", "rec", "attn"), "block kinds, repeated and cut at depth", choices=("rec", "attn"), changes=_ARCH
    )
    window: int = setting(64, "a query sees itself and this many earlier tokens", low=1, changes=_MATH)
    conv_width: int = setting(4, "taps of the causal convolution", low=1, changes=_ARCH)
    embedding_scale: bool = setting(False, "multiply embeddings by sqrt(D) (RecurrentGemma)", changes=_MATH)
    logits_soft_cap: float = setting(0.0, "c of c*tanh(logits/c); 0 for none", low=0, changes=_MATH)
    attention_blocks: tuple[int, ...] = attention_blocks()

    @property
    def tensors(self) -> tuple[str, ...]:
        """What of a layer `trainer.save` and `trainer.offload` can name, in the order of computation."""
        return ("input", *RECURRENCE * ("rec" in self.pattern), *ATTENTION * ("attn" in self.pattern), "mlp_up")

    def check(self) -> None:
        check_attention_blocks(self)
        divides(self, "num_heads", "width")
        divides(self, "num_gate_blocks", "rnn_width")
        if "attn" in self.pattern and (self.width // self.num_heads) % 4:
            head_dim = self.width // self.num_heads
            raise ConfigError(
                f"{self.show('num_heads')} gives heads of {head_dim} features: rotary embedding of half a head "
                f"needs a multiple of 4"
            )


@dataclass(frozen=True, kw_only=True)
class GemmaConfig(Section):
    """Gemma 1, 2 and 3 text models: arXiv 2403.08295, 2408.00118, 2503.19786."""

    section: ClassVar[str] = "model"
    kind: ClassVar[str] = "gemma"
    vocab_size: int = setting(264, "tokens, the first rows of the embedding table", low=2, changes=_ARCH)
    padding_rows: int = setting(
        0, "further rows, which are no tokens and have no probability (Gemma 1 and 2: 128)", low=0, changes=_ARCH
    )
    width: int = setting(128, "model width D", low=1, changes=_ARCH)
    depth: int = setting(6, "residual blocks L", low=1, changes=_ARCH)
    num_heads: int = setting(4, "query heads N", low=1, changes=_ARCH)
    num_kv_heads: int = setting(2, "key-value heads K", low=1, changes=_ARCH)
    head_dim: int = setting(32, "features of one head H", low=2, changes=_ARCH)
    mlp_width: int = setting(384, "hidden width F of one MLP branch", low=1, changes=_ARCH)
    pattern: tuple[str, ...] = setting(
        ("local", "local", "local", "local", "local", "global"),
        "attention kinds, repeated and cut at depth",
        choices=("local", "global"),
        changes=_ARCH,
    )
    window: int = setting(64, "keys a local query sees, itself included", low=1, changes=_MATH)
    query_scale: float = setting(0.0, "factor on queries; 0 means head_dim**-0.5", low=0, changes=_MATH)
    qk_norm: bool = setting(True, "RMSNorm on queries and keys (Gemma 3)", changes=_ARCH)
    post_norm: bool = setting(True, "RMSNorm on each sub-layer's output (Gemma 2 and 3)", changes=_ARCH)
    attention_soft_cap: float = setting(
        0.0, "soft cap on attention logits (Gemma 2: 50); 0 for none", low=0, changes=_MATH
    )
    logits_soft_cap: float = setting(0.0, "soft cap on output logits (Gemma 2: 30); 0 for none", low=0, changes=_MATH)
    rope_base_local: float = setting(1e4, "rotary base of local layers", above=1, changes=_MATH)
    rope_base_global: float = setting(1e6, "rotary base of global layers (Gemma 1 and 2: 1e4)", above=1, changes=_MATH)
    rope_divisor_global: float = setting(
        1.0, "divides positions in global layers (Gemma 3 4B and up: 8)", above=0, changes=_MATH
    )
    attention_blocks: tuple[int, ...] = attention_blocks()

    @property
    def table_rows(self) -> int:
        return self.vocab_size + self.padding_rows

    @property
    def tensors(self) -> tuple[str, ...]:
        """What of a layer `trainer.save` and `trainer.offload` can name, in the order of computation."""
        # A gradient asks for the MLP's result only where a norm follows it.
        return ("input", *ATTENTION, "mlp_up", *("mlp_out",) * self.post_norm)

    def check(self) -> None:
        check_attention_blocks(self)
        divides(self, "num_kv_heads", "num_heads")
        if self.head_dim % 2:
            raise ConfigError(f"{self.show('head_dim')} is odd: rotary embedding pairs features, give an even number")


@dataclass(frozen=True, kw_only=True)
class LRUConfig(Section):
    """Linear recurrent units and the recurrences that lead to them: arXiv 2303.06349."""

    section: ClassVar[str] = "model"
    kind: ClassVar[str] = "lru"
    pattern: ClassVar[tuple[str, ...]] = ("lru",)
    logits_soft_cap: ClassVar[float] = 0.0
    tensors: ClassVar[tuple[str, ...]] = ("input", "rnn_in", "rnn_out", "mlp_up")
    vocab_size: int = setting(264, "rows of the embedding table", low=2, changes=_ARCH)
    width: int = setting(128, "model width H", low=1, changes=_ARCH)
    depth: int = setting(6, "residual blocks", low=1, changes=_ARCH)
    state_size: int = setting(128, "modes N of a layer's state", low=1, changes=_ARCH)
    recurrence: str = setting(
        "lru",
        "the paper's steps: vanilla RNNs (tanh, relu), a dense real matrix without their nonlinearity, and from there on each "
        "with those before it: a complex diagonal one, its exponential form, which is stable, that form from a ring, and "
        "'lru' with normalised inputs",
        choices=("tanh", "relu", "dense", "diagonal", "exponential", "ring", "lru"),
        changes=_ARCH,
    )
    bidirectional: bool = setting(
        False, "read a row from its end, too, with states of its own (pooled rows; LRA's images)", changes=_ARCH
    )
    r_min: float = setting(
        0.9, "least modulus of an eigenvalue at the start (ring, lru)", low=0, below=1, changes=_MATH
    )
    r_max: float = setting(0.999, "greatest modulus (ring, lru)", above=0, high=1, changes=_MATH)
    max_phase: float = setting(
        2 * math.pi, "greatest phase (ring, lru; PathX: pi/10)", above=0, high=2 * math.pi, changes=_MATH
    )
    dropout: float = setting(
        0.0, "share of channels that a block drops, for a whole row", low=0, below=1, changes=_MATH
    )
    rate_factor: float = setting(
        1.0,
        "learning rate of eigenvalues, gamma and B (of a dense A and B) over that of the rest (LRA: 0.1 to 0.5)",
        above=0,
        changes=_MATH,
    )
    channels: int = setting(
        0, "numbers a step that a row has in place of a token (pooled rows); 0 for tokens", low=0, changes=_ARCH
    )
    pooling: str = setting(
        "none",
        "what is classified: every token's successor, a sequence by its mean, or by its last token",
        choices=("none", "mean", "last"),
        changes=_ARCH,
    )
    num_classes: int = setting(0, "classes of a pooled sequence; 0 where nothing is pooled", low=0, changes=_ARCH)
    pairs: bool = setting(
        False, "a row is two documents, pooled one by one; what is classified is both (LRA's retrieval)", changes=_ARCH
    )

    @property
    def dense(self) -> bool:
        """Whether a state is multiplied with a whole matrix, step by step."""
        return self.recurrence in ("tanh", "relu", "dense")

    @property
    def inputs(self) -> str:
        """The field of a batch that the model reads: tokens (B T), values (B T C), or pairs (B 2T)."""
        return "pairs" if self.pairs else "values" if self.channels else "tokens"

    def check(self) -> None:
        if self.r_min >= self.r_max:
            raise ConfigError(f"{self.show('r_min')} is not below {self.show('r_max')}: the ring has no area")
        for name, why in (
            ("bidirectional", "a token would see its successor"),
            ("channels", "numbers are no vocabulary"),
            ("pairs", "two documents have one class"),
        ):
            if self.pooling == "none" and getattr(self, name):
                raise ConfigError(
                    f"{self.show(name)} contradicts {self.show('pooling')}: {why}, 'mean' or 'last' is allowed"
                )
        if self.pooling == "none" and self.num_classes:
            raise ConfigError(f"{self.show('num_classes')} contradicts {self.show('pooling')}: tokens have 0 classes")
        if self.pooling != "none" and self.num_classes < 2:
            raise ConfigError(
                f"{self.show('num_classes')} contradicts {self.show('pooling')}: a sequence has 2 or more classes"
            )


@dataclass(frozen=True, kw_only=True)
class NFNetConfig(Section):
    """Normaliser-free ResNets, NFNet-F0 to F7+: arXiv 2102.06171."""

    section: ClassVar[str] = "model"
    kind: ClassVar[str] = "nfnet"
    num_classes: int = setting(10, "classes", low=2, changes=_ARCH)
    channels: int = setting(1, "channels of the input images", low=1, changes=_ARCH)
    stem_widths: tuple[int, ...] = setting(
        (8, 16, 16, 32), "output channels of the four stem convolutions", low=1, changes=_ARCH
    )
    widths: tuple[int, ...] = setting((64, 96, 128, 128), "output channels of the stages", low=1, changes=_ARCH)
    depths: tuple[int, ...] = setting((1, 1, 2, 1), "blocks of the stages", low=1, changes=_ARCH)
    group_width: int = setting(16, "channels of one convolution group", low=1, changes=_ARCH)
    bottleneck: float = setting(0.5, "mid channels over output channels of a block", above=0, high=1, changes=_ARCH)
    se_ratio: float = setting(0.5, "hidden over input channels of squeeze-excite", above=0, high=1, changes=_ARCH)
    alpha: float = setting(0.2, "scale of the residual branch", above=0, changes=_MATH)
    head_width: int = setting(256, "channels of the final convolution", low=1, changes=_ARCH)
    dropout: float = setting(0.0, "dropout rate on pooled features", low=0, below=1, changes=_MATH)
    stochastic_depth: float = setting(0.0, "drop rate the last block approaches", low=0, below=1, changes=_MATH)
    gelu_approximate: bool = setting(True, "tanh GELU (DeepMind) or erf GELU (timm)", changes=_MATH)
    ws_eps_mode: str = setting(
        "max_nvar",
        "weight standardisation's eps: DeepMind's rule or timm's",
        choices=("max_nvar", "add_var"),
        changes=_MATH,
    )

    @property
    def tensors(self) -> tuple[str, ...]:
        """What `trainer.save` and `trainer.offload` can name: a block's input and what its convolutions give, or all of a stage's."""
        return ("input", "reduce", "spatial", "expand", *(f"stage_{s}" for s in range(len(self.depths))))

    def check(self) -> None:
        if len(self.widths) != len(self.depths):
            raise ConfigError(
                f"{self.show('depths')} has {len(self.depths)} stages but {self.show('widths')} has {len(self.widths)}"
            )
        if len(self.stem_widths) != 4:
            raise ConfigError(
                f"{self.show('stem_widths')} has {len(self.stem_widths)} entries, the stem has 4 convolutions"
            )
        for width in self.widths:
            if int(self.bottleneck * width) < self.group_width:
                raise ConfigError(
                    f"{self.show('group_width')} is wider than the {int(self.bottleneck * width)} channels inside a block: "
                    f"{self.show('bottleneck')} of {self.show('widths')}"
                )


ModelConfig = GriffinConfig | GemmaConfig | LRUConfig | NFNetConfig
