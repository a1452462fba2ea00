"""How long a compiled program takes on one device, read off its schedule.

An instruction takes as long as its FLOPs at the chip's peak or its bytes at HBM's bandwidth, whichever is longer; a matrix
product as long as the compiler's own `estimated_cycles`, which know its tiles. Copies between HBM and VMEM, copies to and from
the host and asynchronous collectives run beside what is scheduled between their start and their end, one at a time each; a
collective without such a window holds everything up. Loops run their trip count.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from sharding.hlo import HOST, Computation, Instruction, Module, parse
from sharding.hlo_work import COLLECTIVES, FREE, Work, is_collective

NETWORKS = ("ICI", "DCN", "to host", "from host")


@dataclass(frozen=True)
class Machine:
    """One device, and where all are. FLOP/s, bytes/s, Hz."""

    peak: float
    bandwidth: float
    clock: float
    link: float  # of an ICI link, one way; of a device's share of it, where a chip has several
    dcn: float
    host: float  # to the host's memory or from it
    places: tuple[tuple[int, ...], ...]  # slice, then coordinates on the torus, in the order of the mesh
    torus: int = 16  # an axis has links around if its length is a multiple of this

    def links(self, group: Sequence[int]) -> int:
        """Over how many links a device of this group sends at once; 0 if the group is on several slices."""
        axes = self.axes(group)
        return 0 if axes is None else max(1, sum(links for _, links in axes))

    def axes(self, group: Sequence[int]) -> list[tuple[int, int]] | None:
        """Of each axis of the torus that the group spans, how many devices and over how many links: two, or one where it spans
        a part or there is no link around. None if the group is on several slices."""
        places = [self.places[n] for n in group if n < len(self.places)]
        columns = [set(column) for column in zip(*places, strict=True)]
        if not columns or len(columns[0]) > 1:
            return None
        whole = [len(set(column)) for column in zip(*self.places, strict=True)]
        spans = [(len(c), full) for c, full in zip(columns[1:], whole[1:], strict=True) if len(c) > 1]
        return [(span, 2 if span == full and full % self.torus == 0 else 1) for span, full in spans]

    def exchange(self, group: Sequence[int], sent: float) -> float:
        """Seconds until every device of a group has sent a part of `sent` bytes to each other one, by the shortest ways: along
        an axis, half of all crosses the middle."""
        axes = self.axes(group)
        if axes is None:
            return sent / self.dcn
        return max((sent * max(1.0, span / 4) / (links * self.link) for span, links in axes), default=sent / self.link)


@dataclass
class Traffic:
    """Of one kind of collective over one network, a device and step."""

    count: int = 0
    bytes: float = 0.0  # that a device sends
    seconds: float = 0.0
    exposed: float = 0.0  # of these, with nothing else to do

    def add(self, other: "Traffic", times: int) -> None:
        for name in ("count", "bytes", "seconds", "exposed"):
            setattr(self, name, getattr(self, name) + times * getattr(other, name))


@dataclass
class Estimate:
    """A step of one device."""

    flops: float = 0.0
    bytes: float = 0.0  # to and from HBM
    compute: float = 0.0  # seconds, with waits for copies from HBM
    roofline: float = 0.0  # seconds of the core alone: every instruction at peak or full bandwidth, nothing waited for
    streaming: float = 0.0  # seconds of HBM alone: all bytes at full bandwidth
    collectives: dict[tuple[str, str], Traffic] = field(default_factory=dict)  # by kind and network
    unread: dict[str, int] = field(default_factory=dict)  # what was not understood, and how often

    @property
    def exposed(self) -> float:
        return sum(traffic.exposed for traffic in self.collectives.values())

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed

    @property
    def bound(self) -> float:
        """Seconds of the busiest of core, HBM and networks: no schedule is faster."""
        networks = [sum(t.seconds for (_, n), t in self.collectives.items() if n == name) for name in NETWORKS]
        return max(self.roofline, self.streaming, *networks)

    def add(self, other: "Estimate", times: int) -> None:
        for name in ("flops", "bytes", "compute", "roofline", "streaming"):
            setattr(self, name, getattr(self, name) + times * getattr(other, name))
        for key, traffic in other.collectives.items():
            self.collectives.setdefault(key, Traffic()).add(traffic, times)
        for what, count in other.unread.items():
            self.unread[what] = self.unread.get(what, 0) + times * count


def estimate(text: str, machine: Machine) -> Estimate:
    """Of the text of a compiled program."""
    module = parse(text)
    return Replay(module, machine, Work(module)).run(module.entry)


@dataclass(frozen=True)
class Sending:
    """The time of a collective, or of a copy to or from the host, on its network, which carries one at a time."""

    begins: float
    ends: float
    key: tuple[str, str]


@dataclass
class Pending:
    """What runs beside the schedule until it is waited for."""

    ends: float
    key: tuple[str, str] | None  # of a collective or a copy to or from the host; None: a copy between HBM and VMEM


@dataclass
class Replay:
    module: Module
    machine: Machine
    work: Work
    known: dict[str, Estimate] = field(default_factory=dict)  # by computation

    def run(self, computation: Computation) -> Estimate:
        if computation.name not in self.known:
            self.known[computation.name] = Schedule(self, computation).run()
        return self.known[computation.name]


class Schedule:
    """One computation, from its first instruction to its last."""

    def __init__(self, replay: Replay, computation: Computation):
        self.replay, self.computation = replay, computation
        self.module, self.machine, self.work = replay.module, replay.machine, replay.work
        self.now, self.total = 0.0, Estimate()
        self.sent: dict[str, list[Sending]] = {name: [] for name in NETWORKS}
        self.copies_free = 0.0
        self.pending: dict[str, Pending] = {}

    def run(self) -> Estimate:
        for instruction in self.computation.instructions:
            self.step(instruction)
        for name in list(self.pending):
            self.wait(name)
        return self.total

    def step(self, instruction: Instruction) -> None:
        opcode = instruction.opcode
        if opcode == "while":
            self.loop(instruction)
        elif opcode in ("conditional", "call"):
            self.branch(instruction)
        elif opcode == "send":
            self.send(instruction)
        elif opcode == "recv-done":
            self.wait(self.channel(instruction))
        elif opcode == "async-update":
            if instruction.operands[0] in self.pending:
                self.pending[instruction.name] = self.pending.pop(instruction.operands[0])
        elif opcode.endswith("-done") and opcode not in FREE:
            self.wait(instruction.operands[0])
        elif opcode.endswith("-start") and not is_collective(opcode) and not self.collective_inside(instruction):
            self.copy(instruction)
        elif collective := self.collective_inside(instruction):
            self.communicate(instruction, collective)
        elif opcode not in FREE:
            self.compute(instruction)

    def loop(self, instruction: Instruction) -> None:
        body, times = self.module.called(instruction, "body"), self.module.trip_count(instruction, self.computation)
        if times is None:
            self.note("loops of unknown length, counted once")
        if body is not None:
            self.include(self.replay.run(body), times if times is not None else 1)

    def branch(self, instruction: Instruction) -> None:
        """A call, or the longest of a conditional's branches."""
        listed = re.search(r"branch_computations={([^}]*)}", instruction.attributes)
        names = re.findall(r"[\w.-]+", listed[1]) if listed else []
        names += [instruction.attribute(a) for a in ("to_apply", "calls", "true_computation", "false_computation")]
        found = [self.replay.run(self.module.computations[n]) for n in names if n in self.module.computations]
        if found:
            self.include(max(found, key=lambda branch: branch.seconds), 1)

    def include(self, other: Estimate, times: int) -> None:
        self.total.add(other, times)
        self.now += times * other.seconds

    def compute(self, instruction: Instruction) -> None:
        flops, moved = self.work.flops(self.computation, instruction), self.work.bytes(self.computation, instruction)
        streaming = moved / self.machine.bandwidth
        roofline = max(flops / self.machine.peak, streaming)
        cycles = instruction.number("estimated_cycles") if flops and instruction.opcode != "custom-call" else None
        seconds = max(roofline, cycles / self.machine.clock) if cycles else roofline
        if instruction.target == "tpu_custom_call" and not flops:
            self.note("kernels without a cost estimate, counted by their bytes")
        self.total.add(Estimate(flops, moved, seconds, roofline, streaming), 1)
        self.now += seconds

    def copy(self, instruction: Instruction) -> None:
        """An asynchronous copy or slice, by the array that it gives; it is compute if it is waited for."""
        source = self.computation.operands(instruction)[0].arrays[0]
        given = min(
            (a for a in instruction.arrays if a.dtype == source.dtype and a.shape), key=lambda a: a.size, default=source
        )
        if any(a.space == HOST for a in instruction.arrays):
            from_host = source.space == HOST and instruction.opcode != "dynamic-update-slice-start"
            network = "from host" if from_host else "to host"
            self.transfer(instruction.name, ("copy", network), given.bytes, given.bytes / self.machine.host)
            self.total.add(Estimate(bytes=given.bytes, streaming=given.bytes / self.machine.bandwidth), 1)
            return
        result = next((a for a in instruction.arrays if a.size == given.size and a.space != source.space), given)
        moved = given.bytes * ((source.space == 0) + (result.space == 0))
        seconds = moved / self.machine.bandwidth
        if "cross_program_prefetch_index" not in instruction.attributes:  # those run at the end of the step before
            self.copies_free = max(self.now, self.copies_free) + seconds
            self.pending[instruction.name] = Pending(self.copies_free, None)
        self.total.add(Estimate(bytes=moved, streaming=seconds), 1)

    def collective_inside(self, instruction: Instruction) -> Instruction | None:
        if is_collective(instruction.opcode):
            return None if instruction.opcode.endswith("-done") else instruction
        if instruction.opcode not in ("fusion", "async-start", "call-start"):
            return None
        return next((i for i in self.module.inside(instruction) if i.opcode in COLLECTIVES), None)

    def communicate(self, instruction: Instruction, collective: Instruction) -> None:
        """A collective alone, or in a fusion: the one that starts it, one that multiplies meanwhile, one that waits for it, or
        one that does all at once."""
        targets = {i.target for i in self.module.inside(instruction)}
        # Of a channel there may be several kinds: all collectives of shard_maps have the first.
        channel = f"{collective.opcode} on channel {collective.attribute('channel_id')}"
        if "AsyncCollectiveStart" in targets:
            self.start(channel, instruction, collective)
        elif "AsyncCollectiveDone" in targets:
            self.wait(channel)
        elif channel in self.pending and instruction.opcode == "fusion":
            self.compute(instruction)
        elif instruction.opcode.endswith("-start"):
            self.start(instruction.name, instruction, collective)
        else:
            if instruction.opcode == "fusion":
                self.compute(instruction)
            self.start(instruction.name, instruction, collective)
            self.wait(instruction.name)

    def start(self, name: str, instruction: Instruction, collective: Instruction) -> None:
        scope = self.computation
        if collective is not instruction:
            scope = next(c for c in self.module.computations.values() if c.by_name.get(collective.name) is collective)
        local = sum(a.bytes for o in scope.operands(collective) for a in o.arrays)
        kind = collective.opcode.removesuffix("-start")
        if kind == "all-reduce" and "all-reduce-scatter" in (instruction.attribute("calls") or ""):
            kind = "reduce-scatter"
        try:
            group = first_group(collective.attributes, len(self.machine.places))
        except ValueError:
            self.note("collectives whose groups were not understood, taken for all devices")
            group = list(range(len(self.machine.places)))
        links = self.machine.links(group)
        if '"emitter":"1D' in collective.attributes:  # one ring through all devices, whatever their torus offers
            links = min(links, 2)
        sent = bytes_sent(kind, local, len(group))
        if kind == "collective-permute":
            links = min(links, 1)
        network, speed = ("ICI", links * self.machine.link) if links else ("DCN", self.machine.dcn)
        seconds = self.machine.exchange(group, sent) if "all-to-all" in kind else sent / speed
        self.transfer(name, (kind, network), sent, seconds)

    def send(self, instruction: Instruction) -> None:
        """To the other slices, through the host; the compiler has reduced within the slice before."""
        local = sum(a.bytes for a in self.computation.operands(instruction)[0].arrays)
        transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
        slices = len({place[0] for place in self.machine.places})
        kind = transfer[1].lower().replace("_", "-") if transfer else "send"
        sent = bytes_sent(kind, local, slices)
        self.transfer(self.channel(instruction), (kind, "DCN"), sent, sent / self.machine.dcn)

    def channel(self, instruction: Instruction) -> str:
        """What a send and the end of its answer have in common."""
        if instruction.opcode == "recv-done":
            instruction = self.computation.by_name[instruction.operands[0]]
        found = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', instruction.attributes)
        return f"rendezvous {found[1]}" if found else instruction.name

    def transfer(self, name: str, key: tuple[str, str], sent: float, seconds: float) -> None:
        queue = self.sent[key[1]]
        begins = max(self.now, queue[-1].ends) if queue else self.now
        queue.append(Sending(begins, begins + seconds, key))
        self.pending[name] = Pending(begins + seconds, key)
        self.total.collectives.setdefault(key, Traffic()).add(Traffic(1, sent, seconds), 1)

    def wait(self, name: str) -> None:
        pending = self.pending.pop(name, None)
        if pending is None or pending.ends <= self.now:
            return
        if pending.key is None:
            self.total.compute += pending.ends - self.now
        else:  # what is waited for may have stood behind others
            for sending in self.sent[pending.key[1]]:
                late = min(sending.ends, pending.ends) - max(sending.begins, self.now)
                self.total.collectives[sending.key].exposed += max(0.0, late)
        self.now = pending.ends

    def note(self, what: str) -> None:
        self.total.unread[what] = self.total.unread.get(what, 0) + 1


