"""Devices that share sequences, or channels, compute what one device does: loss and every gradient."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models.attention
import models.griffin
import models.rg_lru
import models.sequence
from configs.schema import GemmaConfig, GriffinConfig, MeshConfig
from models import FAMILIES
from models.griffin import Recurrence
from models.params import Init, named_leaves
from sharding.mesh import make_mesh, one_device_mesh
from sharding.rules import rules_for

SMALL = dict(
    vocab_size=16,
    width=32,
    rnn_width=32,
    mlp_width=32,
    pattern=("rec", "attn"),
    depth=2,
    num_heads=8,
    num_gate_blocks=8,
)


def packed(*lengths: int) -> np.ndarray:
    """Positions of documents of these lengths in a row; a negative one is padding."""
    return np.concatenate([np.full(-n, -1) if n < 0 else np.arange(n) for n in lengths]).astype(np.int32)


# Rows of 64 on 8 devices are 8 tokens each: documents over many devices, within one, and starting on the first and last
# token of a device; one row begins within a document, one with padding.
POSITIONS = np.stack(
    [packed(64), packed(3, 2, 11, 23, 1, 24), packed(40)[7:].tolist() + packed(31).tolist(), packed(-9, 55)]
)


def loss_and_gradients(
    config: GriffinConfig | GemmaConfig, sizes: MeshConfig | None, remat: str = "none"
) -> dict[str, np.ndarray]:
    mesh = make_mesh(sizes) if sizes else one_device_mesh()
    spec = rules_for(mesh).spec
    rng = np.random.default_rng(0)
    tokens, targets = (rng.integers(config.vocab_size, size=POSITIONS.shape).astype(np.int32) for _ in range(2))

    def loss(model, tokens, positions, targets):
        logp = jax.nn.log_softmax(model(tokens, positions, dtype=jnp.float32, remat=remat))
        chosen = jax.sharding.reshard(jax.nn.one_hot(targets, config.vocab_size), jax.typeof(logp).sharding.spec)
        return -jnp.mean(jnp.sum(logp * chosen, axis=-1))

    with jax.set_mesh(mesh):
        model = jax.jit(lambda: FAMILIES[config.kind].model(config, Init(jax.random.key(0), spec)))()
        model = jax.tree.map(lambda p: p + 0.1 * jnp.cos(jnp.arange(p.size).reshape(p.shape)) if p.ndim else p, model)
        batch = jax.sharding.NamedSharding(mesh, spec("batch", None))
        arrays = [jax.device_put(x, batch) for x in (tokens, POSITIONS, targets)]
        value, gradient = jax.jit(jax.value_and_grad(loss))(model, *arrays)
        return {"loss": np.asarray(value), **{n: np.asarray(g) for n, g in named_leaves(gradient).items()}}


def check(
    config: GriffinConfig | GemmaConfig, expected: dict[str, np.ndarray], sizes: MeshConfig, remat: str = "none"
) -> None:
    got = loss_and_gradients(config, sizes, remat)
    assert float(got["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-6)
    for name, value in expected.items():
        error = np.linalg.norm(got[name] - value) / np.linalg.norm(value)
        assert error < 1e-5, (name, error)


@functools.cache
def on_one_device(config: GriffinConfig | GemmaConfig) -> dict[str, np.ndarray]:
    return loss_and_gradients(config, None)


# With 8 devices, windows reach back half a device's tokens, those of two and those of three.
MESHES = {
    "sequence 8": MeshConfig(data=1, sequence=8),
    "sequence 4, tensor 2": MeshConfig(data=1, sequence=4, tensor=2),
    "data 2, sequence 2, tensor 2": MeshConfig(data=2, sequence=2, tensor=2),
    "fsdp 2, sequence 4": MeshConfig(data=1, fsdp=2, sequence=4),
}
FEW = [(12, "sequence 8"), (24, "sequence 4, tensor 2"), (4, "data 2, sequence 2, tensor 2")]
MORE = [(window, mesh) for window in (4, 12, 24) for mesh in MESHES if (window, mesh) not in FEW]


@pytest.mark.parametrize(("window", "mesh"), [*FEW, *(pytest.param(*more, marks=pytest.mark.slow) for more in MORE)])
def test_devices_that_share_sequences_give_the_gradients_of_one(window, mesh):
    config = GriffinConfig(**SMALL, window=window)
    check(config, on_one_device(config), MESHES[mesh])


GEMMA = dict(
    vocab_size=16,
    width=32,
    mlp_width=32,
    pattern=("local", "global"),
    depth=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    attention_soft_cap=5.0,
)
GEMMA_MESHES = ["sequence 4, tensor 2", "data 2, sequence 2, tensor 2", "sequence 8"]


@pytest.mark.parametrize(
    "mesh", [GEMMA_MESHES[0], *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in GEMMA_MESHES[1:])]
)
def test_gemmas_layers_see_windows_and_whole_pasts_across_devices(mesh):
    config = GemmaConfig(**GEMMA, window=13)
    check(config, on_one_device(config), MESHES[mesh])


TRAPS = {
    "no state": (models.rg_lru, "carried_in", lambda decay, end, axis, **_: jnp.zeros_like(end)),
    "states in the wrong order": (
        models.rg_lru,
        "carried_in",
        lambda decay, end, axis, reverse=False: CARRIED_IN(decay, end, axis, reverse=not reverse),
    ),
    "no inputs of the convolution": (models.griffin, "left_halo", lambda x, width, axis: LEFT_HALO(0 * x, width, axis)),
    "no earlier keys": (models.attention, "left_halo", lambda x, width, axis: LEFT_HALO(0 * x, width, axis)),
    "keys before the sequence": (models.attention, "first_index", lambda length, axis: length),
}
CARRIED_IN, LEFT_HALO = models.sequence.carried_in, models.sequence.left_halo


@pytest.mark.slow
@pytest.mark.parametrize("trap", TRAPS)
def test_each_trap_breaks_the_parity(trap, monkeypatch):
    config = GriffinConfig(**SMALL, window=12)
    expected = on_one_device(config)
    monkeypatch.setattr(*TRAPS[trap])
    with pytest.raises(AssertionError):
        check(config, expected, MESHES["sequence 8"])


@pytest.mark.slow
def test_a_past_one_token_off_breaks_the_parity(monkeypatch):
    config, through_here = GemmaConfig(**GEMMA, window=13), models.sequence.through_here
    expected = on_one_device(config)
    monkeypatch.setattr(models.attention, "through_here", lambda x, axis: jnp.roll(through_here(x, axis), 1, axis=1))
    with pytest.raises(AssertionError):
        check(config, expected, MESHES["sequence 8"])


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["dots", "layer"])
def test_recomputed_layers_ask_their_neighbours_again(remat):
    config = GriffinConfig(**SMALL, window=12)
    check(config, on_one_device(config), MESHES["sequence 4, tensor 2"], remat)


@pytest.mark.parametrize(
    "sizes",
    [
        MeshConfig(data=2, tensor=4),  # 10 channels a device: each has part of a neighbour's block of 8
        pytest.param(MeshConfig(data=1, tensor=8), marks=pytest.mark.slow),  # 5: less than a block
        pytest.param(MeshConfig(data=1, sequence=2, tensor=4), marks=pytest.mark.slow),
    ],
    ids=["data 2, tensor 4", "tensor 8", "sequence 2, tensor 4"],
)
def test_channels_may_be_divided_within_a_gate_block(sizes):
    """As 4 or 8 devices must the 10 blocks and 10 heads of RecurrentGemma 2B."""
    five = dict(width=40, rnn_width=40, num_heads=5, num_gate_blocks=5)
    config = GriffinConfig(**SMALL | five, window=12)
    check(config, on_one_device(config), sizes)


def collectives_of_a_recurrence(sizes: MeshConfig) -> list[str]:
    """Of a mixer's forward and backward pass, as XLA's text has them."""
    config, mesh = GriffinConfig(**SMALL), make_mesh(sizes)

    def loss(mixer, x, positions):
        return jnp.sum(mixer(x, positions) ** 2)

    with jax.set_mesh(mesh):
        spec = rules_for(mesh).spec
        mixer = jax.eval_shape(lambda: Recurrence(config, Init(jax.random.key(0), spec), final=1.0))
        rows = jax.sharding.NamedSharding(mesh, spec("batch"))
        x = jax.ShapeDtypeStruct((*POSITIONS.shape, config.width), jnp.float32, sharding=rows)
        positions = jax.ShapeDtypeStruct(POSITIONS.shape, jnp.int32, sharding=rows)
        text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(mixer, x, positions).compile().as_text()
    collective = r" (?:all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(.*"
    # What XLA calls a collective of each device with itself moves nothing.
    return [line for line in re.findall(collective, text) if "{{0},{1}," not in line]


def test_the_recurrence_asks_no_device_that_shares_its_channels():
    """On 8 devices only the projections to and from the model's width do."""
    found = collectives_of_a_recurrence(MeshConfig(data=1, tensor=8))
    assert found  # linear_out's sums, and those of the gradient with respect to x
    assert all("dot_general" in line for line in found), found


def test_gates_are_gathered_once_like_other_kernels():
    """Where parameters are divided, too: three projections and two gates, before the recurrence and not inside."""
    found = collectives_of_a_recurrence(MeshConfig(data=1, fsdp=2, tensor=4))
    gathers = [line for line in found if line.startswith(" all-gather")]
    assert len(gathers) == 5
    assert all("/reshard" in line for line in gathers), gathers
    sums = [line for line in found if line not in gathers]
    assert all(line.startswith((" all-reduce", " reduce-scatter")) for line in sums), sums
