"""The two Griffins that `benchmarks.step` compares: same parameters, same batch, each in its own natural form."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.sides import Batch, Case, Figures, jax_figures, our_loss
from configs.griffin import PAPER, tiny
from configs.schema import Config, GriffinConfig, TextData, TrainerConfig
from models.convert.peers import recurrentgemma_model
from models.params import named_leaves
from sharding.mesh import one_device_mesh
from sharding.rules import Rules
from trainer.tasks import make_task
from trainer.trees import concrete


def of_400m(depth: int, vocab_size: int, rows: int, length: int) -> Config:
    """The 400M's layers with 16 heads, since the reference has one number for heads and gate blocks, 16 in the paper."""
    config = PAPER["griffin-400m"]()
    assert isinstance(config.model, GriffinConfig)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, depth=depth, vocab_size=vocab_size, num_heads=16),
        data=TextData(batch_size=rows, sequence_length=length),
        trainer=TrainerConfig(remat="dots"),
    )


CASES = {
    "tiny": Case("griffin-tiny", tiny, warm_up=2, steps=8),
    "block": Case(
        "one group of Griffin 400M", lambda: of_400m(depth=3, vocab_size=264, rows=1, length=2048), warm_up=1, steps=3
    ),
    "400m": Case("Griffin 400M", lambda: of_400m(depth=12, vocab_size=256_000, rows=1, length=256), warm_up=1, steps=2),
}
SIDES = ("podwright", "recurrentgemma")
NOTE = (
    "Ours saves matrix products and recomputes what lies between (remat=dots), the reference saves everything, which is "
    "its faster way."
)
# The reference's names of a block's parameters, piece by piece, and ours.
RENAMED = (
    ("temporal_pre_norm/scale", "temporal_norm"),
    ("channel_pre_norm/scale", "mlp_norm"),
    ("mlp_block/ffw_", "mlp/"),
    ("attention_block/proj_final", "mixer/out"),
    ("attention_block/proj_", "mixer/"),
    ("recurrent_block/", "mixer/"),
    ("conv_1d/w", "conv_taps"),
    ("conv_1d/b", "conv_bias"),
    ("rg_lru/", ""),
)
Side = tuple[Any, Callable[[Any, Batch], jax.Array]]  # parameters, loss(parameters, batch)


def measure(side: str, case: Case) -> Figures:
    with jax.set_mesh(one_device_mesh()):
        parameters, loss = {"podwright": ours, "recurrentgemma": reference}[side](case.config())
        return jax_figures(case, parameters, loss)


def ours(config: Config) -> Side:
    task = make_task(config)
    shapes = jax.eval_shape(lambda key: task.init(key, Rules().spec), jax.random.key(0))
    layout = concrete(shapes, jax.sharding.get_mesh())
    values = our_values(config.model, named_leaves(reference(config)[0]))
    placed = [
        jax.device_put(values.pop(name).reshape(leaf.shape), leaf.sharding)
        for name, leaf in named_leaves(layout).items()
    ]
    assert not values, f"no place for {', '.join(values)}"
    return jax.tree.unflatten(jax.tree.structure(shapes), placed), our_loss(config)


def reference(config: Config) -> Side:
    """As its documentation calls it; it has one number for attention heads and gate blocks."""
    assert isinstance(config.model, GriffinConfig)
    network = recurrentgemma_model(config.model)
    tokens = jnp.zeros((1, 2), jnp.int32)
    parameters = network.init(jax.random.key(0), tokens, tokens)["params"]

    def loss(parameters: Any, batch: Batch) -> jax.Array:
        logits, _ = network.apply({"params": parameters}, batch["tokens"], batch["segment_pos"], return_cache=False)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]))

    return parameters, loss


def our_values(model: Any, theirs: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    """The reference's parameters by our names, the layers of a scanned group stacked."""
    assert model.depth % len(model.pattern) == 0, "a tail of unscanned layers is not handled here"
    found: dict[str, list[np.ndarray]] = {}
    for i in range(model.depth):
        place = i % len(model.pattern)
        for name, value in theirs.items():
            block, _, rest = name.partition("/")
            if block == f"blocks.{i}":
                array = np.asarray(value)
                array = array.swapaxes(0, 1) if rest.endswith("ffw_up/w") else array  # ours is (D 2 F)
                found.setdefault(f"layers/groups/{model.pattern[place]}_{place}/{our_name(rest)}", []).append(array)
    outer = {"embedding/table": "embedder/input_embedding", "final_norm": "final_norm/scale"}
    return {name: np.stack(layers) for name, layers in found.items()} | {
        name: np.asarray(theirs[other]) for name, other in outer.items()
    }


def our_name(theirs: str) -> str:
    for old, new in RENAMED:
        theirs = theirs.replace(old, new)
    stem, _, leaf = theirs.rpartition("/")
    leaf = {"w": "kernel", "b": "bias"}.get(leaf, leaf)
    return f"{stem}/{leaf}" if stem else leaf
