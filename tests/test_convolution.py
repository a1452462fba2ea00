"""Convolutions of each platform against XLA's own, and kernels that are standardised once a step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from configs.overrides import resolve
from configs.schema import Config, MeshConfig
from data.shapes import batch_fields
from models import nfnet
from models.convolution import convolve, native, on_cpu
from models.params import named_leaves
from sharding.mesh import make_mesh, one_device_mesh
from sharding.rules import rules_for
from trainer.evaluate import place_batch
from trainer.step import mean_gradient
from trainer.tasks import make_task


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("side", "groups"), [(1, 1), (3, 1), (3, 3)])
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 2), (3, 4), (4, 3), (9, 6)])
def test_a_cpus_convolution_and_gradients_are_xlas(size, side, groups, stride):
    rng = np.random.default_rng(0)
    x, kernel = (rng.normal(size=s).astype(np.float32) for s in ((2, *size, 12), (side, side, 12 // groups, 18)))
    padding = tuple(lax.padtype_to_pads(size, (side, side), (stride, stride), "SAME"))
    expected, back = jax.vjp(functools.partial(native, stride, padding, groups), x, kernel)
    got, ours_back = jax.vjp(functools.partial(convolve, stride, padding, groups), x, kernel)
    dy = rng.normal(size=expected.shape).astype(np.float32)
    for a, b in zip((got, *ours_back(dy)), (expected, *back(dy)), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6 * float(jnp.max(jnp.abs(b))) + 1e-30)


def lowered(platform: str) -> str:
    x, kernel = jax.ShapeDtypeStruct((2, 8, 8, 12), jnp.float32), jax.ShapeDtypeStruct((3, 3, 4, 18), jnp.float32)
    program = jax.jit(functools.partial(convolve, 1, ((1, 1), (1, 1)), 3))
    return program.trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()


def test_only_a_cpu_convolves_one_group_after_another():
    assert lowered("tpu").count("stablehlo.convolution") == lowered("cuda").count("stablehlo.convolution") == 1
    assert "feature_group_count = 3" in lowered("tpu")
    assert lowered("cpu").count("stablehlo.convolution") == 3


def test_rows_and_columns_that_see_only_padding_cost_nothing():
    x, kernel = jnp.ones((2, 1, 1, 4)), jnp.ones((3, 3, 4, 4))
    program = jax.jit(functools.partial(on_cpu, 1, ((1, 1), (1, 1)), 1)).lower(x, kernel).compile()
    assert program.cost_analysis()["flops"] < 1.5 * 2 * 2 * 4 * 4


# --- once a step ------------------------------------------------------------------------------------------------------

WORDS = (
    "--model.widths 16,32 --model.depths 1,2 --model.stem_widths 4,4,8,16 --model.group_width 8 --model.head_width 32"
)


def config(mesh: MeshConfig | None, microbatches: int, dtype: str = "float32") -> Config:
    # Without noise: each microbatch has its own.
    words = f"{WORDS} --data.batch_size 32 --trainer.microbatches {microbatches} --trainer.compute_dtype {dtype}"
    return resolve("nfnet-tiny", [*words.split(), "--trainer.remat", "layer"]).config


def model_and_batch(task, found: Config, mesh):
    rng = np.random.default_rng(0)
    model = jax.jit(lambda: task.init(jax.random.key(0), rules_for(mesh).spec))()
    moved = [
        np.asarray(p) + 0.1 * np.cos(np.arange(p.size, dtype=p.dtype)).reshape(p.shape) for p in jax.tree.leaves(model)
    ]
    placed = [jax.device_put(p, old.sharding) for p, old in zip(moved, jax.tree.leaves(model), strict=True)]
    model = jax.tree.unflatten(jax.tree.structure(model), placed)
    rows = {name: rng.normal(size=shape).astype(dtype) for name, (shape, dtype) in batch_fields(found.data).items()}
    return model, place_batch(rows | {"labels": rng.integers(10, size=32).astype(np.int32)}, mesh, rules_for(mesh).spec)


EIGHT = MeshConfig(data=2, fsdp=4)


@pytest.fixture(autouse=True)
def short_stages_are_loops(monkeypatch):
    monkeypatch.setattr(nfnet, "MOST_UNROLLED", 2)


@pytest.mark.parametrize(("microbatches", "meshes"), [(1, [None]), (4, [None, EIGHT])])
def test_gradients_are_those_of_standardising_in_every_call(microbatches, meshes):
    found = {}
    for sizes, prepares in ((None, False), *((sizes, True) for sizes in meshes)):
        settings = config(sizes, microbatches)
        mesh, task = make_mesh(sizes) if sizes else one_device_mesh(), make_task(settings)
        with jax.set_mesh(mesh):
            model, batch = model_and_batch(task, settings, mesh)
            program = functools.partial(
                mean_gradient, jax.grad(task.loss, has_aux=True), task.weight, microbatches=microbatches
            )
            program = functools.partial(program, prepare=task.prepare if prepares else None)
            sooner = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
            gradient, metrics = jax.jit(program, compiler_options=sooner)(model, batch, jax.random.key(0))
            same = jax.tree.map(lambda g, p: g.sharding.is_equivalent_to(p.sharding, p.ndim), gradient, model)
            assert all(jax.tree.leaves(same))
        found[sizes, prepares] = {n: np.asarray(g) for n, g in named_leaves(gradient).items()} | {
            "loss": np.asarray(metrics["loss"])
        }
    expected = found.pop((None, False))
    largest = max(abs(value).max() for value in expected.values())
    for got in found.values():
        for name, value in expected.items():  # that of a skip gain is a difference of large numbers
            atol = 1e-6 * max(abs(value).max(), 1e-3 * largest)
            np.testing.assert_allclose(got[name], value, atol=atol, rtol=2e-6, err_msg=name)


def primitives(jaxpr, inside: bool = False):
    """Every operation of a program, and whether a loop or a layer that is computed again contains it."""
    for eqn in jaxpr.eqns:
        yield eqn, inside
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")
        ):
            if (inner := getattr(value, "jaxpr", value)) is not value or hasattr(value, "eqns"):
                repeats = eqn.primitive.name in ("scan", "while", "remat2", "checkpoint")
                yield from primitives(inner, inside or repeats)


def test_kernels_are_standardised_once_a_step_outside_of_loops_and_layers(one_device):
    settings = config(None, 4)
    task = make_task(settings)
    model, batch = model_and_batch(task, settings, one_device)
    program = functools.partial(
        mean_gradient, jax.grad(task.loss, has_aux=True), task.weight, microbatches=4, prepare=task.prepare
    )
    found = list(primitives(jax.make_jaxpr(program)(model, batch, jax.random.key(0)).jaxpr))
    roots = [inside for eqn, inside in found if eqn.primitive.name == "rsqrt" and eqn.outvars[0].aval.ndim == 4]
    assert roots == [False] * sum(name.endswith("gain") and "skip" not in name for name in named_leaves(model))
    assert any(inside for eqn, inside in found if eqn.primitive.name == "tanh")  # the walk reaches the layers


def test_kernels_travel_in_the_compute_dtype_and_gradients_in_float32():
    mesh = make_mesh(MeshConfig(fsdp=8))
    settings = config(MeshConfig(fsdp=8), 1, "bfloat16")
    task = make_task(settings)
    with jax.set_mesh(mesh):
        model, batch = model_and_batch(task, settings, mesh)
        program = functools.partial(
            mean_gradient, jax.grad(task.loss, has_aux=True), task.weight, microbatches=1, prepare=task.prepare
        )
        traced = jax.make_jaxpr(program)(model, batch, jax.random.key(0))
    types: dict[str, set] = {}
    for eqn, _ in primitives(traced.jaxpr):
        types.setdefault(eqn.primitive.name, set()).add(str(eqn.invars[0].aval.dtype) if eqn.invars else "")
    assert types["all_gather"] == {"bfloat16"}
    assert types["reduce_scatter"] == {"float32"}
