"""What a run is doing: always exactly one phase. The goodput ledger books seconds to it, the watchdog limits them."""

import contextlib
import os
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator

INIT, COMPILE, RESTORE, STEP, DATA_WAIT, SAVE, EVAL = (
    "init",
    "compile",
    "restore",
    "step",
    "data wait",
    "save block",
    "eval",
)
LOST, IDLE = "lost work", "idle"  # causes that are no phases: steps trained before, and nobody training
CAUSES = (STEP, DATA_WAIT, SAVE, EVAL, COMPILE, INIT, RESTORE, LOST, IDLE)


class Phases:
    """The phase of this process, since when, and the seconds of each so far.

    with phase("compile"): ...  # and then again what it was before
    """

    def __init__(self, began: float | None = None, command: str = ""):
        """`began`: Unix time at which the attempt began, now if None; what has passed since belongs to init. `command`
        continues the run, in a shell."""
        now = time.time()
        self.began = min(now, now if began is None else began)
        self.command = command
        self._zero = time.monotonic() - (now - self.began)  # so that a clock that is set changes no duration
        self._counted = self.since = self._zero
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._lock = threading.Lock()
        self.name = INIT
        self.step = 0  # under way; 0 before the first
        self.reached = 0  # the last step that this run has trained, in this attempt or an earlier one
        self.again = False  # whether this step was trained before
        self.step_seconds: deque[float] = deque(maxlen=100)  # of the last ones, waits and saves left out

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        before = self.name
        self._enter(name)
        try:
            yield
        finally:
            self._enter(before)

    def at(self, step: int) -> None:
        """Step `step` begins: the one before is trained."""
        with self._lock:
            self._count()
            if self.step:
                self.step_seconds.append(self._counted - self.since)
            self.reached = max(self.reached, step - 1)
            self.step, self.again, self.since = step, step <= self.reached, self._counted

    def done(self) -> None:
        """No step follows: the last one is trained."""
        with self._lock:
            self._count()
            self.reached, self.again = max(self.reached, self.step), False

    def _enter(self, name: str) -> None:
        with self._lock:
            self._count()
            self.name, self.since = name, self._counted

    def _count(self) -> None:
        now = time.monotonic()
        lost = self.again and self.name in (STEP, DATA_WAIT, SAVE, EVAL)
        self._seconds[LOST if lost else self.name] += now - self._counted
        self._counted = now

    def totals(self) -> tuple[float, dict[str, float]]:
        """Seconds since the attempt began, and how they divide among causes."""
        with self._lock:
            self._count()
            return self._counted - self._zero, dict(self._seconds)


def process_began() -> float:
    """Unix time at which this process was started: imports are a part of a run's start."""
    try:
        with open("/proc/self/stat") as stat:
            ticks = int(stat.read().rpartition(")")[2].split()[19])
        return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, AttributeError):  # no Linux
        return time.time()
