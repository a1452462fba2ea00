"""`podwright runs list | compare | tail | archive`: the runs of a folder, side by side, and away from it."""

import concurrent.futures
import contextlib
import difflib
import io
import time
from typing import TYPE_CHECKING, Any

from configs.schema import ConfigError
from launch.checkpoint_commands import progress, say, size, table
from launch.cli import Parser, subcommand

if TYPE_CHECKING:
    from etils import epath

    from launch.run_state import RunState

READERS = 8  # runs that are read at a time: on cloud storage each is a few round trips
POLL, POLL_CLOUD = 1.0, 15.0  # seconds between looks at a log
PLOTS = (".svg", ".png")


def list_runs(argv: list[str]) -> int:
    from trainer.storage import StorageError, entries, folder_of, reason

    parser = Parser(prog="podwright runs list", usage="podwright runs list [FOLDER]")
    parser.add_argument("folder", nargs="?", default="runs", help="of runs, on this machine or gs://; default: runs")
    folder = folder_of(parser.parse_args(argv).folder)
    try:
        if not folder.exists():
            raise ConfigError(f"there is no folder {folder}{near(folder)}")
        if (folder / "config.json").exists():
            raise ConfigError(f"{folder} is a run, not a folder of runs: podwright runs list {folder.parent}")
        inside = [entry for entry in entries(folder) if entry.is_dir()]
    except ConfigError:
        raise
    except Exception as error:
        raise StorageError(f"{folder} cannot be listed: {reason(error)}") from None
    with concurrent.futures.ThreadPoolExecutor(READERS) as readers:
        found = [row for row in readers.map(row_of, inside) if row]
    if found:
        say(*table([("run", "config", "state", "step", "loss", "held-out", "goodput", "age"), *found]))
    others = len(inside) - len(found)
    if others or not found:
        say(f"{len(found) or 'no'} run{'s' * (len(found) != 1)} in {folder}, and {others} folders that are none")
    if any(row[2] == "unknown" for row in found):
        say("unknown: no end is noted, another machine may be training it")
    return 0


def near(folder: "epath.Path") -> str:
    """`, perhaps runs`: what lies beside a folder that isn't there."""
    from trainer.storage import entries

    with contextlib.suppress(Exception):
        names = [entry.name for entry in entries(folder.parent) if entry.is_dir()]
        if found := difflib.get_close_matches(folder.name, names, n=1):
            return f", perhaps {folder.parent / found[0]}"
    return ""


def row_of(run: "epath.Path") -> tuple[str, ...] | None:
    """A line of the list; None for a folder that is no run."""
    from launch.run_state import ago, read_state
    from trainer.storage import StorageError, reason

    try:
        if not (run / "config.json").exists():
            return None
    except Exception as error:  # cloud storage has errors of its own
        raise StorageError(f"{run} cannot be read: {reason(error)}") from None
    try:
        it = read_state(run)
    except (StorageError, ConfigError) as error:
        return run.name, "?", f"unreadable: {error}", "", "", "", "", ""
    share = "-" if it.goodput is None else f"{100 * it.goodput:.1f}%"
    losses = (it.last.get(kind, {}).get("loss", "-") for kind in ("train", "eval"))
    steps = f"{it.step}/{it.config.trainer.steps}"
    return run.name, it.config.name, it.state, steps, *map(figure, losses), share, ago(it.seen)


def figure(value: Any) -> str:
    """A metric in words; null in the log stands for what is not finite."""
    if value is None:
        return "not finite"
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.5g}"


def compare(argv: list[str]) -> int:
    from launch.run_state import read_state
    from launch.studies.study import new_figure
    from trainer.storage import StorageError, folder_of, reason

    parser = Parser(
        prog="podwright runs compare", usage="podwright runs compare RUN RUN [RUN ...] [--to FILE.svg|.png]"
    )
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--to", help="the plot; default: compare-RUN-RUN.svg beside the first run")
    options = parser.parse_args(argv)
    given = list(dict.fromkeys(options.runs))
    if len(given) < 2:
        raise ConfigError(f"podwright runs compare needs two runs or more, but only {given[0]} was given")
    states = dict(zip(given, map(read_state, given), strict=True))
    folders = [it.run for it in states.values()]
    names = [run.name for run in folders] if len({run.name for run in folders}) == len(folders) else given
    beside = folders[0].parent / f"compare-{'-'.join(run.name for run in folders)}.svg"
    file = folder_of(options.to) if options.to else beside
    if file.suffix not in PLOTS:
        raise ConfigError(f"--to {options.to} is neither of {' nor of '.join(PLOTS)}, the kinds of plot there are")
    if inside := next((run for run in folders if run in file.parents), None):
        raise ConfigError(f"--to {options.to} is in the folder of a run, {inside}: give a file outside")
    for lines in (config_lines(names, list(states.values())), metric_lines(names, list(states.values()))):
        say(*lines, "")
    try:
        plot = new_figure()
    except ConfigError as missing:
        say(f"no plot: {missing}")
        return 0
    draw_losses(plot, names, list(states.values()))
    drawn, same = io.BytesIO(), {"metadata": {"Date": None}} if file.suffix == ".svg" else {}
    plot.savefig(drawn, format=file.suffix[1:], dpi=150, **same)
    try:
        file.write_bytes(drawn.getvalue())
    except Exception as error:  # cloud storage has errors of its own
        raise StorageError(f"{file} cannot be written: {reason(error)}") from None
    say(f"plot {file}")
    return 0


