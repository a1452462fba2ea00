"""`podwright data bench NAME`: what a host's input gives by itself, and how many chips that feeds."""

import json
import os
import pathlib
import resource
import statistics
import time
from typing import Any

import numpy as np

from configs.overrides import resolve
from configs.schema import Config, ConfigError
from data import open_data
from data.bad_records import BadRecord

USAGE = """\
podwright data bench NAME [--seconds 10] [--plan FILE] [--section.field VALUE ...]
runs the input of a config alone. FILE is what `podwright plan --json` wrote: its step time says how many chips a host's
cores feed; without it chips are taken to run at their peak, faster than any does."""
WARM_UP = 2  # batches
DECODED = 300  # examples whose images are decoded and nothing else


def main(argv: list[str]) -> int:
    """Raises ConfigError, DataError."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    resolved = resolve(argv[0], argv[1:], {"seconds": "SECONDS", "plan": "FILE"})
    config, text = resolved.config, resolved.options.get("seconds", "10")
    try:
        seconds = float(text)
    except ValueError:
        raise ConfigError(f"--seconds {text} is not a number") from None
    plan = read_plan(resolved.options["plan"]) if "plan" in resolved.options else None
    for line in report(config, measure(config, seconds), plan):
        print(line)
    return 0


def read_plan(file: str) -> dict[str, Any]:
    try:
        plan = json.loads(pathlib.Path(file).read_text())
        return {"seconds": plan["step_seconds"], "chips": plan["chips"], "topology": plan["topology"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"--plan {file} is not what `podwright plan --json` writes, with libtpu") from None


def measure(config: Config, seconds: float) -> dict[str, float]:
    """Batches read ahead as in training, taken as fast as they come."""
    data = open_data(config.data)
    batches = data.train_batches(0)
    for _ in range(WARM_UP):
        next(batches)
    began, used, count = time.perf_counter(), processor(), 0
    while time.perf_counter() - began < seconds:
        batch = next(batches)
        count += 1
    wall, spent = time.perf_counter() - began, processor() - used
    batches.close()
    return {
        **({"decode": seconds_to_decode(data.train)} if data.manifest.get("images") else {}),
        "rows": count * config.data.batch_size,
        "wall": wall,
        "processor": spent,
        "bytes": sum(rows.nbytes for rows in batch.values()),
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def seconds_to_decode(train: Any) -> float:
    """Of processor time, of the one or two images of an example: what no input of them can do without."""
    from data.image_decoding import decoded

    took = []
    for position in range(DECODED):
        contents = list(train.split.encoded(train.wanted(np.array([position]))))
        began = time.process_time()
        for content in contents:
            if not isinstance(content, BadRecord):
                decoded(content[0])
        took.append(time.process_time() - began)
    return statistics.mean(took)


def processor() -> float:
    """Seconds of this process and of its workers that have ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def report(config: Config, found: dict[str, float], plan: dict[str, Any] | None) -> list[str]:
    tokens = getattr(config.data, "sequence_length", 1)
    unit = "images" if config.data.kind == "images" else "tokens"
    units = found["rows"] * tokens
    a_core = units / found["processor"]
    lines = [
        f"input       {config.name}, batches of {config.data.batch_size:,} rows, {found['bytes'] / 2**20:,.2f} MiB each",
        f"speed       {units / found['wall']:,.0f} {unit}/s on this machine of {os.cpu_count()} cores",
        f"a core      {a_core:,.0f} {unit} a second of processor time ({found['processor'] / found['wall']:.2f} cores busy)",
        f"memory      {found['memory']:.2f} GiB at most",
    ]
    if "decode" in found:
        share = found["decode"] / (found["processor"] / units)
        lines.append(
            f"decoding    alone gives {1 / found['decode']:,.0f} images a second of processor time: the input reaches "
            f"{share:.0%} of that"
        )
    if plan:
        need = config.data.batch_size * tokens / plan["seconds"] / plan["chips"]
        return [
            *lines,
            f"feeds       {a_core / need:,.1f} chips a core, at the {need:,.0f} {unit}/s a chip of {plan['topology']}",
        ]
    return [*lines, *(f"feeds       {line}" for line in at_peak(config, a_core, unit))]


def at_peak(config: Config, a_core: float, unit: str) -> list[str]:
    from sharding.topologies import CHIPS
    from trainer.tasks import make_task

    task = make_task(config)
    a_unit = task.flops_per_step / task.units_per_step
    return [
        f"{a_core * a_unit / chip.peak:,.1f} chips of {name} a core, even if they ran at their peak of "
        f"{chip.peak / a_unit:,.0f} {unit}/s"
        for name, chip in CHIPS.items()
    ]
