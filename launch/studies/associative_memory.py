"""What new pairs do to a memory of old ones (arXiv 2503.21676, appendix F.4): the paper's model of how new facts corrupt what a
language model knows.

A network of one hidden layer learns keys' values and then others'. Key_value_memory.py trains and measures it.
"""

import itertools
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from launch.studies.study import Figures, Study, mean_and_error

# Frozen before the study ran, as are the criteria below. The seeds of the pilot were 0 and 1.
SEEDS = (10, 11, 12, 13, 14)
COUNTS = (128, 256, 512, 1024, 2048)  # of new pairs: 1/64 to 1/4 of the old ones, as many as the paper's new people
REPLAYS = (1 / 32, 1 / 8, 1)  # the weight of an old pair, of the paper's 1/32 to 2
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
LOADS = (1024, 2048, 4096, 8192)  # old pairs
EARLY = 200  # steps in which the collapse is to come
POINTS = 0.2  # that make a loss or a gain
LEARNED = 0.9


@dataclass(frozen=True)
class Arm:
    """The paper's numbers, but for what is given. It doesn't say the betas: 0.999 is AdamW's own, as its decay of 0.01 is, 0.95
    that of its language models."""

    old: int = 8192
    new: int = 128
    rate: float = 1e-3
    replay: float = 0.0
    beta2: float = 0.999


PAPER, MANY = Arm(), Arm(new=COUNTS[-1])
ARMS = tuple(
    dict.fromkeys(
        (
            *(Arm(old=load, new=count) for load in LOADS for count in COUNTS),
            *(Arm(new=count, rate=rate) for count in (PAPER.new, MANY.new) for rate in RATES),
            *(Arm(replay=weight) for weight in REPLAYS),
            *(Arm(new=count, beta2=0.95) for count in COUNTS),
        )
    )
)


def measure() -> Figures:
    """Trains, too."""
    from launch.studies.key_value_memory import LOOKS, learned, started, tuned

    data, blank = started(SEEDS)
    arms: list[dict[str, Any]] = []
    for old, beta2 in dict.fromkeys((arm.old, arm.beta2) for arm in ARMS):
        memories = learned(SEEDS, data, blank, old, beta2)
        for arm in (arm for arm in ARMS if (arm.old, arm.beta2) == (old, beta2)):
            curves = tuned(SEEDS, data, memories, asdict(arm))
            arms.append(asdict(arm) | {name: np.asarray(each).tolist() for name, each in curves.items()})
            print(f"  {arm}", flush=True)
    figures: Figures = {"seeds": SEEDS, "step": (0, *LOOKS), "arms": arms}
    return figures | {"criteria": criteria(figures)}


# --- what curves say ---------------------------------------------------------------------------------------------------------


def found(figures: Figures, arm: Arm) -> dict[str, Any]:
    return next(one for one in figures["arms"] if {name: one[name] for name in asdict(arm)} == asdict(arm))


def at_last(record: dict[str, Any], name: str) -> np.ndarray:
    """The last of each seed's curve (S)."""
    return np.array(record[name])[:, -1]


def collapse(figures: Figures, record: dict[str, Any]) -> list[tuple[int, float] | None]:
    """Of each seed the first step at which old pairs have lost POINTS, and what share new ones have gained by then; None where
    they never lose as much."""
    answers: list[tuple[int, float] | None] = []
    for old, new in zip(np.array(record["old_right"]), np.array(record["new_right"]), strict=True):
        lost = np.flatnonzero(old <= old[0] - POINTS)
        answers.append((figures["step"][lost[0]], float(new[lost[0]] - new[0])) if len(lost) else None)
    return answers


def early_loss(figures: Figures, record: dict[str, Any]) -> np.ndarray:
    """The most that old pairs are below their start in the first EARLY steps (S)."""
    old = np.array(record["old_right"])
    return old[:, 0] - old[:, np.array(figures["step"]) <= EARLY].min(axis=1)


def points(values: np.ndarray) -> str:
    mean, error = mean_and_error(100 * np.asarray(values))
    return f"{mean:.1f} ({error:.1f})"


def above(values: np.ndarray) -> bool:
    """Whether the mean of seeds is above 0 by 2 standard errors."""
    mean, error = mean_and_error(values)
    return bool(mean > 2 * error)


def criteria(figures: Figures) -> list[dict[str, Any]]:
    """Each criterion, what was measured, and whether it is met."""
    rows: list[dict[str, Any]] = []

    def expect(what: str, measured: str, met: bool) -> None:
        rows.append({"criterion": what, "measured": measured, "met": bool(met)})

    paper = found(figures, PAPER)
    for arm, words in ((PAPER, ""), (MANY, " (the pilot's prediction)")):
        order = collapse(figures, found(figures, arm))
        expect(
            f"{arm.new:,} new pairs: old ones lose {100 * POINTS:g} points before new ones gain as much, every seed{words}",
            ", ".join("never" if one is None else f"step {one[0]}: {100 * one[1]:+.0f}" for one in order),
            all(one is not None and one[1] < POINTS for one in order),
        )
    losses = early_loss(figures, paper)
    expect(
        f"{PAPER.new} new pairs: old ones lose {100 * POINTS:g} points within {EARLY} steps",
        points(losses),
        losses.mean() >= POINTS,
    )
    for fewer, more in itertools.pairwise(COUNTS):
        gap = at_last(found(figures, Arm(new=fewer)), "old_right") - at_last(found(figures, Arm(new=more)), "old_right")
        expect(f"{more:,} new pairs leave fewer old ones right than {fewer:,}, by 2 s.e.", points(gap), above(gap))
    for count in COUNTS:
        new = at_last(found(figures, Arm(new=count)), "new_right")
        expect(f"{count:,} new pairs: {100 * LEARNED:g} % of them right at the end", points(new), new.mean() >= LEARNED)
    for weight in REPLAYS:
        replayed = found(figures, Arm(replay=weight))
        gap = at_last(replayed, "old_right") - at_last(paper, "old_right")
        expect(f"replay {weight:g}: more old pairs right at the end, by 2 s.e.", points(gap), above(gap))
    for weight in REPLAYS:
        less = early_loss(figures, found(figures, Arm(replay=weight)))
        kept = less.mean() / early_loss(figures, paper).mean()
        expect(
            f"replay {weight:g}: old pairs lose at least half as much in the first {EARLY} steps",
            f"{kept:.2f}",
            kept >= 0.5,
        )
    return rows


