"""h_t = a_t * h_{t-1} + x_t and its gradient as TPU kernels. Arrays keep their layout: time on sublanes, channels on lanes.

Each program holds one block (time, channels) of one sequence; time is the innermost grid axis and the state stays in
float32 scratch from block to block. Complex numbers travel as two arrays.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from models.kernels.segments import CHUNK, LANES, SUBLANES, multiply, put, read, step, take, walk, walk_back

EDGE = 16  # rows of one bf16 tile: the least that can be read next to a block
BLOCK_BYTES = 512 * 1024  # of one operand's block; about ten of them, double-buffered, must fit in 16 MiB


def linear_scan_forward(a: jax.Array, x: jax.Array, h0: jax.Array, reverse: bool) -> tuple[jax.Array, jax.Array]:
    """h (B T L) in x's dtype and the last state (B L), from a and x (B T L) and h0 (B L)."""
    length, (a, x) = x.shape[1], padded_time((a, 1), (x, 0), front=reverse)
    grid = Grid(x, against_time=reverse)
    num = 2 if jnp.iscomplexobj(x) else 1
    outs = pl.pallas_call(
        functools.partial(_forward_kernel, num=num, reverse=reverse),
        grid=grid.shape,
        in_specs=[grid.block] * 2 * num + [grid.state] * num,
        out_specs=[grid.block] * num + [grid.state] * num,
        out_shape=[_array(x)] * num + [_state(h0)] * num,
        scratch_shapes=[grid.carry()] * num + [grid.stage()] * 3 * num,
        compiler_params=grid.parameters,
        cost_estimate=_cost((a, x, x), flops=5, num=num),
        name="linear_scan",
    )(*_parts(a), *_parts(x), *_parts(h0[:, None]))
    return unpadded(_join(outs[:num]), length, front=reverse), _join(outs[num:])[:, 0]