def bytes_sent(kind: str, local: float, group: int) -> float:
    """By a device that holds `local` bytes before, among `group` devices, by the algorithms that move least."""
    others = group - 1
    factors = {
        "all-gather": others,
        "all-reduce": 2 * others / group,
        "reduce-scatter": others / group,
        "all-to-all": others / group,
        "ragged-all-to-all": others / group,
    }
    return local * factors.get(kind, 1)


def first_group(attributes: str, devices: int) -> list[int]:
    """The first of the groups of devices that exchange something. Raises ValueError if they are written in an unknown way."""
    pairs = re.search(r"source_target_pairs={{(\d+),(\d+)}", attributes)
    if pairs:
        return [int(pairs[1]), int(pairs[2])]
    if re.search(r"replica_groups={}", attributes):
        return list(range(devices))
    listed = re.search(r"replica_groups={{([\d,]*)}", attributes)
    if listed:
        return [int(n) for n in listed[1].split(",")]
    # [groups, size] <= [extents]T(order): the devices counted off over `extents`, transposed, cut into groups
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        shape, extents, order = ([int(n) for n in (part or "").split(",") if n] for part in iota.groups())
        ids = np.arange(math.prod(extents)).reshape(extents)
        return (ids.transpose(order) if order else ids).reshape(shape)[0].tolist()
    # mesh['a'=4,'b'=4] {'b'}: along the named axes, of devices that are counted off over the mesh or, with
    # device_ids=([4,4]T(1,0)), over those extents, transposed
    mesh = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? ?\{([^}]*)\}", attributes
    )
    if mesh and not re.search(r"[:(]", mesh[4]):
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        extents, order = ([int(n) for n in (part or "").split(",") if n] for part in mesh.group(2, 3))
        ids = np.arange(math.prod(axes.values())).reshape(extents or -1)
        ids = (ids.transpose(order) if order else ids).reshape(list(axes.values()))
        along = re.findall(r"'(\w+)'", mesh[4])
        return ids[tuple(slice(None) if name in along else 0 for name in axes)].reshape(-1).tolist()
    raise ValueError(attributes[:200])


def as_dict(found: Estimate) -> dict:
    """For JSON."""
    plain = dataclasses.asdict(found)
    plain["collectives"] = [
        {"kind": kind, "network": network, **dataclasses.asdict(traffic)}
        for (kind, network), traffic in sorted(found.collectives.items())
    ]
    return plain | {"exposed": found.exposed, "bound": found.bound, "seconds": found.seconds}
