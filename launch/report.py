"""`podwright report RUN`: one page about a run, from what lies in its folder. What is missing there is said, and no error."""

import contextlib
import datetime
import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

from etils import epath

from configs import EXPERIMENTS
from configs.fields import values_of
from configs.overrides import Resolved
from configs.schema import ConfigError
from launch import goodput, page
from launch.cli import Parser
from launch.config_commands import config_table
from launch.curves import COLOURS, at_window_ends, curve, draw, draw_held_out, draw_speed, panels
from launch.report_plan import a_second, plan_and_measured
from launch.run_state import (
    DIVERGED,
    DONE,
    FAILED,
    IMPORTED,
    PREEMPTED,
    RUNNING,
    UNKNOWN,
    RunState,
    ago,
    continuing,
    log_lines,
    read_state,
    started_from,
)
from launch.studies.study import new_figure
from trainer.checkpoint import write_whole
from trainer.guard import read_rollbacks
from trainer.inspect_saved import describe_step, losses, stored_bytes, wrong_with
from trainer.ledger import FILE, read_rows
from trainer.run_folder import read_manifest, read_metrics, trained_by
from trainer.saved import SavedSteps
from trainer.storage import StorageError, folder_of, reason

PAGE = "report.html"
READ_BYTES = 1 << 30  # checkpoints that are larger together are not read again for a page, nor those on cloud storage
ENDED = {
    RUNNING: "It is being trained. If it ends early, this continues it:",
    DONE: "It is done. The same command would find nothing left to do:",
    PREEMPTED: "It was told to stop, and saved. This continues it:",
    FAILED: "It ended before its last step, and the folder does not say why: killed, or an error that its job printed. "
    "This continues it:",
    DIVERGED: "Its last step was a bad one, and its guard ended it. This continues it:",
    IMPORTED: "It is an imported checkpoint that was never trained. This trains it:",
    UNKNOWN: "It has noted no end: another machine may be training it. If nobody does, this continues it:",
}


def main(argv: list[str]) -> int:
    """Raises ConfigError, StorageError."""
    parser = Parser(prog="podwright report", usage="podwright report RUN [--to FILE.html]")
    parser.add_argument("run")
    parser.add_argument("--to", metavar="FILE.html", help=f"default: RUN/{PAGE}")
    options = parser.parse_args(argv)
    it = read_state(options.run)
    file = folder_of(options.to) if options.to else it.run / PAGE
    if file.suffix != ".html":
        raise ConfigError(f"--to {options.to} is no page: give a file that ends in .html")
    text = report(it)
    try:
        write_whole(file, text)
    except Exception as error:
        raise StorageError(f"{file} cannot be written: {reason(error)}") from None
    print(f"report {file}")
    return 0


def report(it: RunState) -> str:
    """The whole document."""
    sections: dict[str, Callable[[RunState], list[str]]] = {
        "What it is": what_it_is,
        "Curves": curves,
        "Plan and measured": plan_and_measured,
        "Goodput": goodput_of,
        "Data": data,
        "Checkpoints": checkpoints,
        "Environment": environment,
        "Config": whole_config,
    }
    parts = []
    for name, section in sections.items():
        parts.append(page.heading(name))
        try:
            parts += section(it)
        except Exception as error:  # whatever a section trips over, the others are still worth reading
            parts.append(page.paragraph(f"This part could not be made: {reason(error)}."))
    return page.page(f"{it.run.name} ({it.config.name})", parts)


def what_it_is(it: RunState) -> list[str]:
    log = log_lines(it.run)
    description = (EXPERIMENTS[it.config.name].__doc__ or "").strip() if it.config.name in EXPERIMENTS else ""
    facts = [
        ("config", f"{it.config.name}: {description.partition(chr(10))[0]}" if description else it.config.name),
        ("folder", it.run),
        ("state", f"{it.state}, step {it.step:,} of {it.config.trainer.steps:,}"),
    ]
    for kind, words in (("train", "loss"), ("eval", "held-out")):
        if record := it.last.get(kind):
            names = [name for name in record if name not in ("kind", "step") and (kind == "eval" or name == "loss")]
            said = ", ".join(f"{name} {in_words(record[name])}" for name in names)
            facts.append((f"last {words}", f"{said} (step {record['step']:,})"))
    facts += [(word, rest) for word in ("model", "mesh", "step") if (rest := announced(log, word))]
    if it.spent:
        facts.append(("started", f"{at(it.spent.start)}, {it.spent.attempts} attempt{'s' * (it.spent.attempts > 1)}"))
        facts.append(("last trained", f"{at(it.spent.end)}, {ago(it.spent.end)} before this page was made"))
    facts += [("resumed", line) for line in log if line.startswith(("resume verified", "resume not verified"))]
    facts += [
        ("rolled back", f"from step {one['step']:,} ({one['cause']}) to {one['returned_to']:,}")
        for one in read_rollbacks(it.run)
    ]
    if owner := trained_by(it.run):
        facts.append(("trained by", owner))
    command = continuing(it.config, it.run)
    if it.state == DIVERGED and it.config.guard.policy == "abort":
        command.append("--guard.policy rollback")
    return [page.facts(facts), page.paragraph(ENDED[it.state]), page.verbatim(" \\\n    ".join(command))]


