"""The laws of one family of runs: what could be fitted, what could not and why, how well the largest budget was foreseen,
and the run to do next."""

import dataclasses
from dataclasses import dataclass, field

import numpy as np

from configs import EXPERIMENTS
from configs.schema import Config, ConfigError
from launch import scaling_laws as laws
from launch.points import Run, family_of, other_differences, parameters_of
from launch.scaling_laws import Interval

K_SPREAD = 1.25  # FLOPs over N D that differ more than this from their median are said
MOVED = 0.5  # minima that move over more than this of half the span of sizes are said
SCATTER = 2.0  # minima this many times further from their line than losses explain are said
STEEPEST = 3.0  # exponents above it are those of a fit that ran away
FAR = 1.5  # a size that is off by more than this factor is not the optimal one


@dataclass(frozen=True)
class Foreseen:
    """A loss of the largest budget, as the law fitted without that budget has it."""

    method: str
    run: Run
    predicted: float
    interval: Interval

    @property
    def inside(self) -> bool:
        assert self.run.loss is not None
        return self.interval[0] <= self.run.loss <= self.interval[1]

    @property
    def error(self) -> float:
        """Relative, of the prediction."""
        assert self.run.loss is not None
        return self.predicted / self.run.loss - 1


@dataclass(frozen=True)
class Optimum:
    """The best use of a budget."""

    method: str
    flops: float
    size: float | None  # N; None where the method says nothing of it
    size_interval: Interval | None
    examples: float | None  # D
    loss: float | None
    loss_interval: Interval | None


@dataclass
class Family:
    name: str
    runs: list[Run]  # the best of each size and length
    sizes: np.ndarray  # N
    examples: np.ndarray  # D
    flops: np.ndarray  # C
    loss: np.ndarray
    frontier: np.ndarray  # indices
    power: laws.PowerLaw | None = None
    iso: laws.IsoFlop | None = None
    parabolas: list[laws.Parabola] = field(default_factory=list)
    law: laws.Parametric | None = None
    foreseen: list[Foreseen] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def k(self) -> float:
        """C / (N D), the median of the runs."""
        return float(np.median(self.flops / self.sizes / self.examples))

    @property
    def fitted(self) -> bool:
        return bool(self.power or self.iso or self.law)

    def undetermined(self) -> list[str]:
        """Exponents of the parametric law, and E, that these points leave open, in words."""
        found = self.law.coefficients() if self.law else {}
        return [
            f"{name} = {value:.3g} is not determined by these points (95 %: {low:.3g} to {high:.3g})"
            for name, (value, (low, high)) in found.items()
            if name in ("E", "alpha", "beta")
            and (not low > 0.05 * value or not high < 20 * value or (name != "E" and value > STEEPEST))
        ]

    def optima(self, flops: float) -> list[Optimum]:
        found = []
        if self.law and not any(said.startswith(("alpha", "beta")) for said in self.undetermined()):
            at = self.law.optimum(flops, self.k)
            if np.isfinite([at["N"][0], *at["N"][1]]).all():  # otherwise these points do not say
                found.append(Optimum("parametric", flops, *at["N"], at["D"][0], *at["loss"]))
        if self.iso:
            size, interval = self.iso.optimum(flops)
            found.append(Optimum("isoFLOP", flops, size, interval, flops / self.k / size, None, None))
        if self.power:
            loss = float(self.power(flops))
            found.append(Optimum("frontier", flops, None, None, None, loss, self.power.prediction(flops)))
        return found


def fit_family(name: str, runs: list[Run]) -> Family:
    """All that these runs, the best of each size and length, suffice for."""
    sizes, examples, flops, loss = (
        np.array(column, float)
        for column in zip(*((run.parameters, run.examples, run.flops, run.loss) for run in runs), strict=True)
    )
    family = Family(name, runs, sizes, examples, flops, loss, laws.frontier(flops, loss))
    fit_all(family)
    if family.fitted:
        foresee(family)
    warn(family)
    return family


