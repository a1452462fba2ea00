"""SkyPilot's client for tests: managed jobs in a JSON file, their hosts are processes here. Called as `fake_sky.py FOLDER WORDS...`;
tests look into and write FOLDER/state.json.

States, fields, sentences and exit codes are those of SkyPilot 0.14.1 (sky/jobs/controller.py, recovery_strategy.py, utils.py,
backends/task_codegen.py): the first host that fails ends the others, a code of recover_on_exit_codes starts all again.

state: {"jobs": {number: {...}}, "calls": [words], "stub": shell command that hosts run instead of training, "controller":
whether there is one, which is so from the first launch on, "refusals": [what launch says, one a call]}
"""

import json
import os
import pathlib
import shutil
import signal
import site
import subprocess
import sys
import time

from fake_gcloud import shim, state

HOSTS = {"tpu-v5p-8": 1, "tpu-v5p-16": 2, "tpu-v5litepod-16": 4}
FLAGS = {
    "launch": {"yes", "detach-run", "name"},
    "queue": {"all", "verbose", "output"},
    "logs": {"follow", "tail"},
    "cancel": {"yes"},
}
ENDED = ("SUCCEEDED", "CANCELLED", "FAILED")
CODES = {"SUCCEEDED": 0, "CANCELLED": 103, "FAILED": 100}  # of `sky jobs logs`
SHOWN = 50  # jobs without --all
FIELDS = ("job_id", "job_name", "status", "recovery_count", "resources")
VERBOSE = ("failure_reason", "details")
STEP = 0.05


def refuse(sentence: str):
    print(f"sky.exceptions.{sentence}", file=sys.stderr)
    sys.exit(1)


def main(folder: pathlib.Path, words: list[str]) -> None:
    group, verb, *rest = words
    assert group == "jobs"
    flags = dict(word[2:].partition("=")[::2] for word in rest if word.startswith("--"))
    names = [word for word in rest if not word.startswith("--")]
    for flag in flags.keys() - FLAGS[verb]:
        print(f"Error: No such option: --{flag}", file=sys.stderr)
        sys.exit(2)
    with state(folder) as known:
        known.setdefault("calls", []).append(words)
        known.setdefault("jobs", {})
        if "server" not in known:  # of the API, which the first command starts
            known["server"] = True
            print(
                "\x1b[2mFailed to connect to SkyPilot API server at http://127.0.0.1:46580. Starting a local server.\x1b[0m"
            )
            print("\x1b[0m\x1b[32m✓ SkyPilot API server started. \x1b[0m\x1b[0m")
        if verb != "launch" and not known.get("controller"):
            refuse("ClusterNotUpError: No in-progress managed jobs.")
        if verb == "launch" and known.get("refusals"):
            refuse(known["refusals"].pop(0))
    globals()[verb](folder, names, flags)


