"""The host's memory: where moments lie between updates, that they are the same bits, and what copies cost in a plan."""

import types

import jax
import numpy as np
import pytest
from runs import SMALL, saved_arrays
from test_hlo import made_up

from configs.overrides import resolve
from configs.schema import ConfigError
from launch.plan import make_plan
from launch.plan_table import lines
from sharding import aot
from sharding.mesh import make_mesh
from sharding.topologies import find_topology
from trainer.loop import train
from trainer.offload import check_host_memory, notes
from trainer.program import bytes_per_device, make_program
from trainer.tasks import make_task

WORDS = f"{SMALL['griffin-tiny']} --data.batch_size 8 --eval.batches 1 --mesh.data 2 --mesh.fsdp 4".split()
MOMENTS = ["--optimizer.offload", "true"]


pytestmark = pytest.mark.usefixtures("optax_promotes")


@pytest.mark.slow
def test_moments_are_the_same_bits_and_a_run_may_move_them(tmp_path):
    for name, first, second in (("device", [], []), ("moved", MOMENTS, []), ("back", [], MOMENTS)):
        for steps, words in ((2, first), (4, second)):
            config = resolve("griffin-tiny", [*WORDS, "--trainer.steps", str(steps), *words]).config
            train(config, tmp_path / name, allow=("trainer.steps",))
    expected = saved_arrays(tmp_path / "device", 4)
    for name in ("moved", "back"):
        found = saved_arrays(tmp_path / name, 4)
        assert found.keys() == expected.keys()
        for leaf in expected:
            assert np.array_equal(found[leaf], expected[leaf]), leaf


def test_moments_lie_on_the_host_before_and_after_a_step():
    config = resolve("griffin-tiny", [*WORDS, *MOMENTS]).config
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        program = make_program(config, make_task(config), mesh)

        outputs = program.trace().lower().compile().output_shardings[0]
    for state in (program.state, outputs):
        kinds = {leaf.memory_kind for leaf in shardings(state.opt_state)}
        assert kinds == {"pinned_host", "device"}
    moments = bytes_per_device(program.state.opt_state, "pinned_host")
    assert moments == 2 * bytes_per_device(program.state.model)
    assert bytes_per_device(program.state.opt_state) == 2 * 4  # two counts of steps


def shardings(tree) -> list:
    return [getattr(leaf, "sharding", leaf) for leaf in jax.tree.leaves(tree)]


def test_a_device_without_such_memory_is_one_sentence():
    memories = [types.SimpleNamespace(kind="device")]
    device = types.SimpleNamespace(device_kind="abacus", platform="abacus", addressable_memories=lambda: memories)
    mesh = types.SimpleNamespace(devices=np.array([device]))
    for words, sentence in (
        (MOMENTS, "optimizer.offload=True needs memory of kind pinned_host, but abacus devices have only device: it must be false here"),
        (
            ["--trainer.remat", "layer", "--trainer.offload", "qkv"],
            "trainer.offload=('qkv',) needs memory of kind pinned_host, but abacus devices have only device: it must be empty here",
        ),
    ):  # fmt: skip
        with pytest.raises(ConfigError) as error:
            check_host_memory(resolve("griffin-tiny", words).config, mesh)
        assert str(error.value) == sentence
    check_host_memory(resolve("griffin-tiny").config, mesh)


def test_a_cpu_says_that_it_gains_nothing():
    config = resolve("griffin-tiny", [*WORDS, *MOMENTS]).config
    assert notes(config, make_mesh(config.mesh)) == ["a CPU's host memory is its own: offload saves nothing here"]


# As libtpu writes them: moments come and go, and a loop's activations go slice by slice into a buffer of the host and return.
COPIES = """
%m = f32[250]{0:T(256)S(5)} parameter(0)
%x = bf16[1,500]{1,0} parameter(1)
%buffer = bf16[8,500]{1,0:T(8,128)(2,1)S(5)} custom-call(), custom_call_target="AllocateBuffer"
%in = (f32[250]{0:T(256)}, f32[250]{0:T(256)S(5)}, u32[]{:S(2)}) copy-start(%m)
%here = f32[250]{0:T(256)} copy-done(%in)
%out = (f32[250]{0:T(256)S(5)}, f32[250]{0:T(256)}, u32[]{:S(2)}) copy-start(%here)
%put = ((bf16[8,500]{1,0:S(5)}, bf16[1,500]{1,0}, s32[], s32[]), bf16[8,500]{1,0:S(5)}, u32[]{:S(2)}) dynamic-update-slice-start(%buffer, %x, %i, %i)
%there = f32[250]{0:T(256)S(5)} copy-done(%out)
%stored = bf16[8,500]{1,0:S(5)} dynamic-update-slice-done(%put)
%get = ((bf16[8,500]{1,0:S(5)}, s32[], s32[]), bf16[1,500]{1,0}, u32[]{:S(2)}) dynamic-slice-start(%stored, %i, %i)
ROOT %back = bf16[1,500]{1,0} dynamic-slice-done(%get)
"""


def test_copies_to_the_host_and_back_have_a_network_each_way():
    """1,000 bytes each; 1 MB/s."""
    found = made_up(COPIES)
    assert {key: (t.count, t.bytes, t.seconds) for key, t in found.collectives.items()} == {
        ("copy", "to host"): (2, 2000, pytest.approx(2e-3)),
        ("copy", "from host"): (2, 2000, pytest.approx(2e-3)),
    }
    assert found.exposed == found.seconds == pytest.approx(4e-3)
    assert found.bound == pytest.approx(2e-3)  # both ways at once
    assert found.bytes == 4000


def test_a_plan_counts_moments_on_the_host_apart(monkeypatch):
    monkeypatch.setattr(aot, "has_libtpu", lambda: False)
    plans = [
        make_plan(resolve("griffin-7b", words).config, find_topology("v5p-128"))
        for words in ((), ("--optimizer.offload", "true"))
    ]
    assert plans[1].host == 2 * plans[0].parameters
    assert plans[0].memory - plans[1].memory == plans[1].host == plans[1].as_dict()["host_bytes"]
    assert [about for plan in plans for about, _, _ in lines(plan, "") if "host" in about] == ["  on the host"]
