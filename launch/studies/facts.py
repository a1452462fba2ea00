"""How models learn facts (arXiv 2503.21676): three phases, the plateau against the population, what shortens it, what models say
of people they never saw, and what new people do to old ones."""

import itertools
import math
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np

from launch.studies import facts_sampling
from launch.studies.facts_sampling import ARMS, SEEDS, SEQUENTIAL, of_arm
from launch.studies.study import BESIDE, COLOURS, Figures, Study

SIZES, FULL_SIZES = (512, 1024, 2048, 4096), (4096, 16_384, 65_536, 262_144)
LEFT, LEARNED = 1.02, 0.95  # of the no-knowledge loss: below the one values are known, below the other people
OTHERS = (0.98, 0.9)  # in place of LEARNED
KNOWN, NEW = 1024, 128
REPLAYS, MORE = (0, 0.125, 1), (512, 2048)
TUNED = (*((weight, NEW) for weight in REPLAYS), *((0, people) for people in MORE))  # replay, and how many new people
ORDER = "{} cost old ones 20 points before they are known by 20"
EARLY = "facts-transformer-tiny --trainer.steps 50 --optimizer.schedule constant"  # for its attention, before it knows anybody


def of_size(mixer: str, people: int, size: str = "-tiny") -> str:
    return f"facts-{mixer}{size} --data.population {people}"


def of_replay(weight: float, people: int = NEW) -> str:
    return (
        f"facts-transformer-tiny --finetune.base {BESIDE}/facts-transformer-tiny-population-{KNOWN} --data.first {KNOWN} "
        f"--data.population {people} --data.replay {weight:g} --optimizer.schedule constant --optimizer.learning_rate 3e-4 "
        f"--trainer.steps 400 --eval.every 10"
    )


def measure(runs: dict[str, pathlib.Path]) -> Figures:
    """Whatever of the study's parts has been trained."""
    sizes = [
        {"family": mixer, "people": people, **phases(runs[words])}
        for mixer, people, size in itertools.product(COLOURS, sorted({*SIZES, *FULL_SIZES}), ("-tiny", ""))
        if (words := of_size(mixer, people, size)) in runs
    ]
    arms = [
        {"sampling": sampling, "seed": seed, **phases(runs[words])}
        for sampling, seed in itertools.product((*ARMS, SEQUENTIAL), SEEDS)
        if (words := of_arm(sampling, seed)) in runs
    ]
    replays = [
        {"replay": weight, "people": people, **tuning(runs[words], runs[of_size("transformer", KNOWN)])}
        for weight, people in TUNED
        if (words := of_replay(weight, people)) in runs
    ]
    found: Figures = {"sizes": sizes, "arms": arms, "replays": replays}
    if EARLY in runs:
        from launch.studies import facts_patching

        late = runs[of_size("transformer", KNOWN)]
        tuned = {f"replay {weight:g}": runs[words] for weight in REPLAYS if (words := of_replay(weight)) in runs}
        found |= facts_patching.measure(late, {"late": late, "early": runs[EARLY]}, {"before": late} | tuned)
    laws = {mixer: law for mixer in COLOURS if (law := plateau_law([s for s in sizes if s["family"] == mixer]))}
    return found | {"laws": laws}


def curves_of(run: pathlib.Path, names: Iterable[str]) -> dict[str, list[float]]:
    """Evaluations of a run: "step" and the metrics of these names."""
    from trainer.run_folder import read_metrics

    records = sorted(read_metrics(run, "eval").items())
    return {"step": [step for step, _ in records], **{name: [r[name] for _, r in records] for name in names}}


def phases(run: pathlib.Path) -> dict:
    """Where a run's phases end, its curves, and what it says of seen and unseen people at the end."""
    from configs.schema import BiographyData
    from data.biographies import no_knowledge, ranges_of
    from trainer.evaluate import read_config

    data = read_config(run).data
    assert isinstance(data, BiographyData)
    baseline = no_knowledge(data)
    names = ("attribute_loss", "attribute_accuracy", "max_probability", "entropy")
    groups = [f"{group}_attribute_accuracy" for group in ranges_of(data) if group.startswith("group_")]
    curves = curves_of(run, (*names, *(f"unseen_{name}" for name in names), *groups))
    steps, losses = np.array(curves["step"]), np.array(curves["attribute_loss"])
    return {
        "baseline": baseline,
        "chance": float(np.mean([1 / math.prod(sizes) for sizes in data.values])),
        "curves": curves,
        "generic_at": first_below(steps, losses, LEFT * baseline),
        "known_at": stays_below(steps, losses, LEARNED * baseline),
        "known_at_other": [stays_below(steps, losses, share * baseline) for share in OTHERS],
    }


