"""Splash attention compiles for the TPUs we train on, at the shapes of Gemma 2 2B and Gemma 3 12B, without any square."""

import re

import jax
import jax.numpy as jnp
import pytest
from test_scan_aot import CHIPS, ENVIRONMENT

from configs.schema import MESH_FIELDS, GemmaConfig
from models.attention import self_attention
from models.gemma import Gemma
from models.params import Init
from sharding.rules import rules_for
from trainer.trees import concrete

pytestmark = [pytest.mark.tpu_aot, pytest.mark.slow]

SHAPES = {  # tokens, query heads, key-value heads, features, window, soft cap; one sequence
    "gemma 2 2b": (8192, 8, 4, 256, 4096, 50.0),
    "gemma 3 12b": (32768, 16, 8, 256, 1024, 0.0),
    "float32": (32768, 4, 1, 256, 512, 0.0),
    "recurrentgemma 2b": (8192, 10, 1, 256, 2049, 0.0),
    "small heads, odd rows": (1000, 4, 2, 32, 100, 0.0),
}


@pytest.fixture
def mesh_of(monkeypatch):
    """Chip's name -> a mesh of one such chip."""
    pytest.importorskip("libtpu", reason="compiles for TPUs with libtpu, of the extra `tpu`")
    from jax.experimental import topologies

    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)

    def make(chip: str) -> jax.sharding.Mesh:
        name, options = CHIPS[chip]
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
        axes = (jax.sharding.AxisType.Explicit,) * len(MESH_FIELDS)
        return jax.sharding.Mesh([[[[[topology.devices[0]]]]]], MESH_FIELDS, axis_types=axes)

    return make


def compiled(function, *arrays):
    # The tests' "highest" precision would make bf16 products on a TPU float32 ones; training asks for the default.
    with jax.default_matmul_precision("default"):
        return jax.jit(function).trace(*arrays).lower(lowering_platforms=("tpu",)).compile()


def kernels(program) -> list[str]:
    """The passes of the kernels in a compiled program: fwd, dq, dkv."""
    return sorted(re.findall(r"splash_m\wa_(\w+?)_\S* = .*custom_call_target=\"tpu_custom_call\"", program.as_text()))


CELLS = [(chip, shape) for chip in ("v5e", "v5p", "v6e") for shape in list(SHAPES)[:2]]


@pytest.mark.parametrize(("chip", "shape"), [*CELLS, *(("v5e", shape) for shape in list(SHAPES)[2:])])
def test_both_kinds_of_layers_compile_without_a_square(mesh_of, chip, shape):
    length, heads, kv_heads, features, window, soft_cap = SHAPES[shape]
    mesh = mesh_of(chip)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def array(count: int):
        dtype = jnp.float32 if shape == "float32" else jnp.bfloat16
        return jax.ShapeDtypeStruct((1, length, count, features), dtype, sharding=whole)

    arrays = [array(n) for n in (heads, kv_heads, kv_heads, heads)]
    positions = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=whole)
    for left in (window - 1, None):

        def both(q, k, v, dout, positions, left=left):
            out, pullback = jax.vjp(lambda q, k, v: self_attention(q, k, v, positions, left, soft_cap), q, k, v)
            return out, pullback(dout)

        with jax.set_mesh(mesh):
            program = compiled(both, *arrays, positions)
        assert kernels(program) == ["dkv", "dq", "fwd"]  # the gradient does not compute the result again
        assert not re.search(rf"\[(?:\d+,)*{length},{length}[,\]]", program.as_text())
        memory = program.memory_analysis()
        arrays_size = memory.argument_size_in_bytes + memory.output_size_in_bytes
        normalisers = 128 * 4 * heads * length  # the kernel writes one in every lane
        assert memory.temp_size_in_bytes < arrays_size + normalisers


@pytest.mark.parametrize(("remat", "passes"), [("dots", ["dkv", "dq", "fwd"]), ("layer", ["dkv", "dq", "fwd", "fwd"])])
def test_remat_dots_keeps_what_attention_computed(mesh_of, remat, passes):
    """And nothing else of it: not the products that another platform's program would save."""
    mesh = mesh_of("v5e")
    config = GemmaConfig(width=256, depth=4, pattern=("global",), num_kv_heads=1, head_dim=128, attention_soft_cap=50.0)

    def loss(model, tokens, positions):
        return jnp.mean(model(tokens, positions, dtype=jnp.bfloat16, remat=remat) ** 2)

    with jax.set_mesh(mesh):
        spec = rules_for(mesh).spec
        model = concrete(jax.eval_shape(lambda: Gemma(config, Init(jax.random.key(0), spec))), mesh)
        sharding = jax.sharding.NamedSharding(mesh, spec("batch", None))
        tokens = jax.ShapeDtypeStruct((1, 2048), jnp.int32, sharding=sharding)
        program = compiled(jax.value_and_grad(loss), model, tokens, tokens)
    assert kernels(program) == passes
    assert not re.search(r"\[(?:\d+,)*2048,(?:\d+,)*2048[,\]]", program.as_text())
