"""`podwright eval RUN --tasks a,b`: tasks of EleutherAI's lm-evaluation-harness, by its own interface.

The harness (package lm_eval, extra `eval`) fetches a task's data, writes its requests and computes its metrics; only the
log-likelihoods and continuations are ours (`launch.scoring`).
"""

import difflib
import importlib.util
import json
import pathlib
from typing import Any

from configs.schema import ConfigError
from data.dataset import DataError
from launch.scoring import Scorer, open_scorer, text_config
from trainer.storage import StorageError, reason

KEPT = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better", "lm_eval_version")


def score_tasks(run: str, names: list[str], folder: str | None) -> pathlib.Path:
    """Prints the table of the tasks' metrics and returns the file in the run's folder that keeps them.

    folder: with more tasks, YAML files as the harness reads them. Raises ConfigError for tasks that don't exist or a run
    that isn't of text, DataError for tasks whose data can't be loaded, StorageError for runs without a checkpoint.
    """
    text_config(run)
    tasks = open_tasks(names, folder)
    scorer, step = open_scorer(run)
    from lm_eval import simple_evaluate
    from lm_eval.utils import make_table

    found = simple_evaluate(model=adapter(scorer), tasks=tasks, log_samples=False)
    print(make_table(found))
    if found.get("groups"):
        print(make_table(found, "groups"))
    kept = {"run": run, "step": step, "tasks": names, **{name: found[name] for name in KEPT if name in found}}
    return write_new(pathlib.Path(run).expanduser(), f"scores-{step}", kept)


def open_tasks(names: list[str], folder: str | None) -> list[Any]:
    """The harness's tasks and groups of these names, with their data."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("--tasks needs EleutherAI's lm_eval, which is not installed: pip install 'podwright[eval]'")
    if folder is not None and not pathlib.Path(folder).expanduser().is_dir():
        raise ConfigError(f"--tasks-folder {folder} is no folder: give one that holds YAML files of tasks")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if folder is None else str(pathlib.Path(folder).expanduser()))
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1, cutoff=0)[0]
            raise ConfigError(
                f"--tasks {name} is no task of lm_eval{f' or of {folder}' if folder else ''}, perhaps {near}; "
                f"`lm-eval ls tasks` lists all"
            )
    tasks: list[Any] = []
    for name in names:
        try:
            loaded = manager.load([name])
        except Exception as error:  # of whatever the task's own code or its download raises
            raise DataError(f"task {name} cannot be loaded: {in_a_line(error)}") from None
        group = loaded["groups"].get(name)
        tasks += list(loaded["tasks"].values()) if group is None else [group]
        for task in loaded["tasks"].values():
            if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
                what = "images" if getattr(task, "MULTIMODAL", False) else "to execute what a model writes"
                raise ConfigError(f"--tasks {name} needs {what}, which podwright does not do: leave it out")
    return tasks


def adapter(scorer: Scorer) -> Any:
    """The scorer as the harness wants a model: an lm_eval.api.model.LM."""
    from lm_eval.api.model import LM

    class Podwright(LM):
        def loglikelihood(self, requests):
            return scorer.loglikelihood([request.args for request in requests])

        def loglikelihood_rolling(self, requests):
            return scorer.loglikelihood_rolling([request.args for request in requests])

        def generate_until(self, requests):
            return scorer.generate_until([request.args for request in requests])

    return Podwright()


def write_new(folder: pathlib.Path, stem: str, content: dict[str, Any]) -> pathlib.Path:
    """Into `stem`.json, or the first of `stem`-2.json, `stem`-3.json, ... that isn't there yet."""
    number = 1
    while True:
        file = folder / (f"{stem}.json" if number == 1 else f"{stem}-{number}.json")
        try:
            with open(file, "x") as opened:
                opened.write(json.dumps(content, indent=1, default=str) + "\n")
            return file
        except FileExistsError:
            number += 1
        except OSError as error:
            raise StorageError(f"{file} cannot be written: {reason(error)}") from None


def in_a_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
