"""Scaling laws fitted to losses: three methods of the literature, with intervals. Pure functions of arrays, no jax.

N is parameters, D what was trained on (tokens or images), C training FLOPs, loss in nats; all float64, one entry a run.
Hoffmann et al. 2022 is arXiv 2203.15556, Besiroglu et al. 2024 arXiv 2404.10102. docs/scaling-laws.md says which intervals
these are, why, and how often they held the truth.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special, stats

LEVEL = 0.95  # of every interval
DRAWS = 1000  # of a bootstrap
DELTA = 1e-3  # where Huber's loss of a log residual turns from square to straight (Hoffmann et al., section 3.3)
SAME_BUDGET = 1.05  # runs whose FLOPs differ by less count as one budget: steps are whole numbers
LEAST_FRONTIER, LEAST_SIZES, LEAST_BUDGETS, LEAST_POINTS = 3, 4, 3, 8
STARTS = 6  # of the parametric fit: they end in the same place
TAIL = (1 - LEVEL) / 2
Interval = tuple[float, float]


def percentiles(draws: np.ndarray) -> Interval:
    """NaN where more than a tail of them are: what is not determined has no interval."""
    if np.isnan(draws).mean() > TAIL:
        return np.nan, np.nan
    low, high = np.nanquantile(draws, (TAIL, 1 - TAIL), method="median_unbiased")
    return float(low), float(high)


def widening(freedom: int) -> float:
    """Student's t over the normal: what intervals of a variance known from so few residuals are too short by."""
    return float(stats.t.ppf(1 - TAIL, freedom) / stats.norm.ppf(1 - TAIL))


def budgets(flops: np.ndarray) -> list[np.ndarray]:
    """Indices of the runs of each budget, from the smallest on."""
    groups: list[list[int]] = []
    for i in np.argsort(flops, kind="stable"):
        if groups and flops[i] <= SAME_BUDGET * flops[groups[-1][0]]:
            groups[-1].append(int(i))
        else:
            groups.append([int(i)])
    return [np.array(group) for group in groups]


# --- the frontier -----------------------------------------------------------------------------------------------------


