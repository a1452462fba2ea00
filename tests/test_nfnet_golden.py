"""NFNet computes what timm's dm_nfnet does (tests/golden/make_nfnet.py), logits and gradients, and each mistake shows."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published_nfnet import IMAGES, MODELS, directions, haiku_parameters, timm_parameters, weights

from configs.schema import NFNetConfig
from models.convert import nfnet
from models.convert.layout import to_ours, to_theirs
from models.convert.tensors import Tensor, in_memory
from models.nfnet import NFNet
from models.params import Init, named_leaves
from sharding.rules import Rules

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "nfnet.npz")
CASES = [(name, size) for name in MODELS for size in IMAGES]
LIMIT = 1e-4


def as_tensors(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: in_memory(x) for name, x in arrays.items()}


def model_of(config: NFNetConfig, tensors: dict[str, np.ndarray], layout: str = "timm") -> NFNet:
    """The golden model on the current mesh, out of tensors as timm or DeepMind has them."""
    shapes = jax.eval_shape(lambda key: NFNet(config, Init(key, Rules().spec)), jax.random.key(0))
    leaves = named_leaves(shapes)
    table = {"timm": nfnet.timm, "haiku": nfnet.haiku}[layout](config)
    ours = to_ours(config, table, {name: leaf.shape for name, leaf in leaves.items()}, as_tensors(tensors))
    placed = [jax.device_put(ours[name].whole(), leaf.sharding.spec) for name, leaf in leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(shapes), placed)


def logits_of(model: NFNet, size: int) -> np.ndarray:
    return np.asarray(jax.jit(lambda model, images: model(images))(model, jnp.asarray(IMAGES[size])))


def difference(name: str, size: int, config: NFNetConfig | None = None) -> float:
    logits = logits_of(model_of(config or MODELS[name], timm_parameters(name)), size)
    return float(np.abs(logits - GOLDEN[f"{name}/{size}/logits"]).max())


def gradients_of(name: str, model: NFNet, images: np.ndarray) -> dict[str, np.ndarray]:
    """Of sum(weights * logits), by timm's names and in timm's shapes."""
    config, weight = MODELS[name], jnp.asarray(weights(MODELS[name].num_classes))
    gradient = jax.jit(jax.grad(lambda model, x: jnp.sum(model(x) * weight)))(model, jnp.asarray(images))
    ours = as_tensors({leaf: np.asarray(x) for leaf, x in named_leaves(gradient).items()})
    return {tensor: x.whole() for tensor, x in to_theirs(config, nfnet.timm(config), ours).items()}


@pytest.mark.parametrize(("name", "size"), CASES)
def test_logits_equal_timms(one_device, name, size):
    found = difference(name, size)
    print(f"{name} {size}: logits differ by {found:.2g}")
    assert found <= LIMIT


@pytest.mark.parametrize(("name", "size"), [("tiny", 75), ("plus", 64)])
def test_every_gradient_equals_timms(one_device, name, size):
    found = gradients_of(name, model_of(MODELS[name], timm_parameters(name)), IMAGES[size])
    prefix = f"{name}/{size}/gradients/"
    assert {f"{prefix}{tensor}" for tensor in found} == {key for key in GOLDEN if key.startswith(prefix)}
    worst = {}
    for tensor, gradient in found.items():
        expected = GOLDEN[prefix + tensor]
        along = directions(tensor, gradient.shape) @ gradient.ravel()
        worst[tensor] = np.linalg.norm(along - expected) / np.linalg.norm(expected)
        if f"{name}/{size}/whole/{tensor}" in GOLDEN:
            whole = GOLDEN[f"{name}/{size}/whole/{tensor}"]
            np.testing.assert_allclose(gradient, whole, rtol=0, atol=1e-4 * np.abs(whole).max(), err_msg=tensor)
    tensor = max(worst, key=worst.get)
    print(f"{name} {size}: gradients differ by {worst[tensor]:.2g} ({tensor})")
    assert worst[tensor] <= LIMIT


@pytest.mark.parametrize("name", MODELS)
def test_haikus_names_hold_the_same_model(one_device, name):
    haiku = {f"{module}/{p}": x for module, leaves in haiku_parameters(name).items() for p, x in leaves.items()}
    ours = named_leaves(model_of(MODELS[name], timm_parameters(name)))
    same = named_leaves(model_of(MODELS[name], haiku, "haiku"))
    for leaf, x in ours.items():
        np.testing.assert_array_equal(np.asarray(x), np.asarray(same[leaf]), err_msg=leaf)


@pytest.mark.parametrize(("field", "value"), [("ws_eps_mode", "max_nvar"), ("gelu_approximate", True)])
def test_deepminds_rule_for_either_shows(one_device, field, value):
    assert difference("tiny", 64, dataclasses.replace(MODELS["tiny"], **{field: value})) > 3 * LIMIT


def swapped_taps(name: str) -> dict[str, nfnet.Row]:
    """(K K I O) with rows and columns of the kernel exchanged, as (3, 2, 1, 0) gives it: every shape is right."""
    rows = nfnet._timm_conv(name)
    kernel = rows["/kernel"]
    back = nfnet.Row(kernel.theirs, kernel.there, lambda parts: kernel.back(parts).swapaxes(0, 1))
    return rows | {"/kernel": back}


# Both have one shape.
EXCHANGED = nfnet.BLOCK_CONVS | {
    "spatial_0": nfnet.BLOCK_CONVS["spatial_1"],
    "spatial_1": nfnet.BLOCK_CONVS["spatial_0"],
}


@pytest.mark.parametrize("trap", ["rows and columns of kernels", "3x3 convolutions exchanged"])
def test_a_conversion_that_fits_but_is_wrong_shows(one_device, monkeypatch, trap):
    if trap == "rows and columns of kernels":
        monkeypatch.setitem(nfnet.TIMM, "conv", swapped_taps)
    else:
        monkeypatch.setattr(nfnet, "BLOCK_CONVS", EXCHANGED)
    assert difference("tiny", 64) > 100 * LIMIT
