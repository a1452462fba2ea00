"""`podwright study NAME`: trains the runs of a study, or resumes them, then measures, prints a table and draws a plot."""

import json
import pathlib
import shlex
import subprocess
import sys
import textwrap

from configs.overrides import resolve
from configs.schema import ConfigError
from configs.suggestions import perhaps
from launch.studies import STUDIES
from launch.studies.study import BESIDE, Measure, Study, new_figure

DIVERGED = 5  # exit code
USAGE = """\
podwright study NAME [--to DIR] [--full] [--section.field VALUE ...]
Trains the study's runs in DIR (runs/study-NAME), one after the other, and leaves figures.json and plot.svg there.
Started again it resumes. --full takes the published sizes; overrides go to every run."""


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, *(f"  {name:<20}{study.question}" for name, study in STUDIES.items()), sep="\n")
        return 0
    name, *rest = argv
    if name not in STUDIES:
        raise ConfigError(f"there is no study {name!r}, {perhaps(name, STUDIES)}")
    study = STUDIES[name]
    if not study.configs:
        alone(name, study, rest)
        return 0
    configs = study.full if "--full" in rest else study.configs
    options = {"to": "DIR", "full": ""}
    runs_words = {config: [*config.split()[1:], *rest] for config in configs}
    # Mistakes are told before anything trains.
    resolved = [resolve(config.split()[0], words, options) for config, words in runs_words.items()]
    folder = pathlib.Path(resolved[0].options.get("to") or f"runs/study-{name}")
    figure = new_figure()
    runs = {config: folder / folder_name(config) for config in configs}
    for config, run in runs.items():
        name, *own = config.replace(f"{BESIDE}/", f"{folder}/").split()
        command = ["train", name, "--run", str(run), *own, *overrides(rest)]
        print(f"\n$ {shlex.join(['podwright', *command])}", flush=True)
        code = subprocess.run([sys.executable, "-m", "launch", *command]).returncode
        if code and not (study.may_diverge and code == DIVERGED):
            return code
    report(study, study.measure, runs, folder, figure)
    return 0


def alone(name: str, study: Study, argv: list[str]) -> None:
    """A study that trains no runs of configs. Raises ConfigError."""
    from launch.cli import Parser

    parser = Parser(prog=f"podwright study {name}")
    parser.add_argument("--to", default=f"runs/study-{name}", metavar="DIR")
    if study.measure_full:
        parser.add_argument("--full", action="store_true")
    options, others = parser.parse_known_args(argv)
    if others:
        allowed = "--to DIR and --full are" if study.measure_full else "--to DIR is"
        raise ConfigError(
            f"{shlex.join(others)} is not for the study {name}, which trains no runs of configs: {allowed} allowed"
        )
    folder, figure = pathlib.Path(options.to), new_figure()
    folder.mkdir(parents=True, exist_ok=True)
    measure = study.measure_full if study.measure_full and options.full else study.measure
    report(study, measure, {"": folder}, folder, figure)


def folder_name(words: str) -> str:
    """`agc --optimizer.learning_rate 0.2` -> `agc-learning_rate-0.2`; of a folder the last name."""
    return "-".join(word.rpartition("." if word.startswith("--") else "/")[2] for word in words.split())


def overrides(argv: list[str]) -> list[str]:
    """Without the options of `podwright study` itself."""
    kept, words = [], list(argv)
    while words:
        word = words.pop(0)
        if word == "--to":
            words.pop(0)
        elif word != "--full" and not word.startswith("--to="):
            kept.append(word)
    return kept


def report(study: Study, measure: Measure, runs: dict[str, pathlib.Path], folder: pathlib.Path, figure) -> None:
    print("\nmeasuring", flush=True)
    figures = measure(runs)
    study.draw(figures, figure)
    (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    figure.savefig(folder / "plot.svg", metadata={"Date": None})
    print("\n".join(["", *textwrap.wrap(study.question), "", *study.table(figures)]))
    print(f"\nplot {folder / 'plot.svg'}, figures {folder / 'figures.json'}")
