"""`podwright goodput RUN`: how much of a run was training, and what the rest went to."""

from typing import Any

from etils import epath

from configs.schema import ConfigError
from launch.studies.study import new_figure
from sharding.topologies import CHIPS, PRICES_OF
from trainer.ledger import FILE, Goodput, goodput, read_rows
from trainer.phases import CAUSES, STEP
from trainer.storage import StorageError, folder_of, reason

USAGE = """\
podwright goodput RUN
the share of a run's time, from its first start to its last second, that went into training; what the rest went to, with
its cost where the price of the devices is known; and RUN/goodput.svg, the same over time"""
PLOT = "goodput.svg"
COLOURS = dict(
    zip(
        CAUSES,
        ("#1b7837", "#fdae61", "#2166ac", "#92c5de", "#762a83", "#b2abd2", "#5e9e9a", "#b2182b", "#cccccc"),
        strict=True,
    )
)


def main(argv: list[str]) -> int:
    if len(argv) != 1 or argv[0].startswith("-"):
        print(USAGE)
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    run = folder_of(argv[0])
    rows = list(read_rows(run))
    if not rows:
        raise StorageError(f"{run} has no ledger of its time: there is no {run / FILE}")
    print("\n".join(table(run, goodput(rows))))
    try:
        figure = new_figure()
        draw(rows, figure)
        with (run / PLOT).open("wb") as file:
            figure.savefig(file, format="svg", metadata={"Date": None})
        said = f"plot {run / PLOT}"
    except ConfigError as missing:
        said = f"no plot: {missing}"
    except OSError as error:
        raise StorageError(f"{run / PLOT} cannot be written: {reason(error)}") from None
    print(f"\n{said}")
    return 0


def table(run: epath.Path, spent: Goodput) -> list[str]:
    """The answer, then a line a cause, most seconds first."""
    wall, price = spent.end - spent.start, price_of(spent.device_kind)
    dollars = price * spent.devices / 3600 if price else None  # a second of all
    attempts = f"{spent.attempts} attempt{'s' * (spent.attempts > 1)}"
    lines = [
        f"{run}: goodput {100 * spent.seconds.get(STEP, 0.0) / wall:.1f}% of {in_words(wall)}, "
        f"{spent.step:,} steps in {attempts} on {spent.devices} x {spent.device_kind}",
        "",
    ]
    for cause, seconds in spent.seconds.items():
        cost = f"  ${dollars * seconds:>12,.2f}" if dollars else ""
        lines.append(f"  {cause:<11}{seconds:>14,.1f} s  {100 * seconds / wall:5.1f}%{cost}")
    cost = f"  ${dollars * wall:>12,.2f}" if dollars else ""
    lines.append(f"  {'all':<11}{wall:>14,.1f} s  100.0%{cost}")
    if price:
        lines += [
            "",
            f"at ${price:.2f} a device-hour, the list price of {PRICES_OF}, as if the devices were kept while idle",
        ]
    return lines


def price_of(device_kind: str) -> float | None:
    """USD an hour of one jax device, None where no price is known."""
    return next((c.price / c.devices for c in CHIPS.values() if c.kind == device_kind and c.price), None)


def in_words(seconds: float) -> str:
    minutes = int(seconds) // 60
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {int(seconds) % 60:02d} s"


def draw(rows: list[dict], figure: Any) -> None:
    """Left all causes with their seconds, most first; right what each stretch of time went to, 1 being all of it."""
    spent = goodput(rows)
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    wall = spent.end - spent.start
    causes = list(spent.seconds)[::-1]
    unit, named = (3600, "hours") if wall > 7200 else (60, "minutes")
    bars = left.barh(causes, [spent.seconds[c] / unit for c in causes], color=[COLOURS[c] for c in causes])
    left.bar_label(bars, [f"{100 * spent.seconds[c] / wall:.1f}%" for c in causes], padding=3)
    left.set_xlim(0, 1.25 * max(spent.seconds.values()) / unit)
    left.set_xlabel(named)
    edges = [(spent.start + wall * i / BINS, spent.start + wall * (i + 1) / BINS) for i in range(BINS)]
    starts = [(a - spent.start) / unit for a, _ in edges]
    bottom = [0.0] * BINS
    for cause in (c for c in CAUSES if c in spent.seconds):
        shares = [stretch.get(cause, 0.0) for stretch in shares_of(rows, edges)]
        top = [b + s for b, s in zip(bottom, shares, strict=True)]
        # One area: between bars, however close, a viewer shows seams. The last stretch is a point more.
        areas = ([*starts, wall / unit], [*bottom, bottom[-1]], [*top, top[-1]])
        right.fill_between(*areas, step="post", color=COLOURS[cause], label=cause, linewidth=0)
        bottom = top
    right.set_xlabel(f"{named} since the first start")
    right.set_ylabel("share of the time")
    right.set_ylim(0, 1)
    right.set_xlim(0, wall / unit)
    right.grid(False)
    figure.suptitle(f"goodput {100 * spent.seconds.get(STEP, 0.0) / wall:.1f}%")


BINS = 120


def shares_of(rows: list[dict], edges: list[tuple[float, float]]) -> list[dict[str, float]]:
    """Of each stretch of time, the share of each cause; within a row causes count as spread evenly."""
    pieces = []
    for before, row in zip([None, *rows], rows, strict=False):
        if before is not None and row["start"] > before["end"]:
            pieces.append((before["end"], row["start"], {"idle": row["start"] - before["end"]}))
        pieces.append((row["start"], row["end"], row["seconds"]))
    found: list[dict[str, float]] = []
    for start, end in edges:
        shares: dict[str, float] = {}
        for a, b, seconds in pieces:
            common = min(b, end) - max(a, start)
            if common > 0:
                for cause, s in seconds.items():
                    shares[cause] = shares.get(cause, 0.0) + s / (b - a) * common / (end - start)
        found.append(shares)
    return found
