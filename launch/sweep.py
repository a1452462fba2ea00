"""`podwright sweep NAME`: trains the runs of a sweep side by side, or those that are still missing."""

import glob
import hashlib
import json
import os
import pathlib
import shlex
import signal
import sys
import time
from collections.abc import Mapping, Sequence

from etils import epath
from rich.console import Console
from rich.live import Live
from rich.table import Table

from configs.fields import fields_of, format_value, kinds_of, values_of
from configs.overrides import override
from configs.schema import Config, ConfigError
from configs.store import to_json
from configs.suggestions import perhaps
from launch.jobs.commands import COMMON, OPTIONS
from launch.jobs.job import load
from launch.jobs.schedulers import SCHEDULERS
from launch.pool import DIVERGED, DONE, FAILED, NUMERICS, PREEMPTED, RUNNING, WAITING, Member, last_words, run_all
from trainer.storage import folder_of

USAGE = """\
podwright sweep NAME [--to DIR] [--at-once N] [--dry-run] [--retry-diverged] [--section.field VALUE ...]
podwright sweep NAME --on WHERE --topology T --to DIR [--at-once N] [options of launch]
Trains the runs of a sweep in DIR (runs/sweep-NAME), each in a folder named after its config: N at once (one a core), or as
jobs on other machines, N at once (4). Started again it goes on with what is missing. --dry-run says what would run; overrides
go to every run."""
AT_ONCE = 4  # jobs, unless said
OUTCOMES = "outcomes.jsonl"
JOB = {option: word for option, word in (COMMON | OPTIONS).items() if option not in ("run", "dry-run")}
EVERY = 60.0  # seconds between two lines of progress where there is no terminal


def main(argv: list[str]) -> int:
    import jax

    from launch.sweeps import SWEEPS, summary

    jax.config.update("jax_platforms", "cpu")  # planning needs no accelerator, and would keep it from the runs

    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, *(f"  {name:<20}{summary(function)}" for name, function in SWEEPS.items()), sep="\n")
        return 0
    name, *rest = argv
    if name not in SWEEPS:
        raise ConfigError(f"there is no sweep {name!r}, {perhaps(name, SWEEPS)}")
    known = JOB | {"to": "DIR", "at-once": "N", "dry-run": "", "retry-diverged": ""}
    resolved = [override(config, f"sweep {name}", rest, known) for config in SWEEPS[name]()]
    options = resolved[0].options
    configs = [one.config for one in resolved]
    place = job_place(options)
    home = pathlib.Path(f"runs/sweep-{name}")
    folder = folder_of(options.get("to") or home)
    if "://" not in str(folder):
        home = pathlib.Path(folder)
    labels, folders = labels_of(configs), [folder_name(config) for config in configs]
    refuse_twins(labels, folders)
    at_once = side_by_side(options.get("at-once"), place)

    members = [member(folder, home, place, *one) for one in zip(labels, folders, configs, strict=True)]
    outcomes = read_outcomes(home)
    for one in members:
        if is_done(one):
            one.state = DONE
        elif outcomes.get(one.run.name) == NUMERICS and "retry-diverged" not in options:
            one.state, one.code = DIVERGED, NUMERICS
    paid = bool(place) and SCHEDULERS[options["on"]].COSTS
    if "dry-run" in options or (paid and "yes" not in options):
        print("\n".join([*listed(members, configs), f"{at_once} at once in {folder}"]))
        if place:
            print(f"\neach as {shlex.join(['podwright', *members[0].command[3:]])}")
            print(f"nothing was started{'' if 'dry-run' in options else ': jobs cost money, say so with --yes'}")
        return 0
    write_down(home, name, members, configs)
    console = Console(highlight=False, soft_wrap=True)
    with Progress(console, home, members) as progress:
        finished = run_all(members, at_once, progress.changed)
    return concluded(console, members, folder, finished, shlex.join(["podwright", "sweep", *argv]))


def folder_name(config: Config) -> str:
    """From what the config says; a field that is added to the schema later changes no name, as long as it has its default."""
    kinds = kinds_of(config)
    default = {path: leaf.field.default for path, leaf in fields_of(kinds).items()}
    told = {path: value for path, value in values_of(config).items() if value != default[path]}
    digest = hashlib.sha256(json.dumps([kinds, told], sort_keys=True).encode()).hexdigest()
    return f"{config.name}-{digest[:10]}"


