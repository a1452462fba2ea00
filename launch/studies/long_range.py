"""Small runs of Long Range Arena's kind (arXiv 2303.06349): which steps from a vanilla RNN towards the LRU are needed to remember
a row's first token, and whether an LRU evaluates nested expressions better than a Transformer and a vanilla RNN of its size."""

import functools
import itertools
import pathlib
from collections.abc import Callable

import numpy as np

from launch.studies.study import Figures, Study, mean_and_error

# Models of one size, by their words without a learning rate.
STEPS = {
    "lra-first-token-tiny --model.recurrence tanh --model.state_size 20": "vanilla RNN, tanh",
    "lra-first-token-tiny-transformer": "Transformer",
    "lra-first-token-tiny --model.recurrence dense --model.state_size 20": "linear RNN",
    "lra-first-token-tiny --model.recurrence diagonal": "diagonal",
    "lra-first-token-tiny --model.recurrence exponential": "exponential",
    "lra-first-token-tiny --model.recurrence ring --model.r_min 0 --model.r_max 0.9": "exponential, at most 0.9",
    "lra-first-token-tiny --model.recurrence ring": "exponential, ring",
    "lra-first-token-tiny": "LRU",
}
MODELS = {
    "lra-listops-tiny --model.recurrence tanh --model.state_size 80": "vanilla RNN, tanh",
    "lra-listops-tiny-transformer": "Transformer",
    "lra-listops-tiny": "LRU",
}
PUBLISHED = {"lra-listops --model.recurrence tanh": "vanilla RNN, tanh", "lra-listops": "LRU"}
COLOURS = {
    "vanilla RNN, tanh": "#e08214",
    "Transformer": "#b2182b",
    "linear RNN": "#8c510a",
    "diagonal": "#762a83",
    "exponential": "#9970ab",
    "exponential, at most 0.9": "#888888",
    "exponential, ring": "#1b7837",
    "LRU": "#2166ac",
}


# Of each the rate that is best at the end in launch/sweeps/long_range.py, among equals the one with the best mean by step.
STEP_RATES = {
    "vanilla RNN, tanh": 3e-2,
    "Transformer": 1e-2,
    "linear RNN": 3e-3,
    "diagonal": 1e-2,
    "exponential": 1e-2,
    "exponential, at most 0.9": 1e-2,
    "exponential, ring": 1e-2,
    "LRU": 3e-2,
}
MODEL_RATES = {"vanilla RNN, tanh": 1e-2, "Transformer": 3e-3, "LRU": 1e-2}


def runs_of(arms: dict[str, str], rates: dict[str, float], seeds: range, more: str = "") -> dict[str, str]:
    """The words of all runs, and the model of each; a seed decides rows and initialisation."""
    return {
        f"{words} --optimizer.learning_rate {rates[arm]:g}{more} --trainer.seed {seed} --data.seed {seed}": arm
        for words, arm in arms.items()
        for seed in seeds
    }


FIRST_TOKEN_RUNS = runs_of(STEPS, STEP_RATES, range(10, 15))
LONGER_RUNS = runs_of(STEPS, STEP_RATES, range(10, 15), " --data.sequence_length 512")
LISTOPS_RUNS = runs_of(MODELS, MODEL_RATES, range(10, 13))
PUBLISHED_RUNS = runs_of(PUBLISHED, dict.fromkeys(PUBLISHED.values(), 3e-3), range(3))
ARMS = FIRST_TOKEN_RUNS | LONGER_RUNS | LISTOPS_RUNS | PUBLISHED_RUNS


def measure(runs: dict[str, pathlib.Path]) -> Figures:
    """Of each run the held-out accuracy by step, and the training loss before the first update."""
    from trainer.evaluate import read_config
    from trainer.run_folder import read_metrics

    found: dict[str, dict] = {}
    for words, run in runs.items():
        evaluations = sorted(read_metrics(run, "eval").items())
        arm = found.setdefault(ARMS[words], {"accuracy": [], "first_loss": []})
        arm["steps"] = [step for step, _ in evaluations]
        arm["accuracy"].append([1 - record["error_rate"] for _, record in evaluations])
        arm["first_loss"].append(read_metrics(run, "train")[1]["loss"])
    return {"arms": found, "chance": majority(read_config(next(iter(runs.values()))))}