def config_lines(names: list[str], states: "list[RunState]") -> list[str]:
    """The fields in which any run differs from the first, with what that does to a run."""
    from configs.compare import differences
    from configs.fields import format_value

    first = states[0].config
    found = [{one.path: one for one in differences(first, it.config)} for it in states[1:]]
    paths = list(dict.fromkeys(path for changed in found for path in changed))
    if not paths:
        return ["the configs are the same"]
    rows: list[tuple[str, ...]] = [("config", *names, "")]
    for path in paths:
        one = next(changed[path] for changed in found if path in changed)
        values = [one.a, *(changed[path].b if path in changed else one.a for changed in found)]
        rows.append((path, *map(format_value, values), one.words()))
    return table(rows)


def metric_lines(names: list[str], states: "list[RunState]") -> list[str]:
    """What each run logged last."""
    rows: list[tuple[str, ...]] = [("last logged", *names)]
    rows.append(("state", *(it.state for it in states)))
    rows.append(("step", *(f"{it.step}/{it.config.trainer.steps}" for it in states)))
    for kind, said in (("train", ""), ("eval", "held-out ")):
        last = [it.last.get(kind, {}) for it in states]
        for key in dict.fromkeys(key for record in last for key in record if key not in ("kind", "step")):
            rows.append((f"{said}{key}", *(figure(record.get(key, "-")) for record in last)))
    rows.append(("goodput", *("-" if it.goodput is None else f"{100 * it.goodput:.1f}%" for it in states)))
    return table(rows)


def draw_losses(plot: Any, names: list[str], states: "list[RunState]") -> None:
    """Training and held-out loss of every run, over steps and over the FLOPs of the model."""
    from launch.curves import COLOURS, curve, draw, draw_held_out, panels
    from trainer.run_folder import read_metrics
    from trainer.tasks import make_task

    axes = panels(plot, ["training loss", "training loss", "held-out loss", "held-out loss"])
    for number, (name, it) in enumerate(zip(names, states, strict=True)):
        if not it.last:
            continue
        colour, flops = COLOURS[number % len(COLOURS)], make_task(it.config).flops_per_step
        for i, (kind, drawn) in enumerate((("train", draw), ("eval", draw_held_out))):
            steps, losses = curve(read_metrics(it.run, kind), "loss")
            drawn(axes[2 * i], (steps, losses), colour, name if not i else None)
            drawn(axes[2 * i + 1], (steps * flops, losses), colour)
    for axis, unit in zip(axes, ("step", "FLOPs") * 2, strict=True):
        axis.set_xlabel(unit)
    if axes[0].lines:
        plot.legend(loc="outside upper center", ncols=min(len(names), 4), frameon=False)


def tail(argv: list[str]) -> int:
    from launch.run_state import RUNNING, UNKNOWN, read_state
    from trainer.evaluate import read_config
    from trainer.storage import folder_of

    parser = Parser(prog="podwright runs tail", usage="podwright runs tail RUN [-n N] [--follow]")
    parser.add_argument("run")
    parser.add_argument("-n", type=size, default=10, help="records; default: 10")
    parser.add_argument("--follow", action="store_true", help="and those that come, while the run lives")
    options = parser.parse_args(argv)
    read_config(options.run)
    file = folder_of(options.run) / "metrics.jsonl"
    lines, at = new_lines(file, 0)
    say(*map(told, lines[-options.n :] if options.n else []))
    while options.follow:
        living = read_state(options.run).state in (
            RUNNING,
            UNKNOWN,
        )  # asked first: what it wrote before its end is read
        lines, at = new_lines(file, at)
        say(*map(told, lines))
        if not living:
            break
        time.sleep(POLL_CLOUD if "://" in str(file) else POLL)
    return 0


def new_lines(file: "epath.Path", at: int) -> tuple[list[bytes], int]:
    """Whole lines from byte `at` on, and the byte after them. Raises StorageError."""
    from trainer.storage import StorageError, reason

    try:
        if not file.exists():
            return [], at
        with file.open("rb") as log:
            log.seek(at)
            text = log.read()
    except Exception as error:
        raise StorageError(f"{file} cannot be read: {reason(error)}") from None
    whole = text.rpartition(b"\n")[0]
    return [line for line in whole.split(b"\n") if line], at + len(whole) + bool(whole)


def told(line: bytes) -> str:
    """A record in a line: its kind, its step, its values."""
    import json

    try:
        record = json.loads(line)
        kind, step = record.pop("kind"), record.pop("step")
    except (ValueError, KeyError, AttributeError):
        return f"not a record: {line.decode(errors='replace')}"
    return "  ".join([f"{kind:<8}step {step}", *(f"{name} {figure(value)}" for name, value in record.items())])


def archive(argv: list[str]) -> int:
    from launch.archive import archive_run

    parser = Parser(prog="podwright runs archive", usage="podwright runs archive RUN --to FOLDER [--remove]")
    parser.add_argument("run")
    parser.add_argument("--to", required=True, metavar="FOLDER", help="that will be the run; it must not exist")
    parser.add_argument("--remove", action="store_true", help="the run, once the copy is known to be the same")
    options = parser.parse_args(argv)
    say(archive_run(options.run, options.to, options.remove, progress("copying")))
    return 0


COMMANDS = {"list": list_runs, "compare": compare, "tail": tail, "archive": archive}


def main(argv: list[str]) -> int:
    """Raises ConfigError, StorageError."""
    return subcommand("runs", COMMANDS, argv)
