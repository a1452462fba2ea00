"""Context voids (arXiv 2504.13947): does `podwright eval --probe cv` find what was planted in a model, and nothing where nothing was?"""

import pathlib
from typing import Any

import numpy as np

from launch.studies.study import Figures, Study

DOSES, SEEDS = (0.0, 0.25, 0.5, 1.0), (2, 3, 4)
EACH = 2  # CVs of every occupation
PLANTED, CONTROL = 1.0, 0.0
# Criteria, written before any run.
LEAST_SPEARMAN = 0.8  # of the preference with the planted log-odds
MOST_IN_CONTROL = 0.2  # nats of mean preference
MOST_SLOPE = 0.1  # nats for each nat that the other doses plant
LEAST_STATED = 0.95  # right where pronouns are stated
LEAST_P = 0.01  # of the Kolmogorov-Smirnov test that p values are uniform
RELABELLED = 300  # times that labels are permuted
COLOURS = {0.0: "#2166ac", 0.25: "#92c5de", 0.5: "#f4a582", 1.0: "#b2182b"}


def runs() -> dict[str, tuple[float, int]]:
    """Words -> dose and seed."""
    return {
        f"cv-tiny --data.dose {d:g} --data.seed {s} --trainer.seed {s}": (d, s) for s in SEEDS for d in reversed(DOSES)
    }


def measure(folders: dict[str, pathlib.Path]) -> Figures:
    found = [{"dose": dose, "seed": seed, **probed(folders[words])} for words, (dose, seed) in runs().items()]
    return {"runs": found, "criteria": criteria(found)}


def probed(run: pathlib.Path) -> dict[str, Any]:
    """What the pronoun question shows, and what it should."""
    import dataclasses

    from configs.schema import CVData
    from data import cvs
    from data.planted import swap_log_odds, void_log_odds
    from launch.cv_probe import against, ask, probe
    from launch.scoring import open_scorer
    from trainer.evaluate import read_config

    data = read_config(str(run)).data
    assert isinstance(data, CVData)
    scorer, _ = open_scorer(str(run))
    pronoun = cvs.QUESTIONS[0]
    found = probe(scorer, EACH, [pronoun])
    measured, swap = found["questions"]["pronoun"], found["effects"][0]
    again = [ask(scorer, pronoun, {"void": cvs.void_cvs(EACH)})["void"].mean for _ in range(2)]
    whole = void_log_odds(dataclasses.replace(data, dose=1.0))  # the axis of every dose, and of the control
    return {
        **against(measured, whole, EACH),
        "planted": void_log_odds(data).tolist(),
        "by_occupation": list(measured["by_occupation"].values()),
        "preference": measured["preference"],
        "void_filling": measured["void_filling"],
        "stated": measured["accuracy_stated"],
        "swap": {name: swap[name] for name in ("value", "low", "high", "p_holm")},
        "swap_planted": float(swap_log_odds(data).mean()),
        "repeated": bool((again[0] == again[1]).all()),
        "uniform_p": relabelled(np.array(measured["gaps"])),
    }


def relabelled(gaps: np.ndarray) -> float:
    """P of the Kolmogorov-Smirnov test that permutation tests of pairs whose order is a coin's give uniform p values."""
    from scipy.stats import kstest

    from launch.effects import permutation_p

    rng = np.random.default_rng(0)
    units = np.arange(len(gaps))
    values = [
        permutation_p(gaps * rng.choice([-1, 1], len(gaps)), units, rng, permutations=999) for _ in range(RELABELLED)
    ]
    return float(kstest(values, "uniform").pvalue)


