"""Google Kubernetes Engine: a JobSet with a Job for each slice, which the cluster restarts by itself after our exit codes for it.

The shipped code is a ConfigMap (a wheel of half a megabyte; one holds a whole), so that neither image nor bucket has to be made.
"""

import contextlib
import pathlib
import shlex
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import yaml

from configs.schema import ConfigError
from launch.jobs import code
from launch.jobs import job as jobs
from launch.jobs.client import Absent, Taken, answer, ask, missing
from launch.jobs.job import FINAL, Job, Listed, SchedulerError, tell

CLIENT = "kubectl"
COSTS = True
OPTIONS = {"queue": "KUEUE_QUEUE", "image": "IMAGE"}

ACCELERATORS = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
    "tpu7x": "tpu7x",
}
LABEL, ANNOTATION = "podwright-job", "podwright/job"
GRACE = 600  # seconds for a save; a spot machine gives 25, whatever stands here
RESTARTS = 100
POLL = 10.0
TRIES = 30  # questions in a row without an answer
QUEUE = "kueue.x-k8s.io/queue-name"
IMAGE = r"[a-zA-Z0-9][-\w./:@]+"
SIZE = 2**20  # bytes that a ConfigMap holds


def completed(job: Job) -> Job:
    if queue := job.place.get("queue"):
        jobs.check_word("queue", queue, jobs.NAME, "team-a")
    image = jobs.check_word("image", job.place.get("image") or f"python:{job.python}", IMAGE, "python:3.12")
    return replace(job, place={**job.place, "image": image})


def manifest(job: Job) -> dict[str, Any]:
    topology = job.product
    chips = topology.chips // topology.slices // topology.hosts
    shape = "x".join(map(str, topology.shape))
    selector = {
        "cloud.google.com/gke-tpu-accelerator": ACCELERATORS[job.topology.partition("-")[0]],
        "cloud.google.com/gke-tpu-topology": shape,
    }
    tolerations = [{"key": "google.com/tpu", "operator": "Exists", "effect": "NoSchedule"}]
    if job.spot:
        selector["cloud.google.com/gke-spot"] = "true"
        tolerations.append(
            {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
        )
    # A ConfigMap's files are links into a folder that is not writable; the code is installed in a folder of the pod.
    script = "cp -L /shipped/* /job/ && exec bash /job/host.sh run"
    container = {
        "name": "train",
        "image": job.place["image"],
        "command": ["bash", "-c", script],
        "env": [{"name": "PYTHONUNBUFFERED", "value": "1"}],
        "ports": [{"containerPort": port} for port in (8471, 8080, 8482)],  # TPU runtime, slices, jax
        "securityContext": {"privileged": True},  # as GKE asks for multislice
        "resources": {kind: {"google.com/tpu": chips} for kind in ("requests", "limits")},
        "volumeMounts": [{"name": "code", "mountPath": "/shipped"}, {"name": "job", "mountPath": "/job"}],
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE,
        "nodeSelector": selector,
        "tolerations": tolerations,
        "hostNetwork": True,
        "dnsPolicy": "ClusterFirstWithHostNet",
        "containers": [container],
        "volumes": [{"name": "code", "configMap": {"name": config_map(job)}}, {"name": "job", "emptyDir": {}}],
    }
    failed = {"containerName": "train", "operator": "In", "values": [*FINAL, 69]}
    one_slice = {
        "parallelism": topology.hosts,
        "completions": topology.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,  # one host that fails ends its slice, and with it the set, which then starts again
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": failed},
                {"action": "Count", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        },
        "template": {"metadata": {"labels": {LABEL: job.name}}, "spec": pod},
    }
    labels = {LABEL: job.name} | ({QUEUE: job.place["queue"]} if job.place.get("queue") else {})
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": job.name,
            "labels": labels,
            "annotations": {
                "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool",  # a slice, a node pool
                ANNOTATION: job.as_json(),
            },
        },
        "spec": {
            "failurePolicy": {
                "maxRestarts": RESTARTS,
                "rules": [
                    # Exit codes of FINAL. Anything else (75, 76, 124, a lost machine) starts all slices again.
                    {"name": "final", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]},
                ],
            },
            "replicatedJobs": [{"name": "slice", "replicas": job.slices, "template": {"spec": one_slice}}],
        },
    }


