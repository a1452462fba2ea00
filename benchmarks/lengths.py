"""How step times grow with the sequence: Griffin and the Transformer with multi-query attention, beside the paper's figure 3.

Run as `python -m benchmarks.lengths [--out FILE] [--case SIZE]`; needs the extra `tpu` and about 90 seconds a plan. Tokens a
step are the same at every length, and times are relative to the Transformer's at 2,048, as in arXiv 2402.19427. The paper
measured on TPU v3, which no compiler of today knows; of those it knows, v5p has the nearest ratio of FLOPs to bandwidth
(166 FLOPs a byte, v3 137).
"""

import sys

from benchmarks.plans import plan
from benchmarks.tables import arguments, machine, publish, table

LENGTHS = (2048, 4096, 8192, 32768)
TOPOLOGIES = {"400m": "v5p-16", "1b": "v5p-32", "7b": "v5p-128"}
# As read from the figure's text; of the 7B only that its curves are nearly equal, and 1.13 somewhere, are known.
PAPER = {
    ("400m", "transformer"): (1.00, 1.17, 1.46),
    ("400m", "griffin"): (0.93, 0.96, 0.98),
    ("1b", "transformer"): (1.00, 1.12),
    ("1b", "griffin"): (0.97, 0.99, 1.01),
}


def main() -> None:
    options = arguments(__doc__, ("all", *TOPOLOGIES))
    rows, versions = [], ""
    for size, topology in TOPOLOGIES.items():
        if options.case not in ("all", size):
            continue
        seconds: dict[tuple[str, int], float] = {}
        for family in ("transformer", "griffin"):
            for length in LENGTHS:
                name = f"{family}-{size}"
                words = [name, "--topology", topology, "--data.sequence_length", str(length)]
                words += ["--data.batch_size", str(tokens_of(size) // length)]
                if family == "transformer":
                    words += ["--model.window", str(length)]
                found = plan(words)
                seconds[family, length] = found["step_seconds"]
                versions = found["versions"]
                print(name, length, f"{1e3 * found['step_seconds']:,.0f} ms", file=sys.stderr, flush=True)
        base = seconds["transformer", LENGTHS[0]]
        for family in ("transformer", "griffin"):
            paper = PAPER.get((size, family), ())
            cells = [
                f"{seconds[family, length] / base:.2f}" + (f" ({paper[i]:.2f})" if i < len(paper) else "")
                for i, length in enumerate(LENGTHS)
            ]
            rows.append([f"{family}-{size}", topology, *cells])
    lines = [
        "# Step time by length of the sequence",
        "",
        "Estimated, relative to the Transformer's at 2,048 tokens; in brackets what the paper measured.",
        "",
        *table(("model", "pod", *(f"{length:,}" for length in LENGTHS)), rows),
        "",
        f"{versions}. {machine()}",
    ]
    publish(lines, options.out)


def tokens_of(size: str) -> int:
    """A step: the configs' own batches of rows of 2,048."""
    return 2048 * {"400m": 256, "1b": 512, "7b": 1024}[size]


if __name__ == "__main__":
    main()
