"""What the language models have in common: a table, a stack of blocks, a norm, and the table again.

Shapes: B batch, T tokens, D model width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import reshard

from models.blocks import Embedding, Stack, rms_norm
from models.params import Init, cast_kernels, zeros
from models.remat import Remat
from models.state import State, advance, visible


class LanguageModel(nnx.Module):
    """Tokens and positions to logits. A family gives its blocks, `block(config, kind, init)`, and the sizes of the logical
    axes that these have besides `embed` and `vocab`; it may scale embeddings. One with `drops` has blocks that take a key."""

    drops = False

    def __init__(self, config: Any, init: Init, block: Callable[..., nnx.Module], padding_rows: int = 0, **sizes: int):
        init = init.fitted(**sizes, embed=config.width, vocab=config.vocab_size + padding_rows)
        self.config, self.spec = config, init.spec
        self.embedding = Embedding(init.scope("embedding"), config.vocab_size, config.width, padding_rows)
        self.layers = Stack(
            init.scope("layers"), config.pattern, config.depth, lambda kind, scope: block(config, kind, scope)
        )
        self.final_norm = init.param("final_norm", (config.width,), (None,), zeros)

    def scaled(self, x: jax.Array) -> jax.Array:
        """Embeddings (B T D) as the first block gets them. The head reads the table without this."""
        return x

    def __call__(
        self,
        tokens: jax.Array,
        segment_pos: jax.Array,
        *,
        dtype: jnp.dtype,
        remat: Remat = "none",
        state: State | None = None,
    ) -> jax.Array | tuple[jax.Array, State]:
        """Logits (B T V), float32. tokens and segment_pos (B T); position 0 starts a document, -1 is padding.

        With a state (see models/state.py) the tokens continue those it has seen, and (logits, new state) is returned.
        Padding then belongs before a document: behind it, the state would have seen it.
        """
        found = self.features(tokens, segment_pos, dtype=dtype, remat=remat, state=state)
        x, state = found if isinstance(found, tuple) else (found, None)
        logits = self.embedding.logits(x, self.config.logits_soft_cap)
        return logits if state is None else (logits, state)

    def features(
        self,
        tokens: jax.Array,
        segment_pos: jax.Array,
        *,
        dtype: jnp.dtype,
        remat: Remat = "none",
        state: State | None = None,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array | tuple[jax.Array, State]:
        """What the table turns into logits (B T D), in `dtype`; otherwise as the call. Without a key nothing is dropped."""
        model = cast_kernels(self, dtype)
        segment_pos = reshard(segment_pos, self.embedding.spec("batch", "seq"))
        x = self.scaled(self.embedding(tokens, dtype))
        if state is None:
            x = model.layers(x, segment_pos, remat=remat, key=dropout_key if self.drops else None)
        else:
            documents, masks = visible(state, segment_pos, self.config)
            x, layers = model.layers.step(x, state.layers, segment_pos, masks)
            state = advance(state, layers, documents)
        x = rms_norm(x, model.final_norm[...])
        return x if state is None else (x, state)
