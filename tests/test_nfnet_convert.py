"""NFNets are imported from and exported to timm and DeepMind bit by bit; what does not fit is refused in one sentence."""

import dataclasses
import json
import pathlib
import pickle

import numpy as np
import pytest
from pickles import Call, named
from published_nfnet import MODELS, TIMM_ARGUMENTS, haiku_parameters, timm_parameters, write_pickle
from runs import saved_arrays
from safetensors.numpy import load_file, save_file
from test_convert import done, refused, same_bits

from configs import EXPERIMENTS
from configs.store import from_json, to_json
from models.convert.haiku import read_haiku

DEEPMIND = dict(ws_eps_mode="max_nvar", gelu_approximate=True)


def write_timm(folder: pathlib.Path, name: str = "tiny", **changes) -> pathlib.Path:
    """As timm pushes to Hugging Face's hub."""
    folder.mkdir()
    save_file(timm_parameters(name), folder / "model.safetensors")
    arguments = {k: v for k, v in TIMM_ARGUMENTS[name].items() if k not in ("model_name", "num_classes")}
    described = {"architecture": "dm_nfnet_f0", "num_classes": MODELS[name].num_classes, "model_args": arguments}
    (folder / "config.json").write_text(json.dumps(described | changes))
    return folder


def config_of(run: pathlib.Path):
    return from_json((run / "config.json").read_text())