def labels_of(configs: Sequence[Config]) -> list[str]:
    """Each config's name, and what tells it from the others of that name."""
    values = [values_of(config) for config in configs]
    labels = []
    for own in values:
        same = [other for other in values if other["name"] == own["name"]]
        differing = [path for path in own if any(other.get(path) != own[path] for other in same)]
        words = [f"{path.rpartition('.')[2]}={format_value(own[path])}" for path in differing]
        labels.append(" ".join([own["name"], *words]))
    return labels


def refuse_twins(labels: Sequence[str], folders: Sequence[str]) -> None:
    for place, name in enumerate(folders):
        first = folders.index(name)
        if first < place:
            raise ConfigError(f"members {first + 1} and {place + 1} of the sweep are the same config, {labels[place]}")


def job_place(options: Mapping[str, str]) -> list[str]:
    """What `launch` is told of where jobs run; nothing for runs on this machine. Raises ConfigError."""
    where = options.get("on")
    if where in (None, "local"):
        if given := next((option for option in options if option in JOB and option != "on"), None):
            raise ConfigError(f"--{given} is of jobs on other machines: give --on, {perhaps('', SCHEDULERS)}")
        return []
    if where not in SCHEDULERS:
        raise ConfigError(f"--on {where} is not a place to launch on, {perhaps(where, [*SCHEDULERS, 'local'])}")
    for option, example in (("topology", "v5e-16"), ("to", "gs://BUCKET/sweeps/NAME")):
        if option not in options:
            raise ConfigError(f"--{option} is missing, which jobs on {where} need: give one, for example {example}")
    words = [[f"--{option}", *[options[option]] * bool(JOB[option])] for option in JOB if option in options]
    return [word for pair in words for word in pair]


def side_by_side(given: str | None, place: Sequence[str]) -> int:
    """How many runs at once: a core each on a CPU, one where there are accelerators, which a process takes whole."""
    if given is not None:
        if not given.isdecimal() or not int(given):
            raise ConfigError(f"--at-once {given} is not a number of runs: a whole number of at least 1 is allowed")
        return int(given)
    if place:
        return AT_ONCE
    devices = [path for kind in ("accel*", "nvidia[0-9]*", "vfio/[0-9]*") for path in glob.glob(f"/dev/{kind}")]
    if devices and os.environ.get("JAX_PLATFORMS") != "cpu":
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def member(folder: epath.Path, home: pathlib.Path, place: list[str], label: str, name: str, config: Config) -> Member:
    run, podwright = folder / name, [sys.executable, "-m", "launch"]
    log, file = home / "logs" / f"{name}.txt", str(config_file(home, name))
    if not place:
        return Member(label, [*podwright, "train", file, "--run", str(run)], run, log, config.trainer.steps)
    # Who follows a job may go and come: only the job itself is asked to stop, by `podwright jobs stop`.
    begun = [*podwright, "jobs", "follow", str(run)] if load(str(run)) else None
    command = begun or [*podwright, "launch", file, *place, "--run", str(run)]
    restart = [*podwright, "jobs", "restart", str(run)]
    return Member(label, command, run, log, config.trainer.steps, again=restart, stop=signal.SIGINT)


def config_file(folder: pathlib.Path, name: str) -> pathlib.Path:
    return folder / "configs" / f"{name}.json"


def is_done(member: Member) -> bool:
    from trainer.run_folder import read_metrics
    from trainer.saved import SavedSteps

    saved = SavedSteps(member.run / "checkpoints").counts(member.steps)
    return saved and member.steps in read_metrics(member.run, "eval")


def listed(members: Sequence[Member], configs: Sequence[Config]) -> list[str]:
    from launch.sweeps.planners import flops_per_step

    flops = [flops_per_step(config) * config.trainer.steps for config in configs]
    width = max(len(member.label) for member in members)
    lines = [
        f"{member.label:<{width}}  {member.steps:>8,} steps  {cost:>9.3g} FLOPs  {member.state:<9} {member.run.name}"
        for member, cost in zip(members, flops, strict=True)
    ]
    missing = sum(cost for member, cost in zip(members, flops, strict=True) if member.state == WAITING)
    return [*lines, f"{len(members)} runs, {sum(flops):.3g} FLOPs, {missing:.3g} of them missing"]


