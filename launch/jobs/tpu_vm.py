"""TPU VMs of Google Cloud, through queued resources: asked for, started by ssh, replaced when preempted, deleted at the end.

A queued resource is called as its job; its metadata hold the job, so that any machine can find and follow it.
"""

import contextlib
import shlex
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from configs.schema import ConfigError
from launch.jobs import job as jobs
from launch.jobs import queued_resources as tpus
from launch.jobs.client import Absent, Taken, ask, complaint, missing
from launch.jobs.job import AGAIN, Job, Listed, SchedulerError, tell
from trainer.storage import StorageError

CLIENT = "gcloud"
COSTS = True
OPTIONS = {"zone": "ZONE", "project": "PROJECT"}

# Those of the United States, docs.cloud.google.com/tpu/docs/regions-zones as stored in 2026. gcloud has the last word.
ZONES_OF = "2026"
ZONES = {
    "v4": ("us-central2-b",),
    "v5e": ("us-central1-a", "us-south1-a", "us-west1-c", "us-west4-a"),
    "v5p": ("us-central1-a", "us-east5-a"),
    "v6e": ("us-central1-b", "us-east1-d", "us-east5-a", "us-east5-b"),
}
ZONE, PROJECT = r"[a-z]+-[a-z]+\d+-[a-z0-9]+", r"([a-z0-9.-]+:)?[a-z][-a-z0-9]{4,28}[a-z0-9]"

POLL = 20.0  # seconds
MISSES = 3  # polls in a row in which hosts do not answer, until their slices count as lost
LAST = 120.0  # seconds that hosts get once one has ended
GRACE = 600.0  # for saving, when a job is stopped
SOON = 600.0  # an attempt that fails sooner has not got far
TRIES = 3  # in a row: attempts of that kind, machines on which nothing ever ran, questions without an answer


def offered(chip: str) -> str:
    return f"{chip} is offered in {', '.join(ZONES[chip])} and outside the United States (as of {ZONES_OF})"


def completed(job: Job) -> Job:
    chip = job.topology.partition("-")[0]
    if chip not in tpus.RUNTIMES:
        raise ConfigError(f"--topology {job.topology} can't be had as TPU VMs, only on GKE: give --on gke")
    place = {}
    for option, key, pattern, example in (
        ("project", "core/project", PROJECT, "my-project-123"),
        ("zone", "compute/zone", ZONE, ZONES[chip][0]),
    ):
        text = job.place.get(option) or tpus.configured(key)
        if not text:
            hint = f"; {offered(chip)}" if option == "zone" else ""
            raise ConfigError(f"--{option} is missing, and gcloud has no default: give one, such as {example}{hint}")
        place[option] = jobs.check_word(option, text, pattern, example)
    return replace(job, place=place)


def shown(job: Job) -> str:
    commands = [tpus.creation(job, "job.json")]
    for node in tpus.nodes(job):
        commands += [
            tpus.copying(job, node, tpus.remote(job)),
            tpus.host(job, node, "start"),
            tpus.host(job, node, "status"),
        ]
    commands += [tpus.tailing(job, 1), tpus.deletion(job.name, job.place)]
    return "\n".join(shlex.join(command) for command in commands)


def started(job: Job) -> None:
    """Raises ConfigError if there is such a job, SchedulerError if gcloud refuses."""
    try:
        create(job)
    except Taken:
        raise ConfigError(jobs.taken(job.name)) from None


def create(job: Job) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".json") as description:
        description.write(job.as_json())
        description.flush()
        try:
            ask(tpus.creation(job, description.name))
        except SchedulerError as error:
            if "not in that zone" in str(error):
                raise ConfigError(
                    f"--zone {job.place['zone']}: {error}; {offered(job.topology.partition('-')[0])}"
                ) from None
            raise


def delete(name: str, place: Mapping[str, str]) -> None:
    with contextlib.suppress(Absent):
        ask(tpus.deletion(name, place), timeout=1800)