def fit_all(family: Family) -> None:
    front, n = family.frontier, len(family.runs)
    if len(front) >= laws.LEAST_FRONTIER:
        family.power = laws.power_law(family.flops[front], family.loss[front])
    else:
        family.skipped.append(
            f"the frontier's power law needs {laws.LEAST_FRONTIER} budgets of which each is the best so far, there are {len(front)}"
        )
    family.iso, family.parabolas = laws.iso_flop(family.sizes, family.flops, family.loss)
    if not family.iso:
        usable = sum(parabola.inside for parabola in family.parabolas)
        family.skipped.append(
            f"isoFLOP parabolas need {laws.LEAST_BUDGETS} budgets of at least {laws.LEAST_SIZES} sizes with the minimum among "
            f"them (FLOPs within {100 * (laws.SAME_BUDGET - 1):.0f} % count as one budget), there are {usable}"
        )
    if laws.enough(family.sizes, family.examples):
        family.law = laws.parametric(family.sizes, family.examples, family.loss)
    else:
        family.skipped.append(
            f"the parametric law needs {laws.LEAST_POINTS} points of at least 3 sizes and 3 lengths, there are {n} points of "
            f"{len(set(family.sizes))} sizes and {len(set(family.examples))} lengths"
        )


def foresee(family: Family) -> None:
    """Fit again without the largest budget and predict it, with each method that predicts losses and has enough points left."""
    largest = laws.budgets(family.flops)[-1]
    rest = np.setdiff1d(np.arange(len(family.runs)), largest)
    sizes, examples, flops, loss = (a[rest] for a in (family.sizes, family.examples, family.flops, family.loss))
    if family.law and laws.enough(sizes, examples):
        law = laws.parametric(sizes, examples, loss)
        for i in sorted(largest, key=lambda i: family.sizes[i]):
            at = float(law.loss(family.sizes[i], family.examples[i])[0])
            interval = law.prediction(family.sizes[i], family.examples[i])
            family.foreseen.append(Foreseen("parametric", family.runs[i], at, interval))
    front = laws.frontier(flops, loss) if len(rest) else np.array([])
    if family.power and len(front) >= laws.LEAST_FRONTIER:
        power, best = laws.power_law(flops[front], loss[front]), largest[np.argmin(family.loss[largest])]
        at, interval = float(power(family.flops[best])), power.prediction(family.flops[best])
        family.foreseen.append(Foreseen("frontier", family.runs[best], at, interval))
    for method, fitted in (("parametric", family.law), ("frontier", family.power)):
        if fitted and all(one.method != method for one in family.foreseen):
            family.skipped.append(
                f"the largest budget was not predicted by the {method} law: too few points are left without it"
            )


def warn(family: Family) -> None:
    said = family.warnings
    if others := other_differences(family.runs):
        said.append(
            f"the runs differ in {', '.join(others)}, too, and a law takes that for an effect of size or length"
        )
    ratio = family.flops / family.sizes / family.examples
    if max(ratio.max() / family.k, family.k / ratio.min()) > K_SPREAD:
        said.append(
            f"C / (N D) is {ratio.min():.3g} to {ratio.max():.3g} over these sizes, and optimal sizes take {family.k:.3g} for all"
        )
    skipped = len(laws.budgets(family.flops)) - len(family.frontier)
    if family.power and skipped:
        said.append(
            f"the frontier leaves out {skipped} budget{'s' * (skipped > 1)} that a cheaper one beats, and points that were chosen "
            f"for being low make b's interval too short"
        )
    for parabola in family.parabolas:
        if not parabola.inside:
            why = "opens downwards" if parabola.coefficients[2] <= 0 else "has its minimum outside the sizes tried"
            said.append(f"the parabola of {parabola.flops:.2e} FLOPs {why}: it is not used")
    # A curve of loss is no parabola: the minimum of one is off by what its place among the sizes makes it.
    places = [p.place for p in family.iso.parabolas] if family.iso else [0.0]
    if max(places) - min(places) > MOVED:
        said.append(
            "the parabolas' minima wander among the sizes tried, which biases isoFLOP's exponent by more than its interval may "
            "say: give each budget sizes about its own best one"
        )
    if family.iso and family.iso.scatter > SCATTER:
        said.append(
            f"the minima of the parabolas lie {family.iso.scatter:.1f} times further from their line than the losses' scatter "
            f"explains: the intervals of isoFLOP are too short"
        )
    said += family.undetermined()


