"""What privacy costs a small NFNet, and whom: MNIST's digits from scratch and from a public run (arXiv 2204.13650, 2308.10888)."""

import itertools
import pathlib

import numpy as np

from launch.studies.study import BESIDE, Figures, Study

PUBLIC = "digits-public"
EPSILONS, RATES, OPEN_RATES = (1, 2, 4, 8), (1.0, 2.0), (0.3, 1.0)
# How training begins, and what of the model learns.
WAYS = {
    "from scratch": "",
    "all layers": f"--finetune.base {BESIDE}/{PUBLIC}",
    "classifier": f"--finetune.base {BESIDE}/{PUBLIC} --finetune.learns head",
}
OPEN = "--privacy.epsilon 0 --optimizer.beta1 0.9 --optimizer.adaptive_clip 0.01"
COLOURS = {"from scratch": "#b2182b", "all layers": "#2166ac", "classifier": "#1b7837"}
INKS = ("thin", "middle", "thick")  # thirds of the held-out images, by how much ink they have
FULL = tuple(
    f"nfnet-f3-{data}-private --privacy.epsilon {epsilon}"
    for data, epsilon in itertools.product(("imagenet", "places365", "chexpert", "mimic"), (0.5, 1, 2, 4, 8))
)


def runs() -> dict[str, tuple[str, int | None, float]]:
    """Words -> how, epsilon (None where nothing is private) and rate."""

    def of(epsilons: tuple[int | None, ...], rates: tuple[float, ...]) -> dict[str, tuple[str, int | None, float]]:
        return {
            f"mnist-private {words} {f'--privacy.epsilon {epsilon}' if epsilon else OPEN} "
            f"--optimizer.learning_rate {rate:g}": (way, epsilon, rate)
            for way, words in WAYS.items()
            for epsilon, rate in itertools.product(epsilons, rates)
        }

    return of(EPSILONS, RATES) | of((None,), OPEN_RATES)


def measure(folders: dict[str, pathlib.Path]) -> Figures:
    found = []
    for words, (way, epsilon, rate) in runs().items():
        row = {"way": way, "epsilon": epsilon, "rate": rate}
        found.append(row | accuracies(folders[words]))
    settings = [(way, epsilon) for way in WAYS for epsilon in (*EPSILONS, None)]
    groups = [[row for row in found if (row["way"], row["epsilon"]) == setting] for setting in settings]
    return {"runs": found, "best": [max(group, key=lambda row: row["accuracy"]) for group in groups]}


def accuracies(run: pathlib.Path) -> dict:
    """Held-out accuracy with its interval, and the worst gaps of classes and of thirds by ink."""
    from launch import disparity
    from launch.fairness import scored_of
    from trainer.evaluate import read_config

    one = scored_of(run.name, str(run), read_config(run))
    counts = disparity.example_counts(len(one.labels), disparity.resamples_for(one.scores.size))
    every = np.arange(len(one.labels))
    overall = disparity.measured("all", one.scores, one.labels, counts, every).metrics
    groups = {
        "class": disparity.by_label(one.scores, one.labels, counts, one.label_names),
        "ink": disparity.by_value(one.scores, one.labels, counts, by_ink(run)),
    }
    gaps = {by: disparity.disparities(overall, members, "accuracy")["worst gap"] for by, members in groups.items()}
    return {
        "accuracy": float(overall["accuracy"][0]),
        "interval": disparity.interval(overall["accuracy"]),
        **{f"{by}_gap": float(values[0]) for by, (values, _) in gaps.items()},
        **{f"{by}_interval": disparity.interval(values) for by, (values, _) in gaps.items()},
    }


def by_ink(run: pathlib.Path) -> np.ndarray:
    """One of INKS for each held-out image, str [N]."""
    from data import open_data
    from trainer.evaluate import read_config

    held_out = open_data(read_config(run).data).held_out
    ink = held_out.read(np.arange(len(held_out)))["images"].mean(axis=(1, 2, 3))
    return np.array(INKS)[np.searchsorted(np.quantile(ink, (1 / 3, 2 / 3)), ink)]


def table(figures: Figures) -> list[str]:
    lines = [
        f"{'':<14}{'epsilon':>8}{'rate':>6}{'right, %':>10}{'95 %':>16}{'worst class':>13}{'worst third by ink':>20}"
    ]
    for row in figures["best"]:
        low, high = (100 * bound for bound in row["interval"])
        epsilon = "none" if row["epsilon"] is None else row["epsilon"]
        lines.append(
            f"{row['way']:<14}{epsilon:>8}{row['rate']:>6g}{100 * row['accuracy']:>10.1f}{f'{low:.1f} to {high:.1f}':>16}"
            f"{100 * row['class_gap']:>+13.1f}{100 * row['ink_gap']:>+20.1f}"
        )
    return lines


def draw(figures: Figures, figure) -> None:
    left, right = figure.subplots(1, 2)
    for axes, name, span in ((left, "accuracy", "interval"), (right, "class_gap", "class_interval")):
        for i, (way, colour) in enumerate(COLOURS.items()):
            rows = [row for row in figures["best"] if row["way"] == way]
            private = [row for row in rows if row["epsilon"] is not None]
            place = np.arange(len(private)) + 0.06 * (i - 1)
            values = np.array([row[name] for row in private])
            bars = np.abs(np.array([row[span] for row in private]).T - values)
            axes.errorbar(place, values, bars, color=colour, marker="o", capsize=2, linewidth=1.2, label=way)
            axes.axhline(rows[-1][name], color=colour, linestyle=":", linewidth=1.2)
        axes.set_xticks(range(len(EPSILONS)), [str(epsilon) for epsilon in EPSILONS])
        axes.set_xlabel("epsilon (dotted: not private)")
    left.set_ylabel("held-out accuracy")
    right.set_ylabel("worst class less all")
    left.legend(frameon=False)


STUDY = Study(
    question="what does privacy cost a small NFNet on MNIST's digits, and whom, from scratch and from a public run?",
    configs=(PUBLIC, *runs()),
    full=FULL,
    measure=measure,
    table=table,
    draw=draw,
)
