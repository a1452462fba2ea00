"""Forward and backward pass of a model: ours against somebody else's implementation, on equal parameters.

Run as `python -m benchmarks.step [--case CASE] [--out FILE]`; needs the extra `parity`. Against DeepMind's
`recurrentgemma`: griffin-tiny (`tiny`), one group (rec, rec, attn) of the 400M's width on 2,048 tokens (`block`), or the
whole 400M on 256 tokens (`400m`, 17 GB of memory). Against `transformers` in PyTorch: `gemma2-tiny` and `gemma-tiny`
(Gemma 3). Each side runs in a process of its own, one at a time and taking turns, so that what else the machine does
falls on both.
"""

import importlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable

from benchmarks.tables import arguments, machine, publish, table

# case -> the file that holds its sides
CASES = dict.fromkeys(("tiny", "block", "400m"), "griffin_sides") | dict.fromkeys(
    ("gemma2-tiny", "gemma-tiny"), "gemma_sides"
)
ROUNDS = 3
# key of a measurement, what it is, how to print it
FIGURES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("tokens_per_second", "tokens/s, forward and backward", "{:,.0f}".format),
    ("cpu_seconds", "processor time of a step", "{:.2f} s".format),  # hardly moved by other people's load
    ("compile_seconds", "tracing and compiling", "{:.1f} s".format),
    ("temporary_mib", "memory for intermediate results", "{:,.0f} MiB".format),
    ("peak_mib", "memory of the process, at most", "{:,.0f} MiB".format),
    ("resident_mib", "and between steps", "{:,.0f} MiB".format),
)


def main() -> None:
    options = arguments(__doc__, CASES)
    module = importlib.import_module(f"benchmarks.{CASES[options.case]}")
    found: dict[str, list[dict[str, float]]] = {side: [] for side in module.SIDES}
    for turn in range(ROUNDS):
        for side in module.SIDES if turn % 2 == 0 else reversed(module.SIDES):  # neither is always the second
            found[side].append(measure(module.__name__, side, options.case))
            speed = found[side][-1]["tokens_per_second"]
            print(f"round {turn + 1}/{ROUNDS}: {side} {speed:,.0f} tokens/s", file=sys.stderr, flush=True)
    publish(report(found, module.CASES[options.case].title, module.NOTE), options.out)


def measure(module: str, side: str, case: str) -> dict[str, float]:
    """One side's figures, from a new process on one CPU device."""
    program = f"import json; from {module} import CASES, measure; print(json.dumps(measure({side!r}, CASES[{case!r}])))"
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True)
    if ended.returncode:
        raise SystemExit(f"{side} ended with exit code {ended.returncode}; `make bench` installs what it needs")
    return json.loads(ended.stdout.splitlines()[-1])


def report(found: dict[str, list[dict[str, float]]], title: str, note: str) -> list[str]:
    ours, theirs = found.values()
    rows = []
    for key, name, show in FIGURES:
        if key not in theirs[0]:
            continue
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
        f"# One step of {title}",
        "",
        *table(("", *found, "ratio, median of rounds (range)"), rows),
        "",
        f"{count:,.0f} equal parameters, {ours[0]['rows']:.0f} rows of {ours[0]['length']:.0f} tokens, float32; medians "
        f"of {ROUNDS} rounds. {note}",
        machine(),
    ]


if __name__ == "__main__":
    main()
