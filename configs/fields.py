"""A config as a flat table from dotted path to value: what overrides, files and comparisons work on."""

import dataclasses
import shlex
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from configs.schema import KINDS, SECTIONS, Config, ConfigError
from configs.section import check_value


@dataclass(frozen=True)
class Leaf:
    """One field of a config."""

    path: str
    field: dataclasses.Field
    hint: Any

    @property
    def help(self) -> str:
        return self.field.metadata["help"]

    @property
    def changes(self) -> tuple[str, ...]:
        """What changing it in an existing run does, of schema.EFFECTS."""
        return self.field.metadata.get("changes", ())

    def check(self, value: Any) -> None:
        """Type and range. Raises ConfigError."""
        if self.path == "name":
            if not isinstance(value, str):
                raise ConfigError(f"name={value!r} is not text")
        else:
            check_value(self.path, self.field, self.hint, value)


def kinds_of(config: Config) -> dict[str, str]:
    """{"model": "griffin", "data": "text"}: with these, the fields of a config are known."""
    return {section: getattr(config, section).kind for section in KINDS}


def section_types(kinds: Mapping[str, str]) -> dict[str, type]:
    hints = typing.get_type_hints(Config)
    return {section: KINDS[section][kinds[section]] if section in KINDS else hints[section] for section in SECTIONS}


def fields_of(kinds: Mapping[str, str]) -> dict[str, Leaf]:
    """Every field of a config of these kinds by its dotted path, in the schema's order."""
    leaves = {"name": Leaf("name", next(f for f in dataclasses.fields(Config) if f.name == "name"), str)}
    for section, cls in section_types(kinds).items():
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            path = f"{section}.{field.name}"
            leaves[path] = Leaf(path, field, hints[field.name])
    return leaves


def values_of(config: Config) -> dict[str, Any]:
    """Every value by its dotted path."""
    values = {"name": config.name}
    for section in SECTIONS:
        part = getattr(config, section)
        values |= {f"{section}.{f.name}": getattr(part, f.name) for f in dataclasses.fields(part)}
    return values


def build(kinds: Mapping[str, str], values: Mapping[str, Any]) -> Config:
    """The config with these values, all at once so that fields that depend on each other can change together.

    Fields without a value take their default. Raises ConfigError where values are out of range or contradict.
    """
    sections = {
        section: cls(**{f.name: values[p] for f in dataclasses.fields(cls) if (p := f"{section}.{f.name}") in values})
        for section, cls in section_types(kinds).items()
    }
    return Config(name=values["name"], **sections)


def format_value(value: Any) -> str:
    """A value as it can be given back in a shell: `rec,rec,attn`, `true`, `'**/*.py'`."""
    if isinstance(value, tuple):
        return ",".join(str(v) for v in value) or "''"
    if isinstance(value, bool):
        return str(value).lower()
    return shlex.quote(value) if isinstance(value, str) else repr(value)