def frontier(flops: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Indices of the best run of each budget, from the cheapest on.

    The best of LEAST_FRONTIER runs or more stands for its budget whatever cheaper ones reached: leaving it out because noise
    made it worse would bias the law. A budget of fewer counts only if nothing cheaper is as good.
    """
    found: list[int] = []
    lowest = np.inf
    for group in budgets(flops):
        best = int(group[np.argmin(loss[group])])
        if len(group) >= LEAST_FRONTIER or loss[best] < lowest:
            found.append(best)
        lowest = min(lowest, loss[best])
    return np.array(found)


@dataclass(frozen=True)
class PowerLaw:
    """y = a x^b by least squares of logarithms; intervals are Student's, of independent normal errors of log y."""

    a: float
    b: float
    b_interval: Interval
    residuals: np.ndarray  # of log y
    log_x: np.ndarray

    def __call__(self, x: float | np.ndarray) -> np.ndarray:
        return self.a * np.asarray(x) ** self.b

    def prediction(self, x: float) -> Interval:
        """Where one more y at x would lie."""
        n, off = len(self.log_x), np.log(x) - self.log_x.mean()
        spread = 1 + 1 / n + off**2 / ((self.log_x - self.log_x.mean()) ** 2).sum()
        half = stats.t.ppf(1 - TAIL, n - 2) * np.sqrt((self.residuals**2).sum() / (n - 2) * spread)
        return float(self(x) * np.exp(-half)), float(self(x) * np.exp(half))


def power_law(x: np.ndarray, y: np.ndarray) -> PowerLaw:
    """Through at least LEAST_FRONTIER points. No irreducible term: few points of a frontier do not tell one from a smaller
    exponent; the parametric law has one."""
    line = stats.linregress(np.log(x), np.log(y))
    half = stats.t.ppf(1 - TAIL, len(x) - 2) * line.stderr
    residuals = np.log(y) - line.intercept - line.slope * np.log(x)
    return PowerLaw(
        float(np.exp(line.intercept)), line.slope, (line.slope - half, line.slope + half), residuals, np.log(x)
    )


# --- parabolas of equal FLOPs -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parabola:
    """loss = c0 + c1 u + c2 u^2 of the runs of one budget, u = log N - centre."""

    flops: float  # geometric mean of the runs'
    centre: float
    coefficients: np.ndarray  # (3) c0, c1, c2
    sizes: np.ndarray  # N of its runs
    residuals: np.ndarray  # of the loss, over the budget's mean loss
    variance: float  # of log N*, for residuals of variance 1

    @property
    def log_size(self) -> float:
        """log N*, where the loss is least."""
        return self.centre - self.coefficients[1] / (2 * self.coefficients[2])

    @property
    def place(self) -> float:
        """Of the minimum among its sizes, whose smallest and largest are at -1 and 1."""
        low, high = np.log([self.sizes.min(), self.sizes.max()])
        return float((2 * self.log_size - low - high) / (high - low))

    @property
    def inside(self) -> bool:
        """Whether it has a minimum among the sizes that were tried."""
        return bool(self.coefficients[2] > 0 and abs(self.place) <= 1)

    def __call__(self, sizes: np.ndarray) -> np.ndarray:
        return np.polynomial.polynomial.polyval(np.log(sizes) - self.centre, self.coefficients)


def parabola(sizes: np.ndarray, flops: np.ndarray, loss: np.ndarray) -> Parabola:
    """By least squares; its minimum's variance by the delta method."""
    u = np.log(sizes) - np.log(sizes).mean()
    columns = np.stack([np.ones_like(u), u, u**2], -1)
    inverse = np.linalg.pinv(columns)
    c = inverse @ loss
    slope = np.array([0, -1 / (2 * c[2]), c[1] / (2 * c[2] ** 2)]) * loss.mean()
    return Parabola(
        flops=float(np.exp(np.log(flops).mean())),
        centre=float(np.log(sizes).mean()),
        coefficients=c,
        sizes=sizes,
        residuals=(loss - columns @ c) / loss.mean(),
        variance=float(slope @ inverse @ inverse.T @ slope),
    )


@dataclass(frozen=True)
class IsoFlop:
    """N* = n0 C^a through the minima of parabolas, by least squares of logarithms (Hoffmann et al., approach 2).

    Intervals are Student's: of the error of each minimum that follows from all parabolas' residuals.
    """

    parabolas: list[Parabola]  # those with a minimum among their sizes
    a: float
    a_interval: Interval
    freedom: int
    scatter: float  # of minima about the line, over what the residuals explain; about 1 if they explain it

    def optimum(self, flops: float) -> tuple[float, Interval]:
        """N* of a budget."""
        log_size, half = self._line(flops)
        return float(np.exp(log_size)), (float(np.exp(log_size - half)), float(np.exp(log_size + half)))

    def _line(self, flops: float) -> tuple[float, float]:
        weights = _line_weights(self.parabolas)
        at = 1 / len(weights) + weights * (np.log(flops) - np.mean([np.log(p.flops) for p in self.parabolas]))
        half = stats.t.ppf(1 - TAIL, self.freedom) * np.sqrt(at**2 @ _variances(self.parabolas, self.freedom))
        return float(at @ [p.log_size for p in self.parabolas]), float(half)


def _line_weights(parabolas: list[Parabola]) -> np.ndarray:
    """What the slope of a line through their minima takes of each."""
    x = np.log([p.flops for p in parabolas])
    return (x - x.mean()) / ((x - x.mean()) ** 2).sum()


def _variances(parabolas: list[Parabola], freedom: int) -> np.ndarray:
    """Of each log N*, with the residuals' variance common to all."""
    return sum((p.residuals**2).sum() for p in parabolas) / freedom * np.array([p.variance for p in parabolas])


def iso_flop(sizes: np.ndarray, flops: np.ndarray, loss: np.ndarray) -> tuple[IsoFlop | None, list[Parabola]]:
    """The fit, None with fewer than LEAST_BUDGETS usable budgets; and the parabola of every budget with LEAST_SIZES sizes."""
    groups = [g for g in budgets(flops) if len(np.unique(sizes[g])) >= LEAST_SIZES]
    drawn = [parabola(sizes[g], flops[g], loss[g]) for g in groups]
    usable = [p for p in drawn if p.inside]
    if len(usable) < LEAST_BUDGETS:
        return None, drawn
    weights, minima = _line_weights(usable), np.array([p.log_size for p in usable])
    freedom = sum(len(p.sizes) - 3 for p in usable)
    variances = _variances(usable, freedom)
    a = float(weights @ minima)
    half = float(stats.t.ppf(1 - TAIL, freedom) * np.sqrt(weights**2 @ variances))
    x = np.log([p.flops for p in usable])
    rest = minima - minima.mean() - a * (x - x.mean())
    scatter = float(np.sqrt((rest**2 / np.maximum(variances, 1e-300)).sum() / (len(usable) - 2)))
    return IsoFlop(usable, a, (a - half, a + half), freedom, scatter), drawn


# --- the parametric law -----------------------------------------------------------------------------------------------


def log_law(theta: np.ndarray, x: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log(A / N^alpha + B / D^beta + E) and its gradient, (... n) and (... n 5), at x = log N and z = log D, (n).

    theta (... 5) is log A, log B, log E, alpha, beta (Hoffmann et al., equation 10's a, b, e).
    """
    a, b, e, alpha, beta = (theta[..., i, None] for i in range(5))
    terms = np.stack(np.broadcast_arrays(a - alpha * x, b - beta * z, e), axis=-1)
    top = terms.max(-1, keepdims=True)
    parts = np.exp(terms - top)
    sums = parts.sum(-1, keepdims=True)
    parts /= sums
    value = np.log(sums[..., 0]) + top[..., 0]
    return value, np.concatenate([parts, np.stack([-x * parts[..., 0], -z * parts[..., 1]], -1)], -1)


def huber(residuals: np.ndarray) -> np.ndarray:
    """Sum over the last axis, in units of DELTA^2, so that an optimiser's tolerances mean something."""
    size = np.abs(residuals) / DELTA
    return np.where(size <= 1, size**2 / 2, size - 0.5).sum(-1)


def starts(x: np.ndarray, z: np.ndarray, log_loss: np.ndarray, keep: int) -> np.ndarray:
    """The best of a grid of exponents, (keep 5), each with its A, B and E >= 0 by least squares of relative errors."""
    found = []
    for alpha, beta in itertools.product(np.geomspace(0.05, 2.0, 10), repeat=2):
        columns = np.stack([np.exp(-alpha * x), np.exp(-beta * z), np.ones_like(x)], -1)
        values, rest = optimize.nnls(columns * np.exp(-log_loss)[:, None], np.ones_like(x))
        floor = 0.01 * np.exp(log_loss.min())  # a term that is almost zero has almost no gradient
        found.append((rest, [*np.log(np.maximum(values, floor)), alpha, beta]))
    found.sort(key=lambda pair: pair[0])
    return np.array([theta for _, theta in found[:keep]])


def lbfgs(start: np.ndarray, x: np.ndarray, z: np.ndarray, log_loss: np.ndarray) -> tuple[float, np.ndarray]:
    def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = log_law(theta, x, z)
        residuals = value - log_loss
        return float(huber(residuals)), np.clip(residuals / DELTA, -1, 1) @ gradient / DELTA

    options = dict(maxiter=5000, maxfun=20000, maxcor=30, ftol=1e-15, gtol=1e-7)
    ended = optimize.minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    return float(ended.fun), ended.x


def refit(theta: np.ndarray, x: np.ndarray, z: np.ndarray, log_losses: np.ndarray, steps: int = 40) -> np.ndarray:
    """The same fit for many sets of losses (S n) at once, each from theta: iteratively reweighted least squares with
    Levenberg's damping, (S 5)."""
    thetas = np.broadcast_to(theta, (len(log_losses), 5)).copy()
    damping = np.full(len(log_losses), 1e-3)
    value, gradient = log_law(thetas, x, z)
    residuals = value - log_losses
    score = huber(residuals)
    for _ in range(steps):
        weights = 1 / np.maximum(np.abs(residuals) / DELTA, 1)
        weighted = gradient * weights[..., None]
        squares = weighted.swapaxes(-1, -2) @ gradient
        scale = np.einsum("sii->si", squares) + 1e-12
        squares = squares + (damping[:, None] * scale)[..., None] * np.eye(5)
        step = np.linalg.solve(squares, np.einsum("snp,sn->sp", weighted, residuals)[..., None])[..., 0]
        trial = thetas - step
        new_value, new_gradient = log_law(trial, x, z)
        new_residuals = new_value - log_losses
        new_score = huber(new_residuals)
        better = new_score < score
        thetas[better], score[better] = trial[better], new_score[better]
        residuals[better], gradient[better] = new_residuals[better], new_gradient[better]
        damping = np.where(better, damping / 4, damping * 6).clip(1e-12, 1e8)
    return thetas


@dataclass(frozen=True)
class Parametric:
    """loss = E + A / N^alpha + B / D^beta (Hoffmann et al., approach 3), with a smoothed residual bootstrap."""

    theta: np.ndarray  # (5) log A, log B, log E, alpha, beta
    draws: np.ndarray  # (S 5) of its sampling distribution
    residuals: np.ndarray  # of log loss
    noise: np.ndarray  # (S) what a further run's log loss is off by

    def coefficients(self) -> dict[str, tuple[float, Interval]]:
        named: dict[str, Callable[[np.ndarray], np.ndarray]] = {
            "E": lambda t: np.exp(t[..., 2]),
            "A": lambda t: np.exp(t[..., 0]),
            "B": lambda t: np.exp(t[..., 1]),
            "alpha": lambda t: t[..., 3],
            "beta": lambda t: t[..., 4],
            "beta / (alpha + beta)": lambda t: t[..., 4] / (t[..., 3] + t[..., 4]),
        }
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):  # of points that determine little
            return {name: (float(value(self.theta)), percentiles(value(self.draws))) for name, value in named.items()}

    def loss(self, sizes: np.ndarray, examples: np.ndarray) -> np.ndarray:
        return np.exp(log_law(self.theta, np.log(sizes), np.log(examples))[0])

    def prediction(self, size: float, examples: float) -> Interval:
        """Where the loss of one more run would lie."""
        logs = log_law(self.draws, np.log([size]), np.log([examples]))[0][:, 0] + self.noise
        with np.errstate(over="ignore"):
            return percentiles(np.exp(logs))

    def optimum(self, flops: float, k: float) -> dict[str, tuple[float, Interval]]:
        """N*, D* and the loss there, for C = k N D."""

        def each(theta: np.ndarray) -> np.ndarray:
            size, examples = optimum(theta, flops, k)
            with np.errstate(over="ignore", invalid="ignore"):
                terms = theta[..., :3] - np.stack([theta[..., 3] * size, theta[..., 4] * examples, 0 * size], -1)
                return np.exp(np.stack([size, examples, special.logsumexp(terms, axis=-1)], -1))

        values, draws = each(self.theta), each(self.draws)
        names = ("N", "D", "loss")
        return {name: (float(values[i]), percentiles(draws[:, i])) for i, name in enumerate(names)}


def optimum(theta: np.ndarray, flops: float, k: float) -> tuple[np.ndarray, np.ndarray]:
    """log N and log D of the least loss with k N D = flops (Hoffmann et al., equation 4); NaN where there is none."""
    a, b, _, alpha, beta = np.moveaxis(theta, -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        size = (np.log(alpha) + a - np.log(beta) - b + beta * np.log(flops / k)) / (alpha + beta)
    return size, np.log(flops / k) - size


def enough(sizes: np.ndarray, examples: np.ndarray) -> bool:
    """Whether five coefficients can be told apart at all."""
    return len(sizes) >= LEAST_POINTS and min(len(np.unique(sizes)), len(np.unique(examples))) >= 3


def parametric(
    sizes: np.ndarray, examples: np.ndarray, loss: np.ndarray, draws: int = DRAWS, seed: int = 0
) -> Parametric:
    """The least sum of Huber's losses of log residuals, by L-BFGS from the best of a grid of starts; needs `enough`.

    Draws refit the law to its own values plus resampled residuals. A fit of nearly absolute errors goes through five points:
    residuals are scaled for the freedom that took, and smoothed, since so many are zero; draws are spread by Student's t.
    """
    centres = np.log(sizes).mean(), np.log(examples).mean()
    x, z, y = np.log(sizes) - centres[0], np.log(examples) - centres[1], np.log(loss)
    _, theta = min((lbfgs(start, x, z, y) for start in starts(x, z, y, STARTS)), key=lambda ended: ended[0])
    values = log_law(theta, x, z)[0]
    residuals, n = y - values, len(y)
    rng, freedom = np.random.default_rng(seed), n - 5

    def errors(*shape: int) -> np.ndarray:
        smooth = 1.06 * residuals.std() * n**-0.2  # Silverman's bandwidth
        return np.sqrt(n / freedom) * rng.choice(residuals, shape) + smooth * rng.normal(size=shape)

    found = refit(theta, x, z, values + errors(draws, n))
    found = theta + widening(freedom) * (found - theta)
    noise = widening(freedom) * errors(draws)

    def uncentred(thetas: np.ndarray) -> np.ndarray:
        moved = thetas.copy()
        moved[..., 0] += thetas[..., 3] * centres[0]
        moved[..., 1] += thetas[..., 4] * centres[1]
        return moved

    return Parametric(uncentred(theta), uncentred(found), residuals, noise)
