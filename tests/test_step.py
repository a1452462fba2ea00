"""The train step gives the same numbers on any mesh, and they are those of a loop written out in numpy terms."""

import functools
import math

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from runs import SMALL

from configs.overrides import resolve
from configs.schema import MeshConfig, OptimizerConfig
from data import open_data
from sharding.mesh import make_mesh, one_device_mesh
from sharding.rules import rules_for
from trainer.evaluate import place_batch
from trainer.optimizers import adaptive_clip, make_optimizer, make_schedule
from trainer.step import init_state, train_step
from trainer.tasks import make_task

MESHES = {
    "griffin-tiny": MeshConfig(data=2, fsdp=2, tensor=2),
    "gemma-tiny": MeshConfig(data=2, fsdp=2, tensor=2),
    "lru-tiny": MeshConfig(fsdp=2, sequence=2, tensor=2),
    "lra-matching-tiny": MeshConfig(fsdp=2, sequence=2, tensor=2),
    "nfnet-tiny": MeshConfig(replica=2, data=2, fsdp=2),
}


pytestmark = pytest.mark.usefixtures("optax_promotes")


def three_steps(name: str, sizes: MeshConfig | None) -> tuple[list[dict], dict[str, float]]:
    """Metrics of three updates on a mesh (None: one device), and the held-out sums after them."""
    config = resolve(name, [*SMALL[name].split(), "--data.batch_size", "8"]).config
    mesh = make_mesh(sizes) if sizes else one_device_mesh()
    spec, task, data = rules_for(mesh).spec, make_task(config), open_data(config.data)
    schedule = make_schedule(config.optimizer, 10)
    optimizer = make_optimizer(config.optimizer, schedule, task.decays, task.clips)
    with jax.set_mesh(mesh):
        state = jax.jit(functools.partial(init_state, task, optimizer, config.trainer.seed, spec))()
        program = functools.partial(
            train_step, task=task, optimizer=optimizer, schedule=schedule, seed=config.trainer.seed
        )
        step, metrics = jax.jit(program), []
        for n in range(3):
            state, m = step(state, place_batch(data.train_batch(n), mesh=mesh, spec=spec))
            metrics.append({key: float(value) for key, value in m.items()})
        held_out = place_batch(next(data.held_out_batches()), mesh=mesh, spec=spec)
        sums = jax.jit(task.evaluate)(state.model, held_out)
    return metrics, {key: np.asarray(value) for key, value in sums.items()}


@pytest.mark.parametrize("name", SMALL)
def test_three_steps_on_eight_devices_give_the_losses_of_one(name):
    """Their gradients, on many more meshes, are in test_meshes.py."""
    expected, expected_sums = three_steps(name, None)
    outputs = {"griffin-tiny": 264, "gemma-tiny": 264, "lru-tiny": 264, "lra-matching-tiny": 2, "nfnet-tiny": 10}[name]
    assert expected[0]["loss"] == pytest.approx(math.log(outputs), rel=0.15)  # of a uniform guess
    got, got_sums = three_steps(name, MESHES[name])
    for one, many in zip(expected, got, strict=True):
        assert many["loss"] == pytest.approx(one["loss"], rel=2e-6)
        assert many["grad_norm"] == pytest.approx(one["grad_norm"], rel=2e-5)
        assert many["learning_rate"] == one["learning_rate"]
    for key, value in expected_sums.items():
        np.testing.assert_allclose(got_sums[key], value, rtol=2e-6, atol=1e-5, err_msg=key)


