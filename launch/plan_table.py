"""The table that `podwright plan` prints: the same words on a terminal, where it has colours, and in a log."""

import sys
from collections.abc import Iterator

from launch.plan import DAY, Plan

GIB = 2**30
Line = tuple[str, str, str]  # what it is about (indented: a part of what stands above), figures, what they mean
LEFT_OUT = (
    "stalls and start-up of instructions, contention and latency of networks, input, evaluation, saving, restarts"
)
KNOWN_ERROR = (
    "MaxText's own programs, read so, are between 6 % below and 17 % above the MFUs published of it (docs/pods.md)"
)


def show(plan: Plan, price_of: str) -> None:
    rows = [
        (f"{about:<14}{figures}", f"   {remark}" if remark else "", about)
        for about, figures, remark in lines(plan, price_of)
    ]
    if not sys.stdout.isatty():
        for text, remark, _ in rows:
            print(f"{text}{remark}".rstrip())
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for text, remark, about in rows:
        heading = about and not about.startswith(" ")
        row = Text.assemble((text[:14], "bold cyan" if heading else "cyan"), (text[14:], "bold" if heading else ""))
        console.print(row + Text(remark, "dim"), soft_wrap=True)


def lines(plan: Plan, price_of: str) -> Iterator[Line]:
    """At most 40."""
    topology, config, compiled = plan.topology, plan.config, plan.compiled
    axes = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    yield "plan", f"{config.name} on {topology.describe()}", ""
    yield "mesh", f"{topology.devices:,} device{'s' * (topology.devices > 1)}: {axes}", ""
    yield "model", f"{config.model.kind}, {plan.count:,} parameters; {plan.units:,} {plan.unit} a step", ""
    if compiled:
        yield "compiled", f"in {compiled.seconds:,.0f} s by {compiled.versions}: the very step that `train` runs", ""
    else:
        yield "analytic", "libtpu is not installed, nothing was compiled: pip install -e '.[tpu]' for all figures", ""
    for note in [*config.notes(), *plan.notes]:
        yield "note", note, ""
    yield from memory_lines(plan)
    yield from time_lines(plan)
    per_second, at_most = plan.units / plan.step_seconds, "" if compiled else "at most "
    yield "speed", f"{at_most}{number(per_second)} {plan.unit}/s, {count(per_second * DAY)} a day", ""
    if compiled:
        remark = "model FLOPs, nothing recomputed, attention as its mask leaves it / bf16 peak of all chips"
        yield "MFU", f"{100 * plan.mfu:.1f} %", remark
    at_least = "" if compiled else "at least "
    run = f"{config.trainer.steps:,} steps: {at_least}{number(plan.hours)} hours, {number(plan.chip_hours)} chip-hours"
    if plan.price is None:
        yield "run", run, f"no public list price of {topology.name} is known: give --price USD a chip-hour"
    else:
        yield "run", f"{run}, ${plan.price * plan.chip_hours:,.2f}", f"at ${plan.price:,.2f} a chip-hour{price_of}"
    if compiled:
        for what, times in compiled.estimate.unread.items():
            yield "not read", f"{times:,} {what}", ""
        yield "left out", LEFT_OUT, ""
        yield "known error", KNOWN_ERROR, ""


def memory_lines(plan: Plan) -> Iterator[Line]:
    compiled, capacity = plan.compiled, plan.topology.hbm
    share, over = f"{100 * plan.memory / capacity:.0f} %", plan.memory - capacity
    known = f"{'' if compiled else 'at least '}{plan.memory / GIB:,.2f} of {capacity / GIB:,.2f} GiB a device, {share}"
    yield "memory", known + (f": {over / GIB:,.2f} GiB too much" if over > 0 else ""), ""
    parts = {"parameters": plan.parameters, "optimizer": plan.optimizer, "batch": plan.batch}
    if compiled:
        parts |= {"temporaries": compiled.temporaries + compiled.outputs, "program": compiled.program}
    for name, size in parts.items():
        yield f"  {name}", f"{size / GIB:9,.3f} GiB", ""
    if compiled is None:
        yield "  temporaries", "  unknown without the compiler", ""
    if plan.host:
        yield "  on the host", f"{plan.host / GIB:9,.3f} GiB", "of the host's memory, not of HBM: what is offloaded"


def time_lines(plan: Plan) -> Iterator[Line]:
    topology, compiled = plan.topology, plan.compiled
    peak = f"{number(topology.peak / 1e12)} TFLOP/s"
    own = number(plan.flops / topology.devices / 1e12)
    if compiled is None:
        yield (
            "step",
            f"at least {ms(plan.peak_seconds)}",
            f"the model's {own} TFLOP a device at {peak}; nothing else is counted",
        )
        return
    e = compiled.estimate
    yield "work", "of a device in a step; GB to and from HBM, and sent over networks", ""
    yield (
        "  products",
        f"{number(e.flops / 1e12):>9} TFLOP",
        f"the model's own are {own}, the rest is recomputed or masked",
    )
    yield "  HBM", f"{number(e.bytes / 1e9):>9} GB", ""
    for (kind, network), sent in sorted(e.collectives.items(), key=lambda item: -item[1].seconds):
        remark = f"{kind}, {sent.count:,} times: {ms(sent.seconds)}, exposed {ms(sent.exposed)}"
        yield f"  {network}", f"{number(sent.bytes / 1e9):>9} GB", remark
    yield "step", f"{ms(e.seconds)} = {ms(e.compute)} compute + {ms(e.exposed)} exposed communication", ""
    rates = f"{peak}, bytes / {topology.bandwidth / 1e9:,.0f} GB/s"
    yield "  compute", f"sum over instructions of the longest of FLOPs / {rates} and,", ""
    yield "", f"for matrix products, the compiler's cycles / {topology.chip.clock / 1e9:g} GHz", ""
    yield "  exposed", "communication during which the schedule has nothing else to do", ""
    yield "  at least", f"{ms(e.bound)}, whatever the schedule", "peak, full bandwidth, all communication hidden"


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def count(value: float) -> str:
    for size, name in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{number(value / size)} {name}"
    return number(value)


def ms(seconds: float) -> str:
    return (
        f"{seconds:,.1f} s"
        if seconds >= 10
        else f"{1e3 * seconds:,.0f} ms"
        if seconds >= 1
        else f"{1e3 * seconds:.4g} ms"
    )
