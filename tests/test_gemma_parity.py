"""Gemma equals other people's implementations, run live: transformers (extra `parity`) and DeepMind's package `gemma`."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published_gemma import (
    LONG,
    MODELS,
    WEIGHT,
    flax_parameters,
    hf_config,
    hf_tensors,
    orbax_tree,
    tokens_of,
    write_orbax,
)
from test_convert import done
from test_gemma_convert import config_file
from test_gemma_golden import POSITIONS, as_tensors, logits_of, model_of

from configs import EXPERIMENTS
from configs import gemma as gemma_sizes
from configs.store import from_json
from launch.cli import main
from models.convert import gemma, gemma_config
from models.convert.layout import their_shapes, to_theirs
from models.convert.peers import gemma_logits, gemma_model, gemma_parameters, transformers_logits
from models.gemma import Gemma
from models.params import Init, named_leaves
from sharding.mesh import one_device_mesh
from sharding.rules import Rules
from trainer.evaluate import load_model

pytestmark = pytest.mark.parity
LIMIT = 1e-4


@pytest.fixture
def transformers(usual_promotion):
    pytest.importorskip("torch", reason="torch is not installed: `make test-parity` installs it")
    return pytest.importorskip("transformers", reason="transformers is not installed: `make test-parity` installs it")


@pytest.fixture
def deepmind(usual_promotion):
    reason = "no release of gemma with gemma.transformer (2.0 to 3.0) is installed"
    return pytest.importorskip("gemma.transformer", reason=reason, exc_type=ImportError)


@pytest.fixture
def usual_promotion():
    """The peers are not written for our strict rules."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def network_of(transformers, name: str):
    """transformers' own model of the published config and tensors, nothing of ours between."""
    import torch

    model = MODELS.get(name, LONG)
    config = transformers.AutoConfig.for_model(**hf_config(model))
    network = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    state = {n: torch.from_numpy(x) for n, x in hf_tensors(flax_parameters(model), model).items()}
    absent, unexpected = network.load_state_dict(state, strict=False)
    assert set(absent) <= {"lm_head.weight"}
    assert not unexpected
    return network


def their_logits(network, tokens: np.ndarray):
    import torch

    return network(torch.from_numpy(tokens.astype(np.int64)), use_cache=False).logits


def loaded(run: pathlib.Path):
    config = from_json((run / "config.json").read_text())
    mesh = one_device_mesh()
    with jax.set_mesh(mesh):
        return load_model(run, config, mesh)[0]


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_every_gradient_equal_transformers(transformers, one_device, name):
    """A whole document, unpacked; the row of the second test below is packed."""
    import torch

    config, tokens = MODELS[name], tokens_of(1, 45)
    network = network_of(transformers, name)
    theirs = their_logits(network, tokens)
    (theirs * torch.from_numpy(WEIGHT)).sum().backward()

    weight = jnp.asarray(np.pad(WEIGHT, ((0, 0), (0, config.padding_rows))))[None]

    def loss(model):
        logits = model(jnp.asarray(tokens), jnp.asarray(POSITIONS[:1]), dtype=jnp.float32)
        return jnp.sum(logits * weight), logits

    (_, logits), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(model_of(config))
    difference = np.abs(np.asarray(logits)[..., :48] - theirs.detach().numpy()).max()
    assert difference <= LIMIT
    ours = as_tensors({leaf: np.asarray(value) for leaf, value in named_leaves(gradient).items()})
    mine = {n: t.whole() for n, t in to_theirs(config, gemma.hf(config), ours).items()}
    their_gradients = {n: p.grad.numpy() for n, p in network.named_parameters()}
    assert mine.keys() == their_gradients.keys()
    worst = {n: np.linalg.norm(mine[n] - g) / np.linalg.norm(g) for n, g in their_gradients.items()}
    leaf = max(worst, key=worst.get)
    print(f"{name}: logits differ by {difference:.2g}, gradients by {worst[leaf]:.2g} ({leaf})")
    assert worst[leaf] <= 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_packed_documents_equal_each_alone_in_transformers(transformers, one_device, name):
    tokens = tokens_of(2, 45)[1:]
    network = network_of(transformers, name)
    alone = [their_logits(network, part).detach().numpy() for part in (tokens[:, :14], tokens[:, 14:])]
    logits = logits_of(model_of(MODELS[name]), tokens, POSITIONS[1:])
    difference = np.abs(logits - np.concatenate(alone, axis=1)).max()
    print(f"{name}: packed logits differ by {difference:.2g}")
    assert difference <= LIMIT


