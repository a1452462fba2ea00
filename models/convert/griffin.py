"""Griffin's arrays in DeepMind's Flax layout and in Hugging Face's: one row a parameter, both directions.

Shapes: D model width, L recurrence width, F MLP width, G gate blocks, N heads, H head features, V vocabulary.
"""

import numpy as np

from models.convert.layout import Layout, Row


def _flax_matrix(name: str) -> Row:
    return Row((name,), lambda x: (x.reshape(x.shape[0], -1),))


def _gate(name: str) -> Row:
    return Row((name,), lambda x: (x.reshape(-1, x.shape[1], x.shape[1]),))  # our (L L/G) is their (G L/G L/G)


def _flax_linear(name: str) -> dict[str, Row]:
    return {"kernel": _flax_matrix(f"{name}/kernel"), "bias": Row((f"{name}/bias",))}


def _hf_matrix(name: str) -> Row:
    return Row((name,), lambda x: (x.reshape(x.shape[0], -1).T,), lambda parts: parts[0].T)


def _hf_linear(name: str) -> dict[str, Row]:
    return {"kernel": _hf_matrix(f"{name}.weight"), "bias": Row((f"{name}.bias",))}


def _below(scope: str, rows: dict[str, Row]) -> dict[str, Row]:
    return {f"{scope}/{name}": row for name, row in rows.items()}


def _heads_in(name: str) -> Row:
    return Row((name,), lambda x: (x.reshape(-1, x.shape[-1]),))  # our (N H D) is their (N*H D)


def _heads_in_transposed(name: str) -> Row:
    return Row((name,), lambda x: (x.reshape(-1, x.shape[-1]).T,), lambda parts: parts[0].T)


_FLAX_EVERY = {
    "temporal_norm": Row(("temporal_pre_norm/scale",)),
    "mlp_norm": Row(("channel_pre_norm/scale",)),
    # (D 2 F) is their (2 D F); branch 0 is the gated one in both.
    "mlp/up/kernel": Row(
        ("mlp_block/ffw_up/w",), lambda x: (x.transpose(1, 0, 2),), lambda parts: parts[0].transpose(1, 0, 2)
    ),
    "mlp/up/bias": Row(("mlp_block/ffw_up/b",), lambda x: (x[:, None, None, :],)),
    **_below("mlp/down", _flax_linear("mlp_block/ffw_down")),
}
FLAX = Layout(
    name="flax",
    outer={"embedding/table": Row(("embedder/input_embedding",)), "final_norm": Row(("final_norm/scale",))},
    blocks={
        "rec": {
            **_FLAX_EVERY,
            **_below("mixer/linear_x", _flax_linear("recurrent_block/linear_x")),
            **_below("mixer/linear_y", _flax_linear("recurrent_block/linear_y")),
            **_below("mixer/linear_out", _flax_linear("recurrent_block/linear_out")),
            "mixer/conv_taps": Row(("recurrent_block/conv_1d/w",)),
            "mixer/conv_bias": Row(("recurrent_block/conv_1d/b",)),
            "mixer/input_gate/kernel": _gate("recurrent_block/rg_lru/input_gate/w"),
            "mixer/input_gate/bias": Row(("recurrent_block/rg_lru/input_gate/b",)),
            "mixer/a_gate/kernel": _gate("recurrent_block/rg_lru/a_gate/w"),
            "mixer/a_gate/bias": Row(("recurrent_block/rg_lru/a_gate/b",)),
            "mixer/a_param": Row(("recurrent_block/rg_lru/a_param",)),
        },
        "attn": {
            **_FLAX_EVERY,
            "mixer/q/kernel": _flax_matrix("attention_block/proj_q/kernel"),
            "mixer/k/kernel": _flax_matrix("attention_block/proj_k/kernel"),
            "mixer/v/kernel": _flax_matrix("attention_block/proj_v/kernel"),
            "mixer/out/kernel": _heads_in("attention_block/proj_final/kernel"),
            "mixer/out/bias": Row(("attention_block/proj_final/bias",)),
        },
    },
    prefix=lambda i: f"blocks.{i}/",
)

_HF_EVERY = {
    "temporal_norm": Row(("temporal_pre_norm.weight",)),
    "mlp_norm": Row(("channel_pre_norm.weight",)),
    "mlp/up/kernel": Row(
        ("mlp_block.gate_proj.weight", "mlp_block.up_proj.weight"),
        lambda x: (x[:, 0].T, x[:, 1].T),
        lambda parts: np.stack([part.T for part in parts], axis=1),
    ),
    "mlp/up/bias": Row(("mlp_block.gate_proj.bias", "mlp_block.up_proj.bias"), lambda x: (x[0], x[1]), np.stack),
    **_below("mlp/down", _hf_linear("mlp_block.down_proj")),
}
HF = Layout(
    name="hf",
    outer={"embedding/table": Row(("model.embed_tokens.weight",)), "final_norm": Row(("model.final_norm.weight",))},
    blocks={
        "rec": {
            **_HF_EVERY,
            **_below("mixer/linear_x", _hf_linear("temporal_block.linear_x")),
            **_below("mixer/linear_y", _hf_linear("temporal_block.linear_y")),
            **_below("mixer/linear_out", _hf_linear("temporal_block.linear_out")),
            # torch's depthwise kernel (L 1 taps); it correlates, so the last tap is the current token's, as ours.
            "mixer/conv_taps": Row(
                ("temporal_block.conv_1d.weight",), lambda x: (x.T[:, None],), lambda parts: parts[0][:, 0].T
            ),
            "mixer/conv_bias": Row(("temporal_block.conv_1d.bias",)),
            "mixer/input_gate/kernel": _gate("temporal_block.rg_lru.input_gate_weight"),
            "mixer/input_gate/bias": Row(("temporal_block.rg_lru.input_gate_bias",)),
            "mixer/a_gate/kernel": _gate("temporal_block.rg_lru.recurrent_gate_weight"),
            "mixer/a_gate/bias": Row(("temporal_block.rg_lru.recurrent_gate_bias",)),
            "mixer/a_param": Row(("temporal_block.rg_lru.recurrent_param",)),
        },
        "attn": {
            **_HF_EVERY,
            "mixer/q/kernel": _hf_matrix("temporal_block.q_proj.weight"),
            "mixer/k/kernel": _hf_matrix("temporal_block.k_proj.weight"),
            "mixer/v/kernel": _hf_matrix("temporal_block.v_proj.weight"),
            "mixer/out/kernel": _heads_in_transposed("temporal_block.o_proj.weight"),
            "mixer/out/bias": Row(("temporal_block.o_proj.bias",)),
        },
    },
    prefix=lambda i: f"model.layers.{i}.",
)
LAYOUTS = {layout.name: layout for layout in (FLAX, HF)}