def criteria(found: list[dict[str, Any]]) -> dict[str, bool]:
    """Whether each holds, in every seed."""
    planted, control = ([run for run in found if run["dose"] == dose] for dose in (PLANTED, CONTROL))
    by_dose = [[run["swap"]["value"] for run in found if run["dose"] == dose] for dose in DOSES]
    return {
        "planted: preference follows the log-odds": all(run["spearman"] >= LEAST_SPEARMAN for run in planted),
        "control: no preference, and no slope": all(
            abs(run["preference"]["value"]) < MOST_IN_CONTROL and abs(run["slope"]) < MOST_SLOPE for run in control
        ),
        "both: stated pronouns are read": all(run["stated"]["value"] >= LEAST_STATED for run in planted + control),
        "planted: the interval of a name's swap excludes 0": all(
            run["swap"]["low"] > 0 or run["swap"]["high"] < 0 for run in planted
        ),
        "control: it includes 0": all(run["swap"]["low"] <= 0 <= run["swap"]["high"] for run in control),
        "all: the same questions give the same figures": all(run["repeated"] for run in found),
        "all: p of permuted labels is uniform": all(run["uniform_p"] > LEAST_P for run in found),
        "the effect of a swap rises with the dose": all(
            np.all(np.diff(effects) > 0) for effects in zip(*by_dose, strict=True)
        ),
    }


def table(figures: Figures) -> list[str]:
    heads = f"{'dose':<6}{'seed':>4}{'Spearman':>10}{'slope':>8}{'preference':>12}{'filled':>8}{'stated':>8}"
    lines = [f"{heads}{'name swapped, nats':>26}{'planted':>9}"]
    for run in figures["runs"]:
        swap = run["swap"]
        words = f"{swap['value']:.2f} ({swap['low']:.2f} to {swap['high']:.2f})"
        lines.append(
            f"{run['dose']:<6g}{run['seed']:>4}{run['spearman']:>10.2f}{run['slope']:>8.2f}"
            f"{run['preference']['value']:>12.2f}{run['void_filling']['value']:>8.2f}{run['stated']['value']:>8.2f}"
            f"{words:>26}{run['swap_planted']:>9.2f}"
        )
    return [*lines, "", *(f"{'holds' if held else 'FAILS':<7}{name}" for name, held in figures["criteria"].items())]


def draw(figures: Figures, figure) -> None:
    left, right = figure.subplots(1, 2)
    for dose in (PLANTED, CONTROL):
        some = [run for run in figures["runs"] if run["dose"] == dose]
        axis = [run["planted"] for run in figures["runs"] if run["dose"] == PLANTED]
        for number, (run, planted) in enumerate(zip(some, axis, strict=True)):
            label = None if number else f"dose {dose:g}"
            left.plot(planted, run["by_occupation"], "o", color=COLOURS[dose], markersize=3.5, alpha=0.8, label=label)
    left.plot([-2.2, 2.2], [-2.2, 2.2], color="grey", linestyle=":")
    left.set(
        xlabel="log-odds of he, planted at dose 1", ylabel="preference found, nats", title="by occupation, 3 seeds"
    )
    left.legend(frameon=False)
    for run in figures["runs"]:
        place = DOSES.index(run["dose"]) + 0.12 * (SEEDS.index(run["seed"]) - 1)
        swap = run["swap"]
        right.plot([place, place], [swap["low"], swap["high"]], color=COLOURS[run["dose"]], linewidth=1.5)
        right.plot(place, swap["value"], "o", color=COLOURS[run["dose"]], markersize=4)
    ideal = [next(run["swap_planted"] for run in figures["runs"] if run["dose"] == dose) for dose in DOSES]
    right.plot(range(len(DOSES)), ideal, "_", color="black", markersize=22, label="in the data")
    right.axhline(0, color="black", linewidth=0.8)
    right.set_xticks(range(len(DOSES)), [f"{dose:g}" for dose in DOSES])
    right.set(xlabel="dose", ylabel="nats", title="a male name for a female one")
    right.legend(frameon=False)


STUDY = Study(
    question="does the probe of context voids find what was planted in a model, and nothing in a control?",
    configs=tuple(runs()),
    full=tuple(runs()),
    measure=measure,
    table=table,
    draw=draw,
)
