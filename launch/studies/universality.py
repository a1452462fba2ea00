"""A linear diagonal recurrence and an MLP as a model of nonlinear sequence maps (arXiv 2307.11888), with the LRU's own draws.

What a state still knows of its inputs, how many modes that takes, and what an MLP shared over time makes of it. The study
trains its MLPs itself and has no runs. Shapes are those of linear_states.py and shared_mlp.py. What counts as
agreement was fixed beforehand and stands in `criteria`.
"""

import dataclasses
import itertools
import math
from typing import Any

import numpy as np

from launch.studies.linear_states import (
    TARGETS,
    eigenvalues,
    fourier,
    recovered,
    states,
    unreachable,
    wanted,
)
from launch.studies.shared_mlp import LINEAR, learned, whitened
from launch.studies.study import Figures, Study

DISK, RING = (0.0, 1.0), (0.9, 0.999)  # moduli: the whole disk, and the LRU's default
REAL, REAL_DOUBLE, HALF, COMPLEX = "real, N = L", "real, N = 2L", "complex, N = L/2", "complex, N = L"
MODES = {REAL: 1.0, REAL_DOUBLE: 2.0, HALF: 0.5, COMPLEX: 1.0}  # N for each input of a sequence


@dataclasses.dataclass(frozen=True)
class Sizes:
    lengths: tuple[int, ...]  # of sequences that are reconstructed
    length: int  # of all others
    dimensions: int  # P
    threshold_modes: tuple[int, ...]
    modes: tuple[int, ...]  # before MLPs of the largest width; the last before all widths
    widths: tuple[int, ...]
    sequences: int  # to train MLPs on; a quarter as many judge
    steps: int
    # Rate, whitening and inputs were settled with seed 0.
    seeds: tuple[int, ...] = (10, 11, 12, 13, 14)
    mlp_seeds: tuple[int, ...] = (10, 11, 12)


SMALL = Sizes(
    (16, 32, 64, 128), 64, 8, (1, 2, 3, 4, 8, 16, 24, 32, 64), (2, 4, 8, 16), (2, 8, 32, 128, 512), 1024, 2000
)
FULL = Sizes(
    (16, 32, 64, 128, 256, 512),
    256,
    32,
    (4, 8, 12, 16, 32, 64, 96, 128, 256),
    (8, 16, 32, 64),
    (2, 8, 32, 128, 512, 2048, 8192),
    8192,
    20_000,
)


def measure(sizes: Sizes) -> Figures:
    figures = {
        "sizes": dataclasses.asdict(sizes),
        "reconstruction": reconstruction(sizes),
        "thresholds": thresholds(sizes),
        "maps": maps(sizes),
    }
    return {**figures, "criteria": criteria(figures)}


def reconstruction(sizes: Sizes) -> list[dict[str, Any]]:
    """White noise decoded from the last state, of every kind of nodes and every length."""
    found = []
    for ring in (DISK, RING):
        for nodes, share in MODES.items():
            for length in sizes.lengths:
                modes, real = int(share * length), nodes.startswith("real")
                pairs = [recovered(seed, np.eye(length), modes, ring, real) for seed in sizes.seeds]
                errors, conditions = map(list, zip(*pairs, strict=True))
                one = {"nodes": nodes, "moduli": list(ring), "length": length, "modes": modes}
                found.append({**one, "errors": errors, "conditions": conditions})
        print(f"reconstruction: moduli {ring[0]:g} to {ring[1]:g}", flush=True)
    return found


def thresholds(sizes: Sizes) -> list[dict[str, Any]]:
    """The last state's error against modes: N complex ones on the ring, and 2 N real ones of any modulus."""
    found = []
    for dimensions in (sizes.dimensions, sizes.length):
        for modes in sizes.threshold_modes:
            for real in (False, True):
                errors = []
                for seed in sizes.seeds:
                    white = dimensions == sizes.length
                    psi = np.eye(dimensions) if white else fourier(seed, dimensions, sizes.length)
                    nodes = (2 * modes, DISK, True) if real else (modes, RING, False)
                    errors.append(recovered(seed, psi, *nodes)[0])
                one = {"dimensions": dimensions, "real": real, "numbers": 2 * modes, "errors": errors}
                found.append({**one, "bound": unreachable(2 * modes, dimensions)})
        print(f"thresholds: {dimensions} dimensions", flush=True)
    return found


