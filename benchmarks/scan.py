"""The recurrence compiled ahead of time for TPUs, 8 x 2048 x 2560 in bfloat16: ours, `recurrentgemma`'s and XLA's.

Run as `python -m benchmarks.scan [--out FILE]`, without a TPU; needs the extras `tpu` and, for the peer's rows, `parity`.
Nothing is executed: figures are the compiler's. "scan" is h from a and x; "block" is the whole RG-LRU, h from u.
"""

import argparse
import glob
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass

from benchmarks.tables import machine, publish, table

SHAPE, BLOCKS = (8, 2048, 2560), 10
PASSES = ("forward", "both")  # both: forward, then every gradient
SIDES = (
    "scan: ours",
    "scan: recurrentgemma",
    "scan: associative",
    "scan: lax.scan",
    "block: ours",
    "block: recurrentgemma",
    "block: associative",
)
# Arrays of SHAPE that must cross HBM at least once: a, x, h and a, h, dh, da, dx; u, h and u, dh, du.
STREAMS = {("scan", "forward"): 3, ("scan", "both"): 8, ("block", "forward"): 2, ("block", "both"): 5}
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
}


@dataclass(frozen=True)
class Chip:
    """One device of a topology; bytes/s and FLOP/s of its data sheet, the clock that its bundles tick by."""

    topology: str
    bandwidth: float
    peak: float
    clock: float
    cores: int


CHIPS = {
    "v5e": Chip("v5e:2x2", 819e9, 197e12, 1.5e9, 1),
    "v5p": Chip("v5p:2x2x1", 2765e9, 459e12, 1.75e9, 2),
    "v6e": Chip("v6e:2x2", 1640e9, 918e12, 1.75e9, 1),
}
NOTES = """
- Bound: bytes that cannot be avoided (inputs read once, outputs written once), at the data sheet's bandwidth.
- Bytes: XLA's count, with each Pallas kernel at what its blocks read and write. XLA counts a loop's body once, so
  lax.scan has no figure. Temporary memory is XLA's.
- Time: for a kernel, the longer of its instruction bundles (final schedule, one a cycle, no stall; half of them on v5p
  where the grid is declared parallel over its two cores) and its bytes at full bandwidth; for everything else, the
  longer of bytes and FLOPs at the data sheet's peaks, which flatters whatever is left to XLA. A comparison of programs,
  not a prediction.
""".strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help="also write the table to this markdown file")
    parser.add_argument("--cell", nargs=3, help=argparse.SUPPRESS)  # one side, pass and chip, in a process of its own
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(measure(*options.cell)))
        return
    if importlib.util.find_spec("libtpu") is None:
        sys.exit("benchmarks.scan compiles with libtpu, which is not installed: pip install -e '.[tpu]'")
    lines = ["# Linear scan and RG-LRU, compiled for TPUs", ""]
    for chip in CHIPS:
        rows = [row(side, which, chip) for side in SIDES for which in PASSES]
        heads = ("program", "pass", "GB", "/ bound", "temporary MiB", "kernel cycles", "ms", "/ bound")
        lines += [f"## {chip}", "", *table(heads, rows), ""]
    publish([*lines, NOTES, "", machine()], options.out)


def row(side: str, which: str, chip: str) -> list[str]:
    if "recurrentgemma" in side and importlib.util.find_spec("recurrentgemma") is None:
        return [side, which, "not installed", *[""] * 5]
    with tempfile.TemporaryDirectory() as dump:
        flags = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
        environment = {**os.environ, **ENVIRONMENT, "LIBTPU_INIT_ARGS": flags, "BUNDLES": dump}
        command = [sys.executable, "-m", "benchmarks.scan", "--cell", side, which, chip]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        return [side, which, (done.stderr.strip().splitlines() or ["failed"])[-1][:60], *[""] * 5]
    found = json.loads(done.stdout.splitlines()[-1])
    bound = STREAMS[side.split(":")[0], which] * 2 * SHAPE[0] * SHAPE[1] * SHAPE[2]
    seconds = bound / CHIPS[chip].bandwidth
    memory = f"{found['temporary'] / 2**20:,.0f}"
    if found["loop"]:
        return [side, which, "-", "-", memory, "-", "-", "-"]
    return [
        side,
        which,
        f"{found['bytes'] / 1e9:.3f}",
        f"{found['bytes'] / bound:.2f}",
        memory,
        f"{found['cycles']:,.0f}" if found["cycles"] else "-",
        f"{found['seconds'] * 1e3:.3f}",
        f"{found['seconds'] / seconds:.2f}",
    ]