def verdict(family: Family) -> list[str]:
    """Of each method, in words, how well the largest budget was foreseen."""
    said = []
    for method in dict.fromkeys(one.method for one in family.foreseen):
        these = [one for one in family.foreseen if one.method == method]
        inside, worst = sum(one.inside for one in these), max(these, key=lambda one: abs(one.error))
        best = min(these, key=lambda one: one.run.loss or 0.0)
        counted = (
            f"the one run at {best.run.flops:.2e} FLOPs"
            if len(these) == 1
            else f"the best of {len(these)} runs at {best.run.flops:.2e} FLOPs"
        )
        said.append(
            f"Fitted without the largest budget, the {method} law predicts {best.predicted:.4f} (95 %: {best.interval[0]:.4f} to "
            f"{best.interval[1]:.4f}) for {counted}; {best.run.loss:.4f} came out, {'inside' if best.inside else 'OUTSIDE'} the "
            f"interval, and the prediction is {100 * abs(best.error):.2f} % too {'high' if best.error > 0 else 'low'}."
            + (
                f" Of all {len(these)}, {inside} lie inside their intervals; the worst is off by {100 * abs(worst.error):.2f} %."
                if len(these) > 1
                else ""
            )
        )
    return said


@dataclass(frozen=True)
class Next:
    config: Config
    size: int  # N
    flops: float  # that it will take
    method: str  # that says so
    wanted: float  # N*
    based_on: str  # name of the run

    @property
    def notes(self) -> list[str]:
        off = self.size / self.wanted
        if 1 / FAR < off < FAR:
            return []
        return [
            f"no known size of this family is near the optimal {self.wanted:.3g} parameters: this one has {off:.2g} times as many; "
            f"set its model's width and depth"
        ]


def next_run(family: Family, flops: float) -> Next | None:
    """A run that spends the budget: the known size nearest to N*, the settings of the nearest run, as many steps as it takes.

    None where no method says what size is optimal, or where the budget is less than a step.
    """
    from trainer.tasks import make_task

    chosen = next((one for one in family.optima(flops) if one.size), None)
    if chosen is None or chosen.size is None:
        return None
    wanted = np.log(chosen.size)
    nearest = min(family.runs, key=lambda run: (abs(np.log(run.parameters) - wanted), run.loss))
    configs = {parameters_of(config): config for config in [*shipped(family.name, nearest.config), nearest.config]}
    size = min(configs, key=lambda n: abs(np.log(n) - wanted))
    config = configs[size]
    a_step = make_task(config).flops_per_step
    steps = round(flops / a_step)
    if steps < 1:
        return None
    warmup = min(config.optimizer.warmup_steps, steps // 10)
    config = dataclasses.replace(
        config,
        name=f"{family.name}-{flops:.1e}".replace("+", ""),
        trainer=dataclasses.replace(config.trainer, steps=steps),
        optimizer=dataclasses.replace(config.optimizer, warmup_steps=warmup),
    )
    return Next(config, size, steps * a_step, chosen.method, chosen.size, nearest.name)


def shipped(family: str, like: Config) -> list[Config]:
    """`like` in each size of its family that comes with podwright and takes the same tokens or classes."""
    found = []
    for make in EXPERIMENTS.values():
        other = make()
        outputs = "num_classes" if other.model.kind == "nfnet" else "vocab_size"
        same = family_of(other) == family and other.model.kind == like.model.kind
        if same and getattr(other.model, outputs) == getattr(like.model, outputs):
            try:
                found.append(dataclasses.replace(like, model=other.model))
            except ConfigError:  # it does not fit the data or the mesh
                continue
    return found
