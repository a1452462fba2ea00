"""`podwright audit RUN`: a lower bound on epsilon from guesses at which canaries a run was trained with (arXiv 2305.08846)."""

import json
from dataclasses import asdict, dataclass

import numpy as np

from configs.schema import Config, ConfigError, ImageData, NFNetConfig
from launch.audit_bound import CONFIDENCE, best_guesses

USAGE = "podwright audit RUN [--delta D] [--json FILE]"
DELTA = 1e-5  # of a run that claims none


class GuaranteeError(Exception):
    """A private run that shows more than it promised: one sentence for the user."""


@dataclass(frozen=True)
class Claim:
    """(epsilon, delta) that the checkpoint of a private run says was spent on it."""

    epsilon: float
    delta: float


@dataclass(frozen=True)
class Audit:
    run: str
    step: int
    canaries: int  # m
    included: int
    guesses: int  # r
    correct: int  # v
    delta: float
    confidence: float
    bound: float  # of epsilon, from below
    claimed: float | None

    @property
    def broken(self) -> bool:
        return self.claimed is not None and self.bound > self.claimed

    def told(self) -> list[str]:
        sure = f"{100 * self.confidence:g} %"
        lines = [
            f"step {self.step} of {self.run}: {self.canaries:,} canaries, {self.included:,} of them in; {self.guesses:,} guesses, "
            f"{self.correct:,} correct",
            f"epsilon is at least {self.bound:.4g} at delta {self.delta:g} ({sure} confidence)",
        ]
        if self.claimed is None:
            return [*lines, "the run claims no epsilon"]
        lines.append(f"claimed is {self.claimed:.4g}")
        if not self.broken:
            lines.append(
                "that is consistent with the claim, and proves nothing: what this attack misses another may find"
            )
        return lines


def main(argv: list[str]) -> int:
    from launch.cli import Parser

    parser = Parser(prog="podwright audit", usage=USAGE)
    parser.add_argument("run", metavar="RUN", help="folder of a run with canaries (data.canaries)")
    parser.add_argument("--delta", type=float, help=f"of a run that is not private; default {DELTA:g}")
    parser.add_argument("--json", metavar="FILE", help="the same figures, as JSON")
    options = parser.parse_args(argv)
    from trainer.evaluate import read_config

    config, run = read_config(options.run), options.run
    if not isinstance(config.model, NFNetConfig) or not isinstance(config.data, ImageData):
        raise ConfigError(f"{run} is a model of text: only image runs have canaries")
    if not config.data.canaries:
        raise ConfigError(
            f"{run} was trained without canaries, and nothing can be guessed: train a run with --data.canaries 200, say "
            f"(docs/audit.md)"
        )
    if options.delta is not None:
        if config.privacy.epsilon:
            raise ConfigError(
                f"--delta {options.delta:g} is not for a private run: {run} claims {config.privacy.delta:g}, leave it out"
            )
        if not 0 <= options.delta < 1:
            raise ConfigError(f"--delta {options.delta:g} is out of range: 0 or more and below 1 is allowed")
    from launch.plan import file_for

    file = file_for("json", options.json) if options.json else None
    found = audit(run, config, DELTA if options.delta is None else options.delta)
    print("\n".join(found.told()))
    if file:
        file.write_text(json.dumps({**asdict(found), "broken": found.broken}, indent=1) + "\n")
    if found.broken:
        raise GuaranteeError(
            f"the guarantee does not hold: {run} claims epsilon {found.claimed:.4g} at delta {found.delta:g}, but its canaries "
            f"show at least {found.bound:.4g}"
        )
    return 0


def audit(run: str, config: Config, delta: float) -> Audit:
    """Of the newest checkpoint; `delta` is for a run that claims none. Raises ConfigError, DataError, StorageError."""
    step, scores, included = scored(run, config)
    claim = claim_of(run, step)
    delta = claim.delta if claim else delta
    guesses, correct, bound = best_guesses(scores, included, delta)
    return Audit(
        run=run,
        step=step,
        canaries=len(included),
        included=int(included.sum()),
        guesses=guesses,
        correct=correct,
        delta=delta,
        confidence=CONFIDENCE,
        bound=bound,
        claimed=claim.epsilon if claim else None,
    )


def claim_of(run: str, step: int) -> Claim | None:
    """None of a run that is not private."""
    from trainer.saved import SavedSteps
    from trainer.storage import folder_of

    said = SavedSteps(folder_of(run) / "checkpoints").manifest(step).get("privacy")
    return Claim(said["epsilon"], said["delta"]) if said else None


def scored(run: str, config: Config) -> tuple[int, np.ndarray, np.ndarray]:
    """Step, scores float64 [m] and coins bool [m] of the newest checkpoint, the average if it keeps one.

    A score is minus the loss at the canary's label, the mean over its views: the higher, the likelier it was in. Canaries are in
    the order of their source, and the model is all of the training that a score knows.
    """
    import functools

    import jax

    from data import open_data
    from data.bad_records import taken_from
    from sharding.mesh import make_mesh, simulate_devices
    from sharding.rules import rules_for
    from trainer.evaluate import load_model, place_batch
    from trainer.tasks import NORMALISERS, logit_of

    assert isinstance(config.data, ImageData)
    simulate_devices(config.mesh)
    mesh, data = make_mesh(config.mesh), open_data(config.data)
    check_same(run, data.manifest)
    canaries, dtype = data.canaries, jax.numpy.dtype(config.trainer.compute_dtype)
    normaliser, rules = NORMALISERS[config.data.loss], rules_for(mesh)
    place = functools.partial(place_batch, mesh=mesh, spec=rules.spec)
    divided = rules.size("batch", mesh)
    rows = -(-config.data.batch_size // divided) * divided

    @jax.jit
    def program(model, batch):
        logits = model(batch["images"], dtype=dtype, dropout_key=None)
        return (logit_of(logits, batch["labels"]) - normaliser(logits)) * batch["weights"]

    count = canaries.views * len(canaries.included)
    found = []
    with jax.set_mesh(mesh):
        model, step = load_model(run, config, mesh)
        for first in range(0, count, rows):
            wanted = np.minimum(np.arange(first, first + rows), count - 1)  # the last one fills the last batch
            batch = canaries.examples.views(wanted // canaries.views, wanted)
            taken_from(batch)  # of an image that cannot be used every score is 0
            found.append(np.asarray(program(model, place(batch)), np.float64))
    scores = np.concatenate(found)[:count].reshape(-1, canaries.views).mean(axis=1)
    if not np.isfinite(scores).all():
        raise ConfigError(f"step {step} of {run} has losses that are not finite, it has diverged: give another run")
    return step, scores, canaries.included


def check_same(run: str, now: dict) -> None:
    """Raises DataError where a run's images are not what it was trained with: guesses at other canaries would say nothing."""
    from data.dataset import DataError
    from trainer.run_folder import read_manifest

    saved = read_manifest(run)
    # A private run has an order of its own in its manifest, and units.
    changed = sorted(name for name in now.keys() - {"hash", "counts", "order"} if now[name] != saved.get(name))
    if changed:
        raise DataError(
            f"the data of {run} changed since it was trained ({', '.join(changed)}): bring the old data back to audit it"
        )
