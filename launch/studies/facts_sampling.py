"""Whom training speaks of, and when (arXiv 2503.21676, section 4): choices that shorten the plateau, and groups of people one after
the other, of which later ones are learned faster and all are forgotten."""

import math
from collections.abc import Sequence

import numpy as np

from launch.studies.study import Figures, mean_and_error

PEOPLE, STEPS, SEEDS = 2048, 1000, (10, 11, 12, 13, 14)
ARMS = ("uniform", "power:0.8", "warmup:512:128", "warmup:512:256", "celebrities:128:8", "celebrities:512:8")
GROUPS, TURN = 4, 250  # and the steps that each has
SEQUENTIAL = f"groups:{GROUPS}:{TURN}"
TWICE = 2  # times as fast as it was learned, what a group knew is forgotten


def of_arm(sampling: str, seed: int) -> str:
    return (
        f"facts-transformer-tiny --data.population {PEOPLE} --data.sampling {sampling} --data.seed {seed} --trainer.seed {seed} "
        f"--trainer.steps {STEPS} --eval.every 10"
    )


def gains(arms: list[dict], sampling: str) -> list[int]:
    """Steps by which the plateau ends later than with uniform sampling, seed by seed; negative: sooner."""
    at = {(arm["sampling"], arm["seed"]): arm["known_at"] for arm in arms}
    pairs = [(at.get((sampling, seed)), at.get(("uniform", seed))) for seed in SEEDS]
    return [one - other for one, other in pairs if one and other]


def right_of(arm: dict, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Steps and shares right (E) of a group's people, from 1 on."""
    return np.array(arm["curves"]["step"]), np.array(arm["curves"][f"group_{group}_attribute_accuracy"])


def learned(arm: dict, group: int) -> float:
    """Share right when a group's turn ends."""
    steps, right = right_of(arm, group)
    return float(right[steps == TURN * group][0])


def learned_in(arm: dict, group: int, level: float) -> float:
    """Steps of its own turn after which a group's share right is at `level`; endless where the turn ends first."""
    steps, right = right_of(arm, group)
    there = (steps > TURN * (group - 1)) & (steps <= TURN * group) & (right >= level)
    return float(steps[there][0] - TURN * (group - 1)) if there.any() else math.inf


def forgotten_in(arm: dict, group: int) -> tuple[float, float]:
    """Steps after its turn until a group has half of what it then had, endless where it always has more; and that half."""
    steps, right = right_of(arm, group)
    level = learned(arm, group) / 2
    there = (steps > TURN * group) & (right <= level)
    return float(steps[there][0] - TURN * group) if there.any() else math.inf, level


def forgotten_sooner(arm: dict) -> float:
    """TWICE the steps in which groups forget half of what they knew, less those in which they had learned it: the mean of the
    groups that find attention as the first has left it, and that another one follows. Negative: faster than that."""
    lost = [(group, *forgotten_in(arm, group)) for group in range(2, GROUPS)]
    return float(np.mean([TWICE * steps - learned_in(arm, group, level) for group, steps, level in lost]))


def judged(figures: Figures) -> list[tuple[str, bool]]:
    """What was to be shown, written down before anything was trained, and whether it was."""
    found = []
    for sampling in ARMS[1:]:
        if differences := gains(figures["arms"], sampling):
            found.append((f"{sampling} ends the plateau sooner, by 2 standard errors of 5 seeds", sure(differences)))
    if arms := [arm for arm in figures["arms"] if arm["sampling"] == SEQUENTIAL]:
        less = [learned(arm, 1) - learned(arm, 2) for arm in arms]
        found.append(
            ("more of the second group is learned in its turn than of the first, by 2 standard errors", sure(less))
        )
        forgotten = [forgotten_sooner(arm) for arm in arms]
        found.append(
            (f"groups forget over {TWICE} times as fast as they learned, by 2 standard errors", sure(forgotten))
        )
    return found


def sure(differences: Sequence[float]) -> bool:
    """Whether their mean is below 0 by 2 standard errors; one that is endless, or no number, is not."""
    if not np.isfinite(differences).all():
        return False
    mean, error = mean_and_error(differences)
    return bool(mean < -2 * error)


def table(figures: Figures) -> list[str]:
    lines = []
    for sampling in ARMS:
        if ends := [arm["known_at"] for arm in figures["arms"] if arm["sampling"] == sampling and arm["known_at"]]:
            mean, error = mean_and_error(ends)
            later, spread = mean_and_error(gains(figures["arms"], sampling))
            lines.append(
                f"{sampling:<18}known at {mean:.0f} ({error:.0f}), less uniform {later:+.0f} ({spread:.0f}), of {len(ends)} seeds"
            )
    arms = [arm for arm in figures["arms"] if arm["sampling"] == SEQUENTIAL]
    for group in range(1, GROUPS + 1) if arms else ():
        own, error = mean_and_error([learned(arm, group) for arm in arms])
        last = np.mean([right_of(arm, group)[1][-1] for arm in arms])
        words = f"group {group}: {100 * own:.1f} % ({100 * error:.1f}) right at the end of its turn, {100 * last:.1f} % at last"
        if group < GROUPS:
            lost = [forgotten_in(arm, group) for arm in arms]
            had = [learned_in(arm, group, level) for arm, (_, level) in zip(arms, lost, strict=True)]
            words += f"; half of that learned in {listed(had)} steps, lost in {listed([steps for steps, _ in lost])}"
        lines.append(words)
    return lines


def listed(values: list[float]) -> str:
    return " ".join("never" if math.isinf(value) else f"{value:.0f}" for value in values)


def draw_arms(figures: Figures, axes) -> None:
    for place, sampling in enumerate(ARMS):
        ends = [arm["known_at"] for arm in figures["arms"] if arm["sampling"] == sampling and arm["known_at"]]
        axes.plot([place] * len(ends), ends, color="black", marker="o", linestyle="", alpha=0.5)
    axes.set_xticks(range(len(ARMS)), [arm.replace(":", "\n", 1) for arm in ARMS], fontsize=6)
    axes.set(title=f"{PEOPLE:,} people: end of the plateau", ylabel="step", xlim=(-0.5, len(ARMS) - 0.5))


def draw_groups(figures: Figures, axes) -> None:
    arms = [arm for arm in figures["arms"] if arm["sampling"] == SEQUENTIAL]
    for group in range(1, GROUPS + 1) if arms else ():
        right = [right_of(arm, group)[1] for arm in arms]
        axes.plot(
            arms[0]["curves"]["step"], np.mean(right, axis=0), alpha=0.25 + 0.75 * group / GROUPS, color="#b2182b"
        )
        axes.axvline(TURN * group, color="grey", linestyle=":")
    axes.set(title=f"{GROUPS} groups in turn: share right", xlabel="step", ylim=(-0.03, 1.03))
