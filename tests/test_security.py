"""Nothing that podwright reads can run code: no pickles, no shells, no evaluated text, no archives unpacked by their own word.

One file reads pickles, those of DeepMind's NFNets, and runs nothing of them.
"""

import ast
import builtins
import copyreg
import io
import json
import os
import pathlib
import pickle
import re
import subprocess

import numpy as np
import pytest
from pickles import Call, named

from configs.schema import ConfigError
from configs.store import from_json, to_json
from launch.cli import main

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILES = [
    file
    for room in ("configs", "data", "models", "sharding", "trainer", "launch")
    for file in (ROOT / room).rglob("*.py")
]
PICKLES = "models/convert/haiku.py"
IMPORTS = {"pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib", "tarfile", "zipfile"}
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
    found = {str(file.relative_to(ROOT)): bad for file in FILES if (bad := offences(file.read_text()))}
    assert found == {PICKLES: ["pickle"]}


def test_yaml_is_only_written():
    trees = [ast.parse(file.read_text()) for file in FILES]
    assert not any(
        isinstance(node, ast.ImportFrom) and node.module == "yaml" for tree in trees for node in ast.walk(tree)
    )
    used = {name_of(node) for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert {name for name in used if name.startswith("yaml.")} == {"yaml.safe_dump"}


def test_the_one_reader_of_pickles_only_reads_them_with_its_own_unpickler():
    """Of the module it uses the base class and `dump`, never `load` or `loads`."""
    used = {
        name_of(node) for node in ast.walk(ast.parse((ROOT / PICKLES).read_text())) if isinstance(node, ast.Attribute)
    }
    assert {name for name in used if name.startswith("pickle.")} == {"pickle.Unpickler", "pickle.dump"}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from tarfile import open",
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


# --- the pickles of DeepMind's NFNets ---------------------------------------------------------------------------------


def read(tmp_path: pathlib.Path, capsys, content: bytes) -> str:
    """What `podwright import` says of a file with this content, in one sentence."""
    file = tmp_path / "F0_haiku.npz"
    file.write_bytes(content)
    capsys.readouterr()
    assert main(["import", str(file), "--to", str(tmp_path / "run")]) == 4
    said = capsys.readouterr().err
    assert said.startswith(f"podwright: {file} ")
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()
    return said


class Function(Call):
    """The result of a call as a function: pickle wants a callable there."""

    def __call__(self):
        raise AssertionError


# What a pickle asks for, and a call of it; most would leave a file `owned`.
HARMFUL = {
    "system": lambda monkeypatch, owned: Call(os.system, f"touch {owned}"),
    "eval": lambda monkeypatch, owned: Call(builtins.eval, f"open({owned!r}, 'w')"),
    "exec": lambda monkeypatch, owned: Call(builtins.exec, f"open({owned!r}, 'w')"),
    "getattr": lambda monkeypatch, owned: Call(builtins.getattr, "a", "upper"),
    "open": lambda monkeypatch, owned: Call(builtins.open, owned, "w"),
    "Popen": lambda monkeypatch, owned: Call(subprocess.Popen, ("touch", owned)),
    "load": lambda monkeypatch, owned: Call(np.load, owned),
    "savetxt": lambda monkeypatch, owned: Call(np.savetxt, owned, (1, 2)),
    "memmap": lambda monkeypatch, owned: Call(np.memmap, owned, "uint8", "w+"),
    "_create_function": lambda monkeypatch, owned: Call(named(monkeypatch, "dill._dill", "_create_function"), 1),
    "_eval_repr": lambda monkeypatch, owned: Call(named(monkeypatch, "dill._dill", "_eval_repr"), "1"),
    "os.system": lambda monkeypatch, owned: Call(Function(*of_dill(monkeypatch), "system"), f"touch {owned}"),
    "system in an array of objects": lambda monkeypatch, owned: array_of(Call(os.system, f"touch {owned}")),
    "system in haiku's mapping": lambda monkeypatch, owned: Call(
        named(monkeypatch, "haiku._src.data_structures", "FlatMapping"), {"b": Call(os.system, f"touch {owned}")}
    ),
}


def of_dill(monkeypatch) -> tuple:
    module = Call(named(monkeypatch, "dill._dill", "_import_module"), "os")
    return named(monkeypatch, "dill._dill", "_get_attr"), module


def array_of(thing: object) -> np.ndarray:
    array = np.empty(1, object)
    array[0] = thing
    return array


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("name", HARMFUL)
def test_a_pickle_that_does_harm_is_refused_by_name_and_not_run(tmp_path, capsys, monkeypatch, name, protocol):
    owned = tmp_path / "owned"
    thing = HARMFUL[name](monkeypatch, str(owned))
    said = read(tmp_path, capsys, pickle.dumps({"NFNet/~/linear": {"w": thing}}, protocol=protocol))
    assert not owned.exists()
    assert re.search(
        rf"asks for [\w.]*\b{name.split()[0]}, which parameters do not need and a pickle could run: nothing of it was run$",
        said,
    )


def test_an_array_of_plain_objects_is_refused(tmp_path, capsys):
    said = read(tmp_path, capsys, pickle.dumps({"NFNet/~/linear": {"w": np.array(["a", 1], object)}}, protocol=4))
    assert "holds an array of 'O8': f2, f4, f8 are what can be imported" in said


def test_an_npz_of_objects_is_refused(tmp_path, capsys):
    owned = tmp_path / "owned"
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=True, **{"NFNet/~/linear/w": array_of(Call(os.system, f"touch {owned}"))})
    assert "Object arrays cannot be loaded" in read(tmp_path, capsys, buffer.getvalue())
    assert not owned.exists()