def write_down(folder: pathlib.Path, name: str, members: Sequence[Member], configs: Sequence[Config]) -> None:
    """What each run is made of: `podwright train` takes these files, on any machine."""
    (folder / "configs").mkdir(parents=True, exist_ok=True)
    for one, config in zip(members, configs, strict=True):
        config_file(folder, one.run.name).write_text(to_json(config) + "\n")
    listed = [{"run": one.run.name, "label": one.label} for one in members]
    (folder / "sweep.json").write_text(json.dumps({"sweep": name, "members": listed}, indent=1) + "\n")


def read_outcomes(folder: pathlib.Path) -> dict[str, int]:
    """The exit code that each run last ended with."""
    try:
        lines = (folder / OUTCOMES).read_text().splitlines()
    except OSError:
        return {}
    return {record["run"]: record["code"] for record in map(json.loads, lines)}


class Progress:
    """A table that lives on a terminal; elsewhere a line for every start and end, and one a minute."""

    def __init__(self, console: Console, folder: pathlib.Path, members: Sequence[Member]):
        self.console, self.folder, self.members = console, folder, members
        self.live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self.began = self.last = time.monotonic()

    def __enter__(self) -> "Progress":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live:
            self.live.stop()

    def changed(self, member: Member | None) -> None:
        if member is not None:
            if member.state != RUNNING:
                with (self.folder / OUTCOMES).open("a") as file:
                    file.write(json.dumps({"run": member.run.name, "code": member.code, "time": time.time()}) + "\n")
            if self.live is None or member.state == FAILED:
                self.console.print(f"{self.counts()}: {member.label} {self.words(member)}", markup=False)
        if self.live:
            self.live.update(self.table(), refresh=True)
        elif time.monotonic() - self.last > EVERY:
            self.last = time.monotonic()
            for one in self.members:
                if one.state == RUNNING:
                    self.console.print(f"{self.counts()}: {one.label} {self.words(one)}", markup=False)

    def counts(self) -> str:
        done = sum(member.state not in (WAITING, RUNNING) for member in self.members)
        return f"{done}/{len(self.members)} ended after {(time.monotonic() - self.began) / 60:.1f} min"

    def words(self, member: Member) -> str:
        if member.state == FAILED:
            return f"failed with exit code {member.code}: {last_words(member)} ({member.log})"
        if member.state == WAITING:
            return f"ended with exit code {member.code} and is started again"
        if member.state != RUNNING:
            return member.state
        record = member.progress()
        return f"at step {record['step']:,}/{member.steps:,}, loss {record['loss']:.4f}" if record else "started"

    def table(self) -> Table:
        """Those that run, and those that came to no good end; as many as fit."""
        table = Table(title=self.counts(), title_justify="left", box=None)
        for head in ("run", "state", "step", "loss"):
            table.add_column(head, justify="left" if head in ("run", "state") else "right")
        shown = [m for m in self.members if m.state not in (WAITING, DONE)]
        for one in shown[-max(3, self.console.height - 4) :]:
            record = one.progress()
            step = f"{record['step']:,}/{one.steps:,}" if record else ""
            table.add_row(one.label, one.state, step, f"{record['loss']:.4f}" if record else "")
        return table


def concluded(console: Console, members: Sequence[Member], folder: pathlib.Path, finished: bool, again: str) -> int:
    """The last lines, and the exit code: of those that failed, the first one's."""
    of = {state: [member for member in members if member.state == state] for state in (DONE, DIVERGED, FAILED)}
    lines = [f"{len(of[DONE])} of {len(members)} runs are done in {folder}"]
    if of[DIVERGED]:
        names = "; ".join(member.label for member in of[DIVERGED])
        lines.append(f"{len(of[DIVERGED])} diverged (again with --retry-diverged): {names}")
    lines += [f"failed: {member.label}: {last_words(member)}" for member in of[FAILED]]
    if not finished:
        lines.append(f"stopped; continue with: {again}")
    elif of[FAILED]:
        lines.append(f"once that is put right, continue with: {again}")
    else:
        lines.append(f"the law of it: podwright fit {folder}")
    console.print("\n".join(lines), markup=False)
    if not finished:
        return PREEMPTED
    code = next((member.code or 1 for member in of[FAILED]), 0)
    return code if code >= 0 else 128 - code  # ended by a signal
