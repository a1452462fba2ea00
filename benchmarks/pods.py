"""What pod configs need and do on pods that are meant for them: the table in docs/pods.md, compiled without a TPU.

Run as `python -m benchmarks.pods [--case NAME] [--record]`; needs the extra `tpu` and two minutes a config. With `--record`
the figures go to benchmarks/pods.json, to which tests/test_pods_aot.py holds later code, and the table to docs/pods.md.
"""

import argparse
import json
import pathlib
import sys

from benchmarks.tables import table
from sharding import aot

RECORDS = pathlib.Path(__file__).with_name("pods.json")
PAGE = RECORDS.parents[1] / "docs" / "pods.md"
BEGIN, END = "<!-- pods: python -m benchmarks.pods --record -->\n", "<!-- end of pods -->\n"

# The words that `podwright plan` and `podwright train` take. Batches are the configs' own where none is given.
PODS = {
    words.split()[0]: words
    for words in (
        "griffin-1b --topology v5e-64",
        "griffin-3b --topology v5e-128",
        "griffin-7b --topology v5p-128",
        "griffin-14b --topology v5p-256",
        "recurrentgemma-2b --topology v5e-64",
        "recurrentgemma-9b --topology v5p-128",
        "gemma-2b --topology v5e-256",
        "gemma-7b --topology v5e-256",
        "gemma2-9b --topology v5p-256",
        "gemma2-27b --topology v5p-512",
        "nfnet-f0 --topology v4-64",
        "nfnet-f3 --topology v4-256",
        "nfnet-f7plus --topology v4-512 --data.image_size 224",
    )
}
NETWORKS = ("ICI", "DCN")
HEADS = (
    "config",
    "pod",
    "mesh",
    "tokens or images a step",
    "HBM, GiB",
    "sent, GB",
    "exposed, ms",
    "step, ms",
    "MFU, %",
)


def compiled(name: str) -> dict:
    """The figures of one config: bytes of a device, seconds of a step."""
    from configs.overrides import resolve
    from launch.plan import make_plan
    from sharding.topologies import find_topology

    config, *words = PODS[name].split()
    resolved = resolve(config, words, {"topology": "PRODUCT"})
    plan = make_plan(resolved.config, find_topology(resolved.options["topology"]))
    if plan.compiled is None or plan.too_large:
        sys.exit(f"benchmarks.pods: {PODS[name]} {plan.too_large}")
    estimate = plan.compiled.estimate
    return {
        "words": PODS[name],
        "mesh": " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1),
        "tokens": plan.units,
        "hbm_bytes": plan.memory,
        "network_bytes": round(sum(t.bytes for (_, network), t in estimate.collectives.items() if network in NETWORKS)),
        "exposed_seconds": round(estimate.exposed, 4),
        "step_seconds": round(plan.step_seconds, 4),
        "mfu": round(plan.mfu, 4),
        "versions": plan.compiled.versions,
    }


def page(records: dict[str, dict]) -> str:
    """The table of docs/pods.md."""
    rows = []
    for found in records.values():
        config, _, rest = found["words"].partition(" --topology ")
        topology, _, others = rest.partition(" ")
        figures = (
            f"{found['tokens']:,}",
            f"{found['hbm_bytes'] / 2**30:.2f}",
            f"{found['network_bytes'] / 1e9:.1f}",
            f"{1e3 * found['exposed_seconds']:.0f}",
            f"{1e3 * found['step_seconds']:,.0f}",
            f"{100 * found['mfu']:.1f}",
        )
        rows.append([f"{config} {others}".rstrip(), topology, found["mesh"], *figures])
    versions = sorted({found["versions"] for found in records.values()})
    return "\n".join([*table(HEADS, rows), "", f"Compiled by {' and '.join(versions)}.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=PODS, action="append", help="one config; may be given again")
    parser.add_argument("--record", action="store_true", help="keep the figures, and write the table to docs/pods.md")
    options = parser.parse_args()
    if not aot.has_libtpu():
        sys.exit("benchmarks.pods compiles with libtpu, which is not installed: pip install -e '.[tpu]'")
    aot.prepare()  # before jax is imported
    kept = json.loads(RECORDS.read_text()) if RECORDS.exists() else {}
    found = {}
    for name in options.case or PODS:
        found[name] = compiled(name)
        print(name, json.dumps(found[name]), flush=True)
        if options.record:  # each as it comes: all of them take a quarter of an hour
            records = {name: (kept | found)[name] for name in PODS if name in kept | found}
            RECORDS.write_text(json.dumps(records, indent=2) + "\n")
            before, _, rest = PAGE.read_text().partition(BEGIN)
            PAGE.write_text(before + BEGIN + page(records) + END + rest.partition(END)[2])
    print(page(found))


if __name__ == "__main__":
    main()
