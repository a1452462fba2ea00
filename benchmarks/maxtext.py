"""Our step and MaxText's, compiled by one compiler for TPUs that aren't there, and read by one reader: memory, FLOPs, traffic.

Run as `python -m benchmarks.maxtext [--out FILE] [--case NAME]` in an environment of Python 3.12 or newer made by

    uv pip install "maxtext[tpu]==0.2.5" --resolution=lowest --prerelease=allow
    uv pip install --no-deps -e .

Shapes are equal: rows, tokens a row, float32 parameters and AdamW, bfloat16 products. MaxText runs with the recomputation,
tiles and flags of its own recipes for the chip, as far as they still compile.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

from benchmarks.tables import arguments, machine, publish, table

LENGTH = 8192
BLOCK = 512  # of queries and keys: MaxText's default for splash attention
GIB, GB = 2**30, 1e9
# Of configs/tpu/v5e/llama2_7b.sh. The file for v5p asks for more, of which its compiler refuses what fuses collectives.
OVERLAP = ("xla_tpu_enable_data_parallel_all_reduce_opt", "xla_tpu_data_parallel_opt_different_sized_ops")
FUSION = (
    "xla_tpu_enable_async_collective_fusion",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
    "xla_tpu_enable_async_collective_fusion_multiple_steps",
    "xla_tpu_overlap_compute_collective_tc",
    "xla_enable_async_all_gather",
)
V5P = ("xla_enable_async_collective_permute", "xla_tpu_enable_ag_backward_pipelining", "xla_enable_async_all_gather")


@dataclass(frozen=True)
class Case:
    name: str
    model: str  # one name for both
    topology: str
    chips: int
    rows: int  # a chip
    remat: str  # MaxText's policy
    tiles: int  # of the vocabulary's loss
    flags: tuple[str, ...]


CASES = {case.name: case for case in (
    Case("gemma-2b-v5e", "gemma-2b", "v5e-256", 256, 2, "full", 8, OVERLAP + FUSION),
    Case("gemma-2b-v5p", "gemma-2b", "v5p-128", 64, 2, "minimal", 8, OVERLAP + V5P),
    Case("gemma-7b-v5e", "gemma-7b", "v5e-256", 256, 1, "full", 8, OVERLAP + FUSION),
    Case("gemma-7b-v5p", "gemma-7b", "v5p-128", 64, 2, "minimal", 8, OVERLAP + V5P),
)}  # fmt: skip
# Ours recompute whole layers on v5e, and keep matrix products on v5p, which has the memory.
OURS = {"full": "layer", "minimal": "dots"}


def main() -> None:
    options = arguments(__doc__, ("all", *CASES))
    chosen = CASES if options.case == "all" else {options.case: CASES[options.case]}
    rows = []
    for name, case in chosen.items():
        found = {side: figures(side, case) for side in ("podwright", "MaxText")}
        for side, plan in found.items():
            rows.append((name, side, *cells(plan, found["podwright"]["step_seconds_at_peak"])))
            print(*rows[-1], sep="  ", file=sys.stderr, flush=True)
    heads = ("case", "side", "GiB a chip", "TFLOP a chip", "HBM, GB", "ICI, GB", "exposed, ms", "step, ms", "MFU")
    lines = [
        "# Beside MaxText, compiled for TPUs",
        "",
        f"{LENGTH:,} tokens a row, {', '.join(f'{c.rows} rows a chip in {n}' for n, c in chosen.items())}; estimates, not measured.",
        "",
        *table(heads, rows),
        "",
        found["podwright"]["versions"] + ". " + machine(),
    ]
    publish(lines, options.out)


def cells(plan: dict[str, Any], seconds_at_peak: float) -> tuple[str, ...]:
    if not plan["fits"]:
        return (f"{plan['needs_gib']:.2f} of {plan['has_gib']:.2f}: does not fit", *[""] * 6)
    memory = sum(size for part, size in plan["hbm_bytes"].items() if part != "capacity")
    step = plan["step"]
    sent = sum(one["bytes"] for one in step["collectives"])
    exposed = sum(one["exposed"] for one in step["collectives"])
    return (
        f"{memory / GIB:.2f}",
        f"{step['flops'] / 1e12:,.0f}",
        f"{step['bytes'] / GB:,.0f}",
        f"{sent / GB:.1f}",
        f"{exposed * 1e3:,.0f}",
        f"{plan['step_seconds'] * 1e3:,.0f}",
        f"{100 * seconds_at_peak / plan['step_seconds']:.1f} %",
    )


def figures(side: str, case: Case) -> dict[str, Any]:
    """What `podwright plan --json` writes, of either side."""
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "plan.json"
        ours = [sys.executable, "-m", "launch", "plan", case.model, "--topology", case.topology, "--json", str(out)]
        ours += ["--data.batch_size", str(case.rows * case.chips), "--data.sequence_length", str(LENGTH)]
        ours += ["--trainer.remat", OURS[case.remat]]
        command = (
            ours if side == "podwright" else [sys.executable, "-m", "benchmarks.maxtext_side", case.name, str(out)]
        )
        done = subprocess.run(command, text=True, capture_output=True)
        if not out.exists():
            raise SystemExit(f"{side}: {' '.join(command)} failed:\n{done.stderr[-2000:]}")
        return json.loads(out.read_text())


if __name__ == "__main__":
    main()
