"""The house stays as docs/architecture.md draws it: imports flow one way, and only sharding/ names mesh axes."""

import ast
import importlib
import pathlib
import re

import pytest

from configs.schema import MESH_FIELDS

ROOT = pathlib.Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "configs": set(),
    "data": {"configs"},
    "models": {"configs"},
    "sharding": {"configs", "models"},
    "trainer": {"configs", "data", "models", "sharding"},
    "launch": {"configs", "data", "models", "sharding", "trainer"},
}


def source_files(package: str) -> list[pathlib.Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported_packages(file: pathlib.Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_flow_one_way(package):
    allowed = MAY_IMPORT[package] | {package}
    for file in source_files(package):
        backwards = imported_packages(file) & MAY_IMPORT.keys() - allowed
        assert not backwards, f"{file.relative_to(ROOT)} imports {backwards}"


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_each_package_is_the_one_of_this_checkout(package):
    assert pathlib.Path(importlib.import_module(package).__file__).resolve().is_relative_to(ROOT)


def test_only_sharding_and_the_mesh_section_name_mesh_axes():
    named = re.compile(rf"""["']({"|".join(a for a in MESH_FIELDS if a != "data")})["']""")  # "data" is a word, too
    for package in ("data", "models", "trainer", "launch"):
        for file in source_files(package):
            found = named.findall(file.read_text())
            assert not found, f"{file.relative_to(ROOT)} names the mesh axis {found}"


def test_only_raw_jax_transforms_are_used():
    banned = re.compile(
        r"nnx\.(jit|grad|value_and_grad|scan|vmap|remat|split|merge|Optimizer|Rngs|Variable)\b|jax\._src|\bpmap\b"
    )
    for package in MAY_IMPORT:
        for file in source_files(package):
            found = banned.findall(file.read_text())
            assert not found, f"{file.relative_to(ROOT)} uses {found}"


def test_the_training_loop_stays_one_readable_file():
    assert len((ROOT / "trainer" / "loop.py").read_text().splitlines()) <= 400
