"""A gcloud that knows queued resources and their hosts, for tests: state in a JSON file, each host a folder of this machine,
its commands run here. Called as `fake_gcloud.py FOLDER WORDS...`; tests look into and write FOLDER/state.json.

state: {"resources": {name: {...}}, "calls": [words], "properties": {}, "waits": polls until active, "refusals": [what create
says, one a call], "unreachable": ["node/worker"], "stub": shell command that hosts run instead of training}
"""

import contextlib
import fcntl
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile

HOSTS = {"v5p-8": 1, "v5p-16": 2, "v5litepod-8": 1, "v5litepod-16": 4}  # of cloud.google.com/tpu/docs


@contextlib.contextmanager
def state(folder: pathlib.Path):
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        file = folder / "state.json"
        known = json.loads(file.read_text()) if file.exists() else {}
        yield known
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(known, indent=1))
        os.replace(partial, file)


def refuse(sentence: str, code: int = 1):
    print(f"ERROR: (gcloud.compute.tpus) {sentence}", file=sys.stderr)
    sys.exit(code)


def main(folder: pathlib.Path, words: list[str]) -> None:
    with state(folder) as known:
        known.setdefault("calls", []).append(words)
        if words[:2] == ["config", "get"]:
            print(known.get("properties", {}).get(words[2], ""))
            return
        _, _, kind, verb, *rest = words
        flags = dict(word[2:].partition("=")[::2] for word in rest if word.startswith("--"))
        positional, rest = [], list(rest)
        while rest:  # --node-id NAME is the one flag whose value is a word of its own
            word = rest.pop(0)
            if word in ("--node-id", "--node-count", "--node-prefix"):
                flags[word[2:]] = rest.pop(0)
            elif not word.startswith("--"):
                positional.append(word)
        resources = known.setdefault("resources", {})
        if kind == "queued-resources":
            queued(folder, known, resources, verb, positional[0] if positional else "", flags)
            return
        if verb == "list":
            print(json.dumps([n for r in resources.values() for n in nodes_of(r)]))
            return
        name = re.match(r"([\w-]+):?", positional[-1])[1]
        node = next((n for r in resources.values() for n in nodes_of(r) if n["name"].endswith(f"/{name}")), None)
        if node is None:
            refuse(f"NOT_FOUND: Resource 'projects/p/nodes/{name}' was not found")
        workers = range(len(node["networkEndpoints"])) if flags["worker"] == "all" else [int(flags["worker"])]
        unreachable = [w for w in workers if f"{name}/{w}" in known.get("unreachable", [])]
        stub = known.get("stub", "")
    homes = {w: folder / "machines" / name / str(w) for w in workers if w not in unreachable}
    if verb == "scp":
        for home in homes.values():
            shutil.copytree(positional[0], home / pathlib.Path(positional[0]).name, dirs_exist_ok=True)
    elif flags["worker"] != "all":
        os.chdir(homes[workers[0]])
        os.execvpe("bash", ["bash", "-c", flags["command"]], environment(folder, node, workers[0], stub))
    else:
        for worker, home in homes.items():
            out = subprocess.run(
                ["bash", "-c", flags["command"]],
                cwd=home, env=environment(folder, node, worker, stub), capture_output=True, text=True,
            )  # fmt: skip
            print(out.stdout, end="")
            print(out.stderr, end="", file=sys.stderr)
            if "output-directory" in flags:
                pathlib.Path(flags["output-directory"], f"{worker}.log").write_text(out.stdout)
    if unreachable:
        refuse(f"worker {unreachable[0]}: ssh: connect to host port 22: Connection timed out", 255)


def queued(folder, known, resources, verb, name, flags) -> None:
    if verb == "create":
        if known.get("refusals"):
            refuse(known["refusals"].pop(0))
        if name in resources:
            refuse(f"ALREADY_EXISTS: Resource 'projects/p/queuedResources/{name}' already exists")
        key, _, file = flags["metadata-from-file"].partition("=")
        count = int(flags.get("node-count", 1))
        resources[name] = {
            "waits": known.get("waits", 2),
            "state": "WAITING_FOR_RESOURCES",
            "hosts": HOSTS[flags["accelerator-type"]],
            "nodes": [flags["node-id"]] if count == 1 else [f"{flags['node-prefix']}-{i}" for i in range(count)],
            "labels": dict([flags["labels"].split("=")]),
            "metadata": {key: pathlib.Path(file).read_text()},
        }
        return
    if verb == "list":
        print(json.dumps([as_described(n, r) for n, r in resources.items()]))
        return
    if name not in resources:
        refuse(f"NOT_FOUND: Resource 'projects/p/queuedResources/{name}' was not found")
    resource = resources[name]
    if verb == "delete":
        stop_machines(folder, resource, signal.SIGKILL)
        del resources[name]
        return
    if resource["state"] == "WAITING_FOR_RESOURCES":
        resource["waits"] -= 1
        if resource["waits"] <= 0:
            resource["state"] = "ACTIVE"
            make_machines(folder, resource)
    print(json.dumps(as_described(name, resource)))


