"""Gemma 1, 2 and 3, text only (arXiv 2403.08295, 2408.00118, 2503.19786): local and global attention, tied embeddings.

The families differ in config fields alone. Layers repeat `config.pattern`, cut at `config.depth`.
Shapes: B batch, T tokens, D model width, N query heads, K key-value heads, H head features, F MLP width, V vocabulary.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import reshard

from configs.schema import GemmaConfig
from models.attention import self_attention
from models.blocks import GatedMLP, Linear, rms_norm, rope
from models.language_model import LanguageModel
from models.params import Init, zeros
from models.remat import named
from models.state import KeyValues, ring_attention


class Gemma(LanguageModel):
    """Gemma 1, 2 and 3."""

    def __init__(self, config: GemmaConfig, init: Init):
        super().__init__(config, init, Block, config.padding_rows, mlp=config.mlp_width, heads=config.num_heads)

    def scaled(self, x: jax.Array) -> jax.Array:
        return x * embedding_scale(self.config.width, x.dtype)


def embedding_scale(width: int, dtype: jnp.dtype) -> np.ndarray:
    """sqrt(D) in the activations' dtype: 55.5 for 55.4256 in bfloat16, in which the released models were trained."""
    return np.asarray(width**0.5, dtype)


class Block(nnx.Module):
    """Residual block: attention, then a gated MLP, each normalised before and, in Gemma 2 and 3, after."""

    def __init__(self, config: GemmaConfig, kind: str, init: Init):
        width, hidden, post = config.width, config.mlp_width, config.post_norm
        self.attention_norm = init.param("attention_norm", (width,), (None,), zeros)
        self.attention = Attention(config, kind, init.scope("attention"))
        self.attention_post_norm = init.param("attention_post_norm", (width,), (None,), zeros) if post else None
        self.mlp_norm = init.param("mlp_norm", (width,), (None,), zeros)
        # The papers give no initialisers, and the released code's are placeholders: variance 1 / fan-in everywhere.
        self.mlp = GatedMLP(
            init.scope("mlp"), width, hidden, up_variance=1 / width, down_variance=1 / hidden, bias=False
        )
        self.mlp_post_norm = init.param("mlp_post_norm", (width,), (None,), zeros) if post else None

    def __call__(self, x: jax.Array, segment_pos: jax.Array) -> jax.Array:
        return self.after_attention(x, self.attention(rms_norm(x, self.attention_norm[...]), segment_pos))

    def step(self, x: jax.Array, ring: KeyValues, segment_pos: jax.Array, masks: dict[str, jax.Array]):
        h, new = self.attention.step(rms_norm(x, self.attention_norm[...]), ring, segment_pos, masks)
        return self.after_attention(x, h), new

    def after_attention(self, x: jax.Array, h: jax.Array) -> jax.Array:
        # A post norm acts on the sub-layer's output, before it is added (Gemma 2 report, section 2).
        x = x + (h if self.attention_post_norm is None else rms_norm(h, self.attention_post_norm[...]))
        h = self.mlp(rms_norm(x, self.mlp_norm[...]))
        return x + (h if self.mlp_post_norm is None else rms_norm(h, self.mlp_post_norm[...]))


class Attention(nnx.Module):
    """Grouped-query attention: all of a document's past (global), or `window` keys, the query's own included (local)."""

    def __init__(self, config: GemmaConfig, kind: str, init: Init):
        width, heads, kv_heads, head = config.width, config.num_heads, config.num_kv_heads, config.head_dim
        self.q = Linear(init.scope("q"), (width,), (heads, head), ("embed", "heads", None), 1 / width, bias=False)
        self.k = Linear(init.scope("k"), (width,), (kv_heads, head), ("embed", "kv_heads", None), 1 / width, bias=False)
        self.v = Linear(init.scope("v"), (width,), (kv_heads, head), ("embed", "kv_heads", None), 1 / width, bias=False)
        self.out = Linear(
            init.scope("out"), (heads, head), (width,), ("heads", None, "embed"), 1 / (heads * head), bias=False
        )
        self.q_norm = init.param("q_norm", (head,), (None,), zeros) if config.qk_norm else None
        self.k_norm = init.param("k_norm", (head,), (None,), zeros) if config.qk_norm else None
        self.kind, local = kind, kind == "local"
        self.left = config.window - 1 if local else None  # self_attention counts the keys before the query's own
        self.base = config.rope_base_local if local else config.rope_base_global
        # Positions are compressed in global layers only, to extend the context (Gemma 3 report, section 2).
        self.divisor = 1.0 if local else config.rope_divisor_global
        self.query_scale = config.query_scale or head**-0.5
        self.soft_cap, self.blocks, self.spec = config.attention_soft_cap, config.attention_blocks, init.spec

    @jax.named_scope("attention")
    def __call__(self, x: jax.Array, segment_pos: jax.Array) -> jax.Array:
        q, k, v = self.projected(x, segment_pos)
        h = self_attention(q, k, v, segment_pos, self.left, self.soft_cap, blocks=self.blocks)
        return named(self.out(h), "attn_out")

    def step(
        self, x: jax.Array, ring: KeyValues, segment_pos: jax.Array, masks: dict[str, jax.Array]
    ) -> tuple[jax.Array, KeyValues]:
        q, k, v = self.projected(x, segment_pos)
        new = KeyValues(*(reshard(t, self.spec("batch", None, "kv_heads", None)) for t in (k, v)))
        return self.out(ring_attention(q, ring, new, masks[self.kind], self.spec, self.soft_cap)), new

    def projected(self, x: jax.Array, segment_pos: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Scaled queries (B T N H), keys and values (B T K H)."""
        q, k, v = (named(project(x), "qkv") for project in (self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = rms_norm(q, self.q_norm[...]), rms_norm(k, self.k_norm[...])
        q = rope(q, segment_pos, base=self.base, divisor=self.divisor)
        k = rope(k, segment_pos, base=self.base, divisor=self.divisor)
        return q * np.asarray(self.query_scale, q.dtype), k, v


def decays(name: str) -> bool:
    """Weight decay by name: matrices do, norms and the embedding table don't."""
    return name.endswith("kernel")


def train_flops(config: GemmaConfig, length: int) -> float:
    """Matrix FLOPs a token of one training step (backward = 2 x forward).

    Attention counts what the mask leaves, as published MFUs of Gemma 3 do: half the square, or the band of a window.
    """
    width, heads = config.width, config.num_heads * config.head_dim
    window = min(config.window, length)
    keys = {"local": window - window**2 / (2 * length), "global": length / 2}  # that a query sees, on average
    layers = [config.pattern[i % len(config.pattern)] for i in range(config.depth)]
    projections = 2 * width * (config.num_heads + config.num_kv_heads) * config.head_dim + 3 * width * config.mlp_width
    mixing = sum(2 * heads * keys[kind] for kind in layers)
    return 3 * 2 * (config.depth * projections + mixing + width * config.table_rows)
