"""The tiled loss is the softmax's closed form, written out in float64: values, and every gradient, on every mesh."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from runs import SMALL

from configs.overrides import resolve
from configs.schema import MeshConfig
from models.lookup import lookup
from models.token_loss import log_p_and_likeliest, log_z_and_target
from sharding.mesh import make_mesh, one_device_mesh
from sharding.rules import rules_for
from trainer.tasks import document_sums, make_task

B, T, V, D = 8, 8, 512, 16
WHOLE, TILES = 256, 0  # MiB of logits: all of them, or no more than 128 rows'


def example(num_tokens: int, scale: float = 1.0, dtype=np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    weights = rng.uniform(0.5, 2.0, (B, T)) * (rng.uniform(size=(B, T)) > 0.3)
    return {
        "x": (scale * rng.normal(size=(B, T, D))).astype(dtype),
        "table": rng.normal(size=(V, D)).astype(np.float32),
        "targets": rng.integers(num_tokens, size=(B, T)).astype(np.int32),
        "weights": weights.astype(np.float32),
    }


def closed_form(
    x, table, targets, weights, *, num_tokens: int, soft_cap: float, z_loss: float
) -> dict[str, np.ndarray]:
    """sum(weights * (log Z - logit of the target + z_loss * log Z^2)) and its gradients, in float64."""
    x, table, weights = (np.asarray(a, np.float64) for a in (x, table, weights))
    logits = x @ table[:num_tokens].T
    slope = np.ones_like(logits)
    if soft_cap:
        logits = soft_cap * np.tanh(logits / soft_cap)
        slope = 1 - (logits / soft_cap) ** 2
    top = logits.max(-1, keepdims=True)
    log_z = top + np.log(np.exp(logits - top).sum(-1, keepdims=True))
    one_hot = np.eye(num_tokens)[targets]
    nats = log_z[..., 0] - (logits * one_hot).sum(-1)
    d_logits = weights[..., None] * slope * ((1 + 2 * z_loss * log_z) * np.exp(logits - log_z) - one_hot)
    d_table = np.zeros_like(table)
    d_table[:num_tokens] = np.einsum("btv,btd->vd", d_logits, x)
    return {
        "nats": nats,
        "loss": np.sum(weights * (nats + z_loss * log_z[..., 0] ** 2)),
        "x": d_logits @ table[:num_tokens],
        "table": d_table,
    }


def ours(x, table, targets, weights, *, sizes: MeshConfig | None, z_loss: float, **options) -> dict[str, np.ndarray]:
    mesh = make_mesh(sizes) if sizes else one_device_mesh()
    spec = rules_for(mesh).spec

    def loss(x, table, targets, weights):
        log_z, target = log_z_and_target(x, table, targets, spec=spec, **options)
        nats = log_z - target
        return jnp.sum(weights * (nats + z_loss * jnp.square(log_z))), nats

    specs = (spec("batch", "seq", None), spec("vocab", "embed"), spec("batch", "seq"), spec("batch", "seq"))
    with jax.set_mesh(mesh):
        arrays = [
            jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip((x, table, targets, weights), specs, strict=True)
        ]
        program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        (value, nats), (dx, d_table) = program(*arrays)
        assert dx.sharding.is_equivalent_to(arrays[0].sharding, 3)
        assert d_table.sharding.is_equivalent_to(arrays[1].sharding, 2)
        assert (dx.dtype, d_table.dtype, nats.dtype) == (x.dtype, jnp.float32, jnp.float32)
        return {"nats": np.asarray(nats), "loss": float(value), "x": np.asarray(dx), "table": np.asarray(d_table)}


def check(
    got: dict[str, np.ndarray], expected: dict[str, np.ndarray], loss: float = 1e-6, gradient: float = 1e-5
) -> None:
    assert got["loss"] == pytest.approx(expected["loss"], rel=loss)
    np.testing.assert_allclose(got["nats"], expected["nats"], rtol=loss, atol=5e-6)
    for name in ("x", "table"):
        error = np.linalg.norm(got[name].astype(np.float64) - expected[name]) / np.linalg.norm(expected[name])
        assert error < gradient, (name, error)


@pytest.mark.parametrize("logits_mib", [WHOLE, TILES])
@pytest.mark.parametrize(
    ("soft_cap", "z_loss", "num_tokens"),
    [(0.0, 0.0, V), (3.0, 0.0, 300), (0.0, 1e-2, 257), (3.0, 1e-2, 100)],  # of 4 tiles, up to 3 are all padding
)
def test_loss_and_gradients_are_the_closed_form(soft_cap, z_loss, num_tokens, logits_mib):
    arrays, options = example(num_tokens), dict(soft_cap=soft_cap, z_loss=z_loss, num_tokens=num_tokens)
    check(ours(**arrays, **options, sizes=None, logits_mib=logits_mib), closed_form(**arrays, **options))


@pytest.mark.parametrize("rows", [129, 300, 500])
def test_tiles_that_do_not_divide_the_table_count_no_row_twice(rows):
    arrays = example(rows - 1) | {"table": example(1)["table"][:rows]}
    options = dict(soft_cap=0.0, z_loss=1e-2, num_tokens=rows - 1)
    check(ours(**arrays, **options, sizes=None, logits_mib=TILES), closed_form(**arrays, **options))


def test_large_logits_overflow_nothing():
    """Logits of hundreds: their exponentials are beyond float32. They are themselves rounded to 3e-5, gradients too."""
    arrays, options = example(300, scale=100.0), dict(soft_cap=0.0, z_loss=0.0, num_tokens=300)
    check(ours(**arrays, **options, sizes=None, logits_mib=TILES), closed_form(**arrays, **options), gradient=1e-4)


MESHES = {
    "data 2, fsdp 2, tensor 2": MeshConfig(data=2, fsdp=2, tensor=2),
    "fsdp 2, sequence 2, tensor 2": MeshConfig(data=1, fsdp=2, sequence=2, tensor=2),
}
MORE = {
    "replica 2, fsdp 4": MeshConfig(replica=2, data=1, fsdp=4),
    "data 8": MeshConfig(data=8),
    "fsdp 8": MeshConfig(data=1, fsdp=8),
    "sequence 8": MeshConfig(data=1, sequence=8),
    "tensor 8": MeshConfig(data=1, tensor=8),
    "data 2, sequence 4": MeshConfig(data=2, sequence=4),
}


@pytest.mark.parametrize("logits_mib", [WHOLE, TILES])
@pytest.mark.parametrize("mesh", [*MESHES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_every_mesh_gives_the_closed_form(mesh, logits_mib):
    """Of 512 rows 200 are tokens: with tensor 2, one device has nothing but padding."""
    arrays, options = example(200), dict(soft_cap=3.0, z_loss=1e-2, num_tokens=200)
    check(
        ours(**arrays, **options, sizes=(MESHES | MORE)[mesh], logits_mib=logits_mib), closed_form(**arrays, **options)
    )


def test_a_bfloat16_loss_is_that_of_the_rounded_numbers():
    """Products are exact and summed in float32; backward, a gradient of a logit is rounded once, to 8 bits."""
    arrays, options = example(300, dtype=jnp.bfloat16), dict(soft_cap=3.0, z_loss=1e-2, num_tokens=300)
    rounded = arrays | {"table": arrays["table"].astype(jnp.bfloat16)}
    got = ours(**arrays, **options, sizes=MESHES["data 2, fsdp 2, tensor 2"], logits_mib=TILES)
    check(got, closed_form(**rounded, **options), loss=1e-6, gradient=2**-8)


def test_a_common_tokens_gradient_is_summed_in_float32():
    """1024 tokens of weight 1 and one of weight 1000 with the same target: a bfloat16 sum would lose the small ones."""
    x = np.ones((8, 129, 2), jnp.bfloat16)
    weights = np.ones((8, 129), np.float32)
    weights[0, 0], weights[1:, 0] = 1000.0, 0.0
    table, targets = np.zeros((2, 2), np.float32), np.zeros((8, 129), np.int32)
    got = ours(x, table, targets, weights, sizes=MeshConfig(data=8), z_loss=0.0)
    np.testing.assert_allclose(got["table"], [[-1012.0] * 2, [1012.0] * 2], rtol=1e-6)  # (1000 + 1024) * (p - 1)


@pytest.mark.parametrize(
    "sizes",
    [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=1, sequence=2, tensor=4)],
    ids=["data 2, fsdp 2, tensor 2", "sequence 2, tensor 4"],
)
def test_a_common_tokens_lookup_is_summed_in_float32(sizes):
    """Whole numbers that bfloat16 has, of which the sums are exact in float32 and mostly not in bfloat16."""
    mesh, rng = make_mesh(sizes), np.random.default_rng(0)
    spec = rules_for(mesh).spec
    tokens = np.minimum(rng.geometric(0.3, size=(8, 512)) - 1, 15).astype(np.int32)
    upstream = rng.integers(1, 256, size=(8, 512, 4)).astype(jnp.bfloat16)
    table = rng.normal(size=(16, 4)).astype(np.float32)
    with jax.set_mesh(mesh):
        named = ((table, ("vocab", "embed")), (tokens, ("batch", "seq")), (upstream, ("batch", "seq", None)))
        arrays = [jax.device_put(a, NamedSharding(mesh, spec(*axes))) for a, axes in named]

        def program(table, tokens, upstream):
            rows, pullback = jax.vjp(lambda table: lookup(spec, jnp.dtype("bfloat16"), table, tokens), table)
            return rows, pullback(upstream)[0]

        rows, gradient = jax.jit(program)(*arrays)
    expected = np.zeros((16, 4))
    np.add.at(expected, tokens, upstream.astype(np.float64))
    np.testing.assert_array_equal(rows, table.astype(jnp.bfloat16)[tokens])
    np.testing.assert_array_equal(gradient, expected)


def test_neither_logits_nor_table_exist_whole():
    """Of the program of one device: it has 1024 tokens, 2048 of 4096 rows and a quarter of their 64 features."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    spec = rules_for(mesh).spec
    shapes = [((32, 128, 64), "bfloat16", ("batch", "seq", None)), ((4096, 64), "float32", ("vocab", "embed"))]
    with jax.set_mesh(mesh):
        x, table = (jax.ShapeDtypeStruct(s, d, sharding=NamedSharding(mesh, spec(*n))) for s, d, n in shapes)
        targets = jax.ShapeDtypeStruct((32, 128), jnp.int32, sharding=NamedSharding(mesh, spec("batch", "seq")))

        def loss(x, table, targets):
            log_z, target = log_z_and_target(x, table, targets, spec=spec, soft_cap=30.0, logits_mib=1)
            return jnp.sum(log_z - target)

        program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, table, targets).compile()
    text, tile = program.as_text(), 1024 * 256
    sizes = {shape: math.prod(map(int, shape.split(","))) for shape in re.findall(r"f(?:32|16|64)\[([\d,]+)\]", text)}
    assert max(sizes.values()) == tile, sizes  # 1 MiB of float32 logits
    assert not any(size >= 2048 * 64 for shape, size in sizes.items() if shape.endswith(",64") and "1024" not in shape)
    gathers = re.findall(r"= (\S+) all-gather(?:-start)?\(", text)
    assert gathers
    assert all("[256,64]" in shape for shape in gathers), gathers  # of one tile