def test_a_registered_extension_is_refused_though_pickle_has_it_at_hand(tmp_path, capsys):
    """The opcodes of copyreg's registry find what another unpickler of this process has looked up, without asking by name."""
    owned = tmp_path / "owned"
    module = os.system.__module__
    copyreg.add_extension(module, "system", 240)
    try:
        assert pickle.loads(b"\x80\x02\x82\xf0.") is os.system  # now it is at hand
        touch = f"touch {owned}".encode()
        content = b"\x80\x02\x82\xf0X" + len(touch).to_bytes(4, "little") + touch + b"\x85R."
        assert "uses the opcode EXT1" in read(tmp_path, capsys, content)
    finally:
        copyreg.remove_extension(module, "system", 240)
        copyreg.clear_extension_cache()
    assert not owned.exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\x80\x02X\x01\x00\x00\x00aQ.", "uses the opcode BINPERSID"),
        (b"Pa\n.", "uses the opcode PERSID"),
        (b"(S'ls'\nios\nsystem\n.", "uses the opcode INST"),
        (b"(cos\nsystem\nS'ls'\no.", "uses the opcode OBJ"),
        (b"\x80\x02cos\nsystem\n)\x81.", "uses the opcode NEWOBJ"),
        (b"\x80\x02cnumpy\ndtype\nN}X\x05\x00\x00\x00_callNs\x86b.", "changes a function"),
        (b"\x80\x02cnumpy\nndarray\n(K\x05tR.", "calls numpy.ndarray"),
        (b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00zip\x86R.", "encodes text as zip"),
        (b"\x80\x04\x8c\x05numpy\x8c\x0edtype.__init__\x93.", "asks for numpy.dtype.__init__"),
        (b"}\x80\x02", "cannot be read"),
        (b"", "cannot be read"),
        (b"\x80\x63.", "cannot be read"),
    ],
)
def test_each_other_way_to_an_object_is_refused(tmp_path, capsys, content, said):
    assert said in read(tmp_path, capsys, content)


@pytest.mark.parametrize("shape", [(10**12,), (-1,), (2, -3), ("a",), 5, None, (2**63,)])
def test_an_array_that_claims_another_size_than_its_bytes_have_is_refused(tmp_path, capsys, monkeypatch, shape):
    made = named(monkeypatch, "numpy.core.multiarray", "_reconstruct")
    leaf = Call(made, np.ndarray, (0,), b"b", state=(1, shape, np.dtype(np.float32), False, b"1234"))
    read(tmp_path, capsys, pickle.dumps({"NFNet/~/linear": {"w": leaf}}, protocol=4))
