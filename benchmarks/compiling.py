"""What a plan costs by itself: seconds and memory of the compiler, by chips and by layers.

Run as `python -m benchmarks.compiling [--out FILE] [--case chips|layers]`; needs the extra `tpu` and a quarter of an hour. Each
chip has one row. From 256 chips on parameters are divided over 64 of them only, a width of 2,048 does not divide further.
"""

import sys

from benchmarks.plans import plan
from benchmarks.tables import arguments, machine, publish, table

CHIPS = {"v5p-32": 16, "v5p-128": 64, "v5p-1024": 512, "v5p-8192": 4096}
LAYERS = (12, 24, 42)  # Griffin's groups of three, whole


def main() -> None:
    options = arguments(__doc__, ("all", "chips", "layers"))
    cases: dict[str, list[str]] = {}
    if options.case != "layers":
        for topology, chips in CHIPS.items():
            data = max(1, chips // 64)
            cases[f"{chips:,} chips, 24 layers"] = [
                *("--topology", topology, "--data.batch_size", str(chips), "--mesh.data", str(data)),
            ]
    if options.case != "chips":
        for depth in LAYERS:
            cases[f"16 chips, {depth} layers"] = [
                *("--topology", "v5p-32", "--data.batch_size", "16", "--model.depth", str(depth)),
            ]
    rows, versions = [], ""
    for case, words in cases.items():
        found = plan(["griffin-1b", *words])
        versions = found["versions"]
        rows.append([case, f"{found['compile_seconds']:.0f}", f"{found['peak_gib']:.2f}"])
        print(*rows[-1], sep="  ", file=sys.stderr, flush=True)
    lines = [
        "# What compiling takes: Griffin 1B on v5p",
        "",
        *table(("case", "seconds", "peak memory, GiB"), rows),
        "",
        f"{versions}. {machine()}",
    ]
    publish(lines, options.out)


if __name__ == "__main__":
    main()
