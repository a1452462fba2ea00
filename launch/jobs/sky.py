"""SkyPilot: a managed job, which SkyPilot itself moves to other machines when its own are lost."""

import pathlib
import shlex
import subprocess
import tempfile
from collections.abc import Mapping
from typing import Any

import yaml

from configs.schema import ConfigError
from launch.jobs import code
from launch.jobs import job as jobs
from launch.jobs.client import ask, missing
from launch.jobs.job import AGAIN, Job, Listed
from launch.jobs.queued_resources import ACCELERATORS, RUNTIMES

CLIENT = "sky"
COSTS = True
OPTIONS = {"zone": "ZONE"}
OURS = "podwright-"  # begins the names of our jobs, the only thing that its queue tells
ENDED = ("SUCCEEDED", "CANCELLED", "FAILED")  # beginnings of states


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
    """Prints the log until the job ends. Returns 0, or 1 where it failed: SkyPilot does not tell with which code."""
    logged(Listed(job.name, "sky", "", True))
    found = [entry for entry in listed({}) if entry.name == job.name]
    return 0 if found and found[0].state == "SUCCEEDED" else 1


def listed(place: Mapping[str, str]) -> list[Listed]:
    found = jobs.parsed(ask(["sky", "jobs", "queue", "--output=json"]), "sky") or []
    rows = found if isinstance(found, list) else found.get("jobs", [])
    return [
        Listed(
            row["job_name"].removeprefix(OURS),
            "sky",
            state,
            not state.startswith(ENDED),
            {},
            None,
            str(row.get("job_id", "")),
        )
        for row in rows
        for state in [str(row.get("status", "")).rpartition(".")[2]]
        if str(row.get("job_name")).startswith(OURS)
    ]


def doubts(found: Listed) -> str:
    return ""  # SkyPilot deletes the machines of a managed job


def logged(found: Listed) -> int:
    try:
        return subprocess.run(["sky", "jobs", "logs", "--follow", f"--name={OURS}{found.name}"]).returncode
    except FileNotFoundError:
        raise missing(CLIENT) from None


def stopped(found: Listed) -> None:
    if found.alive:
        ask(removal(found))


def removal(found: Listed) -> list[str]:
    return ["sky", "jobs", "cancel", "--yes", f"--name={OURS}{found.name}"]
