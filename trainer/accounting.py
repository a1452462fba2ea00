"""What a private training spent: (epsilon, delta) of DP-SGD, for datasets that differ in one unit more or less.

The only place that knows dp-accounting. Every step draws its batch by Poisson sampling and adds Gaussian noise to a sum
of sensitivity 1 (Abadi et al. 2016, arXiv 1607.00133). Epsilon is by privacy loss distributions (Koskela et al. 2020,
arXiv 1906.03049; Doroshenko et al. 2022, arXiv 2207.04380), rounded up wherever their grid rounds: a bound, never an
estimate.
"""

import bisect
import contextlib
import functools
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from configs.schema import ConfigError

# Of the grid of privacy losses. A step's error goes with its square: 71,589 steps to epsilon 7.5 seem to spend 0.0003
# more than they do, with 1e-3 it would be 0.025. From an epsilon of LARGE on it doubles with epsilon, or losses of
# thousands would fill the memory; every grid holds the next one, so that epsilon grows with steps whatever the grid.
INTERVAL = 1e-4
LARGE = 5.0
HUGE = 1e5  # an epsilon that is given roughly: it protects nobody, but a run with next to no noise may want to show it
ROUGH_ORDERS = (2, 4, 8, 16, 32, 64, 128, 256)
MOST_NOISE = 1e5
LEAST_NOISE = 1e-2
POINTS = 32  # at which a curve of what was spent is computed


@dataclass(frozen=True)
class Stretch:
    """Steps alike."""

    steps: int
    rate: float  # of Poisson sampling, in (0, 1]; 1 takes everything
    noise: float  # its standard deviation on the sum over the sum's sensitivity


def dp_accounting() -> Any:
    try:
        import dp_accounting
        import dp_accounting.pld
        import dp_accounting.rdp
    except ImportError:
        raise ConfigError(
            "private training needs dp-accounting, which is not installed: pip install 'podwright[dp]'"
        ) from None
    return dp_accounting


def alike(stretches: Sequence[Stretch]) -> dict[tuple[float, float], int]:
    """(rate, noise) -> steps."""
    steps: Counter[tuple[float, float]] = Counter()
    for stretch in stretches:
        steps[stretch.rate, stretch.noise] += stretch.steps
    return +steps


def epsilon(stretches: Sequence[Stretch], delta: float) -> float:
    """What all of them spent together, infinite without noise."""
    steps = alike(stretches)
    if not steps:
        return 0.0
    if any(noise == 0 for _, noise in steps):
        return math.inf
    rough = by_orders(stretches, delta, ROUGH_ORDERS)
    if rough > HUGE:
        return rough
    interval = INTERVAL * 2 ** math.ceil(math.log2(max(1.0, rough / LARGE)))
    return min(rough, float(losses(stretches, interval).get_epsilon_for_delta(delta)))


def losses(stretches: Sequence[Stretch], interval: float) -> Any:
    """The distribution of their privacy loss together, a dp-accounting one."""
    one, *others = [
        # A full batch again and again is one with less noise.
        step_losses(1.0, noise / math.sqrt(steps), interval)
        if rate == 1
        else step_losses(rate, noise, interval).self_compose(steps)
        for (rate, noise), steps in alike(stretches).items()
    ]
    return functools.reduce(lambda total, other: total.compose(other), others, one)


@functools.lru_cache(maxsize=16)  # most of the time goes here, and the next question is mostly of other steps
def step_losses(rate: float, noise: float, interval: float) -> Any:
    return dp_accounting().pld.privacy_loss_distribution.from_gaussian_mechanism(
        noise,
        sampling_prob=rate,
        value_discretization_interval=interval,
        neighboring_relation=dp_accounting().NeighboringRelation.ADD_OR_REMOVE_ONE,
    )


def rdp_epsilon(stretches: Sequence[Stretch], delta: float) -> float:
    """A looser bound on the same, by Renyi DP (Mironov et al. 2019, arXiv 1908.10530), which most papers give."""
    return by_orders(stretches, delta, dp_accounting().rdp.rdp_privacy_accountant.DEFAULT_RDP_ORDERS)


def by_orders(stretches: Sequence[Stretch], delta: float, orders: Sequence[float]) -> float:
    events = dp_accounting()
    accountant = events.rdp.RdpAccountant(orders, events.NeighboringRelation.ADD_OR_REMOVE_ONE)
    with quiet():
        for (rate, noise), steps in alike(stretches).items():
            step = events.GaussianDpEvent(noise)
            accountant.compose(step if rate == 1 else events.PoissonSampledDpEvent(rate, step), steps)
        return float(accountant.get_epsilon(delta))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without a warning for each order that it leaves out because it did not converge."""
    logger = logging.getLogger("absl")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def four_digits(index: int) -> float:
    """The numbers of four significant digits in order, from LEAST_NOISE on."""
    decade, place = divmod(index, 9000)
    return float(f"{1000 + place}e{decade - 3 + round(math.log10(LEAST_NOISE))}")


@functools.cache
def calibrated_noise(epsilon_target: float, delta: float, rate: float, steps: int) -> float:
    """The least noise multiplier of four significant digits with which the steps spend no more than the target."""
    if not (epsilon_target > 0 and 0 < delta < 1 and 0 < rate <= 1 and steps >= 1):
        raise ValueError(
            f"noise needs an epsilon above 0, a delta within (0, 1), a rate within (0, 1] and steps, not epsilon "
            f"{epsilon_target:g}, delta {delta:g}, rate {rate:g} and {steps} steps"
        )
    numbers = range(9000 * round(math.log10(MOST_NOISE / LEAST_NOISE)))
    enough = bisect.bisect_left(
        numbers, True, key=lambda i: epsilon([Stretch(steps, rate, four_digits(i))], delta) <= epsilon_target
    )
    if enough == len(numbers):
        raise ValueError(
            f"no noise multiplier up to {MOST_NOISE:g} keeps {steps} steps at rate {rate:g} "
            f"within epsilon {epsilon_target:g} at delta {delta:g}"
        )
    return four_digits(enough)


def steps_within(
    epsilon_target: float, delta: float, before: Sequence[Stretch], rate: float, noise: float, at_most: int
) -> int:
    """How many steps more, at most so many, keep all together within the target."""
    return bisect.bisect_right(
        range(1, at_most + 1), epsilon_target, key=lambda n: epsilon([*before, Stretch(n, rate, noise)], delta)
    )


def spent_bound(
    before: Sequence[Stretch], rate: float, noise: float, steps: int, delta: float
) -> Callable[[int], float]:
    """What was spent after so many of the steps that follow those before: a bound, exact after the last.

    It is that of the next of POINTS numbers of steps, computed when first asked for. Epsilon grows about as the square
    root of the steps: at squares the points are about as far from one another in epsilon.
    """
    points = sorted({math.ceil(steps * (i / POINTS) ** 2) for i in range(POINTS + 1)})

    @functools.cache
    def spent(steps: int) -> float:
        return epsilon([*before, Stretch(steps, rate, noise)], delta)

    return lambda step: spent(points[bisect.bisect_left(points, step)])
