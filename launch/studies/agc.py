"""Adaptive gradient clipping (arXiv 2102.06171, section 4): how large a learning rate NFNets bear with it and without."""

import pathlib

from launch.studies.study import Figures, Study

RATES = (0.0125, 0.05, 0.2, 0.8)
FULL_RATES = (0.2, 0.4, 0.8, 1.6)
OFF = {"with": "", "without": " --optimizer.adaptive_clip 0"}
COLOURS = {"with": "#2166ac", "without": "#b2182b"}


def runs(config: str, rates: tuple[float, ...]) -> dict[tuple[float, str], str]:
    """What to train, by learning rate and whether gradients are clipped."""
    return {(rate, how): f"{config} --optimizer.learning_rate {rate:g}{OFF[how]}" for rate in rates for how in OFF}


def measure(folders: dict[str, pathlib.Path]) -> Figures:
    """Held-out metrics at the end; of a run that diverged (and so ended itself) how far it came."""
    from trainer.evaluate import read_config
    from trainer.run_folder import read_metrics

    found = []
    for (rate, how), words in [*runs("agc", RATES).items(), *runs("nfnet-f0", FULL_RATES).items()]:
        if words not in folders:
            continue
        steps, evaluations = (read_metrics(folders[words], kind) for kind in ("train", "eval"))
        ended = max(steps) >= read_config(folders[words]).trainer.steps
        last = evaluations[max(evaluations)] if ended else {"error_rate": None, "loss": None}
        row = {"error": last["error_rate"], "loss": last["loss"], "diverged_at": None if ended else max(steps)}
        found.append({"rate": rate, "clipping": how, **row})
    return {"runs": found}


def table(figures: Figures) -> list[str]:
    lines = [f"{'learning rate':<16}{'with clipping':>28}{'without':>28}"]
    for rate in sorted({run["rate"] for run in figures["runs"]}):
        cells = {run["clipping"]: in_words(run) for run in figures["runs"] if run["rate"] == rate}
        lines.append(f"{rate:<16g}{cells['with']:>28}{cells['without']:>28}")
    return lines


def in_words(run: dict) -> str:
    if run["diverged_at"]:
        return f"diverged at step {run['diverged_at']}"
    return f"{100 * run['error']:.1f} % wrong, loss {run['loss']:.3f}"


def draw(figures: Figures, figure) -> None:
    axes = figure.subplots()
    for how, colour in COLOURS.items():
        kept = [run for run in figures["runs"] if run["clipping"] == how and not run["diverged_at"]]
        lost = [run["rate"] for run in figures["runs"] if run["clipping"] == how and run["diverged_at"]]
        rates, errors = [run["rate"] for run in kept], [100 * run["error"] for run in kept]
        axes.plot(rates, errors, marker="o", color=colour, label=f"{how} adaptive clipping")
        axes.plot(lost, [100] * len(lost), linestyle="", marker="x", color=colour)
        for rate in lost:
            axes.annotate("diverged", (rate, 100), (0, -12), textcoords="offset points", ha="center", color=colour)
    axes.set(xscale="log", xlabel="peak learning rate", ylabel="held-out images classified wrongly, %", ylim=(-3, 108))
    ticks = sorted({run["rate"] for run in figures["runs"]})
    axes.set_xticks(ticks, [f"{rate:g}" for rate in ticks])
    axes.minorticks_off()
    axes.legend(frameon=False)


STUDY = Study(
    question="how large a learning rate does an NFNet bear, with adaptive gradient clipping and without?",
    configs=tuple(runs("agc", RATES).values()),
    full=tuple(runs("nfnet-f0", FULL_RATES).values()),
    measure=measure,
    table=table,
    draw=draw,
    may_diverge=True,
)