def followed(job: Job) -> int:
    """Until the job has ended, whoever started it: asks for machines, starts hosts, replaces what is lost, deletes at the end.

    Returns the exit code; raises SchedulerError where gcloud refuses.
    """
    follower = Follower(job)
    try:
        while (ended := follower.look()) is None:
            time.sleep(POLL)
        return ended
    except KeyboardInterrupt:
        return jobs.left(job.name, job.name)
    finally:
        follower.close()


class Follower:
    """What is remembered between two looks at a job. Nothing of it is needed to take a job over."""

    def __init__(self, job: Job):
        self.job = job
        self.said = ""
        self.unanswered = 0  # questions to gcloud
        self.missed = 0  # looks at which hosts were missing
        self.in_vain = 0  # machines on which nothing ran
        self.short = 0  # attempts that soon failed
        self.began = self.failed = 0.0  # when the attempt began, when its first host ended
        self.log: subprocess.Popen | None = None
        self.logged = False

    def look(self) -> int | None:
        """One look at the job, and what follows from it. Its exit code if it has ended."""
        job = self.job
        try:
            if jobs.is_stopped(job.run):
                tell(f"{job.name} was stopped; go on with: podwright jobs restart {job.run}")
                return 75
            state, why = tpus.state_of(job)
            dead = tpus.dead_nodes(job) if state == "ACTIVE" else []
        except (SchedulerError, StorageError) as error:
            self.unanswered += 1
            if self.unanswered >= TRIES:
                raise
            tell(f"{error}; asking again")
            return None
        self.unanswered = 0
        if state != self.said and state:
            tell(f"{job.name}: {state}{f': {why}' if why else ''}")
        self.said = state
        if not state:
            with contextlib.suppress(Taken):  # by another who follows
                create(job)
        elif state == "FAILED":
            delete(job.name, job.place)
            raise complaint(["gcloud", "compute", "tpus", "queued-resources"], why or "the request failed")
        elif state == "SUSPENDED" or dead:  # not while SUSPENDING, when hosts may still be saving
            self.replace("; ".join(dead) or f"it is {state}")
        elif state == "ACTIVE":
            return self.look_at_hosts()
        return None

    def look_at_hosts(self) -> int | None:
        job, hosts = self.job, tpus.statuses(self.job)
        codes = [int(status.split()[1]) for status in hosts if status.startswith("ended")]
        if len(hosts) < job.hosts:
            self.miss(f"{len(hosts)} of {job.hosts} hosts answer")
        elif "absent" in hosts:
            self.start()
        elif len(codes) == job.hosts:
            return self.after(jobs.outcome(codes))
        else:
            self.missed = self.in_vain = 0
            self.open_log()
            self.failed = (self.failed or time.monotonic()) if codes else 0.0
            if codes and time.monotonic() - self.failed > LAST:
                tpus.tell_hosts(job, "kill")
        return None

    def start(self) -> None:
        try:
            tpus.start_hosts(self.job)
        except SchedulerError as error:  # ssh is not up yet, or the machines went away meanwhile
            self.miss(str(error))
            return
        self.began, self.failed = time.monotonic(), 0.0
        self.open_log()

    def after(self, ended: int) -> int | None:
        """What follows from the end of all hosts."""
        soon = time.monotonic() - self.began < SOON
        self.short = self.short + 1 if soon and ended != 75 else 0
        if jobs.is_stopped(self.job.run):  # meanwhile: whoever stops it deletes, too
            return None
        if ended in AGAIN and self.short < TRIES:
            tell(f"{self.job.name} ended with {ended} and goes on")
            self.start()
            return None
        self.close()
        tpus.collect(self.job)
        delete(self.job.name, self.job.place)
        logs = jobs.folder(self.job.run) / "logs"
        tell(f"{self.job.name} ended with {ended}, its machines are deleted; what its hosts printed: {logs}")
        return ended

    def miss(self, why: str) -> None:
        self.missed += 1
        if self.missed >= MISSES:
            self.replace(why)

    def replace(self, why: str) -> None:
        """Deletes the machines; the next look asks for others."""
        self.close()
        self.missed, self.logged = 0, False
        self.in_vain += 1
        tell(f"{self.job.name}: {why}: deleting its machines")
        delete(self.job.name, self.job.place)
        if self.in_vain > TRIES:  # each costs
            raise SchedulerError(
                f"{self.job.name} did not get to run on {self.in_vain} times its machines: {why}; they are deleted"
            )

    def open_log(self) -> None:
        """The log of worker 0 on our output, while it grows."""
        if self.log is None or self.log.poll() is not None:
            command = tpus.tailing(self.job, -10 if self.logged else 1)
            self.log = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            self.logged = True

    def close(self) -> None:
        if self.log is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.log.wait(timeout=2.0)  # for the last lines
            self.log.terminate()
            self.log.wait()
            self.log = None


