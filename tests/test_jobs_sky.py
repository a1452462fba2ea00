"""A job on SkyPilot: what its client gets is what it accepts, and the whole life of a job against a stand-in for it."""

import pathlib
import re
import time

import fake_sky
import jsonschema
import pytest
import yaml
from stand_ins import in_background, installed, known, tell, until, without_code_and_plan

from launch.cli import main
from launch.jobs import sky
from launch.jobs.job import Job
from sharding.topologies import products

# Of SkyPilot 0.14.1 (sky/utils/schemas.py, get_task_schema and _get_single_resources_schema), what tasks of ours use; fields
# that are not known are refused.
WORD = {"type": "string"}
CODE = {"type": "integer", "minimum": 0, "maximum": 255}


def fields(**properties) -> dict:
    return {"type": "object", "additionalProperties": False, "properties": properties}


RECOVERY = fields(
    strategy=WORD,
    max_restarts_on_errors={"type": "integer", "minimum": 0},
    recover_on_exit_codes={"type": "array", "items": CODE, "uniqueItems": True},
)
RESOURCES = fields(
    infra={"type": "string", "pattern": r"^gcp(?:/[^/]+(?:/[^/]+)?)?$"},
    accelerators=WORD,
    accelerator_args=fields(runtime_version=WORD, tpu_name=WORD, tpu_vm={"type": "boolean"}),
    use_spot={"type": "boolean"},
    job_recovery=RECOVERY,
)
TASK = fields(
    name=WORD, num_nodes={"type": "integer"}, resources=RESOURCES, file_mounts={"type": "object"}, setup=WORD, run=WORD
)


@pytest.mark.parametrize("chip", ["v4", "v5e", "v5p", "v6e"])
@pytest.mark.parametrize("place", [{}, {"zone": "us-east5-a"}])
def test_the_task_is_valid(chip, place):
    for size in (min(products(chip)), max(products(chip))):
        job = Job("first", "sky", "gemma-2b", (), "gs://bucket/first", f"{chip}-{size}", 1, True, place, python="3.12")
        task = sky.task(sky.completed(job), "code")
        jsonschema.validate(task, TASK)
        assert yaml.safe_load(yaml.safe_dump(task)) == task


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """A folder of the fake, which is on PATH."""
    folder = installed(tmp_path / "sky", ["sky"], fake_sky, monkeypatch)
    monkeypatch.setattr(sky, "POLL", 0.1)
    without_code_and_plan(monkeypatch)
    yield folder
    fake_sky.clear(folder)


def words(tmp_path: pathlib.Path) -> list[str]:
    return f"launch griffin-tiny --on sky --topology v5p-16 --run {tmp_path}/runs/first --yes".split()


# Of one of the hosts, when it is first started; the others go on until then, and all end well after it.
FIRST = 'test -e SEEN && exit 0; test "$PODWRIGHT_PROCESS" = {} && {{ touch SEEN; exit {}; }}; sleep 60'


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("stub", "ended", "again"),
    [
        ("echo done of $PODWRIGHT_PROCESS", 0, 0),
        (FIRST.format(0, 75), 0, 1),
        (FIRST.format(1, 76), 0, 1),
        ("exit 2", 2, 0),
        ('test "$PODWRIGHT_PROCESS" = 1 && echo no such shard && exit 3; sleep 60', 3, 0),
    ],
)
def test_exit_codes_end_a_job_or_start_it_again(stub, ended, again, cloud, tmp_path, capfd):
    """The first job ever, too: there is no controller yet, and a server starts."""
    tell(cloud, stub=stub.replace("SEEN", f"{tmp_path}/seen"))
    assert main(words(tmp_path)) == ended
    assert known(cloud)["jobs"]["1"]["recovery_count"] == again
    said = capfd.readouterr()
    assert ("no such shard" in said.out) == ("no such shard" in stub)
    assert re.search(r"first \(1\): (SUCCEEDED|FAILED)\n", said.err)


@pytest.mark.multiprocess
def test_a_preempted_job_is_followed_through_its_recovery_and_a_broken_connection(cloud, tmp_path, capfd):
    ready, lost = tmp_path / "ready", tmp_path / "lost"
    tell(cloud, stub=f"test -e {lost} && exit 0; touch {ready}; sleep 60", breaks=1)
    launcher, ended = in_background(words(tmp_path))
    until(ready.exists)
    lost.touch()
    fake_sky.preempt(cloud, "1")
    launcher.join()
    assert ended == [0]
    said = capfd.readouterr().err
    assert re.search(r"RUNNING\n(.*\n)*.*RECOVERING\n(.*\n)*.*SUCCEEDED\n", said), said
    assert known(cloud)["jobs"]["1"]["recovery_count"] == 1


