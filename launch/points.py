"""A folder of runs as points of a scaling law: how large, trained on how much, for how many FLOPs, to which held-out loss."""

import functools
import pathlib
from collections.abc import Iterable
from dataclasses import dataclass

from configs.compare import differences
from configs.parameters import COUNTS
from configs.schema import Config, ConfigError, ModelConfig
from configs.store import FILE_NAME, from_json, read_text
from configs.suggestions import nearest

DONE, UNFINISHED, DIVERGED = "done", "unfinished", "diverged"
SWEEPS = pathlib.Path("runs")
# What the runs of a sweep may differ in; whatever else differs moves the loss as well, and is said.
FREE = ("model.", "trainer.steps", "trainer.seed", "optimizer.learning_rate", "optimizer.warmup_steps", "data.seed")
ONE_LOSS = ("eval.batches",)  # free to change in a run, but another loss


@dataclass(frozen=True)
class Run:
    name: str  # of its folder
    config: Config
    family: str
    parameters: int  # all of them, as Hoffmann et al. count: tables take FLOPs, too
    examples: float  # tokens or images trained on, all steps
    flops_per_step: float
    status: str
    step: int  # the last one that is logged
    loss: float | None  # held-out, of the last step; None unless done

    @property
    def flops(self) -> float:
        return self.flops_per_step * self.config.trainer.steps

    @property
    def rate(self) -> float:
        return self.config.optimizer.learning_rate

    @property
    def tokens_a_step(self) -> float:
        return self.examples / self.config.trainer.steps


def sweep_folder(given: str) -> pathlib.Path:
    """The folder of runs that was meant: a path, or NAME for runs/sweep-NAME. Raises ConfigError."""
    for folder in (pathlib.Path(given).expanduser(), SWEEPS / f"sweep-{given}"):
        if (folder / FILE_NAME).exists():
            raise ConfigError(
                f"{folder} is one run: give the folder that holds the runs to fit, such as {folder.parent}"
            )
        if folder.is_dir():
            return folder
    path = pathlib.Path(given).expanduser()
    near = {f.name: str(f) for f in path.parent.glob("*") if f.is_dir()}
    near |= {f.name.removeprefix("sweep-"): str(f) for f in SWEEPS.glob("sweep-*") if f.is_dir()}
    found = nearest(path.name, list(near))
    perhaps = f"perhaps {near[found[0]]}" if found else "a folder that holds run folders is allowed"
    raise ConfigError(f"there is no folder {path} and no {SWEEPS / f'sweep-{given}'}, {perhaps}")


def read_runs(folder: pathlib.Path) -> list[Run]:
    """All runs of a folder by name. Raises ConfigError if there is none, or if a config cannot be read."""
    folders = sorted(entry for entry in folder.iterdir() if (entry / FILE_NAME).exists())
    if not folders:
        raise ConfigError(
            f"{folder} holds no runs: none of its folders has a {FILE_NAME}; give one that `podwright train` filled"
        )
    return [read_run(run) for run in folders]


def read_run(folder: pathlib.Path) -> Run:
    from trainer.run_folder import read_metrics
    from trainer.tasks import make_task

    config = from_json(*read_text(str(folder)))
    task = make_task(config)
    logged = (folder / "metrics.jsonl").exists()
    steps, evaluations = (read_metrics(folder, kind) if logged else {} for kind in ("train", "eval"))
    status, loss = outcome(config, steps, evaluations)
    return Run(
        name=folder.name,
        config=config,
        family=family_of(config),
        parameters=parameters_of(config),
        examples=float(task.units_per_step * config.trainer.steps),
        flops_per_step=task.flops_per_step,
        status=status,
        step=max(steps, default=0),
        loss=loss,
    )


def outcome(config: Config, steps: dict[int, dict], evaluations: dict[int, dict]) -> tuple[str, float | None]:
    """Status and final loss. A run diverged if the last thing it logged was not finite, or what its guard ended it for."""
    last = evaluations.get(config.trainer.steps)
    if last and last.get("loss") is not None:
        return DONE, last["loss"]
    newest = steps[max(steps)] if steps else {}
    if last or newest.get("bad") or None in (newest.get("loss", 0), newest.get("grad_norm", 0)):
        return DIVERGED, None
    return UNFINISHED, None


def family_of(config: Config) -> str:
    """The first word of the config's name; but the pattern tells a Hawk and a Transformer, whatever the config is called."""
    model = config.model
    if model.kind == "griffin" and len(set(model.pattern)) == 1:  # type: ignore[union-attr]
        return {"rec": "hawk", "attn": "transformer"}[model.pattern[0]]  # type: ignore[union-attr]
    return config.name.split("-")[0]


def parameters_of(config: Config) -> int:
    """All parameters of a model, without allocating one."""
    if config.model.kind in COUNTS:
        return COUNTS[config.model.kind](config.model).total
    return _counted(config.model)


@functools.cache
def _counted(model: ModelConfig) -> int:
    import jax

    from models import FAMILIES
    from models.params import Init
    from sharding.mesh import one_device_mesh
    from sharding.rules import Rules

    with jax.set_mesh(one_device_mesh()):
        made = jax.eval_shape(lambda: FAMILIES[model.kind].model(model, Init(jax.random.key(0), Rules().spec)))
    return sum(leaf.size for leaf in jax.tree.leaves(made))


def best_runs(runs: Iterable[Run]) -> tuple[list[Run], list[str]]:
    """The best run of each family, size and length, and a sentence for each that the learning rates tried do not bracket."""
    runs = list(runs)
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        groups.setdefault((run.family, run.parameters, run.examples), []).append(run)
    best, warnings = [], []
    for group in groups.values():
        done = [run for run in group if run.status == DONE]
        if not done:
            continue
        first = min(done, key=lambda run: (run.loss, run.name))
        best.append(first)
        # A rate at which a run diverged bounds the best one, too; an unfinished one doesn't.
        rates = sorted({run.rate for run in group if run.status != UNFINISHED})
        if len(rates) > 1 and first.rate in (rates[0], rates[-1]):
            which = "smallest" if first.rate == rates[0] else "largest"
            warnings.append(
                f"{first.name}: its learning rate {first.rate:g} is the best and the {which} tried, of {', '.join(f'{r:g}' for r in rates)}"
            )
    return sorted(best, key=lambda run: (run.family, run.flops, run.parameters)), warnings


def left_out(runs: Iterable[Run]) -> list[str]:
    """A line for each run that ended without a final loss."""
    return [
        f"{run.name}: {run.status} at step {run.step:,} of {run.config.trainer.steps:,}"
        for run in runs
        if run.status != DONE
    ]


def other_differences(runs: list[Run]) -> list[str]:
    """Fields that differ among runs of one law and should not: the law would take their effect for one of size or length."""
    found: dict[str, None] = {}
    for run in runs[1:]:
        for one in differences(runs[0].config, run.config):
            if not one.path.startswith(FREE) and (one.effects not in ((), ("recompile",)) or one.path in ONE_LOSS):
                found[one.path] = None
    return list(found)
