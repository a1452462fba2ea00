"""`podwright configs`, `podwright config NAME` and `podwright config diff A B`, without importing jax."""

import itertools
import sys
from collections.abc import Callable, Iterable, Sequence

from configs import EXPERIMENTS
from configs.compare import differences
from configs.fields import fields_of, format_value, kinds_of, values_of
from configs.overrides import Resolved, resolve
from configs.schema import KINDS, Config, ConfigError
from configs.store import to_json

CONFIGS_USAGE = "podwright configs: the configs there are, one a line"
CONFIG_USAGE = """\
podwright config NAME [--section.field VALUE ...] [--config FILE.json] [--json]
podwright config diff A B
NAME, A and B: a config of `podwright configs`, a run's folder or a JSON file."""

Line = tuple[str, str]  # text, and the comment after it


def configs(argv: Sequence[str]) -> int:
    """Print every config's name and one-line description. Raises ConfigError."""
    if _wants_help(argv):
        print(CONFIGS_USAGE)
        return 0
    if argv:
        raise ConfigError(f"podwright configs takes no arguments, but {argv[0]!r} was given")
    width = max(len(name) for name in EXPERIMENTS)
    _print((f"{name:<{width}}", _description(name)) for name in EXPERIMENTS)
    return 0


def config(argv: Sequence[str], extra_lines: Callable[[Config], Iterable[str]] | None = None) -> int:
    """Print one config with the origin of each value, or the differences of two. Raises ConfigError.

    `extra_lines` gives lines to print under the header, such as the number of parameters.
    """
    if _wants_help(argv):
        print(CONFIG_USAGE)
        return 0
    if not argv or argv[0].startswith("--"):
        raise ConfigError("podwright config needs the name of a config first, `podwright configs` lists them")
    name, *rest = argv
    if name == "diff":
        return _diff(rest)
    resolved = resolve(name, rest, {"json": ""})
    if "json" in resolved.options:
        print(to_json(resolved.config))
        return 0
    description = _description(name) or _description(resolved.config.name)
    header = ": ".join(filter(None, [resolved.config.name, description]))
    extra = list(extra_lines(resolved.config)) if extra_lines else []
    _print((line, "") for line in [header, *extra])
    _print(config_table(resolved), cut=True)
    return 0


def _diff(argv: Sequence[str]) -> int:
    if len(argv) != 2:
        raise ConfigError(f"podwright config diff takes two configs, but {len(argv)} were given")
    found = differences(*(resolve(one).config for one in argv))
    changes = [str(d) for d in found]
    width = max(map(len, changes), default=0)
    _print([(f"{change:<{width}}", d.words()) for change, d in zip(changes, found, strict=True)])
    if not found:
        print("no differences")
    return 0


def config_table(resolved: Resolved) -> list[Line]:
    """Path, value, origin and help of each field, an empty line and the section's name before each section."""
    kinds, values, sources = kinds_of(resolved.config), values_of(resolved.config), resolved.sources
    leaves = fields_of(kinds)
    shown = {path: format_value(value) for path, value in values.items()}
    lines: list[Line] = []
    for section, group in itertools.groupby(shown, key=lambda path: path.partition(".")[0]):
        if section == "name":
            continue
        rows = [(path, shown[path], sources[path]) for path in group]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += [("", ""), (f"{section} ({kinds[section]})" if section in KINDS else section, "")]
        for row in rows:
            cells = "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
            lines.append((f"  {cells}", f"# {leaves[row[0]].help}"))
    return lines


def _description(name: str) -> str:
    """The first line of an experiment's docstring."""
    doc = EXPERIMENTS[name].__doc__ if name in EXPERIMENTS else None
    return (doc or "").strip().partition("\n")[0]


def _wants_help(argv: Sequence[str]) -> bool:
    return "--help" in argv or "-h" in argv


def _print(lines: Iterable[Line], cut: bool = False) -> None:
    """One row a line. On a terminal comments are dim, and with `cut` a row too long for it loses the end of those."""
    if not sys.stdout.isatty():
        for text, comment in lines:
            print(f"{text}  {comment}".rstrip())
        return
    from rich.console import Console  # only here: it takes longer to import than the rest together
    from rich.text import Text

    console = Console(highlight=False)
    for text, comment in lines:
        line = Text.assemble(text, ("  " + comment if comment else "", "dim"))
        console.print(line, no_wrap=cut, overflow="ellipsis" if cut else "fold", soft_wrap=not cut)