def in_words(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def announced(log: list[str], word: str) -> str:
    """What a run said of one thing when it last started; nothing, if it never came so far."""
    begins = f"{word:<12}"
    return next((line[len(begins) :] for line in reversed(log) if line.startswith(begins)), "")


def at(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def curves(it: RunState) -> list[str]:
    if "train" not in it.last:
        return [page.paragraph("Nothing was logged yet: there are no curves.")]
    train, held_out = read_metrics(it.run, "train"), read_metrics(it.run, "eval")
    first, second = COLOURS[:2]
    speeds = at_window_ends(train, it.config.trainer.log_every)
    unit = next((name for name in it.last["train"] if name.endswith("_per_second")), "")
    others = [name for name in it.last.get("eval", {}) if name not in ("kind", "step", "loss")]
    drawn: dict[str, Callable[[Any], None]] = {
        "loss": partial(draw, found=curve(train, "loss"), colour=first, label="training"),
        "gradient norm": partial(draw, found=curve(train, "grad_norm"), colour=first),
        "learning rate": partial(draw, found=curve(train, "learning_rate"), colour=first),
        a_second(unit): partial(draw_speed, found=curve(speeds, unit), colour=first),
    }
    if "mfu_percent" in it.last["train"]:
        drawn["MFU, %"] = partial(draw_speed, found=curve(speeds, "mfu_percent"), colour=first)
    for name in others:
        drawn[f"held-out {name}"] = partial(draw_held_out, found=curve(held_out, name), colour=second)
    bad = [step for step, record in train.items() if record.get("loss", 0) is None]
    said = [f"{len(train):,} steps are logged, {len(held_out):,} evaluations."]
    if not held_out:
        said.append("Nothing was evaluated on held-out data.")
    if bad:
        said.append(f"The loss was not finite at {len(bad):,} steps, first at {min(bad):,}.")
    if "mfu_percent" not in it.last["train"]:
        said.append("There is no MFU, since no peak is known for its devices.")
    try:
        figure = new_figure()
    except ConfigError as missing:
        return [page.paragraph(" ".join([*said, f"No curves: {missing}."]))]
    axes = dict(zip(drawn, panels(figure, list(drawn)), strict=True))
    for name, one in drawn.items():
        one(axes[name])
        axes[name].set_xlabel("step")
    if held_out:
        draw_held_out(axes["loss"], curve(held_out, "loss"), second, "held-out")
        axes["loss"].legend(frameon=False)
    axes["gradient norm"].set_yscale("log")
    return [page.plot(figure), page.paragraph(" ".join(said))]


def goodput_of(it: RunState) -> list[str]:
    if it.spent is None:
        return [page.paragraph(f"The run has no ledger of its time: there is no {it.run / FILE}.")]
    parts = [page.verbatim("\n".join(goodput.table(it.run, it.spent)))]
    try:
        figure = new_figure()
        goodput.draw(list(read_rows(it.run)), figure)
        parts.insert(0, page.plot(figure))
    except ConfigError as missing:
        parts.append(page.paragraph(f"No plot: {missing}."))
    return parts


def data(it: RunState) -> list[str]:
    parts = []
    try:
        manifest = read_manifest(it.run)
    except StorageError:
        return [page.paragraph("The run never got as far as its data: there is no data_manifest.json.")]
    counts = manifest.get("counts", {})
    facts = [("kind", manifest.get("kind", it.config.data.kind)), ("hash", manifest.get("hash", "not recorded"))]
    simple = {name.replace("_", " "): count for name, count in counts.items() if not isinstance(count, list)}
    facts += [(name, f"{count:,}" if isinstance(count, int) else count) for name, count in simple.items()]
    parts.append(page.facts(facts))
    if "folders" in counts:
        parts += mixture(it, manifest)
    else:
        parts.append(page.paragraph("The data is one source: nothing is mixed."))
    parts.append(page.paragraph(bad_records(it.run)))
    return parts


def mixture(it: RunState, manifest: dict[str, Any]) -> list[str]:
    """Of prepared data: the share of rows that each source was to have, and has had at the last evaluation."""
    counts, stages = manifest["counts"], manifest["stages"]
    sizes = dict(zip(counts["folders"], counts["train_rows"], strict=True))
    passed = it.last.get("epochs", {})
    rows = {source: passed.get(source, 0.0) * size for source, size in sizes.items()}
    total = sum(rows.values())
    lines = []
    for i, (source, size) in enumerate(sizes.items()):
        asked = ", then ".join(f"{100 * shares[i]:.4g} %" for _, shares in stages)
        seen = f"{100 * rows[source] / total:.4g} %" if total else "-"
        lines.append((source, f"{size:,}", asked, seen, f"{rows[source]:,.0f}", f"{passed.get(source, 0.0):.3f}"))
    heads = ("source", "rows", "share asked", "share seen", "rows seen", "epochs")
    parts = [page.table(heads, lines)]
    if len(stages) > 1:
        changes = ", ".join(f"{step:,}" for step, _ in stages[1:])
        parts.append(page.paragraph(f"The shares change after steps {changes}."))
    if not passed:
        return [*parts, page.paragraph("Nothing was evaluated yet, so nothing is known of what was seen.")]
    return [*parts, page.paragraph(f"Seen is as of step {passed['step']:,}, the last evaluation.")]


def bad_records(run: epath.Path) -> str:
    file = run / "bad_records.jsonl"
    if not file.exists():
        return "Bad records: none was noted."
    found = {}
    for line in file.read_text().splitlines():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            found[record["source"], record["place"]] = record["reason"]  # once, however often it was come across
    kinds = ", ".join(f"{count:,} {why}" for why, count in Counter(found.values()).most_common())
    return f"Bad records: {len(found):,} ({kinds}), for which others stood; {file} lists them."


def checkpoints(it: RunState) -> list[str]:
    saved = SavedSteps(it.run / "checkpoints")
    steps = saved.steps()
    if not steps:
        return [page.paragraph("Nothing is saved that counts.")]
    read = "://" not in str(it.run) and sum(stored_bytes(saved, step) for step in steps) <= READ_BYTES
    heads, rows = ("step", "size", "saved on", "written", "finite", "loss", "arrays"), []
    loss = losses(str(it.run))
    for step in steps:
        wrong = wrong_with(saved, step, list) if read else ["not read"]
        logged = in_words(loss[step]) if step in loss else "-"
        rows.append((f"{step:,}", *describe_step(saved, step), logged, "; ".join(wrong) or "as saved"))
    if read:
        said = "Every array was read again for this page and held to its checksum."
    else:
        said = (
            f"They are too large or too far away to be read for a page: podwright checkpoint verify {it.run} does it."
        )
    return [page.table(heads, rows), page.paragraph(said)]


def environment(it: RunState) -> list[str]:
    parts, saved = [], SavedSteps(it.run / "checkpoints")
    facts: list[tuple[str, object]] = []
    if it.spent:
        facts.append(("devices", f"{it.spent.devices:,} x {it.spent.device_kind}"))
    newest = saved.newest()
    said = saved.manifest(newest) if newest is not None else {}
    mesh = said.get("mesh", {})
    if mesh:
        facts.append(("hosts", f"{mesh['processes']:,}"))
    facts += [(name, version) for name, version in said.get("versions", {}).items()]
    compiler = said.get("certificate", {}).get("compiler", {})
    facts += [(name, compiler[name]) for name in ("platform", "flags", "options", "program") if compiler.get(name)]
    if said:
        facts.append(("hash of podwright's code", said.get("code", "not recorded")))
        noted = f"As noted in checkpoint {newest:,}. No git commit is recorded, but a hash of podwright's source files."
        parts.append(page.paragraph(noted))
    else:
        parts.append(page.paragraph("Versions are noted in checkpoints, and nothing is saved yet."))
    return [*parts, page.facts(facts)]


def whole_config(it: RunState) -> list[str]:
    base = started_from(it.config)
    if base is None:
        sources = dict.fromkeys(values_of(it.config), "config.json")
        said = f"There is no experiment {it.config.name} here, so which values were given is not known."
    else:
        before = values_of(base.config)
        sources = {
            path: base.sources[path] if path in before and before[path] == value else "this run"
            for path, value in values_of(it.config).items()
        }
        said = f"Origins by comparing config.json with experiment {it.config.name} as it is now: “this run” was given to it."
    lines = [f"{text}  {comment}".rstrip() for text, comment in config_table(Resolved(it.config, sources))]
    return [page.paragraph(said), page.verbatim("\n".join(lines).strip("\n"))]
