"""ConvNets at scale (arXiv 2310.16764): the best held-out loss for a budget of compute, over sizes, epochs and learning rates."""

import itertools
import pathlib

import numpy as np

from configs.image_studies import SIZES
from launch.studies.study import Figures, Study

EPOCHS, RATES, IMAGES, ROWS = (4, 8, 16, 32), (0.05, 0.1, 0.2), 1423, 64
FULL_SIZES = ("f0", "f1", "f3", "f7", "f3plus", "f7plus")
FULL_EPOCHS, FULL_RATES, FULL_IMAGES, FULL_ROWS = (0.25, 0.5, 1, 2, 4, 8), (0.4, 0.8, 1.6), 4_000_000_000, 4096


def runs() -> dict[str, tuple[str, float, float]]:
    """Size, epochs and learning rate of every run; a schedule ends with its budget, so each budget is a run of its own."""
    return {
        words(f"convnets-scale-{size}", epochs * IMAGES / ROWS, rate): (size, epochs, rate)
        for size, epochs, rate in itertools.product(SIZES, EPOCHS, RATES)
    }


def full_runs() -> dict[str, tuple[str, float, float]]:
    return {
        words(f"nfnet-{size}-pretrain", epochs * FULL_IMAGES / FULL_ROWS, rate): (size, epochs, rate)
        for size, epochs, rate in itertools.product(FULL_SIZES, FULL_EPOCHS, FULL_RATES)
    }


def words(config: str, steps: float, rate: float) -> str:
    return f"{config} --trainer.steps {round(steps)} --optimizer.learning_rate {rate:g}"


def measure(folders: dict[str, pathlib.Path]) -> Figures:
    from trainer.evaluate import read_config
    from trainer.run_folder import read_metrics
    from trainer.tasks import make_task

    grid = {**runs(), **full_runs()}
    found = []
    for name, folder in folders.items():
        size, epochs, rate = grid[name]
        config, evaluations = read_config(folder), read_metrics(folder, "eval")
        flops = make_task(config).flops_per_step * config.trainer.steps
        row = {"size": size, "epochs": epochs, "rate": rate, "flops": flops}
        last = evaluations.get(config.trainer.steps)  # none of a run that diverged
        found.append(row | {"loss": last["loss"] if last else None, "error": last["error_rate"] if last else None})
    best = [min(group, key=lambda row: row["loss"]) for group in by_budget(found)]
    front = frontier(best)
    return {"runs": found, "best": best, "frontier": front, "law": power_law(front)}


def by_budget(found: list[dict]) -> list[list[dict]]:
    """The runs of each size and epochs, at all learning rates."""
    keys = list(dict.fromkeys((row["size"], row["epochs"]) for row in found if row["loss"] is not None))
    return [[row for row in found if (row["size"], row["epochs"]) == key and row["loss"] is not None] for key in keys]


def frontier(best: list[dict]) -> list[dict]:
    """Those that no run with as little compute beats, from the cheapest on."""
    found: list[dict] = []
    for row in sorted(best, key=lambda row: (row["flops"], row["loss"])):
        if not found or row["loss"] < found[-1]["loss"]:
            found.append(row)
    return found


def power_law(front: list[dict]) -> dict[str, float] | None:
    """loss = a C^b through the frontier by least squares of logarithms, with b's standard error; the paper's is a straight line
    in these axes, too. None of fewer than three points."""
    if len(front) < 3:
        return None
    x, y = (np.log([row[name] for row in front]) for name in ("flops", "loss"))
    b, a = np.polyfit(x, y, 1)
    rest = y - (a + b * x)
    error = np.sqrt((rest**2).sum() / (len(x) - 2) / ((x - x.mean()) ** 2).sum())
    return {"a": float(np.exp(a)), "b": float(b), "error": float(error)}


def table(figures: Figures) -> list[str]:
    front = [(row["size"], row["epochs"]) for row in figures["frontier"]]
    lines = [
        f"{'size':<8}{'epochs':>8}{'best rate':>11}{'FLOPs':>11}{'held-out loss':>15}{'wrong, %':>10}  on the frontier"
    ]
    for row in figures["best"]:
        mark = "*" if (row["size"], row["epochs"]) in front else ""
        lines.append(
            f"{row['size']:<8}{row['epochs']:>8g}{row['rate']:>11g}{row['flops']:>11.2e}{row['loss']:>15.4f}"
            f"{100 * row['error']:>10.2f}  {mark}"
        )
    if law := figures["law"]:
        lines.append(f"frontier: loss = {law['a']:.3g} C^{law['b']:.3f} (exponent's standard error {law['error']:.3f})")
    return lines


def draw(figures: Figures, figure) -> None:
    left, right = figure.subplots(1, 2)
    for size in dict.fromkeys(row["size"] for row in figures["best"]):
        rows = [row for row in figures["best"] if row["size"] == size]
        left.plot([row["flops"] for row in rows], [row["loss"] for row in rows], marker="o", label=size)
        right.plot([row["epochs"] for row in rows], [row["rate"] for row in rows], marker="o", label=size)
    if law := figures["law"]:
        ends = np.array([figures["frontier"][0]["flops"], figures["frontier"][-1]["flops"]])
        left.plot(ends, law["a"] * ends ** law["b"], color="black", linestyle="--", label=f"C^{law['b']:.2f}")
    left.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel="best held-out loss")
    right.set(xscale="log", yscale="log", xlabel="epochs", ylabel="best learning rate")
    for axes, name in ((right, "epochs"), (right, "rate")):
        values = sorted({row[name] for row in figures["runs"]})
        getattr(axes, "set_xticks" if name == "epochs" else "set_yticks")(values, [f"{value:g}" for value in values])
    right.minorticks_off()
    left.legend(frameon=False)


STUDY = Study(
    question="how does the best held-out loss of NFNets fall with compute, over sizes, epochs and learning rates?",
    configs=tuple(runs()),
    full=tuple(full_runs()),
    measure=measure,
    table=table,
    draw=draw,
    may_diverge=True,
)
