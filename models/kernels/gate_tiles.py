"""Block-diagonal gates cut into tiles of whole lanes: which matmuls a kernel does for a tile of channels."""

import math

import jax
import jax.numpy as jnp
from jax import lax

LANES = 128
TARGET = 256  # lanes of a tile: enough independent work for a program; more only where a gate block needs it
WIDEST = 1024  # lanes of a tile of several gate blocks: VMEM and compile time grow with them


class GateTiles:
    """G gate blocks (width, width) over G * width channels, as `number` tiles of `lanes` channels each.

    A tile holds the fewest whole blocks that fill whole groups of 128 lanes. Inside it, panels of columns are multiplied
    by the rows that reach them: a panel is a gate block where the width is a multiple of 128, else 128 columns, whose
    rows are those of one or a few blocks (so zeros are multiplied only at the blocks' edges).
    Where blocks run out, the last tile is filled with zero channels. Where a tile would be too wide, every block is
    grown to a multiple of 128 by zero channels instead (352 to 384), for which the arrays are copied.
    """

    def __init__(self, num_blocks: int, width: int):
        self.num_blocks, self.given = num_blocks, width
        fewest = LANES // math.gcd(width, LANES)
        if fewest > 1 and min(fewest, num_blocks) * width > WIDEST:
            fewest, width = 1, -(-width // LANES) * LANES
        self.width = width
        wanted = fewest * max(1, TARGET // (fewest * width))
        while wanted > fewest and num_blocks % wanted:
            wanted -= fewest
        self.blocks = min(wanted, num_blocks)  # of a tile
        self.number = -(-num_blocks // self.blocks)
        self.lanes = -(-self.blocks * width // LANES) * LANES
        whole = width % LANES == 0
        columns = width if whole else LANES
        self.panels = [(start, columns) for start in range(0, self.lanes, columns)]
        spans = []
        for start, size in self.panels:
            first, last = start // width, min((start + size - 1) // width, self.blocks - 1)
            first = min(first, last)
            low, high = first * width // LANES * LANES, -(-(last + 1) * width // LANES) * LANES
            spans.append((low, min(high, self.lanes)))
        self.depth = max(high - low for low, high in spans)
        self.starts = [min(low, self.lanes - self.depth) for low, _ in spans]
        self.panel_shape = (len(self.panels), self.depth, columns)
        self.panel_size = math.prod(self.panel_shape)

    def channels(self, x: jax.Array) -> jax.Array:
        """x (... L) with zero channels up to whole tiles."""
        lead = ((0, 0),) * (x.ndim - 1)
        if self.width != self.given:
            # Block by block: a reshape to (..., G, L/G) would be laid out anew, twice.
            blocks = [x[..., n * self.given : (n + 1) * self.given] for n in range(self.num_blocks)]
            x = jnp.concatenate([jnp.pad(block, (*lead, (0, self.width - self.given))) for block in blocks], axis=-1)
        missing = self.number * self.lanes - x.shape[-1]
        return jnp.pad(x, (*lead, (0, missing))) if missing else x

    def unpadded(self, x: jax.Array) -> jax.Array:
        """x (... tiles * lanes) without them."""
        width = self.num_blocks * self.width
        x = x if x.shape[-1] == width else x[..., :width]
        if self.width != self.given:
            starts = [n * self.width for n in range(self.num_blocks)]
            x = jnp.concatenate([x[..., start : start + self.given] for start in starts], axis=-1)
        return x

    def row(self, x: jax.Array) -> jax.Array:
        """One value a channel, float32: (tiles 1 lanes)."""
        return self.channels(x.reshape(-1).astype(jnp.float32)).reshape(self.number, 1, self.lanes)

    def weights(self, w: jax.Array) -> jax.Array:
        """(G width width) -> (tiles panels rows columns)."""
        if self.width != self.given:
            w = jnp.pad(w, ((0, 0), *((0, self.width - self.given),) * 2))
        if self.width % LANES == 0:
            return w.reshape(self.number, *self.panel_shape)
        w = jnp.pad(w, ((0, self.number * self.blocks - self.num_blocks), (0, 0), (0, 0)))
        w = w.reshape(self.number, self.blocks, self.width, 1, self.width)
        diagonal = jnp.eye(self.blocks, dtype=w.dtype)[None, :, None, :, None]
        dense = (w * diagonal).reshape(self.number, self.blocks * self.width, self.blocks * self.width)
        fill = self.lanes - self.blocks * self.width
        dense = jnp.pad(dense, ((0, 0), (0, fill), (0, fill)))
        return jnp.stack(
            [
                dense[:, low : low + self.depth, start : start + size]
                for low, (start, size) in zip(self.starts, self.panels, strict=True)
            ],
            axis=1,
        )

    def weight_gradient(self, panels: jax.Array) -> jax.Array:
        """Transpose of `weights`: what lies off the diagonal is dropped."""
        w = jax.ShapeDtypeStruct((self.num_blocks, self.given, self.given), panels.dtype)
        return jax.linear_transpose(self.weights, w)(panels)[0]

    # Inside a kernel, for one tile. Products of u's dtype, sums in float32.

    def multiply(self, u: jax.Array, w_ref) -> jax.Array:
        """u (R lanes) by the gate: (R lanes)."""
        return jnp.concatenate(
            [_dot(u[:, low : low + self.depth], w_ref[p], (1, 0)) for p, low in enumerate(self.starts)], axis=1
        )

    def add_transposed(self, sum_ref, dz: jax.Array, w_ref) -> None:
        """sum_ref (R lanes) += dz (R lanes) by the gate's transpose."""
        for p, (low, (start, size)) in enumerate(zip(self.starts, self.panels, strict=True)):
            sum_ref[:, low : low + self.depth] += _dot(dz[:, start : start + size], w_ref[p], (1, 1))

    def add_outer(self, dw_ref, u_ref, dz_ref) -> None:
        """dw_ref (panels rows columns) += u^T dz."""
        for p, (low, (start, size)) in enumerate(zip(self.starts, self.panels, strict=True)):
            dw_ref[p] += _dot(u_ref[:, low : low + self.depth], dz_ref[:, start : start + size], (0, 0))


def _dot(x: jax.Array, y: jax.Array, axes: tuple[int, int]) -> jax.Array:
    exact = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return lax.dot_general(x, y, dimensions, precision=exact, preferred_element_type=jnp.float32)
