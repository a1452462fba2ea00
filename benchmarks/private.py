"""The gradient of a private step against the plain one of as many rows, and against jax-privacy's own by itself.

Run as `python -m benchmarks.private [--case CASE] [--out FILE]`; needs the extra `dp`. All in one process, taking turns. "Alone" is
`jax_privacy.clipping.clipped_grad` of the same loss with its own microbatches of the same size: without devices, sampling,
random keys and units that are passed over, and without noise.
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.tables import arguments, machine, publish, table

ROUNDS = 7
UNITS = 64
PRIVATE = f"--data.batch_size {UNITS} --privacy.epsilon 8 --privacy.delta 1e-5 --optimizer.adaptive_clip 0 --optimizer.clip_norm 0"
CASES = {
    "tiny": ("nfnet-tiny, an image a unit", f"nfnet-tiny {PRIVATE} --privacy.together 8"),
    "tiny-one": ("nfnet-tiny, an image a unit, one at a time", f"nfnet-tiny {PRIVATE}"),
    "tiny-views": ("nfnet-tiny, 8 views a unit, one at a time", f"nfnet-tiny {PRIVATE} --privacy.rows 8"),
    "head": (
        "nfnet-tiny's classifier, an image a unit",
        f"nfnet-tiny {PRIVATE} --privacy.together 8 --finetune.learns head",
    ),
    "griffin": (
        "griffin-tiny, 128 tokens a unit, one at a time",
        f"griffin-tiny {PRIVATE} --data.sequence_length 128",
    ),
}


def main() -> None:
    options = arguments(__doc__, ("all", *CASES))
    names = CASES if options.case == "all" else [options.case]
    heads = (
        "gradient of 64 units",
        "plain, ms",
        "private, ms",
        "alone, ms",
        "private / plain",
        "private / alone",
        "temporaries, MiB",
    )
    rows = []
    for name in names:
        rows.append(measured(*CASES[name]))
        print(rows[-1], file=sys.stderr, flush=True)
    note = f"Medians of {ROUNDS} rounds; ratios of rounds side by side. Temporaries: plain, private, alone, as the compiler has them."
    publish(["# Private gradients", "", *table(heads, rows), "", note, machine()], options.out)


def measured(title: str, words: str) -> tuple[str, ...]:
    import jax

    from sharding.mesh import one_device_mesh

    with jax.set_mesh(one_device_mesh()):
        arguments = inputs(words)
        sides = [side.trace(*arguments).lower().compile() for side in gradients(words)]
        times: list[list[float]] = [[] for _ in sides]
        for turn in range(ROUNDS + 1):
            for i in range(len(sides)) if turn % 2 else reversed(range(len(sides))):
                start = time.perf_counter()
                jax.block_until_ready(sides[i](*arguments))
                if turn:  # the first is warm-up
                    times[i].append(1e3 * (time.perf_counter() - start))
        memory = [side.memory_analysis().temp_size_in_bytes / 2**20 for side in sides]
    plain, private, alone = times
    return (
        title,
        *(f"{statistics.median(t):,.0f}" for t in times),
        *(f"{statistics.median(a / b for a, b in zip(private, other, strict=True)):.2f}" for other in (plain, alone)),
        ", ".join(f"{m:.1f}" for m in memory),
    )


def inputs(words: str) -> tuple[Any, ...]:
    """Model, batch of real units, key."""
    import jax
    import numpy as np

    from configs.overrides import resolve
    from data.shapes import batch_fields
    from sharding.mesh import one_device_mesh
    from sharding.rules import rules_for
    from trainer.tasks import make_task

    name, *rest = words.split()
    config, rng = resolve(name, rest).config, np.random.default_rng(0)
    task = make_task(config)
    model = jax.jit(lambda key: task.init(key, rules_for(one_device_mesh()).spec))(jax.random.key(0))
    batch: dict[str, np.ndarray] = {}
    for field, (shape, dtype) in batch_fields(config.data).items():
        shape = (UNITS * config.privacy.rows, *shape[1:])
        values = rng.normal(size=shape) if dtype == np.float32 else rng.integers(0, 10, shape)
        batch[field] = np.ones(shape, dtype) if field == "weights" else values.astype(dtype)
    return model, jax.tree.map(jax.numpy.asarray, batch), jax.random.key(1)


def gradients(words: str) -> list[Any]:
    """Plain, private, alone: jitted functions of `inputs`."""
    import jax

    from configs.overrides import resolve
    from trainer.private_gradient import jax_privacy_clipping, private_mean, split
    from trainer.step import mean_gradient
    from trainer.tasks import make_task

    name, *rest = words.split()
    config = resolve(name, rest).config
    task, privacy = make_task(config), config.privacy

    def plain(model, batch, key):
        return mean_gradient(jax.grad(task.loss, has_aux=True), task.weight, model, batch, key, 1, task.prepare)[0]

    def private(model, batch, key):
        return private_mean(privacy, 1.0, UNITS, task, model, batch, key, key)[0]

    def alone(model, batch, key):
        learning, filled = split(task, model)

        def loss(learning, unit):
            model = filled(learning, jax.lax.stop_gradient)
            return task.loss(task.prepare(model) if task.prepare else model, unit, key)[0]

        gradient = jax_privacy_clipping().clipped_grad(
            loss,
            l2_clip_norm=privacy.clip,
            rescale_to_unit_norm=True,
            normalize_by=UNITS,
            keep_batch_dim=False,
            microbatch_size=privacy.together,
        )
        units = jax.tree.map(lambda rows: rows.reshape(UNITS, privacy.rows, *rows.shape[1:]), batch)
        return gradient(learning, units)

    sides: list[Callable] = [plain, private, alone]
    return [jax.jit(side) for side in sides]


if __name__ == "__main__":
    main()
