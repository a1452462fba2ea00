"""Every update rule is the same on 8 devices, after a restart and in an imported run."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_meshes import batch, small, start
from update_rules import (
    HEAD,
    KERNEL,
    NORM,
    PARAMS,
    RULES,
    TABLE,
    followed,
    plain,
    rule_of,
    same,
)

from configs.schema import MeshConfig
from models.params import named_leaves
from sharding.mesh import make_mesh, one_device_mesh
from sharding.rules import rules_for
from trainer.checkpoint import Checkpoints
from trainer.evaluate import place_batch
from trainer.guard import saved_part
from trainer.imported import counts
from trainer.program import make_program
from trainer.tasks import make_task

pytestmark = pytest.mark.usefixtures("optax_promotes")


def config_of(family: str, name: str, mesh: MeshConfig):
    # With an eps beside which what rounding leaves of a gradient is nothing: Adam and SOAP would make it as long as the rest.
    fields = dict(precondition_every=2) if name in ("shampoo", "soap") else dict(power=2.0) if name == "sgd" else {}
    rate = 0.03 if name == "sgd" else 3e-3
    optimizer = plain(name, learning_rate=rate, eps=1e-3, adaptive_clip=0.1 if name == "sgd" else 0.0, **fields)
    config = small(family, mesh)
    return dataclasses.replace(config, optimizer=optimizer)


@functools.cache
def program_of(family: str, name: str, devices: int):
    config = config_of(family, name, MeshConfig(data=2, fsdp=4) if devices > 1 else MeshConfig(data=1))
    mesh = make_mesh(config.mesh) if devices > 1 else one_device_mesh()
    with jax.set_mesh(mesh):
        program = make_program(config, make_task(config), mesh)
        return config, mesh, program, program.trace().lower().compile()


def stepped(compiled, state, config, mesh, count: int):
    with jax.set_mesh(mesh):
        for _ in range(count):
            state, _ = compiled(state, place_batch(batch(config), mesh, rules_for(mesh).spec), None)
    return state


def fresh(family: str, program, mesh):
    """From parameters that all have gradients, see `start`."""
    with jax.set_mesh(mesh):
        own = named_leaves(program.state.model)
        base = {name: jax.device_put(leaf, own[name].sharding) for name, leaf in start(family).items()}
        return jax.jit(program.init, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, program.state))(base=base)


DIVIDED = {KERNEL: P(None, "fsdp", "tensor"), HEAD: P("fsdp"), TABLE: P(None, ("fsdp", "tensor")), NORM: P()}


@pytest.mark.parametrize("name", [*RULES, "adamw", "sgd"])
def test_updates_of_divided_parameters_are_those_of_whole_ones(eight_devices, name):
    shapes = {KERNEL: (3, 4, 4), HEAD: (4, 4), TABLE: (8, 4), NORM: (4,)}

    def normals(seed: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}

    few = dict(precondition_every=2, precondition_limit=4) if name in ("shampoo", "soap") else {}
    rule = rule_of(plain(name, **few, **(dict(power=2.0, adaptive_clip=0.1) if name == "sgd" else {})))
    trees = [normals(seed) for seed in range(9)]
    params, *gradients = [
        jax.device_put(t, {n: NamedSharding(eight_devices, DIVIDED[n]) for n in shapes}) for t in trees
    ]
    state = rule.init(params)
    for leaf_name, leaf in named_leaves(state).items():
        parameter = next((n for n in shapes if leaf_name.endswith(n)), None)
        if parameter:  # moments, averages, traces
            assert leaf.sharding.is_equivalent_to(params[parameter].sharding, leaf.ndim), leaf_name
        elif leaf_name.endswith(("left", "right")) and NORM not in leaf_name:
            assert leaf.sharding.shard_shape(leaf.shape)[1] < leaf.shape[1], leaf_name
    got = followed(rule, params, gradients)
    with jax.set_mesh(one_device_mesh()):
        params, *gradients = jax.device_put(trees, NamedSharding(one_device_mesh(), P()))
        same(got, followed(rule, params, gradients), 1e-5)


def from_there(state, program, mesh):
    """The state, on this program's devices."""
    with jax.set_mesh(mesh):
        return jax.device_put(jax.device_get(state), jax.tree.map(lambda leaf: leaf.sharding, program.state))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*RULES, "adamw", "sgd"])
