"""What a private training spent: (epsilon, delta) of stretches of DP-SGD, of datasets that differ in one unit more or less.

The only place that knows dp-accounting. Every step draws its batch by Poisson sampling and adds Gaussian noise to a sum of
sensitivity 1 (Abadi et al. 2016, arXiv 1607.00133). Epsilon is by privacy loss distributions (Koskela et al. 2020, arXiv
1906.03049; Doroshenko et al. 2022, arXiv 2207.04380), rounded up wherever their grid rounds: a bound, never an estimate.
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

# Of privacy losses. A step's error goes with its square: at 71,589 steps to epsilon 7.5 it adds 0.0003, 1e-3 adds 0.025.
INTERVAL = 1e-4
LARGE = 50.0  # an epsilon from which on the interval grows along, or losses of thousands would fill the memory
ROUGH_ORDERS = (1.5, 2, 4, 8, 16, 32, 64, 128, 256)
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


def composed(accountant: Any, stretches: Sequence[Stretch]) -> Any:
    """The accountant, a dp-accounting one, with the stretches added to what it has."""
    events = dp_accounting()
    alike: Counter[tuple[float, float]] = Counter()
    for stretch in stretches:
        alike[stretch.rate, stretch.noise] += stretch.steps
    for (rate, noise), steps in alike.items():
        step = events.GaussianDpEvent(noise)
        accountant.compose(step if rate == 1 else events.PoissonSampledDpEvent(rate, step), steps)
    return accountant


def epsilon(stretches: Sequence[Stretch], delta: float) -> float:
    """What all of them spent together, infinite without noise."""
    stretches = [stretch for stretch in stretches if stretch.steps]
    if not stretches:
        return 0.0
    if any(stretch.noise == 0 for stretch in stretches):
        return math.inf
    rough = composed(dp_accounting().rdp.RdpAccountant(ROUGH_ORDERS), stretches).get_epsilon(delta)
    accountant = dp_accounting().pld.PLDAccountant(value_discretization_interval=INTERVAL * max(1.0, rough / LARGE))
    return float(composed(accountant, stretches).get_epsilon(delta))


def rdp_epsilon(stretches: Sequence[Stretch], delta: float) -> float:
    """A looser bound on the same, by Renyi DP (Mironov et al. 2019, arXiv 1908.10530), which most papers give."""
    with quiet():
        return float(composed(dp_accounting().rdp.RdpAccountant(), stretches).get_epsilon(delta))


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

    It is that of the next of POINTS numbers of steps, computed when first asked for. Epsilon grows about as the square root
    of the steps: at squares the points are about as far from one another in epsilon.
    """
    points = sorted({math.ceil(steps * (i / POINTS) ** 2) for i in range(POINTS + 1)})

    @functools.cache
    def spent(steps: int) -> float:
        return epsilon([*before, Stretch(steps, rate, noise)], delta)

    return lambda step: spent(points[bisect.bisect_left(points, step)])
