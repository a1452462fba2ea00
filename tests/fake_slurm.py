"""Slurm's commands for tests: one queue in a JSON file, whose jobs run here. Called as `fake_slurm.py FOLDER COMMAND WORDS...`.

state: {"jobs": {number: {"name", "comment", "state", "codes": [exit code of each attempt], "log"}}, "calls": [words]}
"""

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys

from fake_gcloud import shim, state


def main(folder: pathlib.Path, command: str, words: list[str]) -> int:
    with state(folder) as known:
        known.setdefault("calls", []).append([command, *words])
        queue = known.setdefault("jobs", {})
        if command == "sbatch":
            text = pathlib.Path(words[-1]).read_text()
            directives = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.MULTILINE))
            number = str(len(queue) + 1)
            queue[number] = {
                "name": directives["job-name"],
                "comment": directives["comment"],
                "state": "PENDING",
                "codes": [],
            }
            queue[number] |= {"nodes": int(directives["nodes"]), "requeue": "requeue" in directives}
            again = [sys.executable, "-S", "-E", __file__, str(folder), "run", number, words[-1]]
            subprocess.Popen(again, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            print(number)
        elif command == "squeue":
            for number, job in queue.items():
                if job["state"] in ("PENDING", "RUNNING"):
                    print(f"{number}|{job['name']}|{job['state']}|{job['comment']}")
        elif command == "sacct":
            number = next(word.partition("=")[2] for word in words if word.startswith("--jobs="))
            print(f"{queue[number]['state']}|{queue[number]['codes'][-1]}:0")
        elif command == "scontrol":
            assert words[0] == "requeue"
            assert queue[words[1]]["requeue"]
            queue[words[1]]["again"] = True
        elif command == "scancel":
            asked = "--signal=TERM" in words
            for group in queue[words[-1]].get("tasks", []):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(group, signal.SIGTERM if asked else signal.SIGKILL)
            if not asked:
                queue[words[-1]] |= {"state": "CANCELLED", "again": False}
    if command == "run":
        return run(folder, *words)
    return srun(folder, words) if command == "srun" else 0


def run(folder: pathlib.Path, number: str, script: str) -> int:
    """The batch script, once more for each time it asks for that."""
    while True:
        with state(folder) as known:
            known["jobs"][number] |= {"state": "RUNNING", "again": False}
        code = subprocess.run(["bash", script], env=os.environ | {"SLURM_JOB_ID": number}).returncode
        with state(folder) as known:
            job = known["jobs"][number]
            job["codes"].append(code)
            if not job["again"]:
                if job["state"] == "RUNNING":
                    job["state"] = "FAILED" if code else "COMPLETED"
                return 0


def srun(folder: pathlib.Path, words: list[str]) -> int:
    options = {}
    while words[0].startswith("--"):
        name, _, value = words.pop(0)[2:].partition("=")
        options[name] = value
    number = os.environ["SLURM_JOB_ID"]
    with state(folder) as known:
        nodes = int(options.get("nodes", known["jobs"][number]["nodes"]))
        stub = known.get("stub", "")
    machine = folder / "bin"
    if not (machine / "ready").exists():
        for name in ("python3", f"python{sys.version_info.major}.{sys.version_info.minor}"):
            shim(machine / name)
        (machine / "ready").touch()
    tasks = []
    for node in range(nodes):
        log = options.get("output", os.devnull).replace("%j", number).replace("%n", str(node))
        environment = os.environ | {"SLURM_PROCID": str(node), "FAKE_STUB": stub, "PODWRIGHT_PROCESS": str(node)}
        with open(log, "a") as out:
            tasks.append(subprocess.Popen(words, env=environment, stdout=out, stderr=out, start_new_session=True))
    with state(folder) as known:
        known["jobs"][number]["tasks"] = [task.pid for task in tasks]
    return max(task.wait() for task in tasks)


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))
