"""A Griffin of real widths trains on 131,072 tokens a sequence, divided over a v5p slice, within a chip's memory."""

import re

import jax
import jax.numpy as jnp
import pytest
from test_scan_aot import ENVIRONMENT

from configs.schema import MESH_FIELDS, GriffinConfig
from models.griffin import Griffin
from models.params import Init
from models.token_loss import log_z_and_target
from sharding.rules import rules_for
from trainer.trees import concrete

pytestmark = [pytest.mark.tpu_aot, pytest.mark.slow]

LENGTH, MEMORY = 131_072, 8 * 2**30  # a twelfth of a v5p chip's; with whole logits it was 19.5 GiB


def test_a_sequence_of_131072_tokens_fits_on_sixteen_chips(monkeypatch):
    """RecurrentGemma 2B's widths, one group of its layers, and the table; 4 sequences on 64 chips."""
    pytest.importorskip("libtpu", reason="compiles for TPUs with libtpu, of the extra `tpu`")
    from jax.experimental import topologies

    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5p:4x4x4")
    config = GriffinConfig(
        vocab_size=256_000,
        width=2560,
        depth=3,
        rnn_width=2560,
        mlp_width=7680,
        num_heads=10,
        num_gate_blocks=10,
        window=2048,
        embedding_scale=True,
        logits_soft_cap=30.0,
    )
    axes = (jax.sharding.AxisType.Explicit,) * len(MESH_FIELDS)
    mesh = topologies.make_mesh(topology, (1, 1, 4, 16, 1), MESH_FIELDS)
    mesh = jax.sharding.Mesh(mesh.devices, MESH_FIELDS, axis_types=axes)
    spec = rules_for(mesh).spec

    def loss(model, tokens, positions, targets):
        x = model.features(tokens, positions, dtype=jnp.bfloat16, remat="layer")
        log_z, target = model.embedding.without_logits(log_z_and_target, x, targets, config.logits_soft_cap, 256)
        return jnp.mean(log_z - target)

    with jax.set_mesh(mesh), jax.default_matmul_precision("default"):
        model = concrete(jax.eval_shape(lambda: Griffin(config, Init(jax.random.key(0), spec))), mesh)
        rows = jax.sharding.NamedSharding(mesh, spec("batch", None))
        tokens = jax.ShapeDtypeStruct((4, LENGTH), jnp.int32, sharding=rows)
        traced = jax.jit(jax.value_and_grad(loss)).trace(model, tokens, tokens, tokens)
        program = traced.lower(lowering_platforms=("tpu",)).compile()
    memory, text = program.memory_analysis(), program.as_text()
    assert "rg_lru_gradient" in text
    print(f"{memory.argument_size_in_bytes + memory.temp_size_in_bytes:,} bytes")
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < MEMORY
    kinds = r"(?:all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all)"
    shapes = re.findall(rf"= (.*) {kinds}(?:-start)?\(", text)
    assert any("f32[16,1,2560]" in shape for shape in shapes)  # states
    assert any("bf16[1,2048,1,256]" in shape for shape in shapes)  # keys and values of one window
    own = LENGTH // 16
    assert not any(re.search(rf"\b({own}|{LENGTH})\b", shape) for shape in shapes)  # never all tokens of a device