def as_flat(tree: dict[str, dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {f"{module}/{name}": x for module, leaves in tree.items() for name, x in leaves.items()}


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> pathlib.Path:
    """A folder as timm writes it, `theirs`, and `run`, imported from it."""
    place = tmp_path_factory.mktemp("imported")
    write_timm(place / "theirs")
    done("import", place / "theirs", "--to", place / "run")
    return place


# --- in and out -------------------------------------------------------------------------------------------------------


def test_a_timm_import_has_the_shapes_and_timms_conventions(imported):
    config = config_of(imported / "run")
    assert config.model == MODELS["tiny"]
    assert (config.name, config.data.channels) == ("theirs", 3)


@pytest.mark.parametrize("name", MODELS)
def test_timm_to_ours_to_haiku_to_ours_to_timm_keeps_every_bit(tmp_path, name):
    write_timm(tmp_path / "theirs", name)
    done("import", tmp_path / "theirs", "--to", tmp_path / "run")
    done("export", tmp_path / "run", "--format", "haiku", "--to", tmp_path / "haiku")
    (file,) = (tmp_path / "haiku").glob("*_haiku.npz")
    same_bits(as_flat(pickle.loads(file.read_bytes())), as_flat(haiku_parameters(name)))
    done("import", file, "--to", tmp_path / "again")
    same_bits(saved_arrays(tmp_path / "again", 0), saved_arrays(tmp_path / "run", 0))
    assert config_of(tmp_path / "again").model == dataclasses.replace(MODELS[name], **DEEPMIND)
    done("export", tmp_path / "again", "--format", "timm", "--to", tmp_path / "timm")
    same_bits(load_file(tmp_path / "timm" / "model.safetensors"), timm_parameters(name))


def test_an_exported_config_gives_timm_its_arguments(imported, tmp_path):
    done("export", imported / "run", "--format", "timm", "--to", tmp_path / "timm")
    described = json.loads((tmp_path / "timm" / "config.json").read_text())
    given = {
        "model_name": described["architecture"],
        "num_classes": described["num_classes"],
        **described["model_args"],
    }
    assert given == {k: list(v) if isinstance(v, tuple) else v for k, v in TIMM_ARGUMENTS["tiny"].items()}
    assert described["pretrained_cfg"]["input_size"] == [3, 192, 192]


@pytest.mark.parametrize("form", ["one file", "without config.json", "bfloat16", "in a folder with its haiku file"])
def test_every_form_gives_the_same_run(imported, tmp_path, form):
    if form == "in a folder with its haiku file":
        (tmp_path / "theirs").mkdir()
        source = write_pickle(tmp_path / "theirs" / "F0_haiku.npz", haiku_parameters("tiny")).parent
    else:
        source = write_timm(tmp_path / "theirs")
    if form == "one file":
        source /= "model.safetensors"
    elif form == "without config.json":
        (source / "config.json").unlink()
    dtype = "bfloat16" if form == "bfloat16" else "float32"
    done("import", source, "--to", tmp_path / "run", "--dtype", dtype)
    arrays, expected = saved_arrays(tmp_path / "run", 0), saved_arrays(imported / "run", 0)
    for name, x in expected.items():
        np.testing.assert_array_equal(arrays[name], x.astype(arrays[name].dtype), err_msg=name)
    assert arrays["model/head/kernel"].dtype == dtype


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_haiku_file_of_any_protocol_gives_deepminds_model(tmp_path, protocol, wrapped):
    tree = haiku_parameters("tiny")
    file = write_pickle(tmp_path / "F0_haiku.npz", (tree, {}) if wrapped else tree, protocol)
    same_bits({name: tensor.whole() for name, tensor in read_haiku(file).items()}, as_flat(tree))


def stored(function: object, array: np.ndarray, order: str = "<") -> Call:
    """An array as numpy reduces itself, with `function` in the place of its `_reconstruct`."""
    code = array.dtype.newbyteorder(order)
    state = (1, array.shape, code, False, array.astype(code).tobytes())
    return Call(function, np.ndarray, (0,), b"b", state=state)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    "written",
    [
        "numpy 1",
        "numpy 1, inner module",
        "numpy 2",
        "dill",
        "dill 0.3.3",
        "haiku",
        "haiku's frozendict",
        "big-endian",
    ],
)
def test_a_haiku_file_of_any_age_is_read(tmp_path, monkeypatch, written, protocol):
    """Names that numpy, Haiku and dill have had since the files were released; 0.3.3 is the dill of that month."""
    made = named(monkeypatch, "numpy.core.multiarray", "_reconstruct")
    arrays = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.full((), 3, np.float32)}
    leaves: dict = {name: stored(made, array) for name, array in arrays.items()}
    if written == "numpy 1, inner module":
        inner = named(monkeypatch, "numpy.core._multiarray_umath", "_reconstruct")
        leaves = {name: stored(inner, array) for name, array in arrays.items()}
    elif written == "numpy 2":
        leaves = {"w": arrays["w"], "b": np.float32(3)}
    elif written == "big-endian":
        leaves = {name: stored(made, array, ">") for name, array in arrays.items()}
    elif written.startswith("dill"):
        rebuild = named(monkeypatch, "dill._dill", "_create_array")
        if written == "dill 0.3.3":
            module = Call(named(monkeypatch, "dill._dill", "_import_module"), "numpy.core._multiarray_umath")
            made = Call(named(monkeypatch, "dill._dill", "_get_attr"), module, "_reconstruct")
        states = {name: (1, x.shape, x.dtype, False, x.tobytes()) for name, x in arrays.items()}
        leaves = {name: Call(rebuild, made, (np.ndarray, (0,), b"b"), s, None) for name, s in states.items()}
    tree: object = {"NFNet/~/linear": leaves}
    if written.startswith("haiku"):
        kind = named(monkeypatch, "haiku._src.data_structures", "FlatMapping" if written == "haiku" else "frozendict")
        tree = Call(kind, {"NFNet/~/linear": Call(kind, leaves)})
    file = write_pickle(tmp_path / "F0_haiku.npz", tree, protocol)
    found = {name: tensor.whole() for name, tensor in read_haiku(file).items()}
    assert found.keys() == {"NFNet/~/linear/w", "NFNet/~/linear/b"}
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[f"NFNet/~/linear/{name}"], array)
        assert found[f"NFNet/~/linear/{name}"].shape == array.shape


def test_a_true_npz_of_haikus_names_is_read(tmp_path):
    np.savez(tmp_path / "tiny.npz", **as_flat(haiku_parameters("tiny")))
    done("import", tmp_path / "tiny.npz", "--to", tmp_path / "run")
    assert config_of(tmp_path / "run").model == dataclasses.replace(MODELS["tiny"], **DEEPMIND)
    head = saved_arrays(tmp_path / "run", 0)["model/head/kernel"]
    np.testing.assert_array_equal(head, haiku_parameters("tiny")["NFNet/~/linear"]["w"])


