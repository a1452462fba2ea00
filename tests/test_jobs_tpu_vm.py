"""A job on TPU VMs, from the first question to gcloud until nothing is left: against a gcloud whose hosts are processes here."""

import io
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import threading
import time
import zipfile

import fake_gcloud
import pytest
from runs import ROOT, SMALL
from stand_ins import installed, known, tell, without_code_and_plan

from launch.cli import main
from launch.jobs import code, queued_resources, tpu_vm
from launch.jobs.job import Job
from trainer.run_folder import read_metrics

PLACE = "--zone us-east5-a --project my-project-1"


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """A folder of the fake, which is on PATH."""
    folder = installed(tmp_path / "cloud", ["gcloud"], fake_gcloud, monkeypatch)
    monkeypatch.setattr(tpu_vm, "POLL", 0.1)
    monkeypatch.setattr(tpu_vm, "LAST", 1.0)
    yield folder
    with fake_gcloud.state(folder) as known:
        for resource in known.get("resources", {}).values():
            fake_gcloud.stop_machines(folder, resource, fake_gcloud.signal.SIGKILL)


@pytest.fixture(scope="session")
def wheel():
    return code.build_wheel(None)


def verbs(cloud: pathlib.Path) -> list[str]:
    return [words[3] for words in known(cloud).get("calls", []) if words[:3] == ["compute", "tpus", "queued-resources"]]


def words(run: pathlib.Path, *more: str) -> list[str]:
    small = f"{SMALL['griffin-tiny']} --data.batch_size 8 --eval.batches 1 --trainer.log_every 1"
    launch = f"launch griffin-tiny --on tpu-vm --topology v5p-16 --run {run} --yes {PLACE} {small}"
    return [*launch.split(), *more]


def left(cloud: pathlib.Path) -> list[int]:
    """Processes of all machines that ever were."""
    return [p for entry in pathlib.Path("/proc").iterdir() if entry.name.isdecimal() for p in with_mark(entry, cloud)]


def with_mark(entry: pathlib.Path, cloud: pathlib.Path) -> list[int]:
    try:
        return [int(entry.name)] if f"FAKE_MACHINE={cloud}".encode() in (entry / "environ").read_bytes() else []
    except OSError:
        return []


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_preempted_job_is_replaced_resumes_and_leaves_nothing(cloud, tmp_path, monkeypatch, capfd, wheel):
    monkeypatch.setattr(code, "build_wheel", lambda ref: wheel)
    monkeypatch.setattr(tpu_vm, "POLL", 1.0)  # hosts need the processor
    run = tmp_path / "runs" / "first"

    def preempt():
        while not (run / "metrics.jsonl").exists() or max(read_metrics(run, "train"), default=0) < 3:
            time.sleep(0.02)
        fake_gcloud.preempt(cloud, "first")

    preemption = threading.Thread(target=preempt)
    preemption.start()
    steps = f"--trainer.steps 80 --checkpoint.every 100 --eval.every 100 --trainer.compilation_cache {tmp_path / 'xla'}"
    ended = main(words(run, *steps.split()))
    preemption.join()
    said = capfd.readouterr()
    assert ended == 0, said.err
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 81))
    assert verbs(cloud).count("create") == verbs(cloud).count("delete") == 2
    assert known(cloud)["resources"] == {}
    assert left(cloud) == []
    resumed = re.search(r"resumed from step (\d+)", said.out)
    assert resumed, said.out
    assert 3 <= int(resumed[1]) < 80
    assert (tmp_path / "runs" / "first-job" / "logs" / "first-1.log").exists()


# --- with hosts that do something else than training ------------------------------------------------------------------------


@pytest.fixture
def quick(cloud, monkeypatch):
    """A cloud for tests without training: neither a wheel is built nor a step planned."""
    without_code_and_plan(monkeypatch)
    tell(cloud, waits=1)
    return cloud


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("stub", "ended", "starts"),
    [
        ("exit 0", 0, 1),
        ("exit 5", 5, 1),  # would end in the same way again
        ('test "$PODWRIGHT_PROCESS" = 0 && exit 3; exit 76', 3, 1),  # the one with a cause of its own
        ("exit 124", 124, 3),  # started again, but not for ever
        ('test "$PODWRIGHT_PROCESS" = 0 && exit 2; exec sleep 1000', 2, 1),  # one hangs on in vain
    ],
)
def test_how_hosts_end_decides_what_follows_and_machines_are_deleted(stub, ended, starts, quick, tmp_path):
    run = tmp_path / "runs" / "first"
    tell(quick, stub=stub)
    assert main(words(run)) == ended
    assert known(quick)["resources"] == {}
    assert left(quick) == []
    started = [words for words in known(quick)["calls"] if words[-1].endswith("host.sh start")]
    assert len(started) == starts


