"""fit.html: everything that is needed to judge a fit of scaling laws, in one file."""

import shlex
from typing import Any

import numpy as np

from launch import scaling_laws as laws
from launch.fit_family import Family, Next, Optimum, verdict
from launch.fit_plots import unit_of
from launch.page import heading, page, paragraph, plot, table, verbatim
from launch.points import Run, left_out


def fit_page(
    title: str,
    runs: list[Run],
    families: list[Family],
    general: list[str],
    budgets: list[float],
    nexts: dict[str, tuple[Next, str]],
    figures: dict[str, Any],
) -> str:
    """`runs` are all that were found, `general` warnings that belong to no family, `nexts` runs to do next and their files."""
    out = left_out(runs)
    parts = [
        paragraph(
            f"{len(runs)} runs, {sum(len(f.runs) for f in families)} points: the best run of each family, size and length. N "
            f"counts all parameters, the embedding's too; C is matrix FLOPs; losses are held-out, in nats, of the last step. "
            f"Intervals are of 95 %."
        ),
        plot(figures["fit-loss"]),
        table(*law_table(families)),
    ]
    if out:
        parts += [
            heading("Left out"),
            paragraph(f"{len(out)} of {len(runs)} runs ended without a final loss."),
            verbatim("\n".join(out)),
        ]
    if general:
        parts += [heading("Warnings"), *map(paragraph, general)]
    for family in families:
        parts += family_parts(family, budgets, nexts.get(family.name), figures)
    return page(title, parts)


def law_table(families: list[Family]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: every fitted coefficient with its interval."""
    rows = []
    for family in families:
        if family.power:
            law = f"{family.name}, frontier: loss = a C^b"
            rows.append([law, "a", f"{family.power.a:.4g}", ""])
            rows.append([law, "b", f"{family.power.b:.5f}", span(family.power.b_interval, ".5f")])
        if family.iso:
            a, (low, high) = family.iso.a, family.iso.a_interval
            rows.append([f"{family.name}, isoFLOP: N* ∝ C^a", "a", f"{a:.4f}", span((low, high), ".4f")])
            rows.append(
                [f"{family.name}, isoFLOP: D* ∝ C^(1-a)", "1 - a", f"{1 - a:.4f}", span((1 - high, 1 - low), ".4f")]
            )
        if family.law:
            law = f"{family.name}, parametric: loss = E + A/N^alpha + B/D^beta"
            for name, (value, interval) in family.law.coefficients().items():
                rows.append([law, name, f"{value:.4g}", span(interval, ".4g")])
    return ["law", "", "value", "95 %"], rows


def family_parts(
    family: Family, budgets: list[float], following: tuple[Next, str] | None, figures: dict[str, Any]
) -> list[str]:
    parts = [heading(family.name)]
    for words in (*family.skipped, *family.warnings):
        parts.append(paragraph(f"{words[0].upper()}{words[1:]}."))
    if f"fit-isoflop-{family.name}" in figures:
        parts += [heading("Parabolas of equal FLOPs", 3), plot(figures[f"fit-isoflop-{family.name}"])]
    if family.law:
        spread = float(np.sqrt((family.law.residuals**2).sum() / (len(family.runs) - 5)))
        parts += [
            heading("Residuals of the parametric law", 3),
            paragraph(
                f"Standard deviation {100 * spread:.2f} % of the loss, {len(family.runs)} points, 5 coefficients."
            ),
            plot(figures[f"fit-residuals-{family.name}"]),
        ]
    if family.foreseen:
        parts += [heading("The largest budget, foreseen", 3), *map(paragraph, verdict(family))]
        parts.append(plot(figures[f"fit-prediction-{family.name}"]))
    if optima := [one for flops in budgets for one in family.optima(flops)]:
        parts += [heading("The best use of a budget", 3), table(*optima_table(family, optima))]
        parts.append(
            paragraph(
                f"With C = k N D, k = {family.k:.4g}, the median of these runs. The frontier's interval is of one more run, the others' of the law."
            )
        )
    if following:
        run, file = following
        parts += [
            heading("What to train next", 3),
            paragraph(
                f"{run.flops:.2e} FLOPs; the {run.method} law wants {run.wanted:.3g} parameters, the nearest known size has "
                f"{run.size:.3g}. The other settings are those of {run.based_on}."
            ),
            *(paragraph(f"But {note}.") for note in run.notes),
            verbatim(shlex.join(["podwright", "train", file])),
        ]
    elif family.fitted:
        parts.append(
            paragraph("No method says which size is best for a budget, so there is no config of a run to do next.")
        )
    parts += [heading("Points", 3), table(*points_table(family))]
    return parts


def optima_table(family: Family, optima: list[Optimum]) -> tuple[list[str], list[list[str]]]:
    rows = [
        [
            one.method,
            f"{one.flops:.3g}",
            f"{one.size:.3g}" if one.size else "",
            span(one.size_interval, ".3g") if one.size_interval else "",
            f"{one.examples:.3g}" if one.examples else "",
            f"{one.loss:.4f}" if one.loss else "",
            span(one.loss_interval, ".4f") if one.loss_interval else "",
        ]
        for one in optima
    ]
    return ["method", "FLOPs", "N*", "95 %", f"D*, {unit_of(family)}", "loss", "95 %"], rows


def points_table(family: Family) -> tuple[list[str], list[list[str]]]:
    fitted = np.exp(np.log(family.loss) - family.law.residuals) if family.law else None
    rows = [
        [
            run.name,
            f"{run.parameters:,}",
            f"{run.examples:,.0f}",
            f"{run.flops:.3e}",
            f"{run.rate:g}",
            f"{run.loss:.4f}",
            f"{fitted[i]:.4f}" if fitted is not None else "",
            "*" if i in family.frontier else "",
        ]
        for i, run in enumerate(family.runs)
    ]
    return ["run", "N", f"D, {unit_of(family)}", "C", "rate", "loss", "parametric", "frontier"], rows


def span(interval: laws.Interval, form: str) -> str:
    if np.isnan(interval).any():
        return "not determined"
    return f"{interval[0]:{form}} to {interval[1]:{form}}"