def as_described(name: str, resource: dict) -> dict:
    node = {"labels": resource["labels"], "metadata": resource["metadata"]}
    return {
        "name": f"projects/p/locations/z/queuedResources/{name}",
        "state": {"state": resource["state"], "failedData": {"error": {"message": resource.get("why", "")}}},
        "tpu": {"nodeSpec": [{"node": node}]},
    }


def nodes_of(resource: dict) -> list[dict]:
    if resource["state"] not in ("ACTIVE", "SUSPENDING"):
        return []
    return [
        {
            "name": f"projects/p/locations/z/nodes/{node}",
            "state": resource.get("node_states", {}).get(node, "READY"),
            "networkEndpoints": [{}] * resource["hosts"],
            "port": resource["port"],
            "index": i * resource["hosts"],
            "processes": len(resource["nodes"]) * resource["hosts"],
        }
        for i, node in enumerate(resource["nodes"])
    ]


# --- machines -----------------------------------------------------------------------------------------------------------


def make_machines(folder: pathlib.Path, resource: dict) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        resource["port"] = free.getsockname()[1]
    for node in resource["nodes"]:
        for worker in range(resource["hosts"]):
            home = folder / "machines" / node / str(worker)
            (home / "bin").mkdir(parents=True)
            for name in ("python3", f"python{sys.version_info.major}.{sys.version_info.minor}"):
                shim(home / "bin" / name)


def shim(file: pathlib.Path) -> None:
    """A Python of a machine: makes environments, and installs a wheel there without the network."""
    file.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E {__file__} --python "$0" "$@"\n')
    file.chmod(0o755)


def python(own: pathlib.Path, words: list[str]) -> None:
    if words[:2] == ["-m", "venv"]:
        (pathlib.Path(words[2]) / "bin").mkdir(parents=True)
        shim(pathlib.Path(words[2]) / "bin" / "python")
    elif words[:3] == ["-m", "pip", "install"]:
        constraints = pathlib.Path(words[words.index("--constraint") + 1]).read_text()
        assert "jax==" in constraints, constraints
        with zipfile.ZipFile(words[-1].partition("[")[0]) as wheel:
            wheel.extractall(own.parent.parent / "site")
    else:
        os.environ["PYTHONPATH"] = str(own.absolute().parent.parent / "site")
        if stub := os.environ.get("FAKE_STUB"):
            os.execvp("bash", ["bash", "-c", stub])
        os.execv(sys.executable, [sys.executable, *words])


def environment(folder: pathlib.Path, node: dict, worker: int, stub: str) -> dict[str, str]:
    """What TPU VMs tell by their metadata server, in the variables by which processes of one machine join."""
    home = folder / "machines" / node["name"].rpartition("/")[2] / str(worker)
    return {
        "HOME": str(home),
        "PATH": f"{home / 'bin'}:/usr/local/bin:/usr/bin:/bin",
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "PODWRIGHT_COORDINATOR": f"127.0.0.1:{node['port']}",
        "PODWRIGHT_PROCESSES": str(node["processes"]),
        "PODWRIGHT_PROCESS": str(node["index"] + worker),
        "FAKE_STUB": stub,
        "FAKE_MACHINE": str(home),
    }


def processes(home: pathlib.Path) -> list[int]:
    """Of a machine: those that carry its name in their environment."""
    found, mark = [], f"FAKE_MACHINE={home}\0".encode()
    for entry in pathlib.Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal() and mark in (entry / "environ").read_bytes() + b"\0":
                found.append(int(entry.name))
    return found


def stop_machines(folder: pathlib.Path, resource: dict, number: signal.Signals) -> None:
    for node in resource["nodes"]:
        machine = folder / "machines" / node
        for worker in range(resource["hosts"]):
            for process in processes(machine / str(worker)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, number)
        shutil.rmtree(machine, ignore_errors=True)


def preempt(folder: pathlib.Path, name: str) -> None:
    """As spot machines go: hosts get SIGTERM and some seconds, then there is nothing left of them."""
    with state(folder) as known:
        known["resources"][name]["state"] = "SUSPENDING"
        homes = [
            folder / "machines" / n / str(w)
            for n in known["resources"][name]["nodes"]
            for w in range(known["resources"][name]["hosts"])
        ]
    trainers = [int((home / f"podwright-{name}" / "pid").read_text()) for home in homes]
    for process in trainers:
        os.kill(process, signal.SIGTERM)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and any(pathlib.Path(f"/proc/{process}").exists() for process in trainers):
        time.sleep(0.05)
    with state(folder) as known:
        stop_machines(folder, known["resources"][name], signal.SIGKILL)
        known["resources"][name]["state"] = "SUSPENDED"


if __name__ == "__main__":
    if sys.argv[1] == "--python":
        python(pathlib.Path(sys.argv[2]), sys.argv[3:])
    else:
        main(pathlib.Path(sys.argv[1]), sys.argv[2:])
