"""The sentence for a field that does not exist, with the nearest one that does."""

import dataclasses
import difflib
from collections.abc import Collection, Mapping

from configs.fields import fields_of, kinds_of
from configs.schema import KINDS, SECTIONS, Config, ConfigError


def nearest(wrong: str, names: Collection[str], likeness: float = 0.6) -> list[str]:
    """The name most like `wrong`, or nothing if none is as like it as that."""
    return difflib.get_close_matches(wrong, names, n=1, cutoff=likeness)


def perhaps(wrong: str, names: Collection[str]) -> str:
    """The end of a sentence about a wrong name: the nearest right one, or all of them."""
    near = nearest(wrong.lower(), names)
    return f"perhaps {near[0]}" if near else f"there are {', '.join(names)}"


def unknown_field(given: str, path: str, kinds: Mapping[str, str], options: Collection[str] = ()) -> ConfigError:
    """What to say about a path that is no field of a config of these kinds.

    `given` is how the user wrote it, with dashes on the command line, where `options` are valid as well.
    """
    dashes = "--" if given.startswith("--") else ""
    paths = list(fields_of(kinds))
    section, _, leaf = path.partition(".")
    in_section = ", ".join(_leaf(p) for p in paths if p.startswith(f"{section}."))
    if section in SECTIONS and not leaf:
        return ConfigError(f"{given} is a section, {dashes}{section}.FIELD sets one of its fields {in_section}")
    of_kinds = [k for k, cls in KINDS.get(section, {}).items() if leaf in {f.name for f in dataclasses.fields(cls)}]
    if of_kinds:
        rows_of_tokens = [hasattr(KINDS[section][kind], "sequence_length") for kind in (kinds[section], of_kinds[0])]
        other = (
            f": add --data.kind {of_kinds[0]} for it" if dashes and section == "data" and all(rows_of_tokens) else ""
        )
        return ConfigError(
            f"{given} is a field of {' and '.join(of_kinds)}, but {section}.kind is {kinds[section]}{other}"
        )
    if found := _near_paths(path, paths, options):
        return ConfigError(f"{given} is not a field, perhaps {' or '.join(dashes + p for p in found)}")
    if section in SECTIONS:
        return ConfigError(f"{given} is not a field, {section} has {in_section}")
    return ConfigError(f"{given} is not a field, the sections are {', '.join(SECTIONS)}")


def allowed_fields(text: str, config: Config) -> frozenset[str]:
    """The fields listed in `--allow a,b`; "data" stands for the files behind the data. Raises ConfigError."""
    names = [name.strip().replace("-", "_") for name in text.split(",") if name.strip()]
    known = ["data", *fields_of(kinds_of(config))]
    for name in names:
        if name not in known:
            raise ConfigError(f"--allow {name} is neither 'data' nor a field, {perhaps(name, known)}")
    return frozenset(names)


def _near_paths(path: str, paths: list[str], options: Collection[str]) -> list[str]:
    section, _, leaf = path.rpartition(".")
    # A missing or misspelt section is the commonest mistake: a field's own name, or its initials, decide first.
    found = [p for p in paths if leaf in (_leaf(p), _initials(_leaf(p)))]
    if not found and section in SECTIONS:
        near = nearest(leaf, [_leaf(p) for p in paths if p.startswith(f"{section}.")])
        found = [f"{section}.{near[0]}"] if near else []
    if not found:
        names = [*([] if section else options), *dict.fromkeys(_leaf(p) for p in paths)]
        near = nearest(leaf, names, 0.75 if section in SECTIONS else 0.6)  # surer, before a right section is replaced
        if near and near[0] in options:
            return near
        found = [p for p in paths if _leaf(p) in near]
    near_section = nearest(section, SECTIONS)
    return [p for p in found if p.split(".")[0] in near_section] or found


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


def _initials(name: str) -> str | None:
    """`lr` for learning_rate; a single word has none."""
    words = name.split("_")
    return "".join(word[:1] for word in words) if len(words) > 1 else None
