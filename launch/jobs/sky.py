"""SkyPilot: a managed job, which SkyPilot itself moves to other machines when its own are lost."""

import contextlib
import pathlib
import re
import shlex
import subprocess
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import yaml

from configs.schema import ConfigError
from launch.jobs import code
from launch.jobs import job as jobs
from launch.jobs.client import answer, ask, complaint, missing
from launch.jobs.job import AGAIN, Job, Listed, SchedulerError, tell
from launch.jobs.queued_resources import ACCELERATORS, RUNTIMES

CLIENT = "sky"
COSTS = True
OPTIONS = {"zone": "ZONE"}
OURS = "podwright-"  # begins the names of our jobs, the only thing that its queue tells
ENDED = ("SUCCEEDED", "CANCELLED", "FAILED")  # beginnings of states
NONE = "No in-progress managed jobs"  # what it says where there is no controller, which the first launch makes
POLL = 30.0
TRIES = 10  # questions in a row without an answer
GONE = 1800.0  # seconds that deleting machines may take


def completed(job: Job) -> Job:
    chip = job.topology.partition("-")[0]
    if job.slices > 1:
        raise ConfigError(f"--slices {job.slices} is more than SkyPilot can join: give --on tpu-vm or gke")
    if chip not in RUNTIMES:
        raise ConfigError(f"--topology {job.topology} is not one of SkyPilot's TPUs: give --on gke")
    if zone := job.place.get("zone"):
        jobs.check_word("zone", zone, r"[a-z]+-[a-z]+\d+-[a-z0-9]+", "us-east5-a")
    return job


def task(job: Job, folder: str) -> dict[str, Any]:
    """`folder` has the shipped code."""
    chip, _, size = job.topology.partition("-")
    zone = job.place.get("zone", "")
    return {
        "name": OURS + job.name,
        "resources": {
            "infra": f"gcp/{zone.rpartition('-')[0]}/{zone}" if zone else "gcp",
            "accelerators": f"tpu-{ACCELERATORS.get(chip, chip)}-{size}",
            "accelerator_args": {"runtime_version": RUNTIMES[chip]},
            "use_spot": job.spot,
            "job_recovery": {"max_restarts_on_errors": 0, "recover_on_exit_codes": list(AGAIN)},
        },
        "num_nodes": 1,  # a slice is one, whatever its hosts
        "file_mounts": {"~/podwright": folder},
        "run": "exec bash ~/podwright/host.sh run",
    }


def launching(job: Job, file: str) -> list[str]:
    return ["sky", "jobs", "launch", "--yes", "--detach-run", f"--name={OURS}{job.name}", file]


def shown(job: Job) -> str:
    text = yaml.safe_dump(task(job, "code"), sort_keys=False)
    return f"{shlex.join(launching(job, 'task.yaml'))}\n--- task.yaml\n{text}"


def started(job: Job) -> None:
    """Raises SchedulerError if SkyPilot refuses."""
    with tempfile.TemporaryDirectory() as space:
        folder = code.fetched(job, pathlib.Path(space, "code"))
        file = pathlib.Path(space, "task.yaml")
        file.write_text(yaml.safe_dump(task(job, str(folder)), sort_keys=False))
        ask(launching(job, str(file)), timeout=3600)


def followed(job: Job) -> int:
    """Prints the log until the job has ended, through recoveries. Returns its exit code; raises SchedulerError where SkyPilot
    gave up by itself."""
    said, unanswered = "", 0
    log: subprocess.Popen | None = None
    try:
        while True:
            try:
                row = next((row for row in queue() if row["job_name"] == OURS + job.name), None)
                unanswered = 0
            except SchedulerError as error:
                unanswered += 1
                if not said or unanswered >= TRIES:
                    raise
                tell(f"{error}; asking again")
                time.sleep(POLL)
                continue
            if row is None:
                tell(f"{job.name} is no longer there")
                return 75
            state, number = state_of(row), str(row["job_id"])
            if state != said:
                tell(f"{job.name} ({number}): {state}")
            said = state
            ended = state.startswith(ENDED)
            if log is None or (log.poll() is not None and not ended):  # again where its connection broke
                log = subprocess.Popen(
                    tailing(number, log is None), stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                )
            if ended:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    log.wait(timeout=60)
                return ended_with(job.name, state, str(row.get("failure_reason") or ""))
            time.sleep(POLL)
    except KeyboardInterrupt:
        return jobs.left(job.name, job.run)
    finally:
        jobs.hang_up(log)


def ended_with(name: str, state: str, why: str) -> int:
    """The exit code, which only SkyPilot's sentence about a failure tells."""
    if state == "SUCCEEDED":
        return 0
    if state == "CANCELLED":
        return 75
    if state not in ("FAILED", "FAILED_SETUP"):  # it never ran, or SkyPilot's own controller failed
        raise SchedulerError(f"SkyPilot gave {name} up ({state}): {why or 'without a reason'}")
    found = re.search(r"exit codes? \[?(\d[\d, ]*)", why)
    if found is None:
        tell(f"{name}: {why or 'no reason is known'}")
        return 1
    return jobs.outcome(int(code) for code in found[1].split(",")) or 1


def queue() -> list[dict[str, Any]]:
    """Our jobs, the newest first."""
    command = ["sky", "jobs", "queue", "--all", "--verbose", "--output=json"]  # verbose tells why a job failed
    exit_code, out, err = answer(command)
    if exit_code:
        if NONE in out + err:  # where no job was ever launched, or all ended long ago
            return []
        raise complaint(command, err or out)
    begins = re.search(r"^[\[{]", out, re.MULTILINE)  # the first command of a day says that it starts a server
    found = jobs.parsed(out[begins.start() :] if begins else out, "sky") or []
    rows = found if isinstance(found, list) else found.get("jobs", [])
    ours = [row for row in rows if str(row.get("job_name")).startswith(OURS)]
    return sorted(ours, key=lambda row: int(row["job_id"]), reverse=True)


def state_of(row: Mapping[str, Any]) -> str:
    return str(row.get("status", "")).rpartition(".")[2]


def listed(place: Mapping[str, str]) -> list[Listed]:
    newest = {row["job_name"]: row for row in reversed(queue())}  # a name has one job for each time it was started
    return [
        Listed(
            name.removeprefix(OURS),
            "sky",
            state_of(row),
            not state_of(row).startswith(ENDED),
            {},
            None,
            str(row["job_id"]),
        )
        for name, row in newest.items()
    ]


def doubts(found: Listed) -> str:
    return ""  # SkyPilot deletes the machines of a managed job


def tailing(number: str, whole: bool) -> list[str]:
    """By number: SkyPilot knows only jobs that run by their name."""
    return ["sky", "jobs", "logs", "--follow", f"--tail={0 if whole else 1}", number]


def logged(found: Listed) -> int:
    try:
        return subprocess.run(tailing(found.number, True)).returncode
    except FileNotFoundError:
        raise missing(CLIENT) from None


def stopped(found: Listed) -> None:
    """SkyPilot deletes the machines without asking hosts to save. Waits for that, or two jobs would write to one run."""
    if not found.alive:
        return
    ask(removal(found))
    until = time.monotonic() + GONE
    while any(entry.number == found.number and entry.alive for entry in listed({})):
        if time.monotonic() > until:
            raise SchedulerError(f"SkyPilot has not ended {found.name} ({found.number}) within {GONE:.0f} s: try again")
        time.sleep(min(POLL, 5.0))


def removal(found: Listed) -> list[str]:
    return ["sky", "jobs", "cancel", "--yes", found.number]
