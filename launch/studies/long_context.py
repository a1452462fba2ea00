"""Held-out loss by position, far past the length that the models were trained on (arXiv 2402.19427, section 6.1)."""

import itertools
import math
import pathlib

import numpy as np

from configs.schema import TextData
from configs.studies import MIXERS
from launch.studies.study import COLOURS, Figures, Study, family, trained

LENGTH = 8192
STRETCHES = 64  # of held-out text, at most
EDGES = [0, *(2**n for n in range(6, 14))]  # positions: 0 to 63, 64 to 127, ... 4,096 to 8,191


def measure(runs: dict[str, pathlib.Path]) -> Figures:
    """Mean bits a byte, and their standard error over stretches of text, in bands of positions."""
    models, trained_at, count = {}, 0, 0
    for name, run in runs.items():
        bits, trained_at = losses_by_position(run)
        count = len(bits)
        bands = np.stack([bits[:, a:b].mean(axis=1) for a, b in itertools.pairwise(EDGES)], axis=1)
        error = bands.std(axis=0, ddof=1) / math.sqrt(count)
        models[name] = {"bits": bands.mean(axis=0).tolist(), "error": error.tolist()}
    return {"models": models, "edges": EDGES, "trained_at": trained_at, "stretches": count}


def losses_by_position(run: pathlib.Path) -> tuple[np.ndarray, int]:
    """Bits a token (stretches, LENGTH) of held-out text, each stretch read from its own start; the training length."""
    import jax
    import jax.numpy as jnp

    from data.text import held_out_stretches
    from trainer.tasks import cross_entropy

    with trained(run) as (config, model, place):
        assert isinstance(config.data, TextData)
        position = np.arange(LENGTH, dtype=np.int32)[None]

        @jax.jit
        def losses(model, batch):
            dtype = jnp.dtype(config.trainer.compute_dtype)
            return cross_entropy(model(batch["tokens"], batch["segment_pos"], dtype=dtype), batch["targets"])

        found = []
        for row in held_out_stretches(config.data, LENGTH)[:STRETCHES]:
            batch = {"tokens": row[None, :-1], "targets": row[None, 1:], "segment_pos": position}
            found.append(np.asarray(losses(model, place(batch)))[0] / math.log(2))
        return np.stack(found), config.data.sequence_length


def table(figures: Figures) -> list[str]:
    edges = figures["edges"]
    lines = [
        f"bits a byte of {figures['stretches']} stretches of held-out text (trained on {figures['trained_at']} tokens)"
    ]
    lines.append(f"{'positions from':<28}" + "".join(f"{a:>8,}" for a in edges[:-1]))
    for name, model in figures["models"].items():
        lines.append(f"{name:<28}" + "".join(f"{bits:8.3f}" for bits in model["bits"]))
        lines.append(f"{'  standard error':<28}" + "".join(f"{error:8.3f}" for error in model["error"]))
    return lines


def draw(figures: Figures, figure) -> None:
    axes, edges = figure.subplots(), figures["edges"]
    middle = [math.sqrt(max(a, 16) * b) for a, b in itertools.pairwise(edges)]
    for name, model in figures["models"].items():
        axes.errorbar(
            middle,
            model["bits"],
            model["error"],
            marker="o",
            capsize=2,
            color=COLOURS[family(name)],
            label=family(name).capitalize(),
        )
    axes.set(xscale="log", xlabel="position in the text", ylabel="held-out bits a byte")
    axes.set_xticks(edges[1:], [f"{n:,}" for n in edges[1:]])
    axes.minorticks_off()
    axes.axvline(figures["trained_at"], color="grey", linestyle=":")
    axes.text(figures["trained_at"] * 1.05, axes.get_ylim()[1], "trained up to here", va="top", color="grey")
    axes.legend(frameon=False)


STUDY = Study(
    question="do the models use, or at least bear, more context than they were trained on?",
    configs=tuple(f"long-context-{name}" for name in MIXERS),
    full=tuple(f"{name}-1b" for name in MIXERS),
    measure=measure,
    table=table,
    draw=draw,
)