# --- podwright jobs -----------------------------------------------------------------------------------------------------


def listed(place: Mapping[str, str]) -> list[Listed]:
    place = {**place}
    for option, key, pattern in (("project", "core/project", PROJECT), ("zone", "compute/zone", ZONE)):
        place[option] = place.get(option) or tpus.configured(key)
        if not place[option]:
            raise ConfigError(f"--{option} is missing, and gcloud has no default: give --{option} {OPTIONS[option]}")
        jobs.check_word(option, place[option], pattern, "us-east5-a" if option == "zone" else "my-project-123")
    found = jobs.parsed(ask(tpus.gcloud("queued-resources", "list", "", place, "--format=json")), "gcloud") or []
    return [job for job in (ours(entry, place) for entry in found) if job]


def ours(entry: dict[str, Any], place: Mapping[str, str]) -> Listed | None:
    specs = entry.get("tpu", {}).get("nodeSpec", [])
    node = specs[0].get("node", {}) if specs else {}
    if tpus.KEY not in node.get("labels", {}):
        return None
    job = None
    with contextlib.suppress(ValueError):
        job = jobs.from_json(node.get("metadata", {}).get(tpus.KEY, ""))
    name, state = entry["name"].rpartition("/")[2], entry.get("state", {}).get("state", "unknown")
    return Listed(name, "tpu-vm", state, state not in ("FAILED", "SUSPENDING", "SUSPENDED"), place, job)


def doubts(found: Listed) -> str:
    """Why these machines may be there in vain; empty if they are not. Asks the hosts."""
    if found.job is None:
        return "its metadata do not say which job it is"
    if not found.alive:
        return f"it is {found.state}"
    if found.state == "ACTIVE":
        hosts = tpus.statuses(found.job)
        if hosts and all(status.startswith("ended") for status in hosts):
            return "all its hosts have ended, and nobody follows it"
        if len(hosts) < found.job.hosts:
            return f"{len(hosts)} of {found.job.hosts} hosts answer"
    return ""


def logged(found: Listed) -> int:
    if found.job is None:
        raise SchedulerError(f"{found.name} does not say what it is: its metadata have no {tpus.KEY}")
    try:
        return subprocess.run(tpus.tailing(found.job, -100)).returncode
    except FileNotFoundError:
        raise missing(CLIENT) from None


def stopped(found: Listed) -> None:
    """Hosts save first, if there are any."""
    if found.job and found.state == "ACTIVE":
        tpus.tell_hosts(found.job, "stop")
        until = time.monotonic() + GRACE
        while "running" in tpus.statuses(found.job) and time.monotonic() < until:
            time.sleep(min(POLL, 5.0))
        tpus.collect(found.job)
    delete(found.name, found.place)


def removal(found: Listed) -> list[str]:
    return tpus.deletion(found.name, found.place)
