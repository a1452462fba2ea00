"""What attention does for recall (arXiv 2503.21676, section 3.2): a Transformer learns with the attention maps of another one,
and the share of attention that names get where a value is asked for.

Shapes: B batch, T queries, S keys, N heads, H head features, D model width.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import reshard

from configs.schema import BiographyData, Config
from data import open_data
from launch.studies.study import Figures, trained
from models.blocks import rms_norm
from models.griffin import Griffin, LocalAttention
from trainer.evaluate import read_config
from trainer.program import make_program
from trainer.tasks import Batch, cross_entropy, make_task

STEPS, EVERY = 300, 25


def blocks_of(model: Griffin) -> list[Any]:
    """A Transformer's blocks, one by one."""
    groups = model.layers.groups["attn_0"]
    return [jax.tree.map(lambda leaf, i=i: leaf[i], groups) for i in range(model.layers.num_groups)]


def attention_maps(mixer: LocalAttention, x: jax.Array, segment_pos: jax.Array) -> jax.Array:
    """Softmax over earlier keys and the query's own, (B N T S) of x (B T D), for rows of one document and no window."""
    q, k, _ = mixer.projected(x, segment_pos)
    scores = jnp.einsum("btnh,bskh->bnts", q, k, out_sharding=mixer.spec("batch", "heads", None, None))
    return jax.nn.softmax(jnp.where(jnp.tril(jnp.ones(scores.shape[2:], bool))[None, None], scores, -jnp.inf), axis=-1)


def all_maps(model: Any, tokens: jax.Array, segment_pos: jax.Array) -> list[jax.Array]:
    """Attention maps (B N T S) of each block."""
    segment_pos = reshard(segment_pos, model.spec("batch", "seq"))
    x, maps = model.scaled(model.embedding(tokens, jnp.float32)), []
    for block in blocks_of(model):
        maps.append(attention_maps(block.mixer, rms_norm(x, block.temporal_norm[...]), segment_pos))
        x = block(x, segment_pos)
    return maps


def patched_logits(model: Any, tokens: jax.Array, maps: list[jax.Array]) -> jax.Array:
    """Logits (B T V) of a model whose blocks attend as `maps` say: its own are values, outputs and all that works on one token."""
    x = model.scaled(model.embedding(tokens, jnp.float32))
    for block, weights in zip(blocks_of(model), maps, strict=True):
        values = block.mixer.v(rms_norm(x, block.temporal_norm[...]))
        out = model.spec("batch", "seq", "heads", None)
        x = x + block.mixer.out(jnp.einsum("bnts,bskh->btnh", weights, values, out_sharding=out))
        x = x + block.mlp(rms_norm(x, block.mlp_norm[...]))
    return model.embedding.logits(rms_norm(x, model.final_norm[...]), 0.0)


def patched_nats(model: Griffin, reference: Griffin, batch: Batch) -> jax.Array:
    """-log p (B T) of the targets, with the reference's maps of the same rows."""
    maps = all_maps(jax.lax.stop_gradient(reference), batch["tokens"], batch["segment_pos"])
    return cross_entropy(patched_logits(model, batch["tokens"], maps), batch["targets"])


def with_maps_of(reference_run: pathlib.Path, config: Config) -> list[tuple[int, float]]:
    """(step, attribute loss) of a run of `config`, from its own start, that attends as the reference does."""

    def loss(model: Any, batch: Batch, key: jax.Array, *, teacher: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        nats = patched_nats(model, teacher, batch)
        weights = reshard(batch["weights"], jax.typeof(nats).sharding.spec)
        mean = jnp.sum(weights * nats) / jnp.sum(weights)
        return mean, {"loss": mean}

    @jax.jit
    def value_nats(model: Any, reference: Any, batch: Batch) -> jax.Array:
        nats = patched_nats(model, reference, batch)
        asked = (batch["values"] > 0) & (batch["group"] == 0)[:, None]
        return jnp.sum(jnp.where(reshard(asked, jax.typeof(nats).sharding.spec), nats, 0.0))

    data, curve = open_data(config.data), []
    assert isinstance(config.data, BiographyData)
    asked = config.data.held_out_rows * len(config.data.attributes)
    with trained(reference_run) as (_, reference, place):
        program = make_program(config, dataclasses.replace(make_task(config), loss=loss), jax.sharding.get_mesh())
        state = jax.jit(program.init)()
        step_program = program.trace(reference).lower().compile()
        for step in range(1, min(STEPS, config.trainer.steps) + 1):
            state, _ = step_program(state, place(data.train_batch(step - 1)), reference)
            if step % EVERY == 0:
                nats = sum(float(value_nats(state.model, reference, place(rows))) for rows in data.held_out_batches())
                curve.append((step, nats / asked))
    return curve


def attention_to_names(run: pathlib.Path) -> list[float]:
    """Of each block, how much of their attention (mean over heads) tokens that a value follows give to names: the people are those
    that the run itself has known longest."""
    with trained(run) as (config, model, place):
        data = config.data
        assert isinstance(data, BiographyData)
        held_out = open_data(data).held_out
        rows = held_out.read(np.arange(len(held_out)))
        rows |= {"names": (rows["tokens"] > 0) & (rows["tokens"] <= sum(data.names))}
        oldest = rows["group"] == (2 if data.first else 0)
        asks = (rows["values"] > 0) & oldest[:, None]
        maps = jax.jit(all_maps)(model, *(place(rows)[name] for name in ("tokens", "segment_pos")))
        return [float(np.einsum("bnts,bs->bnt", np.asarray(m), rows["names"]).mean(axis=1)[asks].mean()) for m in maps]


def measure(run: pathlib.Path, references: dict[str, pathlib.Path], tuned: dict[str, pathlib.Path]) -> Figures:
    """Curves of the same run with the maps of each reference, and the attention that names get in each of `tuned`."""
    config = read_config(run)
    return {
        "patched": {name: with_maps_of(reference, config) for name, reference in references.items()},
        "attention": {name: attention_to_names(one) for name, one in tuned.items()},
    }