def test_adamw_is_the_papers_update():
    """Loshchilov and Hutter, algorithm 2, in float64: warm-up, cosine, decoupled decay on matrices by name, clipping."""
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=2, final_fraction=0.1, weight_decay=0.5, clip_norm=1.0)
    schedule = make_schedule(config, 6)
    optimizer = make_optimizer(config, schedule, lambda name: name.endswith("kernel"), lambda name: True)
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(3, 2)), "bias": rng.normal(size=2)}
    ours = jax.tree.map(lambda p: jax.numpy.asarray(p, jax.numpy.float32), params)
    state = optimizer.init(ours)
    m = dict.fromkeys(params, 0.0)
    v = dict.fromkeys(params, 0.0)
    rates = [0.0, 0.05, *(0.1 * (0.1 + 0.9 * (1 + math.cos(math.pi * t / 4)) / 2) for t in range(4))]
    for step, rate in enumerate(rates, start=1):
        assert float(schedule(step - 1)) == pytest.approx(rate, rel=1e-6)
        grads = {"kernel": rng.normal(size=(3, 2)), "bias": rng.normal(size=2)}
        norm = math.sqrt(sum(np.sum(g**2) for g in grads.values()))
        updates, state = optimizer.update(
            jax.tree.map(lambda g: jax.numpy.asarray(g, jax.numpy.float32), grads), state, ours
        )
        ours = optax.apply_updates(ours, updates)
        for key in params:
            g = grads[key] / max(norm, 1.0)
            m[key] = 0.9 * m[key] + 0.1 * g
            v[key] = 0.95 * v[key] + 0.05 * g**2
            moved = (m[key] / (1 - 0.9**step)) / (np.sqrt(v[key] / (1 - 0.95**step)) + 1e-8)
            decay = 0.5 * params[key] if key == "kernel" else 0.0
            params[key] = params[key] - rate * (moved + decay)
            np.testing.assert_allclose(ours[key], params[key], rtol=2e-5, atol=1e-6)


def test_sgd_is_nfnets_recipe():
    """Brock et al. 2021, eq. 3 and section 4.1: unit-wise clipping to 0.01 of the weight's norm (at least 1e-3), then
    coupled decay, then Nesterov momentum; the excluded parameter is not clipped."""
    config = OptimizerConfig(
        name="sgd",
        learning_rate=0.1,
        schedule="constant",
        warmup_steps=0,
        beta1=0.9,
        weight_decay=0.2,
        clip_norm=0.0,
        adaptive_clip=0.01,
    )
    schedule = make_schedule(config, 5)
    optimizer = make_optimizer(config, schedule, lambda name: name.endswith("kernel"), lambda name: name != "head")
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(3, 2)), "head": rng.normal(size=(3, 2))}
    ours = jax.tree.map(lambda p: jax.numpy.asarray(p, jax.numpy.float32), params)
    state = optimizer.init(ours)
    trace = dict.fromkeys(params, 0.0)
    for _ in range(3):
        grads = {key: rng.normal(size=(3, 2)) for key in params}
        updates, state = optimizer.update(
            jax.tree.map(lambda g: jax.numpy.asarray(g, jax.numpy.float32), grads), state, ours
        )
        ours = optax.apply_updates(ours, updates)
        for key in params:
            g = grads[key]
            if key == "kernel":
                limit = 0.01 * np.maximum(np.linalg.norm(params[key], axis=0, keepdims=True), 1e-3)
                size = np.linalg.norm(g, axis=0, keepdims=True)
                g = np.where(size > limit, g * limit / size, g) + 0.2 * params[key]
            trace[key] = 0.9 * trace[key] + g
            params[key] = params[key] - 0.1 * (g + 0.9 * trace[key])
            np.testing.assert_allclose(ours[key], params[key], rtol=2e-5, atol=1e-6)


def test_adaptive_clipping_takes_gradients_of_which_every_dimension_is_divided():
    """As a pod divides NFNet-F7+'s 384 channels: over as many devices as do, and other dimensions over the rest."""
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    specs = {"dense": P("b", "a"), "conv": P(None, None, "b", "a"), "bias": P("a")}
    rng = np.random.default_rng(0)
    shapes = {"dense": (8, 16), "conv": (3, 3, 8, 16), "bias": (16,)}
    gradients, parameters = (
        {n: rng.normal(size=shape).astype(np.float32) for n, shape in shapes.items()} for _ in range(2)
    )
    clip = optax.adaptive_grad_clip(0.01, eps=1e-3)
    expected, _ = clip.update(gradients, clip.init(parameters), parameters)
    with jax.set_mesh(mesh):
        put = functools.partial(jax.device_put, device={n: NamedSharding(mesh, spec) for n, spec in specs.items()})
        clip = adaptive_clip(0.01)
        got, _ = jax.jit(clip.update)(put(gradients), clip.init(parameters), put(parameters))
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-6)
        assert got[name].sharding.spec == specs[name]
