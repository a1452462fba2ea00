"""`podwright fairness RUN [OTHER ...]`: accuracy and AUC of image classifiers by class and by group, their disparities
(arXiv 2308.10888), and what further runs, such as private ones, change."""

import csv
import io
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from configs.compare import differences
from configs.schema import Config, ConfigError, ImageData, NFNetConfig
from configs.suggestions import nearest
from launch import disparity
from launch.disparity import Group, Values
from launch.studies.study import new_figure

if TYPE_CHECKING:  # they load jax
    from etils import epath

    from data.bad_records import BadRecord
    from data.dataset import Origin

USAGE = "podwright fairness RUN [OTHER ...] [--groups FILE.csv] [--to DIR]"
PRINTED = 20  # groups of one table on the terminal


@dataclass(frozen=True)
class Scored:
    """What a run says of its held-out images, those left out that could not be read."""

    name: str
    config: Config
    step: int
    scores: np.ndarray  # float64 [N, L], probabilities
    labels: np.ndarray  # int32 [N], or float32 [N, L]
    images: list[str]  # N names
    label_names: list[str]  # L
    attributes: dict[str, np.ndarray]  # str [N] each, empty where not known
    unreadable: list[str]  # names


@dataclass(frozen=True)
class Measures:
    """Of one run; or of one run less another."""

    name: str
    overall: dict[str, Values]
    by: dict[str, list[Group]]  # by "class", "label" or an attribute
    disparities: dict[tuple[str, str, str], tuple[Values, str]]  # (by, metric, measure) -> values, lowest group
    of: tuple[str, str] | None = None  # of a difference: the further run, the first one


@dataclass(frozen=True)
class Table:
    title: str
    heads: list[str]
    rows: list[list[str]]
    lowest: list[int] = field(default_factory=list)  # rows that are printed on the terminal, if not all


def main(argv: list[str]) -> int:
    from launch.cli import Parser

    parser = Parser(prog="podwright fairness", usage=USAGE)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="runs; further ones are compared with the first")
    parser.add_argument(
        "--groups", metavar="FILE.csv", help="a row an image: its name, then attributes such as age, sex"
    )
    parser.add_argument("--to", metavar="DIR", help="folder for the page, figures and plots; default: RUN/fairness")
    options = parser.parse_args(argv)
    if twice := [run for run, count in Counter(options.runs).items() if count > 1]:
        raise ConfigError(f"run {twice[0]} is given twice: give each run once")
    from trainer.evaluate import read_config
    from trainer.storage import folder_of

    configs = {run: read_config(run) for run in options.runs}
    for run, config in configs.items():
        if not isinstance(config.model, NFNetConfig):
            raise ConfigError(f"{run} is a model of text: only image runs have classes of images")
    to = folder_of(options.to) if options.to else folder_of(options.runs[0]) / "fairness"
    if to.exists() and not to.is_dir():
        raise ConfigError(f"--to {to} is a file: give a folder")
    given = read_groups(options.groups) if options.groups else {}
    new_figure()  # tells if matplotlib is missing
    fairness(configs, options.groups, given, to)
    return 0


def fairness(configs: dict[str, Config], file: str | None, given: dict[str, dict[str, str]], to: "epath.Path") -> None:
    """Evaluate, measure, write and print; `given` is what read_groups found in `file`. Raises ConfigError, StorageError."""
    from launch.fairness_page import fairness_page, plots
    from sharding.mesh import simulate_devices
    from trainer.checkpoint import write_whole
    from trainer.storage import StorageError, folder_of, reason

    simulate_devices(next(iter(configs.values())).mesh)
    short = [folder_of(run).name for run in configs]
    names = short if len(set(short)) == len(short) else list(configs)
    scored = [scored_of(name, run, config) for name, (run, config) in zip(names, configs.items(), strict=True)]
    first = scored[0]
    for other in scored[1:]:
        check_comparable(first, other)
    attributes, notes = dict(first.attributes), []
    if first.unreadable:
        notes.append(f"images that cannot be read and are left out: {listing(first.unreadable)}")
    if file:
        found, said = attributes_of(first.images, file, given)
        attributes, notes = attributes | found, notes + said
    for name, values in attributes.items():
        if missing := int((values == "").sum()):
            notes.append(
                f"{name}: images of which it is not known and which are in no group: {missing:,} of {len(values):,}"
            )
    counts = disparity.example_counts(len(first.labels), disparity.resamples_for(first.scores.size))
    runs = [measures_of(one, attributes, counts) for one in scored]
    changes = [less(run, runs[0]) for run in runs[1:]]
    notes += unmeasured(runs[0], first.label_names)
    listed = tables(runs, changes)
    settings = {other.name: [str(found) for found in differences(first.config, other.config)] for other in scored[1:]}
    figures = plots(runs)
    about = {
        "images": len(first.labels),
        "labels": first.label_names,
        "many_labels": first.labels.ndim == 2,
        "resamples": len(counts) - 1,
        "steps": {one.name: one.step for one in scored},
        "settings": settings,
        "notes": notes,
    }
    try:
        to.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            for kind, look in (("svg", {"metadata": {"Date": None}}), ("png", {"dpi": 150})):
                out = io.BytesIO()
                figure.savefig(out, format=kind, **look)
                (to / f"{name}.{kind}").write_bytes(out.getvalue())
        write_whole(to / "fairness.json", json.dumps(as_json(about, runs, changes), indent=1) + "\n")
        write_whole(to / "fairness.html", fairness_page(about, listed, figures))
    except OSError as error:
        raise StorageError(f"{to} cannot be written: {reason(error)}") from None
    print("\n".join(line for one in listed for line in printed(one)))
    for note in notes:
        print(f"note: {note}")
    print(f"\nreport {to / 'fairness.html'}, figures {to / 'fairness.json'}")