def config_map(job: Job) -> str:
    return f"{job.name}-code"


def shipping(job: Job, folder: str) -> list[str]:
    return ["kubectl", "create", "configmap", config_map(job), f"--from-file={folder}"]


APPLYING = ["kubectl", "create", "--filename=-"]


def shown(job: Job) -> str:
    commands = [[*APPLYING[:-1], "--filename=jobset.yaml"], shipping(job, "code")]
    return "\n".join(map(shlex.join, commands)) + "\n--- jobset.yaml\n" + yaml.safe_dump(manifest(job), sort_keys=False)


def started(job: Job) -> None:
    """Raises ConfigError if the code is too large or the name taken, SchedulerError if the cluster refuses."""
    with tempfile.TemporaryDirectory() as space:
        folder = code.fetched(job, pathlib.Path(space, "code"))
        size = sum(file.stat().st_size for file in folder.iterdir())
        if size >= SIZE:
            raise ConfigError(f"the code is {size:,} bytes, and a ConfigMap holds {SIZE:,}: give --on tpu-vm or sky")
        try:
            ask(APPLYING, given=yaml.safe_dump(manifest(job), sort_keys=False))
        except Taken:
            raise ConfigError(jobs.taken(job.name)) from None
        # Only whoever made the set touches its code. Pods wait for it.
        try:
            ask(["kubectl", "delete", "configmap", config_map(job), "--ignore-not-found"])  # of a job of before
            ask(shipping(job, str(folder)))
        except BaseException:
            answer(["kubectl", "delete", "jobset", job.name, "--ignore-not-found"])
            raise


