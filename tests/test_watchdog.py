"""What hangs is ended with the hosts, the phase and the stack named; what is merely slow is let alone. Real processes."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import time

import jax
import pytest
from runs import finish, signal_at, start, train_command

from configs.schema import WatchdogConfig
from sharding import hosts
from trainer import watchdog as watchdog_file
from trainer.phases import COMPILE, DATA_WAIT, SAVE, STEP, Phases
from trainer.saved import MANIFEST, MARKER
from trainer.watchdog import Host, Watchdog, saves

STUCK_SOURCE = """
import sys, time
from data.dataset import Dataset
from launch.cli import main

open_batches, host = Dataset.train_batches, sys.argv.pop(1)

def wait_for_a_source_that_never_answers():
    time.sleep(10_000)

def batches(self, start):
    import jax
    for number, batch in enumerate(open_batches(self, start), start):
        if number == 5 and host == str(jax.process_index()):
            wait_for_a_source_that_never_answers()
        yield batch

Dataset.train_batches = batches
sys.exit(main(sys.argv[1:]))
"""
SLOW_COMPILER = """
import sys, time
import jax
from launch.cli import main

compile = jax.stages.Lowered.compile

def late(*args, **options):
    time.sleep(6)
    return compile(*args, **options)

jax.stages.Lowered.compile = late
sys.exit(main(sys.argv[1:]))
"""
LONG = ("--trainer.steps", "100000", "--checkpoint.every", "4", "--eval.every", "0")
PAIR = ("--mesh.simulated_devices", "4", "--mesh.data", "4")


def scripted(script: str, command: list[str], *argv: str) -> list[str]:
    return [command[0], "-c", script, *argv, *command[command.index("train") :]]


def start_pair(command: list[str]) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        told = {hosts.ADDRESS: f"127.0.0.1:{free.getsockname()[1]}", hosts.COUNT: "2"}
    return [start(command, env=told | {hosts.INDEX: str(index)}) for index in range(2)]


def after(processes: list[subprocess.Popen], index: int) -> tuple[int, str, float]:
    """Exit code, standard error and seconds of one process of a pair; the other is killed."""
    began = time.monotonic()
    try:
        _, err = processes[index].communicate(timeout=120)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return processes[index].returncode, err, time.monotonic() - began


def test_a_source_that_never_answers_is_ended_with_its_stack(tmp_path):
    command = train_command("griffin-tiny", tmp_path / "run", *LONG, "--watchdog.data_wait", "2")
    code, _, err = finish(scripted(STUCK_SOURCE, command, "0"), timeout=120)
    assert code == 124, err
    assert "podwright: watchdog: stuck in data wait of step 6, which may take 2 s" in err
    assert "wait_for_a_source_that_never_answers" in err
    assert f"saved        step 4 in {tmp_path / 'run' / 'checkpoints'}" in err
    assert "exit code 124; continue with: podwright train griffin-tiny" in err.splitlines()[-1]


@pytest.mark.slow
def test_tell_tells_once_and_ends_nothing(tmp_path):
    command = train_command(
        "griffin-tiny", tmp_path / "run", *LONG, "--watchdog.data_wait", "1", "--watchdog.policy", "tell"
    )
    told = tmp_path / "told"
    with open(told, "w") as file:
        process = start(scripted(STUCK_SOURCE, command, "0"), stderr=file)
    try:
        while "stacks of host 0" not in told.read_text():
            assert process.poll() is None
            time.sleep(0.1)
        time.sleep(4)
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()
    err = told.read_text()
    assert err.count("podwright: watchdog: stuck in data wait of step 6") == 1
    assert "exit code" not in err


@pytest.mark.slow
def test_a_long_compilation_is_no_hang(tmp_path):
    command = train_command("griffin-tiny", tmp_path / "run", "--trainer.steps", "3", "--watchdog.step", "0.5")
    command += ["--watchdog.data_wait", "5", "--watchdog.silence", "2"]
    code, _, err = finish(scripted(SLOW_COMPILER, command), timeout=120)
    assert code == 0, err
    assert "watchdog" not in err
    code, _, err = finish(
        [
            *scripted(SLOW_COMPILER, command),
            "--watchdog.compile",
            "2",
            "--trainer.steps",
            "5",
            "--allow",
            "trainer.steps",
        ]
    )
    assert code == 124  # unless it takes longer than its own limit
    assert "podwright: watchdog: stuck in compile, which may take 2 s" in err


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_stopped_host_is_named_and_the_other_ends(tmp_path):
    run = tmp_path / "run"
    processes = start_pair(train_command("griffin-tiny", run, *LONG, *PAIR, "--watchdog.silence", "6"))
    signal_at_host(processes[0], processes[1], run, 5, signal.SIGSTOP)
    code, err, seconds = after(processes, 0)
    assert code == 124, err
    assert "podwright: watchdog: host 1 gave no sign of life for 6 s: stopped, dead or cut off" in err
    assert re.search(r"not arrived  host 1: (data wait of |save block of )?step \d+ for", err), err
    assert f"(process {processes[1].pid} on " in err
    assert "stacks of host 0:\nthread MainThread:" in err
    assert seconds < 30


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_killed_host_is_named_before_jax_aborts(tmp_path):
    run = tmp_path / "run"
    processes = start_pair(train_command("griffin-tiny", run, *LONG, *PAIR, "--watchdog.silence", "6"))
    signal_at_host(processes[0], processes[1], run, 5, signal.SIGKILL)
    code, err, seconds = after(processes, 0)
    assert code == 124, err
    assert "podwright: watchdog: host 1 gave no sign of life for 6 s: stopped, dead or cut off" in err
    assert "Traceback" not in err
    assert seconds < 30


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_stack_of_the_host_that_hangs_is_shown_by_the_one_that_waits(tmp_path):
    run = tmp_path / "run"
    command = train_command("griffin-tiny", run, *LONG, *PAIR, "--watchdog.data_wait", "4")
    processes = start_pair(scripted(STUCK_SOURCE, command, "1"))
    code, err, _ = after(processes, 0)
    assert code == 124, err
    assert "podwright: watchdog: host 1: stuck in data wait of step 6, which may take 4 s" in err
    assert "not arrived  host 1: data wait of step 6 for" in err
    assert "wait_for_a_source_that_never_answers" in err.split("stacks of host 1:")[1]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_launcher_names_the_coordinator_that_was_killed(tmp_path):
    """jax aborts the other process at once, with a C++ stack in its log."""
    run = tmp_path / "run"
    command = train_command("griffin-tiny", run, *LONG, *PAIR)
    at = command.index("train")
    job = start([*command[:at], "launch", command[at + 1], "--on", "local", "--processes", "2", *command[at + 2 :]])
    while not (run / "ledger.jsonl").exists():
        assert job.poll() is None
        time.sleep(0.1)
    first = int((run / "lock").read_text().split()[1])  # process N on HOST
    os.kill(first, signal.SIGKILL)
    began = time.monotonic()
    _, err = job.communicate(timeout=60)
    assert "podwright: process 0 was ended by SIGKILL\n" in err
    assert job.returncode == 76
    assert time.monotonic() - began < 40


@pytest.mark.parametrize(
    ("beat", "code", "sentence"),
    [
        ({"phase": "step", "step": 3, "for": 0.0, "at": "process 7 on pod-1"}, 124, "host 1 gave no sign of life"),
        ({"phase": "failed"}, 76, "host 1 could not go on, and says why"),
    ],
)
def test_a_collective_that_fails_is_explained_by_the_host_that_left(beat, code, sentence, tmp_path, monkeypatch):
    """Gloo raises where a TPU would hang: the error is the survivor's, the cause is another host."""
    left = []
    monkeypatch.setattr(watchdog_file, "leave", lambda lines, code, last: left.append((code, lines[0])))
    for name, seconds in {"TICK": 0.1, "GRACE": 1.0, "FOR_STACKS": 0.2}.items():
        monkeypatch.setattr(watchdog_file, name, seconds)
    monkeypatch.setattr(watchdog_file.jax, "process_count", lambda: 2)
    watchdog = Watchdog(WatchdogConfig(silence=0.5), Phases(), tmp_path)
    watchdog.count, watchdog.others = 2, {1: Host(beat)}
    with pytest.raises(jax.errors.JaxRuntimeError), watchdog:
        raise jax.errors.JaxRuntimeError("Connection closed by peer")
    assert [code_ for code_, _ in left] == [code]
    assert sentence in left[0][1]


