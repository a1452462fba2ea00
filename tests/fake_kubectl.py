"""A kubectl with a cluster behind it, for tests: state in a JSON file, pods are processes here. Called as `fake_kubectl.py FOLDER
WORDS...`; tests look into and write FOLDER/state.json.

What a pod's end leads to is read from the manifest, as Kubernetes (podFailurePolicy, backoffLimit) and JobSet (failurePolicy,
failure_policy.go) say. Each JobSet has a process of its own that does what their controllers do.

state: {"jobsets": {name: object}, "pods": {name: object}, "configmaps": {name: {file: content}}, "calls": [words],
"refusals": [[beginning of a command, what it says, how often]], "latency": seconds of a command,
"stub": shell command that pods run instead of training}
"""

import base64
import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import site
import subprocess
import sys
import time

from fake_gcloud import shim, state

SET, INDEX = "jobset.sigs.k8s.io/jobset-name", "batch.kubernetes.io/job-completion-index"
SLICE, KUEUE = "jobset.sigs.k8s.io/job-index", "kueue.x-k8s.io/queue-name"
KINDS = {"jobset": "jobsets", "jobsets": "jobsets", "pods": "pods", "configmap": "configmaps"}
FULL = {"jobsets": "jobsets.jobset.x-k8s.io", "pods": "pods", "configmaps": "configmaps"}
FLAGS = {
    "get": ("selector", "output"),
    "logs": ("follow", "tail", "selector"),
    "delete": ("cascade", "ignore-not-found"),
    "create": ("filename", "from-file"),
}
LARGEST = 2**20  # of a ConfigMap
PATIENCE = 5.0  # seconds that pods have here of their terminationGracePeriodSeconds
STEP = 0.05


def refuse(sentence: str):
    print(sentence, file=sys.stderr)
    sys.exit(1)


def main(folder: pathlib.Path, words: list[str]) -> None:
    with state(folder) as known:
        known.setdefault("calls", []).append(words)
        for kind in FULL:
            known.setdefault(kind, {})
        said, latency = refusal(known, " ".join(words)), known.get("latency", 0)
    time.sleep(latency)
    if said:
        refuse(said)
    verb, *rest = words
    flags = dict(word[2:].partition("=")[::2] for word in rest if word.startswith("--"))
    names = [word for word in rest if not word.startswith("--")]
    for flag in flags:
        if flag not in FLAGS[verb]:
            refuse(f"error: unknown flag: --{flag}")
    globals()[verb](folder, names, flags)


def refusal(known: dict, command: str) -> str:
    for entry in known.get("refusals", []):
        if command.startswith(entry[0]) and entry[2] > 0:
            entry[2] -= 1
            return entry[1]
    return ""


def selected(objects: dict, selector: str) -> list[dict]:
    wanted = [term.partition("=") for term in selector.split(",") if term]
    return [
        item
        for item in objects.values()
        for labels in [item["metadata"].get("labels", {})]
        if all(key in labels and (not equals or labels[key] == value) for key, equals, value in wanted)
    ]


def get(folder: pathlib.Path, names: list[str], flags: dict[str, str]) -> None:
    assert flags["output"] == "json", flags
    kind = KINDS[names[0]]
    with state(folder) as known:
        objects = known[kind]
    if names[1:]:
        if names[1] not in objects:
            refuse(f'Error from server (NotFound): {FULL[kind]} "{names[1]}" not found')
        print(json.dumps(objects[names[1]]))
    else:
        print(json.dumps({"kind": "List", "items": selected(objects, flags.get("selector", ""))}))


