"""Small runs of Long Range Arena's kind (arXiv 2303.06349): which steps towards the LRU are needed to remember a row's first token,
and whether an LRU evaluates nested expressions better than a Transformer and a vanilla RNN of its size."""

import functools
import pathlib

import numpy as np

from launch.studies.study import Figures, Study

SEEDS = (6, 7, 8)
COLOURS = ("#762a83", "#1b7837", "#b2182b", "#2166ac", "#888888")
# What plot and table call the runs with these words.
STEPS = {
    "lra-first-token-tiny --model.recurrence diagonal": "diagonal, unit disk",
    "lra-first-token-tiny --model.recurrence ring --model.r_min 0 --model.r_max 0.9": "exponential, at most 0.9",
    "lra-first-token-tiny --model.recurrence ring": "exponential, ring",
    "lra-first-token-tiny": "LRU",
}
LONGER = {f"{words} --data.sequence_length 512": arm for words, arm in STEPS.items()}
MODELS = {
    "lra-listops-tiny --model.recurrence tanh": "vanilla RNN, tanh",
    "lra-listops-tiny-transformer": "Transformer",
    "lra-listops-tiny": "LRU",
}
PUBLISHED = {"lra-listops --model.recurrence tanh": "vanilla RNN, tanh", "lra-listops": "LRU"}
ARMS = STEPS | LONGER | MODELS | PUBLISHED


def runs_of(arms: dict[str, str]) -> tuple[str, ...]:
    """The words of all runs; a seed decides rows and initialisation."""
    return tuple(f"{words} --trainer.seed {seed} --data.seed {seed}" for words in arms for seed in SEEDS)


def measure(runs: dict[str, pathlib.Path]) -> Figures:
    """Of each run the held-out accuracy by step, and the training loss before the first update."""
    from trainer.evaluate import read_config
    from trainer.run_folder import read_metrics

    found: dict[str, dict] = {}
    for words, run in runs.items():
        evaluations = sorted(read_metrics(run, "eval").items())
        arm = found.setdefault(ARMS[words.partition(" --trainer.seed")[0]], {"accuracy": [], "first_loss": []})
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


def table(figures: Figures) -> list[str]:
    lines = [f"{'':<28}{'held-out accuracy by seed':>30}{'mean':>8}{'s.e.':>7}{'loss of step 1':>16}"]
    for arm, found in figures["arms"].items():
        last = np.array(found["accuracy"])[:, -1]
        by_seed = " ".join(f"{one:.3f}" for one in last)
        error = last.std(ddof=1) / len(last) ** 0.5
        lines.append(f"{arm:<28}{by_seed:>30}{last.mean():8.3f}{error:7.3f}{np.mean(found['first_loss']):16.3f}")
    return [*lines, f"the most frequent label alone: {figures['chance']:.3f}"]


def draw(figures: Figures, figure, title: str) -> None:
    axis = figure.subplots()
    for (arm, found), colour in zip(figures["arms"].items(), COLOURS, strict=False):
        accuracy = np.array(found["accuracy"])
        axis.plot(found["steps"], accuracy.mean(axis=0), color=colour, label=arm, marker="o", markersize=3)
        axis.fill_between(found["steps"], accuracy.min(axis=0), accuracy.max(axis=0), color=colour, alpha=0.15, lw=0)
    axis.axhline(figures["chance"], color="grey", linestyle=":", label="the most frequent label")
    axis.set(title=title, xlabel="step", ylabel="held-out accuracy", ylim=(0, 1.03))
    axis.legend(frameon=False)


def study(question: str, title: str, arms: dict[str, str], full: dict[str, str]) -> Study:
    return Study(
        question=question,
        configs=runs_of(arms),
        full=runs_of(full),
        measure=measure,
        table=table,
        draw=functools.partial(draw, title=title),
    )


FIRST_TOKEN = study("which steps towards the LRU remember a row's first token?", "first token", STEPS, LONGER)
LISTOPS = study("does an LRU evaluate expressions better than models of its size?", "short ListOps", MODELS, PUBLISHED)
