"""`podwright checkpoint list | verify | doctor | diff | adopt`: what is saved, whether it is whole, and what can be used."""

from collections.abc import Callable, Iterable

from configs.schema import MESH_FIELDS
from launch.cli import Parser, subcommand


def list_steps(argv: list[str]) -> int:
    from trainer.evaluate import read_config
    from trainer.inspect_saved import describe_step, fit_on, losses
    from trainer.saved import SavedSteps
    from trainer.storage import folder_of

    parser = Parser(
        prog="podwright checkpoint list", usage="podwright checkpoint list RUN [--mesh.fsdp N ...] [--hosts N]"
    )
    parser.add_argument("run")
    for axis in MESH_FIELDS:
        parser.add_argument(f"--mesh.{axis}", dest=axis, type=size, default=1, help="devices of a mesh to load it on")
    parser.add_argument("--hosts", type=size, default=1, help="that share these devices")
    options = parser.parse_args(argv)
    axes = {axis: getattr(options, axis) for axis in MESH_FIELDS}
    config, saved = read_config(options.run), SavedSteps(folder_of(options.run) / "checkpoints")
    loss = losses(options.run)
    rows: list[tuple[str, ...]] = [("step", "size", "saved on", "written", "finite", "loss")]
    for step in saved.steps():
        rows.append((str(step), *describe_step(saved, step), f"{loss[step]:.4f}" if step in loss else "-"))
    if len(rows) == 1:
        say(f"{options.run} has no checkpoint that counts: podwright checkpoint doctor {options.run} says why")
        return 0
    say(*table(rows), f"on {fit_on(config, axes, options.hosts)}")
    return 0


def verify(argv: list[str]) -> int:
    from trainer.inspect_saved import wrong_with
    from trainer.saved import SavedSteps
    from trainer.storage import DamagedError, folder_of

    parser = Parser(prog="podwright checkpoint verify", usage="podwright checkpoint verify RUN [--step N]")
    parser.add_argument("run")
    parser.add_argument("--step", type=size, help="only this one")
    options = parser.parse_args(argv)
    saved = SavedSteps(folder_of(options.run) / "checkpoints")
    steps = chosen(saved.steps(), options.step, options.run)
    damaged = []
    for step in steps:
        wrong = wrong_with(saved, step, progress(f"step {step}"))
        say(f"step {step}: {'; '.join(wrong) if wrong else 'every array is finite and as it was saved'}")
        damaged += [step] * bool(wrong)
    if damaged:
        raise DamagedError(f"{len(damaged)} of {len(steps)} checkpoints of {options.run} are not sound: {damaged}")
    return 0


def doctor(argv: list[str]) -> int:
    from trainer.inspect_saved import findings

    parser = Parser(prog="podwright checkpoint doctor", usage="podwright checkpoint doctor RUN")
    parser.add_argument("run")
    say(*findings(parser.parse_args(argv).run))
    return 0


def diff(argv: list[str]) -> int:
    from trainer.inspect_saved import compare
    from trainer.saved import SavedSteps
    from trainer.storage import folder_of

    parser = Parser(
        prog="podwright checkpoint diff", usage="podwright checkpoint diff RUN STEP STEP [--with OTHER_RUN]"
    )
    parser.add_argument("run")
    parser.add_argument("steps", type=size, nargs=2, metavar="STEP")
    parser.add_argument("--with", dest="other", metavar="RUN", help="whose step the second is")
    options = parser.parse_args(argv)
    runs = (options.run, options.other or options.run)
    saved = [SavedSteps(folder_of(run) / "checkpoints") for run in runs]
    for one, step, run in zip(saved, options.steps, runs, strict=True):
        chosen(one.steps(), step, run)
    rows: list[tuple[str, ...]] = [("array", "shape", "changed", "largest", "relative")]
    same = 0
    for found in compare(saved[0], options.steps[0], saved[1], options.steps[1], progress("comparing")):
        if isinstance(found, str):
            rows.append((found, "", "", "", ""))
        elif found.changed:
            shape = "x".join(map(str, found.shape)) or "scalar"
            share = f"{100 * found.changed / found.size:.1f} %"
            rows.append((found.name, shape, share, f"{found.largest:.3g}", f"{found.relative:.3g}"))
        else:
            same += 1
    say(*(table(rows) if len(rows) > 1 else []), f"{same} arrays are equal, bit for bit; {len(rows) - 1} differ")
    return 0


def adopt(argv: list[str]) -> int:
    from trainer.inspect_saved import adopt_step

    parser = Parser(prog="podwright checkpoint adopt", usage="podwright checkpoint adopt RUN --step N")
    parser.add_argument("run")
    parser.add_argument("--step", type=size, required=True, help="of a copied folder RUN/checkpoints/N")
    options = parser.parse_args(argv)
    say(adopt_step(options.run, options.step, progress(f"step {options.step}")))
    return 0


def chosen(steps: list[int], step: int | None, run: str) -> list[int]:
    from trainer.storage import StorageError

    if step is None:
        return steps
    if step not in steps:
        there = ", ".join(map(str, steps)) or "none"
        raise StorageError(f"{run} has no checkpoint of step {step} that counts: there are {there}")
    return [step]


def progress(what: str) -> Callable[[Iterable], Iterable]:
    """Shows how far an iteration over arrays is, on a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return lambda names: track(names, what, console=console, transient=True, disable=not console.is_terminal)


def table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def say(*lines: str) -> None:
    for line in lines:
        print(line, flush=True)


def size(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError
    return value


COMMANDS = {"list": list_steps, "verify": verify, "doctor": doctor, "diff": diff, "adopt": adopt}


def main(argv: list[str]) -> int:
    """Raises ConfigError, StorageError."""
    return subcommand("checkpoint", COMMANDS, argv)
