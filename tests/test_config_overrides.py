"""Overrides: every layer wins over the one below it, and every value knows where it came from."""

import dataclasses
import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import EXPERIMENTS
from configs.fields import build, fields_of, format_value, kinds_of, values_of
from configs.overrides import resolve
from configs.schema import Config, ConfigError, GriffinConfig
from configs.store import to_json

SPELLINGS = [
    ("--optimizer.learning-rate 3e-4", "optimizer.learning_rate", 3e-4),
    ("--optimizer.learning_rate=3e-4", "optimizer.learning_rate", 3e-4),
    ("--optimizer.learning_rate 1", "optimizer.learning_rate", 1.0),
    ("--trainer.steps 1_000", "trainer.steps", 1000),
    ("--trainer.steps 50 --trainer.steps 70", "trainer.steps", 70),
    ("--mesh.data -1", "mesh.data", -1),
    ("--model.embedding-scale yes", "model.embedding_scale", True),
    ("--model.embedding_scale TRUE", "model.embedding_scale", True),
    ("--model.embedding_scale 1", "model.embedding_scale", True),
    ("--model.embedding_scale no", "model.embedding_scale", False),
    ("--model.embedding_scale 0", "model.embedding_scale", False),
    ("--model.pattern rec", "model.pattern", ("rec",)),
    ("--model.pattern=rec,rec,rec,attn", "model.pattern", ("rec", "rec", "rec", "attn")),
    ("--data.corpus=a=b", "data.corpus", "a=b"),
    ("--data.corpus=--odd", "data.corpus", "--odd"),
    ("--trainer.compilation_cache=", "trainer.compilation_cache", ""),
    ("--name mine", "name", "mine"),
]


@pytest.mark.parametrize(("line", "path", "value"), SPELLINGS, ids=[line for line, _, _ in SPELLINGS])
def test_a_field_can_be_spelt_in_these_ways(line, path, value):
    resolved = resolve("griffin-tiny", line.split())
    found = values_of(resolved.config)[path]
    assert found == value
    assert type(found) is type(value)
    assert resolved.sources[path] == "command line"


def test_fields_that_depend_on_each_other_change_together():
    config = resolve("griffin-tiny", ["--model.num_heads", "5", "--model.width", "200"]).config
    assert isinstance(config.model, GriffinConfig)
    assert (config.model.num_heads, config.model.width) == (5, 200)


def test_command_line_wins_over_file_over_experiment_over_default(tmp_path):
    low, high = tmp_path / "low.json", tmp_path / "high.json"
    low.write_text('{"optimizer": {"beta1": 0.1, "clip_norm": 0.1, "eps": 1e-5}}')
    high.write_text('{"optimizer": {"beta1": 0.2, "clip_norm": 0.2}}')
    # The command line wins wherever --config stands in it.
    argv = ["--optimizer.beta1", "0.3", "--config", str(low), f"--config={high}"]
    resolved = resolve("nfnet-tiny", argv)
    expected = {
        "optimizer.beta1": (0.3, "command line"),
        "optimizer.clip_norm": (0.2, f"file {high}"),
        "optimizer.eps": (1e-5, f"file {low}"),
        "optimizer.name": ("sgd", "experiment nfnet-tiny"),
        "optimizer.schedule": ("cosine", "default"),
    }
    values = values_of(resolved.config)
    assert {path: (values[path], resolved.sources[path]) for path in expected} == expected


def test_every_field_has_a_source():
    for name in EXPERIMENTS:
        resolved = resolve(name)
        assert resolved.config == EXPERIMENTS[name]()
        assert list(resolved.sources) == list(values_of(resolved.config))
        assert {s for p, s in resolved.sources.items() if p != "name"} <= {"default", f"experiment {name}"}


def test_a_saved_config_and_a_run_folder_resolve_like_a_name(tmp_path):
    config = resolve("nfnet-tiny", ["--trainer.steps", "44"]).config
    (tmp_path / "config.json").write_text(to_json(config))
    for given_as in (tmp_path, tmp_path / "config.json"):
        resolved = resolve(str(given_as), ["--trainer.seed", "7"])
        assert resolved.config == dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, seed=7))
        assert resolved.sources["trainer.steps"] == f"file {tmp_path / 'config.json'}"
        assert resolved.sources["trainer.seed"] == "command line"


def test_a_run_folder_needs_no_slash(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(to_json(EXPERIMENTS["gemma-tiny"]()))
    monkeypatch.chdir(tmp_path)
    assert resolve("run").config == EXPERIMENTS["gemma-tiny"]()


def test_options_of_a_command_are_told_from_fields():
    argv = ["--run", "here", "--trainer.steps=50", "--json"]
    resolved = resolve("griffin-tiny", argv, {"run": "FOLDER", "json": ""})
    assert resolved.options == {"run": "here", "json": ""}
    assert resolved.config.trainer.steps == 50


def test_experiments_have_a_name_and_a_line_of_description():
    for name, experiment in EXPERIMENTS.items():
        assert experiment().name == name
        assert experiment.__doc__
        assert 10 < len(experiment.__doc__.splitlines()[0]) < 110


PLAIN = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1).filter(lambda s: s[:2] != "--")


@st.composite
def changed_configs(draw) -> tuple[str, Config, list[str]]:
    """An experiment with some fields changed to allowed values, and the paths of those."""
    name = draw(st.sampled_from(sorted(EXPERIMENTS)))
    config = EXPERIMENTS[name]()
    kinds, values = kinds_of(config), values_of(config)
    changed = {}
    for path in draw(st.sets(st.sampled_from(sorted(values)))):
        leaf, value = fields_of(kinds)[path], values[path]
        if isinstance(value, bool):
            new: object = draw(st.booleans())
        elif isinstance(value, int):
            new = draw(st.integers(-2, 10**6))
        elif isinstance(value, float):
            new = draw(st.floats(0, 1e6))
        elif isinstance(value, tuple):
            words = value or ("input", "mlp_up")
            new = tuple(draw(st.lists(st.sampled_from(words), min_size=1 if value else 0, max_size=6)))
        else:
            new = draw(PLAIN if not leaf.field.metadata.get("choices") else st.sampled_from([value]))
        try:  # keep what the schema allows
            build(kinds, values | changed | {path: new})
        except ConfigError:
            continue
        changed[path] = new
    return name, build(kinds, values | changed), list(changed)


@given(changed_configs())
def test_what_the_table_prints_can_be_given_back(case):
    name, config, changed = case
    values = values_of(config)
    line = " ".join(f"--{path} {format_value(values[path])}" for path in changed)
    assert resolve(name, shlex.split(line)).config == config