def launch(folder: pathlib.Path, names: list[str], flags: dict[str, str]) -> None:
    site.main()
    import yaml

    task = yaml.safe_load(pathlib.Path(names[0]).read_text())
    with state(folder) as known:
        known["controller"] = True
        number = str(len(known["jobs"]) + 1)
        known["jobs"][number] = {
            "job_id": int(number),
            "job_name": flags["name"],
            "status": "PENDING",
            "recovery_count": 0,
            "resources": f"1x[{task['resources']['accelerators']}]",
            "failure_reason": None,
            "task": task,
        }
        for target, source in task["file_mounts"].items():  # what it names may be gone when this command has ended
            shutil.copytree(source, folder / "mounts" / number / target.removeprefix("~/"))
        again = [sys.executable, "-S", "-E", __file__, str(folder), "control", number]
        with open(folder / "controller.log", "a") as log:
            process = subprocess.Popen(again, start_new_session=True, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        known.setdefault("controllers", []).append(process.pid)
    print(f"Job submitted, ID: {number}")


def queue(folder: pathlib.Path, names: list[str], flags: dict[str, str]) -> None:
    assert flags["output"] == "json"
    with state(folder) as known:
        jobs = list(known["jobs"].values())[::-1]  # the newest first
    fields = FIELDS + VERBOSE * ("verbose" in flags)
    jobs = jobs if "all" in flags else jobs[:SHOWN]
    print(json.dumps([{field: job.get(field) for field in fields} for job in jobs], indent=2))


def logs(folder: pathlib.Path, names: list[str], flags: dict[str, str]) -> None:
    (number,) = names
    with state(folder) as known:
        if number not in known["jobs"]:
            print(f"No managed job found with ID {number}.")
            sys.exit(102)
        if known.get("breaks", 0):  # as when the API server is replaced
            known["breaks"] -= 1
            refuse("ApiServerConnectionError: Could not connect to SkyPilot API server")
    log, status = folder / f"{number}.log", ""
    at = 0
    while not status.startswith(ENDED):
        with state(folder) as known:
            status = known["jobs"][number]["status"]
        if log.exists():
            with open(log) as file:
                file.seek(at)
                print(file.read(), end="", flush=True)
                at = file.tell()
        time.sleep(STEP)
    print(f"✓ Job finished (status: {status}).")
    sys.exit(next(code for word, code in CODES.items() if status.startswith(word)))


def cancel(folder: pathlib.Path, names: list[str], flags: dict[str, str]) -> None:
    (number,) = names
    with state(folder) as known:
        if not known["jobs"][number]["status"].startswith(ENDED):
            known["jobs"][number]["status"] = "CANCELLING"
    print(f"Job with ID {number} is scheduled to be cancelled.")


# --- the controller of a job -----------------------------------------------------------------------------------------------


def control(folder: pathlib.Path, number: str) -> None:
    with state(folder) as known:
        task = known["jobs"][number]["task"]
    recovery = task["resources"]["job_recovery"]
    becomes(folder, number, "STARTING")
    while True:
        time.sleep(0.1)
        if not becomes(folder, number, "RUNNING"):
            codes = [137]
        else:
            codes = attempt(folder, number, task)
        with state(folder) as known:
            job = known["jobs"][number]
            if job["status"] == "CANCELLING":
                time.sleep(known.get("cancelling", 0))
                job["status"] = "CANCELLED"
                return
            preempted = job.pop("preempted", False)
            if not preempted and not any(codes):
                job["status"] = "SUCCEEDED"
                return
            if not preempted and not any(code in recovery["recover_on_exit_codes"] for code in codes):
                assert recovery["max_restarts_on_errors"] == 0
                ended = f"exit code {codes[0]}" if len(codes) == 1 else f"exit codes {codes}"
                job |= {
                    "status": "FAILED",
                    "failure_reason": f"Job exited with {ended} (user program failure). To see the details, run: sky jobs "
                    f"logs --controller {number}",
                }
                return
            job["status"] = "RECOVERING"
        time.sleep(0.3)  # for other machines
        with state(folder) as known:
            known["jobs"][number]["recovery_count"] += 1


def becomes(folder: pathlib.Path, number: str, status: str) -> bool:
    """Unless it is being cancelled."""
    with state(folder) as known:
        if known["jobs"][number]["status"] == "CANCELLING":
            return False
        known["jobs"][number]["status"] = status
        return True


def attempt(folder: pathlib.Path, number: str, task: dict) -> list[int]:
    """The exit codes of all hosts: one that fails ends the others, as does the end of the job or of its machines."""
    with state(folder) as known:
        stub = known.get("stub", "")
    hosts = []
    for host in range(task["num_nodes"] * HOSTS[task["resources"]["accelerators"]]):
        home = folder / "hosts" / number / str(host)
        shutil.rmtree(home, ignore_errors=True)
        shutil.copytree(folder / "mounts" / number, home)
        (home / "bin").mkdir()
        for program in ("python3", f"python{sys.version_info.major}.{sys.version_info.minor}"):
            shim(home / "bin" / program)
        environment = {
            "HOME": str(home),
            "PATH": f"{home / 'bin'}:/usr/local/bin:/usr/bin:/bin",
            "PODWRIGHT_PROCESS": str(host),
            "FAKE_STUB": stub,
        }
        with open(folder / f"{number}.log", "a") as log:
            command = ["bash", "-c", task["run"]]
            hosts.append(
                subprocess.Popen(command, env=environment, cwd=home, stdout=log, stderr=log, start_new_session=True)
            )
    while any(host.poll() is None for host in hosts) and not any(host.poll() for host in hosts):
        time.sleep(STEP)
        with state(folder) as known:
            if known["jobs"][number]["status"] == "CANCELLING" or known["jobs"][number].get("preempted"):
                break
    codes = [137 if host.poll() is None else host.returncode for host in hosts]
    for host in hosts:
        if host.poll() is None:
            os.killpg(host.pid, signal.SIGKILL)
        host.wait()
    return codes


# --- what tests do --------------------------------------------------------------------------------------------------------


def preempt(folder: pathlib.Path, number: str) -> None:
    with state(folder) as known:
        known["jobs"][number]["preempted"] = True


def clear(folder: pathlib.Path) -> None:
    """Nothing runs any more."""
    with state(folder) as known:
        for job in known.get("jobs", {}).values():
            if not job["status"].startswith(ENDED):
                job["status"] = "CANCELLING"
    until = time.monotonic() + 10
    while time.monotonic() < until:
        with state(folder) as known:
            if all(job["status"].startswith(ENDED) for job in known.get("jobs", {}).values()):
                return
        time.sleep(STEP)


if __name__ == "__main__":
    if sys.argv[2] == "control":
        control(pathlib.Path(sys.argv[1]), sys.argv[3])
    else:
        main(pathlib.Path(sys.argv[1]), sys.argv[2:])