def maps(sizes: Sizes) -> list[dict[str, Any]]:
    """Of every target: errors against modes at the largest width, against widths at the most modes, and of real modes."""
    most, widest = sizes.modes[-1], sizes.widths[-1]
    arms = [(False, modes, width) for modes in sizes.modes for width in (LINEAR, widest)]
    arms += [(False, most, width) for width in sizes.widths[:-1]]
    arms += [(True, 2 * most, width) for width in (LINEAR, widest)]
    found = []
    for real, modes, width in arms:
        for target in TARGETS:
            errors = [one_map(sizes, target, real, modes, width, seed) for seed in sizes.mlp_seeds]
            found.append({"target": target, "real": real, "modes": modes, "width": width, "errors": errors})
        print(f"maps: {'real' if real else 'complex'}, N {modes}, D {width}", flush=True)
    return found


def one_map(sizes: Sizes, target: str, real: bool, modes: int, width: int, seed: int) -> float:
    """Relative error, sqrt(1 - R**2), on sequences that were not trained on."""
    inputs = smooth(sizes, seed)
    eigenvalue, gamma = eigenvalues(seed, modes, DISK if real else RING, real)
    x = whitened(states(eigenvalue, gamma, inputs), sizes.sequences)
    y = wanted(target, inputs, seed)
    # Every step of every sequence is a row: one MLP serves them all.
    x, y = (of.reshape(-1, of.shape[-1]) for of in (x, y))
    trained = sizes.sequences * sizes.length
    mean, deviation = y[:trained].mean(axis=0), y[:trained].std(axis=0)
    y = ((y - mean) / deviation).astype(np.float32)
    return learned((x[:trained], y[:trained]), (x[trained:], y[trained:]), width, seed, sizes.steps)


