"""Reads the text of a compiled program (`compiled.as_text()`): computations, their instructions in the order of the schedule,
and the arrays that these take and give."""

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

HOST = 5  # the memory space of the host
BITS = {"pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16}
BITS |= {"s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128, "token": 0}


@dataclass(frozen=True)
class Array:
    """Padding of tiles is not counted."""

    dtype: str
    shape: tuple[int, ...]
    space: int = 0  # 0: HBM, 1: VMEM, 5: the host's memory, others: scalar memory, semaphores

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        bits = BITS.get(self.dtype, 8 if self.dtype.startswith("f8") else 4 if self.dtype.startswith("f4") else 32)
        return self.size * bits // 8

    @property
    def hbm_bytes(self) -> int:
        return self.bytes if self.space == 0 else 0


@dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    arrays: tuple[Array, ...]  # what it gives; a tuple's leaves
    operands: tuple[str, ...]
    attributes: str  # what stands after the operands; for a parameter or constant what stands between the brackets, too
    is_root: bool = False

    def attribute(self, name: str) -> str | None:
        """The word after `name=`."""
        found = re.search(rf"\b{name}=%?([\w.-]+)", self.attributes)
        return found[1] if found else None

    def list_attribute(self, name: str) -> tuple[int, ...]:
        """The numbers of `name={1,2}`; none if it isn't there."""
        found = re.search(rf"\b{name}={{([\d,]*)}}", self.attributes)
        return tuple(int(n) for n in found[1].split(",") if n) if found else ()

    @property
    def target(self) -> str:
        """What a custom call calls."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def number(self, key: str) -> float | None:
        """The number of `"key":"123"` in the backend's configuration."""
        found = re.search(rf'"{key}":"?(-?\d+(?:\.\d+)?)', self.attributes)
        return float(found[1]) if found else None


@dataclass(frozen=True)
class Computation:
    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {instruction.name: instruction for instruction in self.instructions}

    @functools.cached_property
    def root(self) -> Instruction:
        return next((i for i in self.instructions if i.is_root), self.instructions[-1])

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(i.attributes.split(")")[0]): i for i in self.instructions if i.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        found: dict[str, list[Instruction]] = {}
        for instruction in self.instructions:
            for operand in dict.fromkeys(instruction.operands):
                found.setdefault(operand, []).append(instruction)
        return found

    def operands(self, instruction: Instruction) -> list[Instruction]:
        return [self.by_name[name] for name in instruction.operands if name in self.by_name]


@dataclass(frozen=True)
class Module:
    computations: dict[str, Computation]
    entry: Computation

    def called(self, instruction: Instruction, attribute: str = "calls") -> Computation | None:
        return self.computations.get(instruction.attribute(attribute) or "")

    def inside(self, instruction: Instruction) -> Iterator[Instruction]:
        """The instructions of a fusion or an async start, and of fusions inside it; itself if it holds none."""
        # SparseCores are called by `call-start`, as a function is.
        called = self.called(instruction, "to_apply" if instruction.opcode == "call-start" else "calls")
        if called is None:
            yield instruction
            return
        for inner in called.instructions:
            yield from self.inside(inner)

    def trip_count(self, loop: Instruction, scope: Computation) -> int | None:
        """How often a while loop, an instruction of `scope`, runs: N less where i begins, of the `i < N` that its condition
        asks, in steps of 1, as scans are lowered. i begins at 0, or later where the compiler has peeled the first turns off.
        None if the condition asks something else."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        condition = self.called(loop, "condition")
        if condition is None:
            return None
        root, inside = condition.root, condition
        given: dict[str, Instruction] = {}
        inner = self.called(root)
        if root.opcode == "fusion" and inner:
            arguments = condition.operands(root)
            given = {p.name: arguments[n] for n, p in inner.parameters.items() if n < len(arguments)}
            root, inside = inner.root, inner
        if root.opcode != "compare":
            return None
        sides = [given.get(o.name, o) for o in inside.operands(root)]
        direction = root.attribute("direction")
        if len(sides) == 2 and direction == "GT":
            sides, direction = sides[::-1], "LT"
        if len(sides) != 2 or direction != "LT" or sides[1].opcode != "constant":
            return None
        number = re.match(r"-?\d+", sides[1].attributes)
        return int(number[0]) - first_turn(sides[0], loop, scope) if number else None


def first_turn(counter: Instruction, loop: Instruction, scope: Computation) -> int:
    """What a loop's counter, a part of its condition's parameter, is before the first turn; 0 if that is not said."""
    given, place = scope.operands(loop), counter.attribute("index")
    if not given or given[0].opcode != "tuple" or place is None:
        return 0
    value = scope.by_name.get(given[0].operands[int(place)])
    while value is not None and value.opcode in ("copy", "bitcast"):
        value = next(iter(scope.operands(value)), None)
    number = re.match(r"-?\d+", value.attributes) if value is not None and value.opcode == "constant" else None
    return int(number[0]) if number else 0


def parse(text: str) -> Module:
    """Raises ValueError if there is no entry computation."""
    computations: dict[str, Computation] = {}
    entry, name = None, ""
    body: list[str] | None = None
    for line in text.splitlines():
        if body is None:
            header = re.match(r"(ENTRY )?%?([\w.-]+) \(.*{$", line)
            if header:
                name, body = header[2], []
                entry = name if header[1] else entry
        elif line == "}" or line.startswith("}, execution_thread="):
            found = map(parse_instruction, body)
            computations[name] = Computation(name, tuple(i for i in found if i))
            body = None
        elif line.startswith("  "):
            body.append(line.strip())
        elif body:  # a kernel's metadata runs over several lines
            body[-1] += line
    if entry is None:
        raise ValueError("this is no text of a compiled program: it has no ENTRY computation")
    return Module(computations, computations[entry])


def parse_instruction(line: str) -> Instruction | None:
    line = re.sub(r"/\*.*?\*/", "", line)
    head = re.match(r"(ROOT )?%?([\w.-]+) = ", line)
    if not head:
        return None
    rest = line[head.end() :]
    end = closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    end = closing("(" + rest, 0) - 1
    inside, attributes = rest[:end], rest[end + 1 :].lstrip(", ")
    if opcode in ("parameter", "constant"):
        return Instruction(head[2], opcode, arrays_of(shape), (), f"{inside}), {attributes}", bool(head[1]))
    operands = tuple(re.findall(r"%([\w.-]+)", inside))
    return Instruction(head[2], opcode, arrays_of(shape), operands, attributes, bool(head[1]))


def closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` closes."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    return len(text)


@functools.lru_cache(maxsize=100_000)
def arrays_of(shape: str) -> tuple[Array, ...]:
    found = []
    for dtype, extents, layout in re.findall(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?", shape):
        space = re.search(r"S\((\d+)\)", layout)
        dims = tuple(int(n.lstrip("<=")) for n in extents.split(",") if n)
        found.append(Array(dtype, dims, int(space[1]) if space else 0))
    return tuple(found)
