"""Attention and its gradients are the masked softmax over the whole square, in float64, whoever computes them.

The TPU kernels run in Pallas's interpreter.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.schema import MeshConfig
from models import attention_blocks
from models.attention import Implementation, heads_read, self_attention
from models.kernels import splash_tpu
from sharding.mesh import make_mesh


def packed(lengths: list[int]) -> np.ndarray:
    """Positions of documents of these lengths in a row; a negative one is padding."""
    return np.concatenate([np.arange(n) if n > 0 else np.full(-n, -1) for n in lengths]).astype(np.int32)


def inputs(length: int, heads: int, kv_heads: int, features: int = 8):
    """q, k, v, cotangents of the result, and positions: a row of documents, and one with padding at both ends."""
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(2, length, n, features)) for n in (heads, kv_heads, kv_heads, heads)]
    positions = np.stack([packed([7, 1, 30, length - 38]), packed([-3, length - 5, -2])])
    return *arrays, positions


def by_hand(q, k, v, dout, positions, left: int | None, soft_cap: float) -> list[np.ndarray]:
    """The result and the gradients of its product with dout with respect to q, k and v, in float64."""
    distance = np.arange(q.shape[1])[:, None] - np.arange(q.shape[1])[None, :]
    near = (distance >= 0) & (distance <= (q.shape[1] if left is None else left))
    out, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
    for row, head in np.ndindex(q.shape[0], q.shape[2]):
        kv_head = head * k.shape[2] // q.shape[2]
        one, keys, values, cotangent = q[row, :, head], k[row, :, kv_head], v[row, :, kv_head], dout[row, :, head]
        document = np.cumsum(positions[row] == 0)
        mask = near & (document[:, None] == document[None, :])
        raw = one @ keys.T
        scores = soft_cap * np.tanh(raw / soft_cap) if soft_cap else raw
        weights = np.where(mask, np.exp(scores), 0)
        weights /= weights.sum(axis=1, keepdims=True)
        dweights = cotangent @ values.T
        draw = weights * (dweights - (weights * dweights).sum(axis=1, keepdims=True))
        draw *= 1 - np.tanh(raw / soft_cap) ** 2 if soft_cap else 1
        out[row, :, head], dq[row, :, head] = weights @ values, draw @ keys
        dk[row, :, kv_head] += draw.T @ one
        dv[row, :, kv_head] += weights.T @ cotangent
    return [out, dq, dk, dv]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    make = functools.partial(splash_tpu.splash.make_splash_mha, interpret=True)
    monkeypatch.setattr(splash_tpu.splash, "make_splash_mha", make)


def computed(
    q, k, v, dout, positions, left, soft_cap, implementation: Implementation | None, dtype=jnp.float32, **options
) -> list[np.ndarray]:
    @jax.jit
    def run(q, k, v, dout, positions):
        def attend(q, k, v):
            return self_attention(q, k, v, positions, left, soft_cap, implementation=implementation, **options)

        out, pullback = jax.vjp(attend, q, k, v)
        return out, *pullback(dout)

    found = run(*(jnp.asarray(x, dtype) for x in (q, k, v, dout)), jnp.asarray(positions))
    assert {x.dtype for x in found} == {jnp.dtype(dtype)}
    return [np.asarray(x, np.float64) for x in found]


def worst(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """Largest error of the result and the three gradients, each over the largest value of its kind (or 1)."""
    return max(np.abs(f - e).max() / max(np.abs(e).max(), 1) for f, e in zip(found, expected, strict=True))


# length, query heads, key-value heads, left, soft cap
FEW = [
    (200, 4, 2, None, 0.0),  # grouped; no multiple of 128
    (130, 4, 1, 20, 2.0),  # multi-query, a window within a block of the kernel and one over two
    (256, 2, 2, 0, 0.0),  # a query sees itself alone
]
MORE = [
    (129, 4, 4, 127, 3.0),
    (200, 6, 3, 128, 0.0),
    (100, 4, 2, 99, 0.0),  # just everything
    (100, 4, 2, 1000, 5.0),
    (390, 2, 1, 129, 0.0),
    (64, 4, 1, 62, 2.0),
]
SHAPES = [*FEW, *(pytest.param(*more, marks=pytest.mark.slow) for more in MORE)]


@pytest.mark.parametrize(("length", "heads", "kv_heads", "left", "soft_cap"), SHAPES)
def test_the_kernels_are_the_masked_softmax(one_device, length, heads, kv_heads, left, soft_cap):
    arrays = inputs(length, heads, kv_heads)
    expected = by_hand(*arrays, left, soft_cap)
    assert worst(computed(*arrays, left, soft_cap, "tpu"), expected) < 1e-5


@pytest.mark.parametrize("left", [None, pytest.param(70, marks=pytest.mark.slow)])
def test_in_bfloat16_the_kernels_are_as_near_as_its_rounding(one_device, left):
    arrays = inputs(200, 4, 2)
    rounded = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in arrays[:4]]
    expected = by_hand(*rounded, arrays[4], left, 3.0)
    for implementation in ("tpu", "xla"):
        assert worst(computed(*arrays, left, 3.0, implementation, jnp.bfloat16), expected) < 0.02, implementation


@pytest.mark.parametrize("off_by", [-1, 1])
def test_one_key_more_or_less_is_seen_to_be_wrong(one_device, off_by):
    """The kernel's own window counts the keys before a query's own, as `left` does; W would be one too many."""
    arrays = inputs(200, 2, 1)
    expected = by_hand(*arrays, 20, 0.0)
    assert worst(computed(*arrays, 20 + off_by, 0.0, "tpu"), expected) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [(128,), (256, 384, 128, 128, 384, 384, 0, 256)])
def test_blocks_change_no_result(one_device, blocks):
    arrays = inputs(700, 2, 1)
    expected = by_hand(*arrays, 300, 2.0)
    assert worst(computed(*arrays, 300, 2.0, "tpu", blocks=blocks), expected) < 1e-5


def test_the_kernels_skip_what_no_query_sees():
    """What the mask says in a moment of a block is what its pairs say one by one."""
    for left, offset in ((None, 0), (0, 0), (127, 128), (128, 0), (300, 256)):
        mask = splash_tpu.Window((512, 512 + offset), window_size=(left, 0), offset=offset)
        for i, j in np.ndindex(4, (512 + offset) // 256):
            queries, keys = slice(128 * i, 128 * (i + 1)), slice(256 * j, 256 * (j + 1))
            distance = np.arange(queries.start, queries.stop)[:, None] + offset - np.arange(keys.start, keys.stop)
            seen = (distance >= 0) & (distance <= (1000 if left is None else left))
            short = mask[queries, keys]
            assert (short.any(), short.all()) == (seen.any(), seen.all())


def test_pairs_that_the_kernels_compute_are_those_of_blocks_with_a_seen_pair():
    for left, offset in ((None, 0), (0, 0), (129, 0), (127, 128), (128, 0), (300, 256)):
        distance = np.arange(512)[:, None] + offset - np.arange(512 + offset)
        seen = (distance >= 0) & (distance <= (1000 if left is None else left))
        blocks = seen.reshape(2, 256, -1, 128).any(axis=(1, 3))
        assert splash_tpu.computed_pairs(512, 512 + offset, left, 256, 128) == blocks.sum() * 256 * 128


def test_blocks_are_cut_to_the_sequence():
    sizes = splash_tpu.block_sizes((0,), 640, 640, jnp.bfloat16)
    assert (sizes.block_q, sizes.block_kv, sizes.block_kv_dkv_compute) == (640, 128, 128)
    long = splash_tpu.block_sizes((0,), 32768, 32768, jnp.bfloat16)
    assert (long.block_q, long.block_q_dkv, long.block_kv_dkv, long.block_kv_dkv_compute) == (1024, 512, 2048, 512)
    assert splash_tpu.block_sizes((256,), 4096, 4096, jnp.bfloat16).block_kv_dq == 256


# --- without a TPU ---

# With blocks of 16 queries: one block, several, a window over two blocks, and rows that no block divides.
BLOCKED = [
    (64, 4, 2, 8, 0.0),
    (61, 4, 1, 7, 2.0),
    (50, 2, 2, None, 0.0),
    (61, 4, 2, 20, 0.0),
    (75, 4, 1, None, 2.0),
    (45, 4, 2, 0, 0.0),
    (64, 4, 1, 40, 0.0),
]


@pytest.mark.parametrize(("length", "heads", "kv_heads", "left", "soft_cap"), BLOCKED)
def test_blocks_of_queries_are_the_masked_softmax(one_device, monkeypatch, length, heads, kv_heads, left, soft_cap):
    monkeypatch.setattr(attention_blocks, "QUERIES", 16)
    arrays = inputs(length, heads, kv_heads)
    expected = by_hand(*arrays, left, soft_cap)
    assert worst(computed(*arrays, left, soft_cap, None), expected) < 1e-5


@pytest.mark.parametrize("left", [None, 32])
def test_memory_grows_with_the_tokens_not_with_their_square(one_device, left):
    def temporaries(length: int) -> int:
        q, k, v, dout, positions = inputs(length, 4, 1)
        q, k, v, dout = (jnp.asarray(x, jnp.float32) for x in (q, k, v, dout))

        def loss(q, k, v):
            return jnp.sum(self_attention(q, k, v, jnp.asarray(positions), left) * dout)

        gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        return gradient.lower(q, k, v).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(8192) < 2.5 * temporaries(4096)


# --- on several devices ---

MESHES = {
    "sequence 8": MeshConfig(data=1, sequence=8),
    "data 2, sequence 2, tensor 2": MeshConfig(data=2, sequence=2, tensor=2),
    "tensor 8": MeshConfig(data=1, tensor=8),
}
SHARED = [
    ("tpu", "data 2, sequence 2, tensor 2", 4, 2, None),
    ("tpu", "data 2, sequence 2, tensor 2", 4, 1, 20),
    ("xla", "sequence 8", 4, 2, None),
    ("xla", "sequence 8", 4, 1, 40),
    pytest.param("xla", "tensor 8", 24, 4, 300, marks=pytest.mark.slow),
    pytest.param("tpu", "sequence 8", 2, 2, 20, marks=pytest.mark.slow),
    pytest.param("tpu", "sequence 8", 2, 1, None, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("implementation", "sizes", "heads", "kv_heads", "left"), SHARED)
def test_devices_share_sequences_and_heads(implementation, sizes, heads, kv_heads, left):
    q, k, v, dout, positions = inputs(144, heads, kv_heads)
    expected = by_hand(q, k, v, dout, positions, left, 2.0)
    mesh = make_mesh(MESHES[sizes])
    with jax.set_mesh(mesh):
        batch, seq = ("replica", "data", "fsdp"), "sequence" if mesh.shape["sequence"] > 1 else None
        rows = [jax.sharding.PartitionSpec(batch, seq, heads, None) for heads in ("tensor", None)]
        place = [jax.sharding.NamedSharding(mesh, spec) for spec in rows]
        q, dout = (jax.device_put(x.astype(np.float32), place[0]) for x in (q, dout))
        k, v = (jax.device_put(x.astype(np.float32), place[1]) for x in (k, v))
        assert worst(computed(q, k, v, dout, positions, left, 2.0, implementation), expected) < 1e-5


@pytest.mark.parametrize(("devices", "heads", "kv_heads"), [(4, 8, 4), (4, 8, 2), (8, 24, 4), (2, 6, 3), (8, 8, 1)])
def test_a_device_has_the_key_value_heads_that_its_query_heads_read(devices, heads, kv_heads):
    mesh = jax.make_mesh((devices,), ("tensor",), axis_types=(jax.sharding.AxisType.Explicit,))
    own = heads // devices

    def read(x):  # every query head's key-value head, on the device that has it
        mine = heads_read(x, own, heads, "tensor")
        return jnp.repeat(mine, own // mine.shape[2], axis=2)

    with jax.set_mesh(mesh):
        split = jax.shard_map(read, in_specs=jax.P(), out_specs=jax.P(None, None, "tensor"), check_vma=False)
        found = split(jnp.arange(kv_heads, dtype=jnp.float32)[None, None, :, None])
    assert found.ravel().tolist() == [head * kv_heads // heads for head in range(heads)]
