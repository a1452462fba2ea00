"""NFNet equals timm's dm_nfnet, run live (extra `parity`): logits, every gradient, and what import and export leave behind."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published_nfnet import (
    IMAGES,
    MODELS,
    TIMM_ARGUMENTS,
    haiku_parameters,
    timm_parameters,
    value,
    weights,
    write_pickle,
)
from test_convert import done, refused
from test_nfnet_golden import GOLDEN, as_tensors, gradients_of, logits_of, model_of

from configs import EXPERIMENTS
from configs.nfnet import SIZES
from configs.schema import NFNetConfig
from configs.store import from_json
from launch.logits import image_logits
from models.convert import nfnet
from models.convert.layout import their_shapes, to_theirs
from models.convert.nfnet_config import CONVENTIONS, timm_arguments
from models.nfnet import NFNet
from models.params import Init, named_leaves
from sharding.rules import Rules

pytestmark = pytest.mark.parity
LIMIT = 1e-4


@pytest.fixture
def timm():
    pytest.importorskip("torchvision", reason="torchvision is not installed: `make test-parity` installs it")
    return pytest.importorskip("timm", reason="timm is not installed: `make test-parity` installs it")


def network_of(timm, arguments: dict, tensors: dict[str, np.ndarray]):
    """timm's own model with these tensors, nothing of ours between."""
    import torch

    network = timm.create_model(**arguments)
    network.load_state_dict({name: torch.from_numpy(x.copy()) for name, x in tensors.items()}, strict=True)
    return network.eval()


def their_logits(network, images: np.ndarray):
    import torch

    return network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))


def their_gradients(logits, network, weight: np.ndarray) -> dict[str, np.ndarray]:
    import torch

    (logits * torch.from_numpy(weight)).sum().backward()
    return {name: parameter.grad.numpy() for name, parameter in network.named_parameters()}


