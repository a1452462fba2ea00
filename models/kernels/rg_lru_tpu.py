"""The RG-LRU (griffin paper, equations 1 to 4) as one TPU kernel each way: gate matmuls, gates, resets and recurrence.

HBM sees u and h once (forward), u, dh and du once (backward): pre-activations, gates and decays exist only in VMEM, in
float32. The backward kernel recomputes them, and h inside a chunk of 64 steps from the float32 state saved at its start.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from models.kernels.gate_tiles import GateTiles
from models.kernels.rg_lru_gates import LN2, flags_of, gates_of
from models.kernels.segments import CHUNK, LANES, STEPS, SUBLANES, Number, put, read, step, take, walk, walk_back

GROUP = 2 * CHUNK  # time steps whose gates are multiplied at once
BLOCK = 512  # time steps of a block of wide tiles: eight chunks, one float32 tile of saved states
VMEM_DEFAULT = 16 * 2**20


def rg_lru_forward(
    u: jax.Array,
    segment_pos: jax.Array,
    w_input: jax.Array,
    b_input: jax.Array,
    w_a: jax.Array,
    b_a: jax.Array,
    log_decay: jax.Array,
    h0: jax.Array,
    save_states: bool,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """h (B T L) in u's dtype, the last state (B L) and, if wanted, the state before every chunk (B chunks L), float32.

    `log_decay` (L): log a_t = log_decay * r_t, so -8 softplus(a_param).
    """
    grid = Grid(u, w_input, against_time=False)
    u_padded, flags = grid.padded(u), grid.flags(segment_pos)
    outs = pl.pallas_call(
        functools.partial(_forward_kernel, tiles=grid.tiles, padded=grid.padding > 0, save_states=save_states),
        grid=grid.shape,
        in_specs=[grid.block, grid.flag, *grid.weights, *grid.weights, grid.row, grid.state],
        out_specs=[grid.block, grid.state] + [grid.states] * save_states,
        out_shape=[jax.ShapeDtypeStruct(u_padded.shape, u.dtype), grid.state_array()]
        + [grid.states_array()] * save_states,
        scratch_shapes=[grid.carry(), *[grid.stage()] * 3],
        compiler_params=grid.parameters("parallel", "parallel", "arbitrary"),
        cost_estimate=grid.cost(passes=1, streams=2),
        name="rg_lru",
    )(
        u_padded,
        flags,
        *grid.gates(w_input, b_input, w_a, b_a, log_decay),
        grid.tiles.channels(h0[:, None]),
    )
    h, h_last = grid.unpadded(outs[0]), grid.tiles.unpadded(outs[1][:, 0])
    return h, h_last, outs[2] if save_states else None


def saved_states(u: jax.Array, weights: jax.Array) -> tuple[int, ...]:
    """Shape of the states that the forward kernel saves."""
    return Grid(u, weights, against_time=False).states_array().shape


def rg_lru_backward(states, dh, dh_last, u, segment_pos, w_input, b_input, w_a, b_a, log_decay):
    """Cotangents of u, w_input, b_input, w_a, b_a, log_decay and h0, in this order; all but du in float32."""
    grid = Grid(u, w_input, against_time=True)
    tiles = grid.tiles
    panels = jax.ShapeDtypeStruct((tiles.number, *tiles.panel_shape), jnp.float32)
    sums = jax.ShapeDtypeStruct((tiles.number, SUBLANES, tiles.lanes), jnp.float32)
    one_sums = pl.BlockSpec((None, SUBLANES, tiles.lanes), lambda c, b, t: (c, 0, 0))
    u_padded = grid.padded(u)
    du, dw_i, db_i, dw_a, db_a, d_decay, dh0 = pl.pallas_call(
        functools.partial(_backward_kernel, tiles=tiles, padded=grid.padding > 0),
        grid=grid.shape,
        in_specs=[grid.block, grid.flag, *grid.weights, *grid.weights, grid.row, grid.states, grid.block, grid.state],
        out_specs=[grid.block, grid.weights[0], one_sums, grid.weights[0], one_sums, one_sums, grid.state],
        out_shape=[jax.ShapeDtypeStruct(u_padded.shape, u.dtype), panels, sums, panels, sums, sums, grid.state_array()],
        scratch_shapes=[
            grid.carry(),
            *[grid.stage()] * 4,
            *[pltpu.VMEM((2 * GROUP, tiles.lanes), u.dtype)] * 3,
            pltpu.VMEM((2 * GROUP, tiles.lanes), jnp.float32),
        ],
        compiler_params=grid.parameters("parallel", "arbitrary", "arbitrary"),
        cost_estimate=grid.cost(passes=3, streams=3),
        name="rg_lru_gradient",
    )(
        u_padded,
        grid.flags(segment_pos),
        *grid.gates(w_input, b_input, w_a, b_a, log_decay),
        states,
        grid.padded(dh.astype(u.dtype)),
        tiles.channels(dh_last[:, None]),
    )
    db_i, db_a, d_decay = (tiles.unpadded(jnp.sum(x, axis=1).reshape(-1)) for x in (db_i, db_a, d_decay))
    dw_i, dw_a = (tiles.weight_gradient(dw) for dw in (dw_i, dw_a))
    dh0 = tiles.unpadded(dh0[:, 0])
    return grid.unpadded(du), dw_i, db_i.reshape(b_input.shape), dw_a, db_a.reshape(b_a.shape), d_decay, dh0


def _forward_kernel(
    u_ref,
    flag_ref,
    wi_ref,
    bi_ref,
    wa_ref,
    ba_ref,
    decay_ref,
    h0_ref,
    h_ref,
    last_ref,
    *rest,
    tiles,
    padded,
    save_states,
):
    states_ref = rest[0] if save_states else None
    carry_ref, u_stage, i_stage, a_stage = rest[save_states:]
    groups = u_ref.shape[0] // GROUP

    @pl.when(pl.program_id(2) == 0)
    def _():
        carry_ref[...] = jnp.broadcast_to(h0_ref[...], carry_ref.shape)

    def prepare(group, slot):
        u = u_ref[_rows(group, GROUP), :]
        put(u_stage.at[slot], u)
        put(i_stage.at[slot], tiles.multiply(u, wi_ref))
        put(a_stage.at[slot], tiles.multiply(u, wa_ref))

    def recur(group, slot):
        for half in range(GROUP // CHUNK):
            c = group * (GROUP // CHUNK) + half
            stages = [stage.at[slot, :, pl.ds(half * CHUNK, CHUNK), :] for stage in (u_stage, i_stage, a_stage)]
            if states_ref is not None:
                states_ref[pl.ds(c, 1), :] = carry_ref[:1]
            resets, pads = flags_of(flag_ref, c, padded)
            for tile in range(tiles.lanes // LANES):
                lanes = slice(tile * LANES, (tile + 1) * LANES)
                gates = gates_of(stages, tile, bi_ref, ba_ref, decay_ref, resets, pads)
                a: list[Number] = [(gate.a,) for gate in gates]
                x: list[Number] = [(gate.m * gate.iu,) for gate in gates]
                _, after, (carry,) = walk(a, x, (carry_ref[:, lanes],), reverse=False)
                carry_ref[:, lanes] = carry
                for k, (h,) in enumerate(after):
                    stages[0].at[tile][step(k), :] = h
            h_ref[_rows(c, CHUNK), :] = take(stages[0]).astype(h_ref.dtype)

    # The next group's products share a loop body, and so the instruction schedule, with this group's elementwise work.
    def pair(p, _):
        prepare(2 * p + 1, 1)
        recur(2 * p, 0)
        prepare(jnp.minimum(2 * p + 2, groups - 1), 0)
        recur(2 * p + 1, 1)
        return 0

    prepare(0, 0)
    lax.fori_loop(0, groups // 2, pair, 0)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        last_ref[...] = carry_ref[:1]


def _backward_kernel(
    u_ref,
    flag_ref,
    wi_ref,
    bi_ref,
    wa_ref,
    ba_ref,
    decay_ref,
    states_ref,
    dh_ref,
    dlast_ref,
    du_ref,
    dwi_ref,
    dbi_ref,
    dwa_ref,
    dba_ref,
    ddecay_ref,
    dh0_ref,
    carry_ref,
    u_stage,
    i_stage,
    a_stage,
    g_stage,
    u_pair,
    dzi_pair,
    dza_pair,
    du_sum,
    *,
    tiles,
    padded,
):
    first = (pl.program_id(1) == 0) & (pl.program_id(2) == 0)
    last = (pl.program_id(1) == pl.num_programs(1) - 1) & (pl.program_id(2) == pl.num_programs(2) - 1)
    groups = u_ref.shape[0] // GROUP

    @pl.when(first)
    def _():
        for ref in (dwi_ref, dbi_ref, dwa_ref, dba_ref, ddecay_ref, u_pair, dzi_pair, dza_pair):
            ref[...] = jnp.zeros_like(ref)

    @pl.when(pl.program_id(2) == 0)
    def _():
        carry_ref[...] = jnp.broadcast_to(dlast_ref[...], carry_ref.shape)

    def prepare(group, slot):
        rows = _rows(group, GROUP)
        u = u_ref[rows, :]
        put(u_stage.at[slot], u)
        put(i_stage.at[slot], tiles.multiply(u, wi_ref))
        put(a_stage.at[slot], tiles.multiply(u, wa_ref))
        put(g_stage.at[slot], dh_ref[rows, :])

    def recur(group, slot):
        for half in reversed(range(GROUP // CHUNK)):
            c = group * (GROUP // CHUNK) + half
            stages = [
                stage.at[slot, :, pl.ds(half * CHUNK, CHUNK), :] for stage in (u_stage, i_stage, a_stage, g_stage)
            ]
            state_row = states_ref[pl.ds(c, 1), :]
            resets, pads = flags_of(flag_ref, c, padded)
            for tile in range(tiles.lanes // LANES):
                lanes = slice(tile * LANES, (tile + 1) * LANES)
                gates = gates_of(stages[:3], tile, bi_ref, ba_ref, decay_ref, resets, pads)
                a: list[Number] = [(gate.a,) for gate in gates]
                x: list[Number] = [(gate.m * gate.iu,) for gate in gates]
                state = jnp.broadcast_to(state_row[:, lanes], (SUBLANES, LANES))
                before, _, _ = walk(a, x, (state,), reverse=False)
                g, (carry,) = walk_back(a, read(stages[3:], tile), (carry_ref[:, lanes],), reverse=False)
                carry_ref[:, lanes] = carry
                decay = jnp.broadcast_to(decay_ref[:, lanes], (SUBLANES, LANES)) * LN2
                dbi = dba = ddecay = jnp.zeros((SUBLANES, LANES), jnp.float32)
                for k, (gate, (h,), (g_k,)) in enumerate(zip(gates, before, g, strict=True)):
                    du = g_k * gate.m * gate.i
                    dzi = du * gate.u * (1 - gate.tanh_i)
                    # d m / d log a = -a**2 / m, cut like the square root's derivative; nothing at a reset, where a = 0.
                    dlog = g_k * (gate.a * (h - gate.iu * gate.a * gate.inverse_m))
                    if pads is not None:
                        dlog = jnp.where(pads[k], 0.0, dlog)
                    dlog = dlog * (1 + gate.tanh_r)
                    dza = dlog * (decay * (1 - gate.tanh_r))
                    ddecay, dbi, dba = ddecay + dlog, dbi + dzi, dba + dza
                    for stage, value in zip(stages, (du, dzi, dza), strict=False):
                        stage.at[tile][step(k), :] = value
                dbi_ref[:, lanes] += dbi
                dba_ref[:, lanes] += dba
                ddecay_ref[:, lanes] += ddecay
            rows = slice(slot * GROUP + half * CHUNK, slot * GROUP + (half + 1) * CHUNK)
            du_sum[rows, :] = take(stages[0])
            dzi_pair[rows, :] = take(stages[1]).astype(dzi_pair.dtype)
            dza_pair[rows, :] = take(stages[2]).astype(dza_pair.dtype)
        u_pair[slot * GROUP : (slot + 1) * GROUP, :] = u_ref[_rows(group, GROUP), :]

    def finish(group, slot):
        rows = slice(slot * GROUP, (slot + 1) * GROUP)
        tiles.add_transposed(du_sum.at[rows, :], dzi_pair[rows, :], wi_ref)
        tiles.add_transposed(du_sum.at[rows, :], dza_pair[rows, :], wa_ref)
        du_ref[_rows(group, GROUP), :] = du_sum[rows, :].astype(du_ref.dtype)

    def weights():
        tiles.add_outer(dwi_ref, u_pair, dzi_pair)
        tiles.add_outer(dwa_ref, u_pair, dza_pair)

    # As in the forward kernel, products share a body with elementwise work that does not wait for them: the weights'
    # gradients are those of the pair before, be it of another block or sequence, and du is finished a group later. (The
    # first "group before" of a block is that group itself, whose rows are written again when they are known.)
    def pair(p, _):
        late, early = groups - 1 - 2 * p, groups - 2 - 2 * p
        weights()
        finish(jnp.minimum(late + 1, groups - 1), 0)
        prepare(early, 0)
        recur(late, 1)
        finish(late, 1)
        prepare(jnp.maximum(early - 1, 0), 1)
        recur(early, 0)
        return 0

    prepare(groups - 1, 1)
    lax.fori_loop(0, groups // 2, pair, 0)
    finish(0, 0)

    @pl.when(last)
    def _():
        weights()
        for ref in (dwi_ref, dbi_ref, dwa_ref, dba_ref, ddecay_ref):
            ref[...] *= 0.5  # from the gradient of the halves that the kernel is given

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        dh0_ref[...] = carry_ref[:1]


def _rows(i, size: int):
    return pl.ds(pl.multiple_of(i * size, size), size)


class Grid:
    """(channel tiles, batch, time) over u (B T L). Weights stay in VMEM while a tile's batch and time go by."""

    def __init__(self, u: jax.Array, weights: jax.Array, against_time: bool):
        self.batch, self.length, _ = u.shape
        self.dtype = u.dtype
        self.tiles = tiles = GateTiles(*weights.shape[:2])
        whole = -(-self.length // (2 * GROUP)) * 2 * GROUP
        block = BLOCK if tiles.lanes > 512 else 2 * BLOCK
        self.rows = whole if whole <= block else block
        self.blocks = -(-whole // self.rows)
        self.padding = self.blocks * self.rows - self.length
        self.shape = (tiles.number, self.batch, self.blocks)

        def time(t):
            return self.blocks - 1 - t if against_time else t

        self.block = pl.BlockSpec((None, self.rows, tiles.lanes), lambda c, b, t: (b, time(t), c))
        self.states = pl.BlockSpec((None, self.rows // CHUNK, tiles.lanes), lambda c, b, t: (b, time(t), c))
        self.flag = pl.BlockSpec((None, self.rows // CHUNK, LANES), lambda c, b, t: (b, time(t), 0))
        self.state = pl.BlockSpec((None, 1, tiles.lanes), lambda c, b, t: (b, 0, c))
        self.row = pl.BlockSpec((None, 1, tiles.lanes), lambda c, b, t: (c, 0, 0))
        self.weights = (pl.BlockSpec((None, *tiles.panel_shape), lambda c, b, t: (c, 0, 0, 0)), self.row)

    def gates(self, w_input, b_input, w_a, b_a, log_decay) -> list[jax.Array]:
        """The kernel's parameters in its layout: halves of the weights and biases, half of log2's decay."""
        tiles, w_input, w_a = self.tiles, w_input.astype(self.dtype), w_a.astype(self.dtype)
        gates = [tiles.weights(0.5 * w_input), tiles.row(0.5 * b_input), tiles.weights(0.5 * w_a), tiles.row(0.5 * b_a)]
        return [*gates, tiles.row((0.5 / LN2) * log_decay)]

    def padded(self, x: jax.Array) -> jax.Array:
        """x (B T L) with zeros after its last time step and channel."""
        x = self.tiles.channels(x)
        return jnp.pad(x, ((0, 0), (0, self.padding), (0, 0))) if self.padding else x

    def unpadded(self, x: jax.Array) -> jax.Array:
        return self.tiles.unpadded(x[:, : self.length] if self.padding else x)

    def flags(self, segment_pos: jax.Array) -> jax.Array:
        """(B chunks 128): lane j holds segment j's resets and, in the next eight bits, its steps after the end."""
        bits = (segment_pos == 0).astype(jnp.float32)
        bits = jnp.pad(bits, ((0, 0), (0, self.padding)), constant_values=2**STEPS)
        bits = bits.reshape(self.batch, -1, SUBLANES, STEPS)
        bits = jnp.sum(bits * jnp.exp2(jnp.arange(STEPS, dtype=jnp.float32))[None, None, None], axis=-1)
        return jnp.pad(bits, ((0, 0), (0, 0), (0, LANES - SUBLANES)))

    def state_array(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.batch, 1, self.tiles.number * self.tiles.lanes), jnp.float32)

    def states_array(self) -> jax.ShapeDtypeStruct:
        chunks = self.blocks * self.rows // CHUNK
        return jax.ShapeDtypeStruct((self.batch, chunks, self.tiles.number * self.tiles.lanes), jnp.float32)

    def carry(self):
        return pltpu.VMEM((SUBLANES, self.tiles.lanes), jnp.float32)

    def stage(self):
        return pltpu.VMEM((2, self.tiles.lanes // LANES, GROUP, LANES), jnp.float32)

    def parameters(self, *semantics: Literal["parallel", "arbitrary"]) -> pltpu.CompilerParams:
        # Wide tiles' weights and their gradients need more than a kernel is given unasked.
        panel = 4 * self.tiles.panel_size
        blocks = 4 * self.rows * self.tiles.lanes
        return pltpu.CompilerParams(
            dimension_semantics=semantics,
            vmem_limit_bytes=max(VMEM_DEFAULT, 8 * panel + 10 * blocks),
        )

    def cost(self, passes: int, streams: int) -> pl.CostEstimate:
        """`streams` arrays cross HBM once; `passes` matrix products by each gate."""
        elements = self.batch * self.blocks * self.rows * self.tiles.number * self.tiles.lanes
        products = self.batch * self.blocks * self.rows * self.tiles.number * self.tiles.panel_size
        states = 4 * elements // CHUNK
        weights = 2 * self.tiles.number * self.tiles.panel_size * (self.dtype.itemsize + 4 * (passes > 1))
        return pl.CostEstimate(
            flops=4 * passes * products + 40 * streams * elements,
            bytes_accessed=streams * elements * self.dtype.itemsize + states + weights,
            transcendentals=6 * elements,
        )
