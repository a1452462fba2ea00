"""The softmax over a large vocabulary, of which the logits (B T V) never exist whole.

A device has its own tokens (axes `batch` and `seq`) and its own rows of the table (axis `vocab`). It multiplies all its
tokens with one tile of its rows after another and keeps a running maximum and sum (the online softmax of arXiv
1805.02867); the backward pass multiplies again. Tiles are of rows and not of tokens, because a tile of rows and its
gradient are needed once a pass: what a device lacks of a row (axis `embed`) is gathered with the tile, while the one
before is multiplied, and its gradient is summed over devices and divided again. Neither the whole table nor its whole
gradient ever exists on a device that has a part.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec, reshard

from models.params import Spec, mesh_axes
from models.projection import sum_scattered

LANES = 128  # tiles are a multiple of the width of a TPU's registers
HIDDEN = -1e38  # logit of what no softmax sees: finite, so that the difference of two is 0 and not NaN


@jax.named_scope("head")
def log_z_and_target(
    x: jax.Array,
    table: jax.Array,
    targets: jax.Array,
    *,
    spec: Spec,
    num_tokens: int | None = None,
    soft_cap: float = 0.0,
    logits_mib: int = 256,
) -> tuple[jax.Array, jax.Array]:
    """log(sum(exp(logits))) and the targets' logits, both (B T) in float32; their difference is -log p(target) in nats.

    Logits are x (B T D) times the table (V D) in x's dtype, summed in float32, and then, unless soft_cap is 0, soft_cap *
    tanh(logits / soft_cap). Rows of the table from `num_tokens` on are padding that no softmax sees; targets (B T) must
    lie before them. A device holds `logits_mib` MiB of logits at a time, but never fewer than those of 128 rows. The
    gradient of the table is summed in float32, over tokens and over devices.
    """
    head = Head(spec, table.shape[0] if num_tokens is None else num_tokens, soft_cap, logits_mib * 2**20)
    return _log_z_and_target(head, *laid_out(head, x, table, targets))


def log_p_and_likeliest(
    x: jax.Array,
    table: jax.Array,
    targets: jax.Array,
    *,
    spec: Spec,
    num_tokens: int | None = None,
    soft_cap: float = 0.0,
    logits_mib: int = 256,
) -> tuple[jax.Array, jax.Array]:
    """log p(target) in nats, float32, and the likeliest token, int32, the first where several are: (B T) each.

    Arguments are those of `log_z_and_target`; this is for scoring, and has no gradient.
    """
    head = Head(spec, table.shape[0] if num_tokens is None else num_tokens, soft_cap, logits_mib * 2**20)
    wide, rows, token = specs(head)
    scores = on_each_device(functools.partial(forward, likeliest=True), head, (wide, rows, token), (token,) * 3)
    log_z, target, best = scores(*laid_out(head, x, table, targets))
    return target - log_z, best


@dataclass(frozen=True)
class Head:
    """What the functions of one device need to know beside its arrays."""

    spec: Spec
    num_tokens: int
    soft_cap: float
    logits_bytes: int

    def logits(self, x: jax.Array, rows: jax.Array) -> jax.Array:
        logits = product_float32("nd,rd->nr", x, rows)
        return self.soft_cap * jnp.tanh(logits / self.soft_cap) if self.soft_cap else logits


def product_float32(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Products of x and y in their own dtype, summed and returned in float32."""

    def product(x, y):
        return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)

    def exact(x, y):  # XLA:CPU has no bf16 product with a float32 sum; in float32 the products are exact
        return product(x.astype(jnp.float32), y.astype(jnp.float32))

    return lax.platform_dependent(x, y, cpu=exact, default=product)


