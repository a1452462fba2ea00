"""How models learn facts (arXiv 2503.21676): three phases, the plateau against the population, what shortens it, what models say
of people they never saw, and what new people do to old ones."""

import itertools
import pathlib
from collections.abc import Iterable

import numpy as np

from launch.studies.study import BESIDE, COLOURS, Figures, Study, family

SIZES, FULL_SIZES = (512, 1024, 2048, 4096), (4096, 16_384, 65_536, 262_144)
LEFT, LEARNED = 1.02, 0.95  # of the no-knowledge loss: generic statistics are known below the one, people below the other
OTHERS = (0.98, 0.9)  # in place of LEARNED
ARMS = ("uniform", "power:0.8", "warmup:512:128", "warmup:512:256")
SEEDS = (10, 11, 12, 13, 14)
KNOWN, NEW = 1024, 128
REPLAYS = (0, 0.125, 1)


def of_size(mixer: str, people: int, size: str = "-tiny") -> str:
    return f"facts-{mixer}{size} --data.population {people}"


def of_arm(sampling: str, seed: int) -> str:
    return (
        f"facts-transformer-tiny --data.population 2048 --data.sampling {sampling} --data.seed {seed} --trainer.seed {seed} "
        f"--trainer.steps 1000 --eval.every 10"
    )


def of_replay(weight: float) -> str:
    return (
        f"facts-transformer-tiny --finetune.base {BESIDE}/facts-transformer-tiny-population-{KNOWN} --data.first {KNOWN} "
        f"--data.population {NEW} --data.replay {weight:g} --optimizer.schedule constant --optimizer.learning_rate 3e-4 "
        f"--trainer.steps 400 --eval.every 10"
    )


def measure(runs: dict[str, pathlib.Path]) -> Figures:
    """Whatever of the study's parts has been trained."""
    sizes = [
        {"family": mixer, "people": people, **phases(runs[words])}
        for mixer, people, size in itertools.product(COLOURS, (*SIZES, *FULL_SIZES), ("-tiny", ""))
        if (words := of_size(mixer, people, size)) in runs
    ]
    arms = [
        {"sampling": sampling, "seed": seed, **phases(runs[words])}
        for sampling, seed in itertools.product(ARMS, SEEDS)
        if (words := of_arm(sampling, seed)) in runs
    ]
    replays = [
        {"replay": weight, **tuning(runs[words], runs[of_size("transformer", KNOWN)])}
        for weight in REPLAYS
        if (words := of_replay(weight)) in runs
    ]
    laws = {mixer: law for mixer in COLOURS if (law := plateau_law([s for s in sizes if s["family"] == mixer]))}
    return {"sizes": sizes, "laws": laws, "arms": arms, "replays": replays}


def curves_of(run: pathlib.Path, names: Iterable[str]) -> dict[str, list[float]]:
    """Evaluations of a run: "step" and the metrics of these names."""
    from trainer.run_folder import read_metrics

    records = sorted(read_metrics(run, "eval").items())
    return {"step": [step for step, _ in records], **{name: [r[name] for _, r in records] for name in names}}


def phases(run: pathlib.Path) -> dict:
    """Where a run's phases end, its curves, and what it says of seen and unseen people at the end."""
    from data.biographies import no_knowledge
    from trainer.evaluate import read_config

    config = read_config(run)
    baseline = no_knowledge(config.data)  # type: ignore[arg-type]
    names = ("attribute_loss", "attribute_accuracy", "max_probability", "entropy")
    curves = curves_of(run, (*names, *(f"unseen_{name}" for name in names)))
    steps, losses = np.array(curves["step"]), np.array(curves["attribute_loss"])
    return {
        "baseline": baseline,
        "curves": curves,
        "generic_at": first_below(steps, losses, LEFT * baseline),
        "known_at": stays_below(steps, losses, LEARNED * baseline),
        "known_at_other": [stays_below(steps, losses, share * baseline) for share in OTHERS],
    }


def first_below(steps: np.ndarray, losses: np.ndarray, limit: float) -> int | None:
    below = np.flatnonzero(losses <= limit)
    return int(steps[below[0]]) if len(below) else None


def stays_below(steps: np.ndarray, losses: np.ndarray, limit: float) -> int | None:
    """The first evaluation (steps, losses: [E]) from which on no loss is above the limit."""
    above = np.flatnonzero(losses > limit)
    first = above[-1] + 1 if len(above) else 0
    return int(steps[first]) if first < len(steps) else None


def plateau_law(sizes: list[dict]) -> dict | None:
    """log(step at which the plateau ends) = log(scale) + exponent log(people), by least squares: with the 95 % interval of the
    exponent (Student's t) and R^2. None of fewer than three runs that left the plateau."""
    ended = [(s["people"], s["known_at"]) for s in sizes if s["known_at"]]
    if len(ended) < 3:
        return None
    from scipy import stats

    people, steps = np.log(np.array(ended, np.float64)).T
    fit = stats.linregress(people, steps)
    half = stats.t.ppf(0.975, len(ended) - 2) * fit.stderr
    return {
        "exponent": float(fit.slope),
        "interval": [float(fit.slope - half), float(fit.slope + half)],
        "scale": float(np.exp(fit.intercept)),
        "r_squared": float(fit.rvalue**2),
    }


def tuning(run: pathlib.Path, base: pathlib.Path) -> dict:
    """Accuracy and loss of people from before and of new ones; step 0 is the base, which has not seen the new ones."""
    names = ("attribute_accuracy", "attribute_loss")
    before, after = curves_of(base, names), curves_of(run, (*names, *(f"earlier_{name}" for name in names)))
    unseen = curves_of(base, [f"unseen_{name}" for name in names])
    found = {"step": [0, *after["step"]]}
    for name in names:
        found[f"old_{name}"] = [before[name][-1], *after[f"earlier_{name}"]]
        found[f"new_{name}"] = [unseen[f"unseen_{name}"][-1], *after[name]]
    return found


STUDY = Study(
    question="when do models learn facts about people, and what do they say of people they do not know?",
    configs=(
        *(of_size("transformer", people) for people in SIZES),
        *map(of_replay, REPLAYS),
        *(of_size(mixer, people) for mixer in ("griffin", "hawk") for people in SIZES),
        *(of_arm(sampling, seed) for seed in SEEDS for sampling in ARMS),
    ),
    full=tuple(of_size(mixer, people, "") for mixer in COLOURS for people in FULL_SIZES),
    measure=measure,
    table=lambda figures: [],
    draw=lambda figures, figure: None,
)
