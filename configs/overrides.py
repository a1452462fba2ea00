"""From a name and a command line to a config, knowing where every value came from.

A later layer wins: the schema's default, the experiment, --config FILE, --section.field VALUE.

This small parser stands in place of tyro's because a mistake should be one sentence with the field's whole path and
the nearest right one, because each value's origin is shown, and because importing tyro takes longer than all of this.
"""

import pathlib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from configs import EXPERIMENTS
from configs.fields import Leaf, build, fields_of, kinds_of, values_of
from configs.schema import KINDS, Config, ConfigError
from configs.section import perhaps as near_name
from configs.section import type_name
from configs.store import FILE_NAME, parse_tree, read_text, values_in, whole_kinds
from configs.suggestions import nearest, unknown_field

DEFAULT = "default"
COMMAND_LINE = "command line"
TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(frozen=True)
class Resolved:
    """A config and, for each dotted path, "default", "experiment NAME", "file PATH" or "command line"."""

    config: Config
    sources: dict[str, str]
    options: dict[str, str] = field(default_factory=dict)  # what followed the options that are not fields


def resolve(name_or_file: str, argv: Sequence[str] = (), options: Mapping[str, str] | None = None) -> Resolved:
    """The config that a name (or a JSON file, or a run's folder) and a command line stand for.

    `options` are what a command takes besides fields, with the word for their value, empty for a switch:
    {"run": "FOLDER", "json": ""}. An option or field given twice has the last value. Raises ConfigError.
    """
    return _layered(*_start(name_or_file), argv, options or {})


def override(config: Config, origin: str, argv: Sequence[str], options: Mapping[str, str]) -> Resolved:
    """As `resolve`, for a config that has no name here; `origin` says where its values come from. Raises ConfigError."""
    values = values_of(config)
    return _layered(kinds_of(config), values, dict.fromkeys(values, origin), argv, options)


def _layered(
    kinds: dict[str, str],
    values: dict[str, Any],
    sources: dict[str, str],
    argv: Sequence[str],
    options: Mapping[str, str],
) -> Resolved:
    kinds, argv = _other_data(kinds, argv)
    values = {path: value for path, value in values.items() if path in fields_of(kinds)}
    files, given, taken = _split(argv, kinds, options)
    for path in files:
        text, origin = read_text(path)
        layer = values_in(parse_tree(text, origin), kinds, origin)
        values |= layer
        sources |= dict.fromkeys(layer, f"file {origin}")
    values |= given
    sources |= dict.fromkeys(given, COMMAND_LINE)
    try:
        config = build(kinds, values)
    except ConfigError as error:
        raise ConfigError(f"{error}{_from_files(str(error), sources)}") from None
    return Resolved(config, {path: sources.get(path, DEFAULT) for path in values_of(config)}, taken)


def _start(name_or_file: str) -> tuple[dict[str, str], dict[str, Any], dict[str, str]]:
    """Kinds, values and sources before anything is overridden."""
    if name_or_file in EXPERIMENTS:
        config = EXPERIMENTS[name_or_file]()
        kinds, values = kinds_of(config), values_of(config)
        default = {path: leaf.field.default for path, leaf in fields_of(kinds).items()}
        origin = f"experiment {name_or_file}"
        return kinds, values, {path: DEFAULT if v == default[path] else origin for path, v in values.items()}
    is_path = "/" in name_or_file or name_or_file.endswith(".json") or (pathlib.Path(name_or_file) / FILE_NAME).exists()
    if not is_path:
        near = nearest(name_or_file.lower().replace("_", "-"), EXPERIMENTS)
        perhaps = f"perhaps {near[0]}" if near else "`podwright configs` lists them"
        raise ConfigError(f"there is no config {name_or_file!r}, {perhaps}")
    text, origin = read_text(name_or_file)
    tree = parse_tree(text, origin)
    kinds = whole_kinds(tree, origin)
    values = values_in(tree, kinds, origin)
    return kinds, values, dict.fromkeys(fields_of(kinds), DEFAULT) | dict.fromkeys(values, f"file {origin}")


