"""What the probe of context voids found, in the rows of its tables."""

from typing import Any


def with_bounds(of: dict[str, float], digits: int = 2) -> str:
    return f"{of['value']:.{digits}f} ({of['low']:.{digits}f} to {of['high']:.{digits}f})"


VOID_HEADS = ("question", "void filled", "preference or mean", "right if stated", "specific, drawn", "refused, drawn")
EFFECT_HEADS = ("marker", "question", "effect", "p, Holm", "answers flipped (by wording)", "JS, bits (by wording)")
BBQ_HEADS = ("question", "biased side", "unknown if open", "s_AMB", "right if stated", "s_DIS")
CASCADE_HEADS = ("question", "void filled, of its text", "drift", "preference, of its text", "drift")


def void_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row a question: filled, preference or expected value, right where stated, sampled."""
    rows: list[tuple[str, ...]] = []
    for name, of in found["questions"].items():
        drawn = found.get("sampled", {}).get(name)
        rows.append(
            (
                name,
                with_bounds(of["void_filling"]),
                with_bounds(of["preference"] if "preference" in of else of["expected"]),
                with_bounds(of["accuracy_stated"]) if "accuracy_stated" in of else "",
                *((with_bounds(drawn["hallucination"]), with_bounds(drawn["refusal"])) if drawn else ("", "")),
            )
        )
    return rows


def effect_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            row["marker"],
            row["question"],
            with_bounds(row),
            f"{row['p_holm']:.4f}{' *' if row['p_holm'] < 0.05 else ''}",
            f"{row['flips']:.3f} ({row['wording_flips']:.3f})",
            f"{row['js']:.4f} ({row['wording_js']:.4f})",
        )
        for row in found["effects"]
    ]


def bbq_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row for each question and side that counts as biased."""
    return [
        (
            row["question"],
            row["side"],
            with_bounds(row["accuracy_ambiguous"]),
            with_bounds(row["s_AMB"]),
            with_bounds(found["questions"][row["question"]]["accuracy_stated"]),
            with_bounds(row["s_DIS"]),
        )
        for row in found["bbq"]
    ]


def impact_table(found: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Heads and rows: a column for each group, a row for each question."""
    groups = list(next(iter(found["impact"].values()), {}))
    rows = [(question, *(with_bounds(of) for of in ratios.values())) for question, ratios in found["impact"].items()]
    return ("selected by", *groups), rows


def cascade_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    names = ("void_filling", "void_filling_drift", "preference", "preference_drift")
    return [(question, *(with_bounds(of[name]) for name in names)) for question, of in found.get("cascade", {}).items()]


def table(found: dict[str, Any]) -> list[str]:
    lines = [f"step {found['step']} of {found['run']}: {found['cvs']} CVs; in brackets 95 % intervals", ""]
    tables = (
        (VOID_HEADS, void_rows(found)),
        (EFFECT_HEADS, effect_rows(found)),
        (BBQ_HEADS, bbq_rows(found)),
        impact_table(found),
        (CASCADE_HEADS, cascade_rows(found)),
    )
    for heads, rows in tables:
        if not rows:
            continue
        widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (heads, *rows)
        ]
        lines.append("")
    for name, of in found.get("planted", {}).items():
        lines.append(
            f"{name} against what was planted: Spearman {of['spearman']:.2f}, slope {of['slope']:.2f}, stereotype score "
            f"{of['stereotype_score']:.2f}"
        )
    return lines