def linear_scan_backward(
    a: jax.Array, h: jax.Array, h0: jax.Array, dh: jax.Array, dh_last: jax.Array, reverse: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cotangents of a, x (B T L) and h0 (B L): dx_t = g_t = dh_t + a_{t+1} g_{t+1}, da_t = g_t h_{t-1}, dh0 = a_0 g_0."""
    length, (a, h, dh) = a.shape[1], padded_time((a, 1), (h, 0), (dh, 0), front=reverse)
    grid = Grid(a, against_time=not reverse)
    num = 2 if jnp.iscomplexobj(a) else 1
    outs = pl.pallas_call(
        functools.partial(_backward_kernel, num=num, reverse=reverse),
        grid=grid.shape,
        in_specs=[grid.block] * 3 * num + [grid.edge(after=reverse)] * num + [grid.state] * 2 * num,
        out_specs=[grid.block] * 2 * num + [grid.state] * num,
        out_shape=[_array(a)] * num + [_array(dh)] * num + [_state(h0)] * num,
        scratch_shapes=[grid.carry()] * num + [grid.stage()] * 2 * num + [grid.stage(extra=SUBLANES)] * num,
        compiler_params=grid.parameters,
        cost_estimate=_cost((a, h, dh, a, dh), flops=8, num=num),
        name="linear_scan_gradient",
    )(*_parts(a), *_parts(dh), *_parts(h), *_parts(h), *_parts(h0[:, None]), *_parts(dh_last[:, None]))
    da, dx = (unpadded(_join(part), length, front=reverse) for part in (outs[:num], outs[num : 2 * num]))
    return da, dx, _join(outs[2 * num :])[:, 0]


def _forward_kernel(*refs, num: int, reverse: bool):
    a_refs, x_refs, h0_refs, h_refs, last_refs, carries, a_stages, x_stages, h_stages = _split(refs, num)
    _start(carries, h0_refs)

    def chunk(i, _):
        rows = _rows(i, x_refs[0], reverse)
        _put_all((*a_stages, *x_stages), (*a_refs, *x_refs), rows)
        for tile in range(x_stages[0].shape[0]):
            lanes = slice(tile * LANES, (tile + 1) * LANES)
            carry = tuple(ref[:, lanes] for ref in carries)
            _, after, carry = walk(read(a_stages, tile), read(x_stages, tile), carry, reverse)
            for part in range(num):
                carries[part][:, lanes] = carry[part]
                for k, number in enumerate(after):
                    h_stages[part].at[tile][step(k), :] = number[part]
        _take_all(h_refs, h_stages, rows)
        return 0

    lax.fori_loop(0, x_refs[0].shape[0] // CHUNK, chunk, 0)
    _finish(last_refs, carries)


def _backward_kernel(*refs, num: int, reverse: bool):
    a_refs, dh_refs, h_refs, edge_refs, h0_refs, dlast_refs, *rest = _split(refs, num)
    da_refs, dx_refs, dh0_refs, carries, a_stages, g_stages, h_stages = rest
    _start(carries, dlast_refs)
    against_time = not reverse
    length = a_refs[0].shape[0]
    # The state one step earlier in the recurrence: of the row before (after, if reverse), across the block's edge too.
    at_origin = pl.program_id(2) == pl.num_programs(2) - 1

    def chunk(i, _):
        rows = _rows(i, a_refs[0], against_time)
        _put_all((*a_stages, *g_stages), (*a_refs, *dh_refs), rows)
        at_edge = i == length // CHUNK - 1
        for part in range(num):
            put(h_stages[part], h_refs[part][rows, :], start=0 if reverse else SUBLANES)
            near = jnp.minimum(rows.start + CHUNK, length - EDGE) if reverse else jnp.maximum(rows.start - EDGE, 0)
            inside = h_refs[part][pl.ds(pl.multiple_of(near, EDGE), EDGE), :].astype(jnp.float32)
            outside = edge_refs[part][...].astype(jnp.float32)
            neighbours = jnp.where(at_edge, outside, inside)
            neighbours = neighbours[:SUBLANES] if reverse else neighbours[SUBLANES:]
            origin = jnp.broadcast_to(h0_refs[part][...], neighbours.shape)
            neighbours = jnp.where(at_edge & at_origin, origin, neighbours)
            put(h_stages[part], neighbours, start=CHUNK if reverse else 0)
        for tile in range(a_stages[0].shape[0]):
            lanes = slice(tile * LANES, (tile + 1) * LANES)
            carry = tuple(ref[:, lanes] for ref in carries)
            g, carry = walk_back(read(a_stages, tile), read(g_stages, tile), carry, reverse)
            before = read(h_stages, tile, start=1 if reverse else SUBLANES - 1)
            for k, (number, h) in enumerate(zip(g, before, strict=True)):
                da = multiply(number, h)
                for part in range(num):
                    g_stages[part].at[tile][step(k), :] = number[part]
                    a_stages[part].at[tile][step(k), :] = da[part]
            for part in range(num):
                carries[part][:, lanes] = carry[part]
        _take_all(da_refs, a_stages, rows)
        _take_all(dx_refs, g_stages, rows)
        return 0

    lax.fori_loop(0, length // CHUNK, chunk, 0)
    _finish(dh0_refs, carries)


class Grid:
    """(batch, channels, time) of an array (B T L): its blocks and their scratch. Time runs backwards if `against_time`."""

    def __init__(self, x: jax.Array, against_time: bool):
        self.batch, self.length, self.width = x.shape
        tiles = pl.cdiv(self.width, LANES)
        self.lanes = LANES * max(n for n in (1, 2, 3, 4) if tiles % n == 0)
        limit = BLOCK_BYTES // (self.lanes * x.dtype.itemsize)
        self.rows = largest_block(self.length, limit)
        self.blocks = self.length // self.rows
        self.shape = (self.batch, pl.cdiv(tiles * LANES, self.lanes), self.blocks)
        self.against_time = against_time
        self.block = pl.BlockSpec((None, self.rows, self.lanes), lambda b, c, t: (b, self.time(t), c))
        self.state = pl.BlockSpec((None, 1, self.lanes), lambda b, c, t: (b, 0, c))
        self.parameters = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))

    def time(self, t):
        return self.blocks - 1 - t if self.against_time else t

    def edge(self, after: bool) -> pl.BlockSpec:
        """The rows next to the block, in time after or before it."""
        per_block, last = self.rows // EDGE, self.length // EDGE - 1

        def index(b, c, t):
            t = self.time(t)
            return b, jnp.minimum((t + 1) * per_block, last) if after else jnp.maximum(t * per_block - 1, 0), c

        return pl.BlockSpec((None, EDGE, self.lanes), index)

    def carry(self):
        return pltpu.VMEM((SUBLANES, self.lanes), jnp.float32)

    def stage(self, extra: int = 0):
        return pltpu.VMEM((self.lanes // LANES, CHUNK + extra, LANES), jnp.float32)


def largest_block(length: int, limit: int) -> int:
    """Most rows, a multiple of a chunk no larger than `limit`, that divide `length` (itself a multiple of a chunk)."""
    return max(rows for rows in range(CHUNK, max(limit, CHUNK) + 1, CHUNK) if length % rows == 0)


def padded_time(*arrays_and_fills: tuple[jax.Array, float], front: bool) -> list[jax.Array]:
    """Arrays (B T ...) grown to whole chunks where the recurrence ends: a = 1, x = 0 carries a state on unchanged."""
    padding = -arrays_and_fills[0][0].shape[1] % CHUNK
    if not padding:
        return [array for array, _ in arrays_and_fills]
    time = (padding, 0) if front else (0, padding)
    return [
        jnp.pad(array, ((0, 0), time) + ((0, 0),) * (array.ndim - 2), constant_values=fill)
        for array, fill in arrays_and_fills
    ]


def unpadded(x: jax.Array, length: int, front: bool) -> jax.Array:
    if x.shape[1] == length:
        return x
    return x[:, x.shape[1] - length :] if front else x[:, :length]


def _split(refs: Sequence, num: int) -> list:
    """Consecutive groups of `num` refs, one for each part of a number."""
    return [refs[i : i + num] for i in range(0, len(refs), num)]


def _rows(i, block, against_time: bool):
    chunks = block.shape[0] // CHUNK
    return pl.ds(pl.multiple_of((chunks - 1 - i if against_time else i) * CHUNK, CHUNK), CHUNK)


def _put_all(stages: Sequence, blocks: Sequence, rows) -> None:
    for stage, block in zip(stages, blocks, strict=True):
        put(stage, block[rows, :])


def _take_all(blocks: Sequence, stages: Sequence, rows) -> None:
    for block, stage in zip(blocks, stages, strict=True):
        block[rows, :] = take(stage).astype(block.dtype)


def _start(carries: Sequence, firsts: Sequence) -> None:
    @pl.when(pl.program_id(2) == 0)
    def _():
        for carry, first in zip(carries, firsts, strict=True):
            carry[...] = jnp.broadcast_to(first[...], carry.shape)


def _finish(lasts: Sequence, carries: Sequence) -> None:
    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        for last, carry in zip(lasts, carries, strict=True):
            last[...] = carry[:1]


def _parts(x: jax.Array) -> list[jax.Array]:
    return [x.real, x.imag] if jnp.iscomplexobj(x) else [x]


def _join(parts: Sequence[jax.Array]) -> jax.Array:
    return lax.complex(*parts) if len(parts) == 2 else parts[0]


def _array(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, jnp.float32 if jnp.iscomplexobj(x) else x.dtype)


def _state(h0: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((h0.shape[0], 1, h0.shape[1]), jnp.float32)


def _cost(arrays: Sequence[jax.Array], flops: int, num: int) -> pl.CostEstimate:
    """Each array crosses HBM once."""
    return pl.CostEstimate(
        flops=flops * num**2 * arrays[0].size,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
        transcendentals=0,
    )
