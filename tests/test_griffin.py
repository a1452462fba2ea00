"""Griffin equals DeepMind's released implementation: golden numbers recorded from `recurrentgemma` 1.0.1 (float32)."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models.blocks
import models.griffin
import models.rg_lru
from configs.schema import GriffinConfig
from models.griffin import Griffin
from models.params import Init, named_leaves
from sharding.rules import Rules
from trainer.trees import concrete

GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden" / "griffin.json").read_text())
CONFIG = GriffinConfig(
    vocab_size=48,
    width=64,
    depth=5,
    rnn_width=64,
    mlp_width=96,
    num_heads=4,
    num_gate_blocks=4,
    window=8,
    embedding_scale=True,
    logits_soft_cap=30.0,
)
# Two whole layers of the pattern (rec, rec, attn) do not fit in depth 5, so both the scanned group and the tail are used.
BLOCKS = ["groups/rec_0", "groups/rec_1", "groups/attn_2", "tail/rec_0", "tail/rec_1"]
NAMES = {
    "temporal_pre_norm/scale": "temporal_norm",
    "channel_pre_norm/scale": "mlp_norm",
    "mlp_block/ffw_up/w": "mlp/up/kernel",
    "mlp_block/ffw_up/b": "mlp/up/bias",
    "mlp_block/ffw_down/kernel": "mlp/down/kernel",
    "mlp_block/ffw_down/bias": "mlp/down/bias",
    **{
        f"recurrent_block/{linear}/{leaf}": f"mixer/{linear}/{leaf}"
        for linear in ("linear_x", "linear_y", "linear_out")
        for leaf in ("kernel", "bias")
    },
    "recurrent_block/conv_1d/w": "mixer/conv_taps",
    "recurrent_block/conv_1d/b": "mixer/conv_bias",
    "recurrent_block/rg_lru/a_param": "mixer/a_param",
    "recurrent_block/rg_lru/input_gate/w": "mixer/input_gate/kernel",
    "recurrent_block/rg_lru/input_gate/b": "mixer/input_gate/bias",
    "recurrent_block/rg_lru/a_gate/w": "mixer/a_gate/kernel",
    "recurrent_block/rg_lru/a_gate/b": "mixer/a_gate/bias",
    "attention_block/proj_q/kernel": "mixer/q/kernel",
    "attention_block/proj_k/kernel": "mixer/k/kernel",
    "attention_block/proj_v/kernel": "mixer/v/kernel",
    "attention_block/proj_final/kernel": "mixer/out/kernel",
    "attention_block/proj_final/bias": "mixer/out/bias",
}


def our_name(reference: str) -> str:
    if reference == "embedder/input_embedding":
        return "embedding/table"
    if reference == "final_norm/scale":
        return "final_norm"
    block, rest = reference.split("/", 1)
    return f"layers/{BLOCKS[int(block.removeprefix('blocks.'))]}/{NAMES[rest]}"


def golden_parameter(k: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The golden file's deterministic parameters: a 32-bit hash of (element, leaf number), scaled by the leaf's name."""
    i = np.arange(np.prod(shape), dtype=np.uint64)
    mask = np.uint64(0xFFFFFFFF)
    x = (i * np.uint64(2654435761) & mask) ^ np.uint64(k * 2246822519 & 0xFFFFFFFF)
    x ^= x >> np.uint64(15)
    x = x * np.uint64(2246822519) & mask
    x ^= x >> np.uint64(13)
    v = (x.astype(np.float64) / 2**31 - 1).reshape(shape)
    leaf = name.split("/")[-1]
    if leaf == "a_param":
        v = -4.5 + 2 * v
    elif leaf == "scale":
        v = 0.3 * v
    elif leaf in ("b", "bias"):
        v = 0.2 * v
    elif leaf == "input_embedding":
        v = v * np.sqrt(3 / shape[1])
    elif name.endswith("conv_1d/w"):
        v = 0.5 * v
    else:
        v = v * np.sqrt(3 / (shape[0] if leaf == "kernel" else shape[1]))
    return v.astype(np.float32)


def reference_shape(name: str) -> tuple[int, ...]:
    tail = name.split("/", 1)[1]
    sizes = {
        "input_embedding": (48, 64),
        "mlp_block/ffw_up/w": (2, 64, 96),
        "mlp_block/ffw_up/b": (2, 1, 1, 96),
        "mlp_block/ffw_down/kernel": (96, 64),
        "recurrent_block/conv_1d/w": (4, 64),
        "attention_block/proj_k/kernel": (64, 16),
        "attention_block/proj_v/kernel": (64, 16),
    }
    if tail in sizes:
        return sizes[tail]
    if "gate/w" in tail:
        return (4, 16, 16)
    if "gate/b" in tail:
        return (4, 16)
    return (64, 64) if tail.endswith("kernel") else (64,)


