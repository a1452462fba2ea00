"""Forward and backward pass of a Griffin: ours against DeepMind's `recurrentgemma`, on equal parameters.

Run as `python -m benchmarks.step [--case tiny|block|400m] [--out FILE]`; needs the extra `parity`: griffin-tiny, one
group (rec, rec, attn) of the 400M's width on 2,048 tokens, or the whole 400M on 256 tokens (12 GB of memory). Each side runs in a process of its own, one
at a time and taking turns, so that what else the machine does falls on both.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable

from benchmarks.tables import arguments, machine, publish, table

CASES = {"tiny": "griffin-tiny", "block": "one group of Griffin 400M", "400m": "Griffin 400M"}
ROUNDS = 3
SIDES = ("podwright", "recurrentgemma")
# key of a measurement, what it is, how to print it
FIGURES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("tokens_per_second", "tokens/s, forward and backward", "{:,.0f}".format),
    ("cpu_seconds", "processor time of a step", "{:.2f} s".format),  # hardly moved by other people's load
    ("compile_seconds", "tracing and compiling", "{:.1f} s".format),
    ("temporary_mib", "memory for intermediate results", "{:,.0f} MiB".format),
)


def main() -> None:
    options = arguments(__doc__, CASES)
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for turn in range(ROUNDS):
        for side in SIDES if turn % 2 == 0 else reversed(SIDES):  # neither is always the one that runs second
            found[side].append(measure(side, options.case))
            speed = found[side][-1]["tokens_per_second"]
            print(f"round {turn + 1}/{ROUNDS}: {side} {speed:,.0f} tokens/s", file=sys.stderr, flush=True)
    publish(report(found, options.case), options.out)


def measure(side: str, case: str) -> dict[str, float]:
    """One side's figures, from a new process on one CPU device."""
    program = f"from benchmarks.griffin_sides import CASES, measure; measure({side!r}, CASES[{case!r}])"
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True)
    if ended.returncode:
        raise SystemExit(f"{side} ended with exit code {ended.returncode}; `make bench` installs what it needs")
    return json.loads(ended.stdout)


def report(found: dict[str, list[dict[str, float]]], case: str) -> list[str]:
    ours, theirs = (found[side] for side in SIDES)
    rows = []
    for key, name, show in FIGURES:
        a, b = ([run[key] for run in runs] for runs in (ours, theirs))
        ratios = [x / y for x, y in zip(a, b, strict=True)]
        rows.append(
            (
                name,
                show(statistics.median(a)),
                show(statistics.median(b)),
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            )
        )
    for key, name in (("loss", "loss"), ("grad_norm", "norm of the gradient")):
        a_, b_ = ours[0][key], theirs[0][key]
        rows.append((name, f"{a_:.6f}", f"{b_:.6f}", f"relative difference {abs(a_ - b_) / b_:.1e}"))
    count = ours[0]["parameters"]
    assert count == theirs[0]["parameters"]
    return [
        f"# One step of {CASES[case]}",
        "",
        *table(("", *SIDES, "ratio, median of rounds (range)"), rows),
        "",
        f"{count:,.0f} equal parameters, {ours[0]['rows']:.0f} rows of {ours[0]['length']:.0f} tokens, float32; medians "
        f"of {ROUNDS} rounds. Ours saves matrix products and recomputes what lies between (remat=dots), the "
        f"reference saves everything, which is its faster way.",
        machine(),
    ]


if __name__ == "__main__":
    main()
