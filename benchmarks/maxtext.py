"""Our step and MaxText's, compiled by one compiler for TPUs that aren't there, and read by one reader: memory, FLOPs, traffic.

Run as `python -m benchmarks.maxtext [--out FILE] [--case NAME] [--sweep]` in an environment of Python 3.12 or newer made by

    uv pip install "maxtext[tpu]==0.2.5" --resolution=lowest --prerelease=allow
    uv pip install --no-deps -e .

Shapes are equal: tokens a row, float32 parameters and AdamW, bfloat16 products. MaxText runs with the recomputation, tiles
and flags of its own recipes for the chip, as far as they still compile; rows are equal, too. With `--sweep` each side also
runs with other rows and recomputation, and its best by tokens a second stands against the other's best.
"""

import importlib.metadata
import json
import pathlib
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.plans import plan
from benchmarks.tables import arguments, machine, publish, table

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


# The shape of Llama 2 7B (arXiv 2307.09288) with one table for input and output, and GELU instead of SiLU in ours.
LLAMA = {"vocab_size": 32000, "padding_rows": 0, "width": 4096, "depth": 32, "num_heads": 32, "num_kv_heads": 32}
LLAMA |= {"head_dim": 128, "mlp_width": 11008}


@dataclass(frozen=True)
class Case:
    name: str
    model: str  # MaxText's name
    topology: str
    chips: int
    length: int  # tokens a row
    rows: int  # a chip
    remat: str  # MaxText's policy
    ours: tuple[str, ...]  # what we recompute, as words of a command line
    tiles: int  # of the vocabulary's loss in MaxText
    flags: tuple[str, ...]
    # What else is tried with --sweep: rows a chip and recomputation.
    theirs_too: tuple[tuple[int, str], ...] = ()
    ours_too: tuple[tuple[int, tuple[str, ...]], ...] = ()

    @property
    def words(self) -> list[str]:
        """What our command line adds to a config's name."""
        shape = LLAMA if self.model == "llama2-7b" else {}
        return [
            *(word for field, value in shape.items() for word in (f"--model.{field}", str(value))),
            *("--data.batch_size", str(self.rows * self.chips), "--data.sequence_length", str(self.length)),
            *self.ours,
        ]


NONE, LAYER, DOTS = (("--trainer.remat", kept) for kept in ("none", "layer", "dots"))
HALVES = ("--trainer.microbatches", "2")
QKV = (*LAYER, "--trainer.save", "qkv")
CONTEXT = (*LAYER, "--trainer.save", "context")
CASES = {case.name: case for case in (
    Case(
        "gemma-2b-v5e", "gemma-2b", "v5e-256", 256, 8192, 2, "full", LAYER, 8, OVERLAP + FUSION,
        ((1, "minimal"), (2, "save_qkv_proj"), (4, "full")), ((1, LAYER), (1, DOTS), (2, (*DOTS, *HALVES))),
    ),
    Case(
        "gemma-2b-v5p", "gemma-2b", "v5p-128", 64, 8192, 2, "minimal", DOTS, 8, OVERLAP + V5P,
        ((2, "minimal_with_context"), (4, "save_qkv_proj")), ((2, NONE), (4, CONTEXT)),
    ),
    Case(
        "gemma-7b-v5e", "gemma-7b", "v5e-256", 256, 8192, 1, "full", LAYER, 8, OVERLAP + FUSION,
        ((1, "save_qkv_proj"), (2, "full")), ((1, QKV), (2, LAYER)),
    ),
    Case(
        "gemma-7b-v5p", "gemma-7b", "v5p-128", 64, 8192, 2, "minimal", DOTS, 8, OVERLAP + V5P,
        ((1, "minimal_with_context"), (2, "save_qkv_proj")), ((1, NONE), (2, CONTEXT)),
    ),
    Case(
        "llama2-7b-v5e", "llama2-7b", "v5e-256", 256, 2048, 4, "save_qkv_proj", QKV, 1, OVERLAP + FUSION,
        ((2, "minimal"), (8, "full")), ((2, DOTS), (8, LAYER)),
    ),
    Case(
        "llama2-7b-v5p", "llama2-7b", "v5p-128", 64, 4096, 4, "minimal", DOTS, 1, OVERLAP + V5P,
        ((4, "minimal_with_context"), (8, "full")), ((4, NONE), (8, LAYER)),
    ),
)}  # fmt: skip
SIDES = ("podwright", "MaxText")


def main() -> None:
    options = arguments(__doc__, ("all", *CASES), sweep="also try other rows and recomputation of each side")
    chosen = CASES if options.case == "all" else {options.case: CASES[options.case]}
    rows, best = [], []
    for name, case in chosen.items():
        fastest: dict[str, tuple[float, str]] = {}
        for side in SIDES:
            for variant in variants(side, case) if options.sweep else [case]:
                found = figures(side, variant)
                what = f"{variant.rows} rows, {variant.remat if side == 'MaxText' else ' '.join(variant.ours[1::2])}"
                rows.append((name, side, what, *cells(found, variant)))
                print(*rows[-1], sep="  ", file=sys.stderr, flush=True)
                if found["fits"]:
                    speed = variant.rows * variant.length / found["step_seconds"]
                    fastest[side] = max(fastest.get(side, (0.0, "")), (speed, what))
        ours, theirs = (fastest[side] for side in SIDES)
        best.append((name, *(f"{speed:,.0f} ({what})" for speed, what in (ours, theirs)), f"{theirs[0] / ours[0]:.2f}"))
    heads = ("case", "side", "tried", "GiB a chip", "TFLOP a chip", "HBM, GB", "ICI, GB", "exposed, ms", "step, ms")
    lines = [
        "# Beside MaxText, compiled for TPUs",
        "",
        "Estimates, not measured. Rows are of a chip.",
        "",
        *table((*heads, "tokens/s a chip"), rows),
        "",
        *table(("case", *(f"{side}, tokens/s a chip" for side in SIDES), "ratio of times"), best),
        "",
        f"jax {importlib.metadata.version('jax')}, libtpu {importlib.metadata.version('libtpu')}. {machine()}",
    ]
    publish(lines, options.out)


def variants(side: str, case: Case) -> list[Case]:
    if side == "MaxText":
        return [case, *(replace(case, rows=rows, remat=remat) for rows, remat in case.theirs_too)]
    return [case, *(replace(case, rows=rows, ours=ours) for rows, ours in case.ours_too)]


def cells(plan: dict[str, Any], case: Case) -> tuple[str, ...]:
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
        f"{case.rows * case.length / plan['step_seconds']:,.0f}",
    )


def figures(side: str, case: Case) -> dict[str, Any]:
    """What `podwright plan --json` writes, of either side."""
    if side == "podwright":
        name = case.model if case.model.startswith("gemma") else "gemma-7b"
        return plan([name, "--topology", case.topology, *case.words])
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "plan.json"
        tried = json.dumps({"rows": case.rows, "remat": case.remat})
        command = [sys.executable, "-m", "benchmarks.maxtext_side", case.name, tried, str(out)]
        done = subprocess.run(command, text=True, capture_output=True)
        if not out.exists():
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
        return json.loads(out.read_text())


if __name__ == "__main__":
    main()