def with_values(values: dict[str, np.ndarray], config: GriffinConfig = CONFIG) -> Griffin:
    """The model with these parameters, laid out for the current mesh; nothing is initialised first."""
    model = jax.eval_shape(lambda key: Griffin(config, Init(key, Rules().spec)), jax.random.key(0))
    leaves = named_leaves(model)
    assert leaves.keys() == values.keys()
    mesh = jax.sharding.get_mesh()
    placed = [
        jax.device_put(values[n].reshape(leaf.shape), jax.sharding.NamedSharding(mesh, leaf.sharding.spec))
        for n, leaf in leaves.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(model), placed)


def golden(config: GriffinConfig = CONFIG) -> Griffin:
    """The golden file's model on the current mesh. Another window is a `config` for the same parameters."""
    values = {}
    for k, name in enumerate(GOLDEN["param_order"], start=1):
        value = golden_parameter(k, name, reference_shape(name))
        np.testing.assert_allclose(value.ravel()[:4], GOLDEN["param_first4"][name], atol=1e-7)
        if name.endswith("ffw_up/w"):
            value = value.transpose(1, 0, 2)  # ours is (D 2 F)
        values[our_name(name)] = value
    return with_values(values, config)


@pytest.fixture
def golden_model(one_device):
    return golden()


def logits_of(model, tokens=GOLDEN["tokens"], positions=GOLDEN["segment_pos"]):
    return run(model, jnp.asarray([tokens]), jnp.asarray([positions]))


def run(model, tokens, positions, dtype=jnp.float32):
    # A fresh function each time, so that a monkeypatched trap is traced and not served from jit's cache.
    return jax.jit(lambda m, t, p: m(t, p, dtype=dtype))(model, tokens, positions)


def test_logits_equal_the_reference_on_two_packed_documents_longer_than_the_window(golden_model):
    np.testing.assert_allclose(logits_of(golden_model)[0], GOLDEN["logits"], atol=2e-5)


def test_gradients_of_every_parameter_equal_the_reference(golden_model):
    def loss(model):
        logp = jax.nn.log_softmax(logits_of(model))
        return -jnp.mean(jnp.sum(logp * jax.nn.one_hot(jnp.asarray([GOLDEN["targets"]]), 48), axis=-1))

    value, gradient = jax.jit(jax.value_and_grad(loss))(golden_model)
    assert float(value) == pytest.approx(GOLDEN["mean_xent"], abs=2e-6)
    ours = named_leaves(gradient)
    for name, norm in GOLDEN["grad_l2"].items():
        assert float(np.linalg.norm(np.asarray(ours[our_name(name)]))) == pytest.approx(norm, rel=1e-4), name
    np.testing.assert_allclose(
        np.asarray(ours[our_name("blocks.0/recurrent_block/rg_lru/a_param")]).ravel(),
        GOLDEN["grad_a_param_block0"],
        atol=1e-6,
    )


@pytest.mark.parametrize(
    "trap",
    [
        lambda m: m.setattr(models.griffin, "embedding_scale", lambda width: np.float32(width**0.5 * 1.01)),
        lambda m: m.setattr(models.rg_lru, "SHARPNESS", 1.0),
        lambda m: m.setattr(models.griffin, "rms_norm", lambda x, s: models.blocks.rms_norm(x, s - 1)),
        lambda m: m.setattr(
            models.griffin, "self_attention", lambda q, k, v, p, left, **o: SELF(q, k, v, p, left - 1, **o)
        ),
        lambda m: m.setattr(models.griffin, "rope", lambda x, p, base, fraction: models.blocks.rope(x, p, base, 1.0)),
        lambda m: m.setattr(models.griffin, "rg_lru", lambda *a: RG_LRU(*a[:-1], a[-1] + 1)),
        lambda m: m.setattr(models.griffin, "causal_conv", lambda u, t, b, p: CONV(u, t[::-1], b, p)),
        lambda m: m.setattr(models.griffin, "causal_conv", lambda u, t, b, p: CONV(u, t, b, jnp.full_like(p, 99))),
    ],
    ids=[
        "embedding scale",
        "c",
        "1+scale",
        "window keys",
        "whole-head rope",
        "reset",
        "tap order",
        "conv crosses documents",
    ],
)
def test_each_trap_breaks_the_parity(golden_model, monkeypatch, trap):
    trap(monkeypatch)
    assert np.abs(np.asarray(logits_of(golden_model)[0]) - np.asarray(GOLDEN["logits"])).max() > 1e-3


RG_LRU, CONV, SELF = models.griffin.rg_lru, models.griffin.causal_conv, models.griffin.self_attention


