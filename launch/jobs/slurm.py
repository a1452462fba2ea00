"""Slurm: a batch script that installs the code once and trains on all nodes; it goes back into the queue by itself when it was
preempted. The job's folder and the run must be on a file system that all nodes share, as is usual."""

import shlex
import subprocess
import time
from collections.abc import Mapping
from dataclasses import replace

from configs.schema import ConfigError
from launch.jobs import job as jobs
from launch.jobs.client import answer, ask, missing
from launch.jobs.job import AGAIN, FINAL, Job, Listed, SchedulerError, tell

CLIENT = "sbatch"
COSTS = False
OPTIONS = {"partition": "PARTITION", "account": "ACCOUNT"}

EARLY = 600  # seconds before the end of its time in which a job gets SIGTERM, and saves
MARK = "podwright:"  # begins the comment of our jobs
POLL = 10.0
WORD = r"[A-Za-z0-9][-\w.]*"
FIELDS = "%i|%j|%T|%k"


def completed(job: Job) -> Job:
    if "://" in job.run:
        raise ConfigError(
            f"--run {job.run} can't be a job's folder on Slurm, whose nodes read it as files: give a shared folder"
        )
    if job.spot:
        raise ConfigError("--spot is of tpu-vm, gke and sky: on Slurm, a --partition says what may be preempted")
    for option in OPTIONS:
        if option in job.place:
            jobs.check_word(option, job.place[option], WORD, "batch")
    return replace(job, place=dict(job.place))


def script(job: Job) -> str:
    """The batch script. SIGTERM reaches the processes of the nodes only; what ends them says whether to queue again."""
    folder = jobs.folder(job.run)
    directives = [
        f"--job-name={job.name}",
        f"--comment={MARK}{job.run}",
        f"--nodes={job.hosts}",
        "--ntasks-per-node=1",
        "--exclusive",
        "--requeue",
        "--open-mode=append",
        f"--signal=TERM@{EARLY}",
        f"--output={folder}/logs/%j.log",
        *jobs.flags(job.place, list(OPTIONS)),
    ]
    host, codes, logs = (shlex.quote(f"{folder}/{name}") for name in ("code/host.sh", "codes", "logs/%j-%n.log"))
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH {directive}" for directive in directives),
            f"rm -rf {codes} && mkdir -p {codes}",
            f"srun --nodes=1 --ntasks=1 bash {host} install || exit 69  # one node installs what all use",
            f'srun --kill-on-bad-exit=0 --output={logs} bash -c \'exec bash "$0" record "$1/$SLURM_PROCID"\' {host} {codes}',
            "ended=$?",
            f"for code in {' '.join(map(str, (*FINAL, 69)))}; do",
            f"    grep --quiet --line-regexp --recursive $code {codes} && ended=$code  # a node's own cause",
            "done",
            "case $ended in",
            f"{' | '.join(map(str, AGAIN))})",
            f'    [ -e {shlex.quote(f"{folder}/stopped")} ] || scontrol requeue "$SLURM_JOB_ID"  # saved, or worth another try',
            "    ;;",
            "esac",
            "exit $ended",
            "",
        ]
    )


def shown(job: Job) -> str:
    file = jobs.folder(job.run) / "job.sh"
    return f"sbatch --parsable {shlex.quote(str(file))}\n--- {file}\n{script(job)}"


def started(job: Job) -> None:
    """Raises SchedulerError if Slurm refuses."""
    jobs.write(job.run, "job.sh", script(job))
    jobs.write(job.run, "logs/README", "What the nodes of this job printed, a file a node.\n")
    number = ask(["sbatch", "--parsable", str(jobs.folder(job.run) / "job.sh")]).strip().partition(";")[0]
    tell(f"{job.name} is Slurm's job {number}")


def listed(place: Mapping[str, str]) -> list[Listed]:
    rows = ask(["squeue", "--me", "--noheader", f"--format={FIELDS}"]).splitlines()
    found = []
    for number, name, state, comment in (row.split("|", 3) for row in rows if row.count("|") >= 3):
        if comment.startswith(MARK):
            found.append(Listed(name, "slurm", state, True, {}, jobs.load(comment.removeprefix(MARK)), number))
    return found


def followed(job: Job) -> int:
    """Slurm queues again by itself; this prints node 0's log and waits. Returns the exit code that Slurm kept."""
    said, log, number = "", None, ""
    try:
        while True:
            found = next((entry for entry in listed({}) if entry.name == job.name), None)
            if found is None:
                return ended(number) if number else 75
            number = found.number
            if found.state != said:
                tell(f"{job.name} ({number}): {found.state}")
            said = found.state
            file = jobs.folder(job.run) / "logs" / f"{number}-0.log"
            if log is None and file.exists():
                log = subprocess.Popen(["tail", "-n", "+1", "-F", str(file)], stderr=subprocess.DEVNULL)
            time.sleep(POLL)
    except KeyboardInterrupt:
        return jobs.left(job.name, job.name)
    finally:
        jobs.hang_up(log)


def ended(number: str) -> int:
    """The exit code of a job that is no longer queued; 1 where Slurm kept none, as without accounting."""
    _, out, _ = answer(
        ["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={number}", "--format=State,ExitCode"]
    )
    state, _, code = (out.splitlines() or [""])[-1].partition("|")
    if state.startswith("CANCELLED"):
        return 75
    return int(code.partition(":")[0]) if code else 1


def doubts(found: Listed) -> str:
    return "it waits until someone releases it" if found.state == "REQUEUE_HOLD" else ""


def logged(found: Listed) -> int:
    if found.job is None:
        raise SchedulerError(f"{found.name} is queued, but the folder of its run is gone")
    file = jobs.folder(found.job.run) / "logs" / f"{found.number}-0.log"
    if not file.exists():
        raise SchedulerError(f"{found.name} has not printed anything yet ({found.state})")
    try:
        return subprocess.run(["tail", "-n", "100", "-F", str(file)]).returncode
    except FileNotFoundError:
        raise missing("tail") from None


def stopped(found: Listed) -> None:
    """Processes get SIGTERM, save, and end with 75; the batch script sees that the job is stopped and doesn't queue it again."""
    ask(["scancel", "--signal=TERM", found.number])
    deadline = time.monotonic() + EARLY
    while time.monotonic() < deadline:
        state = next((entry.state for entry in listed({}) if entry.number == found.number), "")
        if state != "RUNNING":
            break
        time.sleep(min(POLL, 5.0))
    answer(["scancel", found.number])


def removal(found: Listed) -> list[str]:
    return ["scancel", found.number]
