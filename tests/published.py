"""A small RecurrentGemma as its makers publish it, written out name by name with nothing of ours but the sizes."""

import json
import pathlib

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
from safetensors.numpy import save_file

from configs.griffin import tiny
from configs.schema import Config, GriffinConfig, TextData
from configs.store import to_json

V, D, F, N, G, L, W = 48, 64, 96, 5, 4, 64, 8
KINDS = ("rec", "rec", "attn", "rec", "rec")
MODEL = GriffinConfig(
    vocab_size=V,
    width=D,
    depth=N,
    rnn_width=L,
    mlp_width=F,
    num_heads=G,
    num_gate_blocks=G,
    window=W,
    embedding_scale=True,
    logits_soft_cap=30.0,
)
HF_CONFIG = {
    "model_type": "recurrent_gemma",
    "vocab_size": V,
    "hidden_size": D,
    "num_hidden_layers": N,
    "lru_width": L,
    "intermediate_size": 2 * F,
    "num_attention_heads": G,
    "num_key_value_heads": 1,
    "block_types": ["recurrent", "recurrent", "attention"],
    "attention_window_size": W,
    "conv1d_width": 4,
    "logits_soft_cap": 30.0,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "partial_rotary_factor": 0.5,
    "rope_theta": 10000.0,
}


def config_file(folder: pathlib.Path, model: GriffinConfig = MODEL, **data) -> pathlib.Path:
    """A config with this model, for --config."""
    base = tiny()
    made = Config(name="small", model=model, data=TextData(**data), trainer=base.trainer, checkpoint=base.checkpoint)
    file = folder / "small.json"
    file.write_text(to_json(made))
    return file


def flax_parameters(seed: int = 0, dtype: type = np.float32) -> dict[str, np.ndarray]:
    """Random parameters by slash-joined names of the released Flax checkpoints."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int, scale: float = 0.1, shift: float = 0.0) -> np.ndarray:
        return (shift + scale * rng.standard_normal(shape)).astype(dtype)

    tree = {"embedder/input_embedding": draw(V, D, scale=D**-0.5), "final_norm/scale": draw(D)}
    for i, kind in enumerate(KINDS):
        block = {
            "temporal_pre_norm/scale": draw(D),
            "channel_pre_norm/scale": draw(D),
            "mlp_block/ffw_up/w": draw(2, D, F, scale=D**-0.5),
            "mlp_block/ffw_up/b": draw(2, 1, 1, F),
            "mlp_block/ffw_down/kernel": draw(F, D, scale=F**-0.5),
            "mlp_block/ffw_down/bias": draw(D),
        }
        if kind == "rec":
            for name, (a, b) in {"linear_x": (D, L), "linear_y": (D, L), "linear_out": (L, D)}.items():
                block[f"recurrent_block/{name}/kernel"] = draw(a, b, scale=a**-0.5)
                block[f"recurrent_block/{name}/bias"] = draw(b)
            block["recurrent_block/conv_1d/w"] = draw(4, L, scale=0.5)
            block["recurrent_block/conv_1d/b"] = draw(L)
            block["recurrent_block/rg_lru/a_param"] = draw(L, scale=1.0, shift=-4.5)
            for gate in ("input_gate", "a_gate"):
                block[f"recurrent_block/rg_lru/{gate}/w"] = draw(G, L // G, L // G, scale=0.25)
                block[f"recurrent_block/rg_lru/{gate}/b"] = draw(G, L // G)
        else:
            for name, width in {"proj_q": D, "proj_k": D // G, "proj_v": D // G}.items():
                block[f"attention_block/{name}/kernel"] = draw(D, width, scale=D**-0.5)
            block["attention_block/proj_final/kernel"] = draw(D, D, scale=D**-0.5)
            block["attention_block/proj_final/bias"] = draw(D)
        tree |= {f"blocks.{i}/{name}": value for name, value in block.items()}
    return tree


def nest(flat: dict[str, np.ndarray]) -> dict:
    tree: dict = {}
    for name, value in flat.items():
        *folders, last = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = value
    return tree


def flatten(tree: dict, path: str = "") -> dict[str, np.ndarray]:
    found = {}
    for key, child in tree.items():
        found |= flatten(child, f"{path}{key}/") if isinstance(child, dict) else {path + key: np.asarray(child)}
    return found


def write_flax(folder: pathlib.Path, flat: dict[str, np.ndarray], wrapped: bool = False, **how) -> pathlib.Path:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**how)) as checkpointer:
        checkpointer.save(folder.absolute(), {"params": nest(flat)} if wrapped else nest(flat))
    return folder


def read_flax(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """As recurrentgemma's notebooks read one: orbax alone."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        return flatten(checkpointer.restore(folder.absolute()))


