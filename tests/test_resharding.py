"""A state saved on one mesh is, bit for bit, the state restored on any other, and training goes on from there."""

import contextlib
import signal
import sys

import jax
import pytest
from runs import SMALL, finish, signal_at, start, train_command

from configs.overrides import resolve
from configs.schema import CheckpointConfig, MeshConfig
from sharding.mesh import make_mesh
from trainer.checkpoint import Checkpoints
from trainer.program import make_program
from trainer.run_folder import read_metrics
from trainer.saved import SavedSteps
from trainer.tasks import make_task

MESHES = {
    "fsdp 8": MeshConfig(data=1, fsdp=8),
    "data 2, fsdp 2, tensor 2": MeshConfig(data=2, fsdp=2, tensor=2),
    "tensor 4 of 4": MeshConfig(data=1, tensor=4),
    "fsdp 4 of 4": MeshConfig(data=1, fsdp=4),
    "tensor 2 of 2": MeshConfig(data=1, tensor=2),
    "1": MeshConfig(data=1),
}


def on(sizes: MeshConfig):
    count = sizes.data * sizes.fsdp * sizes.tensor
    return make_mesh(sizes, jax.devices()[:count])


def test_any_mesh_reads_what_any_other_saved_bit_for_bit(tmp_path):
    config = resolve("griffin-tiny", SMALL["griffin-tiny"].split(), {}).config
    task = make_task(config)
    first: dict | None = None
    for number, (name, sizes) in enumerate(MESHES.items()):
        mesh = on(sizes)
        with jax.set_mesh(mesh):
            program = make_program(config, task, mesh)
            if first is None:
                shardings = jax.tree.map(lambda leaf: leaf.sharding, program.state)
                state = jax.jit(program.init, out_shardings=shardings)()
                first = jax.device_get(state)
            else:
                state, manifest = SavedSteps(tmp_path).restore(number - 1, program.state)
                assert manifest["mesh"]["axes"]["fsdp"] == list(MESHES.values())[number - 1].fsdp
                for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(program.state), strict=True):
                    assert leaf.sharding == wanted.sharding
            for leaf, expected in zip(jax.tree.leaves(jax.device_get(state)), jax.tree.leaves(first), strict=True):
                assert leaf.tobytes() == expected.tobytes(), name
            with contextlib.closing(Checkpoints(tmp_path, CheckpointConfig(keep_last=100))) as checkpoints:
                checkpoints.save(number, state, {})
                checkpoints.finish()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_four_processes_then_two_then_three_then_one_train_as_one_does(tmp_path):
    """12 devices and 12 rows divide among all of them. Each part is a start of its own, and another mesh."""
    common = "--trainer.steps 24 --mesh.simulated_devices 12 --data.batch_size 12 --checkpoint.every 100 --eval.every 0"
    parts = [
        (4, 4, "--mesh.data 3 --mesh.fsdp 4"),
        (10, 2, "--mesh.data 6 --mesh.fsdp 2"),
        (16, 3, "--mesh.data 12"),
        (24, 1, "--mesh.data 2 --mesh.fsdp 3 --mesh.tensor 2"),
    ]
    whole = train_command("griffin-tiny", tmp_path / "whole", *common.split(), "--mesh.data", "12")
    assert finish(whole)[0] == 0
    for stop, processes, mesh in parts:
        command = train_command("griffin-tiny", tmp_path / "parts", *common.split(), *mesh.split())
        at = command.index("train")
        command[at : at + 1] = ["launch"]
        command += ["--on", "local", "--processes", str(processes)]
        job = start(command)
        if stop < 24:
            signal_at(job, tmp_path / "parts", stop, signal.SIGTERM)
        out, err = job.communicate(timeout=600)
        assert job.returncode == (75 if stop < 24 else 0), out + err
    expected, got = (read_metrics(tmp_path / run, "train") for run in ("whole", "parts"))
    assert list(expected) == list(got) == list(range(1, 25))
    for step in expected:
        assert got[step]["loss"] == pytest.approx(expected[step]["loss"], rel=1e-6), step


MEASURE = """
import pathlib, re, sys
import jax, jax.numpy as jnp
from configs.schema import CheckpointConfig
from trainer.checkpoint import Checkpoints
import trainer.saved
from trainer.saved import SavedSteps

def memory(name):
    return int(re.search(rf"{name}:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])  # KiB

folder, act, mib = sys.argv[1], sys.argv[2], int(sys.argv[3])
leaf = jax.ShapeDtypeStruct((mib // 8, 2**18), jnp.float32)
shapes = {"model": {str(i): leaf for i in range(8)}, "step": jax.ShapeDtypeStruct((), jnp.int32)}
if act == "save":
    state = jax.tree.map(lambda x: jax.random.uniform(jax.random.key(0), x.shape).astype(x.dtype), shapes)
    checkpoints = Checkpoints(folder, CheckpointConfig())
    checkpoints.save(1, state, {})
    checkpoints.finish()
else:
    trainer.saved.RESTORE_GIB = float(sys.argv[4])
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)
    before = memory("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now on, not from who started this
    state, _ = SavedSteps(folder).restore(1, abstract)
    jax.block_until_ready(state)
    print((memory("VmHWM") - before) / 2**10 / mib)
"""


@pytest.mark.multiprocess
def test_restoring_holds_the_state_once_and_little_more(tmp_path):
    """Of 256 MiB, with 64 MiB allowed on the way: on a CPU the devices' memory is the host's, so all of it is in what is
    measured once."""
    for act in ("save", "restore"):
        code, out, err = finish([sys.executable, "-c", MEASURE, str(tmp_path), act, "256", str(1 / 16)])
        assert code == 0, err
    assert 1.0 <= float(out) < 1.6
