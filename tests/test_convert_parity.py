"""Converted models compute what the packages compute that the checkpoints come from: needs the extra `parity`."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published import MODEL, V, W, config_file, flax_parameters, hf_tensors, nest, read_flax, write_flax, write_hf
from test_griffin import our_name

from configs.store import from_json
from launch.cli import main
from models.convert.peers import recurrentgemma_model
from models.params import named_leaves
from sharding.mesh import one_device_mesh
from trainer.evaluate import load_model

pytestmark = pytest.mark.parity
T = 3 * W + 5  # longer than two windows


def needs(package: str):
    return pytest.importorskip(package, reason=f"{package} is not installed: `make test-parity` installs it")


@pytest.fixture
def usual_promotion():
    """The peers are not written for our strict rules."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def done(*words) -> None:
    assert main([str(word) for word in words]) == 0


def rows(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and positions (2 T): whole documents, two packed in each row, or padded on the left."""
    tokens = np.random.default_rng(1).integers(V, size=(2, T)).astype(np.int32)
    alone = np.arange(T, dtype=np.int32)
    if kind == "packed":
        return tokens, np.stack([np.where(alone < cut, alone, alone - cut) for cut in (9, 11)])
    if kind == "left padded":
        return tokens, np.stack([np.maximum(alone - pads, -1) for pads in (4, 7)])
    return tokens, np.stack([alone, alone])


def ours(run: pathlib.Path):
    """The model of a run's newest checkpoint and the mesh of one device it lies on."""
    config = from_json((run / "config.json").read_text())
    mesh = one_device_mesh()
    with jax.set_mesh(mesh):
        model, _ = load_model(run, config, mesh)
    return model, mesh


@pytest.fixture(scope="module", params=["from flax", "from hf"])
def run(request, tmp_path_factory) -> pathlib.Path:
    place = tmp_path_factory.mktemp("run")
    if request.param == "from flax":
        write_flax(place / "theirs", flax_parameters())
        done("import", place / "theirs", "--to", place / "run", "--config", config_file(place))
    else:
        write_hf(place / "theirs", hf_tensors(flax_parameters()))
        done("import", place / "theirs", "--to", place / "run")
    return place / "run"


@pytest.mark.parametrize("kind", ["whole", "packed", "left padded"])
def test_logits_and_every_gradient_equal_recurrentgemmas(run, kind, usual_promotion):
    needs("recurrentgemma")
    tokens, positions = rows(kind)
    weights = ((positions >= 0) & (np.arange(T) < T - 1)).astype(np.float32)
    targets = np.roll(tokens, -1, axis=1)
    network = recurrentgemma_model(MODEL)

    def loss_of(logits):
        logp = jnp.sum(jax.nn.log_softmax(logits) * jax.nn.one_hot(targets, V), axis=-1)
        return -jnp.sum(logp * weights) / weights.sum(), logits

    def their_loss(parameters):
        return loss_of(
            network.apply({"params": parameters}, *map(jnp.asarray, (tokens, positions)), return_cache=False)[0]
        )

    parameters = jax.tree.map(jnp.asarray, nest(flax_parameters()))
    (their_value, their_logits), their_gradient = jax.jit(jax.value_and_grad(their_loss, has_aux=True))(parameters)

    model, mesh = ours(run)
    with jax.set_mesh(mesh):
        our_loss = jax.jit(jax.value_and_grad(lambda m: loss_of(m(tokens, positions, dtype=jnp.float32)), has_aux=True))
        (value, logits), gradient = our_loss(model)
    real = positions >= 0
    difference = np.abs(np.asarray(logits) - np.asarray(their_logits))[real].max()
    assert difference <= 1e-4
    assert float(value) == pytest.approx(float(their_value), abs=1e-5)

    leaves = named_leaves(gradient)
    worst = {}
    for name, theirs in named_leaves(their_gradient).items():
        mine = np.asarray(leaves[our_name(name)])
        mine = mine[0] if "/groups/" in f"/{our_name(name)}" else mine
        theirs = np.asarray(theirs)
        theirs = theirs.transpose(1, 0, 2) if name.endswith("ffw_up/w") else theirs
        worst[name] = np.linalg.norm(mine.ravel() - theirs.ravel()) / np.linalg.norm(theirs)
    assert len(worst) == len(flax_parameters())
    name = max(worst, key=worst.get)
    print(f"{kind}: logits differ by {difference:.2g}, gradients by {worst[name]:.2g} ({name})")
    assert worst[name] <= 1e-3, name


def test_logits_equal_transformers(run):
    """Whole rows of one document, without padding, where transformers is right once it counts the token itself."""
    torch = needs("torch")
    transformers = needs("transformers")
    exported = run.parent / "exported"
    if not exported.exists():
        done("export", run, "--format", "hf", "--to", exported)
    network = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    assert network.config.attention_window_size == W + 1
    tokens, positions = rows("whole")
    with torch.no_grad():
        theirs = network(torch.from_numpy(tokens.astype(np.int64)), use_cache=False).logits.numpy()
    model, mesh = ours(run)
    with jax.set_mesh(mesh):
        logits = np.asarray(jax.jit(lambda m: m(tokens, positions, dtype=jnp.float32))(model))
    difference = np.abs(logits - theirs).max()
    print(f"logits differ by {difference:.2g}")
    assert difference <= 1e-4


def test_transformers_with_the_released_window_is_one_key_short(run):
    """What the README of an export says, and why W + 1 is written: with W it differs, from position W on."""
    torch = needs("torch")
    transformers = needs("transformers")
    exported = run.parent / "exported"
    if not exported.exists():
        done("export", run, "--format", "hf", "--to", exported)
    tokens, _ = rows("whole")
    logits = {}
    for window in (W, W + 1):
        network = transformers.AutoModelForCausalLM.from_pretrained(
            exported, dtype=torch.float32, attention_window_size=window
        ).eval()
        with torch.no_grad():
            logits[window] = network(torch.from_numpy(tokens.astype(np.int64)), use_cache=False).logits.numpy()
    apart = np.abs(logits[W] - logits[W + 1]).max(axis=(0, 2))
    assert apart[:W].max() <= 1e-5
    assert apart[W:].max() > 1e-2


def test_what_transformers_itself_saves_is_imported(tmp_path):
    torch = needs("torch")
    transformers = needs("transformers")
    torch.manual_seed(0)
    config = transformers.RecurrentGemmaConfig(
        vocab_size=V,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=1,
        attention_window_size=W,
    )
    network = transformers.RecurrentGemmaForCausalLM(config).eval()
    network.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    done("import", tmp_path / "theirs", "--to", tmp_path / "run", "--verify")
    assert from_json((tmp_path / "run" / "config.json").read_text()).model == MODEL


def test_recurrentgemma_loads_what_we_export(run, usual_promotion):
    needs("recurrentgemma")
    exported = run.parent / "flax"
    if not exported.exists():
        done("export", run, "--format", "flax", "--to", exported)
    (folder,) = (entry for entry in exported.iterdir() if entry.is_dir())
    from recurrentgemma import common

    parameters = jax.tree.map(jnp.asarray, nest(read_flax(folder)))
    inferred = common.GriffinConfig.from_flax_params_or_variables({"params": parameters}, preset=None)
    assert (inferred.width, inferred.mlp_expanded_width, inferred.num_heads) == (64, 96, 4)
    tokens, positions = rows("whole")
    network = recurrentgemma_model(MODEL)
    program = jax.jit(lambda *inputs: network.apply({"params": parameters}, *inputs, return_cache=False)[0])
    logits = program(*map(jnp.asarray, (tokens, positions)))
    model, mesh = ours(run)
    with jax.set_mesh(mesh):
        mine = jax.jit(lambda m: m(tokens, positions, dtype=jnp.float32))(model)
    assert np.abs(np.asarray(mine) - np.asarray(logits)).max() <= 1e-4


@pytest.mark.parametrize("layout", ["flax", "hf"])
def test_verify_compares_with_the_source_and_imports_nothing_that_differs(
    layout, tmp_path, capsys, monkeypatch, usual_promotion
):
    needs({"flax": "recurrentgemma", "hf": "transformers"}[layout])
    flax = flax_parameters()
    write_flax(tmp_path / "theirs", flax) if layout == "flax" else write_hf(tmp_path / "theirs", hf_tensors(flax))
    words = ["import", tmp_path / "theirs", "--verify", "--config", config_file(tmp_path), "--to"]
    done(*words, tmp_path / "run")
    said = capsys.readouterr().out
    assert f"differ from {'recurrentgemma' if layout == 'flax' else 'transformers'}'s by at most" in said

    monkeypatch.setattr("models.griffin.embedding_scale", lambda width: np.float32(width**0.5 * 1.1))
    assert main([str(word) for word in [*words, tmp_path / "wrong"]]) == 4
    assert capsys.readouterr().err.endswith("more than 0.001: nothing was imported\n")
    assert not (tmp_path / "wrong").exists()
