"""What differs between two configs is said with its consequence, in well under a second and without jax."""

import json
import pathlib
import re
import subprocess
import sys

import pytest

from configs import EXPERIMENTS
from configs.compare import EFFECT_WORDS, Difference, differences
from configs.fields import fields_of
from configs.overrides import resolve
from configs.schema import KINDS, ConfigError
from configs.section import EFFECTS
from configs.store import from_json, to_json
from launch import config_commands

ROOT = pathlib.Path(__file__).parent.parent


def run(command, *argv):
    return getattr(config_commands, command)(list(argv))


CHANGES = [
    ("--checkpoint.every 7", "checkpoint.every", 100, 7, "free to change"),
    ("--mesh.fsdp 2", "mesh.fsdp", 1, 2, "recompiles"),
    ("--data.seed 1", "data.seed", 0, 1, "changes the data order, changes the result"),
    ("--optimizer.eps 1e-6", "optimizer.eps", 1e-8, 1e-6, "recompiles, changes the result"),
    (
        "--model.depth 9",
        "model.depth",
        6,
        9,
        "recompiles, makes the checkpoint incompatible, changes the result",
    ),
]


@pytest.mark.parametrize(("line", "path", "a", "b", "words"), CHANGES, ids=[change[0] for change in CHANGES])
def test_a_difference_says_what_it_does(line, path, a, b, words):
    (found,) = differences(resolve("griffin-tiny").config, resolve("griffin-tiny", line.split()).config)
    assert (found.path, found.a, found.b, found.words()) == (path, a, b, words)


def test_equal_configs_have_no_differences():
    for experiment in EXPERIMENTS.values():
        assert differences(experiment(), from_json(to_json(experiment()))) == []


def test_another_kind_is_one_difference_beside_the_fields_both_have():
    found = differences(EXPERIMENTS["griffin-tiny"](), EXPERIMENTS["nfnet-tiny"]())
    paths = [d.path for d in found]
    assert found[0] == Difference("model.kind", "griffin", "nfnet", ("recompile", "checkpoint", "result"))
    assert found[1] == Difference("data.kind", "text", "images", ("recompile", "data", "result"))
    assert "data.batch_size" in paths
    assert not {"model.pattern", "model.alpha", "data.corpus", "data.source"} & set(paths)


def test_every_field_has_help_and_known_effects():
    for model in KINDS["model"]:
        for data in KINDS["data"]:
            for leaf in fields_of({"model": model, "data": data}).values():
                assert leaf.help
                assert set(leaf.changes) <= set(EFFECTS) == set(EFFECT_WORDS)


def test_configs_lists_every_name_with_one_line(capsys):
    assert run("configs") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(EXPERIMENTS)
    assert len({line.index(EXPERIMENTS[line.split()[0]].__doc__.splitlines()[0]) for line in lines}) == 1


def test_config_prints_value_source_and_help_of_each_field(capsys):
    assert run("config", "griffin-tiny", "--trainer.steps", "50") == 0
    out = capsys.readouterr().out
    assert out.startswith(f"griffin-tiny: {EXPERIMENTS['griffin-tiny'].__doc__}\n\nmodel (griffin)\n")
    rows = [line.split("  # ") for line in out.splitlines() if line.startswith("  ")]
    assert [row[0].split()[0] for row in rows] == list(resolve("griffin-tiny").sources)[1:]
    assert ["trainer.steps", "50", "command", "line"] in [row[0].split() for row in rows]
    assert ["model.pattern", "rec,rec,attn", "default"] in [row[0].split() for row in rows]
    assert ["optimizer updates in all"] in [row[1:] for row in rows]


def test_config_prints_extra_lines_below_its_header(capsys):
    config_commands.config(["griffin-tiny"], extra_lines=lambda config: [f"{config.model.width} wide"])
    assert capsys.readouterr().out.splitlines()[1] == "128 wide"


def test_config_as_json_loads_back(capsys):
    assert run("config", "griffin-tiny", "--json", "--mesh.fsdp=2") == 0
    assert from_json(capsys.readouterr().out) == resolve("griffin-tiny", ["--mesh.fsdp", "2"]).config


def test_config_diff_compares_names_files_and_run_folders(capsys, tmp_path):
    changed = resolve("griffin-tiny", ["--model.pattern", "rec", "--eval.every=5"]).config
    (tmp_path / "config.json").write_text(to_json(changed))
    for b in (tmp_path, tmp_path / "config.json"):
        assert run("config", "diff", "griffin-tiny", str(b)) == 0
        assert capsys.readouterr().out.splitlines() == [
            "model.pattern: rec,rec,attn → rec  recompiles, makes the checkpoint incompatible, changes the result",
            "eval.every: 100 → 5                free to change",
        ]
    assert run("config", "diff", str(tmp_path), str(tmp_path)) == 0
    assert capsys.readouterr().out == "no differences\n"


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["config"], "podwright config needs the name of a config first, `podwright configs` lists them"),
        (["config", "--json"], "podwright config needs the name of a config first, `podwright configs` lists them"),
        (["config", "diff", "griffin-tiny"], "podwright config diff takes two configs, but 1 were given"),
        (["config", "griffin-tiny", "--jsn"], "--jsn is not a field, perhaps --json"),
        (["configs", "all"], "podwright configs takes no arguments, but 'all' was given"),
    ],
)
def test_a_mistake_in_a_command_is_one_sentence(argv, sentence):
    with pytest.raises(ConfigError) as error:
        run(*argv)
    assert str(error.value) == sentence


@pytest.mark.parametrize("argv", [["configs", "--help"], ["config", "--help"], ["config", "griffin-tiny", "-h"]])
def test_help_says_how_a_command_is_called(argv, capsys):
    assert run(*argv) == 0
    assert capsys.readouterr().out.startswith(f"podwright {argv[0]}")


def test_config_commands_do_not_import_jax_or_our_other_packages():
    program = """
import json, sys
import configs, configs.compare, configs.overrides, configs.store
from launch import config_commands
config_commands.configs([])
config_commands.config(["griffin-tiny", "--mesh.fsdp", "2"])
config_commands.config(["diff", "griffin-tiny", "gemma-tiny"])
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    imported = set(json.loads(done.stdout.splitlines()[-1]))
    assert {"configs", "launch"} <= imported
    assert not imported & {"jax", "jaxlib", "flax", "numpy", "rich", "data", "models", "sharding", "trainer"}


def test_a_terminal_gets_one_row_a_line(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    run("config", "griffin-tiny")
    lines = re.sub(r"\x1b\[\d*m", "", capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= 60
    assert sum("model.width" in line for line in lines) == 1
