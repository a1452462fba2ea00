"""What a run does about a loss or a gradient that is no number, or a spike: end, skip the update, or go back.

A step is judged on the device, and the verdict read with its metrics. The batches that a rollback leaves out stand in
RUN/rollbacks.jsonl, from which, with `guard.skip_batches`, the batch of every step follows.
"""

import dataclasses
import json
import math
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs.guard import GuardConfig, windows_of
from data.dataset import Dataset
from data.left_out import batch_number, merged
from trainer.checkpoint import Checkpoints
from trainer.metrics import Reporter
from trainer.run_folder import read_metrics
from trainer.storage import StorageError, folder_of, reason

JOURNAL = "rollbacks.jsonl"
JUDGED = ("loss", "grad_norm")  # what is compared with its recent values
TO_DEVIATION = 1.4826  # times the median distance from the median: the standard deviation of a normal distribution
LEAST_SPREAD = 1e-3  # of the median: so that values that hardly vary make no spike of a small difference


class NumericsError(ArithmeticError):
    """The loss or the gradient stopped being a number, or left what it was before."""


def on_device(config: GuardConfig) -> bool:
    """Whether the step itself judges. Else whoever reads its metrics sees what is not finite, and that is enough."""
    return config.policy == "skip" or config.threshold > 0


def judge(
    metrics: dict[str, jax.Array], recent: jax.Array | None, threshold: float
) -> tuple[jax.Array, jax.Array | None, dict[str, jax.Array]]:
    """Whether a step is bad (bool scalar), `recent` with its values if it is not, and metrics about that.

    `recent` (window, len(JUDGED)), float32, holds those of the last good steps in their order, above them NaN where there were
    none yet: then there is no spike. None: only what is not finite is bad.
    """
    bad = ~jnp.all(jnp.stack([jnp.isfinite(value) for value in metrics.values()]))
    if recent is None:
        return bad, None, {"bad": bad.astype(jnp.float32)}
    values = jnp.stack([metrics[name] for name in JUDGED])
    median = jnp.median(recent, axis=0)
    spread = jnp.maximum(
        TO_DEVIATION * jnp.median(jnp.abs(recent - median[None]), axis=0), LEAST_SPREAD * jnp.abs(median)
    )
    scores = (values - median) / jnp.maximum(spread, jnp.finfo(jnp.float32).tiny)
    scores = jnp.where(jnp.isfinite(scores), scores, 0.0)
    bad |= jnp.any(scores > threshold)
    recent = jnp.where(bad, recent, jnp.concatenate([recent[1:], values[None]]))
    return (
        bad,
        recent,
        {"bad": bad.astype(jnp.float32)} | {f"{name}_z": score for name, score in zip(JUDGED, scores, strict=True)},
    )


def recent_values(run: str | pathlib.Path, step: int, window: int) -> list[list[float]]:
    """What the log has of the last good steps up to `step`: at most `window` rows of JUDGED."""
    records = read_metrics(run, "train")
    rows = [[record[name] for name in JUDGED] for at, record in sorted(records.items()) if is_good(record, at, step)]
    return rows[-window:]


def is_good(record: dict, at: int, last: int) -> bool:
    return at <= last and not record.get("bad") and None not in [record[name] for name in JUDGED]


def with_recent(state: Any, abstract: Any, rows: list[list[float]]) -> Any:
    """A State that was made or restored, with those values if its program (`abstract`) has any. They are not saved: the log
    has them."""
    if abstract.recent is None:
        return state
    values = np.full(abstract.recent.shape, np.nan, np.float32)
    if rows:
        values[-len(rows) :] = rows
    recent = jax.make_array_from_callback(values.shape, abstract.recent.sharding, lambda index: values[index])
    return dataclasses.replace(state, recent=recent)


def saved_part(state: Any) -> Any:
    return dataclasses.replace(state, recent=None, noise=None)


def read_rollbacks(run: str | pathlib.Path) -> list[dict]:
    """The journal of a run, oldest first. Raises StorageError."""
    file = folder_of(run) / JOURNAL
    try:
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    except (OSError, ValueError) as error:
        raise StorageError(f"{file} cannot be read, and decides which batches come next: {reason(error)}") from None


