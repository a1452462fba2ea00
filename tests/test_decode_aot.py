"""A step of RecurrentGemma 2B compiles for a TPU and keeps no second copy of the state it is given."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from test_scan_aot import libtpu  # noqa: F401  (a fixture)

from configs.schema import MESH_FIELDS, GriffinConfig
from models.decode import CHUNK, Draw, open_state, prefill, step
from models.griffin import Griffin
from models.params import Init, cast_kernels
from models.state import state_bytes
from sharding.rules import Rules
from trainer.trees import concrete

pytestmark = [pytest.mark.tpu_aot, pytest.mark.slow]

BATCH, DTYPE = 8, jnp.bfloat16
CONFIG = GriffinConfig(
    vocab_size=256_000,
    width=2560,
    depth=26,
    rnn_width=2560,
    mlp_width=7680,
    num_heads=10,
    num_gate_blocks=10,
    window=2048,
    embedding_scale=True,
    logits_soft_cap=30.0,
)


@pytest.fixture
def v5e(libtpu):  # noqa: F811
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[:1]
    axes = (AxisType.Explicit,) * len(MESH_FIELDS)
    mesh = Mesh(np.array(devices).reshape((1,) * len(MESH_FIELDS)), MESH_FIELDS, axis_types=axes)
    with jax.set_mesh(mesh), jax.default_matmul_precision("default"):
        yield mesh


def compiled(program, mesh, length, *more):
    def arguments():
        model = Griffin(CONFIG, Init(jax.random.key(0), Rules().spec))
        return cast_kernels(model, DTYPE), open_state(model, BATCH, DTYPE, 8192)

    shape = (BATCH, length)
    ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, Rules().spec(None, None)))
    traced = program.trace(*concrete(jax.eval_shape(arguments), mesh), ids, ids, *more)
    return traced.lower(lowering_platforms=("tpu",)).compile()


def test_a_step_overwrites_the_state_in_place(v5e):
    key = jax.eval_shape(lambda: jax.random.key(0))
    program = compiled(step, v5e, 1, key, DTYPE, Draw(0.8, 40, 0.9), CONFIG.vocab_size)
    memory = program.memory_analysis()
    kept = state_bytes(
        jax.eval_shape(lambda: open_state(Griffin(CONFIG, Init(jax.random.key(0), Rules().spec)), 1, DTYPE, 8192))
    )
    assert memory.alias_size_in_bytes >= BATCH * kept
    assert memory.temp_size_in_bytes < BATCH * kept
    rings = r"= bf16\[8,8,2048,1,256\]\S* (copy|copy-start|transpose|concatenate|select)\("
    assert not re.search(rings, program.as_text())


def test_a_prompt_is_read_with_the_kernel_of_training(v5e):
    assert "rg_lru" in compiled(prefill, v5e, CHUNK, DTYPE).as_text()
