"""What a checkpoint says about the Griffin it holds: by the shapes of its tensors, or by Hugging Face's config.json."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from configs import EXPERIMENTS
from configs.schema import ConfigError, GriffinConfig
from models.convert.hugging_face import read_config
from models.convert.tensors import ConversionError, Tensor

OUR_WINDOW = "podwright_window"  # transformers keeps a key it does not know
KINDS = {"recurrent": "rec", "attention": "attn"}
# What transformers can vary and Griffin cannot.
FIXED = {
    "model_type": "recurrent_gemma",
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 0.5,
}


def with_table_of(model: GriffinConfig, rows: int) -> GriffinConfig:
    """The vocabulary is as large as the table: released tables have more or fewer rows than configs say."""
    return dataclasses.replace(model, vocab_size=rows)


def known_by_shapes(source: str, tensors: Mapping[str, Tensor]) -> str:
    """The name of the experiment with the shapes of these Flax tensors, which cannot tell the window and the soft cap."""
    table = tensors.get("embedder/input_embedding")
    if table is None or len(table.shape) != 2:
        raise ConversionError(f"{source} is no Griffin in the Flax layout: it has no table embedder/input_embedding")
    blocks = {int(found[1]) for name in tensors if (found := re.match(r"blocks\.(\d+)/", name))}
    kinds = tuple(_kind_of_block(i, tensors) for i in range(max(blocks, default=-1) + 1))
    facts: dict[str, Any] = {"width": table.shape[1], "blocks": kinds}
    facts |= {
        field: number
        for field, suffix, axis in (
            ("mlp_width", "mlp_block/ffw_up/w", -1),
            ("rnn_width", "recurrent_block/linear_x/kernel", -1),
            ("num_gate_blocks", "rg_lru/a_gate/w", 0),
            ("conv_width", "conv_1d/w", 0),
            ("head", "attention_block/proj_k/kernel", -1),
        )
        if (number := next((t.shape[axis] for name, t in tensors.items() if name.endswith(suffix)), None)) is not None
    }
    for name, make in EXPERIMENTS.items():
        model = make().model
        if isinstance(model, GriffinConfig):
            same = {
                "width": model.width,
                "blocks": tuple(model.pattern[i % len(model.pattern)] for i in range(model.depth)),
                "head": model.width // model.num_heads,
            }
            if all(same.get(field, getattr(model, field, None)) == fact for field, fact in facts.items()):
                return name
    shown = {**facts, "blocks": len(kinds)}
    listed = ", ".join(f"{field} {fact}" for field, fact in shown.items())
    raise ConfigError(
        f"{source} has the shapes of no config here ({listed}): give --config NAME and what else its model sets, "
        f"since the tensors do not tell model.window, model.logits_soft_cap and model.embedding_scale"
    )


def _kind_of_block(i: int, tensors: Mapping[str, Tensor]) -> str:
    return "attn" if any(name.startswith(f"blocks.{i}/attention_block/") for name in tensors) else "rec"


def from_hf(file: pathlib.Path) -> GriffinConfig:
    """The model that a config.json describes. Raises ConversionError where it is none of Griffin's."""
    given = read_config(file)
    given |= given.get("rope_parameters") or {}
    for key, value in FIXED.items():
        if given.get(key, value) != value or (key == "num_key_value_heads" and key not in given):
            raise ConversionError(f"{file} says {key}={given.get(key)!r}, but Griffin here has only {value!r}")
    try:
        width, heads = given["hidden_size"], given["num_attention_heads"]
        return GriffinConfig(
            vocab_size=given.get("vocab_size", 256_000),
            width=width,
            depth=given["num_hidden_layers"],
            rnn_width=given.get("lru_width") or width,
            mlp_width=given["intermediate_size"] // 2,  # of both branches
            num_heads=heads,
            num_gate_blocks=heads,
            pattern=tuple(KINDS[kind] for kind in given.get("block_types") or ("recurrent", "recurrent", "attention")),
            # The released files say 2048 and mean what DeepMind does by it, 2048 keys and the token itself.
            window=given.get(OUR_WINDOW) or given.get("attention_window_size", 2048),
            conv_width=given.get("conv1d_width", 4),
            embedding_scale=True,
            logits_soft_cap=float(given.get("logits_soft_cap", 30.0)),
        )
    except KeyError as error:
        raise ConversionError(f"{file} does not say {error.args[0]!r}, or not as Griffin knows it") from None
    except (TypeError, ValueError) as error:
        raise ConversionError(f"{file} does not describe a Griffin: {error}") from None


def to_hf(model: GriffinConfig) -> dict[str, Any]:
    """A config.json with which transformers computes what this model computes. Raises ConfigError where it cannot."""
    reasons = [
        (not model.embedding_scale, f"{model.show('embedding_scale')}: it always scales embeddings"),
        (not model.logits_soft_cap, f"{model.show('logits_soft_cap')}: it always caps logits"),
        (
            model.rnn_width != model.width,
            f"{model.show('rnn_width')} beside {model.show('width')}: its cache has model.width channels, so that "
            f"one-token prompts fail",
        ),
        (
            model.num_heads != model.num_gate_blocks,
            f"{model.show('num_gate_blocks')} beside {model.show('num_heads')}: it has one number for both",
        ),
    ]
    if found := [reason for holds, reason in reasons if holds]:
        raise ConfigError(f"transformers cannot represent {found[0]}; --format flax can")
    names = {ours: theirs for theirs, ours in KINDS.items()}
    return {
        "architectures": ["RecurrentGemmaForCausalLM"],
        "model_type": "recurrent_gemma",
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "lru_width": model.rnn_width,
        "intermediate_size": 2 * model.mlp_width,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": 1,
        "head_dim": model.width // model.num_heads,
        "block_types": [names[kind] for kind in model.pattern],
        # transformers counts the token itself, DeepMind does not.
        "attention_window_size": model.window + 1,
        OUR_WINDOW: model.window,
        "conv1d_width": model.conv_width,
        "logits_soft_cap": model.logits_soft_cap,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }


def readme(model: GriffinConfig, layout: str) -> list[str]:
    """Lines for whoever gets an export."""
    if layout == "hf":
        return [
            f"`attention_window_size` is {model.window + 1} because transformers counts the token itself, while the model",
            f"was trained to see itself and {model.window} earlier tokens. transformers agrees with it for rows without",
            "padding and with one document each; padded and packed rows leak there (as of 5.23).",
        ]
    lines = [
        "An orbax folder in the layout of DeepMind's `recurrentgemma`. Not told by the tensors:",
        f"`attention_window_size={model.window}`, `logits_soft_cap={model.logits_soft_cap:g}`,",
        f"`embeddings_scale_by_sqrt_dim={model.embedding_scale}`.",
    ]
    if model.num_heads != model.num_gate_blocks:
        lines.append(f"That package cannot build {model.num_heads} heads beside {model.num_gate_blocks} gate blocks.")
    return lines
