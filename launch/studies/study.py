"""What a study is: runs to train, figures to take from them, a table and a plot of the figures."""

import contextlib
import math
import pathlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from configs.schema import Config, ConfigError

Figures = dict[str, Any]  # JSON-able
Measure = Callable[
    [dict[str, pathlib.Path]], Figures
]  # from run folders by the words of their configs, all of them trained
BESIDE = "BESIDE"  # in the words of a study's run: the folder in which all of its runs are
COLOURS = {"hawk": "#1b7837", "griffin": "#2166ac", "transformer": "#b2182b"}  # the same in every plot


@dataclass(frozen=True)
class Study:
    """Without `configs` `measure` trains by itself, and is given the study's own folder by the words ""."""

    question: str  # one line
    # Small enough for a laptop; a config's name, and overrides. None where `measure` itself trains what is too small for a run.
    configs: tuple[str, ...]
    full: tuple[str, ...]  # as published
    measure: Measure
    table: Callable[[Figures], list[str]]
    draw: Callable[[Figures, Any], None]  # on a matplotlib figure
    may_diverge: bool = False  # whether a run that ends in NaNs is a result, too
    measure_full: Measure | None = None  # with --full, of a study without runs


def family(config: str) -> str:
    """Hawk, griffin or transformer, from a config's name."""
    return next(name for name in COLOURS if name in config)


def mean_and_error(values: Any) -> tuple[Any, Any]:
    """Over the first axis: the mean, and its standard error, infinite of one value."""
    values = np.asarray(values)
    error = values.std(axis=0, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return values.mean(axis=0), error


def new_figure():
    """An empty matplotlib figure. Raises ConfigError where matplotlib isn't installed."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("a plot needs matplotlib, which is not installed: pip install 'podwright[plots]'") from None
    # The same figures make the same file; letters stay letters.
    matplotlib.rcParams |= {"svg.hashsalt": "podwright", "svg.fonttype": "none", "font.size": 9, "axes.grid": True}
    matplotlib.rcParams |= {"grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False}
    return Figure(figsize=(7.5, 3.6), layout="constrained")


@contextlib.contextmanager
def trained(run: pathlib.Path) -> Iterator[tuple[Config, Any, Any]]:
    """Config, model and `place` (host batch to devices) of a run's newest checkpoint, within its mesh."""
    import functools

    import jax

    from sharding.mesh import make_mesh, simulate_devices
    from sharding.rules import rules_for
    from trainer.evaluate import load_model, place_batch, read_config

    config = read_config(run)
    simulate_devices(config.mesh)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        model, _ = load_model(run, config, mesh)
        yield config, model, functools.partial(place_batch, mesh=mesh, spec=rules_for(mesh).spec)
