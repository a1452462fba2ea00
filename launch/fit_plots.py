"""Plots of scaling laws: all families over compute; of each its parabolas, residuals and the largest budget foreseen."""

from typing import Any

import numpy as np

from launch.fit_family import Family
from launch.studies.study import COLOURS, new_figure

OTHERS = ("#762a83", "#e08214", "#5e9e9a", "#666666")  # of families without a colour of their own


def plots(families: list[Family]) -> dict[str, Any]:
    """Figures by the name of their files."""
    figures = {"fit-loss": new_figure()}
    draw_loss(families, figures["fit-loss"])
    for family in families:
        for name, draw, there in (
            ("isoflop", draw_parabolas, family.parabolas),
            ("residuals", draw_residuals, family.law),
            ("prediction", draw_foreseen, family.foreseen),
        ):
            if there:
                figures[f"fit-{name}-{family.name}"] = new_figure()
                draw(family, figures[f"fit-{name}-{family.name}"])
    return figures


def colours(families: list[Family]) -> dict[str, str]:
    others = [family.name for family in families if family.name not in COLOURS]
    return COLOURS | {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(others)}


def draw_loss(families: list[Family], figure: Any) -> None:
    """Every run, the frontier and its law, and the parametric law's loss where compute is spent best."""
    axes, of = figure.subplots(), colours(families)
    ends = [min(f.flops.min() for f in families), max(f.flops.max() for f in families)]
    span = np.geomspace(ends[0], 10 * ends[1], 100)
    for family in families:
        colour, front = of[family.name], family.frontier
        axes.plot(family.flops, family.loss, "o", color=colour, alpha=0.35, markersize=4)
        axes.plot(
            family.flops[front],
            family.loss[front],
            "o",
            color=colour,
            markersize=6,
            label=f"{family.name}, best of a budget",
        )
        if family.power:
            axes.plot(
                span, family.power(span), "--", color=colour, label=f"{family.power.a:.3g} C^{family.power.b:.4f}"
            )
        if family.law:
            best = [family.law.optimum(c, family.k)["loss"][0] for c in span]
            axes.plot(
                span, best, "-", color=colour, linewidth=1, label=f"{family.name}, parametric at its best N and D"
            )
    axes.set(xscale="log", yscale="log", xlabel="training FLOPs C", ylabel="held-out loss, nats")
    ticks(axes.yaxis, (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0), "%.3g")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def ticks(axis: Any, subs: tuple[float, ...], form: str) -> None:
    """Of a logarithmic axis: at these multiples of powers of ten alone, 2.5 and not 2.5 x 10^0."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator

    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FormatStrFormatter(form))
    axis.set_minor_formatter("")


def draw_parabolas(family: Family, figure: Any) -> None:
    """Left the losses of each budget with their parabola, right the minima with N* = n0 C^a."""
    from matplotlib import colormaps

    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    shades = colormaps["viridis"](np.linspace(0, 0.85, len(family.parabolas)))
    for parabola, shade in zip(family.parabolas, shades, strict=True):
        of = np.abs(np.log(family.flops / parabola.flops)) < 0.05
        sizes = np.geomspace(parabola.sizes.min(), parabola.sizes.max(), 60)
        left.plot(family.sizes[of], family.loss[of], "o", color=shade, markersize=4)
        left.plot(sizes, parabola(sizes), "-", color=shade, label=f"{parabola.flops:.1e}")
        if parabola.inside:
            size = np.exp(parabola.log_size)
            left.plot(size, parabola(size), "D", color=shade, markeredgecolor="black", markersize=6)
            right.plot(parabola.flops, size, "D", color=shade, markeredgecolor="black", markersize=6)
    if family.iso:
        span = np.geomspace(family.parabolas[0].flops, 10 * family.parabolas[-1].flops, 40)
        line = [family.iso.optimum(c) for c in span]
        right.plot(
            span, [size for size, _ in line], "-", color="black", linewidth=1, label=f"N* ∝ C^{family.iso.a:.3f}"
        )
        right.fill_between(span, *zip(*(interval for _, interval in line), strict=True), color="black", alpha=0.12)
        right.legend(frameon=False)
    left.set(xscale="log", xlabel="parameters N", ylabel="held-out loss, nats")
    right.set(xscale="log", yscale="log", xlabel="training FLOPs C", ylabel="N*")
    ticks(left.xaxis, (1.0, 3.0), "%.0e")
    minima = [(p.flops, np.exp(p.log_size)) for p in family.parabolas if p.inside]
    for axis, values in zip((right.xaxis, right.yaxis), zip(*minima, strict=True), strict=False):
        axis.set_ticks(values, [f"{value:.2g}" for value in values])
        axis.set_minor_formatter("")
    left.legend(frameon=False, title="FLOPs", fontsize=7)


def draw_residuals(family: Family, figure: Any) -> None:
    """Of the parametric fit, over each of what it depends on: a slope or a bend is what the law does not have."""
    assert family.law is not None
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, values, name in ((left, family.sizes, "parameters N"), (right, family.examples, f"{unit_of(family)} D")):
        axes.axhline(0, color="black", linewidth=0.8)
        points = axes.scatter(values, 100 * family.law.residuals, c=np.log10(family.flops), cmap="viridis", s=18)
        axes.set(xscale="log", xlabel=name)
        axes.xaxis.set_minor_formatter("")
    left.set_ylabel("measured over fitted loss - 1, %")
    figure.colorbar(points, ax=[left, right], label="log10 of FLOPs")


def draw_foreseen(family: Family, figure: Any) -> None:
    """What was predicted for the largest budget without it, and what came out."""
    axes = figure.subplots()
    names = [f"{one.run.name}, {one.method}" for one in family.foreseen]
    places = np.arange(len(names))[::-1]
    for place, one in zip(places, family.foreseen, strict=True):
        low, high = one.interval
        axes.plot([low, high], [place, place], "-", color="#2166ac", linewidth=5, alpha=0.35, solid_capstyle="butt")
        axes.plot(one.predicted, place, "|", color="#2166ac", markersize=12, markeredgewidth=2)
        axes.plot(one.run.loss, place, "o", color="#1b7837" if one.inside else "#b2182b", markersize=5)
    axes.set_yticks(places, names)
    axes.set_ylim(-0.6, len(names) - 0.4)
    figure.supxlabel("held-out loss, nats: bars predicted, dots measured (red where outside)", fontsize="medium")
    figure.set_figheight(max(1.8, 0.32 * len(names) + 0.9))


def unit_of(family: Family) -> str:
    return "images" if family.runs[0].config.data.kind == "images" else "tokens"
