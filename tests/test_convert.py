"""Import and export keep every bit, in the layouts their makers publish, and refuse in one sentence what does not fit."""

import contextlib
import dataclasses
import json
import pathlib
import sys

import jax
import numpy as np
import pytest
from published import (
    BFLOAT16,
    HF_CONFIG,
    MODEL,
    V,
    W,
    config_file,
    flax_parameters,
    hf_tensors,
    read_flax,
    write_flax,
    write_hf,
)
from runs import finish, saved_arrays
from safetensors.numpy import load_file, save_file
from test_griffin import our_name

from configs.schema import OptimizerConfig
from configs.store import from_json
from launch.cli import main
from models.convert import tensors
from models.convert.safetensors_files import read_safetensors, write_safetensors
from models.convert.tensors import Tensor
from trainer.optimizers import make_optimizer, make_schedule


def refused(capsys, words: list, code: int) -> str:
    capsys.readouterr()
    assert main([str(word) for word in words]) == code
    said = capsys.readouterr().err
    assert said.startswith("podwright: ")
    assert said.count("\n") == 1
    return said.removeprefix("podwright: ").strip()


def done(*words) -> None:
    assert main([str(word) for word in words]) == 0


def same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert a[name].shape == b[name].shape, name
        assert a[name].tobytes() == b[name].tobytes(), name


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> pathlib.Path:
    """A Flax checkpoint `theirs` and `run`, imported from it."""
    place = tmp_path_factory.mktemp("imported")
    write_flax(place / "theirs", flax_parameters())
    done("import", place / "theirs", "--to", place / "run", "--config", config_file(place, sequence_length=64))
    return place


def test_every_tensor_arrives_where_the_golden_test_has_it(imported):
    """The names of the golden file, which were checked against DeepMind's logits, and stacked layers."""
    arrays = saved_arrays(imported / "run", 0)
    stacked = {"groups": lambda x: x[0], "tail": lambda x: x}
    for name, value in flax_parameters().items():
        ours = arrays[f"model/{our_name(name)}"]
        if name.startswith("blocks."):
            ours = stacked[our_name(name).split("/")[1]](ours)
        value = value.transpose(1, 0, 2) if name.endswith("ffw_up/w") else value
        np.testing.assert_array_equal(ours.ravel(), value.ravel(), err_msg=name)


def test_the_rest_of_the_state_is_new(imported):
    arrays = saved_arrays(imported / "run", 0)
    rest = {name: value for name, value in arrays.items() if not name.startswith("model/")}
    assert sum(name.startswith("opt_state/") for name in rest) > 2 * len(flax_parameters()) / 3
    assert not any(value.any() for value in rest.values())


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_every_optimizer_starts_with_zeros(name):
    config = OptimizerConfig(name=name, adaptive_clip=0.01)
    optimizer = make_optimizer(config, make_schedule(config, 10), lambda name: True, lambda name: True)
    state = optimizer.init({"kernel": jax.numpy.ones((2, 3))})
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(state))


def test_flax_to_ours_to_hugging_face_to_ours_to_flax_keeps_every_bit(imported, tmp_path):
    done("export", imported / "run", "--format", "hf", "--to", tmp_path / "hf")
    same_bits(load_file(tmp_path / "hf" / "model.safetensors"), hf_tensors(flax_parameters()))
    done("import", tmp_path / "hf", "--to", tmp_path / "again")
    same_bits(saved_arrays(tmp_path / "again", 0), saved_arrays(imported / "run", 0))
    done("export", tmp_path / "again", "--format", "flax", "--to", tmp_path / "flax")
    same_bits(read_flax(tmp_path / "flax" / "hf"), flax_parameters())


def test_a_released_bfloat16_checkpoint_comes_back_as_it_was(tmp_path):
    write_hf(tmp_path / "theirs", hf_tensors(flax_parameters(dtype=BFLOAT16)))
    for dtype in ("bfloat16", "float32"):
        done("import", tmp_path / "theirs", "--to", tmp_path / dtype, "--dtype", dtype)
        done(
            "export", tmp_path / dtype, "--format", "hf", "--dtype", "bfloat16", "--to", tmp_path / f"{dtype}-exported"
        )
        exported = load_file(tmp_path / f"{dtype}-exported" / "model.safetensors")
        same_bits(exported, load_file(tmp_path / "theirs" / "model.safetensors"))
        done("export", tmp_path / dtype, "--format", "flax", "--dtype", "bfloat16", "--to", tmp_path / f"{dtype}-flax")
        same_bits(read_flax(tmp_path / f"{dtype}-flax" / "theirs"), flax_parameters(dtype=BFLOAT16))
    stored = saved_arrays(tmp_path / "bfloat16", 0)
    assert stored["model/embedding/table"].dtype == BFLOAT16