def test_one_device_exchanges_nothing(one_device):
    """XLA carries out a collective over an axis of one device, too, with copies of the table on the way."""
    spec = rules_for(one_device).spec
    axes = {"x": ("batch", "seq", None), "table": ("vocab", "embed"), "targets": ("batch", "seq")}
    placed = [jax.device_put(example(V)[n], NamedSharding(one_device, spec(*names))) for n, names in axes.items()]

    def loss(x, table, targets):
        log_z, target = log_z_and_target(x, table, targets, spec=spec, soft_cap=0.0, logits_mib=TILES)
        return jnp.sum(log_z - target) + jnp.sum(lookup(spec, jnp.dtype("float32"), table, targets))

    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*placed).as_text()
    assert "while" in text  # the tiles
    assert not re.findall(r"all_gather|reduce_scatter|all_reduce|all_to_all|collective_permute", text)


@pytest.mark.parametrize("name", ["griffin-tiny", "gemma-tiny"])
def test_a_models_loss_is_that_of_its_logits(name, one_device):
    words = [*SMALL[name].split(), "--model.logits_soft_cap", "2", "--trainer.z_loss", "0.01"]
    config = resolve(name, words).config
    task, rng = make_task(config), np.random.default_rng(0)
    shape = (2, 64)
    batch = {key: rng.integers(264, size=shape).astype(np.int32) for key in ("tokens", "targets")}
    batch |= {"segment_pos": np.tile(np.arange(64, dtype=np.int32) % 23, (2, 1)), "target_bytes": np.ones(2, np.int32)}
    batch |= {"weights": (rng.uniform(size=shape) > 0.2).astype(np.float32)}
    batch = {key: jnp.asarray(value) for key, value in batch.items()}
    model = jax.jit(lambda key: task.init(key, rules_for(one_device).spec))(jax.random.key(0))
    logits = np.asarray(model(batch["tokens"], batch["segment_pos"], dtype=jnp.float32), np.float64)
    assert 1 < np.abs(logits).max() <= 2
    log_z = np.log(np.exp(logits).sum(-1))
    nats = log_z - np.take_along_axis(logits, np.asarray(batch["targets"])[..., None], -1)[..., 0]
    weights = np.asarray(batch["weights"])
    minimised, metrics = jax.jit(task.loss)(model, batch, jax.random.key(0))
    assert float(metrics["loss"]) == pytest.approx(np.average(nats, weights=weights), rel=1e-6)
    assert float(metrics["z_loss"]) == pytest.approx(0.01 * np.average(log_z**2, weights=weights), rel=1e-6)
    assert float(minimised) == pytest.approx(float(metrics["loss"] + metrics["z_loss"]), rel=1e-6)
    sums = jax.jit(task.evaluate)(model, batch)
    assert float(sums["nats"]) == pytest.approx(np.sum(weights * nats), rel=1e-6)  # without the z-loss
    assert float(sums["tokens"]) == weights.sum()


