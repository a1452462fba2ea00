"""`podwright fit SWEEP`: scaling laws of the runs in a folder, a report that says how far to trust them, and what to train next."""

import dataclasses
import json
import math
import pathlib
import shlex
from typing import TYPE_CHECKING, Any

from configs.schema import ConfigError
from configs.store import to_json
from launch.points import Run, best_runs, left_out, read_runs, sweep_folder
from launch.studies.study import new_figure

if TYPE_CHECKING:  # they need scipy
    from launch.fit_family import Family, Next

BEYOND = 10.0  # times the largest budget: the run to do next, unless --budget says another


def main(argv: list[str]) -> int:
    from launch.cli import Parser

    parser = Parser(prog="podwright fit")
    parser.add_argument("sweep", help="a folder that holds run folders, or NAME for runs/sweep-NAME")
    parser.add_argument("--to", help="folder for fit.html, fit.json and the plots; the sweep's own if not given")
    parser.add_argument(
        "--budget", type=float, help="training FLOPs of the run to do next; ten times the largest if not given"
    )
    options = parser.parse_args(argv)
    if options.budget is not None and not 0 < options.budget < math.inf:
        raise ConfigError(
            f"--budget {options.budget:g} is out of range: training FLOPs above 0 are allowed, such as 1e20"
        )
    folder = sweep_folder(options.sweep)
    to = pathlib.Path(options.to).expanduser() if options.to else folder
    if to.exists() and not to.is_dir():
        raise ConfigError(f"--to {to} is a file: give a folder")
    check_packages()
    fit(folder, to, options.budget)
    return 0


def check_packages() -> None:
    try:
        import scipy  # noqa: F401
    except ImportError:
        raise ConfigError("a fit needs scipy, which is not installed: pip install 'podwright[laws]'") from None
    new_figure()  # tells if matplotlib is missing


def fit(folder: pathlib.Path, to: pathlib.Path, budget: float | None) -> None:
    """Read, fit, write and print. Raises ConfigError if no law can be fitted, StorageError if nothing can be written."""
    from launch.fit_family import fit_family, next_run
    from launch.fit_page import fit_page
    from launch.fit_plots import plots
    from trainer.storage import StorageError, reason

    runs = read_runs(folder)
    best, general = best_runs(runs)
    names = list(dict.fromkeys(run.family for run in best))
    families = [fit_family(name, [run for run in best if run.family == name]) for name in names]
    if not any(family.fitted for family in families):
        raise ConfigError(too_few(folder, runs, families))
    largest = max(run.flops for run in best)
    following = budget or BEYOND * largest
    budgets = sorted({largest, BEYOND * largest, BEYOND**2 * largest, following})
    figures = plots(families)
    try:
        to.mkdir(parents=True, exist_ok=True)
        nexts = {}
        for family in families:
            if found := next_run(family, following):
                file = to / f"next-{family.name}.json"
                file.write_text(to_json(found.config) + "\n")
                nexts[family.name] = (found, str(file))
        for name, figure in figures.items():
            figure.savefig(to / f"{name}.svg", metadata={"Date": None})
            figure.savefig(to / f"{name}.png", dpi=150)
        (to / "fit.json").write_text(
            json.dumps(finite(as_json(folder, runs, families, general, budgets, nexts)), indent=1) + "\n"
        )
        (to / "fit.html").write_text(
            fit_page(f"Scaling laws of {folder.name}", runs, families, general, budgets, nexts, figures)
        )
    except OSError as error:
        raise StorageError(f"{to} cannot be written: {reason(error)}") from None
    print("\n".join(summary(runs, families, general, nexts)))
    print(f"\nreport {to / 'fit.html'}, figures {to / 'fit.json'}")


def too_few(folder: pathlib.Path, runs: list[Run], families: list["Family"]) -> str:
    from trainer.storage import few

    points = sum(len(family.runs) for family in families)
    why = "; ".join(f"{family.name}: {', '.join(family.skipped)}" for family in families)
    lost = f" ({few(left_out(runs), '; ')})" if left_out(runs) else ""
    counted = f"{points} point{'s' * (points != 1)} of {len(runs)} run{'s' * (len(runs) != 1)}"
    return f"{folder} has too few points for any law, {counted}{lost}: {why or 'train its runs to their last steps'}"


def summary(
    runs: list[Run], families: list["Family"], general: list[str], nexts: dict[str, tuple["Next", str]]
) -> list[str]:
    """What is printed: the coefficients, what was left out or is doubtful, the verdict, and the next command."""
    from launch.fit_family import verdict
    from launch.fit_page import law_table

    heads, rows = law_table(families)
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [heads, *rows]
    ]
    lines += ["", *(f"left out: {line}" for line in left_out(runs))]
    for family in families:
        lines += [f"{family.name}: {words}" for words in (*family.skipped, *family.warnings, *verdict(family))]
    lines += [f"warning: {words}" for words in general]
    for name, (run, file) in nexts.items():
        lines += [
            f"{name}: next, {run.flops:.2e} FLOPs of {run.size:.3g} parameters: {shlex.join(['podwright', 'train', file])}"
        ]
        lines += [f"{name}: but {note}" for note in run.notes]
    return lines


def as_json(
    folder: pathlib.Path,
    runs: list[Run],
    families: list["Family"],
    general: list[str],
    budgets: list[float],
    nexts: dict[str, tuple["Next", str]],
) -> dict[str, Any]:
    return {
        "sweep": str(folder),
        "runs": [
            {
                "run": run.name,
                "family": run.family,
                "parameters": run.parameters,
                "examples": run.examples,
                "flops": run.flops,
                "learning_rate": run.rate,
                "status": run.status,
                "step": run.step,
                "loss": run.loss,
            }
            for run in runs
        ],
        "warnings": general,
        "families": {family.name: family_json(family, budgets, nexts.get(family.name)) for family in families},
    }


def family_json(family: "Family", budgets: list[float], following: tuple["Next", str] | None) -> dict[str, Any]:
    power, iso, law = family.power, family.iso, family.law
    return {
        "points": [run.name for run in family.runs],
        "frontier": [family.runs[i].name for i in family.frontier],
        "flops_over_n_d": family.k,
        "power_law": power and {"a": power.a, "b": power.b, "b_interval": power.b_interval},
        "iso_flop": iso
        and {
            "a": iso.a,
            "a_interval": iso.a_interval,
            "minima": [{"flops": p.flops, "parameters": math.exp(p.log_size)} for p in iso.parabolas],
        },
        "parametric": law
        and {
            **{name: {"value": value, "interval": span} for name, (value, span) in law.coefficients().items()},
            "residuals": law.residuals.tolist(),
        },
        "largest_budget": [
            {"method": one.method, "run": one.run.name, "predicted": one.predicted, "interval": one.interval}
            | {"measured": one.run.loss, "inside": one.inside}
            for one in family.foreseen
        ],
        "optima": [dataclasses.asdict(one) for flops in budgets for one in family.optima(flops)],
        "next": following and {"file": following[1], "parameters": following[0].size, "flops": following[0].flops},
        "skipped": family.skipped,
        "warnings": family.warnings,
    }


def finite(tree: Any) -> Any:
    """JSON has no NaN: null stands for what is not determined."""
    if isinstance(tree, dict):
        return {name: finite(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