def first_below(steps: np.ndarray, losses: np.ndarray, limit: float) -> int | None:
    below = np.flatnonzero(losses <= limit)
    return int(steps[below[0]]) if len(below) else None


def stays_below(steps: np.ndarray, losses: np.ndarray, limit: float) -> int | None:
    """The first evaluation (steps, losses: [E]) from which on no loss is above the limit."""
    above = np.flatnonzero(losses > limit)
    first = above[-1] + 1 if len(above) else 0
    return int(steps[first]) if first < len(steps) else None


def plateau_law(sizes: list[dict]) -> dict | None:
    """log(step at which the plateau ends) = log(scale) + exponent log(people), by least squares: with the 95 % interval of the
    exponent (Student's t) and R^2. None of fewer than three runs that left the plateau."""
    ended = [(s["people"], s["known_at"]) for s in sizes if s["known_at"]]
    if len(ended) < 3:
        return None
    from scipy import stats

    people, steps = np.log(np.array(ended, np.float64)).T
    fit = stats.linregress(people, steps)
    half = stats.t.ppf(0.975, len(ended) - 2) * fit.stderr
    return {
        "exponent": float(fit.slope),
        "interval": [float(fit.slope - half), float(fit.slope + half)],
        "scale": float(np.exp(fit.intercept)),
        "r_squared": float(fit.rvalue**2),
    }


def tuning(run: pathlib.Path, base: pathlib.Path) -> dict:
    """Accuracy and loss of people from before and of new ones; step 0 is the base, which has not seen the new ones."""
    names = ("attribute_accuracy", "attribute_loss")
    before, after = curves_of(base, names), curves_of(run, (*names, *(f"earlier_{name}" for name in names)))
    unseen = curves_of(base, [f"unseen_{name}" for name in names])
    found = {"step": [0, *after["step"]]}
    for name in names:
        found[f"old_{name}"] = [before[name][-1], *after[f"earlier_{name}"]]
        found[f"new_{name}"] = [unseen[f"unseen_{name}"][-1], *after[name]]
    return found


def judged(figures: Figures) -> list[tuple[str, bool]]:
    """What was to be shown, written down before anything was trained, and whether it was."""
    found = []
    for mixer in COLOURS:
        sizes = [s for s in figures["sizes"] if s["family"] == mixer and s["people"] >= KNOWN]
        if sizes:
            long = [plateau_steps(s) >= 100 and s["curves"]["attribute_accuracy"][-1] > 0.9 for s in sizes]
            found.append((f"{mixer}: a plateau of 100 steps at chance, then over 90 % right, at some size", any(long)))
            found.append(
                (f"{mixer}: knows nothing of the unseen, and is ever surer of it", all(map(hallucinates, sizes)))
            )
    for mixer, law in figures["laws"].items():
        agrees = 0.5 <= law["exponent"] <= 1.1 and law["r_squared"] > 0.95
        found.append((f"{mixer}: the plateau ends at people^0.5 to 1.1, R^2 over 0.95", agrees))
    found += facts_sampling.judged(figures)
    if patched := figures.get("patched"):
        own = next(s for s in figures["sizes"] if s["family"] == "transformer" and s["people"] == KNOWN)
        plateau = plateau_of(own["curves"]["step"], own["curves"]["attribute_loss"], own["baseline"])
        left = {name: patched_plateau(curve, own["baseline"]) for name, curve in patched.items()}
        found.append(("late attention takes half of the plateau or more away", left["late"] <= plateau / 2))
        found.append(("early attention takes less than a tenth of it away", left["early"] >= 0.9 * plateau))
        before = figures["attention"]["before"]
        moved = [
            abs(now / was - 1)
            for name in figures["attention"]
            for now, was in zip(figures["attention"][name], before, strict=True)
        ]
        found.append(("new people move the attention to names by less than 10 %", max(moved) < 0.1))
    if replays := {r["replay"]: r for r in figures["replays"] if r["people"] == NEW}:
        found.append((ORDER.format("new people"), forgets_first(replays[0])))
        last = {weight: r["old_attribute_loss"][-1] for weight, r in replays.items()}
        found.append(("replay lowers the loss of old people", all(last[w] < last[0] for w in last if w)))
    # Written down after the run with NEW people, when the study of an associative memory had predicted it.
    more = [run for run in figures["replays"] if run["people"] != NEW]
    found += [(ORDER.format(f"{run['people']:,} new people"), forgets_first(run)) for run in more]
    return found


def forgets_first(run: dict) -> bool:
    """Whether old people lose 20 points within 200 steps, before new ones gain as much."""
    until = [old for step, old in zip(run["step"], run["old_attribute_accuracy"], strict=True) if step <= 200]
    lost = next((i for i, old in enumerate(until) if old <= until[0] - 0.2), None)
    new = run["new_attribute_accuracy"]
    return lost is not None and new[lost] < new[0] + 0.2