def measure(side: str, which: str, chip: str) -> dict:
    """Compile one program in this process and read what the compiler says of it."""
    import jax
    from jax.experimental import topologies

    device = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip].topology).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    function, arguments, kernels = programs(side)
    if which == "both":
        value, arguments = function, (*arguments, jax.ShapeDtypeStruct(SHAPE, arguments[0].dtype))

        def function(*arrays):
            h, pullback = jax.vjp(value, *arrays[:-1])
            return h, pullback(arrays[-1])

    placed = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in arguments]
    compiled = jax.jit(function).trace(*placed).lower(lowering_platforms=("tpu",)).compile()
    cost, text = compiled.cost_analysis(), compiled.as_text()
    spec, cycles, seconds, moved = CHIPS[chip], 0.0, 0.0, 0
    names = re.findall(r'%(\S+) = .*custom_call_target="tpu_custom_call"', text)  # forward's comes first
    for name, kernel in zip(names, kernels, strict=False):
        own = kernel.cycles(os.environ["BUNDLES"], name) / (spec.cores if kernel.parallel else 1)
        cycles, moved = cycles + own, moved + kernel.bytes
        seconds += max(own / spec.clock, kernel.bytes / spec.bandwidth)
    estimated = moved if side.endswith("ours") else 0  # our kernels give XLA a cost; it knows nothing of the peer's
    flops = cost["flops"] if not side.endswith("ours") else 0  # and their products are in the bundles
    rest = max(0.0, cost["bytes accessed"] - estimated)
    seconds += max(rest / spec.bandwidth, flops / spec.peak)
    return {
        "bytes": rest + moved,
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
        "cycles": cycles,
        "seconds": seconds,
        "loop": " while(" in text,
    }


@dataclass(frozen=True)
class Kernel:
    """How often a Pallas kernel's loops run, and what it reads and writes."""

    steps: int  # of the grid
    inner: int  # rounds of the loop in each step
    bytes: int
    parallel: bool

    def cycles(self, dump: str, name: str) -> float:
        (file,) = (
            f for f in glob.glob(f"{dump}/*final_bundles.txt") if re.search(rf"-{re.escape(name)}-\d+-final_", f)
        )
        loops: list[list[int]] = []  # depth and bundles of each loop, in program order
        with open(file, errors="replace") as lines:
            for line in lines:
                match = re.match(r"\s*(?:0x)?[0-9a-f]+\s+([A-Z ]*):\s*([> ]*)\{", line)
                if not match:
                    continue
                depth = match[2].count(">")
                if "LB" in match[1]:
                    loops.append([depth, 0])
                for loop in reversed(loops):
                    if loop[0] == depth:
                        loop[1] += 1
                        break
        # Predicated regions of a step count every time, though most run in the first or last step only.
        return self.steps * sum(bundles * (1 if depth == 1 else self.inner) for depth, bundles in loops)


def programs(side: str):
    """A function of arrays to h, abstract arguments, and its kernels: forward's, then backward's."""
    import jax
    import jax.numpy as jnp
    from models.kernels import linear_tpu, rg_lru_tpu
    from models.rg_lru import rg_lru_scan

    from models.scan import linear_scan

    batch, length, width = SHAPE
    big = jax.ShapeDtypeStruct(SHAPE, jnp.bfloat16)
    size = 2 * batch * length * width
    kind, name = side.split(": ")
    if kind == "scan":
        if name == "recurrentgemma":
            from recurrentgemma.jax.pallas import lru_pallas_scan

            # 8 x 128 channels by 256 steps a program; the first step of a block stands outside its loop.
            steps = batch * -(-width // 1024) * length // 256
            return lambda a, x: lru_pallas_scan(x, a)[0], (big, big), [Kernel(steps, 255, 3 * size, False)] * 2
        grid = linear_tpu.Grid(big, against_time=False)
        steps, chunks = batch * grid.shape[1] * grid.blocks, grid.rows // linear_tpu.CHUNK
        kernels = [
            Kernel(steps, chunks, 3 * size, True),
            Kernel(steps, chunks, 5 * size, True),
        ]
        how = {"ours": "tpu", "associative": "associative", "lax.scan": "sequential"}[name]
        scan = lambda a, x: linear_scan(a, x, implementation=how)[0]  # noqa: E731
        return scan, (big, big), kernels if how == "tpu" else []
    gate = [
        jax.ShapeDtypeStruct((BLOCKS, width // BLOCKS, width // BLOCKS), jnp.bfloat16),
        jax.ShapeDtypeStruct((BLOCKS, width // BLOCKS), jnp.bfloat16),
    ]
    arguments = (big, *gate, *gate, jax.ShapeDtypeStruct((width,), jnp.float32))
    positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
    if name == "recurrentgemma":
        return peer_block(arguments, positions, size)
    grid = rg_lru_tpu.Grid(big, gate[0], against_time=False)
    steps, pairs = grid.shape[0] * grid.shape[1] * grid.shape[2], grid.rows // rg_lru_tpu.GROUP // 2
    kernels = [
        Kernel(steps, pairs, 2 * size, True),
        Kernel(steps, pairs, 3 * size, True),
    ]
    how = {"ours": "tpu", "associative": "associative"}[name]
    block = lambda u, *rest: rg_lru_scan(u, positions, *rest, implementation=how)[0]  # noqa: E731
    return block, arguments, kernels if how == "tpu" else []


def peer_block(arguments, positions, size: int):
    import jax.numpy as jnp
    from recurrentgemma.common import ScanType
    from recurrentgemma.jax.layers import RGLRU

    layer = RGLRU(SHAPE[2], BLOCKS, scan_type=ScanType.LINEAR_PALLAS, dtype=jnp.bfloat16)

    def block(u, w_input, b_input, w_a, b_a, a_param):
        gates = {"input_gate": {"w": w_input, "b": b_input}, "a_gate": {"w": w_a, "b": b_a}}
        return layer.apply({"params": {**gates, "a_param": a_param}}, u, positions)[0]

    steps = SHAPE[0] * -(-SHAPE[2] // 1024) * SHAPE[1] // 256
    return block, arguments, [Kernel(steps, 255, 3 * size, False)] * 2


if __name__ == "__main__":
    main()
