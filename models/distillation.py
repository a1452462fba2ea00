"""Cross-entropy of a student to a teacher's distribution over a large vocabulary, of which no logits exist whole.

Gemma 2 takes the teacher's whole distribution p_T (arXiv 2408.00118, section 3), Gemma 3 what 256 logits a token say of
it, sampled by p_T: the probability of the others is set to zero, and the rest renormalised (arXiv 2503.19786, section 2.2).
Either way the loss is log Z - sum(q * logits) with the student's Z and logits and a target distribution q, and its
gradient of a logit is p_S - q; so it needs a tile of the student's logits and the same tile of q at a time, as in
`models.token_loss`. The teacher's logits are multiplied again wherever they are needed.

The k sampled tokens are distinct: those with the largest logit + Gumbel noise, which is sampling one after another by p_T
without replacement (arXiv 1903.06059). Nothing needs their ids: a tile makes its noise again, and a token is in the sample
if its sum lies above a floor between the k-th and the next largest.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec, reshard

from models.params import Spec, mesh_axes
from models.token_loss import (
    HIDDEN,
    Head,
    Weigh,
    gradients,
    log_z_and_sums,
    log_z_and_target,
    on_each_device,
    one_hot,
    over_tiles,
    specs,
)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["x", "table"], meta_fields=["soft_cap"])
@dataclass(frozen=True)
class Output:
    """What logits are made of: features x (B T D), a table (rows D) and a soft cap (0 for none)."""

    x: jax.Array
    table: jax.Array
    soft_cap: float


def log_z_target_and_expected(
    student: Output,
    teacher: Output,
    targets: jax.Array,
    key: jax.Array,
    *,
    spec: Spec,
    num_tokens: int,
    samples: int,
    logits_mib: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The student's log Z, its logit of each target, and sum(q * logits), (B T) each in float32.

    log Z minus the last is the cross-entropy (nats) to the teacher's distribution q: all of it if samples is 0, otherwise
    that of `samples` distinct tokens drawn with `key`, the same on every mesh. The first `num_tokens` rows of both tables
    are the vocabulary; a teacher's table with other padding is cut or padded to the student's rows. The teacher gets no
    gradient. A device holds `logits_mib` MiB of logits and noise at a time, but never fewer than those of 128 rows.
    """
    wide, rows = spec("batch", "seq", None), spec("vocab", "embed")
    arrays = 4 if samples else 2  # logits of both, and two words of noise a logit
    head, teacher_head = (Head(spec, num_tokens, o.soft_cap, logits_mib * 2**20 // arrays) for o in (student, teacher))
    x, teacher_x = (reshard(o.x, wide) for o in (student, lax.stop_gradient(teacher)))
    table = reshard(student.table, rows)
    teacher_table = reshard(with_rows(lax.stop_gradient(teacher.table), table.shape[0], spec), rows)
    targets = reshard(targets, spec("batch", "seq"))
    places = reshard(jnp.arange(targets.size, dtype=jnp.int32).reshape(targets.shape), spec("batch", "seq"))
    words = jax.random.key_data(key)
    if samples:
        log_q, floor = _sample(teacher_head, samples, teacher_x, teacher_table, places, words)
    else:
        log_q, _ = log_z_and_target(
            teacher_x,
            teacher_table,
            targets,
            spec=spec,
            num_tokens=num_tokens,
            soft_cap=teacher.soft_cap,
            logits_mib=logits_mib,
        )
        floor = log_q  # of no use
    told = (teacher_x, teacher_table, log_q, floor, places, words)
    return _against(Heads(head, teacher_head, bool(samples)), x, table, targets, told)


def with_rows(table: jax.Array, rows: int, spec: Spec) -> jax.Array:
    """The table cut or padded with zeros to `rows`, which none but padding rows notice."""
    if table.shape[0] == rows:
        return table
    table = reshard(table, spec(None, "embed"))[:rows]  # where it is divided, other rows than before are a device's own
    return jnp.pad(table, ((0, rows - table.shape[0]), (0, 0)))


@dataclass(frozen=True)
class Heads:
    student: Head
    teacher: Head
    sampled: bool

    @property
    def spec(self) -> Spec:
        return self.student.spec


def gumbel(keys: jax.Array, numbers: jax.Array) -> jax.Array:
    """Standard Gumbel noise (N R) for tokens with these keys (N) and rows of these numbers (R), whatever tile they are in."""
    each = jax.vmap(lambda key: jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers))(keys)
    uniform = (jax.random.key_data(each)[..., 0].astype(jnp.float32) + 0.5) * 2.0**-32
    # log1p keeps the small numbers exact that become the largest noise.
    return -jnp.log(-jnp.log1p(-jnp.minimum(uniform, 1 - 2.0**-24)))


def keys_of(places: jax.Array, words: jax.Array) -> jax.Array:
    """A key for every token (N), by its place in the batch."""
    key = jax.random.wrap_key_data(words)
    return jax.vmap(lambda place: jax.random.fold_in(key, place))(places)


def sample(
    head: Head, samples: int, x: jax.Array, table: jax.Array, places: jax.Array, words: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One device's log of the sum of exp(logits) over each token's sample, and the floor of its noisy logits."""
    shape, x = places.shape, x.reshape(-1, x.shape[-1])
    keys = keys_of(places.reshape(-1), words)

    def largest(noisy, logits):
        noisy, place = lax.top_k(noisy, samples + 1)
        return noisy, jnp.take_along_axis(logits, place, axis=1)

    def fold(carry, rows, numbers, valid, start):
        logits = head.logits(x, rows)
        noisy = jnp.where(valid[None], logits + gumbel(keys, numbers), HIDDEN)
        return largest(*(jnp.concatenate(pair, axis=1) for pair in zip(carry, (noisy, logits), strict=True)))

    nothing = jnp.full((x.shape[0], samples + 1), HIDDEN, jnp.float32)
    found = over_tiles(head, table, x, fold, (nothing, nothing))
    if axes := mesh_axes(head.spec, "vocab"):
        found = largest(*lax.all_gather(found, axes, axis=1, tiled=True))
    noisy, logits = found
    # Halfway, so that no rounding of the products, when they are made again, moves a token in or out.
    floor = noisy[:, samples - 1] / 2 + noisy[:, samples] / 2
    return jax.nn.logsumexp(logits[:, :samples], axis=1).reshape(shape), floor.reshape(shape)


def _sample(head, samples, x, table, places, words):
    wide, rows, token = specs(head)

    def one_device(head, *arrays):
        return sample(head, samples, *arrays)

    in_specs = (wide, rows, token, PartitionSpec(None))
    return lax.stop_gradient(on_each_device(one_device, head, in_specs, (token, token))(x, table, places, words))


def weights(heads: Heads, targets: jax.Array, x: jax.Array, log_q, floor, places, words) -> Weigh:
    """Of a tile: the targets' ones, and the target distribution q, of one device's teacher x (B T D)."""
    x = x.reshape(-1, x.shape[-1])
    targets, log_q, floor = (a.reshape(-1) for a in (targets, log_q, floor))
    keys = keys_of(places.reshape(-1), words) if heads.sampled else None

    def weigh(rows, numbers):
        logits = heads.teacher.logits(x, rows[1])
        q = jnp.exp(logits - log_q[:, None])
        if keys is not None:
            q = jnp.where(logits + gumbel(keys, numbers) >= floor[:, None], q, 0.0)
        return [one_hot(targets, numbers), q]

    return weigh


def forward(heads: Heads, x, table, targets, told) -> tuple[jax.Array, jax.Array, jax.Array]:
    teacher_x, teacher_table, *rest = told
    shape, x = targets.shape, x.reshape(-1, x.shape[-1])
    weigh = weights(heads, targets, teacher_x, *rest)
    log_z, (target, expected) = log_z_and_sums(heads.student, x, (table, teacher_table), weigh, 2)
    return log_z.reshape(shape), target.reshape(shape), expected.reshape(shape)


def backward(heads: Heads, x, table, targets, told, log_z, *d) -> tuple[jax.Array, jax.Array]:
    teacher_x, teacher_table, *rest = told
    shape, x = x.shape, x.reshape(-1, x.shape[-1])
    weigh = weights(heads, targets, teacher_x, *rest)
    log_z, d_log_z, *d_sums = (a.reshape(-1) for a in (log_z, *d))
    dx, d_table = gradients(heads.student, x, (table, teacher_table), weigh, log_z, d_log_z, d_sums)
    return dx.reshape(shape), d_table


def _specs(heads: Heads):
    wide, rows, token = specs(heads.student)
    return wide, rows, token, (wide, rows, token, token, token, PartitionSpec(None))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _against(heads, x, table, targets, told):
    wide, rows, token, teacher = _specs(heads)
    return on_each_device(forward, heads, (wide, rows, token, teacher), (token,) * 3)(x, table, targets, told)


def _forward(heads, x, table, targets, told):
    found = _against(heads, x, table, targets, told)
    return found, (x, table, targets, told, found[0])


def _backward(heads, kept, d):
    wide, rows, token, teacher = _specs(heads)
    in_specs = (wide, rows, token, teacher, *(token,) * 4)
    return *on_each_device(backward, heads, in_specs, (wide, rows))(*kept, *d), None, None


_against.defvjp(_forward, _backward)