@pytest.mark.multiprocess
def test_any_machine_takes_a_job_over(cloud, tmp_path, capfd):
    """list, logs, follow, stop and restart know what SkyPilot knows and what lies beside the run."""
    ready = tmp_path / "ready"
    tell(
        cloud,
        stub=f"echo here is $PODWRIGHT_PROCESS; touch {ready}; until test -e {tmp_path}/go; do sleep 0.1; done",
        cancelling=0.5,
    )
    launcher, ended = in_background(words(tmp_path))
    until(ready.exists)
    until(lambda: known(cloud)["jobs"]["1"]["status"] == "RUNNING")
    assert main(["jobs", "list", "--on", "sky"]) == 0
    assert re.search(r"first +sky +RUNNING", capfd.readouterr().out)
    assert main(words(tmp_path)) == 2
    assert "there is a job first already" in capfd.readouterr().err
    assert main(["jobs", "follow", "first", "--on", "sky"]) == 2
    assert "give its run's folder instead" in capfd.readouterr().err
    follower, followed = in_background(["jobs", "follow", f"{tmp_path}/runs/first"])
    time.sleep(0.3)
    assert main(["jobs", "stop", "first", "--on", "sky"]) == 0
    assert known(cloud)["jobs"]["1"]["status"] == "CANCELLED"  # and not only about to be
    launcher.join()
    follower.join()
    assert ended == followed == [75]
    assert "here is 0" in capfd.readouterr().out
    (tmp_path / "go").touch()
    assert main(["jobs", "restart", f"{tmp_path}/runs/first"]) == 0
    assert known(cloud)["jobs"]["2"]["status"] == "SUCCEEDED"
    assert main(["jobs", "list", "--on", "sky"]) == 0
    assert len(re.findall(r"first +sky +SUCCEEDED", capfd.readouterr().out)) == 1
    assert main(["jobs", "logs", "first", "--on", "sky"]) == 0  # of the newest of that name
    assert "here is 1" in capfd.readouterr().out


@pytest.mark.multiprocess
def test_restart_waits_until_the_machines_of_before_are_gone(cloud, tmp_path, capfd):
    ready = tmp_path / "ready"
    tell(cloud, stub=f"test -e {ready} && exit 0; touch {ready}; sleep 60", cancelling=0.5)
    launcher, _ = in_background(words(tmp_path))
    until(ready.exists)
    assert main(["jobs", "restart", f"{tmp_path}/runs/first"]) == 0
    launcher.join()
    commands = [" ".join(command[1:]) for command in known(cloud)["calls"]]
    (cancel,) = [at for at, command in enumerate(commands) if command.startswith("cancel")]
    again = [at for at, command in enumerate(commands) if command.startswith("launch")][1]
    assert any(command.startswith("queue") for command in commands[cancel:again])
    assert {one["status"] for one in known(cloud)["jobs"].values()} == {"CANCELLED", "SUCCEEDED"}


def test_a_server_that_starts_first_is_not_an_answer(cloud, capfd):
    tell(cloud, controller=True)
    assert main(["jobs", "list", "--on", "sky"]) == 0
    assert known(cloud)["server"]
    assert capfd.readouterr().out == "no jobs\n"


# As SkyPilot 0.14.1 said them.
@pytest.mark.parametrize(
    ("says", "sentence"),
    [
        (
            "NoCloudAccessError: Cloud access is not set up. Run: \x1b[1msky check\x1b[0m",
            "SkyPilot has no access to Google Cloud: `sky check gcp` says why",
        ),
        (
            "ApiServerConnectionError: Could not connect to SkyPilot API server at http://sky:46580",
            "SkyPilot's API server does not answer: `sky api info` says which it is, `sky api start` starts one here",
        ),
    ],
)
def test_a_refusal_is_one_sentence(says, sentence, cloud, tmp_path, capfd):
    tell(cloud, refusals=[says])
    assert main(words(tmp_path)) == 69
    assert capfd.readouterr().err == f"podwright: {sentence}\n"


@pytest.mark.parametrize(
    ("state", "why", "code"),
    [
        ("SUCCEEDED", "", 0),
        ("CANCELLED", "", 75),
        (
            "FAILED",
            "Job exited with exit codes [137, 3, 137, 137] (user program failure). To see the details, run: x 1",
            3,
        ),
        ("FAILED", "Job exited with exit code 5 (user program failure).", 5),
        ("FAILED", "", 1),
    ],
)
def test_the_exit_code_is_that_of_the_host_with_the_cause(state, why, code):
    assert sky.ended_with("first", state, why) == code


def test_what_skypilot_gives_up_is_its_refusal(capfd):
    with pytest.raises(Exception, match=r"SkyPilot gave first up \(FAILED_NO_RESOURCE\): no capacity"):
        sky.ended_with("first", "FAILED_NO_RESOURCE", "no capacity")
