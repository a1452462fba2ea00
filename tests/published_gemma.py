"""Small Gemmas as their makers publish them, written out name by name with nothing of ours but the sizes."""

import json
import pathlib

import numpy as np
import orbax.checkpoint as ocp
from safetensors.numpy import save_file

from configs.schema import GemmaConfig

# D = 40, so that N * H = 48 is not D and sqrt(D) = 6.3246 is not a bfloat16; W = 5, a ninth of a row of 45 tokens.
TINY = dict(vocab_size=48, width=40, num_heads=4, head_dim=12, mlp_width=56)
GEMMA1 = dict(pattern=("global",), qk_norm=False, post_norm=False, rope_base_global=1e4)
GEMMA2 = dict(window=5, pattern=("local", "global"), qk_norm=False, rope_base_global=1e4, logits_soft_cap=30.0)
GEMMA3 = dict(window=5, pattern=("local", "local", "global"), rope_base_global=1e6)
# Depths leave one local layer of Gemma 2, and two of Gemma 3, outside the scanned groups.
MODELS = {
    "gemma1 mqa": GemmaConfig(**TINY, **GEMMA1, depth=2, num_kv_heads=1, padding_rows=4),
    "gemma1 mha": GemmaConfig(**TINY, **GEMMA1, depth=2, num_kv_heads=4),
    # A cap of 50 would not show on logits this small. The scale is the 27B's rule, (D / N)**-0.5.
    "gemma2 27b": GemmaConfig(
        **TINY, **GEMMA2, depth=5, num_kv_heads=2, padding_rows=4, attention_soft_cap=2.0, query_scale=10**-0.5
    ),
    "gemma3 1b": GemmaConfig(**TINY, **GEMMA3, depth=5, num_kv_heads=1),
    "gemma3 4b": GemmaConfig(**TINY, **GEMMA3, depth=5, num_kv_heads=2, rope_divisor_global=8.0),
}
# Two layers for rows of 8192 tokens, with scores large enough that rotary embedding counts among as many keys.
LONG = GemmaConfig(
    vocab_size=48,
    width=32,
    depth=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
    mlp_width=32,
    pattern=("local", "global"),
    window=64,
    rope_divisor_global=8.0,
)

WEIGHT = np.random.default_rng(2).standard_normal((45, 48)).astype(np.float32) / 45  # of logits, in a loss


def tokens_of(rows: int, length: int) -> np.ndarray:
    """None is 0, the padding token: transformers gives its row of the table no gradient from the input."""
    return np.random.default_rng(1).integers(1, 48, size=(rows, length)).astype(np.int32)


def flax_parameters(model: GemmaConfig, seed: int = 0, dtype: type = np.float32) -> dict:
    """Random parameters by slash-joined names of the released Flax checkpoints, norm offsets of either sign.

    Gate and up are (2 D F) in Gemma 1 and (2 F D) in the others, except in Gemma 2's 2B.
    """
    rng = np.random.default_rng(seed)
    d, f, n, k, h = model.width, model.mlp_width, model.num_heads, model.num_kv_heads, model.head_dim

    def draw(*shape: int, fan_in: int) -> np.ndarray:
        return (1.3 * fan_in**-0.5 * rng.standard_normal(shape)).astype(dtype)

    def norm(size: int) -> np.ndarray:
        return (0.3 * rng.standard_normal(size)).astype(dtype)

    tree = {
        "embedder/input_embedding": draw(model.vocab_size + model.padding_rows, d, fan_in=d),
        "final_norm/scale": norm(d),
    }
    for i in range(model.depth):
        layer = {"pre_attention_norm/scale": norm(d), "pre_ffw_norm/scale": norm(d)}
        if k == n:
            layer["attn/qkv_einsum/w"] = draw(3, n, d, h, fan_in=d)
        else:
            layer["attn/q_einsum/w"] = draw(n, d, h, fan_in=d)
            layer["attn/kv_einsum/w"] = draw(2, k, d, h, fan_in=d)
        layer["attn/attn_vec_einsum/w"] = draw(n, h, d, fan_in=n * h)
        layer["mlp/gating_einsum/w"] = draw(2, f, d, fan_in=d) if model.post_norm else draw(2, d, f, fan_in=d)
        layer["mlp/linear/w"] = draw(f, d, fan_in=f)
        if model.post_norm:
            layer |= {"post_attention_norm/scale": norm(d), "post_ffw_norm/scale": norm(d)}
        if model.qk_norm:
            layer |= {"attn/_query_norm/scale": norm(h), "attn/_key_norm/scale": norm(h)}
        tree |= {f"layer_{i}/{name}": value for name, value in layer.items()}
    return tree


