"""What makes a run private and keeps it so: its units, its secret, its noise, and the budget that no step exceeds.

RUN/privacy.json says what was promised, for everyone. RUN/privacy.secret, for nobody, is what sampling and noise come from: a run
that goes on draws the same again, and who reads it can undo both.
"""

import dataclasses
import hashlib
import json
import math
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from configs.schema import Config, ConfigError, DataConfig
from data.dataset import Dataset, manifest_of
from data.poisson import ALGORITHM
from data.text import Rows
from data.units import OVERFLOW, DrawnUnits, by_unit, most_units, stretches
from sharding import hosts
from sharding.rules import rules_for
from trainer.accounting import Stretch, calibrated_noise, epsilon, spent_bound, steps_within
from trainer.run_folder import RunFolder
from trainer.storage import StorageError, reason

RECORD, SECRET = "privacy.json", "privacy.secret"
SECRET_BYTES = 32
MOST_PROTECTING = 20.0  # an epsilon above which nothing is protected that were worth an exact delta


@dataclass(frozen=True)
class Privacy:
    """Of one run, the same on all hosts."""

    epsilon: float
    delta: float
    delta_left: float  # for the accountant: less what batches that are too large for their room may cost
    units: int  # that the training data has
    expected: int  # of them in a batch
    noise: float  # multiplier
    secret: bytes
    secret_seed: bool  # whether nobody chose it

    @property
    def rate(self) -> float:
        return self.expected / self.units

    def steps_left(self, before: list[Stretch], at_most: int) -> int:
        """How many steps more the budget allows. Usually all: then nothing is searched."""
        if epsilon([*before, Stretch(at_most, self.rate, self.noise)], self.delta_left) <= self.epsilon:
            return at_most
        return steps_within(self.epsilon, self.delta_left, before, self.rate, self.noise, at_most)

    def spent(self, before: list[Stretch], steps: int) -> Callable[[int], float]:
        """Epsilon after so many of `steps` steps that follow those before: a bound, exact after the last."""
        return spent_bound(before, self.rate, self.noise, steps, self.delta_left)

    def key(self) -> np.ndarray:
        """uint32 [2]: of the noise, which a step's number is folded into."""
        return np.frombuffer(hashlib.sha256(b"podwright noise" + self.secret).digest()[:8], np.uint32)


def laid_out(config: Config, mesh: Mesh | AbstractMesh) -> DataConfig:
    """The data's section with the rows that a step's arrays have: of a private run room for all units that may be drawn."""
    privacy, data = config.privacy, config.data
    if not privacy.epsilon:
        return data
    multiple = rules_for(mesh).size("batch", mesh) * privacy.together
    return dataclasses.replace(data, batch_size=privacy.rows * most_units(data.batch_size, multiple))


def promise_of(config: Config, data: Dataset, folder: RunFolder) -> tuple[str, float] | None:
    """Secret and noise of a run, made anew or as they were; None on hosts that don't own its folder. Raises ConfigError,
    StorageError."""
    settings, number = config.privacy, units_of(config, data)[2]
    if settings.delta * number >= 1:
        raise ConfigError(
            f"{settings.show('delta')} is not below one over the {number:,} units of the training data: with that, giving away "
            f"a whole unit would count as private; at most {1 / (10 * number):.1g} is sensible"
        )
    if config.data.batch_size > number:
        raise ConfigError(f"{config.data.show('batch_size')} is more than the {number:,} units of the training data")
    return kept(config, folder, number) if folder.owner else None


def opened(config: Config, mesh: Mesh, data: Dataset, promise: tuple[str, float]) -> tuple[Privacy, Dataset]:
    """A run's privacy, and its data drawn by it."""
    settings, (secret, noise) = config.privacy, promise
    examples, (starts, members), number = units_of(config, data)
    privacy = Privacy(
        epsilon=settings.epsilon,
        delta=settings.delta,
        delta_left=delta_left(config),
        units=number,
        expected=config.data.batch_size,
        noise=noise,
        secret=bytes.fromhex(secret),
        secret_seed=settings.seed < 0,
    )
    room = laid_out(config, mesh).batch_size // settings.rows
    drawn = DrawnUnits(
        examples,
        starts,
        members,
        room,
        settings.rows,
        privacy.rate,
        privacy.secret,
        repeat=config.data.kind == "images",
    )
    content = {name: value for name, value in data.manifest.items() if name not in ("hash", "counts")}
    content |= {"order": ALGORITHM, "units": number, "unit": settings.unit, "rows_a_unit": settings.rows}
    summary = (
        *data.summary,
        f"drawn by Poisson sampling: {privacy.expected} of {number:,} units a step in expectation, room for {room}",
    )
    return privacy, dataclasses.replace(
        data,
        manifest=manifest_of(content, {**data.manifest["counts"], "units": number}),
        train=drawn,
        batch_size=room * settings.rows,
        rows=hosts.host_rows(mesh, room * settings.rows),
        shuffled=False,
        summary=summary,
    )