# --- what is shown -----------------------------------------------------------------------------------------------------------


def table(figures: Figures) -> list[str]:
    heads = ("old right, %", f"lost by {EARLY}", "at last", "new at last", "lost 20 at")
    lines = [
        f"means (standard errors) of {len(figures['seeds'])} seeds, in points; at which step old ones had lost {100 * POINTS:g}: what "
        f"new ones had gained",
        f"{'old':>6}{'new':>7}{'rate':>8}{'replay':>8}{'beta2':>7}" + "".join(f"{head:>19}" for head in heads),
    ]
    for one in figures["arms"]:
        order = [each for each in collapse(figures, one) if each]
        step, gained = np.mean(order, axis=0) if order else (math.nan, math.nan)
        some = f" ({len(order)} seeds)" if len(order) < len(figures["seeds"]) else ""
        cells = (
            points(np.array(one["old_right"])[:, 0]),
            points(early_loss(figures, one)),
            points(at_last(one, "old_right")),
            points(at_last(one, "new_right")),
            f"{step:.0f}: {100 * gained:.1f}{some}" if order else "never",
        )
        lines.append(
            f"{one['old']:>6,}{one['new']:>7,}{one['rate']:>8g}{one['replay']:>8.3g}{one['beta2']:>7g}"
            + "".join(f"{cell:>19}" for cell in cells)
        )
    rows = [f"{'yes' if one['met'] else 'NO':<5}{one['criterion']}: {one['measured']}" for one in figures["criteria"]]
    return [*lines, "", *rows]


def draw(figures: Figures, figure) -> None:
    figure.set_size_inches(8.5, 6.6)
    (counts, replays), (loads, rates) = figure.subplots(2, 2)
    draw_curves(figures, counts, {f"{count:,} new": Arm(new=count) for count in COUNTS})
    draw_curves(figures, replays, {f"replay {arm.replay:g}": arm for arm in (PAPER, *(Arm(replay=w) for w in REPLAYS))})
    counts.set(title=f"{PAPER.old:,} old pairs, rate {PAPER.rate:g}: new pairs (dashed)")
    replays.set(title=f"{PAPER.new} new pairs (dashed): replay")
    lines = {f"{load:,} old": [Arm(old=load, new=count) for count in COUNTS] for load in LOADS}
    draw_order(figures, loads, COUNTS, lines | {"8,192 old, β₂ 0.95": [Arm(new=count, beta2=0.95) for count in COUNTS]})
    loads.set(xlabel="new pairs")
    loads.set_xticks(COUNTS, [f"{count:,}" for count in COUNTS])
    both = (PAPER.new, MANY.new)
    draw_order(figures, rates, RATES, {f"{new:,} new": [Arm(new=new, rate=rate) for rate in RATES] for new in both})
    rates.set(xlabel="rate", xlim=(RATES[0] / 1.2, RATES[-1] * 1.2))
    for axes in (counts, replays, loads, rates):
        axes.legend(frameon=False, fontsize=7)


def draw_order(figures: Figures, axes, x: tuple[float, ...], lines: dict[str, list[Arm]]) -> None:
    """What new pairs had gained when old ones had lost POINTS, of each seed that gets there, and the mean."""
    for place, (label, arms) in enumerate(lines.items()):
        gained = [[each[1] for each in collapse(figures, found(figures, arm)) if each] for arm in arms]
        colour = shade(place, len(lines))
        shown = [(at, one) for at, one in zip(x, gained, strict=True) if one]
        axes.plot([at for at, _ in shown], [np.mean(one) for _, one in shown], color=colour, label=label)
        axes.plot([at for at, one in shown for _ in one], [each for _, one in shown for each in one], ".", color=colour)
    axes.axhline(POINTS, color="grey", linestyle=":")
    axes.set(title="new pairs learned when 20 points of old are lost", xscale="log", ylabel="share", ylim=(-0.03, 1.03))
    axes.minorticks_off()


def draw_curves(figures: Figures, axes, arms: dict[str, Arm]) -> None:
    for place, (label, arm) in enumerate(arms.items()):
        for name, dashes in (("old_right", "-"), ("new_right", "--")):
            each = np.array(found(figures, arm)[name])
            style = {"color": shade(place, len(arms)), "linestyle": dashes, "linewidth": 1.2}
            axes.plot(figures["step"], each.mean(axis=0), label=label if name == "old_right" else None, **style)
    axes.axvline(EARLY, color="grey", linestyle=":")
    axes.set_xscale("symlog", linthresh=1)
    axes.set(xlabel="step", ylabel="share right", xlim=(0, None), ylim=(-0.03, 1.03))


def shade(place: int, count: int) -> tuple[float, float, float]:
    """From blue to red."""
    share = place / (count - 1)
    return 0.13 + 0.57 * share, 0.40 - 0.31 * share, 0.67 - 0.50 * share


STUDY = Study(
    question="what do new pairs of keys and values do to those that a small memory knows?",
    configs=(),
    full=(),
    measure=lambda runs: measure(),
    table=table,
    draw=draw,
)
