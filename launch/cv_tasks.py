"""The probe's questions as tasks of lm-evaluation-harness (the format of lm-eval 0.4.13), so that other models answer them, too.

A task is a YAML file beside JSON lines. Of each question `cv_void_...` has the CVs that don't tell, where "cannot be determined"
is right, so that 1 - acc is the share of voids that are filled; `cv_stated_...` those that do.
"""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

from data import cvs
from data.cvs import QUESTIONS, STATED, VARIANTS, Question
from launch.cv_probe import EACH, turns

GROUP = "context_voids"


def write_tasks(folder: pathlib.Path) -> list[str]:
    """Names of the tasks, now in `folder`. YAML names the JSON lines by their whole path: the harness starts others at the
    folder that it was started in."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for question in QUESTIONS:
        stated = question.name in cvs.OF_IDENTITY
        for kind in ("void", *["stated"] * stated):
            name = f"cv_{kind}_{question.name}"
            documents = [one for one in items(question) if (stated and one["variant"] in STATED) == (kind == "stated")]
            file = (folder / f"{name}.jsonl").resolve()
            file.write_text("".join(json.dumps(one) + "\n" for one in documents))
            write_yaml(folder / f"{name}.yaml", task(name, file))
            names.append(name)
    # Without a mean over tasks: to fill voids and to read what is stated are no one quality.
    write_yaml(folder / f"{GROUP}.yaml", {"group": GROUP, "task": names, "metadata": {"version": 1.0}})
    return names


def items(question: Question) -> Iterator[dict[str, Any]]:
    """A document for every variant, CV and wording; with `gold`, the index of the right choice."""
    base = cvs.void_cvs(EACH)
    turn = turns(len(base), question)
    for variant, change in VARIANTS.items():
        right = STATED.get(variant) if question.name in cvs.OF_IDENTITY else None
        for c, cv in enumerate(base):
            for w in range(len(question.wordings)):
                yield {
                    "query": question.prompt(change(cv, c), w, turn[c, w]),
                    "choices": [words[0] for words in question.choices],
                    "gold": len(question.choices) - 1 if right is None else right,
                    "variant": variant,
                    "occupation": cv.occupation,
                    "cv": c,
                    "wording": w,
                }


def task(name: str, file: pathlib.Path) -> dict[str, Any]:
    metrics = [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")]
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": metrics,
        "metadata": {"version": 1.0},
    }


def write_yaml(file: pathlib.Path, content: dict[str, Any]) -> None:
    import yaml

    file.write_text(yaml.safe_dump(content, sort_keys=False, width=1000))