def majority(config) -> float:
    """Share of the most frequent label among the held-out rows of the first run."""
    from data import open_data

    labels = np.concatenate(
        [batch["labels"][batch["weights"].any(1)] for batch in open_data(config.data).held_out_batches()]
    )
    return float(np.bincount(labels).max() / len(labels))


def at_the_end(figures: Figures, arm: str) -> np.ndarray:
    """Accuracies, a seed each."""
    return np.array(figures["arms"][arm]["accuracy"])[:, -1]


def beats(figures: Figures, one: str, other: str) -> bool:
    """Whether one model is above another by two standard errors, seed by seed."""
    difference, error = mean_and_error(at_the_end(figures, one) - at_the_end(figures, other))
    return bool(difference > 2 * error)


def first_token_criteria(figures: Figures) -> dict[str, bool]:
    order = ("linear RNN", "diagonal", "exponential", "exponential, ring", "LRU")
    return {
        "LRU: at least 0.95": at_the_end(figures, "LRU").mean() >= 0.95,
        "moduli of at most 0.9: at most 0.25": at_the_end(figures, "exponential, at most 0.9").mean() <= 0.25,
        "LRU over the vanilla RNN by two standard errors": beats(figures, "LRU", "vanilla RNN, tanh"),
        "LRU over the Transformer by two standard errors": beats(figures, "LRU", "Transformer"),
        "no step from linear RNN to LRU costs two standard errors": not any(
            beats(figures, before, after) for before, after in itertools.pairwise(order)
        ),
    }


def listops_criteria(figures: Figures) -> dict[str, bool]:
    """Of --full, which has no Transformer, two of the three."""
    found = {
        "LRU: 15 points over the most frequent value": at_the_end(figures, "LRU").mean() >= figures["chance"] + 0.15,
        "LRU over the vanilla RNN by two standard errors": beats(figures, "LRU", "vanilla RNN, tanh"),
    }
    if "Transformer" in figures["arms"]:
        found["LRU over the Transformer by two standard errors"] = beats(figures, "LRU", "Transformer")
    return found


def table(figures: Figures, criteria: Callable[[Figures], dict[str, bool]]) -> list[str]:
    lines = [f"{'':<26}{'held-out accuracy by seed':>32}{'mean':>8}{'s.e.':>7}{'loss of step 1':>16}"]
    for arm, found in figures["arms"].items():
        last = at_the_end(figures, arm)
        by_seed, (mean, error) = " ".join(f"{one:.3f}" for one in last), mean_and_error(last)
        lines.append(f"{arm:<26}{by_seed:>32}{mean:8.3f}{error:7.3f}{np.mean(found['first_loss']):16.3f}")
    lines += [f"the most frequent label alone: {figures['chance']:.3f}", ""]
    return lines + [f"{'met' if met else 'NOT MET':<9}{criterion}" for criterion, met in criteria(figures).items()]


def draw(figures: Figures, figure, title: str) -> None:
    axis = figure.subplots()
    for arm, found in figures["arms"].items():
        (mean, error), colour = mean_and_error(found["accuracy"]), COLOURS[arm]
        axis.plot(found["steps"], mean, color=colour, label=arm, marker="o", markersize=3)
        axis.fill_between(found["steps"], mean - error, mean + error, color=colour, alpha=0.15, lw=0)
    axis.axhline(figures["chance"], color="grey", linestyle=":", label="the most frequent label")
    axis.set(title=title, xlabel="step", ylabel="held-out accuracy", ylim=(0, 1.03))
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))


FIRST_TOKEN = Study(
    question="which steps towards the LRU remember a row's first token?",
    configs=tuple(FIRST_TOKEN_RUNS),
    full=tuple(LONGER_RUNS),
    measure=measure,
    table=functools.partial(table, criteria=first_token_criteria),
    draw=functools.partial(draw, title="first token"),
)
LISTOPS = Study(
    question="does an LRU evaluate expressions better than models of its size?",
    configs=tuple(LISTOPS_RUNS),
    full=tuple(PUBLISHED_RUNS),
    measure=measure,
    table=functools.partial(table, criteria=listops_criteria),
    draw=functools.partial(draw, title="short ListOps"),
)
