"""What a plan costs by itself: seconds and memory of the compiler, by chips and by layers.

Run as `python -m benchmarks.compiling [--out FILE]`; needs the extra `tpu` and ten minutes. Each chip has one row. Parameters
are divided over 64 chips at most, and over all of up to 64: a width of 2,048 does not divide over 4,096.
"""

import sys

from benchmarks.plans import plan
from benchmarks.tables import arguments, machine, publish, table
from sharding.topologies import find_topology

# Chips, layers: Griffin's groups of three, whole.
CASES = {"v5p-32": (12, 24, 42), "v5p-1024": (24,), "v5p-8192": (24,)}


def main() -> None:
    options = arguments(__doc__)
    rows, versions = [], ""
    for product, depths in CASES.items():
        chips = find_topology(product).chips
        for depth in depths:
            words = ["griffin-1b", "--topology", product, "--data.batch_size", str(chips), "--model.depth", str(depth)]
            found = plan([*words, "--mesh.data", str(max(1, chips // 64))])
            versions = found["versions"]
            rows.append([f"{chips:,}", str(depth), f"{found['compile_seconds']:.0f}", f"{found['peak_gib']:.2f}"])
            print(*rows[-1], sep="  ", file=sys.stderr, flush=True)
    lines = [
        "# What compiling takes: Griffin 1B on v5p",
        "",
        *table(("chips", "layers", "seconds", "peak memory, GiB"), rows),
        "",
        f"{versions}. {machine()}",
    ]
    publish(lines, options.out)


if __name__ == "__main__":
    main()
