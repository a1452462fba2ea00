"""`podwright profile RUN`: what the steps that `train --profile` recorded were spent on, in words."""

import itertools
import math
import pathlib
import re
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from configs.schema import ConfigError
from sharding.hlo import Instruction, Module, parse
from sharding.hlo_work import is_collective
from trainer.profiling import FOLDER, PROGRAM

USAGE = """\
podwright profile RUN [--steps N]
what steps that `podwright train ... --profile steps=10:15` recorded were spent on, of the newest recording
TensorBoard and XProf show the recording itself: tensorboard --logdir RUN/profile"""
CONTAINERS = {"while", "conditional", "call"}  # their time is that of what they hold
MS = 1e6  # ns

Interval = tuple[float, float]  # ns


@dataclass
class Device:
    """The operations that one device ran, with their times."""

    operations: list[tuple[str, float, float]] = field(default_factory=list)  # name, start, end


@dataclass(frozen=True)
class Trace:
    steps: int
    input: list[Interval]  # when the host waited for a batch
    devices: list[Device]


@dataclass(frozen=True)
class Spent:
    """ms of a device and step; they add up."""

    compute: float
    exposed: float  # communication with nothing beside it
    hidden: float  # communication beside computation; not a part of the sum
    input: float  # nothing runs, and the host waits for a batch
    gaps: float  # nothing runs for other reasons

    @property
    def step(self) -> float:
        return self.compute + self.exposed + self.input + self.gaps


def main(argv: list[str]) -> int:
    if len(argv) != 1 or argv[0].startswith("-"):
        print(USAGE)
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    session = newest(pathlib.Path(argv[0]).expanduser())
    module = parse((session / PROGRAM).read_text())
    trace = read_trace(next(session.glob("*.xplane.pb")))
    for line in lines(session, module, trace):
        print(line)
    return 0


def newest(run: pathlib.Path) -> pathlib.Path:
    """The newest recording of a run. Raises ConfigError."""
    sessions = sorted((run / FOLDER / "plugins" / "profile").glob("*"))
    whole = [s for s in sessions if (s / PROGRAM).exists() and any(s.glob("*.xplane.pb"))]
    if not whole:
        raise ConfigError(f"{run} has no recorded steps: podwright train ... --run {run} --profile steps=10:15")
    return whole[-1]


def lines(session: pathlib.Path, module: Module, trace: Trace) -> Iterator[str]:
    instructions = {i.name: i for computation in module.computations.values() for i in computation.instructions}
    found = [spent(device, trace, instructions) for device in trace.devices]
    if not found or not trace.steps:
        raise ConfigError(f"{session} holds no operation of the step: nothing ran while it was recorded")
    mean = Spent(*(statistics.fmean(getattr(s, name) for s in found) for name in Spent.__dataclass_fields__))
    of = "1 device" if len(found) == 1 else f"{len(found)} devices, mean"
    yield f"profile     {session}"
    yield f"step        {mean.step:,.2f} ms, of {trace.steps} steps and {of}"
    for name, ms, remark in (
        ("compute", mean.compute, ""),
        ("exposed", mean.exposed, f"communication; another {mean.hidden:,.2f} ms of it ran beside computation"),
        ("input", mean.input, "the device waits, and the host waits for a batch"),
        ("gaps", mean.gaps, "the device waits for the host, or for nothing that the trace tells"),
    ):
        yield f"  {name:10}{ms:10,.2f} ms {100 * ms / mean.step:5.1f} %   {remark}".rstrip()
    yield "costliest   summed over the layers of a name, forward and backward apart"
    for label, ms in costliest(trace, instructions)[:3]:
        yield f"  {ms:10,.2f} ms {100 * ms / mean.step:5.1f} %   {label}"