def followed(job: Job) -> int:
    """The cluster restarts by itself; this prints worker 0's log and waits. Returns the exit code of the pods."""
    said, unanswered = "", 0
    log: subprocess.Popen | None = None
    try:
        while True:
            try:
                found = jobs.parsed(ask(["kubectl", "get", "jobset", job.name, "--output=json"]), "kubectl")
                ended = found.get("status", {}).get("terminalState", "")
                pod = {} if ended else first_pod(job.name)
                unanswered = 0
            except Absent:
                tell(f"{job.name} is no longer there")
                return 75
            except SchedulerError as error:  # the control plane is away for minutes when it is upgraded
                unanswered += 1
                if not said or unanswered >= TRIES:
                    raise
                tell(f"{error}; asking again")
                time.sleep(POLL)
                continue
            state = ended or state_of(found, pod)
            if state != said:
                tell(f"{job.name}: {state}")
            said = state
            if ended:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    if log is not None:
                        log.wait(timeout=60)
                exit_code = 0 if ended == "Completed" else failed_with(job.name, log is None)  # pods go with the set
                remove(job.name)
                return exit_code
            if (log is None or log.poll() is not None) and pod.get("status", {}).get("phase") == "Running":
                log = subprocess.Popen(tailing(job.name), stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            time.sleep(POLL)
    except KeyboardInterrupt:
        return jobs.left(job.name, job.name)
    finally:
        jobs.hang_up(log)


def state_of(found: dict[str, Any], pod: dict[str, Any]) -> str:
    """Of a set that has not ended, with its first pod, in words."""
    if found.get("spec", {}).get("suspend"):
        queue = found["metadata"].get("labels", {}).get(QUEUE)
        return f"waits in Kueue's queue {queue}" if queue else "suspended"
    restarts = found.get("status", {}).get("restarts", 0)
    status = pod.get("status", {})
    if status.get("phase") == "Running":
        return "running" + (f", restarts: {restarts}" if restarts else "")
    reasons = [
        f"{condition.get('reason', '')}, {condition.get('message', '')}"
        for condition in status.get("conditions", [])
        if condition["type"] == "PodScheduled" and condition["status"] == "False"
    ]
    for container in status.get("containerStatuses", []):
        waiting = container.get("state", {}).get("waiting", {})
        if "Image" in waiting.get("reason", ""):
            reasons.append(f"{waiting['reason']}, {waiting.get('message', '')}")
    return "waits for its pods" + (f" ({reasons[0][:200]})" if reasons else "")


def pods(labels: str) -> list[dict[str, Any]]:
    found = jobs.parsed(ask(["kubectl", "get", "pods", f"--selector={labels}", "--output=json"]), "kubectl") or {}
    return found.get("items", [])


def failed_with(name: str, unseen: bool) -> int:
    """The exit code of the pods of a set that failed, 1 where they are gone; prints the end of the log of the one with the
    cause, unless it is worker 0's and was printed."""
    codes = {
        pod["metadata"]["name"]: status.get("state", {}).get("terminated", {}).get("exitCode", 0)
        for pod in pods(f"{LABEL}={name}")
        for status in pod.get("status", {}).get("containerStatuses", [])
    }
    exit_code = jobs.outcome(codes.values()) or 1
    first = [pod["metadata"]["name"] for pod in pods(selector(name))]
    cause = next((pod for pod, ended in codes.items() if ended == exit_code), "")
    if cause and (unseen or cause not in first):
        tell(f"{cause} ended with exit code {exit_code}:")
        subprocess.run(["kubectl", "logs", cause, "--tail=100"], stdin=subprocess.DEVNULL)
    return exit_code


def selector(name: str) -> str:
    """Of worker 0 of slice 0."""
    return f"jobset.sigs.k8s.io/jobset-name={name},jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"


def first_pod(name: str) -> dict[str, Any]:
    """That of worker 0: of several, as while a set starts again, the one that runs; {} if there is none."""
    found = sorted(pods(selector(name)), key=lambda pod: pod.get("status", {}).get("phase") != "Running")
    return found[0] if found else {}


def tailing(name: str) -> list[str]:
    return ["kubectl", "logs", "--follow", "--tail=-1", f"--selector={selector(name)}"]


def listed(place: Mapping[str, str]) -> list[Listed]:
    found = jobs.parsed(ask(["kubectl", "get", "jobsets", f"--selector={LABEL}", "--output=json"]), "kubectl") or {}
    return [ours(item) for item in found.get("items", [])]


def ours(item: dict[str, Any]) -> Listed:
    status, meta = item.get("status", {}), item["metadata"]
    state = status.get("terminalState") or ("Suspended" if item.get("spec", {}).get("suspend") else "Active")
    try:
        job = jobs.from_json(meta.get("annotations", {}).get(ANNOTATION, ""))
    except ValueError:
        job = None
    return Listed(meta["name"], "gke", state, not status.get("terminalState"), {}, job)


def doubts(found: Listed) -> str:
    return "" if found.alive else f"it is {found.state}, and its JobSet is still there (without machines)"


def logged(found: Listed) -> int:
    try:
        return subprocess.run(tailing(found.name)).returncode
    except FileNotFoundError:
        raise missing(CLIENT) from None


def remove(name: str) -> None:
    """Pods get SIGTERM and their grace period, in which they save."""
    ask(["kubectl", "delete", "jobset", name, "--cascade=foreground", "--ignore-not-found"], timeout=GRACE + 300)
    ask(["kubectl", "delete", "configmap", f"{name}-code", "--ignore-not-found"])


def stopped(found: Listed) -> None:
    remove(found.name)


def removal(found: Listed) -> list[str]:
    return ["kubectl", "delete", f"jobset/{found.name}", f"configmap/{found.name}-code", "--ignore-not-found"]