def test_packed_documents_do_not_see_each_other(golden_model):
    tokens = GOLDEN["tokens"]
    packed = logits_of(golden_model)[0]
    first = logits_of(golden_model, tokens[:10], list(range(10)))[0]
    second = logits_of(golden_model, tokens[10:], list(range(14)))[0]
    np.testing.assert_allclose(packed, jnp.concatenate([first, second]), atol=1e-5)


def test_left_padding_changes_nothing(golden_model):
    tokens = GOLDEN["tokens"]
    for length in (1, 3, 14):
        alone = logits_of(golden_model, tokens[:length], list(range(length)))[0]
        padded = logits_of(golden_model, [0] * 5 + tokens[:length], [-1] * 5 + list(range(length)))[0, 5:]
        np.testing.assert_allclose(padded, alone, atol=1e-5)


def test_no_token_sees_a_later_one(golden_model):
    tokens, positions = jnp.asarray([GOLDEN["tokens"]]), jnp.arange(24)[None]
    changed = tokens.at[0, 12].set(5)
    before = run(golden_model, tokens, positions)
    after = run(golden_model, changed, positions)
    assert jnp.array_equal(before[0, :12], after[0, :12])
    assert not jnp.allclose(before[0, 12:], after[0, 12:], atol=1e-3)


def test_remat_changes_no_gradient(golden_model):
    def loss(model, remat):
        return jnp.mean(
            model(jnp.asarray([GOLDEN["tokens"]]), jnp.arange(24)[None], dtype=jnp.float32, remat=remat) ** 2
        )

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    plain, again = (named_leaves(gradient(golden_model, remat)) for remat in ("none", "dots"))
    for name in plain:
        np.testing.assert_allclose(plain[name], again[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_bfloat16_stays_near_float32(golden_model):
    tokens, positions = jnp.asarray([GOLDEN["tokens"]]), jnp.asarray([GOLDEN["segment_pos"]])
    exact = run(golden_model, tokens, positions)
    rough = run(golden_model, tokens, positions, jnp.bfloat16)
    assert rough.dtype == jnp.float32
    assert float(jnp.std(rough - exact) / jnp.std(exact)) < 0.03


def test_published_sizes_have_the_published_number_of_parameters(one_device):
    """RecurrentGemma 2B and 9B, exact (griffin report, section 2.2); by shapes alone, nothing is allocated."""
    released = dict(vocab_size=256_000, window=2048, embedding_scale=True, logits_soft_cap=30.0)
    two = GriffinConfig(
        width=2560, depth=26, rnn_width=2560, mlp_width=7680, num_heads=10, num_gate_blocks=10, **released
    )
    nine = GriffinConfig(
        width=4096, depth=38, rnn_width=4096, mlp_width=12288, num_heads=16, num_gate_blocks=16, **released
    )
    for config, count in ((two, 2_682_862_080), (nine, 8_579_977_216)):
        shapes = jax.eval_shape(lambda key, c=config: Griffin(c, Init(key, Rules().spec)), jax.random.key(0))
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


def test_recurrence_starts_on_the_published_ring():
    rho = jax.nn.sigmoid(-models.griffin.ring(jax.random.key(0), (100_000,)))
    assert float(rho.min()) >= 0.9
    assert float(rho.max()) <= 0.9991
    assert float(jnp.mean(rho**2)) == pytest.approx((0.9**2 + 0.999**2) / 2, abs=1e-3)


def test_eight_devices_give_the_logits_of_one(golden_model, one_device):
    from configs.schema import MeshConfig
    from sharding.mesh import make_mesh

    tokens = jnp.asarray([GOLDEN["tokens"]] * 4)
    positions = jnp.asarray([GOLDEN["segment_pos"]] * 4)
    expected = np.asarray(run(golden_model, tokens, positions))
    values = {name: np.asarray(leaf) for name, leaf in named_leaves(golden_model).items()}
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        spec = Rules().spec
        model = with_values(values)
        batch = jax.sharding.NamedSharding(mesh, spec("batch", "seq"))
        sharded = run(model, jax.device_put(np.asarray(tokens), batch), jax.device_put(np.asarray(positions), batch))
        np.testing.assert_allclose(np.asarray(sharded), expected, atol=1e-5)


def test_the_program_hardly_grows_with_depth(one_device):
    def lines(depth: int) -> int:
        config = dataclasses.replace(CONFIG, depth=depth)
        shapes = jax.eval_shape(lambda key: Griffin(config, Init(key, Rules().spec)), jax.random.key(0))

        def loss(model, tokens, positions):
            return jnp.mean(model(tokens, positions, dtype=jnp.float32, remat="layer") ** 2)

        ids = jax.ShapeDtypeStruct((2, 24), jnp.int32)
        return len(jax.jit(jax.grad(loss)).lower(concrete(shapes, one_device), ids, ids).as_text().splitlines())

    assert lines(39) == lines(12)  # 13 groups of three and 4
    assert lines(40) < 1.4 * lines(12)  # and one recurrent block that is unrolled
