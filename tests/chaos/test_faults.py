"""Disks that lie, fill and refuse, clocks that jump, and processes that are asked to stop: nothing saved is lost, and the run
that goes on is bit for bit the one that nobody disturbed."""

import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest
from runs import ROOT, finish, saved_arrays, signal_at, start, train_command

from trainer.run_folder import read_metrics
from trainer.saved import SavedSteps

OPTIONS = ["--model.depth", "2", "--eval.every", "0", "--checkpoint.every", "5", "--trainer.steps", "40"]


def command(run: pathlib.Path, processes: int = 1) -> list[str]:
    if processes == 1:
        return train_command("griffin-tiny", run, *OPTIONS)
    mesh = ["--mesh.simulated_devices", "2", "--mesh.data", "2", "--on", "local", "--processes", str(processes)]
    words = train_command("griffin-tiny", run, *OPTIONS, *mesh)
    words[words.index("train")] = "launch"
    return words


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[int, pathlib.Path]:
    """Undisturbed runs, by their processes."""
    folder = tmp_path_factory.mktemp("whole")
    for processes in (1, 2):
        code, _, err = finish(command(folder / str(processes), processes))
        assert code == 0, err
    return {processes: folder / str(processes) for processes in (1, 2)}


def assert_same(whole: pathlib.Path, other: pathlib.Path) -> None:
    expected, got = (read_metrics(run, "train") for run in (whole, other))
    assert sorted(got) == list(expected) == list(range(1, 41))
    assert all(got[step][key] == expected[step][key] for step in expected for key in ("loss", "grad_norm"))
    expected, got = (saved_arrays(run, 40) for run in (whole, other))
    assert all(array.tobytes() == got[name].tobytes() for name, array in expected.items())


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("processes", [1, 2])
def test_a_byte_that_flips_on_the_disk_costs_steps_and_nothing_else(whole, tmp_path, processes):
    run = tmp_path / "run"
    job = start(command(run, processes))
    signal_at(job, run, 18, signal.SIGTERM)
    out, err = job.communicate(timeout=300)
    assert job.returncode == 75, out + err
    steps = SavedSteps(run / "checkpoints").steps()
    file = max((run / "checkpoints" / str(steps[-1]) / "state").rglob("d/*"), key=lambda it: it.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)
    code, out, err = finish(command(run, processes))
    assert code == 0, out + err
    assert re.search(rf"damaged: {run}/checkpoints/{steps[-1]} ", out), out
    assert f"resumed from step {steps[-2]}" in out
    assert (run / "checkpoints" / "set-aside" / str(steps[-1])).is_dir()
    assert_same(whole[processes], run)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_folder_that_may_no_longer_be_written_ends_the_run_and_loses_nothing(tmp_path):
    """As another user than root, whom nothing stops; that one may read fewer of the files that are the data, so the
    undisturbed run is his, too."""
    if os.geteuid():
        pytest.skip("only root can become somebody else, and give the folder back")
    home, run = tmp_path / "home", tmp_path / "open" / "run"
    for folder in (home, run.parent):
        folder.mkdir()
        os.chown(folder, 65534, 65534)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)

    def as_nobody(words: list[str], **options) -> subprocess.Popen:
        # A copy of the Python that this runs in may lie where only root may look.
        return start(["setpriv", "--reuid", "65534", "--clear-groups", *words], env={"HOME": str(home)}, **options)

    if as_nobody([sys.executable, "-c", f"import os; os.listdir({str(ROOT)!r}); import jax"]).wait():
        pytest.skip("another user may not read this checkout or its Python")
    job = as_nobody(command(run))
    signal_at(job, run, 11, 0, kind="save")
    os.chown(run / "checkpoints", 0, 0)
    (run / "checkpoints").chmod(0o555)
    out, err = job.communicate(timeout=300)
    assert job.returncode == 4, out + err
    assert re.search(r"podwright: \S+ could not be [\w ]+: Permission denied", err), err
    assert min(SavedSteps(run / "checkpoints").steps()) >= 5
    os.chown(run / "checkpoints", 65534, 65534)
    (run / "checkpoints").chmod(0o755)
    again = as_nobody(command(run))
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0, out + err
    undisturbed = as_nobody(command(tmp_path / "open" / "whole"))
    out, err = undisturbed.communicate(timeout=300)
    assert undisturbed.returncode == 0, out + err
    assert_same(tmp_path / "open" / "whole", run)


JUMPING = """
import sys, time
from launch.cli import main

real, calls = time.time, [0]

def jumping():
    # From five minutes late to right to five minutes early, and back. (Orbax takes twenty minutes for a save that hangs.)
    calls[0] += 1
    return real() + 300 * ((calls[0] // 40) % 3 - 1)

time.time = jumping
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_clock_that_jumps_changes_nothing(whole, tmp_path):
    run = tmp_path / "run"
    words = command(run)
    words = [words[0], "-c", JUMPING, *words[3:]]
    job = start(words)
    signal_at(job, run, 18, signal.SIGKILL)
    job.communicate()
    code, out, err = finish(words)
    assert code == 0, out + err
    assert "resumed from step" in out
    assert_same(whole[1], run)
    code, out, err = finish([*words[:1], "-m", "launch", "goodput", str(run)])
    assert code == 0, err
    assert not re.search(r" -\d", out), out


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("processes", [1, 2])
def test_who_is_asked_to_stop_saves_in_time_and_goes_on(whole, tmp_path, processes):
    run, ends = tmp_path / "run", 0
    for step in (3, 12, 27):
        job = start(command(run, processes))
        signal_at(job, run, step, signal.SIGTERM)
        out, err = job.communicate(timeout=300)
        assert job.returncode == 75, out + err
        assert "continue with: " in err
        ends += 1
    code, out, err = finish(command(run, processes))
    assert code == 0, out + err
    assert "resume verified: bit-identical" in out
    assert ends == 3
    assert_same(whole[processes], run)