def hf_tensors(flax: dict[str, np.ndarray], model: GemmaConfig, prefix: str = "model.") -> dict[str, np.ndarray]:
    """The same parameters as Hugging Face names and turns them; its table has no padding rows."""
    d = model.width
    found = {
        f"{prefix}embed_tokens.weight": flax["embedder/input_embedding"][: model.vocab_size],
        f"{prefix}norm.weight": flax["final_norm/scale"],
    }
    for i in range(model.depth):
        b, to = f"layer_{i}", f"{prefix}layers.{i}"
        if f"{b}/attn/qkv_einsum/w" in flax:
            q, k, v = flax[f"{b}/attn/qkv_einsum/w"]
        else:
            q, (k, v) = flax[f"{b}/attn/q_einsum/w"], flax[f"{b}/attn/kv_einsum/w"]
        for name, heads in (("q_proj", q), ("k_proj", k), ("v_proj", v)):
            found[f"{to}.self_attn.{name}.weight"] = np.concatenate([head.T for head in heads])
        found[f"{to}.self_attn.o_proj.weight"] = np.concatenate(list(flax[f"{b}/attn/attn_vec_einsum/w"])).T
        for branch, name in enumerate(("gate_proj", "up_proj")):
            matrix = flax[f"{b}/mlp/gating_einsum/w"][branch]
            found[f"{to}.mlp.{name}.weight"] = matrix if matrix.shape[1] == d else matrix.T
        found[f"{to}.mlp.down_proj.weight"] = flax[f"{b}/mlp/linear/w"].T
        norms = {"input_layernorm": "pre_attention_norm", "post_attention_layernorm": "pre_ffw_norm"}
        if model.post_norm:
            norms |= {
                "post_attention_layernorm": "post_attention_norm",
                "pre_feedforward_layernorm": "pre_ffw_norm",
                "post_feedforward_layernorm": "post_ffw_norm",
            }
        if model.qk_norm:
            norms |= {"self_attn.q_norm": "attn/_query_norm", "self_attn.k_norm": "attn/_key_norm"}
        found |= {f"{to}.{theirs}.weight": flax[f"{b}/{name}/scale"] for theirs, name in norms.items()}
    return {name: np.ascontiguousarray(value) for name, value in found.items()}


def hf_config(model: GemmaConfig) -> dict:
    """config.json as transformers 5 writes it, for the models above."""
    shared = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "intermediate_size": model.mlp_width,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    }
    if not model.post_norm:
        rope = {"rope_type": "default", "rope_theta": 10000.0}
        return shared | {"model_type": "gemma", "hidden_act": "gelu_pytorch_tanh", "rope_parameters": rope}
    kinds = {"local": "sliding_attention", "global": "full_attention"}
    shared |= {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": model.window,
        "layer_types": [kinds[model.pattern[i % len(model.pattern)]] for i in range(model.depth)],
    }
    if not model.qk_norm:
        return shared | {
            "model_type": "gemma2",
            "query_pre_attn_scalar": 10,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 30.0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        }
    scaled = {"rope_type": "linear", "factor": 8.0} if model.rope_divisor_global == 8 else {"rope_type": "default"}
    return shared | {
        "model_type": "gemma3_text",
        "query_pre_attn_scalar": model.head_dim,
        "rope_parameters": {
            "full_attention": scaled | {"rope_theta": 1000000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    }


def write_hf(folder: pathlib.Path, tensors: dict[str, np.ndarray], config: dict) -> pathlib.Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def orbax_tree(flax: dict[str, np.ndarray], model: GemmaConfig, layout: str) -> dict:
    """As the releases lay the parameters out on disk: "flat" (Kaggle's), "nested" or "stacked"."""
    if layout == "flat":
        tree: dict = {}
        for name, value in flax.items():
            folder, _, leaf = name.rpartition("/")
            tree.setdefault(f"transformer/{folder}", {})[leaf] = value
        return tree
    flat = {n.removesuffix("/w") if "/mlp/" in n else n: value for n, value in flax.items()}
    if layout == "stacked":
        period = len(model.pattern)
        names = {name.partition("/")[2] for name in flat if name.startswith("layer_")}
        for place in range(period):
            for name in names:
                layers = [flat.pop(f"layer_{i}/{name}") for i in range(place, model.depth, period)]
                flat[f"transformer/stacked_layers/attention_type_{place}/{name}"] = np.stack(layers)
        flat = {name if name.startswith("transformer/") else f"transformer/{name}": v for name, v in flat.items()}
    nested: dict = {}
    for name, value in flat.items():
        *folders, leaf = name.split("/")
        node = nested
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = value
    return nested


def write_orbax(folder: pathlib.Path, tree: dict) -> pathlib.Path:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(folder.absolute(), tree)
    return folder
