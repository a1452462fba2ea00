"""Ends a run that is stuck, and says in what, who is missing and where it hangs.

A host's phase is stuck when it lasts longer than its limit in the config's section `watchdog`; another host is lost when it
gives no sign of life. Hosts tell each other their phases once a second (of 512: every 8) through jax's coordination service.
"""

import itertools
import json
import os
import statistics
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from typing import Any

import jax
from etils import epath

from configs.watchdog import WatchdogConfig
from sharding import hosts
from trainer.phases import COMPILE, DATA_WAIT, EVAL, INIT, RESTORE, SAVE, STEP, Phases
from trainer.saved import SavedSteps
from trainer.storage import entries

HANG, ANOTHER_HOST = 124, 76  # exit codes
TICK = 1.0  # seconds between looks
HOSTS_A_SECOND = 64  # that host 0 answers: each asks for what all have said
COUNTED = 3.0  # of the time since the last look: more means that this process itself was stopped
MEDIANS = 20.0
FIRST, FIRST_LONGER = 10, 10.0  # as many first steps may take as many times longer
GRACE = 5.0  # seconds for a host that another one has failed to end by itself
FOR_STACKS = 5.0  # seconds to wait for the stacks of others
LISTED = 16
OURS = ("watchdog", "ledger")  # how our threads' names begin
ENDED, FAILED = "ended", "failed"  # in place of a phase

ADVICE = {
    INIT: "if the data is prepared for that long, raise --watchdog.init",
    COMPILE: "if the program needs that long to compile, raise --watchdog.compile",
    RESTORE: "see whether the checkpoints' storage answers, or raise --watchdog.restore",
    DATA_WAIT: "see whether the data's storage answers: the stack says what is waited for",
    STEP: "if all hosts are in it, a device or the network between them hangs: start again, without the machine if it recurs",
    SAVE: "see whether the checkpoints' storage answers and has room, or raise --watchdog.save",
    EVAL: "see whether the data's storage answers, or raise --watchdog.eval",
}


@dataclass
class Host:
    """Another host, by what it last said."""

    beat: dict
    quiet: float = 0.0  # seconds since then