@pytest.mark.parametrize(
    "variant", ["wrapped in params", "no ocdbt", "zarr3", "several files", "with lm_head", "one file", "in its folder"]
)
def test_every_published_form_gives_the_same_run(imported, tmp_path, variant):
    flax = flax_parameters()
    hf = hf_tensors(flax)
    options = ["--config", config_file(tmp_path, sequence_length=64)]
    source = tmp_path / "theirs"
    if variant == "wrapped in params":
        write_flax(source, flax, wrapped=True)
    elif variant in ("no ocdbt", "zarr3"):  # as older and newer versions of orbax write
        write_flax(source, flax, use_ocdbt=variant == "zarr3", use_zarr3=variant == "zarr3")
    elif variant == "in its folder":
        write_flax(source / "a 2b #1", flax)
        (source / "tokenizer.model").touch()
    elif variant == "with lm_head":
        write_hf(source, hf | {"lm_head.weight": hf["model.embed_tokens.weight"]})
    elif variant == "several files":
        write_hf(source, hf, files=3)
    else:
        source = write_hf(source, hf) / "model.safetensors"
        options = []
    done("import", source, "--to", tmp_path / "run", *options)
    same_bits(saved_arrays(tmp_path / "run", 0), saved_arrays(imported / "run", 0))
    config = from_json((tmp_path / "run" / "config.json").read_text())
    assert config.model == MODEL
    if variant == "in its folder":
        assert config.data.tokenizer == str(tmp_path / "theirs" / "tokenizer.model")


def test_the_vocabulary_is_the_tables(tmp_path):
    flax = flax_parameters()
    flax["embedder/input_embedding"] = np.concatenate([flax["embedder/input_embedding"]] * 2)
    write_flax(tmp_path / "theirs", flax)
    done("import", tmp_path / "theirs", "--to", tmp_path / "run", "--config", config_file(tmp_path))
    assert from_json((tmp_path / "run" / "config.json").read_text()).model.vocab_size == 2 * V


def test_an_exported_config_gives_transformers_the_token_itself_and_us_the_window(imported, tmp_path):
    done("export", imported / "run", "--format", "hf", "--to", tmp_path / "hf")
    exported = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert exported["attention_window_size"] == W + 1
    assert {key: exported[key] for key in ("intermediate_size", "block_types", "num_key_value_heads", "lru_width")} == {
        key: HF_CONFIG[key] for key in ("intermediate_size", "block_types", "num_key_value_heads", "lru_width")
    }
    assert f"`attention_window_size` is {W + 1} because" in (tmp_path / "hf" / "README.md").read_text()


def test_large_tensors_and_files_are_cut_into_pieces(imported, tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "PIECE", 1000)
    write_safetensors(
        tmp_path,
        {
            name: Tensor(value.shape, value.dtype, lambda a, b, v=value: v[a:b])
            for name, value in hf_tensors(flax_parameters()).items()
        },
        file_bytes=50_000,
    )
    assert len(list(tmp_path.glob("*.safetensors"))) > 5
    same_bits({n: t.whole() for n, t in read_safetensors(tmp_path).items()}, hf_tensors(flax_parameters()))
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIG))
    done("import", tmp_path, "--to", tmp_path / "run")
    same_bits(saved_arrays(tmp_path / "run", 0), saved_arrays(imported / "run", 0))


