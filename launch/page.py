"""Pages of HTML that stand alone: text, tables and plots in one file that needs no network and runs no script."""

import html
import io
from collections.abc import Iterable, Sequence
from typing import Any

STYLE = """\
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .8rem; text-align: right; border-bottom: 1px solid #8884; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.facts td { text-align: left; white-space: normal; vertical-align: top; overflow-wrap: anywhere; }
.facts td:first-child { white-space: nowrap; }
figure { margin: 1rem 0; background: white; } svg { width: 100%; height: auto; }
.wide { overflow-x: auto; } pre { overflow-x: auto; font-size: 13px; }"""


def page(title: str, parts: Iterable[str]) -> str:
    """A whole document; parts are what the functions below return."""
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title>'
    look = f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>\n{STYLE}\n</style>'
    body = "\n".join([heading(title, 1), *parts])
    return f'<!doctype html>\n<html lang="en">\n<head>{head}{look}</head>\n<body>\n{body}\n</body>\n</html>\n'


def heading(text: str, level: int = 2) -> str:
    return f"<h{level}>{html.escape(text)}</h{level}>"


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def verbatim(text: str) -> str:
    """Of fixed width, as it is: a config, a command."""
    return f"<pre>{html.escape(text)}</pre>"


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """The first column is names, the others are numbers, already in words."""

    def line(cells: Sequence[object], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{html.escape(str(cell))}</{tag}>' for cell in cells)}</tr>"

    lines = [line(heads, "th"), *(line(row, "td") for row in rows)]
    return "\n".join(['<div class="wide"><table>', *lines, "</table></div>"])


def facts(pairs: Iterable[tuple[str, object]]) -> str:
    """A name and what is known of it, in words of any length, a line each."""
    lines = [f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(said))}</td></tr>" for name, said in pairs]
    return "\n".join(['<div class="wide"><table class="facts">', *lines, "</table></div>"])


def plot(figure: Any) -> str:
    """A matplotlib figure as SVG within the page."""
    text = io.StringIO()
    none = dict.fromkeys(("Date", "Creator", "Format", "Type"))  # which would only name addresses
    figure.savefig(text, format="svg", metadata=none)
    return f"<figure>{text.getvalue()[text.getvalue().index('<svg') :]}</figure>"
