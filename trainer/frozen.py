"""Training a part of a model: the rest stays as it was, without gradients and moments."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from configs.schema import ConfigError
from configs.suggestions import perhaps
from models.params import named_leaves, path_name
from trainer.tasks import Task


def partly(task: Task, places: tuple[str, ...]) -> Task:
    """The same task, learning only parameters of these names or below them."""
    learns = below(places)

    def held(model: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf if learns(path_name(path)) else jax.lax.stop_gradient(leaf), model
        )

    if task.prepare:
        prepare = task.prepare
        return dataclasses.replace(task, learns=learns, prepare=lambda model: prepare(held(model)))
    return dataclasses.replace(
        task, learns=learns, loss=lambda model, batch, key, **more: task.loss(held(model), batch, key, **more)
    )


def below(places: tuple[str, ...]) -> Callable[[str], bool]:
    return lambda name: any(name == place or name.startswith(f"{place}/") for place in places)


def check_learns(places: tuple[str, ...], model: Any) -> None:
    """Raises ConfigError where nothing of the model has such a name."""
    names = list(named_leaves(model))
    for place in places:
        if not any(map(below((place,)), names)):
            known = list(dict.fromkeys(name.split("/")[0] for name in names))
            raise ConfigError(
                f"finetune.learns={','.join(places)} has no parameter in {place!r}, {perhaps(place, known)}"
            )
