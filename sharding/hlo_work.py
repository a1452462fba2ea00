"""What one instruction of a compiled program does on one device: matrix FLOPs, and bytes that cross between HBM and the core."""

import functools
import math
import re

from sharding.hlo import Array, Computation, Instruction, Module

# Those that move nothing, or whose bytes are counted where they are used.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
FREE |= {"opt-barrier", "while", "conditional", "call", "domain", "add-dependency"}
FREE |= {"send", "recv", "send-done", "recv-done"}
NO_CALLS = {"AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast"}  # custom calls that only tell the compiler
SLICES = {"dynamic-slice", "slice", "gather"}  # of their first operand they read what they give


class Work:
    """FLOPs and bytes of the instructions of one program."""

    def __init__(self, module: Module):
        self.module = module
        self._flops: dict[str, float] = {}

    def flops(self, computation: Computation, instruction: Instruction) -> float:
        """Of dots and convolutions, a multiplication and an addition each; of a kernel, what its cost estimate says, of splash
        attention the blocks that it computes, of others 0."""
        if instruction.opcode == "dot":
            return dot_flops(instruction, computation.operands(instruction)[0].arrays[0])
        if instruction.opcode == "convolution":
            return convolution_flops(instruction, *(o.arrays[0] for o in computation.operands(instruction)[:2]))
        if instruction.opcode == "custom-call":
            return cost_estimate(instruction, "flops") or splash_flops(instruction, computation.operands(instruction))
        called = self.module.called(instruction) if instruction.opcode in ("fusion", "async-start") else None
        if called is None:
            return 0.0
        if called.name not in self._flops:
            self._flops[called.name] = sum(self.flops(called, inner) for inner in called.instructions)
        return self._flops[called.name]

    def bytes(self, computation: Computation, instruction: Instruction) -> float:
        """Reads and writes of HBM: arrays in VMEM cost nothing, of an array that is sliced the slice, and of one that is
        updated in place the update. A kernel reads its operands and writes its results once, unless its cost estimate says
        otherwise and none of them is in VMEM."""
        operands = computation.operands(instruction)
        if instruction.opcode in FREE:
            return 0.0
        if instruction.opcode == "fusion":
            called = self.module.called(instruction)
            assert called is not None
            return self._fusion_bytes(instruction, called, operands)
        if instruction.opcode == "custom-call":
            if instruction.target in NO_CALLS:
                return 0.0
            estimate = cost_estimate(instruction, "bytes_accessed")
            arrays = [a for o in operands for a in o.arrays] + list(instruction.arrays)
            if estimate and all(a.space == 0 for a in arrays):
                return estimate
        if instruction.opcode in SLICES:
            return moved(instruction, operands) + sum(a.hbm_bytes for o in operands[1:] for a in o.arrays)
        if instruction.opcode == "dynamic-update-slice":
            update = operands[1].arrays[0]
            return update.hbm_bytes + (update.bytes if instruction.arrays[0].space == 0 else 0)
        reads = sum(a.hbm_bytes for o in {o.name: o for o in operands}.values() for a in o.arrays)
        if instruction.opcode == "scatter":  # in place: of the first operand what the updates touch
            reads += operands[-1].arrays[0].bytes - operands[0].arrays[0].hbm_bytes
            return reads + (operands[-1].arrays[0].bytes if instruction.arrays[0].space == 0 else 0)
        return reads + sum(a.hbm_bytes for a in instruction.arrays)

    def _fusion_bytes(self, fusion: Instruction, called: Computation, operands: list[Instruction]) -> float:
        total, seen = 0.0, set()
        for number, operand in enumerate(operands):
            parameter = called.parameters.get(number)
            if operand.name in seen or parameter is None or not any(a.hbm_bytes for a in operand.arrays):
                continue
            seen.add(operand.name)
            total += self._read(called, parameter)
        roots = called.operands(called.root) if called.root.opcode == "tuple" else [called.root]
        outputs = [root.arrays for root in roots]
        # The fusion's own shapes have the memory spaces, leaf by leaf.
        leaves, at = fusion.arrays, 0
        for root, arrays in zip(roots, outputs, strict=True):
            own = leaves[at : at + len(arrays)]
            at += len(arrays)
            total += self._written(called, root, own)
        return total

    def _read(self, called: Computation, value: Instruction) -> float:
        """Bytes that a fusion reads of a parameter in HBM."""
        size, read = sum(a.bytes for a in value.arrays), 0.0
        for user in called.users.get(value.name, []):
            if user.opcode in SLICES and user.operands[0] == value.name:
                read += user.arrays[0].bytes
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
                continue
            elif user.opcode == "scatter" and user.operands[0] == value.name:
                read += called.operands(user)[-1].arrays[0].bytes
            elif user.opcode in ("bitcast", "get-tuple-element"):
                read += self._read(called, user)
            elif user.opcode == "tuple" or is_collective(user.opcode) or user.opcode == "custom-call":
                continue  # passed on, or moved by a collective, which is counted as such
            elif user.opcode == "fusion" and (inner := self.module.called(user)):
                for number, name in enumerate(user.operands):
                    if name != value.name or number not in inner.parameters:
                        continue
                    parameter = inner.parameters[number]
                    same = without_bitcasts(inner, inner.root) is parameter  # another name for it: who uses that?
                    read += self._read(called, user) if same else self._read(inner, parameter)
            else:
                return size
        return min(read, size)

    def _written(self, called: Computation, root: Instruction, leaves: tuple[Array, ...]) -> float:
        root = without_bitcasts(called, root)
        if root.opcode in ("parameter", "get-tuple-element", "custom-call") or is_collective(root.opcode):
            return 0.0
        if root.opcode == "dynamic-update-slice":
            return called.operands(root)[1].arrays[0].bytes if leaves[0].space == 0 else 0.0
        if root.opcode == "scatter":
            return called.operands(root)[-1].arrays[0].bytes if leaves[0].space == 0 else 0.0
        inner = self.module.called(root) if root.opcode == "fusion" else None
        if inner is not None and (update := without_bitcasts(inner, inner.root)).opcode == "dynamic-update-slice":
            return inner.operands(update)[1].arrays[0].bytes if leaves[0].space == 0 else 0.0
        return sum(a.hbm_bytes for a in leaves)