def create(folder: pathlib.Path, names: list[str], flags: dict[str, str]) -> None:
    if names:
        kind, name = names
        assert kind == "configmap"
        files = [
            file for file in pathlib.Path(flags["from-file"]).iterdir() if file.is_file() and not file.is_symlink()
        ]
        content = {file.name: base64.b64encode(file.read_bytes()).decode() for file in files}
        with state(folder) as known:
            if name in known["configmaps"]:
                refuse(f'error: failed to create configmap: configmaps "{name}" already exists')
            if sum(file.stat().st_size for file in files) > LARGEST:
                refuse(f"error: failed to create configmap: Request entity too large: limit is {LARGEST}")
            known["configmaps"][name] = content
        print(f"configmap/{name} created")
        return
    site.main()
    import yaml

    given = yaml.safe_load(sys.stdin)
    assert (given["apiVersion"], given["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    name = given["metadata"]["name"]
    with state(folder) as known:
        if name in known["jobsets"]:
            refuse(
                f'Error from server (AlreadyExists): error when creating "STDIN": {FULL["jobsets"]} "{name}" already exists'
            )
        if KUEUE in given["metadata"].get("labels", {}):
            given["spec"]["suspend"] = True  # as Kueue's webhook does, until the queue admits it
        given["status"] = {"restarts": 0}
        known["jobsets"][name] = given
        again = [sys.executable, "-S", "-E", __file__, str(folder), "control", name]
        with open(folder / "controller.log", "a") as log:
            process = subprocess.Popen(again, start_new_session=True, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        known.setdefault("controllers", []).append(process.pid)
    print(f"jobset.jobset.x-k8s.io/{name} created")


def delete(folder: pathlib.Path, names: list[str], flags: dict[str, str]) -> None:
    pairs = [word.split("/") for word in names] if "/" in names[0] else [[names[0], names[1]]]
    for kind, name in pairs:
        kind = KINDS[kind]
        with state(folder) as known:
            if name not in known[kind]:
                if "ignore-not-found" not in flags:
                    refuse(f'Error from server (NotFound): {FULL[kind]} "{name}" not found')
                continue
            if kind != "jobsets":
                del known[kind][name]
                continue
            known[kind][name]["metadata"]["deletionTimestamp"] = "now"
        there = True
        while there:
            time.sleep(STEP)
            with state(folder) as known:
                there = name in known["jobsets"]


def logs(folder: pathlib.Path, names: list[str], flags: dict[str, str]) -> None:
    with state(folder) as known:
        pods = [known["pods"][name] for name in names] or selected(known["pods"], flags["selector"])
    if not pods:
        print("No resources found in default namespace.", file=sys.stderr)
    for pod in pods:
        if pod["status"]["phase"] == "Pending":
            refuse(f'Error from server (BadRequest): container "train" in pod "{name_of(pod)}" is waiting to start')
    for pod in pods:
        with open(pod["log"]) as log:
            going = True
            while going:
                going = "follow" in flags
                if going:
                    with state(folder) as known:
                        now = known["pods"].get(name_of(pod))
                        going = now is not None and now["status"]["phase"] == "Running"
                print(log.read(), end="", flush=True)
                time.sleep(STEP * going)


# --- controllers --------------------------------------------------------------------------------------------------------


def control(folder: pathlib.Path, name: str) -> None:
    """Of one JobSet, until it is deleted."""
    processes: dict[str, subprocess.Popen] = {}
    while True:
        with state(folder) as known:
            jobset = known["jobsets"].get(name)
            if jobset is None or "deletionTimestamp" in jobset["metadata"]:
                break
            if not jobset["status"].get("terminalState"):
                reconcile(folder, known, jobset, processes)
        time.sleep(STEP)
    end(list(processes.values()))
    with state(folder) as known:
        for pod in selected(known["pods"], f"{SET}={name}"):
            del known["pods"][name_of(pod)]
        known["jobsets"].pop(name, None)


def reconcile(folder: pathlib.Path, known: dict, jobset: dict, processes: dict) -> None:
    name, status = jobset["metadata"]["name"], jobset["status"]
    if jobset["spec"].get("suspend"):
        status["conditions"] = [{"type": "Suspended", "status": "True"}]
        return
    pods = selected(known["pods"], f"{SET}={name}")
    for pod in pods:
        update(pod, processes)
    why: list[str] = []  # Jobs failed
    done = 0
    for replicated in jobset["spec"]["replicatedJobs"]:
        spec = replicated["template"]["spec"]
        for number in range(replicated["replicas"]):
            own = [pod for pod in pods if pod["metadata"]["labels"][SLICE] == str(number)]
            if reason := failure(spec, own):
                why.append(reason)
                remove(known, [pod for pod in own if is_active(pod)], processes)
                continue
            indices = {
                pod["metadata"]["labels"][INDEX] for pod in own if pod["status"]["phase"] in ("Running", "Succeeded")
            }
            for index in range(spec["completions"]):
                if str(index) not in indices:
                    start(folder, known, jobset, spec, number, index, processes)
            done += sum(pod["status"]["phase"] == "Succeeded" for pod in own) == spec["completions"]
    if why:
        action = action_of(jobset["spec"].get("failurePolicy", {}), why)
        counted = action != "RestartJobSetAndIgnoreMaxRestarts"
        most = jobset["spec"].get("failurePolicy", {}).get("maxRestarts", 0)
        if action == "FailJobSet" or (counted and status.get("restartsCountTowardsMax", 0) >= most):
            status["terminalState"] = "Failed"
            remove(known, [pod for pod in pods if is_active(pod)], processes)
        else:
            status["restarts"] += 1
            status["restartsCountTowardsMax"] = status.get("restartsCountTowardsMax", 0) + counted
            remove(known, pods, processes)
    elif done == sum(replicated["replicas"] for replicated in jobset["spec"]["replicatedJobs"]):
        status["terminalState"] = "Completed"


def action_of(policy: dict, why: list[str]) -> str:
    """Of the first rule that fits any of the failed Jobs."""
    for rule in policy.get("rules", []):
        if not rule.get("onJobFailureReasons") or set(rule["onJobFailureReasons"]) & set(why):
            return rule["action"]
    return "RestartJobSet"


def failure(spec: dict, pods: list[dict]) -> str:
    """Why a Job has failed, by its podFailurePolicy; empty if it has not."""
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    counted = 0
    for pod in pods:
        if pod["status"]["phase"] == "Failed":
            action = "Count"
            for rule in spec.get("podFailurePolicy", {}).get("rules", []):
                if fits(rule, pod["status"]):
                    action = rule["action"]
                    break
            if action == "FailJob":
                return "PodFailurePolicy"
            counted += action == "Count"
    return "BackoffLimitExceeded" if counted > spec.get("backoffLimit", 6) else ""


def fits(rule: dict, status: dict) -> bool:
    if codes := rule.get("onExitCodes"):
        ended = [
            container["state"]["terminated"]["exitCode"]
            for container in status["containerStatuses"]
            if codes.get("containerName", container["name"]) == container["name"]
            and container["state"].get("terminated", {}).get("exitCode")
        ]
        return any((code in codes["values"]) == (codes["operator"] == "In") for code in ended)
    there = [(condition["type"], condition["status"]) for condition in status["conditions"]]
    return any((pattern["type"], pattern["status"]) in there for pattern in rule["onPodConditions"])


# --- pods ---------------------------------------------------------------------------------------------------------------


def name_of(pod: dict) -> str:
    return pod["metadata"]["name"]


def is_active(pod: dict) -> bool:
    return pod["status"]["phase"] in ("Pending", "Running")


def start(folder, known, jobset: dict, spec: dict, number: int, index: int, processes: dict) -> None:
    """A pod: first Pending for as long as nodes, image or volumes lack, then a process."""
    name = f"{jobset['metadata']['name']}-slice-{number}-{index}"
    if (pod := known["pods"].get(name)) is None or not is_active(pod):
        labels = {SET: jobset["metadata"]["name"], SLICE: str(number), INDEX: str(index)}
        known["pods"][name] = pod = {
            "metadata": {"name": name, "labels": labels | spec["template"]["metadata"]["labels"]},
            "status": {"phase": "Pending", "conditions": [], "containerStatuses": []},
        }
    (container,) = spec["template"]["spec"]["containers"]
    status = pod["status"]
    lacks = known.get("unschedulable", "")
    status["conditions"] = [
        {"type": "PodScheduled", "status": str(not lacks), "reason": "Unschedulable" * bool(lacks), "message": lacks}
    ]
    volumes = {volume["name"]: volume for volume in spec["template"]["spec"]["volumes"]}
    maps = [volume["configMap"]["name"] for volume in volumes.values() if "configMap" in volume]
    if lacks or any(one not in known["configmaps"] for one in maps):
        return
    if why := known.get("unpullable", ""):
        status["containerStatuses"] = [
            {"name": container["name"], "state": {"waiting": {"reason": why, "message": container["image"]}}}
        ]
        return
    home = folder / "pods" / name
    shutil.rmtree(home, ignore_errors=True)
    command = container["command"]
    for mount in container["volumeMounts"]:
        path = home / mount["mountPath"].strip("/")
        path.mkdir(parents=True)
        if "configMap" in volumes[mount["name"]]:  # whose files are links
            (path / "..data").mkdir()
            for file, content in known["configmaps"][volumes[mount["name"]]["configMap"]["name"]].items():
                (path / "..data" / file).write_bytes(base64.b64decode(content))
                (path / file).symlink_to(f"..data/{file}")
        command = [re.sub(rf"(?<![\w.]){mount['mountPath']}/", f"{path}/", word) for word in command]
    (home / "bin").mkdir()
    for program in ("python3", f"python{sys.version_info.major}.{sys.version_info.minor}"):
        shim(home / "bin" / program)
    environment = {
        "HOME": str(home),
        "PATH": f"{home / 'bin'}:/usr/local/bin:/usr/bin:/bin",
        "PODWRIGHT_PROCESS": str(number * spec["completions"] + index),
        "FAKE_STUB": known.get("stub", ""),
    } | {variable["name"]: variable["value"] for variable in container["env"]}
    pod["log"] = str(folder / f"{name}-{jobset['status']['restarts']}.log")
    with open(pod["log"], "w") as log:
        processes[name] = subprocess.Popen(
            command, env=environment, cwd=home, stdout=log, stderr=log, start_new_session=True
        )
    pod["process"] = processes[name].pid
    status["phase"] = "Running"
    status["containerStatuses"] = [{"name": container["name"], "state": {"running": {}}}]


def update(pod: dict, processes: dict) -> None:
    if pod["status"]["phase"] != "Running" or (code := processes[name_of(pod)].poll()) is None:
        return
    code = 128 - code if code < 0 else code
    pod["status"]["phase"] = "Failed" if code else "Succeeded"
    pod["status"]["containerStatuses"][0]["state"] = {"terminated": {"exitCode": code}}


def remove(known: dict, pods: list[dict], processes: dict) -> None:
    end([processes.pop(name_of(pod)) for pod in pods if name_of(pod) in processes])
    for pod in pods:
        known["pods"].pop(name_of(pod), None)


def end(processes: list[subprocess.Popen]) -> None:
    """First processes get SIGTERM, as a container's first process does, then whatever they started is killed."""
    for process in processes:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGTERM)
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until and any(process.poll() is None for process in processes):
        time.sleep(STEP)
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# --- what tests do to a cluster ------------------------------------------------------------------------------------------


def admit(folder: pathlib.Path, name: str) -> None:
    """As Kueue does when there is room."""
    with state(folder) as known:
        known["jobsets"][name]["spec"]["suspend"] = False


def lose(folder: pathlib.Path, pod: str, warned: bool) -> None:
    """The node of a pod goes: a warned one gets SIGTERM."""
    with state(folder) as known:
        known["pods"][pod]["status"]["conditions"].append({"type": "DisruptionTarget", "status": "True"})
        os.killpg(known["pods"][pod]["process"], signal.SIGTERM if warned else signal.SIGKILL)


def clear(folder: pathlib.Path) -> None:
    """Nothing is left of it."""
    with state(folder) as known:
        known["jobsets"] = {}
        controllers = known.get("controllers", [])
    until = time.monotonic() + 2 * PATIENCE
    while time.monotonic() < until and any(map(is_there, controllers)):
        time.sleep(STEP)


def is_there(process: int) -> bool:
    """And not a zombie, which has no command line any more."""
    try:
        return bool(pathlib.Path(f"/proc/{process}/cmdline").read_bytes())
    except OSError:
        return False


if __name__ == "__main__":
    if sys.argv[2] == "control":
        control(pathlib.Path(sys.argv[1]), sys.argv[3])
    else:
        main(pathlib.Path(sys.argv[1]), sys.argv[2:])
