"""Gemma 1, 2 and 3 compute what Hugging Face's do (tests/golden/make_gemma.py): logits, gradients, 8192 positions."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published_gemma import LONG, MODELS, WEIGHT, flax_parameters, hf_tensors, orbax_tree, tokens_of

from configs.schema import GemmaConfig
from models.convert import gemma
from models.convert.layout import to_ours, to_theirs
from models.convert.tensors import Tensor, in_memory
from models.gemma import Gemma
from models.params import Init, named_leaves
from sharding.rules import Rules

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "gemma.npz")
POSITIONS = np.stack([np.arange(45), np.concatenate([np.arange(14), np.arange(31)])]).astype(np.int32)


def as_tensors(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: in_memory(x) for name, x in arrays.items()}


def model_of(config: GemmaConfig, source: str = "hf") -> Gemma:
    """The golden model on the current mesh, out of tensors as Hugging Face or DeepMind has them."""
    shapes = jax.eval_shape(lambda key: Gemma(config, Init(key, Rules().spec)), jax.random.key(0))
    leaves, flax = named_leaves(shapes), flax_parameters(config)
    theirs = hf_tensors(flax, config)
    if source != "hf":
        tree = orbax_tree(flax, config, source)
        theirs = {"/".join(step.key for step in path): x for path, x in jax.tree.flatten_with_path(tree)[0]}
    layout = gemma.hf(config) if source == "hf" else gemma.flax(config)
    named, images = gemma.named(layout.name, as_tensors(theirs))
    assert not images
    ours = to_ours(config, layout, {name: leaf.shape for name, leaf in leaves.items()}, named)
    mesh = jax.sharding.get_mesh()
    placed = [
        jax.device_put(ours[n].whole(), jax.sharding.NamedSharding(mesh, leaf.sharding.spec))
        for n, leaf in leaves.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(shapes), placed)


def logits_of(model: Gemma, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
    tokens, positions = jnp.asarray(tokens), jnp.asarray(positions)
    return np.asarray(jax.jit(lambda m: m(tokens, positions, dtype=jnp.float32))(model))[..., :48]


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_whole_and_packed_documents_equal_transformers(one_device, name):
    """Nine windows of 5 tokens; each packed document as if it were alone."""
    logits = logits_of(model_of(MODELS[name]), tokens_of(2, 45), POSITIONS)
    difference = np.abs(logits - GOLDEN[f"{name}/logits"]).max()
    print(f"{name}: logits differ by {difference:.2g}")
    assert difference <= 2e-5


SLOW = ("gemma1 mqa", "gemma3 1b")  # the others have all of their parameters


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in MODELS])
def test_every_gradient_equals_transformers(one_device, name):
    config = MODELS[name]
    tokens, positions = jnp.asarray(tokens_of(1, 45)), jnp.asarray(POSITIONS[:1])
    weight = jnp.asarray(np.pad(WEIGHT, ((0, 0), (0, config.padding_rows))))[None]

    def loss(model):
        return jnp.sum(model(tokens, positions, dtype=jnp.float32) * weight)

    gradient = named_leaves(jax.jit(jax.grad(loss))(model_of(config)))
    ours = as_tensors({leaf: np.asarray(value) for leaf, value in gradient.items()})
    worst = {}
    for tensor, value in to_theirs(config, gemma.hf(config), ours).items():
        array, expected = value.whole(), GOLDEN[f"{name}/gradients/{tensor}"]
        # The directions of make_gemma.py: what differs, in 8 of them, over what there is.
        rng = np.random.default_rng(sum(map(ord, tensor)))
        found = rng.standard_normal((8, array.size)).astype(np.float32) @ array.ravel()
        worst[tensor] = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert len(worst) == sum(key.startswith(f"{name}/gradients/") for key in GOLDEN)
    tensor = max(worst, key=worst.get)
    print(f"{name}: gradients differ by {worst[tensor]:.2g} ({tensor})")
    assert worst[tensor] <= 1e-4


@pytest.mark.parametrize("layout", ["flat", "nested", "stacked"])
@pytest.mark.parametrize("name", ["gemma1 mha", "gemma1 mqa", "gemma2 27b", "gemma3 4b"])
def test_deepminds_layouts_hold_the_same_model(one_device, name, layout):
    ours, same = (named_leaves(model_of(MODELS[name], source)) for source in ("hf", layout))
    for leaf in ours:
        value = np.asarray(same[leaf])
        value = value[:48] if leaf == "embedding/table" else value
        np.testing.assert_array_equal(np.asarray(ours[leaf])[: len(value)], value, err_msg=leaf)


@pytest.fixture(scope="module")
def long_row() -> tuple[np.ndarray, np.ndarray]:
    return tokens_of(1, 8192), np.arange(8192, dtype=np.int32)[None]


def long_difference(config: GemmaConfig, row: tuple[np.ndarray, np.ndarray]) -> float:
    logits = logits_of(model_of(config), *row)[0, GOLDEN["long/places"]]
    return float(np.abs(logits - GOLDEN["long/logits"]).max())


def test_logits_up_to_position_8191_equal_transformers(one_device, long_row):
    """Gemma 3's bases and divisor, where loss and short prompts show neither."""
    difference = long_difference(LONG, long_row)
    print(f"8192 positions: logits differ by {difference:.2g}")
    assert difference <= 2e-5


@pytest.mark.parametrize(
    "change",
    [dict(rope_divisor_global=1.0), dict(rope_base_global=1e4), dict(rope_base_local=1e6), dict(window=65)],
    ids=lambda change: next(iter(change)),
)
@pytest.mark.slow
def test_each_rotary_fault_shows_among_8192_positions(one_device, long_row, change):
    assert long_difference(dataclasses.replace(LONG, **change), long_row) > 1e-2
