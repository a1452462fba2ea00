"""Gemma comes in from every layout that it is released in and goes out again with every bit, or is refused in a sentence."""

import dataclasses
import json
import pathlib

import ml_dtypes
import numpy as np
import pytest
from published_gemma import MODELS, flax_parameters, hf_config, hf_tensors, orbax_tree, tokens_of, write_hf, write_orbax
from runs import saved_arrays
from safetensors.numpy import load_file
from test_convert import done, refused, same_bits

from configs import EXPERIMENTS
from configs.schema import Config, GemmaConfig, TextData
from configs.store import from_json, to_json
from models.convert import gemma_config
from models.convert.gemma import named
from models.convert.gemma import released as as_released
from models.convert.tensors import Tensor, in_memory, resized

BFLOAT16 = ml_dtypes.bfloat16


def config_file(folder: pathlib.Path, model: GemmaConfig) -> pathlib.Path:
    file = folder / "small.json"
    file.write_text(to_json(Config(name="small", model=model, data=TextData(sequence_length=64))))
    return file


def read_orbax(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """As Gemma's library reads a release: orbax alone, one dict of dicts."""
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.restore(folder.absolute())
    return {f"{key}/{leaf}": np.asarray(value) for key, child in tree.items() for leaf, value in child.items()}


def released(model: GemmaConfig, dtype: type = np.float32) -> dict[str, np.ndarray]:
    return {f"transformer/{name}": value for name, value in flax_parameters(model, dtype=dtype).items()}


def model_of(run: pathlib.Path) -> GemmaConfig:
    return from_json((run / "config.json").read_text()).model


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> dict[str, pathlib.Path]:
    """For each family a folder with `run`, imported from the released Flax layout, and its config."""
    places = {}
    for name, model in MODELS.items():
        place = places[name] = tmp_path_factory.mktemp(name.replace(" ", "_"))
        write_orbax(place / "theirs", orbax_tree(flax_parameters(model), model, "flat"))
        done("import", place / "theirs", "--to", place / "run", "--config", config_file(place, model))
    return places


@pytest.mark.parametrize("name", MODELS)
def test_flax_to_ours_to_hugging_face_to_ours_to_flax_keeps_every_bit(imported, tmp_path, name):
    model, place = MODELS[name], imported[name]
    done("export", place / "run", "--format", "hf", "--to", tmp_path / "hf")
    same_bits(load_file(tmp_path / "hf" / "model.safetensors"), hf_tensors(flax_parameters(model), model))
    done("import", tmp_path / "hf", "--to", tmp_path / "again")
    # Hugging Face's files have no padding rows, and config.json tells of none.
    assert model_of(tmp_path / "again") == dataclasses.replace(model, padding_rows=0)
    if not model.padding_rows:
        same_bits(saved_arrays(tmp_path / "again", 0), saved_arrays(place / "run", 0))
    done("export", place / "run", "--format", "flax", "--to", tmp_path / "flax")
    same_bits(read_orbax(tmp_path / "flax" / "small"), released(model))


@pytest.mark.parametrize("layout", ["nested", "stacked"])
@pytest.mark.parametrize("name", ["gemma1 mha", "gemma2 27b", "gemma3 4b"])
def test_newer_layouts_give_the_same_run(imported, tmp_path, name, layout):
    model = MODELS[name]
    write_orbax(tmp_path / "theirs", orbax_tree(flax_parameters(model), model, layout))
    done("import", tmp_path / "theirs", "--to", tmp_path / "run", "--config", imported[name] / "small.json")
    same_bits(saved_arrays(tmp_path / "run", 0), saved_arrays(imported[name] / "run", 0))


def test_a_table_without_padding_rows_gets_zeros(imported, tmp_path):
    """Hugging Face's 256000 rows in a model of 256128, with --config."""
    model = MODELS["gemma2 27b"]
    write_hf(tmp_path / "theirs", hf_tensors(flax_parameters(model), model), hf_config(model))
    done("import", tmp_path / "theirs", "--to", tmp_path / "run", "--config", imported["gemma2 27b"] / "small.json")
    table = saved_arrays(tmp_path / "run", 0)["model/embedding/table"]
    assert table.shape == (52, 40)
    assert not table[48:].any()
    np.testing.assert_array_equal(table[:48], flax_parameters(model)["embedder/input_embedding"][:48])
    assert model_of(tmp_path / "run") == model


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_model_of_a_multimodal_file_is_imported(imported, tmp_path, capsys, prefix):
    model = MODELS["gemma3 4b"]
    tensors = hf_tensors(flax_parameters(model), model, prefix)
    vision = "model.vision_tower" if prefix.startswith("model") else "vision_tower"
    tensors |= {f"{vision}.encoder.weight": np.zeros((2, 2), np.float32)}
    tensors |= {f"{vision.removesuffix('vision_tower')}multi_modal_projector.w": np.zeros(3, np.float32)}
    config = {"model_type": "gemma3", "text_config": hf_config(model), "vision_config": {"hidden_size": 2}}
    write_hf(tmp_path / "theirs", tensors, config)
    capsys.readouterr()
    done("import", tmp_path / "theirs", "--to", tmp_path / "run")
    (said,) = (line for line in capsys.readouterr().out.splitlines() if "images" in line)
    assert said.startswith(f"{tmp_path / 'theirs'}: 2 tensors of images are left out (")
    assert said.endswith("; ...), the text model is imported")
    same_bits(saved_arrays(tmp_path / "run", 0), saved_arrays(imported["gemma3 4b"] / "run", 0))
    assert model_of(tmp_path / "run") == model


def test_the_image_tensors_of_a_flax_release_are_left_out(imported, tmp_path, capsys):
    model = MODELS["gemma3 4b"]
    tree = orbax_tree(flax_parameters(model), model, "flat")
    tree["SigLiPFromPatches_0/siglip_encoder/pos_embedding"] = {"w": np.zeros((1, 2), np.float32)}
    tree["transformer/embedder/mm_input_projection"] = {"w": np.zeros((3, 40), np.float32)}
    tree["transformer/embedder/mm_soft_embedding_norm"] = {"scale": np.zeros(3, np.float32)}
    write_orbax(tmp_path / "theirs", tree)
    capsys.readouterr()
    done("import", tmp_path / "theirs", "--to", tmp_path / "run", "--config", imported["gemma3 4b"] / "small.json")
    assert "3 tensors of images are left out" in capsys.readouterr().out.splitlines()[0]
    same_bits(saved_arrays(tmp_path / "run", 0), saved_arrays(imported["gemma3 4b"] / "run", 0))


def test_a_released_bfloat16_checkpoint_comes_back_as_it_was(tmp_path):
    model = MODELS["gemma3 1b"]
    write_hf(tmp_path / "theirs", hf_tensors(flax_parameters(model, dtype=BFLOAT16), model), hf_config(model))
    done("import", tmp_path / "theirs", "--to", tmp_path / "run", "--dtype", "bfloat16")
    done("export", tmp_path / "run", "--format", "hf", "--dtype", "bfloat16", "--to", tmp_path / "hf")
    same_bits(load_file(tmp_path / "hf" / "model.safetensors"), load_file(tmp_path / "theirs" / "model.safetensors"))
    done("export", tmp_path / "run", "--format", "flax", "--dtype", "bfloat16", "--to", tmp_path / "flax")
    same_bits(read_orbax(tmp_path / "flax" / "theirs"), released(model, BFLOAT16))


def test_logits_of_an_imported_run_are_transformers_for_tokens_alone(imported, tmp_path, capsys):
    """Padding rows are neither in the file nor allowed as tokens."""
    tokens = tokens_of(1, 45)
    np.save(tmp_path / "tokens.npy", tokens)
    words = ["logits", imported["gemma2 27b"] / "run", "--tokens", tmp_path / "tokens.npy", "--out"]
    done(*words, tmp_path / "logits.npy")
    golden = np.load(pathlib.Path(__file__).parent / "golden" / "gemma.npz")
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy")[0], golden["gemma2 27b/logits"][0], rtol=0, atol=2e-5)
    np.save(tmp_path / "tokens.npy", np.full((1, 45), 48))
    assert "0 to 47 are allowed (model.vocab_size=48)" in refused(capsys, [*words, tmp_path / "more.npy"], code=2)


@pytest.mark.parametrize("name", MODELS)
def test_an_exported_config_json_says_what_transformers_needs(imported, tmp_path, name):
    done("export", imported[name] / "run", "--format", "hf", "--to", tmp_path / "hf")
    exported, expected = json.loads((tmp_path / "hf" / "config.json").read_text()), hf_config(MODELS[name])
    assert {key: exported[key] for key in expected} == expected


@pytest.mark.parametrize("name", ["gemma-2b", "gemma-7b", "gemma2-2b", "gemma2-9b", "gemma2-27b", "gemma3-27b"])
def test_a_released_gate_is_stored_as_its_makers_do(name):
    """(2 D F) in Gemma 1 and in Gemma 2 2B, (2 F D) in the others."""
    model = EXPERIMENTS[name]().model
    gate = Tensor((2, model.width, model.mlp_width), np.dtype(np.float32), lambda a, b: np.zeros(()))
    ((_, tensor),) = as_released("flax", model, {"layer_0/mlp/gating_einsum/w": gate}).items()
    widths = (model.width, model.mlp_width)
    assert tensor.shape[1:] == (widths if name in ("gemma-2b", "gemma-7b", "gemma2-2b") else widths[::-1])


# config.json of the hub's files as transformers 4 wrote them, as far as it tells the model.
HUB = {
    "gemma-7b": {"model_type": "gemma", "hidden_act": "gelu", "rope_theta": 10000.0, "vocab_size": 256000},
    "gemma2-9b": {
        "model_type": "gemma2",
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "num_attention_heads": 16,
        "num_hidden_layers": 42,
        "num_key_value_heads": 8,
        "query_pre_attn_scalar": 256,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
    },
    "gemma2-27b": {
        "model_type": "gemma2",
        "head_dim": 128,
        "hidden_size": 4608,
        "intermediate_size": 36864,
        "num_attention_heads": 32,
        "num_hidden_layers": 46,
        "num_key_value_heads": 16,
        "query_pre_attn_scalar": 144,
    },
    "gemma3-1b": {
        "model_type": "gemma3_text",
        "vocab_size": 262144,
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_attention_heads": 4,
        "num_hidden_layers": 26,
        "num_key_value_heads": 1,
        "rope_local_base_freq": 10000,
        "rope_theta": 1000000,
        "rope_scaling": None,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
    },
    "gemma3-4b": {
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "vision_config": {},
    },
    "gemma3-27b": {
        "model_type": "gemma3",
        "text_config": {
            "head_dim": 128,
            "hidden_size": 5376,
            "intermediate_size": 21504,
            "num_attention_heads": 32,
            "num_hidden_layers": 62,
            "num_key_value_heads": 16,
            "query_pre_attn_scalar": 168,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
    },
}


@pytest.mark.parametrize("name", HUB)
def test_the_hubs_config_files_name_the_published_models(tmp_path, name):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(HUB[name]))
    assert gemma_config.from_hf(file) == EXPERIMENTS[name]().model


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name.startswith("gemma")])
def test_what_we_write_in_config_json_is_read_back_as_the_same_model(tmp_path, name):
    model = EXPERIMENTS[name]().model
    file = tmp_path / "config.json"
    file.write_text(json.dumps(gemma_config.to_hf(model)))
    assert gemma_config.from_hf(file) == model