def spent(device: Device, trace: Trace, instructions: dict[str, Instruction]) -> Spent:
    compute: list[Interval] = []
    sending: list[Interval] = []
    for name, start, end in device.operations:
        instruction = instructions.get(name)
        if instruction is None or instruction.opcode in CONTAINERS:
            continue
        (sending if is_collective(instruction.opcode) else compute).append((start, end))
    compute, sending = merged(compute), merged(sending)
    busy = merged([*compute, *sending])
    if not busy:
        return Spent(*[0.0] * 5)
    idle = [(a, b) for (_, a), (b, _) in itertools.pairwise(busy)]
    waiting = shared(idle, merged(trace.input))
    hidden = shared(compute, sending)
    parts = (total(compute), total(sending) - hidden, hidden, waiting, total(idle) - waiting)
    return Spent(*(part / trace.steps / MS for part in parts))


def costliest(trace: Trace, instructions: dict[str, Instruction]) -> list[tuple[str, float]]:
    """Layer and operation -> ms of a device and step, the longest first."""
    sums: dict[str, float] = {}
    for device in trace.devices:
        for name, start, end in device.operations:
            instruction = instructions.get(name)
            if instruction is not None and instruction.opcode not in CONTAINERS:
                label = layer_of(instruction)
                sums[label] = sums.get(label, 0.0) + (end - start)
    each = trace.steps * len(trace.devices) * MS
    return sorted(((label, ns / each) for label, ns in sums.items()), key=lambda item: -item[1])


# What jax writes into names beside the scopes that we gave.
STRUCTURE = (
    r"jit\(\w*\)|while|body|cond|closed_call|branch_\d+_fun|checkpoint|rematted_computation|shard_map|custom_\w+|pjit|"
)


def layer_of(instruction: Instruction) -> str:
    """`rec_0/mlp: dot_general, backward`, from the name that jax gave the operation."""
    found = re.search(r'op_name="([^"]*)"', instruction.attributes)
    if not found:
        return f"outside of layers: {instruction.opcode}"
    plain = re.sub(r"jit\([^()]*\)/?|\b(transpose|jvp|vmap)\(|\)", "", found[1])
    *scopes, operation = plain.split("/")
    scopes = [s for s in scopes if not re.fullmatch(STRUCTURE, s) and "->" not in s]
    backward = "recomputed" if "rematted" in found[1] else "backward" if "transpose(" in found[1] else ""
    where = "/".join(dict.fromkeys(scopes)) or "outside of layers"
    return f"{where}: {operation}" + (f", {backward}" if backward else "")


def read_trace(file: pathlib.Path) -> Trace:
    from jax.profiler import ProfileData

    return trace_of(ProfileData.from_file(str(file)).planes)


def trace_of(planes: Iterable[Any]) -> Trace:
    """TPUs and GPUs have a plane each, whose operations lie on lines; the CPU's are on its threads, and say which device."""
    steps: set[Any] = set()
    waits: list[Interval] = []
    devices: dict[str, Device] = {}
    for plane in planes:
        on_device = plane.name.startswith("/device:")
        all_lines = list(plane.lines)
        # The other lines of a TPU repeat its operations.
        for line in [line for line in all_lines if line.name == "XLA Ops"] or all_lines:
            for event in line.events:
                interval = (event.start_ns, event.start_ns + event.duration_ns)
                stats = dict(event.stats)
                if on_device:
                    name = event.name.split(" = ")[0].lstrip("%")
                    devices.setdefault(plane.name, Device()).operations.append((name, *interval))
                elif "hlo_op" in stats:
                    device = devices.setdefault(f"cpu {stats.get('device_ordinal', 0)}", Device())
                    device.operations.append((str(stats["hlo_op"]), *interval))
                elif event.name == "train" and "step_num" in stats:
                    steps.add(stats["step_num"])
                elif event.name == "input":
                    waits.append(interval)
    return Trace(len(steps), waits, list(devices.values()))


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """Their union, in order, without overlaps."""
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def total(intervals: Iterable[Interval]) -> float:
    return math.fsum(end - start for start, end in intervals)


def shared(one: list[Interval], other: list[Interval]) -> float:
    """How long both last, of lists without overlaps."""
    return total(one) + total(other) - total(merged([*one, *other]))
