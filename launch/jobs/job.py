"""A job: a run on machines that a scheduler hands out, and what is kept of it beside the run's folder.

RUN-job/job.json   the job, from which any machine can take it over     RUN-job/stopped   it is not to be started again
RUN-job/code/      what its hosts get: wheel, constraints, config       RUN-job/logs/     what its hosts printed
"""

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from etils import epath

from configs.schema import ConfigError
from sharding.topologies import Topology, find_topology
from trainer.storage import StorageError, folder_of, reason

NAME = (
    r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?"  # what TPU nodes, Kubernetes and Slurm all take, with room for what they append
)
BUCKET_PATH = r"gs://[a-z0-9][-a-z0-9._]{1,61}[a-z0-9](/[-\w.=]+)+"
FOLDER = r"/[-\w.=/]+"
AGAIN = (75, 76, 124)  # exit codes after which the same command goes on (docs/survive.md)
FINAL = (1, 2, 3, 4, 5, 6)  # and those after which it would end in the same way


class SchedulerError(RuntimeError):
    """A scheduler refused, or could not be asked; the sentence says why and what helps."""


@dataclass(frozen=True)
class Job:
    name: str
    on: str  # a name of SCHEDULERS
    config: str  # its name
    words: tuple[str, ...]  # of `podwright launch`, without the name of the config
    run: str
    topology: str
    slices: int = 1
    spot: bool = False
    place: Mapping[str, str] = field(default_factory=dict)  # the scheduler's own options: zone, queue, partition, ...
    wheel: str = ""  # file name
    source: str = ""  # where the wheel is from, in words
    python: str = ""  # 3.11, say

    @property
    def product(self) -> Topology:
        return find_topology(self.topology, self.slices)

    @property
    def hosts(self) -> int:
        """Of all slices."""
        return self.product.hosts * self.slices

    def as_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


@dataclass(frozen=True)
class Listed:
    """A job as its scheduler knows it."""

    name: str
    on: str
    state: str  # the scheduler's own word
    alive: bool  # whether it has, or waits for, machines
    place: Mapping[str, str] = field(default_factory=dict)
    job: Job | None = None  # where the scheduler keeps it
    number: str = ""  # by which the scheduler calls it, where that is not its name


class Scheduler(Protocol):
    """What a file of this folder offers; SCHEDULERS names them."""

    CLIENT: str  # the program that talks to it
    COSTS: bool  # whether a machine is rented for each job
    OPTIONS: dict[str, str]  # of the command line, besides those that all have

    def completed(self, job: Job) -> Job: ...  # with places that were not given; raises ConfigError
    def shown(self, job: Job) -> str: ...  # the commands, or the manifest
    def started(self, job: Job) -> None: ...
    def followed(self, job: Job) -> int: ...  # until its end; the exit code
    def listed(self, place: Mapping[str, str]) -> list[Listed]: ...
    def logged(self, found: Listed) -> int: ...
    def stopped(self, found: Listed) -> None: ...
    def doubts(self, found: Listed) -> str: ...  # why its machines may be there in vain, if they may
    def removal(self, found: Listed) -> list[str]: ...  # the command that leaves nothing of it


def from_json(text: str) -> Job:
    """Raises ValueError for anything else than a job."""
    try:
        fields = json.loads(text)
        return Job(**fields | {"words": tuple(fields["words"])})
    except (TypeError, KeyError) as error:
        raise ValueError(f"not a job: {error}") from None


def name_for(run: str) -> str:
    """A job is called as the last part of its run's path. Raises ConfigError."""
    name = run.rstrip("/").rpartition("/")[2]
    if not re.fullmatch(NAME, name):
        lower = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-0123456789")[:40].strip("-") or "my-run"
        raise ConfigError(
            f"--run {run} ends in {name!r}, which can't name a job: at most 40 lower-case letters, digits and dashes, "
            f"a letter first, are allowed, for example {lower}"
        )
    return name