# --- what a run says of images ----------------------------------------------------------------------------------------


def scored_of(name: str, run: str, config: Config) -> Scored:
    """The newest checkpoint, the average if it keeps one, on all held-out images."""
    import functools

    import jax

    from data import open_data
    from data.bad_records import taken_from
    from sharding.mesh import make_mesh
    from sharding.rules import rules_for
    from trainer.evaluate import load_model, place_batch

    assert isinstance(config.data, ImageData)
    mesh, data, dtype = make_mesh(config.mesh), open_data(config.data), jax.numpy.dtype(config.trainer.compute_dtype)
    place = functools.partial(place_batch, mesh=mesh, spec=rules_for(mesh).spec)
    logits, labels, bad = [], [], []
    with jax.set_mesh(mesh):
        model, step = load_model(run, config, mesh)
        program = jax.jit(lambda model, images: model(images, dtype=dtype, dropout_key=None))
        for batch in data.held_out_batches():
            bad += taken_from(batch)
            logits.append(np.asarray(program(model, place(batch)["images"]), np.float32))
            labels.append(batch["labels"])
    size = len(data.held_out)  # rows that fill the last batch follow
    scores, truth = np.concatenate(logits)[:size], np.concatenate(labels)[:size]
    if not np.isfinite(scores).all():
        raise ConfigError(f"step {step} of {run} has scores that are not finite, it has diverged: give another run")
    origins = [row[0] for row in data.held_out.origins(np.arange(size))]
    images, kept = image_names(origins), ~replaced(origins, bad)
    attributes: dict[str, np.ndarray] = getattr(data.held_out, "attributes", {})
    return Scored(
        name=name,
        config=config,
        step=step,
        scores=disparity.probabilities(scores[kept], "sigmoid" if truth.ndim == 2 else config.data.loss),
        labels=truth[kept],
        images=[image for image, there in zip(images, kept, strict=True) if there],
        label_names=label_names(origins, truth, scores.shape[1]),
        attributes={attribute: np.asarray(values).astype(str)[kept] for attribute, values in attributes.items()},
        unreadable=[image for image, there in zip(images, kept, strict=True) if not there],
    )


def image_names(origins: list["Origin"]) -> list[str]:
    """The file of an image that has one of its own; else its number, behind its file if there are several."""
    if not any(origin.place for origin in origins):
        return [origin.source for origin in origins]
    several = len({origin.source for origin in origins}) > 1
    return [f"{origin.source}/{origin.place}" if several else str(origin.place) for origin in origins]


def replaced(origins: list["Origin"], bad: list["BadRecord"]) -> np.ndarray:
    """bool [N]: for which images others stand, of another group perhaps. A bad record names its file from the root."""

    def same(origin: "Origin", one: "BadRecord") -> bool:
        return one.place == origin.place and f"/{one.source}".endswith(f"/{origin.source}")

    return np.array([any(same(origin, one) for one in bad) for origin in origins], bool)


def label_names(origins: list["Origin"], labels: np.ndarray, count: int) -> list[str]:
    """The folders of classes, where images lie in them; else numbers."""
    names = [str(label) for label in range(count)]
    if labels.ndim == 1 and all("/" in origin.source for origin in origins):
        folders = {(int(label), origin.source.partition("/")[0]) for label, origin in zip(labels, origins, strict=True)}
        if len(folders) == len({label for label, _ in folders}):
            for label, folder in folders:
                names[label] = folder
    return names