def test_an_import_says_whose_conventions_it_took_and_an_export_where_they_differ(imported, tmp_path, capsys):
    done("import", imported / "theirs", "--to", tmp_path / "run")
    assert "with model.ws_eps_mode='add_var' and model.gelu_approximate=False" in capsys.readouterr().out
    done("export", tmp_path / "run", "--format", "timm", "--to", tmp_path / "timm")
    assert "Trained with" not in capsys.readouterr().out + (tmp_path / "timm" / "README.md").read_text()
    write_pickle(tmp_path / "F0_haiku.npz", haiku_parameters("tiny"))
    done("import", tmp_path / "F0_haiku.npz", "--to", tmp_path / "deepmind")
    done("export", tmp_path / "deepmind", "--format", "timm", "--to", tmp_path / "other")
    sentence = (
        "Trained with model.ws_eps_mode='max_nvar' and model.gelu_approximate=True, while timm has ws_eps_mode=add_var and "
        "gelu_approximate=False: logits there differ by 13 % of their standard deviation on random weights."
    )
    assert sentence in capsys.readouterr().out
    assert sentence in (tmp_path / "other" / "README.md").read_text()


def test_a_config_gives_the_recipe_and_the_checkpoint_classes_and_conventions(tmp_path):
    file = tmp_path / "recipe.json"
    base = EXPERIMENTS["nfnet-f0"]()
    model = dataclasses.replace(MODELS["tiny"], num_classes=1000, dropout=0.5, **DEEPMIND)
    file.write_text(to_json(dataclasses.replace(base, name="recipe", model=model)))
    write_timm(tmp_path / "theirs")
    done("import", tmp_path / "theirs", "--to", tmp_path / "run", "--config", file, "--model.gelu_approximate", "true")
    config = config_of(tmp_path / "run")
    assert config.name == "recipe"
    assert config.model == dataclasses.replace(MODELS["tiny"], dropout=0.5, gelu_approximate=True)


# --- one sentence -----------------------------------------------------------------------------------------------------

OTHERS = "of timm's NFNets only those named dm_nfnet_... are DeepMind's"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"architecture": "nfnet_f0"}, f"config.json says architecture='nfnet_f0': {OTHERS}"),
        ({"architecture": "nfnet_l0"}, OTHERS),
        ({"architecture": "eca_nfnet_l1"}, OTHERS),
        ({"model_args": {"act_layer": "silu"}}, "says act_layer='silu', but NFNet here has only 'gelu'"),
        ({"model_args": {"bottle_ratio": 0.75}}, "does not hold the tensors of this model: "),
    ],
)
def test_a_network_of_timms_that_is_not_deepminds_is_refused(tmp_path, capsys, changes, sentence):
    source = write_timm(tmp_path / "theirs", **changes)
    assert sentence in refused(capsys, ["import", source, "--to", tmp_path / "run"], 4)
    assert {entry.name for entry in tmp_path.iterdir()} == {"theirs"}


def test_weights_without_skip_gains_are_refused_without_a_config_json(tmp_path, capsys):
    save_file({n: x for n, x in timm_parameters("tiny").items() if "skipinit" not in n}, tmp_path / "a.safetensors")
    said = refused(capsys, ["import", tmp_path / "a.safetensors", "--to", tmp_path / "run"], 4)
    assert said.startswith(f"{tmp_path / 'a.safetensors'} has no skip gains: {OTHERS}")


@pytest.mark.parametrize("name", ["dm_nfnet_f0.pth", "pytorch_model.bin", "checkpoint.pth.tar"])
@pytest.mark.parametrize("in_folder", [False, True])
def test_a_pickle_of_torch_is_refused(tmp_path, capsys, name, in_folder):
    (tmp_path / name).write_bytes(b"PK")
    said = refused(capsys, ["import", tmp_path if in_folder else tmp_path / name, "--to", tmp_path / "run"], 4)
    assert said == (
        f"{tmp_path / name} is a pickle of torch, which can run code: load it where you trust it and write its state dict "
        f"with safetensors.torch.save_file"
    )