def test_published_flax_shapes_are_known():
    """By the first layer's shapes and the number of layers; tensors are never read."""
    for name, make in EXPERIMENTS.items():
        model = make().model
        if name.startswith("gemma") and not name.endswith(("tiny", "-chat")):
            tensors = as_released("flax", model, shapes_in_flax(model))
            assert gemma_config.known_by_shapes("x", named("flax", tensors)[0]) == name


def shapes_in_flax(model: GemmaConfig) -> dict[str, Tensor]:
    d, f, n, k, h = model.width, model.mlp_width, model.num_heads, model.num_kv_heads, model.head_dim
    shapes = {"embedder/input_embedding": (model.table_rows, d)}
    for i in range(model.depth):
        layer = {"mlp/gating_einsum/w": (2, d, f), "mlp/linear/w": (f, d), "attn/attn_vec_einsum/w": (n, h, d)}
        parts = 3 if k == n else 2
        layer |= {f"attn/{'qkv' if k == n else 'kv'}_einsum/w[{j}]": (k, d, h) for j in range(parts)}
        layer |= {"attn/_query_norm/scale": (h,)} if model.qk_norm else {}
        layer |= {"post_ffw_norm/scale": (d,)} if model.post_norm else {}
        shapes |= {f"layer_{i}/{name}": shape for name, shape in layer.items()}
    nothing = np.dtype(np.float32)
    return {name: Tensor(shape, nothing, lambda a, b: np.zeros(())) for name, shape in shapes.items()}


