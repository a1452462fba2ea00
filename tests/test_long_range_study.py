"""The studies first-token and listops compare models of one size, give means and errors over seeds, and judge by what was fixed."""

import collections
import dataclasses
import pathlib

import numpy as np
import pytest

import trainer.evaluate
import trainer.run_folder
from configs import EXPERIMENTS
from configs.long_range_data import LongRangeData
from configs.overrides import resolve
from configs.parameters import COUNTS
from data import open_data
from launch.studies import STUDIES, long_range
from launch.studies.long_range import MODELS, STEPS
from launch.studies.study import new_figure

FEW = LongRangeData(task="first-token", sequence_length=16, held_out_rows=64)


@pytest.mark.parametrize("words", [*STEPS, *MODELS])
def test_all_models_of_a_study_have_one_size(words):
    name, *overrides = words.split()
    config = resolve(name, overrides, {}).config
    lru = EXPERIMENTS[name.removesuffix("-transformer")]()
    sizes = [COUNTS[one.model.kind](one.model).total for one in (config, lru)]
    assert max(sizes) / min(sizes) < 1.05
    for section in ("data", "optimizer", "trainer", "eval"):
        assert getattr(config, section) == getattr(lru, section)


def test_a_study_gives_accuracies_by_seed_with_their_mean_and_error(monkeypatch, tmp_path):
    study, wrong = STUDIES["listops"], {10: 0.5, 11: 0.25, 12: 0.75}
    runs = {words: pathlib.Path(words) for words in study.configs}
    assert len(runs) == 9

    def read(run, kind):
        seed = int(str(run)[-2:])
        return (
            {1: {"loss": 2.0 + seed}}
            if kind == "train"
            else {100: {"error_rate": 1.0}, 200: {"error_rate": wrong[seed]}}
        )

    small = dataclasses.replace(EXPERIMENTS["lra-first-token-tiny"](), data=FEW)
    monkeypatch.setattr(trainer.run_folder, "read_metrics", read)
    monkeypatch.setattr(trainer.evaluate, "read_config", lambda run: small)
    figures = study.measure(runs)
    assert figures["arms"]["LRU"] == {
        "steps": [100, 200],
        "accuracy": [[0, 0.5], [0, 0.75], [0, 0.25]],
        "first_loss": [12, 13, 14],
    }
    labels = open_data(FEW).held_out.read(np.arange(64))["labels"]
    assert figures["chance"] == collections.Counter(labels.tolist()).most_common(1)[0][1] / 64
    # The error is sqrt(1/16 / 3).
    assert study.table(figures)[3].split() == ["LRU", "0.500", "0.750", "0.250", "0.500", "0.144", "13.000"]
    figure = new_figure()
    study.draw(figures, figure)
    assert [line.get_label() for line in figure.axes[0].get_lines()[:3]] == list(figures["arms"])


@pytest.mark.parametrize("name", ["first-token", "listops"])
@pytest.mark.parametrize("full", [False, True])
def test_whatever_is_trained_is_tabulated_and_drawn(name, full):
    study = STUDIES[name]
    arms = dict.fromkeys(long_range.ARMS[words] for words in (study.full if full else study.configs))
    found = {arm: {"steps": [1], "accuracy": [[0.5], [0.75], [0.25]], "first_loss": [2.0, 2.0, 2.0]} for arm in arms}
    lines = study.table({"arms": found, "chance": 0.125})
    assert sum(" 0.144 " in line for line in lines) == len(arms)
    assert sum(line.startswith(("met ", "NOT MET ")) for line in lines) >= 2
    study.draw({"arms": found, "chance": 0.125}, new_figure())


def made_up(**ends: list[float]) -> dict:
    """Figures of a study with these accuracies at the end, by seed."""
    return {"arms": {arm: {"accuracy": [[0.0, one] for one in of]} for arm, of in ends.items()}, "chance": 0.125}


FOUND = {
    "vanilla RNN, tanh": [0.1, 0.2, 0.3],
    "Transformer": [0.3, 0.2, 0.1],
    "linear RNN": [0.2, 0.2, 0.2],
    "diagonal": [0.4, 0.5, 0.6],
    "exponential": [0.5, 0.4, 0.3],  # below the step before, by one standard error
    "exponential, at most 0.9": [0.1, 0.2, 0.3],
    "exponential, ring": [0.9, 1.0, 1.0],
    "LRU": [0.95, 0.96, 0.97],
}


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({}, []),
        ({"LRU": [0.93, 0.94, 0.95]}, ["LRU: at least 0.95"]),
        ({"exponential, at most 0.9": [0.2, 0.3, 0.4]}, ["moduli of at most 0.9: at most 0.25"]),
        ({"vanilla RNN, tanh": [0.95, 0.95, 0.97]}, ["LRU over the vanilla RNN by two standard errors"]),
        ({"Transformer": [1.0, 1.0, 1.0]}, ["LRU over the Transformer by two standard errors"]),
        ({"exponential": [0.3, 0.4, 0.51]}, ["no step from linear RNN to LRU costs two standard errors"]),
    ],
)
def test_first_token_is_judged_by_its_criteria(change, missed):
    found = long_range.first_token_criteria(made_up(**FOUND | change))
    assert [criterion for criterion, met in found.items() if not met] == missed


@pytest.mark.parametrize(
    ("lru", "missed"),
    [
        ([0.35, 0.46, 0.57], []),
        ([0.27, 0.27, 0.28], ["LRU: 15 points over the most frequent value", "LRU over the Transformer by two standard errors"]),
        ([0.5, 0.3, 0.1], [f"LRU over the {other} by two standard errors" for other in ("vanilla RNN", "Transformer")]),
    ],
)  # fmt: skip
def test_listops_is_judged_by_its_criteria(lru, missed):
    figures = made_up(**{"vanilla RNN, tanh": [0.1, 0.1, 0.12], "Transformer": [0.26, 0.36, 0.46], "LRU": lru})
    assert [criterion for criterion, met in long_range.listops_criteria(figures).items() if not met] == missed