def units_of(config: Config, data: Dataset) -> tuple[Any, tuple[np.ndarray, np.ndarray], int]:
    """What rows are read from, `by_unit` of it, and how many units there are. Raises ConfigError where the data names no groups."""
    examples: Any = stretches(data.train) if isinstance(data.train, Rows) else data.train
    if isinstance(data.train, Rows):
        units = examples.document
    elif config.privacy.unit == "example":
        units = np.arange(len(examples))
    elif (units := getattr(examples, "units", None)) is None:
        raise ConfigError(
            f"{config.privacy.show('unit')}, but {config.data.show('source')} does not say whose each image is: a table with a "
            f"column `unit` does (docs/data.md)"
        )
    starts, members = by_unit(units)
    return examples, (starts, members), len(starts) - 1


def delta_left(config: Config) -> float:
    """For the accountant. A batch without room for all of its units is another mechanism than its, so likely and no more."""
    settings = config.privacy
    overflow = OVERFLOW * config.trainer.steps * (1 + math.exp(min(settings.epsilon, MOST_PROTECTING)))
    return max(settings.delta - overflow, settings.delta / 2)


def kept(config: Config, folder: RunFolder, units: int) -> tuple[str, float]:
    """Secret, in hexadecimal digits, and noise multiplier of a run: as its folder has them, or new ones written there."""
    settings = config.privacy
    record, file = folder.path / RECORD, folder.path / SECRET
    try:
        if record.exists() and folder.has_trained():
            saved = json.loads(record.read_text())
            if not file.exists():
                raise StorageError(
                    f"{file} is gone, without which this run cannot draw its noise and its batches as before: bring it back, or "
                    f"give a new --run"
                )
            folder.write(RECORD, recorded(config, units, saved["noise"]))  # with what has been let through since
            return file.read_text(), saved["noise"]
        if folder.has_trained():
            raise ConfigError(
                f"{folder.address} has trained without privacy, which no later step brings back: give a new --run"
            )
        noise = settings.noise or calibrated(config, units)
        secret = secrets.token_bytes(SECRET_BYTES)
        if settings.seed >= 0:
            secret = hashlib.sha256(f"podwright privacy {settings.seed}".encode()).digest()
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "w") as out:
            out.write(secret.hex())
    except OSError as error:
        raise StorageError(f"{file} cannot be kept: {reason(error)}") from None
    folder.write(RECORD, recorded(config, units, noise))
    return secret.hex(), noise


def calibrated(config: Config, units: int) -> float:
    settings, steps = config.privacy, config.trainer.steps
    try:
        return calibrated_noise(settings.epsilon, delta_left(config), config.data.batch_size / units, steps)
    except ValueError as error:
        raise ConfigError(f"{settings.show('epsilon')} cannot be kept over {steps} steps: {error}") from None


def recorded(config: Config, units: int, noise: float) -> str:
    """privacy.json."""
    settings = config.privacy
    promise = {
        "epsilon": settings.epsilon,
        "delta": settings.delta,
        "delta_of_accountant": delta_left(config),
        "unit": settings.unit,
        "units": units,
        "expected_batch": config.data.batch_size,
        "sampling_rate": config.data.batch_size / units,
        "noise": noise,
        "clip": settings.clip,
        "rows_a_unit": settings.rows,
        "secret_seed": settings.seed < 0,
        "log_private": settings.log_private,
    }
    return json.dumps(promise, indent=1) + "\n"


def with_noise(state: Any, abstract: Any, privacy: Privacy | None) -> Any:
    """A State that was made or restored, with the key of its noise if its program has one: the secret is no part of a checkpoint."""
    if privacy is None:
        return state
    key = privacy.key()
    noise = jax.make_array_from_callback(key.shape, abstract.noise.sharding, lambda index: key[index])
    return dataclasses.replace(state, noise=noise)


class Budget:
    """Of one attempt: what earlier ones spent, as the checkpoint that it goes on from says, and what this one may."""

    def __init__(self, privacy: Privacy, start: int, steps: int, meta: dict[str, Any]) -> None:
        """`meta` is the checkpoint's after step `start`, `steps` how many steps the run wants in all."""
        self.privacy, self.start = privacy, start
        self.before = [Stretch(**one) for one in meta.get("privacy", {}).get("stretches", [])]
        left = privacy.steps_left(self.before, steps - start) if steps > start else 0
        self.last = start + left  # step, that the budget allows
        self.spent = privacy.spent(self.before, left)

    def announced(self, wanted: int) -> list[str]:
        """What is promised, in a line or two; and that the steps wanted in all are not all to be had."""
        promise = self.privacy
        by_whom = "a secret of its own" if promise.secret_seed else "privacy.seed, which whoever knows it can undo"
        lines = [
            f"privacy     epsilon {promise.epsilon:g} at delta {promise.delta:g}, noise {promise.noise:g} times the clip, "
            f"rate {promise.rate:.3g} of {promise.units:,} units, from {by_whom}",
        ]
        if self.last < wanted:
            lines.append(f"privacy     the budget ends at step {self.last} of {wanted}: training does, too")
        return lines

    def epsilon(self, step: int) -> float:
        return self.spent(step - self.start)

    def meta(self, step: int) -> dict[str, Any]:
        """For the checkpoint after a step: what was spent, in stretches of steps alike."""
        own = [Stretch(step - self.start, self.privacy.rate, self.privacy.noise)]
        return {
            "privacy": {
                "epsilon": self.epsilon(step),
                "delta": self.privacy.delta,
                "stretches": [dataclasses.asdict(one) for one in [*self.before, *own]],
            }
        }
