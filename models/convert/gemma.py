"""Gemma's arrays in DeepMind's Flax layout and in Hugging Face's: one row a parameter, and names of several releases.

`name[i]` is entry i of the leading axis of a tensor `name`: what one of our arrays has of a tensor that holds several.
Shapes: D model width, N query heads, K key-value heads, H head features, F MLP width, V vocabulary.
"""

import re
from collections.abc import Mapping

import numpy as np

from configs.schema import GemmaConfig
from models.convert.layout import Layout, Row
from models.convert.tensors import Tensor, split, stacked

# Tensors of the image encoder and its projections, which a text model has not.
IMAGES = {
    "flax": re.compile(r"SigLiPFromPatches_0/|embedder/mm_"),
    "hf": re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\."),
}
HF_PREFIX = re.compile(r"^(language_model\.model|model\.language_model)\.")  # of files that also hold an image encoder
STACKED = re.compile(r"stacked_layers/attention_type_(\d+)/(.*)")


def _swapped(name: str) -> Row:
    """Our (a b c) is their (b a c)."""
    return Row((name,), lambda x: (x.transpose(1, 0, 2),), lambda parts: parts[0].transpose(1, 0, 2))


def _transposed(name: str) -> Row:
    """Our (D ...) is their (... D), flat."""
    return Row((name,), lambda x: (x.reshape(x.shape[0], -1).T,), lambda parts: parts[0].T)


def flax(model: GemmaConfig) -> Layout:
    q, k, v = ("q_einsum/w", "kv_einsum/w[0]", "kv_einsum/w[1]")
    if model.num_heads == model.num_kv_heads:
        q, k, v = (f"qkv_einsum/w[{i}]" for i in range(3))
    block = {
        "attention_norm": Row(("pre_attention_norm/scale",)),
        "attention/q/kernel": _swapped(f"attn/{q}"),
        "attention/k/kernel": _swapped(f"attn/{k}"),
        "attention/v/kernel": _swapped(f"attn/{v}"),
        "attention/out/kernel": Row(("attn/attn_vec_einsum/w",)),
        "mlp_norm": Row(("pre_ffw_norm/scale",)),
        "mlp/up/kernel": _swapped("mlp/gating_einsum/w"),  # branch 0 is the gated one in both
        "mlp/down/kernel": Row(("mlp/linear/w",)),
    }
    if model.qk_norm:
        block["attention/q_norm"] = Row(("attn/_query_norm/scale",))
        block["attention/k_norm"] = Row(("attn/_key_norm/scale",))
    if model.post_norm:
        block["attention_post_norm"] = Row(("post_attention_norm/scale",))
        block["mlp_post_norm"] = Row(("post_ffw_norm/scale",))
    return Layout(
        name="flax",
        outer={"embedding/table": Row(("embedder/input_embedding",)), "final_norm": Row(("final_norm/scale",))},
        blocks={"local": block, "global": block},
        prefix=lambda i: f"layer_{i}/",
        table_rows=model.table_rows,
    )


def hf(model: GemmaConfig) -> Layout:
    block = {
        "attention_norm": Row(("input_layernorm.weight",)),
        "attention/q/kernel": _transposed("self_attn.q_proj.weight"),
        "attention/k/kernel": _transposed("self_attn.k_proj.weight"),
        "attention/v/kernel": _transposed("self_attn.v_proj.weight"),
        "attention/out/kernel": Row(
            ("self_attn.o_proj.weight",), lambda x: (x.reshape(-1, x.shape[-1]).T,), lambda parts: parts[0].T
        ),
        # Without post norms this name means the norm before the MLP; with them, the one behind attention.
        "mlp_norm": Row(("post_attention_layernorm.weight",)),
        "mlp/up/kernel": Row(
            ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
            lambda x: (x[:, 0].T, x[:, 1].T),
            lambda parts: np.stack([part.T for part in parts], axis=1),
        ),
        "mlp/down/kernel": _transposed("mlp.down_proj.weight"),
    }
    if model.qk_norm:
        block["attention/q_norm"] = Row(("self_attn.q_norm.weight",))
        block["attention/k_norm"] = Row(("self_attn.k_norm.weight",))
    if model.post_norm:
        block["attention_post_norm"] = block["mlp_norm"]
        block["mlp_norm"] = Row(("pre_feedforward_layernorm.weight",))
        block["mlp_post_norm"] = Row(("post_feedforward_layernorm.weight",))
    return Layout(
        name="hf",
        outer={"embedding/table": Row(("model.embed_tokens.weight",)), "final_norm": Row(("model.norm.weight",))},
        blocks={"local": block, "global": block},
        prefix=lambda i: f"model.layers.{i}.",
        table_rows=model.vocab_size,
    )


def named(layout: str, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """A checkpoint's tensors by the names of the tables above, and the names of those left out, which are of images."""
    if layout == "flax":
        tensors = {name.removeprefix("transformer/"): tensor for name, tensor in tensors.items()}
    images = [name for name in tensors if IMAGES[layout].match(name)]
    text = {name: tensor for name, tensor in tensors.items() if name not in set(images)}
    if layout == "hf":
        renamed = {HF_PREFIX.sub("model.", name): tensor for name, tensor in text.items()}
        return {name.removeprefix("language_model."): tensor for name, tensor in renamed.items()}, images
    return _canonical(_unstacked(text)), images


def _unstacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Layers apart where layers of one place in the pattern are stacked: entry s of place j of P is layer s * P + j."""
    places = [int(match[1]) for name in tensors if (match := STACKED.match(name))]
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if match := STACKED.match(name):
            for i, layer in enumerate(split(tensor)):
                found[f"layer_{i * (max(places) + 1) + int(match[1])}/{match[2]}"] = layer
        else:
            found[name] = tensor
    return found


def _canonical(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every leaf named, what holds several arrays split, and gate and up as (2 D F), whichever way they are stored."""
    table = tensors.get("embedder/input_embedding")
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        name = f"{name}/w" if name.endswith(("mlp/gating_einsum", "mlp/linear")) else name
        if name.endswith(("/kv_einsum/w", "/qkv_einsum/w")):
            found |= {f"{name}[{i}]": entry for i, entry in enumerate(split(tensor))}
        elif name.endswith("gating_einsum/w") and table is not None and tensor.shape[2:] == table.shape[1:]:
            found[name] = gate_turned(tensor)
        else:
            found[name] = tensor
    return found


def gate_turned(tensor: Tensor) -> Tensor:
    """(2 F D) as (2 D F), or the other way."""
    two, a, b = tensor.shape
    return Tensor((two, b, a), tensor.dtype, lambda first, end: tensor.read(first, end).swapaxes(1, 2))


def released(layout: str, model: GemmaConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a table above as they are released: nothing for Hugging Face's, for Flax's the inverse of `named`."""
    if layout == "hf":
        return dict(tensors)
    turned = _gate_last(model)
    return {
        f"transformer/{name}": gate_turned(tensor) if turned and name.endswith("gating_einsum/w") else tensor
        for name, tensor in joined(tensors).items()
    }


def joined(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`name[0]`, `name[1]`, ... as one tensor `name`; the others as they are."""
    parts: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        parts.setdefault(name.partition("[")[0], []).append(tensor)
    return {name: found[0] if name in tensors else stacked(found) for name, found in parts.items()}


def _gate_last(model: GemmaConfig) -> bool:
    """Whether the released model has gate and up as (2 F D): Gemma 3, and Gemma 2 but for its 2B."""
    return model.post_norm and (model.qk_norm or model.width != 2304)