class Watchdog:
    """Watches within its `with`. Leaves it with AnotherHost's exit code where another host's end broke what this one ran."""

    def __init__(self, config: WatchdogConfig, phase: Phases, run: epath.Path):
        self.config, self.phase, self.run = config, phase, run
        self.others: dict[int, Host] = {}
        self.stacks: dict[int, str] = {}
        self.alarms: dict[int, str] = {}  # by the host that rang
        self.count, self.index, self.tick = 1, 0, TICK
        self._said: dict[str, str] = {}  # of each topic, to be published
        self._stuck = 0.0  # seconds in this phase, less those for which this process was stopped
        self._unheard = 0.0  # seconds since the coordinator answered
        self._told: set[str] = set()
        self._last_beat = {"phase": ENDED}
        self._ending = threading.Event()
        self._broken = False  # whether a collective has failed, so that the end is certain and its cause is looked for
        self._watcher = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._messenger = threading.Thread(target=self._exchange, name="watchdog-messenger", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._watcher.start()
        self._messenger.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if self.count > 1 and broken_by_another(error):
            self._broken = True
            print(
                "podwright: what the hosts compute together has failed: looking for the one that left", file=sys.stderr
            )
            self._watcher.join(self.config.silence + GRACE)
        if error is not None and type(error).__name__ != "Preempted":
            self._last_beat = {"phase": FAILED}
        self._ending.set()
        self._messenger.join(2 * TICK)
        self._watcher.join(2 * TICK)

    def _watch(self) -> None:
        last, since = time.monotonic(), self.phase.since
        while not self._ending.wait(TICK):
            now = time.monotonic()
            passed, last = min(now - last, COUNTED), now
            for host in self.others.values():
                host.quiet += passed
            self._unheard += passed
            self._stuck += passed
            if since != self.phase.since:
                since, self._stuck = self.phase.since, 0.0
            trouble = self._trouble()
            if trouble and trouble[0] not in self._told:
                self._told.add(trouble[0])
                self._report(*trouble)

    def _trouble(self) -> tuple[str, int] | None:
        """The kind of trouble in words that don't change with time, and the exit code it deserves."""
        if lost := self._lost():
            named = "host " + ", ".join(map(str, lost))
            return f"{named} gave no sign of life for {self.config.silence:g} s: stopped, dead or cut off", HANG
        failed = [i for i, host in self.others.items() if host.beat["phase"] == FAILED and host.quiet > GRACE]
        if failed:
            return f"host {failed[0]} could not go on, and says why", ANOTHER_HOST
        limit = self.limit()
        if self._stuck > limit and not self._broken:
            return f"stuck in {self._what(self._beat())}, which may take {limit:.3g} s", HANG
        for index, alarm in self.alarms.items():
            if index != self.index and alarm not in self._told:
                self._told.add(alarm)
                return f"host {index}: {alarm}", HANG
        return None

    def _lost(self) -> list[int]:
        if self.index and self._unheard > self.config.silence:
            return [0]  # and of the others nothing is known
        return [
            i
            for i, host in self.others.items()
            if host.quiet > self.config.silence and host.beat["phase"] not in (ENDED, FAILED)
        ]

    def limit(self) -> float:
        """Seconds for the phase that the run is in."""
        name = self.phase.name
        if name != STEP:
            return getattr(self.config, {DATA_WAIT: "data_wait", SAVE: "save"}.get(name, name))
        durations = list(self.phase.step_seconds)
        if len(durations) < FIRST:
            return FIRST_LONGER * self.config.step
        return max(self.config.step, MEDIANS * statistics.median(durations))

    def _beat(self) -> dict:
        return {
            "phase": self.phase.name,
            "step": self.phase.step,
            "for": self._stuck,
            "at": f"process {os.getpid()} on {os.uname().nodename}",
        }

    def _exchange(self) -> None:
        """Runs beside the watcher, since without the coordinator each message can block for ever."""
        try:
            self.index, self.count = jax.process_index(), jax.process_count()  # waits for jax's backend
        except RuntimeError:  # the run meets it, too
            return
        if self.count == 1:
            return
        heard: dict[int, str] = {}
        self.tick = max(TICK, self.count / HOSTS_A_SECOND)
        for number in itertools.count():
            ending = self._ending.wait(self.tick)
            beat = self._last_beat if ending else self._beat() | {"number": number}
            try:
                for topic, text in [*self._said.items(), ("beat", json.dumps(beat))]:
                    hosts.publish(topic, text)
                for index, text in hosts.published("beat").items():
                    if index != self.index and heard.get(index) != text:
                        heard[index] = text
                        self.others = self.others | {index: Host(json.loads(text))}  # a new one: the watcher reads it
                self.alarms, self.stacks = hosts.published("alarm"), hosts.published("stack")
                self._unheard = 0.0
            except Exception:  # the coordinator is away: the watcher counts for how long
                pass
            if ending:
                return

    def _report(self, trouble: str, code: int) -> None:
        stack = python_stacks()
        missing = [i for i, host in self.others.items() if not self._arrived(host)]
        if self.count > 1:
            self._said["stack"] = stack
            if trouble.partition(": ")[2] not in self.alarms.values():  # else we answer one
                self._said["alarm"] = trouble
            deadline = time.monotonic() + FOR_STACKS
            answering = [i for i in missing if self.others[i].quiet < COUNTED + self.tick]
            while time.monotonic() < deadline and not all(i in self.stacks for i in answering):
                time.sleep(0.1)
        lines = [f"podwright: watchdog: {trouble}", f"  this host    {self._where(self._beat())}"]
        if self.count > 1:
            arrived = [self.index, *(i for i in sorted(self.others) if i not in missing)]
            lines.append(f"  arrived      {f'{len(arrived)} hosts' if len(arrived) > LISTED else listed(arrived)}")
            for index in missing[:LISTED]:
                host = self.others[index]
                quiet = f", no sign of life since {host.quiet:.0f} s" if host.quiet > COUNTED + self.tick else ""
                lines.append(f"  not arrived  host {index}: {self._where(host.beat)}{quiet}")
            unknown = [i for i in range(self.count) if i != self.index and i not in self.others]
            if unknown:
                lines.append(f"  not started  {listed(unknown)}")
        lines += [f"  saved        {saves(self.run / 'checkpoints')}", f"  advice       {self._advice(missing)}"]
        for index in [self.index, *missing[:LISTED]]:
            text = stack if index == self.index else self.stacks.get(index)
            lines += [f"stacks of host {index}:", *((text or "it does not answer").splitlines())]
        if code == ANOTHER_HOST or self.config.policy == "exit":
            again = f"; continue with: {self.phase.command}" if self.phase.command else ""
            lines.append(f"podwright: {trouble}: exit code {code}{again}")
            leave(lines, code, last=self.index == 0 and self.count > 1)
        print("\n".join(lines), file=sys.stderr, flush=True)

    def _arrived(self, host: Host) -> bool:
        return (host.beat["phase"], host.beat.get("step")) == (self.phase.name, self.phase.step) and (
            host.quiet < self.config.silence
        )

    def _what(self, beat: dict) -> str:
        if beat["phase"] == STEP:
            return f"step {beat['step']}"
        return beat["phase"] + (f" of step {beat['step']}" if beat.get("step") else "")

    def _where(self, beat: dict) -> str:
        return self._what(beat) + (f" for {beat['for']:.0f} s ({beat['at']})" if "at" in beat else "")

    def _advice(self, missing: list[int]) -> str:
        if missing:
            return f"look at host {missing[0]} first, its machine and its log"
        return ADVICE[self.phase.name]


def leave(lines: list[str], code: int, last: bool) -> None:
    """At once, without Python's and jax's own ends, which would wait for the other hosts. The coordinator leaves last: jax
    aborts the others when it has gone."""
    sys.stdout.flush()
    print("\n".join(lines), file=sys.stderr, flush=True)
    if last:
        time.sleep(FOR_STACKS + 2 * TICK)
    os._exit(code)


def listed(numbers: list[int]) -> str:
    return f"host{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


def broken_by_another(error: BaseException | None) -> bool:
    """Whether the failure may be that of a collective: jax's, or caused by one."""
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError):
            return True
        error = error.__cause__ or error.__context__
    return False