def test_logits_of_8192_positions_equal_transformers(transformers, one_device):
    import torch

    tokens = tokens_of(1, 8192)
    with torch.no_grad():
        theirs = their_logits(network_of(transformers, "long"), tokens).numpy()
    difference = np.abs(logits_of(model_of(LONG), tokens, np.arange(8192, dtype=np.int32)[None]) - theirs).max()
    print(f"8192 positions: logits differ by {difference:.2g}")
    assert difference <= LIMIT


@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_what_we_export_and_we_what_it_saves(transformers, tmp_path, name):
    import torch

    model, tokens = MODELS[name], tokens_of(1, 45)
    write_orbax(tmp_path / "theirs", orbax_tree(flax_parameters(model), model, "flat"))
    done("import", tmp_path / "theirs", "--to", tmp_path / "run", "--config", config_file(tmp_path, model))
    done("export", tmp_path / "run", "--format", "hf", "--to", tmp_path / "hf")
    network, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    theirs = their_logits(network.eval(), tokens).detach().numpy()
    with jax.set_mesh(one_device_mesh()):
        logits = logits_of(loaded(tmp_path / "run"), tokens, POSITIONS[:1])
    difference = np.abs(logits - theirs).max()
    print(f"{name}: exported logits differ by {difference:.2g}")
    assert difference <= LIMIT

    network.save_pretrained(tmp_path / "saved", max_shard_size="50KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    done("import", tmp_path / "saved", "--to", tmp_path / "again", "--verify")
    with jax.set_mesh(one_device_mesh()):
        again = logits_of(loaded(tmp_path / "again"), tokens, POSITIONS[:1])
    np.testing.assert_allclose(again, logits, rtol=0, atol=1e-5)  # a table without padding rows is summed otherwise


def test_a_multimodal_model_that_transformers_saves_is_imported(transformers, tmp_path):
    import torch

    vision = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=28)
    text = hf_config(MODELS["gemma3 4b"]) | {"vocab_size": 64}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision | {"patch_size": 14}, image_token_index=63
    )
    torch.manual_seed(0)
    network = transformers.Gemma3ForConditionalGeneration(config).float().eval()
    network.save_pretrained(tmp_path / "theirs")
    done("import", tmp_path / "theirs", "--to", tmp_path / "run")
    tokens = tokens_of(1, 45)
    with torch.no_grad():
        theirs = network(torch.from_numpy(tokens.astype(np.int64)), use_cache=False).logits.numpy()[..., :48]
    with jax.set_mesh(one_device_mesh()):
        difference = np.abs(logits_of(loaded(tmp_path / "run"), tokens, POSITIONS[:1]) - theirs).max()
    assert difference <= LIMIT


def test_verify_imports_nothing_that_differs(transformers, tmp_path, capsys, monkeypatch):
    model = MODELS["gemma2 27b"]
    write_orbax(tmp_path / "theirs", orbax_tree(flax_parameters(model), model, "flat"))
    done("import", tmp_path / "theirs", "--to", tmp_path / "run", "--config", config_file(tmp_path, model))
    done("export", tmp_path / "run", "--format", "hf", "--to", tmp_path / "hf")
    monkeypatch.setattr("models.gemma.embedding_scale", lambda width, dtype: np.asarray(1.1 * width**0.5, dtype))
    words = ["import", tmp_path / "hf", "--to", tmp_path / "wrong", "--verify"]
    assert main([str(word) for word in words]) == 4
    assert capsys.readouterr().err.endswith("more than 0.001: nothing was imported\n")
    assert not (tmp_path / "wrong").exists()


def test_transformers_peer_is_the_network_of_the_published_config(transformers):
    """What --verify compares with is built from our config.json: the same as from the published one."""
    for name, model in MODELS.items():
        tensors, tokens = hf_tensors(flax_parameters(model), model), tokens_of(1, 45)
        ours = transformers_logits(gemma_config.to_hf)(model, as_tensors(tensors), tokens)
        np.testing.assert_array_equal(ours, their_logits(network_of(transformers, name), tokens).detach().numpy())