def check_comparable(first: Scored, other: Scored) -> None:
    """Raises ConfigError."""
    begins = f"{other.name} cannot be compared with {first.name}"
    if other.images != first.images:
        shared = len(set(other.images) & set(first.images))
        raise ConfigError(
            f"{begins}: it has {len(other.images):,} held-out images, {first.name} {len(first.images):,}, and {shared:,} are of "
            f"both: give runs with the same data.held_out and held-out source"
        )
    if other.scores.shape != first.scores.shape:
        raise ConfigError(
            f"{begins}: it tells {other.scores.shape[1]:,} classes apart, {first.name} {first.scores.shape[1]:,}: give runs of "
            f"the same classes"
        )
    if not np.array_equal(other.labels, first.labels, equal_nan=first.labels.dtype.kind == "f"):
        raise ConfigError(f"{begins}: the same held-out images have other labels: give runs of the same classes")


# --- groups -----------------------------------------------------------------------------------------------------------


def read_groups(file: str) -> dict[str, dict[str, str]]:
    """Of a CSV file with a header: attribute -> image -> value. Raises ConfigError."""
    from trainer.storage import folder_of, reason

    try:
        lines = list(csv.reader(io.StringIO(folder_of(file).read_text(encoding="utf-8-sig"), newline="")))
    except OSError as error:
        raise ConfigError(f"--groups {file} cannot be read: {reason(error)}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"--groups {file} is not a CSV file in UTF-8: {error}") from None
    heads = [head.strip() for head in lines[0]] if lines else []
    if len(heads) < 2:
        columns = f"{len(heads)} column{'s' * (len(heads) != 1)}"
        raise ConfigError(
            f"--groups {file} has {columns} in its header: give the image's name first, then a column for each attribute, such as "
            f"image,age,sex"
        )
    if wrong := [head for head, count in Counter(heads[1:]).items() if count > 1 or not head]:
        raise ConfigError(f"--groups {file} has columns without a name of their own ({wrong[0]!r}): name each once")
    if taken := [head for head in heads[1:] if head in ("class", "label")]:
        raise ConfigError(
            f"--groups {file} has a column {taken[0]!r}, by which images are told apart anyway: rename it"
        )
    found: dict[str, dict[str, str]] = {head: {} for head in heads[1:]}
    for number, cells in enumerate(lines[1:], start=2):
        if not cells:
            continue
        if len(cells) != len(heads):
            raise ConfigError(f"row {number} of --groups {file} has {len(cells)} cells, its header has {len(heads)}")
        image, *values = (cell.strip() for cell in cells)
        if image in found[heads[1]]:
            raise ConfigError(f"row {number} of --groups {file} names image {image} again: give each image one row")
        for head, value in zip(heads[1:], values, strict=True):
            found[head][image] = value
    return found


def attributes_of(
    images: list[str], file: str, given: dict[str, dict[str, str]]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Values by attribute, str [N], and what there is to say of names without a counterpart. Raises ConfigError."""
    named, held_out = next(iter(given.values())), set(images)
    unnamed = [image for image in images if image not in named]
    others = [image for image in named if image not in held_out]
    if len(unnamed) == len(images):
        rows = f"it has {others[0]!r}" if others else "it has no rows"
        near = nearest(others[0], images) if others else []
        raise ConfigError(
            f"--groups {file} names none of the {len(images):,} held-out images: {rows}, "
            + (f"perhaps {near[0]!r} is meant" if near else f"but they have names such as {images[0]!r}")
        )
    said = []
    if unnamed:
        said.append(f"held-out images that {file} does not name: {listing(unnamed)}")
    if others:
        said.append(f"rows of {file} that name no held-out image: {listing(others)}")
    return {name: np.array([values.get(i, "") for i in images], str) for name, values in given.items()}, said


# --- measures ---------------------------------------------------------------------------------------------------------


def measures_of(one: Scored, attributes: dict[str, np.ndarray], counts: np.ndarray) -> Measures:
    scores, labels = one.scores, one.labels
    overall = disparity.measured("", scores, labels, counts, np.arange(len(labels))).metrics
    many = labels.ndim == 2
    by = {"label" if many else "class": disparity.by_label(scores, labels, counts, one.label_names)}
    by |= {name: disparity.by_value(scores, labels, counts, values) for name, values in attributes.items()}
    found = {}
    for name, groups in by.items():
        for metric in [m for m in metrics_in(groups) if m == "accuracy" or (many and m != "micro AUC")]:
            for measure, values in disparity.disparities(overall, groups, metric).items():
                found[name, metric, measure] = values
    return Measures(one.name, overall, by, found)


def metrics_in(groups: list[Group]) -> list[str]:
    return list(groups[0].metrics) if groups else []


def less(run: Measures, first: Measures) -> Measures:
    """Resample by resample, so that what both runs find hard cancels."""
    return Measures(
        name=f"{run.name} - {first.name}",
        overall={metric: values - first.overall[metric] for metric, values in run.overall.items()},
        by={
            name: [
                Group(a.name, a.count, {metric: a.metrics[metric] - b.metrics[metric] for metric in a.metrics})
                for a, b in zip(groups, first.by[name], strict=True)
            ]
            for name, groups in run.by.items()
        },
        disparities={key: (values - first.disparities[key][0], "") for key, (values, _) in run.disparities.items()},
        of=(run.name, first.name),
    )


def unmeasured(run: Measures, names: list[str]) -> list[str]:
    """What no number could be given for, and why."""
    said = []
    for name, groups in run.by.items():
        if not groups:
            said.append(f"{name}: no held-out image has a value")
        if few := [f"{group.name} ({group.count})" for group in groups if group.count < disparity.FEWEST]:
            said.append(
                f"{name}: groups of fewer than {disparity.FEWEST} images, which are not measured: {listing(few)}"
            )
        if name in ("class", "label"):
            if alone := [group.name for group in groups if group.one_kind]:
                said.append(f"{name}: without AUC, since all images are of one kind: {listing(alone)}")
            continue
        for group in groups:
            if group.one_kind:
                alone = [names[label] for label in group.one_kind]
                said.append(
                    f"{name} {group.name}: left out of its macro AUC, since all images are of one kind: {listing(alone)}"
                )
    return said


def listing(names: list[str]) -> str:
    from trainer.storage import few

    return f"{len(names):,} ({few(names)})"


# --- as JSON and tables -----------------------------------------------------------------------------------------------


def as_json(about: dict[str, Any], runs: list[Measures], changes: list[Measures]) -> dict[str, Any]:
    return {
        **about,
        "runs": [{"run": run.name, **measures_json(run)} for run in runs],
        "differences": [
            {"run": change.of[0], "less": change.of[1], **measures_json(change)} for change in changes if change.of
        ],
    }


def measures_json(one: Measures) -> dict[str, Any]:
    return {
        "overall": {metric: value_json(values) for metric, values in one.overall.items()},
        "by": {
            name: [
                {"group": group.name, "images": group.count}
                | {metric: value_json(values) for metric, values in group.metrics.items()}
                for group in groups
            ]
            for name, groups in one.by.items()
        },
        "disparities": [
            {"by": by, "metric": metric, "measure": measure, "group": lowest or None, **value_json(values)}
            for (by, metric, measure), (values, lowest) in one.disparities.items()
        ],
    }


def value_json(values: Values) -> dict[str, Any]:
    """JSON has no NaN: null stands for what is not determined."""
    low, high = disparity.interval(values)
    value, *ends = (None if np.isnan(x) else float(x) for x in (values[0], low, high))
    return {"value": value, "interval": ends}


def tables(runs: list[Measures], changes: list[Measures]) -> list[Table]:
    """A column for each run, then for each difference."""
    columns = [*runs, *changes]
    heads = [one.name for one in columns]
    first, *_ = runs
    overall = [[metric, *(cell(one.overall[metric], "", one) for one in columns)] for metric in first.overall]
    found = [Table("Overall", ["metric", *heads], overall)]
    for measure in disparity.MEASURES:
        rows = [
            [f"{metric} by {by}", *(cell(*one.disparities[by, metric, measure], one) for one in columns)]
            for by, metric, of in first.disparities
            if of == measure
        ]
        found.append(Table(f"{measure[0].upper()}{measure[1:]}", ["", *heads], rows))
    for name, groups in first.by.items():
        for metric in metrics_in(groups):
            rows = [
                [group.name, f"{group.count:,}", *(cell(one.by[name][i].metrics[metric], "", one) for one in columns)]
                for i, group in enumerate(groups)
            ]
            order = np.argsort([group.metrics[metric][0] for group in groups], kind="stable")
            lowest = sorted(order[:PRINTED].tolist())
            found.append(Table(f"{metric[0].upper()}{metric[1:]} by {name}", [name, "images", *heads], rows, lowest))
    return found


def cell(values: Values, lowest: str, one: Measures) -> str:
    """`0.9333 (0.8944 to 0.9667)`, with a sign where it is a difference, and the group that it is of."""
    low, high = disparity.interval(values)
    form = "+.4f" if one.of else ".4f"
    if np.isnan(values[0]):
        return "-"
    spread = f" ({low:{form}} to {high:{form}})" if np.isfinite(low) else " (not determined)"
    return f"{values[0]:{form}}{spread}{f', {lowest}' if lowest else ''}"


def printed(one: Table) -> list[str]:
    rows = [one.rows[i] for i in one.lowest] if len(one.rows) > PRINTED else one.rows
    title = one.title if len(rows) == len(one.rows) else f"{one.title}, the lowest {len(rows)} of {len(one.rows):,}"
    widths = [max(len(row[i]) for row in [one.heads, *rows]) for i in range(len(one.heads))]
    aligned = [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in [one.heads, *rows]
    ]
    return [f"\n{title}", *aligned]
