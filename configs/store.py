"""Configs as JSON: what is saved with a run, and what `--config FILE` reads."""

import json
import pathlib
import typing
from collections.abc import Mapping
from typing import Any

from configs.fields import Leaf, build, fields_of, kinds_of, values_of
from configs.schema import KINDS, SECTIONS, Config, ConfigError
from configs.suggestions import perhaps, unknown_field

FILE_NAME = "config.json"  # in a run's folder


def to_json(config: Config) -> str:
    """The whole config as nested JSON in the schema's order, with the `kind` of model and data."""
    tree: dict[str, Any] = {"name": config.name}
    for section in SECTIONS:
        tree[section] = {"kind": kinds_of(config)[section]} if section in KINDS else {}
    for path, value in values_of(config).items():
        section, _, leaf = path.partition(".")
        if leaf:
            tree[section][leaf] = value
    return json.dumps(tree, indent=2)


def from_json(text: str, origin: str = FILE_NAME) -> Config:
    """The config that `to_json` wrote.

    A field that is missing takes its default, so that a run saved before the field existed still loads. Raises
    ConfigError, starting with `origin`, for text that is no JSON, a field that does not exist, a wrong value, or a
    missing name or kind.
    """
    tree = parse_tree(text, origin)
    kinds = whole_kinds(tree, origin)
    values = values_in(tree, kinds, origin)
    try:
        return build(kinds, values)
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from None


def read_text(path: str) -> tuple[str, str]:
    """Text and path of a JSON file, or of the config in a run's folder. Raises ConfigError."""
    file = pathlib.Path(path)
    try:
        if file.is_dir():
            file /= FILE_NAME
        return file.read_text(encoding="utf-8-sig"), str(file)
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror or "cannot be read").lower() if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{file} cannot be read: {reason}") from None


def parse_tree(text: str, origin: str) -> dict[str, Any]:
    """Raises ConfigError unless text is a JSON object in which every key stands once."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise ConfigError(f"{origin}: {twice[0]} stands there twice")
        return dict(pairs)

    try:
        tree = json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        problem = error.msg[0].lower() + error.msg[1:]
        raise ConfigError(f"{origin} is not JSON: {problem} at line {error.lineno}, column {error.colno}") from None
    except ConfigError:
        raise
    except (ValueError, RecursionError):  # numbers of thousands of digits, thousands of nested brackets
        raise ConfigError(f"{origin} is not a config: its numbers are too long or its brackets too deep") from None
    if not isinstance(tree, dict):
        raise ConfigError(f'{origin} is not a config: an object such as {{"mesh": {{"fsdp": 8}}}} is one')
    return tree


def whole_kinds(tree: Mapping[str, Any], origin: str) -> dict[str, str]:
    """The kinds that a whole config names. Raises ConfigError where name or a kind is missing."""
    kinds = {}
    for section, known in KINDS.items():
        body = tree.get(section)
        kind = body.get("kind") if isinstance(body, dict) else None
        if kind is None:
            raise ConfigError(
                f"{origin}: {section}.kind is missing, one of {', '.join(known)} (part of a config can follow "
                f"the name of one: --config {origin})"
            )
        if kind not in list(known):
            raise ConfigError(f"{origin}: {section}.kind={kind!r} does not exist, {perhaps(str(kind), list(known))}")
        kinds[section] = kind
    if "name" not in tree:
        raise ConfigError(f"{origin}: name is missing")
    return kinds


def values_in(tree: Mapping[str, Any], kinds: Mapping[str, str], origin: str) -> dict[str, Any]:
    """Dotted path to value for the fields the tree has, each checked. Raises ConfigError."""
    leaves = fields_of(kinds)
    values: dict[str, Any] = {}
    for section, body in tree.items():
        if isinstance(body, dict) and (body or section in SECTIONS):
            items = {f"{section}.{key}": value for key, value in body.items()}
        elif section not in SECTIONS:
            items = {section: body}
        else:
            raise ConfigError(f"{origin}: {section}={body!r} is not a section, an object of its fields is allowed")
        for path, value in items.items():
            if section in KINDS and path == f"{section}.kind":
                _same_kind(section, value, kinds, origin)
                continue
            try:
                if path not in leaves:
                    raise unknown_field(path, path, kinds)
                values[path] = _from_json_value(leaves[path], value)
            except ConfigError as error:
                raise ConfigError(f"{origin}: {error}") from None
    return values


def _same_kind(section: str, kind: Any, kinds: Mapping[str, str], origin: str) -> None:
    if kind != kinds[section]:
        raise ConfigError(
            f"{origin}: {section}.kind={kind!r} cannot replace {kinds[section]!r}, start from a config of that kind"
        )


def _from_json_value(leaf: Leaf, value: Any) -> Any:
    """JSON has no tuples and writes 1.0 as 1 at times. Raises ConfigError."""
    if isinstance(value, list) and typing.get_origin(leaf.hint) is tuple:
        value = tuple(value)
    leaf.check(value)
    if leaf.hint is float:
        try:
            return float(value)
        except OverflowError:
            raise ConfigError(f"{leaf.path} is not finite: a number is allowed") from None
    return value