def test_storage_that_hangs_does_not_hold_the_watchdog_up(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog_file, "FOR_STACKS", 0.2)
    assert saves(tmp_path / "checkpoints") == "nothing yet"
    for name in (MARKER, "/".join(MANIFEST)):
        file = tmp_path / "checkpoints" / "4" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    (tmp_path / "checkpoints" / "8.orbax-checkpoint-tmp").mkdir()
    assert saves(tmp_path / "checkpoints") == (
        f"step 4 in {tmp_path / 'checkpoints'}; under way or left half done: 8.orbax-checkpoint-tmp"
    )
    monkeypatch.setattr(watchdog_file, "saves_in", lambda folder: time.sleep(3))
    assert "does not answer" in saves(tmp_path / "checkpoints")


def signal_at_host(first: subprocess.Popen, host: subprocess.Popen, run: pathlib.Path, step: int, number: int) -> None:
    """Send a signal to `host` once the first process has logged `step`."""
    first_signal = first.send_signal
    first.send_signal = lambda _: host.send_signal(number)  # type: ignore[method-assign]
    signal_at(first, run, step, signal.Signals(number))
    first.send_signal = first_signal  # type: ignore[method-assign]


def test_a_step_may_take_twenty_times_what_steps_take(tmp_path):
    phase = Phases()
    watchdog = Watchdog(WatchdogConfig(step=60.0, compile=7.0, data_wait=8.0, save=9.0), phase, tmp_path)
    for name, limit in ((COMPILE, 7.0), (DATA_WAIT, 8.0), (SAVE, 9.0), (STEP, 600.0)):
        with phase(name):
            assert watchdog.limit() == limit
    with phase(STEP):
        phase.step_seconds.extend([0.1] * 10)
        assert watchdog.limit() == 60.0
        phase.step_seconds.extend([12.0] * 11)
        assert watchdog.limit() == 240.0