@pytest.mark.multiprocess
def test_machines_that_lost_a_host_are_replaced(quick, tmp_path, capfd):
    run = tmp_path / "runs" / "first"
    marker = tmp_path / "seen"
    tell(quick, stub=f"test -e {marker} && exit 0; sleep 1000")

    def lose():
        while not list((quick / "machines").glob("first/1/podwright-first/pid")):
            time.sleep(0.05)
        tell(quick, unreachable=["first/1"])
        while verbs(quick).count("delete") < 1:
            time.sleep(0.05)
        marker.touch()
        tell(quick, unreachable=[])

    loss = threading.Thread(target=lose)
    loss.start()
    assert main(words(run)) == 0
    loss.join()
    assert "first: 1 of 2 hosts answer: deleting its machines" in capfd.readouterr().err
    assert verbs(quick).count("create") == verbs(quick).count("delete") == 2


def test_machines_on_which_nothing_ever_runs_are_not_asked_for_without_end(quick, tmp_path, capsys):
    tell(quick, unreachable=["first/0", "first/1"])
    assert main(words(tmp_path / "runs" / "first")) == 69
    assert "did not get to run on 4 times its machines: 0 of 2 hosts answer" in capsys.readouterr().err
    assert known(quick)["resources"] == {}


@pytest.mark.multiprocess
def test_another_machine_takes_a_job_over_stops_it_and_starts_it_again(quick, tmp_path, capfd):
    """Of the first launcher nothing is left but what gcloud and the run's folder know."""
    run = tmp_path / "runs" / "first"
    tell(quick, stub="trap 'exit 75' TERM; sleep 1000 & wait")
    launcher = threading.Thread(target=lambda: ended.append(main(words(run))))
    ended: list[int] = []
    launcher.start()
    while not list((quick / "machines").glob("first/1/podwright-first/pid")):
        time.sleep(0.05)
    assert main(["jobs", "list", *PLACE.split()]) == 0
    out = capfd.readouterr().out
    assert re.search(rf"first +tpu-vm +ACTIVE +1 x v5p-16 +{run}", out), out
    assert main(["jobs", "stop", "first", *PLACE.split()]) == 0
    launcher.join()
    assert ended == [75]
    assert known(quick)["resources"] == {}
    assert left(quick) == []
    tell(quick, stub="exit 0")
    assert main(["jobs", "restart", str(run)]) == 0
    assert known(quick)["resources"] == {}
    assert verbs(quick).count("create") == 2


@pytest.mark.multiprocess
def test_the_doctor_finds_what_nobody_follows_and_its_command_removes_it(quick, tmp_path, monkeypatch, capfd):
    run = tmp_path / "runs" / "first"
    tell(quick, stub="exit 0")

    def die(self, ended):
        raise KeyboardInterrupt

    monkeypatch.setattr(tpu_vm.Follower, "after", die)
    assert main(words(run)) == 130
    capfd.readouterr()
    assert main(["jobs", "doctor", *PLACE.split()]) == 1
    out = capfd.readouterr().out
    assert "first on tpu-vm: all its hosts have ended, and nobody follows it" in out
    command = next(line for line in out.splitlines() if line.startswith("  gcloud"))
    assert subprocess.run(shlex.split(command)).returncode == 0
    assert main(["jobs", "doctor", *PLACE.split()]) == 0


