"""NFNet: training steps on a CPU against timm in PyTorch, and what the largest published ones need on pods.

Run as `python -m benchmarks.nfnet [--case CASE] [--out FILE]`; needs the extra `parity`.
Each side runs in a process of its own, one at a time and taking turns. `--pods` compiles F3 and F7+ for TPUs instead, without
one; it needs the extra `tpu` and some ten minutes a line.
"""

import multiprocessing
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor

from benchmarks import nfnet_sides as sides
from benchmarks.step import measure
from benchmarks.tables import arguments, machine, publish, table

ROUNDS = 3
LARGEST = "nfnet-f7plus"
# 224 pixels and a batch of 4,096 are what arXiv 2310.16764 trained with.
PODS = [
    f"{name} --topology {topology} --data.image_size 224"
    for name in ("nfnet-f3", LARGEST)
    for topology in ("v4-128", "v5e-64", "v5p-128")
]
# 8 epochs of 4 billion images in 110,000 core-hours (section 2), by this model's FLOPs and v4's peak.
PUBLISHED = "The paper's F7+ took 110,000 TPU-v4 core-hours for 8 epochs of 4 billion images: an MFU of 36 %."


def main() -> None:
    options = arguments(__doc__, ("all", *sides.CASES), pods="what steps need on pods, compiled without one")
    if options.pods:
        publish(pods(), options.out)
        return
    rows = [against_timm(case) for case in (sides.CASES if options.case == "all" else [options.case])]
    heads = ("a step of", *(f"{side}, images/s" for side in sides.SIDES), "ratio", "processor time, ms", "ratio")
    publish(["# NFNet against timm", "", *table(heads, rows), "", note(), machine()], options.out)


def note() -> str:
    return (
        f"Forward and backward pass, adaptive clipping and Nesterov momentum, float32, nothing recomputed; medians of {ROUNDS} "
        "rounds, ratios of rounds side by side (range)."
    )


def against_timm(name: str) -> tuple[str, ...]:
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides.SIDES}
    for turn in range(ROUNDS):
        for side in sides.SIDES if turn % 2 == 0 else reversed(sides.SIDES):  # neither is always the second
            found[side].append(measure(sides.__name__, side, name))
            speed = found[side][-1]["images_per_second"]
            print(f"{name}, round {turn + 1}/{ROUNDS}: {side} {speed:,.1f} images/s", file=sys.stderr, flush=True)
    ours, theirs = found.values()
    assert ours[0]["parameters"] == theirs[0]["parameters"]
    speeds, times = (
        [[run[key] for run in runs] for runs in (ours, theirs)] for key in ("images_per_second", "cpu_seconds")
    )
    return (
        sides.CASES[name].title,
        *(f"{statistics.median(speed):,.1f}" for speed in speeds),
        ratio(*speeds),
        " and ".join(f"{1e3 * statistics.median(seconds):,.0f}" for seconds in times),
        ratio(*times),
    )


def ratio(ours: list[float], theirs: list[float]) -> str:
    found = [a / b for a, b in zip(ours, theirs, strict=True)]
    return f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"


def pods() -> list[str]:
    heads = (
        "config",
        "pod",
        "HBM of a device, GiB",
        "TFLOP a device",
        "at least, ms",
        "step, ms",
        "of it exposed",
        "MFU, %",
    )
    rows = []
    # What was compiled stays in memory, 5 GiB of it for F7+: each has a process of its own.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as process:
        for words, row in zip(PODS, process.map(planned, PODS), strict=True):
            rows.append(row)
            print(words, row, file=sys.stderr, flush=True)
    return ["# NFNet on pods", "", *table(heads, rows), "", PUBLISHED]


def planned(words: str) -> tuple[str, ...]:
    from sharding import aot

    aot.prepare()  # before jax is imported
    from configs.overrides import resolve
    from launch.plan import make_plan
    from sharding.topologies import find_topology

    name, *rest = words.split()
    resolved = resolve(name, rest, {"topology": "PRODUCT"})
    plan = make_plan(resolved.config, find_topology(resolved.options["topology"]))
    place = (name, plan.topology.name)
    if plan.compiled is None:
        return (*place, str(plan.too_large or "not compiled: the extra `tpu` is missing"), *[""] * 5)
    estimate = plan.compiled.estimate
    milliseconds = (f"{1e3 * seconds:,.0f}" for seconds in (estimate.bound, plan.step_seconds, estimate.exposed))
    return (
        *place,
        f"{plan.memory / 2**30:.2f}",
        f"{estimate.flops / 1e12:.1f}",
        *milliseconds,
        f"{100 * plan.mfu:.1f}",
    )


if __name__ == "__main__":
    main()