@pytest.mark.parametrize("sizes", [None, MeshConfig(data=2, sequence=4)], ids=["one device", "data 2, sequence 4"])
def test_losses_of_documents_are_their_tokens_sums(sizes):
    """The first row begins within a document, the second with one; the third has a document more than asked for."""
    mesh = make_mesh(sizes) if sizes else one_device_mesh()
    spec = rules_for(mesh).spec
    positions = np.array(
        [[5, 6, 0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7], [0, 0, 1, 0, 1, 2, 0, 1], [9] * 8], np.int32
    )
    nats = np.arange(32, dtype=np.float32).reshape(4, 8)
    weights = np.ones((4, 8), np.float32)
    weights[0, 5] = 0.0
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, spec("batch", "seq"))
        placed = [jax.device_put(a, rows) for a in (nats, weights)]
        pos = jax.device_put(positions, NamedSharding(mesh, spec("batch", None)))
        got = jax.jit(functools.partial(document_sums, num_documents=3))(*placed, pos)
    np.testing.assert_array_equal(
        got["nats"], [[1, 2 + 3 + 4, 13], [92, 0, 0], [16, 17 + 18, 19 + 20 + 21], [220, 0, 0]]
    )
    np.testing.assert_array_equal(got["tokens"], [[2, 3, 2], [8, 0, 0], [1, 2, 3], [8, 0, 0]])