def test_image_rows_of_hugging_faces_table_are_cut():
    model = EXPERIMENTS["gemma3-4b"]().model
    assert gemma_config.with_table_of(model, 262_208) == model
    assert gemma_config.with_table_of(EXPERIMENTS["gemma-2b"]().model, 256_000).table_rows == 256_128
    assert gemma_config.with_table_of(model, 100).vocab_size == 100
    values = np.arange(12.0).reshape(6, 2)
    table = in_memory(values)
    for rows in (4, 6, 9):
        wanted = np.concatenate([values, np.zeros((3, 2))])[:rows]
        for first in range(rows):
            np.testing.assert_array_equal(resized(table, rows).read(first, rows), wanted[first:])
            np.testing.assert_array_equal(resized(table, rows).read(first, first + 1), wanted[first : first + 1])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("missing", "1 missing (layer_1/attn/kv_einsum/w[0])"),
        ("unexpected", "1 unexpected (layer_1/attn/bias)"),
        ("mis-shaped", "1 mis-shaped (layer_0/mlp/linear/w is (57, 40), not (56, 40))"),
    ],
)
def test_what_does_not_fit_is_listed(imported, tmp_path, capsys, change, sentence):
    flax = flax_parameters(MODELS["gemma3 4b"])
    if change == "missing":
        flax["layer_1/attn/kv_einsum/w[1]"] = flax.pop("layer_1/attn/kv_einsum/w")[1]
    elif change == "unexpected":
        flax["layer_1/attn/bias"] = np.zeros(3, np.float32)
    else:
        flax["layer_0/mlp/linear/w"] = np.zeros((57, 40), np.float32)
    write_orbax(tmp_path / "theirs", orbax_tree(flax, MODELS["gemma3 4b"], "flat"))
    words = ["import", tmp_path / "theirs", "--to", tmp_path / "run", "--config", imported["gemma3 4b"] / "small.json"]
    said = refused(capsys, words, code=4)
    assert said.startswith(f"{tmp_path / 'theirs'} does not hold the tensors of this model: ")
    assert sentence in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hidden_activation": "gelu"}, "says hidden_activation='gelu', but Gemma here has only 'gelu_pytorch_tanh'"),
        (
            {"model_type": "gemma4"},
            "says model_type='gemma4', but Gemma here has only gemma, gemma2, gemma3_text, gemma3",
        ),
        ({"use_bidirectional_attention": True}, "says use_bidirectional_attention=True, but Gemma here has only False"),
        ({"layer_types": ["full_attention"]}, "does not describe a Gemma: 1 layer_types for 5 layers"),
        ({"layer_types": ["chunked"] * 5}, "does not say 'chunked', or not as Gemma knows it"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 8.0, "rope_theta": 1e6}}},
            "does not describe a Gemma: rope_type='yarn', but Gemma has only default and linear",
        ),
        ({"intermediate_size": 57}, "does not hold the tensors of this model: 15 mis-shaped"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_gemma_is_not_is_named(tmp_path, capsys, changes, sentence):
    model = MODELS["gemma3 4b"]
    write_hf(tmp_path / "theirs", hf_tensors(flax_parameters(model), model), hf_config(model) | changes)
    assert sentence in refused(capsys, ["import", tmp_path / "theirs", "--to", tmp_path / "run"], code=4)


def test_a_head_that_is_not_the_table_is_refused(tmp_path, capsys):
    model = MODELS["gemma3 1b"]
    tensors = hf_tensors(flax_parameters(model), model)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    write_hf(tmp_path / "theirs", tensors, hf_config(model))
    said = refused(capsys, ["import", tmp_path / "theirs", "--to", tmp_path / "run"], code=4)
    assert said.endswith("lm_head.weight is not model.embed_tokens.weight, but Gemma reads and writes with one table")


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("gemma1 mha", {"query_scale": 0.5}, "model.query_scale=0.5: Gemma 1 has head_dim**-0.5"),
        ("gemma1 mha", {"logits_soft_cap": 30.0}, "model.logits_soft_cap=30.0: Gemma 1 has none"),
        (
            "gemma1 mha",
            {"pattern": ("local", "global")},
            "model.pattern=('local', 'global'): Gemma 1 has global layers",
        ),
        (
            "gemma2 27b",
            {"rope_base_global": 1e6},
            "model.rope_base_local=10000.0 beside model.rope_base_global=1000000.0",
        ),
        ("gemma2 27b", {"query_scale": 0.3}, "model.query_scale=0.3: it is a whole number to the power of -0.5"),
        ("gemma3 4b", {"attention_soft_cap": 50.0}, "model.attention_soft_cap=50.0: only Gemma 2 has one"),
        ("gemma3 4b", {"post_norm": False}, "model.qk_norm=True beside model.post_norm=False: no Gemma has that"),
    ],
)
def test_what_transformers_cannot_represent_is_not_exported_there(imported, tmp_path, capsys, name, changes, words):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(config_file(tmp_path, dataclasses.replace(MODELS[name], **changes)).read_text())
    said = refused(capsys, ["export", run, "--format", "hf", "--to", tmp_path / "hf"], code=2)
    assert said.startswith(f"transformers cannot represent {words}")
    assert said.endswith("; --format flax can")