def hf_tensors(flax: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same parameters as Hugging Face names and turns them."""
    found = {
        "model.embed_tokens.weight": flax["embedder/input_embedding"],
        "model.final_norm.weight": flax["final_norm/scale"],
    }
    for i, kind in enumerate(KINDS):
        b, to = f"blocks.{i}", f"model.layers.{i}"
        for norm in ("temporal_pre_norm", "channel_pre_norm"):
            found[f"{to}.{norm}.weight"] = flax[f"{b}/{norm}/scale"]
        for branch, name in enumerate(("gate_proj", "up_proj")):
            found[f"{to}.mlp_block.{name}.weight"] = flax[f"{b}/mlp_block/ffw_up/w"][branch].T
            found[f"{to}.mlp_block.{name}.bias"] = flax[f"{b}/mlp_block/ffw_up/b"][branch, 0, 0]
        found[f"{to}.mlp_block.down_proj.weight"] = flax[f"{b}/mlp_block/ffw_down/kernel"].T
        found[f"{to}.mlp_block.down_proj.bias"] = flax[f"{b}/mlp_block/ffw_down/bias"]
        t = f"{to}.temporal_block"
        if kind == "rec":
            r = f"{b}/recurrent_block"
            for name in ("linear_x", "linear_y", "linear_out"):
                found[f"{t}.{name}.weight"] = flax[f"{r}/{name}/kernel"].T
                found[f"{t}.{name}.bias"] = flax[f"{r}/{name}/bias"]
            found[f"{t}.conv_1d.weight"] = flax[f"{r}/conv_1d/w"].T[:, None, :]
            found[f"{t}.conv_1d.bias"] = flax[f"{r}/conv_1d/b"]
            found[f"{t}.rg_lru.recurrent_param"] = flax[f"{r}/rg_lru/a_param"]
            for theirs, name in (("input_gate", "input_gate"), ("recurrent_gate", "a_gate")):
                found[f"{t}.rg_lru.{theirs}_weight"] = flax[f"{r}/rg_lru/{name}/w"]
                found[f"{t}.rg_lru.{theirs}_bias"] = flax[f"{r}/rg_lru/{name}/b"]
        else:
            a = f"{b}/attention_block"
            for name, theirs in (("q_proj", "proj_q"), ("k_proj", "proj_k"), ("v_proj", "proj_v")):
                found[f"{t}.{name}.weight"] = flax[f"{a}/{theirs}/kernel"].T
            found[f"{t}.o_proj.weight"] = flax[f"{a}/proj_final/kernel"].T
            found[f"{t}.o_proj.bias"] = flax[f"{a}/proj_final/bias"]
    return {name: np.ascontiguousarray(value) for name, value in found.items()}


def write_hf(folder: pathlib.Path, tensors: dict[str, np.ndarray], files: int = 1, **changes) -> pathlib.Path:
    """A folder with config.json and one file, or several and their index."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(HF_CONFIG | changes))
    names = list(tensors)
    if files == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {}
    for i in range(files):
        file = f"model-{i + 1:05}-of-{files:05}.safetensors"
        part = {name: tensors[name] for name in names[i::files]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


BFLOAT16 = ml_dtypes.bfloat16
