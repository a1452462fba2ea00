"""fairness.html: everything that is needed to judge how evenly image classifiers do, in one file; and its plots."""

from typing import Any

import numpy as np

from launch import disparity
from launch.curves import COLOURS
from launch.disparity import Group, Values
from launch.fairness import Measures, Table
from launch.page import facts, heading, page, paragraph, plot, table
from launch.studies.study import new_figure

DRAWN = 30  # groups of one panel
INCH = 0.17  # of a group and a run

READING = (
    "Intervals are of 95 %, percentiles of {resamples:,} bootstrap samples of the images. All runs are measured on the same "
    "samples, so the interval of a difference is of the pair. It says how far other images could move a number, not how far "
    "another seed of training could."
)
MEASURES = (
    "Worst gap: the least of (group - overall). Largest relative error: the most of (1 - group) / (1 - overall). Both are of the "
    "lowest group, named beside them. Of many small groups one is low by chance: hold a gap against its interval, and against the "
    "same gap of the other run."
)


def fairness_page(about: dict[str, Any], tables: list[Table], figures: dict[str, Any]) -> str:
    """`about` is what fairness.json has beside the measures."""
    steps = ", ".join(f"{name} at step {step:,}" for name, step in about["steps"].items())
    kind = "labels, each true or not" if about["many_labels"] else "classes"
    overall, (gaps, errors), groups = tables[0], tables[1:3], tables[3:]
    parts = [
        paragraph(f"{steps}, on {about['images']:,} held-out images of {len(about['labels']):,} {kind}."),
        paragraph(READING.format(resamples=about["resamples"])),
        heading(overall.title),
        table(overall.heads, overall.rows),
    ]
    first = next(iter(about["steps"]))
    for name, differing in about["settings"].items():
        parts.append(heading(f"What differs: {first} → {name}", 3))
        parts.append(facts(tuple(one.split(": ", 1)) for one in differing) if differing else paragraph("No setting."))
    parts += [heading("Disparities"), paragraph(MEASURES), plot(figures["fairness-disparities"])]
    for one in (gaps, errors):
        parts += [heading(one.title, 3), table(one.heads, one.rows)]
    parts += [heading("Groups"), plot(figures["fairness-groups"])]
    for one in groups:
        parts += [heading(one.title, 3), table(one.heads, one.rows)]
    if about["notes"]:
        parts += [heading("What is not in these numbers"), facts(tuple(note.split(": ", 1)) for note in about["notes"])]
    return page(f"Fairness of {' and '.join(about['steps'])}", parts)


def plots(runs: list[Measures]) -> dict[str, Any]:
    """Figures by the name of their files."""
    figures = {"fairness-groups": new_figure(), "fairness-disparities": new_figure()}
    draw_groups(runs, figures["fairness-groups"])
    draw_disparities(runs, figures["fairness-disparities"])
    return figures


def draw_groups(runs: list[Measures], figure: Any) -> None:
    """A panel for the classes and for each attribute: accuracy, or AUC of many labels, with the overall one as a line."""
    by = {name: groups for name, groups in runs[0].by.items() if groups}
    shown = {name: lowest(groups, headline(name, runs[0])) for name, groups in by.items()}
    heights = [max(len(rows), 2) for rows in shown.values()]
    figure.set_size_inches(8, sum(heights) * row_height(runs) + 0.5 * len(by) + 0.7)
    panels = figure.subplots(len(by), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (name, rows) in zip(panels, shown.items(), strict=True):
        metric, groups = headline(name, runs[0]), by[name]
        for number, run in enumerate(runs):
            whole = run.overall["macro AUC" if metric == "AUC" else metric]
            axes.axvline(whole[0], color=COLOURS[number % len(COLOURS)], linewidth=0.8, linestyle="--")
            bars(axes, [run.by[name][i].metrics[metric] for i in rows], number, len(runs), run.name)
        part = f", the lowest {len(rows)} of {len(groups):,}" if len(rows) < len(groups) else ""
        axes.set_title(f"{metric} by {name}{part}", loc="left", fontsize=9)
        rows_named(axes, [f"{groups[i].name} ({groups[i].count:,})" for i in rows])
    legend(figure, panels[0])
    figure.supxlabel("dashed: overall; in brackets: images", fontsize="medium")


def draw_disparities(runs: list[Measures], figure: Any) -> None:
    """Left the worst gaps, right the largest relative errors."""
    keys = list(dict.fromkeys((by, metric) for by, metric, _ in runs[0].disparities))
    figure.set_size_inches(8, max(len(keys), 2) * (row_height(runs) + 0.1) + 1.1)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, measure, even in zip(panels, disparity.MEASURES, (0, 1), strict=True):
        axes.axvline(even, color="black", linewidth=0.8)
        for number, run in enumerate(runs):
            values = [run.disparities[by, metric, measure][0] for by, metric in keys]
            bars(axes, values, number, len(runs), run.name)
        axes.set_title(f"{measure} ({even}: all groups alike)", loc="left", fontsize=9)
        rows_named(axes, [f"{metric} by {by}" for by, metric in keys])
    legend(figure, panels[0])


def bars(axes: Any, rows: list[Values], number: int, runs: int, label: str) -> None:
    """Values and intervals of one run, from above, beside those of the others."""
    places = np.arange(len(rows)) + 0.6 * ((number + 0.5) / runs - 0.5)
    colour = COLOURS[number % len(COLOURS)]
    axes.plot([values[0] for values in rows], places, "o", color=colour, markersize=4, label=label)
    for place, values in zip(places, rows, strict=True):
        axes.plot(disparity.interval(values), [place, place], "-", color=colour, linewidth=1.5, alpha=0.6)


def rows_named(axes: Any, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)


def legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=4, frameon=False)


def row_height(runs: list[Measures]) -> float:
    return INCH * max(len(runs), 1.3)


def headline(by: str, run: Measures) -> str:
    """The metric that is drawn: the last of those whose disparities are measured."""
    return [metric for name, metric, _ in run.disparities if name == by][-1]


def lowest(groups: list[Group], metric: str) -> list[int]:
    """The groups with the least values, in the order of all."""
    return sorted(np.argsort([group.metrics[metric][0] for group in groups], kind="stable")[:DRAWN].tolist())
