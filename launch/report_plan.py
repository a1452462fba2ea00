"""What was known of a run before it began, beside what was measured: RUN/plan.json, if `podwright plan --json` left it there."""

import json
import statistics
from typing import Any

from launch import page
from launch.curves import at_window_ends
from launch.plan_table import GIB, ms, number
from launch.run_state import RunState, log_lines
from sharding.topologies import peak_flops
from trainer.announcement import TAKES
from trainer.run_folder import read_metrics
from trainer.storage import reason
from trainer.tasks import make_task

PLAN = "plan.json"


def plan_and_measured(it: RunState) -> list[str]:
    plan, said = read_plan(it)
    rows = measured(it)
    planned = figures_of(plan) if plan else told_at_start(it)
    lines = [(name, planned.get(name, "-"), rows.get(name, "-")) for name in dict.fromkeys([*planned, *rows])]
    parts = [page.paragraph(said)]
    if lines:
        parts.append(page.table(("", "planned", "measured"), lines))
    else:
        parts.append(page.paragraph("Nothing was measured yet."))
    return [*parts, *map(page.paragraph, remarks(it, plan))]


def read_plan(it: RunState) -> tuple[dict[str, Any] | None, str]:
    """The plan and where it is from, or None and why."""
    file = it.run / PLAN
    if not file.exists():
        how = f"podwright plan {it.config.name} --topology T --json {file}"
        return None, f"No plan was recorded. ({how}, with what was given to the run, leaves one for this page.)"
    try:
        plan = json.loads(file.read_text())
        found = f"{plan['config']} on {plan['topology']}, {plan['chips']:,} chips"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, f"{file} is no plan: {reason(error)}."
    if "needs_gib" in plan:
        return None, f"The plan in {file} is of {found}, on which the run does not fit."
    how = "compiled" if "compile_seconds" in plan else "by arithmetic alone: time and memory are at least that"
    return plan, f"The plan in {file} is of {found}, {how}."


def figures_of(plan: dict[str, Any]) -> dict[str, str]:
    parts = {name: size for name, size in plan["hbm_bytes"].items() if name != "capacity"}
    capacity = plan["hbm_bytes"]["capacity"]
    rates = [name for name in plan if name.endswith("_per_second")]
    return {
        "step": ms(plan["step_seconds"]),
        **{a_second(name): number(plan[name]) for name in rates},
        "MFU": f"{100 * plan['mfu']:.1f} %",
        "memory a device": f"{sum(parts.values()) / GIB:.2f} of {capacity / GIB:.2f} GiB",
    }


def told_at_start(it: RunState) -> dict[str, str]:
    """Without a plan: the least time that arithmetic tells of the run's devices, and the memory that their compiler told."""
    found = {}
    peak = peak_flops(it.spent.device_kind) if it.spent else None
    if peak is not None and it.spent is not None:
        least = make_task(it.config).flops_per_step / (peak * it.spent.devices)
        found["step"] = f"at least {ms(least)}, at the devices' peak"
    told = [line.partition(TAKES)[2] for line in log_lines(it.run) if line.startswith("compiled in ")]
    if told and told[-1]:
        found["memory a device"] = f"{told[-1].removesuffix(' a device')}, by the compiler"
    return found


def measured(it: RunState) -> dict[str, str]:
    """Medians over the windows that the log timed, and the largest memory."""
    train = read_metrics(it.run, "train") if "train" in it.last else {}
    windows = list(at_window_ends(train, it.config.trainer.log_every).values())
    columns = {
        name: [it[name] for it in windows if it.get(name) is not None] for name in (windows[-1] if windows else ())
    }
    middle = {name: statistics.median(values) for name, values in columns.items() if values and name != "kind"}
    found = {"step": ms(middle["step_ms"] / 1e3)} if "step_ms" in middle else {}
    found |= {a_second(name): number(value) for name, value in middle.items() if name.endswith("_per_second")}
    if "mfu_percent" in middle:
        found["MFU"] = f"{middle['mfu_percent']:.1f} %"
    if "memory_gib" in middle:
        found["memory a device"] = f"{max(columns['memory_gib']):.2f} GiB"
    if "data_wait_percent" in middle:
        found["waiting for data"] = f"{middle['data_wait_percent']:.1f} %"
    return found


def a_second(rate: str) -> str:
    return rate.replace("_per_second", " a second")


def remarks(it: RunState, plan: dict[str, Any] | None) -> list[str]:
    kind = it.spent.device_kind if it.spent else ""
    found = ["Measured are medians of the steps' time between two lines of the log, and the largest memory."]
    if kind == "cpu":
        found.append(
            "It ran on CPUs: no peak is known for them, nothing plans them, and the memory is that of the whole process."
        )
    elif kind and peak_flops(kind) is None:
        found.append(
            f"No peak is known for a device of kind {kind}, so nothing is known of what a step takes at least."
        )
    if plan and it.spent:
        found.append(
            f"Planned were {plan['chips']:,} chips of {plan['topology']}; measured are {it.spent.devices:,} x {kind}."
        )
    return found
