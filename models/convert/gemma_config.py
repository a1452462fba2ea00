"""What a checkpoint says about the Gemma it holds: by the shapes of its tensors, or by Hugging Face's config.json."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from configs import EXPERIMENTS
from configs.schema import ConfigError, GemmaConfig
from models.convert.hugging_face import read_config
from models.convert.tensors import ConversionError, Tensor

# What transformers takes for a key that a config.json leaves out.
GEMMA1: dict[str, Any] = dict(
    vocab_size=256_000,
    hidden_size=3072,
    intermediate_size=24576,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=16,
    head_dim=256,
)
GEMMA2: dict[str, Any] = dict(
    vocab_size=256_000,
    hidden_size=2304,
    intermediate_size=9216,
    num_hidden_layers=26,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=256,
    query_pre_attn_scalar=256,
    sliding_window=4096,
    sliding_window_pattern=2,
    attn_logit_softcapping=50.0,
    final_logit_softcapping=30.0,
)
# Its attention ignores attn_logit_softcapping.
GEMMA3: dict[str, Any] = {
    **GEMMA2,
    **dict(vocab_size=262_208, sliding_window_pattern=6, attn_logit_softcapping=None, final_logit_softcapping=None),
}
DEFAULTS = {"gemma": GEMMA1, "gemma2": GEMMA2, "gemma3_text": GEMMA3}
# What transformers can vary and Gemma cannot.
FIXED = {
    "rms_norm_eps": (1e-6,),
    "hidden_activation": ("gelu_pytorch_tanh", None),
    "attention_bias": (False,),
    "use_bidirectional_attention": (False, None),
    "tie_word_embeddings": (True,),
}
KINDS = {"sliding_attention": "local", "full_attention": "global"}
TEXT_ROWS, ROWS_WITH_IMAGES = 262_144, 262_208  # of Gemma 3's table: Hugging Face appends 64 to models that read images
FACTS = {  # fields that tensors of the first layer tell: the end of a name, and an axis
    "width": ("mlp/linear/w", 1),
    "mlp_width": ("mlp/linear/w", 0),
    "num_heads": ("attn/attn_vec_einsum/w", 0),
    "head_dim": ("attn/attn_vec_einsum/w", 1),
}


def with_table_of(model: GemmaConfig, rows: int) -> GemmaConfig:
    """The vocabulary is as large as the table, unless the table differs by rows that are no tokens of text."""
    if rows in (model.vocab_size, model.table_rows) or (model.vocab_size, rows) == (TEXT_ROWS, ROWS_WITH_IMAGES):
        return model
    return dataclasses.replace(model, vocab_size=rows, padding_rows=0)


def known_by_shapes(source: str, tensors: Mapping[str, Tensor]) -> str:
    """The name of the experiment with the shapes of these Flax tensors."""
    layers = {int(found[1]) for name in tensors if (found := re.match(r"layer_(\d+)/", name))}
    facts: dict[str, Any] = {"depth": max(layers, default=-1) + 1}
    for field, (end, axis) in FACTS.items():
        tensor = tensors.get(f"layer_0/{end}")
        if tensor is None or len(tensor.shape) <= axis:
            raise ConversionError(f"{source} is no Gemma in the Flax layout: it has no layer_0/{end}")
        facts[field] = tensor.shape[axis]
    keys = tensors.get("layer_0/attn/kv_einsum/w[0]")
    facts["num_kv_heads"] = facts["num_heads"] if keys is None or not keys.shape else keys.shape[0]
    facts["qk_norm"] = "layer_0/attn/_query_norm/scale" in tensors
    facts["post_norm"] = "layer_0/post_ffw_norm/scale" in tensors
    for name, make in EXPERIMENTS.items():
        model = make().model
        if isinstance(model, GemmaConfig) and all(getattr(model, field) == fact for field, fact in facts.items()):
            return name
    listed = ", ".join(f"{field} {fact}" for field, fact in facts.items())
    raise ConfigError(
        f"{source} has the shapes of no config here ({listed}): give --config NAME and what else its model sets, since "
        f"the tensors do not tell the model's pattern, window, query scale, soft caps and rotary embedding"
    )


def from_hf(file: pathlib.Path) -> GemmaConfig:
    """The model that a config.json describes. Raises ConversionError where it is none of Gemma's."""
    given = read_config(file)
    if given.get("model_type") == "gemma3":  # with an image encoder
        given = {"model_type": "gemma3_text", **given.get("text_config", {})}
    kind = given.get("model_type")
    if kind not in DEFAULTS:
        raise ConversionError(f"{file} says model_type={kind!r}, but Gemma here has only {', '.join(DEFAULTS)}, gemma3")
    if kind == "gemma" and given.get("hidden_act") not in ("gelu", "gelu_pytorch_tanh", None):
        raise ConversionError(f"{file} says hidden_act={given['hidden_act']!r}, but Gemma has only gelu_pytorch_tanh")
    for key, allowed in FIXED.items():
        if given.get(key, allowed[0]) not in allowed:
            raise ConversionError(f"{file} says {key}={given[key]!r}, but Gemma here has only {allowed[0]!r}")
    try:
        return _published(_described(kind, {**DEFAULTS[kind], **given}))
    except KeyError as error:
        raise ConversionError(f"{file} does not say {error.args[0]!r}, or not as Gemma knows it") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise ConversionError(f"{file} does not describe a Gemma: {error}") from None