# --- what gcloud refuses, and what is asked wrongly --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("says", "code_", "sentence"),
    [
        (
            "RESOURCE_EXHAUSTED: Quota limit 'TPUV5PPerProjectPerZoneForTPUAPI' has been exceeded. Limit: 0 in zone us-east5-a.",
            69,
            r"the quota does not allow it \(RESOURCE_EXHAUSTED.*Limit: 0 in zone us-east5-a\.\): ask for more",
        ),
        (
            "You do not currently have an active account selected.\nPlease run:\n\n  $ gcloud auth login",
            69,
            "gcloud auth login$",
        ),
        (
            "INVALID_ARGUMENT: Accelerator type v5p-16 is not supported in zone us-east5-a",
            2,
            "--zone us-east5-a: that TPU is not in that zone .*; v5p is offered in us-central1-a, us-east5-a and",
        ),
        (
            "ALREADY_EXISTS: Resource 'projects/p/queuedResources/first' already exists",
            2,
            "there is a job first already",
        ),
        ("PERMISSION_DENIED: Permission 'tpu.nodes.create' denied", 69, "your account may not do that"),
        ("UNKNOWN: the cloud rains", 69, "gcloud compute tpus queued-resources failed: UNKNOWN: the cloud rains"),
    ],
)
def test_what_gcloud_refuses_is_one_sentence_with_what_helps(says, code_, sentence, quick, tmp_path, capsys):
    tell(quick, refusals=[says])
    assert main(words(tmp_path / "runs" / "first")) == code_
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(sentence, said.strip()), said
    assert known(quick)["resources"] == {}


def test_a_request_that_fails_later_is_told_and_deleted(quick, tmp_path, capsys):
    tell(quick, waits=10**6)

    def fail():
        while "create" not in verbs(quick):
            time.sleep(0.05)
        with fake_gcloud.state(quick) as state:
            state["resources"]["first"] |= {"state": "FAILED", "why": "There is no more capacity in the zone"}

    failure = threading.Thread(target=fail)
    failure.start()
    assert main(words(tmp_path / "runs" / "first")) == 69
    failure.join()
    assert "there is no capacity now" in capsys.readouterr().err.splitlines()[-1]
    assert known(quick)["resources"] == {}


def test_nothing_is_rented_without_yes(quick, tmp_path, capsys):
    without_yes = [word for word in words(tmp_path / "runs" / "first") if word != "--yes"]
    assert main(without_yes) == 0
    assert "gcloud compute tpus queued-resources create first" in capsys.readouterr().out
    assert "create" not in verbs(quick)
    assert not (tmp_path / "runs").exists()


def test_a_job_nobody_knows_is_not_stopped(quick, tmp_path, capsys):
    tell(quick, stub="sleep 1000")
    with fake_gcloud.state(quick) as state:
        node = {"waits": 9, "state": "WAITING_FOR_RESOURCES", "hosts": 2, "nodes": ["first"], "metadata": {}}
        state["resources"] = {"first": node | {"labels": {"podwright-job": "first"}}, "theirs": node | {"labels": {}}}
    assert main(["jobs", "stop", "frist", *PLACE.split()]) == 2
    assert capsys.readouterr().err == "podwright: there is no job frist, perhaps first\n"
    assert main(["jobs", "stop", "theirs", *PLACE.split()]) == 2
    assert list(known(quick)["resources"]) == ["first", "theirs"]


def test_gcloud_itself_accepts_the_commands(tmp_path):
    """Its parser comes before its question who we are, so that a flag it does not know is told without an account."""
    if not shutil.which("gcloud"):
        pytest.skip("no gcloud here")
    (tmp_path / "podwright-first").mkdir()
    (tmp_path / "job.json").write_text("{}")
    place = {"zone": "us-east5-a", "project": "my-project-1"}
    commands = []
    for slices in (1, 2):
        job = Job(
            "first", "tpu-vm", "griffin-tiny", (), "gs://bucket/first", "v5p-16", slices, True, place, python="3.11"
        )
        commands += [shlex.split(line) for line in tpu_vm.shown(job).splitlines()]
    commands += [
        queued_resources.gcloud(kind, "list", "", place, "--format=json") for kind in ("queued-resources", "tpu-vm")
    ]
    kinds = {(*words[3:5], "--node-count" in words, words[-1][:20]): words for words in commands}
    environment = os.environ | {"CLOUDSDK_CONFIG": str(tmp_path / "gcloud"), "CLOUDSDK_CORE_DISABLE_PROMPTS": "1"}

    def ask(words: list[str]) -> str:
        return subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True).stderr

    for words in kinds.values():
        assert "active account" in ask(words), words
    assert "unrecognized arguments" in ask([*commands[0], "--no-such-flag"])  # so the test can fail


@pytest.mark.slow
def test_a_commit_is_shipped_as_it_was():
    """Whatever else the checkout holds."""
    name, content = code.build_wheel("HEAD")
    assert name == code.wheel_name()
    then = subprocess.run(
        ["git", "-C", str(ROOT), "show", "HEAD:launch/cli.py"], capture_output=True, check=True
    ).stdout
    assert zipfile.ZipFile(io.BytesIO(content)).read("launch/cli.py") == then