def _other_data(kinds: dict[str, str], argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """`--data.kind KIND` puts another data section in place of the config's; fields that both have keep their values."""
    words: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        key, equals, value = word.partition("=")
        if key != "--data.kind":
            words.append(word)
            continue
        value = value if equals else rest.pop(0) if rest else ""
        if value not in KINDS["data"]:
            raise ConfigError(
                f"data.kind={value!r} is not one of {', '.join(KINDS['data'])}{near_name(value, list(KINDS['data']))}"
            )
        kinds = {**kinds, "data": value}
    return kinds, words


def _split(
    argv: Sequence[str], kinds: Mapping[str, str], options: Mapping[str, str]
) -> tuple[list[str], dict[str, Any], dict[str, str]]:
    """Files, fields and options of a command line."""
    leaves = fields_of(kinds)
    files: list[str] = []
    given: dict[str, Any] = {}
    taken: dict[str, str] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        key, equals, value = word.partition("=")
        if not key.startswith("--") or key == "--":
            raise ConfigError(f"{word!r} is not an override, --section.field VALUE is one")
        path = key[2:].replace("-", "_")
        option = path.replace("_", "-")
        if option in options and not options[option]:
            if equals:
                raise ConfigError(f"{key} takes no value, but {value!r} was given")
            taken[option] = ""
            continue
        known = path in leaves or option in options or option == "config"
        if not known:
            raise _unknown(key, path, kinds, options)
        if not equals:
            if not words or words[0].startswith("--"):
                allowed = type_name(leaves[path].hint) if path in leaves and path != "name" else ""
                raise ConfigError(f"{key} has no value{f': {allowed} must follow' if allowed else ''}")
            value = words.pop(0)
        if path in leaves:
            given[path] = _parse(leaves[path], value)
        elif option == "config":
            files.append(value)
        else:
            taken[option] = value
    return files, given, taken


def _unknown(given: str, path: str, kinds: Mapping[str, str], options: Mapping[str, str]) -> ConfigError:
    section, _, leaf = path.partition(".")
    if section in KINDS and leaf == "kind":
        return ConfigError(f"{given} cannot change, start from a config with another {section} than {kinds[section]}")
    return unknown_field(given, path, kinds, ["config", *options])


def _parse(leaf: Leaf, text: str) -> Any:
    """The value a field is given as text. Raises ConfigError."""
    if typing.get_origin(leaf.hint) is tuple:
        item = typing.get_args(leaf.hint)[0]
        parts = text.split(",") if text or leaf.field.default != () else []  # no text is no word, where that may be
        value: Any = tuple(_parse_one(leaf, item, part.strip()) for part in parts)
    else:
        value = _parse_one(leaf, leaf.hint, text)
    leaf.check(value)
    return value


def _parse_one(leaf: Leaf, hint: type, text: str) -> Any:
    try:
        return TRUTH[text.lower()] if hint is bool else hint(text)
    except (KeyError, ValueError):
        raise ConfigError(f"{leaf.path}={text!r} is not {type_name(hint)}{_whole(hint, text)}") from None


def _whole(hint: type, text: str) -> str:
    """1e3 is refused where whole numbers are counted, since 1.5e0 would look as good; say what to write instead."""
    try:
        number = float(text)
    except ValueError:
        return ""
    return f", write {number:.0f}" if hint is int and number.is_integer() and abs(number) < 2**53 else ""


def _from_files(sentence: str, sources: Mapping[str, str]) -> str:
    """Which of the fields in a sentence came from a file: the user sees the command line, but not those."""
    named = [path for path, source in sources.items() if source.startswith("file ") and f"{path}=" in sentence]
    return "".join(f" ({path} is from {sources[path]})" for path in named)
