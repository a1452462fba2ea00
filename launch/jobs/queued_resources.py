"""TPU VMs as gcloud knows them: its commands for queued resources and their hosts, and what its answers say."""

import concurrent.futures
import contextlib
import pathlib
import re
import shlex
import shutil
import tempfile
from collections.abc import Mapping

from configs.schema import ConfigError
from launch.jobs import code
from launch.jobs import job as jobs
from launch.jobs.client import Absent, answer, ask
from launch.jobs.job import Job
from trainer.storage import StorageError

RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5e": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
ACCELERATORS = {"v5e": "v5litepod"}  # where Google calls it differently
KEY = "podwright-job"  # of labels and metadata
DEAD = ("PREEMPTED", "TERMINATED", "STOPPED", "STOPPING", "DELETING", "HIDING", "HIDDEN")  # states of a node


def configured(key: str) -> str:
    """gcloud's own default for a property, if it has one."""
    try:
        return answer(["gcloud", "config", "get", key])[1].strip()
    except ConfigError:
        return ""


def gcloud(kind: str, verb: str, name: str, place: Mapping[str, str], *words: str) -> list[str]:
    at = [f"--{option}={place[option]}" for option in ("zone", "project")]
    return ["gcloud", "compute", "tpus", kind, verb, *([name] if name else []), *at, "--quiet", *words]


def creation(job: Job, description: str) -> list[str]:
    """`description` is a file with the job, which goes into the machines' metadata."""
    chip, _, size = job.topology.partition("-")
    nodes = ["--node-id", job.name] if job.slices == 1 else ["--node-count", str(job.slices), "--node-prefix", job.name]
    return gcloud(
        "queued-resources", "create", job.name, job.place,
        *nodes,
        f"--accelerator-type={ACCELERATORS.get(chip, chip)}-{size}",
        f"--runtime-version={RUNTIMES[chip]}",
        f"--labels={KEY}={job.name}",
        f"--metadata-from-file={KEY}={description}",
        "--scopes=https://www.googleapis.com/auth/cloud-platform",  # for the run's bucket
        *(["--spot"] if job.spot else []),
    )  # fmt: skip


def deletion(name: str, place: Mapping[str, str]) -> list[str]:
    return gcloud("queued-resources", "delete", name, place, "--force")


def nodes(job: Job) -> list[str]:
    return [job.name] if job.slices == 1 else [f"{job.name}-{i}" for i in range(job.slices)]


def remote(job: Job) -> str:
    return f"podwright-{job.name}"


def on_hosts(job: Job, node: str, *words: str, worker: str = "all") -> list[str]:
    """A command for the hosts of a node. It passes through their shell: this is the one place where one is unavoidable."""
    return gcloud("tpu-vm", "ssh", node, job.place, f"--worker={worker}", f"--command={shlex.join(words)}")


def host(job: Job, node: str, verb: str) -> list[str]:
    if verb == "status":  # of a host that has not got anything yet, too
        script = f"{remote(job)}/{code.HOST}"
        text = f"test -e {script} && bash {script} status || echo podwright-host absent"
        return gcloud("tpu-vm", "ssh", node, job.place, "--worker=all", f"--command={text}")
    return on_hosts(job, node, "bash", f"{remote(job)}/{code.HOST}", verb)


def copying(job: Job, node: str, source: str) -> list[str]:
    return gcloud("tpu-vm", "scp", source, job.place, f"{node}:", "--worker=all", "--recurse")


def state_of(job: Job) -> tuple[str, str]:
    """Of the queued resource: its state, empty if there is none, and what it says of a failure."""
    try:
        found = jobs.parsed(ask(gcloud("queued-resources", "describe", job.name, job.place, "--format=json")), "gcloud")
    except Absent:
        return "", ""
    state = found.get("state", {})
    return state.get("state", ""), state.get("failedData", {}).get("error", {}).get("message", "")


def dead_nodes(job: Job) -> list[str]:
    """Nodes that are gone, or will not come back, in words."""
    found = jobs.parsed(ask(gcloud("tpu-vm", "list", "", job.place, "--format=json")), "gcloud") or []
    states = {node["name"].rpartition("/")[2]: node.get("state", "") for node in found}
    return [f"{node} is {states.get(node, 'gone')}" for node in nodes(job) if states.get(node, "HIDDEN") in DEAD]


def statuses(job: Job) -> list[str]:
    """What each host that answers says: absent, running or `ended CODE`."""

    def ask_node(node: str) -> list[str]:
        _, out, _ = answer(host(job, node, "status"), timeout=180)
        return re.findall(r"podwright-host (absent|running|ended \d+)", out)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return [status for found in pool.map(ask_node, nodes(job)) for status in found]


def start_hosts(job: Job) -> None:
    """Ships the code and starts what is not running, on all hosts."""
    with tempfile.TemporaryDirectory() as space:
        source = pathlib.Path(space, remote(job))
        shipped = code.fetched(job, pathlib.Path(space, "fetched"))
        shutil.copytree(shipped, source)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda node: ask(copying(job, node, str(source))), nodes(job)))
            list(pool.map(lambda node: ask(host(job, node, "start")), nodes(job)))


def tell_hosts(job: Job, verb: str) -> None:
    for node in nodes(job):
        answer(host(job, node, verb), timeout=180)


def delete(name: str, place: Mapping[str, str]) -> None:
    with contextlib.suppress(Absent):
        ask(deletion(name, place), timeout=1800)


def tailing(job: Job, first: int) -> list[str]:
    """Worker 0's log as it grows, from line `first` on; below 0, from so many before its end."""
    words = ("tail", "-n", str(first) if first < 0 else f"+{first}", "-F", f"{remote(job)}/log")
    return on_hosts(job, nodes(job)[0], *words, worker="0")


def collect(job: Job) -> None:
    """What all hosts printed, into RUN-job/logs/NODE-WORKER.log. Without it the job is no worse."""
    with tempfile.TemporaryDirectory() as space:
        for node in nodes(job):
            into = pathlib.Path(space, node)
            into.mkdir()
            answer([*on_hosts(job, node, "cat", f"{remote(job)}/log"), f"--output-directory={into}"])
            for file in sorted(into.iterdir()):
                with contextlib.suppress(StorageError):
                    jobs.write(job.run, f"logs/{node}-{file.name}", file.read_bytes())