def check_run(on: str, run: str | None, config: str) -> str:
    """A place that all hosts see and that outlives them. Raises ConfigError."""
    if not run:
        raise ConfigError(
            f"--run is missing: hosts of {on} need one that all see, for example gs://BUCKET/runs/{config}"
        )
    if not re.fullmatch(BUCKET_PATH if "://" in run else FOLDER, run):
        raise ConfigError(
            f"--run {run} is no place for a job on {on}: gs://BUCKET/FOLDER/NAME, or the absolute path of a folder that "
            f"all its hosts share, in letters, digits and -_.= is allowed"
        )
    return run


def taken(name: str) -> str:
    return (
        f"there is a job {name} already: `podwright jobs follow {name}` follows it, `podwright jobs restart {name}` starts it "
        f"anew, another --run starts another"
    )


def check_word(option: str, text: str, pattern: str, example: str) -> str:
    if not re.fullmatch(pattern, text):
        raise ConfigError(f"--{option} {text!r} can't be right: something like {example} is allowed")
    return text


def outcome(codes: Iterable[int]) -> int:
    """The exit code of a job whose processes ended with these: of several that failed, the one with a cause of its own."""
    failed = [code for code in codes if code]
    ours = [code for code in failed if code < 128 and code != 76]
    return next((code for code in ours if code not in AGAIN), ours[0] if ours else 76 if failed else 0)


def tell(sentence: str) -> None:
    print(f"podwright: {sentence}", file=sys.stderr, flush=True)


def left(name: str, called: str) -> int:
    """The exit code of a launcher that stops following a job, which goes on; `called` is what `jobs follow` takes."""
    tell(f"{name} goes on without us; `podwright jobs follow {called}` follows it, `jobs stop {name}` ends it")
    return 130


def hang_up(log: subprocess.Popen | None) -> None:
    """No more of what a client prints of a job."""
    if log is not None:
        log.terminate()
        log.wait()


# --- beside the run -----------------------------------------------------------------------------------------------------


def folder(run: str) -> epath.Path:
    whole = folder_of(run)
    return whole.parent / f"{whole.name}-job"


def save(job: Job) -> None:
    """Raises StorageError."""
    write(job.run, "job.json", job.as_json() + "\n")


def write(run: str, name: str, content: str | bytes) -> None:
    file = folder(run) / name
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    except Exception as error:  # of the file system or of the cloud's client
        raise StorageError(f"{file} cannot be written: {reason(error)}") from error


def load(run: str) -> Job | None:
    """The job of a run, or None if it never was one. Raises StorageError."""
    file = folder(run) / "job.json"
    try:
        return from_json(file.read_text()) if file.exists() else None
    except Exception as error:
        raise StorageError(f"{file} cannot be read: {reason(error)}") from error


def is_stopped(run: str) -> bool:
    """Whether someone has said, on whatever machine, that the job is not to go on."""
    try:
        return (folder(run) / "stopped").exists()
    except Exception as error:
        raise StorageError(f"{folder(run)} cannot be read: {reason(error)}") from error


def set_stopped(run: str, stopped: bool) -> None:
    if stopped:
        write(run, "stopped", "")
    elif is_stopped(run):
        (folder(run) / "stopped").unlink()


def without_empty(words: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in words.items() if value}


def flags(place: Mapping[str, str], names: Sequence[str]) -> list[str]:
    """Those of these options that are set, as --name=value."""
    return [f"--{name}={place[name]}" for name in names if place.get(name)]


def table(rows: Collection[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def parsed(text: str, whose: str) -> Any:
    """JSON that a client printed. Raises SchedulerError."""
    try:
        return json.loads(text or "null")
    except json.JSONDecodeError:
        raise SchedulerError(
            f"{whose} did not answer in JSON, but {text.strip()[:80]!r}: is it another version?"
        ) from None
