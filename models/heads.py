"""From features of whole rows, or of pairs of documents, to logits of classes.

Shapes: B batch, T tokens, D model width, K classes.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import reshard

from configs.schema import LRUConfig
from models.blocks import einsum_float32
from models.params import Init, normal, zeros


class Head(nnx.Module):
    """Features (B T D) of rows of one sequence each, and padding, to logits (B K) in float32; of pairs, (2B T D) to (B K)."""

    def __init__(self, config: LRUConfig, init: Init):
        width, classes = config.width, config.num_classes
        self.kernel = init.param("kernel", (width, classes), ("embed", None), normal(1 / width))
        self.bias = init.param("bias", (classes,), (None,), zeros)
        self.comparison = Comparison(config, init.scope("comparison")) if config.pairs else None
        self.pooling, self.spec = config.pooling, init.spec

    def __call__(self, x: jax.Array, segment_pos: jax.Array) -> jax.Array:
        real = segment_pos >= 0
        if self.pooling == "last":
            real = real & (segment_pos == jnp.max(segment_pos, axis=1, keepdims=True))
        share = real.astype(jnp.float32)
        share = share / jnp.maximum(jnp.sum(share, axis=1, keepdims=True), 1)
        pooled = einsum_float32("bt,btd->bd", share, x.astype(jnp.float32), self.spec("batch", None))
        if self.comparison is not None:
            pooled = self.comparison(pooled)
        kernel = reshard(self.kernel[...], self.spec(None, None))
        return einsum_float32("bd,dk->bk", pooled, kernel, self.spec("batch", None)) + self.bias[...][None]


class Comparison(nnx.Module):
    """gelu([e1, e2, e1 e2, e1 - e2] W + b), (B D), of the documents' pooled features (2B D), those of a pair in succession.

    These features are Long Range Arena's (arXiv 2011.04006, `classifier_head_dual`); one hidden layer of width D and its GELU
    are those of S5's code (arXiv 2208.04933, `RetrievalDecoder`), where S4 has ReLU.
    """

    def __init__(self, config: LRUConfig, init: Init):
        width = config.width
        self.kernel = init.param("kernel", (4, width, width), (None, "embed", None), normal(1 / (4 * width)))
        self.bias = init.param("bias", (width,), (None,), zeros)
        self.spec = init.spec

    def __call__(self, pooled: jax.Array) -> jax.Array:
        pairs = pooled.reshape(-1, 2, pooled.shape[1])
        one, two = pairs[:, 0], pairs[:, 1]
        compared = jnp.stack([one, two, one * two, one - two], axis=1)
        kernel = reshard(self.kernel[...], self.spec(None, None, None))
        return jax.nn.gelu(
            einsum_float32("bfd,fde->be", compared, kernel, self.spec("batch", None)) + self.bias[...][None]
        )


def one_by_one(rows: jax.Array) -> jax.Array:
    """Rows of pairs (B 2T) as rows of their documents (2B T), those of a pair in succession: a device keeps its own."""
    return rows.reshape(len(rows), 2, -1).reshape(2 * len(rows), -1)
