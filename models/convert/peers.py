"""The implementations that other people's checkpoints were made with: their logits, to compare ours with."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from configs.schema import ConfigError, GriffinConfig
from models.convert.griffin_config import to_hf
from models.convert.tensors import ConversionError, Tensor


def recurrentgemma_model(model: GriffinConfig) -> Any:
    """DeepMind's network for this config. Raises ConfigError for what it cannot be, ConversionError if it is not there."""
    try:
        from recurrentgemma import common
        from recurrentgemma.jax import Griffin
    except ImportError:
        raise ConversionError(
            "the package recurrentgemma is not installed: podwright's extra `parity` has it"
        ) from None
    if model.num_heads != model.num_gate_blocks:
        raise ConfigError(
            f"recurrentgemma has one number for {model.show('num_heads')} and {model.show('num_gate_blocks')}: "
            f"there is nothing to compare with"
        )
    kinds = {"rec": common.TemporalBlockType.RECURRENT, "attn": common.TemporalBlockType.ATTENTION}
    theirs = common.GriffinConfig(
        vocab_size=model.vocab_size,
        width=model.width,
        mlp_expanded_width=model.mlp_width,
        num_heads=model.num_heads,
        block_types=tuple(kinds[model.pattern[i % len(model.pattern)]] for i in range(model.depth)),
        embeddings_scale_by_sqrt_dim=model.embedding_scale,
        attention_window_size=model.window,
        logits_soft_cap=model.logits_soft_cap,
        lru_width=model.rnn_width,
    )
    return Griffin(theirs, gradient_checkpointing=False)


def nested(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Parameters as recurrentgemma takes them, float32."""
    tree: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *folders, last = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = tensor.whole().astype(np.float32)
    return tree


def recurrentgemma_logits(model: GriffinConfig, tensors: Mapping[str, Tensor], tokens: np.ndarray) -> np.ndarray:
    """(B T V), float32, for tokens (B T) and a checkpoint in the Flax layout."""
    import jax
    import jax.numpy as jnp

    network = recurrentgemma_model(model)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    parameters = jax.tree.map(jnp.asarray, nested(tensors))
    with jax.default_matmul_precision("highest"):
        program = jax.jit(lambda p, t, s: network.apply({"params": p}, t, s, return_cache=False)[0])
        return np.asarray(program(parameters, jnp.asarray(tokens), positions))


def transformers_model(model: GriffinConfig) -> Any:
    """Hugging Face's network for this config, with the window that computes the same. Raises as recurrentgemma_model."""
    theirs = to_hf(model)
    try:
        import torch
        from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM
    except ImportError:
        raise ConversionError("the package transformers is not installed: podwright's extra `parity` has it") from None
    network = RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**theirs))
    return network.to(torch.float32).eval()


def transformers_logits(model: GriffinConfig, tensors: Mapping[str, Tensor], tokens: np.ndarray) -> np.ndarray:
    """(B T V), float32, for tokens (B T) and a checkpoint in Hugging Face's layout."""
    network = transformers_model(model)
    import torch

    with torch.no_grad():
        ours = dict(network.named_parameters())  # the head is the table, and named once
        for name, tensor in tensors.items():
            ours.pop(name).copy_(torch.from_numpy(tensor.whole().astype(np.float32)))
        assert not ours, f"transformers has parameters that the layout has not: {', '.join(ours)}"
        return network(torch.from_numpy(tokens.astype(np.int64)), use_cache=False).logits.float().numpy()