@pytest.mark.parametrize("devices", [{}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=["one", "eight"])
def test_scores_are_the_closed_form_and_the_likeliest_the_first_of_the_highest(devices):
    """In several tiles, with padding rows that would be likeliest, and two equal rows in different tiles and devices."""
    arrays, num_tokens = example(500), 500
    arrays["table"][num_tokens:] *= 100
    arrays["table"][400] = arrays["table"][70] = 5 * arrays["x"][0, 0]
    mesh = make_mesh(MeshConfig(**devices)) if devices else one_device_mesh()
    spec = rules_for(mesh).spec
    with jax.set_mesh(mesh):
        program = jax.jit(
            functools.partial(log_p_and_likeliest, spec=spec, num_tokens=num_tokens, soft_cap=30.0, logits_mib=TILES)
        )
        placed = [
            jax.device_put(arrays[name], NamedSharding(mesh, names))
            for name, names in (
                ("x", spec("batch", None, None)),
                ("table", spec("vocab", "embed")),
                ("targets", spec("batch")),
            )
        ]
        log_p, likeliest = jax.device_get(program(*placed))
    exact = closed_form(**arrays, num_tokens=num_tokens, soft_cap=30.0, z_loss=0.0)
    np.testing.assert_allclose(log_p, -exact["nats"], atol=2e-4)
    logits = arrays["x"].astype(np.float64) @ arrays["table"][:num_tokens].T.astype(np.float64)
    assert (likeliest == logits.argmax(-1)).all()
    assert likeliest[0, 0] == 70
