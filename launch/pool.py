"""Runs side by side on this machine: as many as its cores and memory allow, and those that fail again, where that can help."""

import json
import os
import pathlib
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from etils import epath

from trainer.run_folder import lock_folder, trained_by

DONE, DIVERGED, FAILED, RUNNING, WAITING, STOPPED = "done", "diverged", "failed", "running", "waiting", "stopped"
NUMERICS, PREEMPTED = 5, 75
# How often more a run is started that ended with this exit code: told to stop, not without another host, storage, a hang. Any
# other is its own fault, and would be again.
AGAIN = {PREEMPTED: 20, 76: 20, 4: 2, 124: 1}
KILLED = 2  # how often more where a signal ended it, as the kernel does where memory is short
PAUSE = 10.0  # seconds before that, where it failed
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # the last where the terminal is closed
FIRST_NEED = 2**30  # bytes a run is taken to need before any has been seen


@dataclass
class Member:
    """One run of several, and how it is getting on."""

    label: str
    command: list[str]
    run: epath.Path  # its folder, here or on cloud storage
    log: pathlib.Path
    steps: int
    again: list[str] | None = None  # the command that starts it again, where that is another one
    stop: signal.Signals = signal.SIGTERM
    state: str = WAITING
    code: int | None = None  # of its last end
    tries: int = 0
    not_before: float = 0.0  # seconds of the monotonic clock
    process: subprocess.Popen | None = None
    slot: int = 0

    def progress(self) -> dict:
        """The newest record of a training step; empty before the first."""
        try:
            with (lock_folder(self.run) / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
                lines = file.read().splitlines()
        except OSError:
            return {}
        for line in reversed(lines):
            try:
                record = json.loads(line)
            except ValueError:  # cut by our reading, or still being written
                continue
            if record.get("kind") == "train":
                return record
        return {}


def run_all(members: Sequence[Member], at_once: int, changed: Callable[[Member | None], None]) -> bool:
    """Until all have ended; `changed` hears of each new state, and of nothing (None) twice a second. False where a
    signal asked to stop: what ran has been told, and has ended."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    share = len(cores) // at_once
    stopping = False

    def stop(number, frame):
        nonlocal stopping
        stopping = True
        for member in members:
            if member.process is not None and member.process.poll() is None:
                member.process.send_signal(member.stop)

    need = FIRST_NEED
    before = {number: signal.signal(number, stop) for number in STOPS}
    try:
        while True:
            running = [member for member in members if member.process is not None]
            for member in running:
                need = max(need, peak_memory(member.process.pid))  # type: ignore[union-attr]
                if ended(member, stopping):
                    changed(member)
            running = [member for member in running if member.process is not None]
            waiting = [member for member in members if member.state == WAITING]
            if not running and (stopping or not waiting):
                return not stopping
            if not stopping and len(running) < at_once:
                ready = [m for m in waiting if m.not_before <= time.monotonic() and not trained_by(m.run)]
                if ready and (not running or memory_left() > need):
                    free = min(set(range(at_once)) - {member.slot for member in running})
                    start(ready[0], free, cores[share * free : share * (free + 1)])
                    changed(ready[0])
                    continue
            changed(None)
            time.sleep(0.5)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for member in members:
            if member.process is not None and member.process.poll() is None:
                member.process.kill()


def start(member: Member, slot: int, cores: list[int]) -> None:
    command = member.again if member.again and member.tries else member.command
    member.log.parent.mkdir(parents=True, exist_ok=True)
    with member.log.open("a") as log:
        log.write(f"$ {shlex.join(command)}\n")
        log.flush()
        # A session of its own: ctrl-C reaches us alone, and each run gets one signal.
        member.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    if cores:
        os.sched_setaffinity(member.process.pid, cores)  # before its threads are made: Python is still starting
    member.state, member.slot = RUNNING, slot
    member.tries += 1


def ended(member: Member, stopping: bool) -> bool:
    """Whether a running member has ended; what is to become of it is then its state."""
    assert member.process is not None
    code = member.process.poll()
    if code is None:
        return False
    member.process, member.code = None, code
    if code == 0:
        member.state = DONE
    elif stopping:
        member.state = STOPPED
    elif code == NUMERICS:
        member.state = DIVERGED
    elif member.tries <= (KILLED if code < 0 else AGAIN.get(code, 0)):
        member.state = WAITING
        member.not_before = time.monotonic() + (0.0 if code == PREEMPTED else PAUSE)
    else:
        member.state = FAILED
    return True


def last_words(member: Member) -> str:
    """The sentence that a failed run ended with."""
    try:
        lines = member.log.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    said = [line.removeprefix("podwright: ") for line in lines if line.startswith("podwright: ")]
    return next(reversed(said or [line for line in lines if line.strip()]), "")


def memory_left() -> float:
    """Bytes that can be had without swapping; infinitely many where the system doesn't say."""
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), float("inf"))


def peak_memory(process: int) -> int:
    """The most bytes that it has held; 0 where the system doesn't say."""
    try:
        lines = pathlib.Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)
