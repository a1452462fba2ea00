"""A run on several processes of this machine, each what a host of a pod is: how pods behave, to try at home."""

import contextlib
import os
import pathlib
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from configs.overrides import resolve
from configs.schema import ConfigError

LAST = 30.0  # seconds that the others get once one has ended with an error
ANOTHER_HOST = 76  # of a process that could go on, but not without the one that couldn't
OWN = {"on": "WHERE", "processes": "N"}


def main(argv: list[str]) -> int:
    """The exit code of the run: of several that failed, the one with a cause of its own."""
    name, *rest = argv
    resolved = resolve(name, rest, OWN | {"run": "DIR", "allow": "FIELDS", "profile": "steps=A:B"})
    devices = resolved.config.mesh.simulated_devices
    count = whole_number(resolved.options.get("processes", "2"))
    if devices % count:
        raise ConfigError(
            f"mesh.simulated_devices={devices} does not divide among --processes {count}: give a multiple of {count}"
        )
    run = pathlib.Path(resolved.options.get("run") or os.path.join("runs", resolved.config.name)).expanduser()
    logs = run.parent / f"{run.name}-hosts"  # beside the run's folder, which belongs to its first process
    logs.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "launch", "train", name, *without(rest, OWN)]
    with started(command, count, logs, shlex.join(["podwright", "launch", *argv])) as processes:
        code = ended(processes)
    if code not in (0, 75, ANOTHER_HOST) and processes[0].returncode in (ANOTHER_HOST, -signal.SIGKILL):
        index = next(i for i, process in enumerate(processes) if process.returncode == code)
        print(f"podwright: process {index} said why: {logs / f'process-{index}.log'}", file=sys.stderr)
    return code


def whole_number(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise ConfigError(f"--processes {text} is not a number of processes: a whole number of at least 1 is allowed")
    return int(text)


def without(argv: Sequence[str], options: dict[str, str]) -> list[str]:
    """A command line that `resolve` has accepted, less these options and their values."""
    words, kept = list(argv), []
    while words:
        word = words.pop(0)
        name = word.removeprefix("--").partition("=")[0]
        if name not in options:
            kept.append(word)
        elif options[name] and "=" not in word:  # an option without a word for its value is a switch
            words.pop(0)
    return kept


@contextlib.contextmanager
def started(command: list[str], count: int, logs: pathlib.Path, again: str) -> Iterator[list[subprocess.Popen]]:
    """The processes, the first with our terminal, the others with files below `logs`; none survives the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = []
    with contextlib.ExitStack() as files:
        try:
            for index in range(count):
                told = {
                    "PODWRIGHT_COORDINATOR": address,
                    "PODWRIGHT_PROCESSES": str(count),
                    "PODWRIGHT_PROCESS": str(index),
                    "PODWRIGHT_COMMAND": again,
                }
                log = files.enter_context(open(logs / f"process-{index}.log", "w")) if index else None
                # A session of its own: ctrl-C reaches us alone, and each process gets one signal.
                processes.append(
                    subprocess.Popen(command, env=os.environ | told, stdout=log, stderr=log, start_new_session=True)
                )
            yield processes
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                process.wait()


def ended(processes: list[subprocess.Popen]) -> int:
    """Waits for all; passes ctrl-C and SIGTERM on, and lets the others follow one that failed."""

    def stop(number, frame):
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    deadline = None
    try:
        while any(process.poll() is None for process in processes):
            failed = next((i for i, process in enumerate(processes) if process.returncode), None)
            if deadline is None and failed is not None:
                deadline = time.monotonic() + LAST
                if (number := -processes[failed].returncode) > 0:
                    print(f"podwright: process {failed} was ended by {signal.Signals(number).name}", file=sys.stderr)
            if deadline is not None and time.monotonic() > deadline:
                for process in processes:
                    if process.poll() is None:
                        process.kill()
            time.sleep(0.05)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    codes = [process.returncode for process in processes]
    causes = [code for code in codes if code not in (0, ANOTHER_HOST) and code > 0]
    return next(iter(causes), ANOTHER_HOST if any(codes) else 0)