@pytest.mark.parametrize("family", ["griffin", "nfnet"])
def test_devices_share_the_state_and_a_restart_goes_on_bit_for_bit(tmp_path, family, name):
    """Six steps on eight devices, with a checkpoint after three and without, and on one.

    Of directions that gradients have not had, Shampoo and SOAP know only what rounding left, so that on other devices they take
    other steps there. Of these the fourth step is compared, from one state and before roots and bases change.
    """
    config, mesh, program, compiled = program_of(family, name, 8)
    own = named_leaves(program.state.model)
    for leaf_name, leaf in named_leaves(program.state.opt_state).items():
        parameter = next((own[n] for n in own if leaf_name.endswith(f"/{n}")), None)
        if parameter is not None:
            assert leaf.shape == parameter.shape
            assert leaf.sharding.is_equivalent_to(parameter.sharding, leaf.ndim), leaf_name
    first = jax.device_get(fresh(family, program, mesh))
    half = stepped(compiled, from_there(first, program, mesh), config, mesh, 3)
    before, done = (jax.device_get(half), 1) if name in ("shampoo", "soap") else (first, 6)
    checkpoints = Checkpoints(tmp_path, config.checkpoint)
    checkpoints.save(3, saved_part(half), {})
    checkpoints.finish()
    whole = jax.device_get(named_leaves(stepped(compiled, half, config, mesh, 3)))
    with jax.set_mesh(mesh):
        restored, _ = checkpoints.saved.restore(3, saved_part(program.state))
    resumed = jax.device_get(named_leaves(stepped(compiled, restored, config, mesh, 3)))
    checkpoints.close()
    assert whole.keys() == resumed.keys()
    for leaf_name in whole:
        assert whole[leaf_name].tobytes() == resumed[leaf_name].tobytes(), leaf_name
    there = jax.device_get(named_leaves(stepped(compiled, from_there(before, program, mesh), config, mesh, done)))
    config, mesh, program, compiled = program_of(family, name, 1)
    alone = jax.device_get(named_leaves(stepped(compiled, from_there(before, program, mesh), config, mesh, done)))
    for leaf_name in there:
        if leaf_name.startswith(("model/", "ema/")):
            np.testing.assert_allclose(there[leaf_name], alone[leaf_name], rtol=0, atol=1e-5, err_msg=leaf_name)
    assert np.mean([abs(whole[f"model/{n}"] - leaf).max() > 1e-3 for n, leaf in start(family).items()]) > 0.5
    for leaf_name, leaf in named_leaves(before).items():
        if "/bases/" in leaf_name:
            identity = np.broadcast_to(np.eye(leaf.shape[1]), leaf.shape)
            np.testing.assert_allclose(leaf @ leaf.swapaxes(1, 2), identity, atol=1e-5, err_msg=leaf_name)
        if "/roots/" in leaf_name:  # of both sides the fourth, found in the third step
            statistic = named_leaves(before)[leaf_name.replace("/roots/", "/statistics/")].astype(np.float64)
            values, vectors = np.linalg.eigh(statistic)
            powers = (np.maximum(values, 0) + 1e-6 * values[:, -1:]) ** -0.25
            expected = (vectors * powers[:, None]) @ vectors.swapaxes(1, 2)
            assert np.linalg.norm(leaf - expected) < 0.05 * np.linalg.norm(expected), leaf_name


def test_an_imported_run_begins_as_any_other():
    """With zeros, but for the first parameters of schedule-free, and for `counts`."""
    config = config_of("nfnet", "schedule-free", MeshConfig(data=1))
    known = {name.split("/")[-1] for name in counts(config)}
    for name in RULES:
        for leaf_name, leaf in named_leaves(rule_of(plain(name)).init(PARAMS)).items():
            _, newest, parameter = leaf_name.rpartition("/z/")
            if leaf_name.split("/")[-1] not in known | {"ns_coeffs"}:
                assert np.array_equal(leaf, PARAMS[parameter] if newest else np.zeros_like(leaf)), leaf_name
