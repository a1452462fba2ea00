"""The implementations that other people's checkpoints were made with: their logits, to compare ours with."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from configs.schema import ConfigError, GemmaConfig, GriffinConfig, NFNetConfig
from models.convert import gemma, nfnet_config
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
    """Parameters as Flax takes them, float32."""
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


def gemma_model(model: GemmaConfig) -> Any:
    """DeepMind's network for this config. Raises ConfigError for what it cannot be, ConversionError if it is not there."""
    try:
        from gemma import modules, transformer
    except ImportError:
        raise ConversionError(
            "the package gemma with its module gemma.transformer (releases 2.0 to 3.0) is not installed"
        ) from None

    class Transformer(
        transformer.Transformer
    ):  # the class itself refuses to be made: it is superseded by one for images
        pass

    scales = transformer.QueryPreAttentionNormalisation
    scale = {
        model.head_dim**-0.5: scales.BY_ONE_OVER_SQRT_HEAD_DIM,
        (model.width // model.num_heads) ** -0.5: scales.BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS,
    }.get(model.query_scale or model.head_dim**-0.5)
    if scale is None:
        raise ConfigError(f"the package gemma has no {model.show('query_scale')}: there is nothing to compare with")
    kinds = {"local": modules.AttentionType.LOCAL_SLIDING, "global": modules.AttentionType.GLOBAL}
    theirs = transformer.TransformerConfig(
        num_layers=model.depth,
        num_embed=model.table_rows,
        embed_dim=model.width,
        hidden_dim=model.mlp_width,
        num_heads=model.num_heads,
        head_dim=model.head_dim,
        num_kv_heads=model.num_kv_heads,
        final_logit_softcap=model.logits_soft_cap or None,
        use_post_attn_norm=model.post_norm,
        use_post_ffw_norm=model.post_norm,
        attention_types=tuple(kinds[model.pattern[i % len(model.pattern)]] for i in range(model.depth)),
        query_pre_attn_norm=scale,
        attn_logits_soft_cap=model.attention_soft_cap or None,
        sliding_window_size=model.window,
        use_qk_norm=model.qk_norm,
        local_base_frequency=model.rope_base_local,
        global_base_frequency=model.rope_base_global,
        global_scale_factor=model.rope_divisor_global,
    )
    return Transformer(theirs)


def gemma_parameters(model: GemmaConfig, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Parameters as `gemma_model` takes them, float32, of a checkpoint in the Flax layout."""
    found = {}
    for name, tensor in gemma.joined(tensors).items():
        found[name.removesuffix("/w") if "/mlp/" in name else name] = tensor
    return nested(found)


def gemma_logits(model: GemmaConfig, tensors: Mapping[str, Tensor], tokens: np.ndarray) -> np.ndarray:
    """(B T V), float32, for tokens (B T) and a checkpoint in the Flax layout."""
    import jax
    import jax.numpy as jnp

    network = gemma_model(model)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    mask = jnp.broadcast_to(jnp.tri(tokens.shape[1], dtype=bool), (len(tokens), tokens.shape[1], tokens.shape[1]))
    parameters = jax.tree.map(jnp.asarray, gemma_parameters(model, tensors))
    with jax.default_matmul_precision("highest"):
        program = jax.jit(lambda p, t: network.apply({"params": p}, t, positions, None, mask)[0])
        return np.asarray(program(parameters, jnp.asarray(tokens)))[..., : model.vocab_size]


def transformers_model(described: Mapping[str, Any]) -> Any:
    """Hugging Face's network for this config.json, float32. Raises ConversionError if the package is not there."""
    try:
        import torch
        import transformers
    except ImportError:
        raise ConversionError("the package transformers is not installed: podwright's extra `parity` has it") from None
    config = transformers.AutoConfig.for_model(**described)
    config._attn_implementation = "eager"  # the other ways drop soft caps
    network = getattr(transformers, described["architectures"][0])(config)
    return network.to(torch.float32).eval()


def transformers_network(described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """`transformers_model` with the values of a checkpoint in Hugging Face's layout."""
    network = transformers_model(described)
    import torch

    with torch.no_grad():
        ours = dict(network.named_parameters())  # the head is the table, and named once
        for name, tensor in tensors.items():
            ours.pop(name).copy_(torch.from_numpy(tensor.whole().astype(np.float32)))
    assert not ours, f"transformers has parameters that the layout has not: {', '.join(ours)}"
    return network


def transformers_logits(to_hf: Callable[[Any], dict[str, Any]]) -> Callable[..., np.ndarray]:
    """A function like the two above, for a family whose config.json `to_hf` makes."""

    def logits(model: Any, tensors: Mapping[str, Tensor], tokens: np.ndarray) -> np.ndarray:
        network = transformers_network(to_hf(model), tensors)
        import torch

        with torch.no_grad():
            return network(torch.from_numpy(tokens.astype(np.int64)), use_cache=False).logits.float().numpy()

    return logits


def timm_network(model: NFNetConfig, tensors: Mapping[str, Tensor]) -> Any:
    """timm's network for this config with the values of a state dict, float32. Raises ConfigError for what it cannot be,
    ConversionError if the package is not there."""
    try:
        import timm
        import torch
    except ImportError:
        raise ConversionError("the package timm is not installed: podwright's extra `parity` has it") from None
    network = timm.create_model(**nfnet_config.timm_arguments(model))
    # Copied: torch warns of arrays that cannot be written to.
    state = {name: torch.from_numpy(tensor.whole().astype(np.float32, copy=True)) for name, tensor in tensors.items()}
    network.load_state_dict(state, strict=True)
    return network.eval()


def timm_logits(model: NFNetConfig, tensors: Mapping[str, Tensor], images: np.ndarray) -> np.ndarray:
    """(B classes), float32, for images (B H W C) and a state dict of timm's."""
    network = timm_network(model, tensors)
    import torch

    with torch.no_grad():
        return network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
