"""What a benchmark found, as a markdown document on the terminal and, if asked, in a file."""

import argparse
import os
import platform
from collections.abc import Collection, Sequence


def arguments(description: str | None, cases: Collection[str] = (), **switches: str) -> argparse.Namespace:
    """The command line of every benchmark; the first of several cases is the default. Switches are names and helps."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", help="also write the table to this markdown file")
    if cases:
        parser.add_argument("--case", choices=cases, default=next(iter(cases)))
    for name, about in switches.items():
        parser.add_argument(f"--{name}", action="store_true", help=about)
    return parser.parse_args()


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a markdown table, its columns aligned for reading as plain text."""
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    lines = [heads, ["-" * width for width in widths], *rows]
    return [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]


def machine() -> str:
    load = os.getloadavg()[0]
    return f"Python {platform.python_version()}, {os.cpu_count()} CPU cores, load {load:.1f} at the end of the run."


def publish(lines: Sequence[str], out: str | None) -> None:
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if out:
        with open(out, "w") as file:
            file.write(text)