def python_stacks() -> str:
    """Of all threads at work but ours, the main one first."""
    main, frames = threading.main_thread(), sys._current_frames()
    stacks = []
    for thread in sorted(threading.enumerate(), key=lambda thread: thread is not main):
        stack = [
            f
            for f in traceback.extract_stack(frames.get(thread.ident or 0))
            if f.name not in ("_bootstrap", "_bootstrap_inner")
        ]
        if not thread.name.startswith(OURS) and stack and stack[-1].name != "_worker":  # which waits for work
            stacks.append(f"thread {thread.name}:\n{''.join(traceback.format_list(stack)).rstrip()}")
    return "\n".join(stacks)


def saves(folder: epath.Path) -> str:
    """What of a run's state is safe, in words. Its storage may be what hangs."""
    found: list[str] = []
    reader = threading.Thread(target=lambda: found.append(saves_in(folder)), name="watchdog-saves", daemon=True)
    reader.start()
    reader.join(FOR_STACKS)
    return found[0] if found else f"unknown, {folder} does not answer"


def saves_in(folder: epath.Path) -> str:
    steps = SavedSteps(folder).steps()
    names = [entry.name for entry in entries(folder)]
    under_way = [name for name in names if name.partition(".")[0].isdigit() and not name.isdigit()]
    newest = f"step {steps[-1]} in {folder}" if steps else "nothing yet"
    return newest + (f"; under way or left half done: {', '.join(under_way)}" if under_way else "")