def _described(kind: str, given: dict[str, Any]) -> GemmaConfig:
    head, scalar = given["head_dim"], given.get("query_pre_attn_scalar")
    base_local, base_global, divisor = _rotary(kind, given)
    depth = given["num_hidden_layers"]
    return GemmaConfig(
        vocab_size=TEXT_ROWS if given["vocab_size"] == ROWS_WITH_IMAGES else given["vocab_size"],
        width=given["hidden_size"],
        depth=depth,
        num_heads=given["num_attention_heads"],
        num_kv_heads=given["num_key_value_heads"],
        head_dim=head,
        mlp_width=given["intermediate_size"],
        pattern=("global",) if kind == "gemma" else _pattern(given, depth),
        window=given.get("sliding_window") or GemmaConfig.window,
        query_scale=0.0 if scalar in (head, None) else scalar**-0.5,
        qk_norm=kind == "gemma3_text",
        post_norm=kind != "gemma",
        attention_soft_cap=float(given["attn_logit_softcapping"] or 0) if kind == "gemma2" else 0.0,
        logits_soft_cap=float(given.get("final_logit_softcapping") or 0),
        rope_base_local=base_local,
        rope_base_global=base_global,
        rope_divisor_global=divisor,
    )


def _pattern(given: dict[str, Any], depth: int) -> tuple[str, ...]:
    """The shortest one that gives all layers their kinds; the released one where it is cut short."""
    every = given["sliding_window_pattern"]
    types = given.get("layer_types")
    if types is None:
        return ("local",) * (every - 1) + ("global",)
    kinds = [KINDS[name] for name in types]
    if len(kinds) != depth:
        raise ValueError(f"{len(kinds)} layer_types for {depth} layers")
    period = next(p for p in range(1, depth + 1) if all(kinds[i] == kinds[i % p] for i in range(depth)))
    return tuple(kinds[:period])


def _rotary(kind: str, given: dict[str, Any]) -> tuple[float, float, float]:
    """Base of local and of global layers, and the divisor of positions in global ones."""
    ropes = given.get("rope_parameters") or {}  # since transformers 5; of Gemma 3, one for each kind of layer
    if kind == "gemma3_text":
        own = {name: ropes.get(name) or {} for name in KINDS}
        base_local = own["sliding_attention"].get("rope_theta") or given.get("rope_local_base_freq") or 1e4
        base_global = own["full_attention"].get("rope_theta") or given.get("rope_theta") or 1e6
        local, scaling = own["sliding_attention"], own["full_attention"] if ropes else given.get("rope_scaling") or {}
    else:
        base_local = base_global = ropes.get("rope_theta") or given.get("rope_theta") or 1e4
        local, scaling = {}, ropes or given.get("rope_scaling") or {}
    for rope in (local, scaling):
        form = rope.get("rope_type") or rope.get("type") or "default"
        if form not in ("default", "linear"):
            raise ValueError(f"rope_type={form!r}, but Gemma has only default and linear")
    divisor = float(scaling.get("factor") or 1.0)
    if local.get("factor", 1.0) != 1.0 or (kind == "gemma2" and divisor != 1.0):
        raise ValueError("rotary embedding is scaled in local layers, too")
    # Gemma 1 has no local layers; their base is then what it is elsewhere.
    return (1e4 if kind == "gemma" else float(base_local)), float(base_global), divisor


def _published(model: GemmaConfig) -> GemmaConfig:
    """The same model with the padding rows of its release, which Hugging Face cuts off, where it is a published one."""
    published = [made for make in EXPERIMENTS.values() if isinstance(made := make().model, GemmaConfig)]
    return next((made for made in published if dataclasses.replace(made, padding_rows=0) == model), model)