def test_a_config_of_another_family_is_refused(imported, tmp_path, capsys):
    source = imported["gemma3 4b"] / "theirs"
    words = ["import", source, "--to", tmp_path / "run", "--config", "griffin-tiny"]
    assert refused(capsys, words, code=2) == f"--config griffin-tiny is a griffin, but {source} is a gemma"


def test_shapes_of_no_known_model_need_a_config(imported, tmp_path, capsys):
    said = refused(capsys, ["import", imported["gemma3 4b"] / "theirs", "--to", tmp_path / "run"], code=2)
    assert said == (
        f"{imported['gemma3 4b'] / 'theirs'} has the shapes of no config here (depth 5, width 40, mlp_width 56, num_heads 4, "
        f"head_dim 12, num_kv_heads 2, qk_norm True, post_norm True): give --config NAME and what else its model sets, since "
        f"the tensors do not tell the model's pattern, window, query scale, soft caps and rotary embedding"
    )


def test_tensors_of_no_family_are_refused(tmp_path, capsys):
    write_hf(tmp_path / "theirs", {"model.h.0.weight": np.zeros(2, np.float32)}, {})
    said = refused(capsys, ["import", tmp_path / "theirs", "--to", tmp_path / "run"], code=4)
    assert said == f"{tmp_path / 'theirs'} is no Griffin or Gemma or NFNet in the hf layout: it has model.h.0.weight"