def test_an_imported_run_is_sampled_evaluated_trained_and_gives_logits(imported, tmp_path, capsys):
    run = tmp_path / "run"
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i in range(30):
        (corpus / f"{i}.py").write_text("".join(f"x_{i} = {i * j}\n" for j in range(60)))
    wide = flax_parameters()
    wide["embedder/input_embedding"] = np.resize(wide["embedder/input_embedding"], (257, 64))
    write_flax(tmp_path / "theirs", wide)
    config = config_file(tmp_path, corpus=str(corpus), sequence_length=64, batch_size=8)
    done("import", tmp_path / "theirs", "--to", run, "--config", config, "--trainer.steps", 2)

    np.save(tmp_path / "tokens.npy", np.arange(60).reshape(3, 20))
    done("logits", run, "--tokens", tmp_path / "tokens.npy", "--out", tmp_path / "logits.npy")
    assert np.load(tmp_path / "logits.npy").shape == (3, 20, 257)
    assert np.load(tmp_path / "logits.npy").dtype == np.float32
    done("sample", run, "--prompt", "x_1", "--tokens", "3")
    done("eval", run, "--batches", "1")
    # Before its first step a run may still choose its data and its optimizer's settings, not another model.
    words = ["train", run, "--run", run, "--data.seed", "5", "--eval.batches", "1"]
    assert "cannot fit" in refused(capsys, [*words, "--model.mlp_width", "128"], code=2)
    code, _, err = finish([sys.executable, "-m", "launch", *map(str, words)])
    assert code == 0, err
    trained = saved_arrays(run, 2)
    assert trained["step"] == 2
    assert not np.array_equal(trained["model/final_norm"], wide["final_norm/scale"])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("missing", "1 missing (blocks.1/recurrent_block/conv_1d/b)"),
        ("unexpected", "1 unexpected (blocks.1/recurrent_block/conv_1d/c)"),
        ("mis-shaped", "2 mis-shaped (blocks.0/mlp_block/ffw_down/bias is (65,), not (64,); "),
        (
            "everything",
            "5 missing (blocks.1/temporal_pre_norm/scale; blocks.1/recurrent_block/linear_x/kernel; "
            "blocks.1/recurrent_block/linear_x/bias; ...)",
        ),
    ],
)
def test_what_does_not_fit_is_listed(tmp_path, capsys, change, sentence):
    flax = flax_parameters()
    if change == "missing":
        del flax["blocks.1/recurrent_block/conv_1d/b"]
    elif change == "unexpected":
        flax["blocks.1/recurrent_block/conv_1d/c"] = np.zeros(3, np.float32)
    elif change == "mis-shaped":
        for i in (0, 3):
            flax[f"blocks.{i}/mlp_block/ffw_down/bias"] = np.zeros(65, np.float32)
    else:
        gone = [
            n
            for n in flax
            if n.startswith("blocks.1/recurrent_block/linear_") or n == "blocks.1/temporal_pre_norm/scale"
        ]
        for name in gone[:5]:
            del flax[name]
    write_flax(tmp_path / "theirs", flax)
    words = ["import", tmp_path / "theirs", "--to", tmp_path / "run", "--config", config_file(tmp_path)]
    said = refused(capsys, words, code=4)
    assert said.startswith(f"{tmp_path / 'theirs'} does not hold the tensors of this model: ")
    assert sentence in said
    assert not (tmp_path / "run").exists()


def test_a_file_that_is_cut_short_is_named(tmp_path, capsys):
    folder = write_hf(tmp_path / "theirs", hf_tensors(flax_parameters()))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    said = refused(capsys, ["import", folder, "--to", tmp_path / "run"], code=4)
    assert said.startswith(f"{file} cannot be read, it is cut short or no safetensors file")


def test_an_orbax_folder_that_is_cut_short_is_named_and_leaves_nothing(tmp_path, capsys):
    folder = write_flax(tmp_path / "theirs", flax_parameters())
    largest = max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    words = ["import", folder, "--to", tmp_path / "run", "--config", config_file(tmp_path)]
    said = refused(capsys, words, code=4)
    assert "cannot be read" in said
    assert {entry.name for entry in tmp_path.iterdir()} == {"theirs", "small.json"}


def test_a_head_that_is_not_the_table_is_refused(tmp_path, capsys):
    hf = hf_tensors(flax_parameters())
    write_hf(tmp_path / "theirs", hf | {"lm_head.weight": hf["model.embed_tokens.weight"] + 1})
    said = refused(capsys, ["import", tmp_path / "theirs", "--to", tmp_path / "run"], code=4)
    assert said.endswith("lm_head.weight is not model.embed_tokens.weight, but Griffin reads and writes with one table")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_key_value_heads": 4}, "says num_key_value_heads=4, but Griffin here has only 1"),
        ({"rope_parameters": {"rope_theta": 5e5}}, "says rope_theta=500000.0, but Griffin here has only 10000.0"),
        ({"model_type": "gemma"}, "says model_type='gemma', but Griffin here has only 'recurrent_gemma'"),
        ({"intermediate_size": 96}, "does not hold the tensors of this model: 25 mis-shaped"),
    ],
)
def test_what_griffin_is_not_is_named(tmp_path, capsys, changes, sentence):
    write_hf(tmp_path / "theirs", hf_tensors(flax_parameters()), **changes)
    assert sentence in refused(capsys, ["import", tmp_path / "theirs", "--to", tmp_path / "run"], code=4)