def smooth(sizes: Sizes, seed: int) -> np.ndarray:
    """Inputs (B L) in P dimensions, of variance 1."""
    psi = fourier(seed, sizes.dimensions, sizes.length) * math.sqrt(sizes.length / sizes.dimensions)
    rng = np.random.default_rng(seed)
    return rng.normal(size=(sizes.sequences + sizes.sequences // 4, sizes.dimensions)) @ psi.T


def criteria(figures: Figures) -> list[dict[str, Any]]:
    """What had to be seen, fixed before the study was run; what was; and whether that meets it. Errors are means of seeds."""
    rows: list[dict[str, Any]] = []

    def expect(what: str, seen: float, met: bool) -> None:
        rows.append({"criterion": what, "figure": seen, "met": bool(met)})

    sizes = figures["sizes"]
    error = {(one["nodes"], *one["moduli"], one["length"]): np.mean(one["errors"]) for one in figures["reconstruction"]}
    log = {
        (one["nodes"], *one["moduli"], one["length"]): np.mean(np.log(one["conditions"]))
        for one in figures["reconstruction"]
    }
    lengths = sizes["lengths"]
    worst = min(error[REAL_DOUBLE, *DISK, length] for length in lengths if length >= 32)
    expect("real modes, N = 2L in the disk: least error from L = 32 on > 0.3", worst, worst > 0.3)
    worst = max(error[COMPLEX, *RING, length] for length in lengths if length <= 128)
    expect("complex modes, N = L on the ring: largest error up to L = 128 < 0.01", worst, worst < 0.01)
    gap = min(math.exp(log[REAL_DOUBLE, *DISK, length] - log[COMPLEX, *DISK, length]) for length in lengths)
    expect("condition of real N = 2L over complex N = L, both in the disk: least ratio > 100", gap, gap > 100)
    gap = min(math.exp(log[COMPLEX, *DISK, length] - log[COMPLEX, *RING, length]) for length in lengths)
    expect("condition of complex N = L in the disk over the ring: least ratio > 1", gap, gap > 1)

    dimensions, length = sizes["dimensions"], sizes["length"]
    complex_ = [one for one in figures["thresholds"] if not one["real"]]
    few = min(np.mean(one["errors"]) for one in complex_ if one["dimensions"] == dimensions > one["numbers"])
    many = max(np.mean(one["errors"]) for one in complex_ if one["dimensions"] == dimensions <= one["numbers"] / 2)
    expect(
        f"inputs in P = {dimensions} dimensions: error at N < P/2 over that at N >= P, >= 10",
        few / many,
        few / many >= 10,
    )
    white = [one for one in complex_ if one["dimensions"] == length]
    least = min(np.mean(one["errors"]) for one in white if one["numbers"] < length)
    expect("white noise: least error at N < L/2 > 0.1", least, least > 0.1)
    least = min(np.mean(one["errors"]) for one in white if one["numbers"] >= length)
    expect("white noise: least error at N >= L/2 < 0.1", least, least < 0.1)

    at = {
        (one["target"], one["modes"], one["width"]): float(np.mean(one["errors"]))
        for one in figures["maps"]
        if not one["real"]
    }
    most, widths = sizes["modes"][-1], sizes["widths"]
    r2 = {target: 1 - at[target, most, LINEAR] ** 2 for target in TARGETS}
    fir, volterra, van_der_pol = TARGETS
    expect(f"{fir}: R2 of a linear readout > 0.99", r2[fir], r2[fir] > 0.99)
    expect(f"{volterra}: R2 of a linear readout < 0.5", r2[volterra], r2[volterra] < 0.5)
    expect(f"{van_der_pol}: R2 of a linear readout <= 0.99", r2[van_der_pol], r2[van_der_pol] <= 0.99)
    for target in TARGETS:
        errors = [at[target, most, width] for width in widths]
        worst = max(wider / narrower for narrower, wider in itertools.pairwise(errors))
        expect(f"{target}: largest ratio of errors of an MLP to the next narrower < 1", worst, worst < 1)
        seen = 1 - errors[-1] ** 2
        expect(f"{target}: R2 at D = {widths[-1]} > 0.9", seen, seen > 0.9)
        ratio = at[target, most // 4, widths[-1]] / errors[-1]
        expect(f"{target}: error at N = {most // 4} over that at N = {most}, >= 3", ratio, ratio >= 3)
    return rows


def slope(widths: list[int], errors: list[float]) -> float:
    """Of log error against log D; the paper's bound, D in the order of L / error**2, has -1/2."""
    return float(np.polyfit(np.log(widths), np.log(errors), 1)[0])


def table(figures: Figures) -> list[str]:
    lengths, widths = figures["sizes"]["lengths"], figures["sizes"]["widths"]
    lines = [f"{'error of white noise (condition), L':<40}" + "".join(f"{length:>18}" for length in lengths)]
    for (nodes, low, high), group in grouped(figures["reconstruction"], "nodes", "moduli"):
        cells = [f"{np.mean(one['errors']):.4f} ({np.exp(np.mean(np.log(one['conditions']))):.0e})" for one in group]
        lines.append(f"{f'{nodes}, moduli {low:g} to {high:g}':<40}" + "".join(f"{cell:>18}" for cell in cells))
    numbers = [2 * modes for modes in figures["sizes"]["threshold_modes"]]
    lines += ["", f"{'error, real numbers of the state':<40}" + "".join(f"{number:>9}" for number in numbers)]
    for (dimensions, real), group in grouped(figures["thresholds"], "dimensions", "real"):
        name = f"{'real' if real else 'complex'} modes, {dimensions} dimensions"
        lines.append(f"{name:<40}" + "".join(f"{np.mean(one['errors']):>9.4f}" for one in group))
        if not real:
            lines.append(f"{'  unreachable':<40}" + "".join(f"{one['bound']:>9.4f}" for one in group))
    lines += ["", f"{'error of a map, D (seeds)':<40}{'linear':>21}" + "".join(f"{width:>21}" for width in widths)]
    for (target, real, modes), group in grouped(figures["maps"], "target", "real", "modes"):
        at = {one["width"]: f"{np.mean(one['errors']):.3f} ({spread(one['errors'])})" for one in group}
        name = f"{target}, {'real' if real else 'complex'}, N = {modes}"
        lines.append(f"{name:<40}" + "".join(f"{at.get(width, ''):>21}" for width in (LINEAR, *widths)))
    lines.append("")
    for target, errors in by_width(figures).items():
        lines.append(f"{target}: error falls as D to the power {slope(widths, errors):.2f}; the bound has -0.50")
    lines += ["", f"{'criterion':<82}{'seen':>10}  met"]
    lines += [
        f"{one['criterion']:<82}{one['figure']:>10.3g}  {'yes' if one['met'] else 'NO'}" for one in figures["criteria"]
    ]
    return lines


def spread(errors: list[float]) -> str:
    return f"{min(errors):.3f}-{max(errors):.3f}"


def grouped(records: list[dict[str, Any]], *names: str):
    """(values of those names, records that share them), in order; a list counts as its items."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for one in records:
        values = tuple(v for name in names for v in (one[name] if isinstance(one[name], list) else [one[name]]))
        groups.setdefault(values, []).append(one)
    return groups.items()


def by_width(figures: Figures) -> dict[str, list[float]]:
    """Mean errors of each target's MLPs on the most complex modes."""
    sizes = figures["sizes"]
    found = {
        (o["target"], o["width"]): o["errors"]
        for o in figures["maps"]
        if o["modes"] == sizes["modes"][-1] and not o["real"]
    }
    return {target: [float(np.mean(found[target, width])) for width in sizes["widths"]] for target in TARGETS}


BLUE, RED, GREY = "#2166ac", "#b2182b", "#777777"
TARGET_COLOURS = dict(zip(TARGETS, ("#1b7837", "#762a83", "#e08214"), strict=True))
FLOOR = 1e-6  # of the axes of errors


def draw(figures: Figures, figure) -> None:
    figure.set_size_inches(10.5, 6.6)
    (errors, conditions, needed), (width, modes, linear) = figure.subplots(2, 3)
    draw_reconstruction(figures, errors, conditions)
    draw_thresholds(figures, needed)
    draw_maps(figures, width, modes, linear)


def line(axes, x, records, **style) -> None:
    """Means of seeds, and a band from the least to the greatest."""
    each = np.maximum([one["errors"] for one in records], FLOOR)
    axes.plot(x, each.mean(axis=1), marker="o", markersize=3, **style)
    axes.fill_between(x, each.min(axis=1), each.max(axis=1), color=style["color"], alpha=0.15, linewidth=0)


def draw_reconstruction(figures: Figures, errors, conditions) -> None:
    styles = {REAL: (RED, ":"), REAL_DOUBLE: (RED, "-"), HALF: (BLUE, ":"), COMPLEX: (BLUE, "-")}
    lengths = figures["sizes"]["lengths"]
    for (nodes, low, high), group in grouped(figures["reconstruction"], "nodes", "moduli"):
        on_ring = (low, high) == RING
        colour, dashes = styles[nodes]
        style = {"color": colour, "linestyle": dashes, "alpha": 1 if on_ring else 0.45}
        line(errors, lengths, group, label=nodes if on_ring else None, **style)
        each = np.array([one["conditions"] for one in group])
        conditions.plot(lengths, np.exp(np.log(each).mean(axis=1)), marker="o", markersize=3, **style)
    x = np.array(lengths[:2])
    conditions.plot(x, (1 + math.sqrt(2)) ** x, color="black", linestyle="--", label="(1 + √2)^L, real nodes")
    errors.set(title="white noise from the last state\n(pale: disk, full: ring)", xlabel="L", ylabel="relative error")
    conditions.set(
        title="condition of the map to the state\n(beyond 1e16: no more than that)", xlabel="L", ylim=(1, 1e20)
    )
    for axes in (errors, conditions):
        axes.set(xscale="log", yscale="log")
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.minorticks_off()
        axes.legend(frameon=False, fontsize=7)


def draw_thresholds(figures: Figures, axes) -> None:
    length = figures["sizes"]["length"]
    for (dimensions, real), group in grouped(figures["thresholds"], "dimensions", "real"):
        numbers = [one["numbers"] for one in group]
        name = "white noise" if dimensions == length else f"P = {dimensions}"
        style = {"color": RED if real else BLUE, "linestyle": "-" if dimensions == length else "--"}
        line(axes, numbers, group, label=f"{name}, {'real' if real else 'complex'}", **style)
        x = np.arange(1, dimensions)
        axes.plot(x, [unreachable(n, dimensions) for n in x], color="black", linewidth=0.8, zorder=5)
        axes.axvline(dimensions, color=GREY, linestyle=":")
    axes.set(title="how many numbers a state needs\n(black: √(1 - numbers / P))", xlabel="2N complex, N real")
    axes.set(xscale="log", yscale="log", ylabel="relative error")
    axes.legend(frameon=False, fontsize=7)


def draw_maps(figures: Figures, by_d, by_n, linear) -> None:
    widths, sizes = figures["sizes"]["widths"], figures["sizes"]["modes"]
    groups = {
        key: {one["width"]: one for one in group} for key, group in grouped(figures["maps"], "target", "real", "modes")
    }
    for place, (target, colour) in enumerate(TARGET_COLOURS.items()):
        most = groups[target, False, sizes[-1]]
        power = slope(widths, by_width(figures)[target])
        line(by_d, widths, [most[width] for width in widths], color=colour, label=f"{target}, D^{power:.2f}")
        line(by_n, sizes, [groups[target, False, n][widths[-1]] for n in sizes], color=colour, label=f"{target}, MLP")
        line(by_n, sizes, [groups[target, False, n][LINEAR] for n in sizes], color=colour, linestyle=":")
        real = groups[target, True, 2 * sizes[-1]]
        pairs = ((most[LINEAR], "none", BLUE), (most[widths[-1]], BLUE, BLUE), (real[widths[-1]], RED, RED))
        for shift, (one, fill, edge) in zip((0.2, 0, -0.2), pairs, strict=True):
            at = [place + shift] * len(one["errors"])
            linear.plot([1 - e**2 for e in one["errors"]], at, "o", color=edge, markerfacecolor=fill, markersize=5)
    guide = np.array(widths, float)
    by_d.plot(guide, (guide / guide[0]) ** -0.5, color="black", linestyle="--", label="D^-0.50, of the bound")
    by_n.axvline(figures["sizes"]["dimensions"] / 2, color=GREY, linestyle=":")
    by_d.set(title=f"one MLP for all steps, N = {sizes[-1]}", xlabel="D", ylabel="relative error")
    by_n.set(title=f"modes (full: D = {widths[-1]}, dotted: linear)", xlabel="N", ylabel="relative error")
    for axes, places in ((by_d, widths), (by_n, sizes)):
        axes.set(xscale="log", yscale="log")
        axes.set_xticks(places, [str(place) for place in places])
        axes.xaxis.minorticks_off()
        axes.legend(frameon=False, fontsize=7)
    linear.set_yticks(range(len(TARGETS)), TARGETS)
    linear.set(title="open: linear, full: MLP\n(blue: complex, red: real modes)", xlabel="R²", xlim=(-0.05, 1.03))


STUDY = Study(
    question="what does the state of a linear recurrence know of its inputs, and which maps does an MLP make of it?",
    configs=(),
    full=(),
    measure=lambda runs: measure(SMALL),
    measure_full=lambda runs: measure(FULL),
    table=table,
    draw=draw,
)