def to_hf(model: GemmaConfig) -> dict[str, Any]:
    """A config.json with which transformers computes what this model computes. Raises ConfigError where it cannot."""
    kind = {(False, False): "gemma", (False, True): "gemma2", (True, True): "gemma3_text"}.get(
        (model.qk_norm, model.post_norm)
    )
    if kind is None:
        raise _not_there(f"{model.show('qk_norm')} beside {model.show('post_norm')}: no Gemma has that")
    scalar = (model.query_scale or model.head_dim**-0.5) ** -2
    local = "local" in model.pattern
    reasons = [
        (kind == "gemma" and local, f"{model.show('pattern')}: Gemma 1 has global layers alone"),
        (
            kind == "gemma" and round(scalar) != model.head_dim,
            f"{model.show('query_scale')}: Gemma 1 has head_dim**-0.5",
        ),
        (abs(scalar - round(scalar)) > 1e-3, f"{model.show('query_scale')}: it is a whole number to the power of -0.5"),
        (kind == "gemma" and model.logits_soft_cap > 0, f"{model.show('logits_soft_cap')}: Gemma 1 has none"),
        (
            kind != "gemma2" and model.attention_soft_cap > 0,
            f"{model.show('attention_soft_cap')}: only Gemma 2 has one",
        ),
        (
            kind == "gemma2" and local and model.rope_base_local != model.rope_base_global,
            f"{model.show('rope_base_local')} beside {model.show('rope_base_global')}: Gemma 2 has one for both",
        ),
        (
            kind == "gemma2" and local and model.rope_divisor_global != 1,
            f"{model.show('rope_divisor_global')}: Gemma 2 has one for all layers",
        ),
        (
            kind != "gemma" and model.width % model.num_heads > 0,
            f"{model.show('num_heads')}: it has to divide {model.show('width')}",
        ),
    ]
    if found := [reason for holds, reason in reasons if holds]:
        raise _not_there(found[0])
    return {
        "architectures": [{"gemma3_text": "Gemma3ForCausalLM"}.get(kind, f"{kind.capitalize()}ForCausalLM")],
        "model_type": kind,
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "intermediate_size": model.mlp_width,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "max_position_embeddings": 8192 if not model.qk_norm else 32768 if model.rope_divisor_global == 1 else 131072,
        "hidden_act" if kind == "gemma" else "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "rope_parameters": _ropes(model, kind),
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        **({} if kind == "gemma" else _beyond_gemma1(model, round(scalar))),
    }


def _ropes(model: GemmaConfig, kind: str) -> dict[str, Any]:
    scaled = {"rope_type": "default", "rope_theta": model.rope_base_global}
    if model.rope_divisor_global != 1:
        scaled |= {"rope_type": "linear", "factor": model.rope_divisor_global}
    if kind != "gemma3_text":
        return scaled
    return {
        "full_attention": scaled,
        "sliding_attention": {"rope_type": "default", "rope_theta": model.rope_base_local},
    }


def _beyond_gemma1(model: GemmaConfig, scalar: int) -> dict[str, Any]:
    names = {ours: theirs for theirs, ours in KINDS.items()}
    return {
        "query_pre_attn_scalar": scalar,
        "sliding_window": model.window,
        "layer_types": [names[model.pattern[i % len(model.pattern)]] for i in range(model.depth)],
        "attn_logit_softcapping": model.attention_soft_cap or None,
        "final_logit_softcapping": model.logits_soft_cap or None,
    }


def _not_there(reason: str) -> ConfigError:
    return ConfigError(f"transformers cannot represent {reason}; --format flax can")


def readme(model: GemmaConfig, layout: str) -> list[str]:
    """Lines for whoever gets an export."""
    if layout == "hf":
        lines = ['transformers computes these logits with `attn_implementation="eager"`, in float32 to rounding.']
        if model.padding_rows:
            lines.append(f"The {model.padding_rows} padding rows of the table, which are no tokens, are cut off.")
        return lines
    return [
        "An orbax folder in the layout of the released Gemma checkpoints. Not told by the tensors:",
        f"pattern `{','.join(model.pattern)}`, window {model.window} with the token itself, query scale "
        f"{model.query_scale or model.head_dim**-0.5:g},",
        f"soft caps {model.attention_soft_cap:g} of attention and {model.logits_soft_cap:g} of logits (0: none),",
        f"rotary bases {model.rope_base_local:g} of local and {model.rope_base_global:g} of global layers, whose positions "
        f"are divided by {model.rope_divisor_global:g}.",
    ]