def without_bitcasts(called: Computation, value: Instruction) -> Instruction:
    while value.opcode == "bitcast":
        value = called.operands(value)[0]
    return value


def is_collective(opcode: str) -> bool:
    return opcode.removesuffix("-start").removesuffix("-done") in COLLECTIVES


COLLECTIVES = frozenset(
    [
        "all-gather",
        "all-reduce",
        "reduce-scatter",
        "all-to-all",
        "ragged-all-to-all",
        "collective-permute",
        "collective-broadcast",
    ]
)


def moved(instruction: Instruction, operands: list[Instruction]) -> float:
    """Bytes of a copy of what is given, out of HBM and into it."""
    size = instruction.arrays[0].bytes
    return sum(size for array in (operands[0].arrays[0], instruction.arrays[0]) if array.space == 0)


def cost_estimate(instruction: Instruction, key: str) -> float | None:
    """Of a Pallas kernel with one; None if there is none."""
    found = re.search(rf'"cost_estimate":\{{[^}}]*"{key}":"?(\d+)', instruction.attributes)
    return float(found[1]) if found else None


# Matrix products of the scores' size: q k, p v; for dk and dv again q k, do v, p do, ds q; for dq again q k, do v, ds k.
SPLASH_PRODUCTS = {"fwd": 2, "dkv": 4, "dq": 3}


def splash_flops(kernel: Instruction, operands: list[Instruction]) -> float:
    """Of JAX's splash attention, where models/kernels/splash_tpu.py has named the scope by its pairs of queries and keys."""
    name = re.search(r"splash_m[hq]a_(fwd|dkv|dq)", kernel.attributes)
    pairs = re.search(r"pairs_(\d+)_(\d+)_(\d+)", kernel.attributes)
    queries = next((o.arrays[0] for o in operands if o.arrays[0].dtype in ("bf16", "f32")), None)
    if not (name and pairs and queries):
        return 0.0
    count = int(pairs[1 + list(SPLASH_PRODUCTS).index(name[1])])
    return 2.0 * SPLASH_PRODUCTS[name[1]] * count * math.prod(queries.shape[:-2]) * queries.shape[-1]


def dot_flops(dot: Instruction, left: Array) -> float:
    contracted = math.prod(left.shape[axis] for axis in dot.list_attribute("lhs_contracting_dims"))
    return 2.0 * dot.arrays[0].size * contracted


def convolution_flops(convolution: Instruction, image: Array, kernel: Array) -> float:
    """Products with padding are not counted, nor those with the zeros of a dilation.

    XLA writes matrix products as convolutions, with batch axes as windows as long as the image.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes)
    assert labels, convolution.name
    inputs, kernels, outputs = labels[1], labels[2], labels[3]
    window, spatial = window_of(convolution), [c for c in kernels if c.isdigit()]
    valid = 1
    for axis in spatial:
        n = int(axis)
        sizes = (image.shape[inputs.index(axis)], kernel.shape[kernels.index(axis)])
        valid *= valid_positions(*sizes, convolution.arrays[0].shape[outputs.index(axis)], *window(n))
    groups = int(convolution.attribute("batch_group_count") or 1)
    batch, features = image.shape[inputs.index("b")] // groups, kernel.shape[kernels.index("i")]
    return 2.0 * batch * features * kernel.shape[kernels.index("o")] * valid


def window_of(convolution: Instruction):
    """axis -> (stride, padding before, dilation of the image, dilation of the kernel)."""
    text = re.search(r"window={([^}]*)}", convolution.attributes)
    fields = dict(part.split("=") for part in text[1].split()) if text else {}

    def axis(n: int) -> tuple[int, int, int, int]:
        def field(name: str, default: str) -> str:
            return fields[name].split("x")[n] if name in fields else default

        padding = int(re.match(r"-?\d+", field("pad", "0_0"))[0])  # type: ignore[index]
        return int(field("stride", "1")), padding, int(field("lhs_dilate", "1")), int(field("rhs_dilate", "1"))

    return axis


@functools.cache
def valid_positions(
    image: int, kernel: int, output: int, stride: int, padding: int, image_dilation: int, kernel_dilation: int
) -> int:
    """Pairs of a kernel element and an output element between which there is an image element."""
    extent, count = (image - 1) * image_dilation + 1, 0
    for k in range(kernel):
        offset = k * kernel_dilation - padding  # output o looks at o * stride + offset
        first, last = max(0, -(offset // stride)), min(output - 1, (extent - 1 - offset) // stride)
        if image_dilation == 1:
            count += max(0, last - first + 1)
        else:
            count += sum((o * stride + offset) % image_dilation == 0 for o in range(first, last + 1))
    return count