def test_shapes_of_no_known_model_need_a_config(tmp_path, capsys):
    write_flax(tmp_path / "theirs", flax_parameters())
    said = refused(capsys, ["import", tmp_path / "theirs", "--to", tmp_path / "run"], code=2)
    assert said == (
        f"{tmp_path / 'theirs'} has the shapes of no config here (width 64, blocks 5, mlp_width 96, rnn_width 64, "
        f"num_gate_blocks 4, conv_width 4, head 16): give --config NAME and what else its model sets, since the tensors "
        f"do not tell model.window, model.logits_soft_cap and model.embedding_scale"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"embedding_scale": False}, "model.embedding_scale=False"),
        ({"logits_soft_cap": 0.0}, "model.logits_soft_cap=0.0"),
        ({"rnn_width": 96}, "model.rnn_width=96 beside model.width=64"),
        ({"num_gate_blocks": 8}, "model.num_gate_blocks=8 beside model.num_heads=4"),
    ],
)
def test_what_transformers_cannot_represent_is_not_exported_there(imported, tmp_path, capsys, changes, words):
    run = tmp_path / "run"
    run.mkdir()
    config = from_json((imported / "run" / "config.json").read_text())
    model = dataclasses.replace(config.model, **changes)
    (run / "config.json").write_text(config_file(tmp_path, model).read_text())
    said = refused(capsys, ["export", run, "--format", "hf", "--to", tmp_path / "hf"], code=2)
    assert said.startswith(f"transformers cannot represent {words}")
    assert said.endswith("; --format flax can")


def test_nothing_that_is_there_is_overwritten(imported, tmp_path, capsys):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.tex").write_text("precious")
    config = config_file(tmp_path)
    for words in (
        ["import", imported / "theirs", "--to", taken, "--config", config],
        ["export", imported / "run", "--format", "flax", "--to", taken],
    ):
        assert refused(capsys, words, code=4) == f"{taken} exists already: give --to a new folder"
    np.save(tmp_path / "tokens.npy", np.arange(5))
    words = ["logits", imported / "run", "--tokens", tmp_path / "tokens.npy", "--out", tmp_path / "tokens.npy"]
    assert "exists already: give --out a new file" in refused(capsys, words, code=4)
    assert {entry.name for entry in taken.iterdir()} == {"thesis.tex"}


@pytest.mark.parametrize(
    ("tokens", "sentence"),
    [
        (np.array([3, V]), f"holds ids from 3 to {V}: 0 to {V - 1} are allowed (model.vocab_size={V})"),
        (np.array([0.5]), "holds float64 (1,): whole numbers, T or B x T of them, are allowed"),
    ],
)
def test_tokens_the_model_does_not_have_are_named(imported, tmp_path, capsys, tokens, sentence):
    np.save(tmp_path / "tokens.npy", tokens)
    words = ["logits", imported / "run", "--tokens", tmp_path / "tokens.npy", "--out", tmp_path / "out.npy"]
    assert sentence in refused(capsys, words, code=2)
    assert {entry.name for entry in tmp_path.iterdir()} == {"tokens.npy"}


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["import", "nowhere", "--to", "x"], 4, "nowhere does not exist"),
        (["import", "{imported}/run/checkpoints", "--to", "x"], 4, "is neither an orbax folder"),
        (
            ["import", "{imported}/theirs", "--to", "x", "--config", "nfnet-tiny"],
            2,
            "--config nfnet-tiny is a nfnet, but ",
        ),
        (["import", "{imported}/theirs", "--config", "{imported}/small.json"], 2, "needs --to RUN"),
        (
            ["import", "{imported}/theirs", "--config", "{imported}/small.json", "--to", "x", "--dtype", "float16"],
            2,
            "--dtype float16 is not allowed, perhaps",
        ),
        (["import", "{imported}/theirs", "--config", "{imported}/small.json", "--verifi"], 2, "perhaps --verify"),
        (["export", "nowhere", "--format", "hf", "--to", "x"], 4, "nowhere is not a podwright run"),
    ],
)
def test_a_mistake_is_one_sentence(imported, tmp_path, capsys, monkeypatch, words, code, sentence):
    monkeypatch.chdir(tmp_path)
    assert sentence in refused(capsys, [word.format(imported=imported) for word in words], code)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_is_killed_halfway_is_no_run(imported, tmp_path, monkeypatch):
    """Until everything is written, the folder does not have its name."""
    monkeypatch.setattr("launch.convert.write_first_state", lambda run, *rest: (run / "half").touch() or 1 / 0)
    config = config_file(tmp_path)
    with contextlib.suppress(ZeroDivisionError):
        main(["import", str(imported / "theirs"), "--to", str(tmp_path / "run"), "--config", str(config)])
    assert {entry.name for entry in tmp_path.iterdir()} == {"small.json"}


def test_a_file_type_we_cannot_convert_is_named(tmp_path, capsys):
    folder = write_hf(tmp_path / "theirs", {"a": np.zeros(2, np.float32)})
    save_file({"a": np.zeros(2, np.int8)}, folder / "model.safetensors")
    said = refused(capsys, ["import", folder, "--to", tmp_path / "run"], code=4)
    assert said.endswith("a is I8, F32, BF16, F16 are what can be imported")
