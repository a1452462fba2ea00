"""Several real processes train as one does: the same losses, one writer, one end."""

import pathlib
import re
import signal
import socket
import subprocess

import numpy as np
import pytest
from runs import finish, saved_arrays, signal_at, start, train_command

from configs.schema import MeshConfig
from launch.local import without
from sharding import hosts
from sharding.hosts import host_rows
from sharding.mesh import make_mesh
from trainer.run_folder import read_metrics

DEVICES = ("--mesh.simulated_devices", "4")
STEPS = ("--trainer.steps", "3", "--checkpoint.every", "2", "--eval.every", "2")


def launch_command(name: str, run: pathlib.Path, processes: int, *overrides: str) -> list[str]:
    command = train_command(name, run, *DEVICES, *overrides)
    at = command.index("train")
    return [
        *command[:at],
        "launch",
        command[at + 1],
        "--on",
        "local",
        "--processes",
        str(processes),
        *command[at + 2 :],
    ]


def losses(run: pathlib.Path, kind: str = "train", name: str = "loss") -> dict[int, float]:
    return {step: record[name] for step, record in read_metrics(run, kind).items()}


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("name", "processes", "mesh"),
    [
        ("griffin-tiny", 2, "--mesh.data 2 --mesh.fsdp 2"),
        pytest.param("gemma-tiny", 2, "--mesh.data 1 --mesh.tensor 4", marks=pytest.mark.slow),  # hosts share every row
        pytest.param("griffin-tiny", 4, "--mesh.data 1 --mesh.sequence 2 --mesh.fsdp 2", marks=pytest.mark.slow),
        pytest.param("lru-tiny", 2, "--mesh.data 1 --mesh.sequence 2 --mesh.fsdp 2", marks=pytest.mark.slow),
        pytest.param("nfnet-tiny", 4, "--mesh.data 2 --mesh.fsdp 2", marks=pytest.mark.slow),
    ],
)
def test_processes_give_the_losses_of_one(name, processes, mesh, tmp_path):
    words = [*STEPS, *mesh.split()]
    code, _, err = finish(train_command(name, tmp_path / "one", *DEVICES, *words))
    assert code == 0, err
    code, out, err = finish(launch_command(name, tmp_path / "many", processes, *words))
    assert code == 0, err
    assert "done: 3 steps" in out
    for kind, metric in (("train", "loss"), ("train", "grad_norm"), ("eval", "loss")):
        one, many = (losses(tmp_path / run, kind, metric) for run in ("one", "many"))
        assert one.keys() == many.keys()
        for step, value in one.items():
            assert many[step] == pytest.approx(value, rel=2e-6 if metric == "loss" else 2e-5), (kind, metric, step)
    one, many = (saved_arrays(tmp_path / run, 3) for run in ("one", "many"))
    assert one.keys() == many.keys()
    for key, value in one.items():
        np.testing.assert_allclose(many[key], value, rtol=1e-3, atol=1e-5, err_msg=key)


@pytest.mark.multiprocess
def test_a_stopped_job_saves_once_and_goes_on_with_any_number_of_processes(tmp_path):
    run, name = tmp_path / "run", "griffin-tiny"
    command = launch_command(name, run, 2, "--trainer.steps", "60", "--checkpoint.every", "1000", "--mesh.data", "4")
    job = start(command)
    signal_at(job, run, 3, signal.SIGTERM)
    out, err = job.communicate(timeout=300)
    assert job.returncode == 75, out + err
    stopped = re.search(r"podwright: stopped by SIGTERM after step (\d+), which is saved; continue with: (.*)", err)
    assert stopped, err
    assert "podwright launch griffin-tiny --on local --processes 2" in stopped[2]
    step = int(stopped[1])
    assert saved_arrays(run, step)["step"] == step
    code, out, err = finish(
        train_command(
            name,
            run,
            *DEVICES,
            "--trainer.steps",
            str(step + 2),
            "--checkpoint.every",
            "1000",
            "--mesh.data",
            "4",
            "--allow",
            "trainer.steps",
        )
    )
    assert code == 0, err
    assert f"resumed from step {step}" in out
    assert sorted(losses(run)) == list(range(1, step + 3))


SLOW_COMPILER = """
import sys, time
import jax
from launch.cli import main

compile = jax.stages.Lowered.compile

def late(*args, **options):
    time.sleep(35 * jax.process_index())
    return compile(*args, **options)

jax.stages.Lowered.compile = late
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_hosts_wait_for_one_that_compiles_longer_than_their_collectives_would(tmp_path):
    """Gloo gives up after 30 seconds; the step and the evaluation are compiled ahead of it."""
    command = train_command("griffin-tiny", tmp_path / "run", *DEVICES, *STEPS, "--mesh.data", "2", "--mesh.fsdp", "2")
    command = [command[0], "-c", SLOW_COMPILER, *command[command.index("train") :]]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        told = {hosts.ADDRESS: f"127.0.0.1:{free.getsockname()[1]}", hosts.COUNT: "2"}
    second = start(command, env=told | {hosts.INDEX: "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    code, out, err = finish(command, env=told | {hosts.INDEX: "0"})
    assert code == 0, err
    assert "done: 3 steps" in out
    assert second.wait(60) == 0


@pytest.mark.multiprocess
def test_what_stops_the_first_process_stops_all_with_one_sentence(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    code, _, err = finish(launch_command("griffin-tiny", tmp_path / "run", 2, *STEPS))
    assert code == 4
    assert err.startswith(f"podwright: {tmp_path / 'run'} is not a podwright run")
    assert err.count("\n") == 1
    other = (tmp_path / "run-hosts" / "process-1.log").read_text()
    assert "podwright: host 0 could not go on, and says why" in other.splitlines()  # and what Gloo has to say


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--processes 2", r"--on WHERE is missing: .*, local$"),
        ("--on gke --processes 2", r"--processes is of --on local"),
        ("--on local --processes two", r"--processes two is not a number of processes"),
        (
            "--on local --processes 3 --mesh.simulated_devices 8",
            r"simulated_devices=8 does not divide among --processes 3: give a multiple of 3",
        ),
    ],
)
def test_a_job_that_cannot_be_is_refused(words, sentence, capsys):
    from launch.cli import main

    assert main(["launch", "griffin-tiny", *words.split()]) == 2
    assert re.search(sentence, capsys.readouterr().err)


def test_the_launcher_keeps_every_option_but_its_own():
    words = ["--mesh.data", "2", "--on", "local", "--run=a", "--processes=4", "--quick", "--trainer.steps", "3"]
    assert without(words, {"on": "WHERE", "processes": "N", "quick": ""}) == [
        "--mesh.data",
        "2",
        "--run=a",
        "--trainer.steps",
        "3",
    ]


def test_a_process_with_all_devices_reads_every_row_once():
    """Also where several of its devices need the same rows. What several processes read, their losses tell above."""
    for sizes in (MeshConfig(data=8), MeshConfig(data=1, tensor=8), MeshConfig(data=2, fsdp=2, sequence=2)):
        np.testing.assert_array_equal(host_rows(make_mesh(sizes), 16), np.arange(16))