def plateau_of(steps: Sequence[int], losses: Sequence[float], baseline: float) -> float:
    """Steps between generic statistics and people; endless if one of them is never known."""
    generic = first_below(np.array(steps), np.array(losses), LEFT * baseline)
    known = stays_below(np.array(steps), np.array(losses), LEARNED * baseline)
    return math.inf if generic is None or known is None else known - generic


def patched_plateau(curve: list[tuple[int, float]], baseline: float) -> float:
    """The same of pairs of step and loss."""
    return plateau_of([step for step, _ in curve], [loss for _, loss in curve], baseline)


def plateau_steps(size: dict) -> int:
    """Steps of the longest stretch of evaluations within 3 % of the no-knowledge loss, less than twice chance right."""
    curves, longest, start = size["curves"], 0, None
    for step, loss, right in zip(curves["step"], curves["attribute_loss"], curves["attribute_accuracy"], strict=True):
        if abs(loss / size["baseline"] - 1) > 0.03 or right >= 2 * size["chance"]:
            start = None
            continue
        start = step if start is None else start
        longest = max(longest, step - start)
    return longest


def hallucinates(size: dict) -> bool:
    """Unseen people's loss is 5 % above the no-knowledge loss once 30 % of the seen are right, and half above at the end, while
    the model is less sure of them than of the seen."""
    curves, baseline = size["curves"], size["baseline"]
    know = next((i for i, right in enumerate(curves["attribute_accuracy"]) if right > 0.3), None)
    unseen, sure = (
        curves["unseen_attribute_loss"],
        (curves["unseen_max_probability"][-1], curves["max_probability"][-1]),
    )
    return know is not None and unseen[know] > 1.05 * baseline and unseen[-1] > 1.5 * baseline and sure[0] < sure[1]


def table(figures: Figures) -> list[str]:
    lines = [
        f"{'':<14}{'people':>8}{'generic at':>12}{'known at':>10}{'right, %':>10}{'unseen: loss':>14}{'sure of seen':>14}{'unseen':>8}"
    ]
    for size in figures["sizes"]:
        last = {name: values[-1] for name, values in size["curves"].items()}
        lines.append(
            f"{size['family']:<14}{size['people']:>8,}{size['generic_at'] or 'never':>12}{size['known_at'] or 'never':>10}"
            f"{100 * last['attribute_accuracy']:>10.1f}{last['unseen_attribute_loss']:>14.2f}"
            f"{last['max_probability']:>14.2f}{last['unseen_max_probability']:>8.2f}"
        )
    for mixer, law in figures["laws"].items():
        low, high = law["interval"]
        lines.append(
            f"{mixer}: known at {law['scale']:.2f} people^{law['exponent']:.2f} ({low:.2f} to {high:.2f}), R^2 {law['r_squared']:.3f}"
        )
    lines += facts_sampling.table(figures)
    for run in figures["replays"]:
        old, new = run["old_attribute_accuracy"], run["new_attribute_accuracy"]
        lines.append(
            f"{run['people']:,} new, replay {run['replay']:<6g}old people right {100 * old[0]:.1f} %, at worst {100 * min(old):.1f}, at last "
            f"{100 * old[-1]:.1f}; new ones {100 * new[0]:.1f}, at last {100 * new[-1]:.1f}"
        )
    for name, curve in figures.get("patched", {}).items():
        plateau = patched_plateau(curve, figures["sizes"][0]["baseline"])
        lines.append(
            f"with {name} attention a plateau of {plateau:g} steps, attribute loss {curve[-1][1]:.2f} at step {curve[-1][0]}"
        )
    for name, shares in figures.get("attention", {}).items():
        lines.append(f"attention to names, {name}: " + ", ".join(f"{share:.3f}" for share in shares))
    return [*lines, "", *(f"{'yes' if right else 'NO':<5}{what}" for what, right in judged(figures))]


