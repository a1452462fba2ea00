"""What the sections of a config are made of: a field with its limits and effects, and the sentence about a wrong value."""

import dataclasses
import difflib
import math
import typing
from collections.abc import Sequence
from typing import Any, ClassVar

EFFECTS = ("recompile", "data", "checkpoint", "result")


class ConfigError(ValueError):
    """A user's mistake in a config: one sentence naming the field, the value and what is allowed."""


def setting(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
    choices: tuple | None = None,
    changes: tuple[str, ...] = (),
) -> Any:
    """A config field: `low`/`high` are inclusive bounds, `above`/`below` exclusive ones."""
    metadata = dict(help=help, low=low, above=above, high=high, below=below, choices=choices, changes=changes)
    return dataclasses.field(default=default, metadata=metadata)


def divides(section: "Section", divisor: str, number: str) -> None:
    a, b = getattr(section, divisor), getattr(section, number)
    if b % a:
        near = next((d for step in range(1, 10_000) for d in (a - step, a + step) if 0 < d <= b and b % d == 0), None)
        hint = f": the nearest that does is {near}" if near else ""
        raise ConfigError(f"{section.show(divisor)} does not divide {section.show(number)}{hint}")


def type_name(hint: Any) -> str:
    if typing.get_origin(hint) is tuple:
        return {int: "whole numbers", float: "numbers", str: "words"}[typing.get_args(hint)[0]] + " separated by commas"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[hint]


def check_value(path: str, field: dataclasses.Field, hint: Any, value: Any) -> None:
    """Type and range of one field. Raises ConfigError with the field's dotted path."""
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        if not isinstance(value, tuple) or (not value and field.default != ()):
            raise ConfigError(f"{path}={value!r} is not {type_name(hint)}")
        values, hint = value, item
    else:
        values = (value,)
    meta = field.metadata
    for v in values:
        ok = isinstance(v, hint) and not (isinstance(v, bool) and hint is not bool)
        if hint is float and isinstance(v, int) and not isinstance(v, bool):
            ok = True
        if not ok:
            raise ConfigError(f"{path}={v!r} is not {type_name(hint)}")
        if isinstance(v, float) and not math.isfinite(v):
            raise ConfigError(f"{path}={v!r} is not finite: {type_name(hint)} is allowed")
        limits = [
            (meta["low"], "at least", lambda v, b: v >= b),
            (meta["above"], "above", lambda v, b: v > b),
            (meta["high"], "at most", lambda v, b: v <= b),
            (meta["below"], "below", lambda v, b: v < b),
        ]
        if any(bound is not None and not holds(v, bound) for bound, _, holds in limits):
            allowed = " and ".join(f"{word} {bound:g}" for bound, word, _ in limits if bound is not None)
            raise ConfigError(f"{path}={v!r} is out of range: {type_name(hint)} {allowed} is allowed")
        if meta["choices"] and v not in meta["choices"]:
            names = [str(c) for c in meta["choices"]]
            raise ConfigError(f"{path}={v!r} is not one of {', '.join(names)}{perhaps(str(v), names)}")


def perhaps(wrong: str, names: Sequence[str]) -> str:
    """The end of a sentence that has listed the names: the nearest, if one is near."""
    near = difflib.get_close_matches(wrong, names, n=1)
    return f", perhaps {near[0]}" if near else ""


class Section:
    """Checks every field's type and range on construction; sections add their own cross-field checks."""

    section: ClassVar[str]  # the name this section has in Config

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            check_value(f"{self.section}.{field.name}", field, hints[field.name], getattr(self, field.name))
        self.check()

    def check(self) -> None:
        """Cross-field rules. Raise ConfigError, naming fields with `show`."""

    def show(self, name: str) -> str:
        """A field as sentences name it: `model.width=192`."""
        return f"{self.section}.{name}={getattr(self, name)!r}"
