"""Two configs side by side: which fields differ, and what each difference does to an existing run."""

from dataclasses import dataclass
from typing import Any

from configs.fields import fields_of, format_value, kinds_of, values_of
from configs.schema import Config

EFFECT_WORDS = {
    "recompile": "recompiles",
    "data": "changes the data order",
    "checkpoint": "makes the checkpoint incompatible",
    "result": "changes the result",
}
# Another family of models shares no arrays, another kind of data no batches.
_KIND_CHANGES = {"model": ("recompile", "checkpoint", "result"), "data": ("recompile", "data", "result")}


@dataclass(frozen=True)
class Difference:
    """One field with different values in two configs."""

    path: str
    a: Any
    b: Any
    effects: tuple[str, ...]  # of schema.EFFECTS; none if the field is free to change

    def __str__(self) -> str:
        return f"{self.path}: {format_value(self.a)} → {format_value(self.b)}"

    def words(self) -> str:
        """What the difference does, as `config diff` says it."""
        return ", ".join(words for effect, words in EFFECT_WORDS.items() if effect in self.effects) or "free to change"


def differences(a: Config, b: Config) -> list[Difference]:
    """The fields that differ, in the schema's order.

    Where the kinds of model or data differ, that is one difference (`model.kind`), and only fields that both kinds
    have are compared.
    """
    kinds_a, kinds_b = kinds_of(a), kinds_of(b)
    found = [
        Difference(f"{section}.kind", kinds_a[section], kinds_b[section], changes)
        for section, changes in _KIND_CHANGES.items()
        if kinds_a[section] != kinds_b[section]
    ]
    values_a, values_b = values_of(a), values_of(b)
    for path, leaf in fields_of(kinds_b).items():
        if path in values_a and values_a[path] != values_b[path]:
            found.append(Difference(path, values_a[path], values_b[path], leaf.changes))
    return found
