"""Nothing that podwright reads can run code: no pickles, no shells, no evaluated text, no archives unpacked by their own word."""

import ast
import json
import pathlib

import numpy as np
import pytest

from configs.schema import ConfigError
from configs.store import from_json, to_json
from launch.cli import main

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILES = [
    file
    for room in ("configs", "data", "models", "sharding", "trainer", "launch")
    for file in (ROOT / room).rglob("*.py")
]
IMPORTS = {"pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib", "yaml", "tarfile", "zipfile"}
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "shutil.unpack_archive"}


def name_of(node: ast.expr) -> str:
    return f"{name_of(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def offences(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in IMPORTS]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in IMPORTS:
            found.append(node.module or "")
        elif isinstance(node, ast.Call):
            name = name_of(node.func)
            found += [name] * (name in CALLS)
            for word in node.keywords:
                if word.arg in ("shell", "allow_pickle") and not (
                    isinstance(word.value, ast.Constant) and not word.value.value
                ):
                    found.append(f"{name}({word.arg}=...)")
    return found


def test_no_room_reads_pickles_or_evaluates_text_or_starts_a_shell():
    assert len(FILES) > 100
    assert {str(file.relative_to(ROOT)): bad for file in FILES if (bad := offences(file.read_text()))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from yaml import load",
        "eval('1')",
        "import os\nos.system('ls')",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import numpy\nnumpy.load('a', allow_pickle=True)",
        "import torch\ntorch.load('a')",
    ],
)
def test_the_search_sees_each_kind(source):
    assert offences(source)


def test_a_pickled_array_is_refused(tmp_path, capsys):
    class Attack:
        def __reduce__(self):
            return pathlib.Path.touch, (tmp_path / "owned",)

    np.save(tmp_path / "tokens.npy", np.array([Attack()], dtype=object), allow_pickle=True)
    assert main(["logits", str(tmp_path), "--tokens", str(tmp_path / "tokens.npy"), "--out", str(tmp_path / "o")]) == 4
    assert not (tmp_path / "owned").exists()
    with pytest.raises(ValueError, match="allow_pickle"):
        np.load(tmp_path / "tokens.npy")


@pytest.mark.parametrize(
    "value", ["__import__('os').system('touch owned')", "${jndi}", "!!python/object/apply:os.system"]
)
def test_a_config_is_data_whatever_its_values_say(value, tmp_path, monkeypatch):
    from configs.overrides import resolve

    monkeypatch.chdir(tmp_path)
    tree = json.loads(to_json(resolve("griffin-tiny", [], {}).config))
    tree["name"] = value
    assert from_json(json.dumps(tree)).name == value
    tree["trainer"]["steps"] = value
    with pytest.raises(ConfigError, match="steps"):
        from_json(json.dumps(tree))
    assert not (tmp_path / "owned").exists()
