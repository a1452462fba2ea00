"""How far a run is and whether it lives, as read from its folder: nothing else is asked."""

import contextlib
import json
import shlex
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from etils import epath

from configs import EXPERIMENTS
from configs.fields import format_value, kinds_of, values_of
from configs.overrides import Resolved, resolve
from configs.schema import Config, ConfigError
from trainer.certificate import AHEAD
from trainer.evaluate import read_config
from trainer.ledger import Goodput, goodput, read_rows
from trainer.phases import STEP
from trainer.run_folder import trained_by
from trainer.saved import SavedSteps
from trainer.storage import StorageError, folder_of, reason

RUNNING, DONE, PREEMPTED, FAILED, DIVERGED = "running", "done", "preempted", "failed", "diverged"
IMPORTED = "imported"  # and never trained
UNKNOWN = "unknown"  # on cloud storage, without a noted end: another machine may be training it
TAIL = 1 << 20  # bytes of metrics.jsonl in which its last records mostly are
Record = dict[str, Any]


@dataclass(frozen=True)
class RunState:
    run: epath.Path
    config: Config
    state: str
    last: dict[str, Record]  # the last record that counts of each kind
    spent: Goodput | None
    seen: float | None  # Unix time of the last sign of life

    @property
    def step(self) -> int:
        """The last one trained; 0 before the first."""
        return self.last.get("train", {}).get("step", 0)

    @property
    def goodput(self) -> float | None:
        """Share of the time that passed which was training."""
        if self.spent is None or self.spent.end <= self.spent.start:
            return None
        return self.spent.seconds.get(STEP, 0.0) / (self.spent.end - self.spent.start)


def read_state(run: str | epath.Path) -> RunState:
    """Raises StorageError if `run` is no run or cannot be read, ConfigError if its config is damaged."""
    folder = folder_of(run)
    config = read_config(folder)
    try:
        records = last_records(folder / "metrics.jsonl")
        rows = list(read_rows(folder))
        state = state_of(folder, config, records)
        spent = goodput(rows) if rows else None
        seen = spent.end if spent else float((folder / "config.json").stat().mtime)
    except StorageError:
        raise
    except Exception as error:  # cloud storage has errors of its own
        raise StorageError(f"{folder} cannot be read: {reason(error)}") from None
    return RunState(folder, config, state, {record["kind"]: record for record in records}, spent, seen)


def last_records(file: epath.Path) -> list[Record]:
    """The end of metrics.jsonl without what a rollback undid; all of it, unless the end has steps and evaluations."""
    if not file.exists():
        return []
    with file.open("rb") as lines:
        size = lines.seek(0, 2)
        if size > TAIL:
            lines.seek(size - TAIL)
            records = standing(lines.read().split(b"\n")[1:])
            if {"train", "eval"} <= {record["kind"] for record in records}:
                return records
        lines.seek(0)
        return standing(lines.read().split(b"\n"))


def standing(lines: Iterable[bytes]) -> list[Record]:
    records: list[Record] = []
    for line in lines:
        with contextlib.suppress(ValueError):  # a kill can leave half a last line
            record = json.loads(line)
            if record["kind"] == "rollback":
                records = [before for before in records if before["step"] <= record["step"]]
            records.append(record)
    return records


def state_of(run: epath.Path, config: Config, records: list[Record]) -> str:
    saved = SavedSteps(run / "checkpoints")
    if trained_by(run):
        return RUNNING
    if saved.counts(config.trainer.steps):
        return DONE
    if records and records[-1]["kind"] == AHEAD:  # which only a run that was told to stop logs
        return PREEMPTED
    if has_diverged(config, [record for record in records if record["kind"] == "train"]):
        return DIVERGED
    if not records and saved.found() == [0]:
        return IMPORTED
    return UNKNOWN if "://" in str(run) else FAILED


def has_diverged(config: Config, steps: list[Record]) -> bool:
    """Whether the log ends as that of a run whose guard ended it: with a bad step, or with more than may be skipped."""
    enough = config.guard.limit + 1 if config.guard.policy == "skip" else 1
    last = steps[-enough:]
    return len(last) == enough and all(step.get("bad") or None in step.values() for step in last)


def log_lines(run: epath.Path) -> list[str]:
    """What the run printed, of its last start and those before."""
    with contextlib.suppress(FileNotFoundError):
        return (run / "log.txt").read_text().splitlines()
    return []


def started_from(config: Config) -> Resolved | None:
    """The experiment that a run's config has its name from, before anything was given; None if there is no such one here."""
    if config.name not in EXPERIMENTS:
        return None
    other = kinds_of(EXPERIMENTS[config.name]())["data"] != config.data.kind
    with contextlib.suppress(ConfigError):
        return resolve(config.name, ["--data.kind", config.data.kind] * other)
    return None


def continuing(config: Config, run: epath.Path) -> list[str]:
    """The command that goes on with a run, in a shell of any machine that reaches it: phrases to be joined by spaces."""
    where = f"--run {shlex.quote(str(run))}"
    if base := started_from(config):
        before, now = values_of(base.config), values_of(config)
        other = kinds_of(EXPERIMENTS[config.name]())["data"] != config.data.kind
        given = [f"--data.kind {config.data.kind}"] * other
        given += [f"--{path} {format_value(now[path])}" for path in now if now[path] != before.get(path)]
        with contextlib.suppress(ConfigError):
            if resolve(config.name, shlex.split(" ".join(given))).config == config:
                return [f"podwright train {config.name}", where, *given]
    return [f"podwright train {shlex.quote(str(run / 'config.json'))}", where]


def ago(then: float | None) -> str:
    """`5 s`, `12 min`, `3 h`, `2 d`"""
    if then is None:
        return "-"
    seconds = max(0.0, time.time() - then)
    for unit, word in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {word}"
    return f"{seconds:.0f} s"