def draw(figures: Figures, figure) -> None:
    more = bool(figures.get("patched") or figures["arms"])
    panels = [["phases", "law"], ["unseen", "tuning"], *([["patched", "groups"], ["arms", "counts"]] if more else [])]
    figure.set_size_inches(7.5, 3.0 * len(panels))
    axes_of = figure.subplot_mosaic(panels)
    phases_axes, law_axes, unseen_axes, tuning_axes = (axes_of[name] for name in ("phases", "law", "unseen", "tuning"))
    for size in (s for s in figures["sizes"] if s["family"] == "transformer"):
        shade = 0.25 + 0.2 * SIZES.index(size["people"]) if size["people"] in SIZES else 1.0
        phases_axes.plot(
            size["curves"]["step"],
            size["curves"]["attribute_loss"],
            color=COLOURS["transformer"],
            alpha=shade,
            label=f"{size['people']:,} people",
        )
    baseline, every = figures["sizes"][0]["baseline"], sorted({s["people"] for s in figures["sizes"]})
    shown = KNOWN if KNOWN in every else every[0]
    for axes in (phases_axes, unseen_axes):
        axes.axhline(baseline, color="grey", linestyle=":")
        axes.set(xlabel="step", ylabel="attribute loss, nats")
    phases_axes.set(title="Transformer: three phases", xscale="log")
    for mixer, colour in COLOURS.items():
        sizes = [s for s in figures["sizes"] if s["family"] == mixer and s["known_at"]]
        people = [s["people"] for s in sizes]
        law_axes.plot(
            people, [s["known_at"] for s in sizes], color=colour, marker="o", linestyle="", label=mixer.capitalize()
        )
        if law := figures["laws"].get(mixer):
            law_axes.plot(people, [law["scale"] * n ** law["exponent"] for n in people], color=colour, linewidth=1)
        for size in figures["sizes"]:
            if size["family"] == mixer and size["people"] == shown:
                curves = size["curves"]
                unseen_axes.plot(
                    curves["step"], curves["unseen_attribute_loss"], color=colour, label=mixer.capitalize()
                )
                unseen_axes.plot(curves["step"], curves["attribute_loss"], color=colour, linestyle="--")
    law_axes.set(title="end of the plateau", xscale="log", yscale="log", xlabel="people", ylabel="step")
    law_axes.set_xticks(every, [f"{n:,}" for n in every])
    low, high = law_axes.get_ylim()
    ticks = [n for n in (125 * 2**power for power in range(10)) if low <= n <= high]
    law_axes.set_yticks(ticks, [f"{n:,}" for n in ticks])
    law_axes.minorticks_off()
    unseen_axes.set(title=f"{shown:,} people: unseen ones (dashed: seen)")
    draw_tuned(tuning_axes, {f"replay {r['replay']:g}": r for r in figures["replays"] if r["people"] == NEW})
    tuning_axes.set(title=f"{NEW} new people (dashed) cost old ones")
    for axes in (phases_axes, law_axes, unseen_axes, tuning_axes):
        axes.legend(frameon=False)
    if more:
        draw_patched(figures, axes_of["patched"])
        facts_sampling.draw_groups(figures, axes_of["groups"])
        facts_sampling.draw_arms(figures, axes_of["arms"])
        draw_tuned(axes_of["counts"], {f"{r['people']:,} new": r for r in figures["replays"] if not r["replay"]})
        axes_of["counts"].set(title="how many new people (dashed)")


def draw_tuned(axes, runs: dict[str, dict]) -> None:
    for (label, run), colour in zip(runs.items(), COLOURS.values(), strict=False):
        axes.plot(run["step"], run["old_attribute_accuracy"], color=colour, label=label)
        axes.plot(run["step"], run["new_attribute_accuracy"], color=colour, linestyle="--")
    axes.set(xlabel="step", ylabel="share right", ylim=(-0.03, 1.03))
    axes.legend(frameon=False)


def draw_patched(figures: Figures, patch_axes) -> None:
    for (name, curve), colour in zip(figures.get("patched", {}).items(), COLOURS.values(), strict=False):
        patch_axes.plot(*zip(*curve, strict=True), color=colour, label=name)
    for size in figures["sizes"]:
        if (size["family"], size["people"]) == ("transformer", KNOWN):
            until = sum(step <= 300 for step in size["curves"]["step"])
            curve = (size["curves"][name][:until] for name in ("step", "attribute_loss"))
            patch_axes.plot(*curve, color="black", label="its own")
    patch_axes.axhline(figures["sizes"][0]["baseline"], color="grey", linestyle=":")
    patch_axes.set(title=f"{KNOWN:,} people: whose attention", xlabel="step", ylabel="attribute loss, nats")
    patch_axes.legend(frameon=False)


STUDY = Study(
    question="when do models learn facts about people, and what do they say of people they do not know?",
    configs=(
        *(of_size("transformer", people) for people in SIZES),
        *itertools.starmap(of_replay, TUNED),
        EARLY,
        *(of_size(mixer, people) for mixer in ("griffin", "hawk") for people in SIZES),
        *(of_arm(sampling, seed) for seed in SEEDS for sampling in (*ARMS, SEQUENTIAL)),
    ),
    full=tuple(of_size(mixer, people, "") for mixer in COLOURS for people in FULL_SIZES),
    measure=measure,
    table=table,
    draw=draw,
)