def over_tiles(head: Head, tables, x: jax.Array, body: Callable, carry):
    """Fold `body(carry, rows (R D), numbers (R), valid (R), start)` over tiles of this device's part of the table.

    `tables` may be several with as many rows; `rows` is then as many. All tiles have one size, so the last may begin
    within the one before: `valid` is false for what it repeats.
    """
    own = jax.tree.leaves(tables)[0].shape[0]
    size = min(own, max(LANES, head.logits_bytes // (4 * x.shape[0]) // LANES * LANES))
    count = -(-own // size)
    if count > 1:
        size = -(-own // count // LANES) * LANES  # as even as they can be
    gather, divided = mesh_axes(head.spec, "embed"), mesh_axes(head.spec, "vocab")
    first = lax.axis_index(divided) * own if divided else 0

    def fetch_one(table, i):
        rows = lax.dynamic_slice_in_dim(table, jnp.minimum(i * size, own - size), size).astype(x.dtype)
        return lax.all_gather(rows, gather, axis=1, tiled=True) if gather else rows

    def fetch(i):
        return jax.tree.map(lambda table: fetch_one(table, i), tables)

    def tile(carry, i, rows):
        start = jnp.minimum(i * size, own - size)
        place = start + jnp.arange(size, dtype=jnp.int32)
        valid = (place >= i * size) & (first + place < head.num_tokens)
        return body(carry, rows, first + place, valid, start)

    def ahead(state, i):  # the next tile's rows travel while this one's are multiplied
        carry, rows = state
        following = fetch(jnp.minimum(i + 1, count - 1))
        return (tile(carry, i, rows), following), None

    if count == 1:
        return tile(carry, 0, fetch(0))
    if gather and lax.axis_size(gather) > 1:
        return lax.scan(ahead, (carry, fetch(0)), jnp.arange(count))[0][0]
    return lax.scan(lambda carry, i: (tile(carry, i, fetch(i)), None), carry, jnp.arange(count))[0]


# Weights of the logits of a tile: (its rows of each table, their numbers) -> arrays (N R), say a target's 1 and 0s.
Weigh = Callable[[tuple[jax.Array, ...], jax.Array], list[jax.Array]]


def one_hot(targets: jax.Array, numbers: jax.Array) -> jax.Array:
    """1 where a target (N) is the row of this number (R), (N R)."""
    return (targets[:, None] == numbers[None]).astype(jnp.float32)


def log_z_and_sums(
    head: Head, x: jax.Array, tables: tuple[jax.Array, ...], weigh: Weigh, count: int, likeliest: bool = False
) -> tuple[jax.Array, list[jax.Array]]:
    """log Z of one device's x (N D) and its rows of tables[0], and the sums of logits under `count` weights; (N) each.

    With `likeliest`, the first of the tokens with the highest logit follows the sums.
    """

    def fold(carry, rows, numbers, valid, start):
        top, total, sums, best = carry
        logits = jnp.where(valid[None], head.logits(x, rows[0]), HIDDEN)
        highest = jnp.max(logits, axis=1)
        # By place and not by comparing the target's logit with the highest: XLA may compute a logit twice, not quite alike.
        best = [jnp.where(highest > top, numbers[jnp.argmax(logits, axis=1)], b) for b in best]
        new = jnp.maximum(top, highest)
        total = total * jnp.exp(top - new) + jnp.sum(jnp.exp(logits - new[:, None]), axis=1)
        weights = (jnp.where(valid[None], weight, 0.0) for weight in weigh(rows, numbers))
        return new, total, [s + jnp.sum(w * logits, axis=1) for s, w in zip(sums, weights, strict=True)], best

    zeros = jnp.zeros(x.shape[:1], jnp.float32)
    best = [jnp.zeros(x.shape[:1], jnp.int32)] if likeliest else []
    top, total, sums, best = over_tiles(head, tables, x, fold, (zeros + HIDDEN, zeros, [zeros] * count, best))
    if axes := mesh_axes(head.spec, "vocab"):
        # Rows that are all padding leave top at HIDDEN, and their sum then counts for nothing.
        highest = lax.pmax(top, axes)
        total, sums = lax.psum((total * jnp.exp(top - highest), sums), axes)
        best = [lax.pmin(jnp.where(top == highest, b, head.num_tokens), axes) for b in best]
        top = highest
    return top + jnp.log(total), [*sums, *best]


def gradients(
    head: Head,
    x: jax.Array,
    tables: tuple[jax.Array, ...],
    weigh: Weigh,
    log_z: jax.Array,
    d_log_z: jax.Array,
    d_sums: list[jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Gradients of one device's x and rows of tables[0], complete on each device that has them."""
    table, scatter = tables[0], mesh_axes(head.spec, "embed")

    def fold(carry, rows, numbers, valid, start):
        dx, d_table = carry
        logits = head.logits(x, rows[0])
        d_logits = d_log_z[:, None] * jnp.exp(logits - log_z[:, None])
        for d_sum, weight in zip(d_sums, weigh(rows, numbers), strict=True):
            d_logits += d_sum[:, None] * weight
        if head.soft_cap:
            d_logits *= 1 - jnp.square(logits / head.soft_cap)
        d_logits = jnp.where(valid[None], d_logits, 0.0).astype(x.dtype)
        d_rows = product_float32("nr,nd->rd", d_logits, x)
        if scatter:
            d_rows = sum_scattered(d_rows, scatter, 1)
        before = lax.dynamic_slice_in_dim(d_table, start, len(d_rows))
        d_table = lax.dynamic_update_slice_in_dim(d_table, before + d_rows, start, axis=0)
        return dx + product_float32("nr,rd->nd", d_logits, rows[0]), d_table

    zeros = jnp.zeros(x.shape, jnp.float32), jnp.zeros(table.shape, jnp.float32)
    dx, d_table = over_tiles(head, tables, x, fold, zeros)
    if axes := mesh_axes(head.spec, "vocab"):
        dx = lax.psum(dx, axes)
    # `embed` divides tokens, too: scattering has summed over those devices.
    if axes := tuple(axis for axis in mesh_axes(head.spec, "batch", "seq") if axis not in scatter):
        d_table = lax.psum(d_table, axes)
    return dx.astype(x.dtype), d_table.astype(table.dtype)


def forward(
    head: Head, x: jax.Array, table: jax.Array, targets: jax.Array, likeliest: bool = False
) -> tuple[jax.Array, ...]:
    """`log_z_and_target` of one device's arrays; with `likeliest`, also the first of the tokens with the highest logit."""
    shape, x, targets = targets.shape, x.reshape(-1, x.shape[-1]), targets.reshape(-1)

    def weigh(rows, numbers):
        return [one_hot(targets, numbers)]

    log_z, found = log_z_and_sums(head, x, (table,), weigh, 1, likeliest)
    return tuple(a.reshape(shape) for a in (log_z, *found))


def backward(
    head: Head,
    x: jax.Array,
    table: jax.Array,
    targets: jax.Array,
    log_z: jax.Array,
    d_log_z: jax.Array,
    d_target: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Gradients of one device's x and rows of the table."""
    shape, x = x.shape, x.reshape(-1, x.shape[-1])
    targets, log_z, d_log_z, d_target = (a.reshape(-1) for a in (targets, log_z, d_log_z, d_target))
    dx, d_table = gradients(
        head, x, (table,), lambda rows, numbers: [one_hot(targets, numbers)], log_z, d_log_z, [d_target]
    )
    return dx.reshape(shape), d_table


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log_z_and_target(head, x, table, targets):
    wide, rows, token = specs(head)
    return on_each_device(forward, head, (wide, rows, token), (token, token))(x, table, targets)


def _forward(head, x, table, targets):
    log_z, target = _log_z_and_target(head, x, table, targets)
    return (log_z, target), (x, table, targets, log_z)


def _backward(head, kept, gradients):
    wide, rows, token = specs(head)
    dx, d_table = on_each_device(backward, head, (wide, rows, *(token,) * 4), (wide, rows))(*kept, *gradients)
    return dx, d_table, None


_log_z_and_target.defvjp(_forward, _backward)


def laid_out(head: Head, x: jax.Array, table: jax.Array, targets: jax.Array) -> list[jax.Array]:
    return [reshard(a, spec) for a, spec in zip((x, table, targets), specs(head), strict=True)]


def specs(head: Head) -> tuple[PartitionSpec, PartitionSpec, PartitionSpec]:
    """How x, the table, and one number a token are divided."""
    return head.spec("batch", "seq", None), head.spec("vocab", "embed"), head.spec("batch", "seq")


def on_each_device(function: Callable, head, in_specs: tuple, out_specs: tuple) -> Callable:
    # The functions sum over devices themselves; for jax to check that, every loop's start would have to say how it varies.
    return jax.shard_map(functools.partial(function, head), in_specs=in_specs, out_specs=out_specs, check_vma=False)