def without_left_out(data: Dataset, config: GuardConfig, rollbacks: list[dict]) -> Dataset:
    """The data without the batches that the config or a rollback leaves out."""
    windows = windows_of(config.skip_batches) + [tuple(rollback["batches"]) for rollback in rollbacks]
    return dataclasses.replace(data, left_out=merged(range(first - 1, last) for first, last in windows))


class Guard:
    """Of one run, on every host: all read the same metrics and so decide the same."""

    def __init__(self, config: GuardConfig, rollbacks: list[dict], reporter: Reporter) -> None:
        """`rollbacks` are those before, the same on all hosts."""
        self.config, self.rollbacks, self.reporter = config, rollbacks, reporter
        self.journal = reporter.folder / JOURNAL
        self.skipped = 0  # updates, one after another
        self.bad_step, self.cause, self.values = 0, "", dict[str, float]()

    def accepts(self, step: int, values: dict[str, float]) -> bool:
        """Whether the run goes on from this step. If not, it rolls back. Raises NumericsError if it ends."""
        cause = cause_of(values, self.config)
        if cause is None:
            self.skipped = 0
            return True
        if self.config.policy == "abort":
            raise NumericsError(f"{cause} at step {step}")
        if self.config.policy == "skip":
            self.skipped += 1
            if self.skipped > self.config.limit:
                raise NumericsError(
                    f"{cause} at step {step}, after {self.config.limit} skipped updates in a row, all that guard.limit allows"
                )
            self.reporter.say(f"step {step}: {cause}; its update is skipped")
            return True
        if len(self.rollbacks) >= self.config.limit:
            raise NumericsError(
                f"{cause} at step {step}, after {len(self.rollbacks)} rollbacks, all that guard.limit allows: {self.journal} "
                f"lists them"
            )
        self.bad_step, self.cause, self.values = step, cause, values
        return False

    def roll_back(self, checkpoints: Checkpoints, data: Dataset) -> tuple[int | None, Dataset]:
        """The step to return to (None: the start of a run that has saved none) and the data to go on with.

        Checkpoints that hold what was learned of batches that are now left out are set aside, no others. A run killed at any
        moment of this finds the same bad step again, or the journal.
        """
        checkpoints.finish()
        saved = checkpoints.saved.steps()
        # A run that has saved something can go back no further.
        first = max(self.bad_step - self.config.batches, saved[0] if saved else 0) + 1
        checkpoints.set_aside([step for step in saved if step >= first], self.reporter.say)
        back = max((step for step in saved if step < first), default=None)
        batches = [batch_number(step - 1, data.left_out) + 1 for step in (first, self.bad_step)]
        finite = {name: value if math.isfinite(value) else None for name, value in self.values.items()}
        self.rollbacks.append(
            {"step": self.bad_step, "cause": self.cause, "values": finite, "returned_to": back or 0, "batches": batches}
        )
        # The log first: without the journal, it only forgets what is then logged again.
        self.reporter.record("rollback", back or 0, {"bad_step": self.bad_step})
        self._write()
        left_out = f"batch {batches[0]}" if len(set(batches)) == 1 else f"batches {batches[0]} to {batches[1]}"
        self.reporter.say(
            f"step {self.bad_step}: {self.cause}; rolled back to step {back or 0}, {left_out} left out "
            f"(rollback {len(self.rollbacks)} of at most {self.config.limit})"
        )
        return back, without_left_out(data, self.config, self.rollbacks)

    def _write(self) -> None:
        if self.reporter.silent:
            return
        temporary = self.journal.with_name(f".{JOURNAL}.partial")
        try:
            with open(temporary, "w") as lines:
                lines.writelines(json.dumps(rollback) + "\n" for rollback in self.rollbacks)
                lines.flush()
                os.fsync(lines.fileno())
            os.replace(temporary, self.journal)
        except OSError as error:
            raise StorageError(f"{self.journal} could not be written: {reason(error)}") from error


def cause_of(values: dict[str, float], config: GuardConfig) -> str | None:
    """In words, what is bad about a step; None if nothing is."""
    if not all(map(math.isfinite, values.values())):
        return ", ".join(f"{name} {value}" for name, value in values.items() if not math.isfinite(value))
    if not values.get("bad"):
        return None
    return ", ".join(
        f"{name} {values[name]:.4g}, {values[f'{name}_z']:.1f} robust deviations above its median"
        for name in JUDGED
        if values[f"{name}_z"] > config.threshold
    )
