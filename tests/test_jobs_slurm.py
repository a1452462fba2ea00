"""A job on Slurm: its batch script run by a queue that stands in for Slurm's, with hosts that are processes here."""

import json
import pathlib
import re
import threading
import time

import fake_gcloud
import fake_slurm
import pytest
from runs import ROOT
from stand_ins import installed, tell, without_code_and_plan

from configs import EXPERIMENTS
from launch import sweeps
from launch.cli import main
from launch.jobs import slurm
from launch.sweep import folder_name
from launch.sweeps.grids import grid


@pytest.fixture
def queue(tmp_path, monkeypatch):
    commands = ("sbatch", "squeue", "sacct", "scancel", "scontrol", "srun")
    folder = installed(tmp_path / "slurm", commands, fake_slurm, monkeypatch, named=True)
    monkeypatch.setattr(slurm, "POLL", 0.1)
    without_code_and_plan(monkeypatch)
    return folder


def job(queue: pathlib.Path) -> dict:
    with fake_gcloud.state(queue) as state:
        return json.loads(json.dumps(state["jobs"]["1"]))


def words(run: pathlib.Path) -> list[str]:
    return f"launch griffin-tiny --on slurm --topology v5p-16 --partition tpu --run {run}".split()


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("stub", "codes"),
    [
        ("exit 0", [0]),
        ("exit 3", [3]),
        ('test "$PODWRIGHT_PROCESS" = 0 && exit 2; exit 76', [2]),  # not the largest, but the one with a cause
        ("test -e SEEN && exit 0; touch SEEN; exit 75", [75, 0]),
        ('test -e SEEN && exit 0; touch SEEN; test "$PODWRIGHT_PROCESS" = 0 && exit 124; exit 76', [124, 0]),
    ],
)
def test_a_job_goes_back_into_the_queue_only_after_codes_that_may_end_otherwise(stub, codes, queue, tmp_path):
    run = tmp_path / "runs" / "first"
    seen = str(tmp_path / "seen-$PODWRIGHT_PROCESS")
    tell(queue, stub=stub.replace("SEEN", seen))
    assert main(words(run)) == codes[-1]
    assert job(queue)["codes"] == codes
    assert list((tmp_path / "runs" / "first-job" / "logs").glob("1-1.log"))


@pytest.mark.multiprocess
def test_a_stopped_job_saves_and_is_not_queued_again(queue, tmp_path, capfd):
    run, saved = tmp_path / "runs" / "first", tmp_path / "saved"
    tell(queue, stub=f"trap 'touch {saved}-$PODWRIGHT_PROCESS; exit 75' TERM; touch {saved}-ready; sleep 1000 & wait")
    ended: list[int] = []
    launcher = threading.Thread(target=lambda: ended.append(main(words(run))))
    launcher.start()
    while not pathlib.Path(f"{saved}-ready").exists():
        time.sleep(0.05)
    assert main(["jobs", "list", "--on", "slurm"]) == 0
    assert re.search(rf"first +slurm +RUNNING +1 x v5p-16 +{run}", capfd.readouterr().out)
    assert main(["jobs", "stop", "first", "--on", "slurm"]) == 0
    launcher.join()
    assert pathlib.Path(f"{saved}-0").exists()
    assert pathlib.Path(f"{saved}-1").exists()
    assert job(queue)["codes"] == [75]
    assert ended == [75]


def test_a_second_job_of_a_name_is_refused(queue, tmp_path, capsys):
    run = tmp_path / "runs" / "first"
    entry = {"name": "first", "comment": f"podwright:{run}", "state": "PENDING", "codes": []}
    tell(queue, jobs={"1": entry})
    assert main(words(run)) == 2
    assert capsys.readouterr().err.startswith("podwright: there is a job first already")


def test_jobs_of_others_are_left_alone(queue, capsys):
    tell(queue, jobs={"1": {"name": "theirs", "comment": "(null)", "state": "RUNNING", "codes": []}})
    assert main(["jobs", "list", "--on", "slurm"]) == 0
    assert capsys.readouterr().out == "no jobs\n"
    assert main(["jobs", "stop", "theirs", "--on", "slurm"]) == 2


@pytest.mark.multiprocess
def test_a_sweep_is_a_job_for_each_run(queue, tmp_path, monkeypatch, capfd):
    def sweep():
        """For tests."""
        yield from grid(EXPERIMENTS["griffin-tiny"](), {"optimizer.learning_rate": [1e-3, 2e-3]})

    monkeypatch.setitem(sweeps.SWEEPS, "two", sweep)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    first, second = (folder_name(config) for config in sweep())
    monkeypatch.setattr("launch.pool.PAUSE", 0.0)
    # One is at fault; the other could not reach storage at first, after which Slurm does not start it again.
    once = tmp_path / "once"
    tell(queue, stub=f"case $PWD in *{first}*) exit 3;; esac; [ -e {once} ] || {{ touch {once}; exit 4; }}; exit 0")
    to = tmp_path / "runs"
    command = ["sweep", "two", *f"--on slurm --topology v5p-16 --partition tpu --to {to}".split()]
    assert main([*command, "--dry-run"]) == 0
    assert f"each as podwright launch {to}/configs/{first}.json --on slurm" in capfd.readouterr().out
    assert main(command) == 3
    said = capfd.readouterr().out
    assert "failed: griffin-tiny learning_rate=0.001" in said
    assert "1 of 2 runs are done" in said
    with fake_gcloud.state(queue) as state:
        names = sorted(one["name"] for one in state["jobs"].values())
    assert names == sorted([first, second, second])