@pytest.mark.parametrize("name", gemma_sizes.PUBLISHED)
def test_published_models_have_the_tensors_that_transformers_has(transformers, one_device, name):
    """Names and shapes of every tensor at full size, of which nothing is allocated on either side."""
    import torch

    model = EXPERIMENTS[name]().model
    described = gemma_config.to_hf(model)
    with torch.device("meta"):
        network = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**described))
    shapes = jax.eval_shape(lambda key: Gemma(model, Init(key, Rules().spec)), jax.random.key(0))
    ours = their_shapes(model, gemma.hf(model), {n: leaf.shape for n, leaf in named_leaves(shapes).items()})
    assert ours == {n: tuple(parameter.shape) for n, parameter in network.named_parameters()}


# --- DeepMind's own package ---


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_every_gradient_equal_deepminds(deepmind, one_device, name):
    config, tokens = MODELS[name], jnp.asarray(tokens_of(1, 45))
    positions, mask = jnp.asarray(POSITIONS[:1]), jnp.tri(45, dtype=bool)[None]
    weight = jnp.asarray(np.pad(WEIGHT, ((0, 0), (0, config.padding_rows))))[None]
    network = gemma_model(config)
    named, _ = gemma.named("flax", as_tensors(flax_parameters(config)))
    parameters = jax.tree.map(jnp.asarray, gemma_parameters(config, named))

    def their_loss(parameters):
        logits, _ = network.apply({"params": parameters}, tokens, positions, None, mask)
        return jnp.sum(logits * weight), logits

    def our_loss(model):
        logits = model(tokens, positions, dtype=jnp.float32)
        return jnp.sum(logits * weight), logits

    (_, theirs), their_gradient = jax.jit(jax.value_and_grad(their_loss, has_aux=True))(parameters)
    (_, logits), gradient = jax.jit(jax.value_and_grad(our_loss, has_aux=True))(model_of(config, "flat"))
    difference = float(jnp.abs(logits - theirs)[..., :48].max())
    assert difference <= LIMIT
    ours = as_tensors({leaf: np.asarray(value) for leaf, value in named_leaves(gradient).items()})
    mine = named_leaves(gemma_parameters(config, to_theirs(config, gemma.flax(config), ours)))
    worst = {}
    for leaf, g in named_leaves(their_gradient).items():
        g, own = np.asarray(g), mine[leaf]
        if leaf == "embedder/input_embedding":
            g, own = g[:48], own[:48]  # theirs has no mask, so that its padding rows have a gradient
        worst[leaf] = np.linalg.norm(own - g) / np.linalg.norm(g)
    assert worst.keys() == mine.keys()
    leaf = max(worst, key=worst.get)
    print(f"{name}: logits differ by {difference:.2g}, gradients by {worst[leaf]:.2g} ({leaf})")
    assert worst[leaf] <= 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_deepminds_package_loads_what_we_export(deepmind, tmp_path, name):
    from gemma import params

    model, tokens = MODELS[name], tokens_of(1, 45)
    write_orbax(tmp_path / "theirs", orbax_tree(flax_parameters(model), model, "flat"))
    done("import", tmp_path / "theirs", "--to", tmp_path / "run", "--config", config_file(tmp_path, model), "--verify")
    done("export", tmp_path / "run", "--format", "flax", "--to", tmp_path / "flax")
    tree = params.load_and_format_params(str((tmp_path / "flax" / "small").absolute()))["transformer"]
    expected = gemma_parameters(model, gemma.named("flax", as_tensors(flax_parameters(model)))[0])
    for layer in (child for name, child in tree.items() if name.startswith("layer_") and model.post_norm):
        layer["mlp"]["gating_einsum"] = layer["mlp"]["gating_einsum"].swapaxes(1, 2)
    jax.tree.map(np.testing.assert_array_equal, tree, expected)
    theirs = gemma_logits(model, gemma.named("flax", as_tensors(flax_parameters(model)))[0], tokens)
    with jax.set_mesh(one_device_mesh()):
        difference = np.abs(logits_of(loaded(tmp_path / "run"), tokens, POSITIONS[:1]) - theirs).max()
    assert difference <= LIMIT