def worst_of(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> tuple[float, str]:
    assert found.keys() == expected.keys()
    return max((np.linalg.norm(found[n] - g) / np.linalg.norm(g), n) for n, g in expected.items())


@pytest.mark.parametrize("size", IMAGES)
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_every_gradient_equal_timms(timm, one_device, name, size):
    network, model = network_of(timm, TIMM_ARGUMENTS[name], timm_parameters(name)), MODELS[name]
    theirs = their_logits(network, IMAGES[size])
    np.testing.assert_allclose(theirs.detach().numpy(), GOLDEN[f"{name}/{size}/logits"], rtol=0, atol=1e-5)
    ours = model_of(model, timm_parameters(name))
    difference = np.abs(logits_of(ours, size) - theirs.detach().numpy()).max()
    assert difference <= LIMIT
    expected = their_gradients(theirs, network, weights(model.num_classes))
    worst, tensor = worst_of(gradients_of(name, ours, IMAGES[size]), expected)
    print(f"{name} {size}: logits differ by {difference:.2g}, gradients by {worst:.2g} ({tensor})")
    assert worst <= 1e-3  # a skip gain's is one number, and its terms nearly cancel


def full_model() -> NFNetConfig:
    return dataclasses.replace(EXPERIMENTS["nfnet-f0"]().model, **CONVENTIONS["timm"])


@pytest.mark.slow
def test_logits_and_every_gradient_of_the_full_dm_nfnet_f0_equal_timms(timm, one_device):
    network = timm.create_model("dm_nfnet_f0")
    tensors = {name: value(name, tuple(x.shape)) for name, x in network.state_dict().items()}
    network, images = network_of(timm, {"model_name": "dm_nfnet_f0"}, tensors), IMAGES[64]
    theirs = their_logits(network, images)
    weight = weights(1000)
    expected = their_gradients(theirs, network, weight)
    model = full_model()
    ours = model_of(model, tensors)

    def loss(model, images, weight):
        logits = model(images)
        return jnp.sum(logits * weight), logits

    (_, logits), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(ours, images, jnp.asarray(weight))
    theirs = theirs.detach().numpy()
    difference = np.abs(np.asarray(logits) - theirs).max()
    found = as_tensors({leaf: np.asarray(x) for leaf, x in named_leaves(gradient).items()})
    mine = {name: tensor.whole() for name, tensor in to_theirs(model, nfnet.timm(model), found).items()}
    worst, tensor = worst_of(mine, expected)
    print(
        f"dm_nfnet_f0: logits (std {theirs.std():.2g}) differ by {difference:.2g}, gradients by {worst:.2g} ({tensor})"
    )
    assert theirs.std() > 0.1
    assert difference <= LIMIT
    assert worst <= LIMIT


@pytest.mark.parametrize("name", [f"nfnet-{size}" for size in SIZES])
def test_published_models_have_the_tensors_that_timms_have(timm, one_device, name):
    """Names and shapes at full size, of which nothing is allocated on either side. timm has no F7 and builds it, too."""
    import torch

    model = EXPERIMENTS[name]().model
    arguments = timm_arguments(model)
    assert (arguments["model_name"] == f"dm_{name.replace('-', '_')}") == (name != "nfnet-f7")
    with torch.device("meta"):
        network = timm.create_model(**arguments)
    shapes = jax.eval_shape(lambda key: NFNet(model, Init(key, Rules().spec)), jax.random.key(0))
    ours = their_shapes(model, nfnet.timm(model), {n: leaf.shape for n, leaf in named_leaves(shapes).items()})
    assert ours == {n: tuple(x.shape) for n, x in network.state_dict().items()}


def test_timm_gives_a_plus_model_another_stem(timm):
    """Which is why these are not exported: 192 channels give 24, 48, 96 before them there."""
    import torch

    with torch.device("meta"):
        network = timm.create_model("dm_nfnet_f0", channels=(384, 768, 2048, 2048), stem_chs=192, num_features=4096)
    assert [network.get_parameter(f"stem.conv{i}.weight").shape[0] for i in range(1, 5)] == [24, 48, 96, 192]
    assert network.get_parameter("stages.0.0.conv2.weight").shape == (128, 128, 3, 3)


@pytest.mark.parametrize("name", MODELS)
def test_timm_loads_what_we_export_and_we_what_it_saves(timm, tmp_path, name):
    import torch
    from safetensors.torch import load_file
    from timm.models import save_for_hf

    network = network_of(timm, TIMM_ARGUMENTS[name], timm_parameters(name))
    save_for_hf(network, tmp_path / "theirs", safe_serialization=True)
    done("import", tmp_path / "theirs", "--to", tmp_path / "run", "--verify")
    done("export", tmp_path / "run", "--format", "timm", "--to", tmp_path / "timm")
    again = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    strict = timm.create_model(**TIMM_ARGUMENTS[name]).eval()
    strict.load_state_dict(load_file(tmp_path / "timm" / "model.safetensors"), strict=True)
    config = from_json((tmp_path / "run" / "config.json").read_text())
    assert list(again.pretrained_cfg["input_size"]) == [3, config.data.image_size, config.data.image_size]
    with torch.no_grad():
        theirs, *same = (their_logits(n, IMAGES[75]).numpy() for n in (network, again, strict))
    for logits in same:
        np.testing.assert_array_equal(logits, theirs)
    difference = np.abs(image_logits(tmp_path / "run", config, IMAGES[75]) - theirs).max()
    print(f"{name}: exported logits differ by {difference:.2g}")
    assert difference <= LIMIT


def test_the_config_json_that_timm_saves_is_understood(timm, tmp_path):
    from timm.models import save_for_hf

    network = network_of(timm, TIMM_ARGUMENTS["plus"], timm_parameters("plus"))
    save_for_hf(network, tmp_path / "theirs", safe_serialization=True)
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["architecture"] == "dm_nfnet_f0"
    done("import", tmp_path / "theirs", "--to", tmp_path / "run")
    assert from_json((tmp_path / "run" / "config.json").read_text()).model == MODELS["plus"]


def test_timms_other_networks_are_refused(timm, tmp_path, capsys):
    from timm.models import save_for_hf

    for name in ("test_nfnet", "nfnet_f0"):
        small = {} if name == "test_nfnet" else dict(depths=(1, 1, 1, 1), channels=(32, 64, 96, 96), group_size=16)
        save_for_hf(timm.create_model(name, **small), tmp_path / name, safe_serialization=True)
        for source in (tmp_path / name, tmp_path / name / "model.safetensors"):
            said = refused(capsys, ["import", source, "--to", tmp_path / "run"], 4)
            assert "of timm's NFNets only those named dm_nfnet_... are DeepMind's" in said


def test_verify_imports_nothing_that_differs(timm, tmp_path, capsys):
    from safetensors.numpy import save_file

    save_file(timm_parameters("tiny"), tmp_path / "a.safetensors")
    words = ["import", tmp_path / "a.safetensors", "--to", tmp_path / "run", "--verify"]
    said = refused(capsys, [*words, "--model.ws_eps_mode", "max_nvar"], 4)
    assert said.endswith("more than 0.0001: nothing was imported")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", MODELS)
def test_deepminds_weights_in_timm_differ_by_what_the_readme_says(timm, tmp_path, capsys, name):
    """By far more than rounding and less than the logits themselves; kernels here are smaller than fresh ones."""
    import torch

    done("import", write_pickle(tmp_path / "F0_haiku.npz", haiku_parameters(name)), "--to", tmp_path / "run")
    done("export", tmp_path / "run", "--format", "timm", "--to", tmp_path / "timm")
    assert "logits there differ by" in capsys.readouterr().out
    network = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    with torch.no_grad():
        theirs = their_logits(network, IMAGES[64]).numpy()
    config = from_json((tmp_path / "run" / "config.json").read_text())
    assert np.abs(image_logits(tmp_path / "run", config, IMAGES[64]) - theirs).max() > 100 * LIMIT