def without(tensors: dict[str, np.ndarray], *names: str) -> dict[str, np.ndarray]:
    return {name: x for name, x in tensors.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: without(t, "head.fc.weight"), "is no NFNet in the timm layout: it has no head.fc.weight"),
        (lambda t: without(t, "stages.1.1.conv2b.gain"), "1 missing (stages.1.1.conv2b.gain)"),
        (lambda t: t | {"head.fc.scale": np.zeros(3, np.float32)}, "1 unexpected (head.fc.scale)"),
        (
            lambda t: t | {"final_conv.gain": t["final_conv.gain"].ravel()},
            "1 mis-shaped (final_conv.gain is (192,), not (192, 1, 1, 1))",
        ),
        (lambda t: t | {"stem.conv1.weight": np.zeros((), np.float32)}, "has shapes of no NFNet"),
    ],
)
def test_what_does_not_fit_is_listed(tmp_path, capsys, change, sentence):
    save_file(change(timm_parameters("tiny")), tmp_path / "a.safetensors")
    assert sentence in refused(capsys, ["import", tmp_path / "a.safetensors", "--to", tmp_path / "run"], 4)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        ({"NFNet/~/stem_conv0": {"w": 3}}, "holds a int as NFNet/~/stem_conv0/w: arrays are what can be imported"),
        ([1, 2], "is no file of Haiku parameters: {module: {parameter: array}} is one"),
        (({}, {"bn": {}}), "is no file of Haiku parameters"),
        (
            {"NFNet/~/linear": {"w": np.zeros(3, np.int32)}},
            "holds an array of 'i4': f2, f4, f8 are what can be imported",
        ),
        ({"MLP/linear": {"w": np.zeros(3, np.float32)}}, "is no Griffin or Gemma or NFNet in the haiku layout"),
    ],
)
def test_a_pickle_of_something_else_is_named(tmp_path, capsys, tree, sentence):
    file = write_pickle(tmp_path / "F0_haiku.npz", tree)
    assert sentence in refused(capsys, ["import", file, "--to", tmp_path / "run"], 4)


def test_a_pickle_that_is_cut_short_is_named(tmp_path, capsys):
    file = write_pickle(tmp_path / "F0_haiku.npz", haiku_parameters("tiny"))
    file.write_bytes(file.read_bytes()[:5000])
    said = refused(capsys, ["import", file, "--to", tmp_path / "run"], 4)
    assert said.startswith(f"{file} cannot be read, it is cut short or no file of Haiku parameters: ")


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        ("import {at}/theirs --to x --config griffin-tiny", 2, "--config griffin-tiny is a griffin, but "),
        ("import {at}/theirs --to x --config nfnet-f0", 4, "does not hold the tensors of this model"),
        ("export {at}/run --format hf --to x", 2, "--format hf is not for {at}/run, a NFNet: timm or haiku is allowed"),
        ("export {at}/run --format haiku --dtype bfloat16 --to x", 2, "--dtype bfloat16 is not for --format haiku"),
        ("export {at}/run --format tim --to x", 2, "tim"),
    ],
)
def test_a_mistake_is_one_sentence(imported, tmp_path, capsys, monkeypatch, words, code, sentence):
    monkeypatch.chdir(tmp_path)
    said = refused(capsys, words.format(at=imported).split(), code)
    assert sentence.format(at=imported) in said
    assert not list(tmp_path.iterdir())


def test_nothing_is_compared_with_where_there_is_no_package(tmp_path, capsys):
    file = write_pickle(tmp_path / "F0_haiku.npz", haiku_parameters("tiny"))
    said = refused(capsys, ["import", file, "--to", tmp_path / "run", "--verify"], 2)
    assert said == "--verify has no package to compare a NFNet in the haiku layout with"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            dict(stem_widths=(16, 32, 64, 192), widths=(384, 768, 2048, 2048)),
            "timm cannot represent model.stem_widths=(16, 32, 64, 192): before 192 channels it has (24, 48, 96)",
        ),
        (dict(head_width=100), "timm cannot represent model.widths="),
        (dict(group_width=12), "timm cannot represent model.group_width=12: it has to be a multiple of 8"),
    ],
)
def test_what_timm_cannot_represent_is_not_exported_there(imported, tmp_path, capsys, changes, sentence):
    config = config_of(imported / "run")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(
        to_json(dataclasses.replace(config, model=dataclasses.replace(config.model, **changes)))
    )
    said = refused(capsys, ["export", run, "--format", "timm", "--to", tmp_path / "timm"], 2)
    assert said.startswith(sentence)
    assert said.endswith("; --format haiku can")


def test_a_shortcut_that_nobody_else_projects_is_not_exported(imported, tmp_path, capsys):
    config = config_of(imported / "run")
    run = tmp_path / "run"
    run.mkdir()
    model = dataclasses.replace(config.model, stem_widths=(4, 8, 16, 32))
    (run / "config.json").write_text(to_json(dataclasses.replace(config, model=model)))
    said = refused(capsys, ["export", run, "--format", "timm", "--to", tmp_path / "timm"], 2)
    assert said.startswith("neither timm nor DeepMind's network can represent model.stem_widths=(4, 8, 16, 32) beside")
