"""A sweep's folder without the training: run folders whose losses a known law made."""

import dataclasses
import json
import pathlib

import numpy as np

from configs.overrides import resolve
from configs.store import to_json
from launch.points import parameters_of
from trainer.tasks import make_task

E, A, B, ALPHA, BETA = 0.9, 12.0, 60.0, 0.25, 0.35  # of small models on bytes
SHAPES = {"griffin": "rec,rec,attn", "hawk": "rec", "transformer": "attn"}


def law(sizes, examples, scale=1.0):
    return scale * (E + A / sizes**ALPHA + B / examples**BETA)


def small(width: int, family: str = "griffin", **fields):
    """A Griffin of a few hundred thousand parameters, never made."""
    words = f"--model.width {width} --model.rnn_width {width} --model.mlp_width {3 * width} --model.pattern {SHAPES[family]}"
    words += " --data.sequence_length 64 --data.batch_size 8 --optimizer.warmup_steps 5"
    return resolve("griffin-tiny", [*words.split(), *(f"--{name}={value}" for name, value in fields.items())]).config


def with_steps(config, steps: int):
    return dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, steps=steps))


def write_run(folder: pathlib.Path, config, loss: float | None, step: int | None = None, training: float | None = 2.0):
    """As `podwright train` leaves it: config.json and metrics.jsonl; without a loss it stopped at `step`."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(to_json(config))
    step = step or config.trainer.steps
    records = [{"kind": "train", "step": at, "loss": 3.0, "grad_norm": 1.0} for at in range(max(1, step - 3), step)]
    records.append({"kind": "train", "step": step, "loss": training, "grad_norm": 1.0})
    if loss is not None:
        records.append({"kind": "eval", "step": step, "bits_per_byte": loss / np.log(2), "loss": loss})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def write_sweep(
    folder: pathlib.Path,
    family: str = "griffin",
    budgets=(1e12, 3e12, 1e13, 3e13),
    widths=(32, 48, 64, 96, 128, 192),
    noise: float = 0.002,
    scale: float = 1.0,
) -> pathlib.Path:
    """A grid of equal FLOPs."""
    rng = np.random.default_rng(len(family))
    for budget in budgets:
        for width in widths:
            config = small(width, family)
            config = with_steps(config, round(budget / make_task(config).flops_per_step))
            examples = config.trainer.steps * 8 * 64
            loss = float(law(parameters_of(config), examples, scale) * np.exp(noise * rng.normal()))
            write_run(folder / f"{family}-{width}-{budget:.0e}", config, loss, step=config.trainer.steps)
    return folder
