"""Scaling laws recover the laws that made their points, their intervals hold the truth as often as they say, and the published
points of Chinchilla give the published coefficients."""

import pathlib

import numpy as np
import pytest
from scipy import optimize
from scipy.stats import linregress

from launch import scaling_laws as laws

GOLDEN = pathlib.Path(__file__).parent / "golden" / "chinchilla.npz"
E, A, B, ALPHA, BETA = HOFFMANN = (1.69, 406.4, 410.7, 0.34, 0.28)  # arXiv 2203.15556, equation 10
EXPONENT = BETA / (ALPHA + BETA)  # of N* in C


def law(sizes, examples):
    return E + A / sizes**ALPHA + B / examples**BETA


def best_size(flops):
    return (ALPHA * A / BETA / B) ** (1 / (ALPHA + BETA)) * (flops / 6) ** EXPONENT


def equal_flops(budgets: int, sizes: int, span: float = 1.5, ends=(1e18, 1e21)) -> tuple[np.ndarray, np.ndarray]:
    """N and C of a grid of sizes about the best one of each budget, exp(span) times as small and as large."""
    flops = np.repeat(np.geomspace(*ends, budgets), sizes)
    return best_size(flops) * np.exp(np.tile(np.linspace(-span, span, sizes), budgets)), flops


def test_points_on_a_power_law_give_it_back():
    flops = 10.0 ** np.arange(9, 15)
    found = laws.power_law(flops, 40 * flops**-0.06)
    assert (found.a, found.b) == (pytest.approx(40, rel=1e-12), pytest.approx(-0.06, rel=1e-12))
    assert found.b_interval == pytest.approx((-0.06, -0.06))
    assert found.prediction(1e16) == pytest.approx((40 * 1e16**-0.06,) * 2)


def test_the_power_law_and_its_intervals_are_the_textbooks():
    """Slope and error from scipy; the prediction's variance from the matrix form, s^2 (1 + x' (X'X)^-1 x)."""
    rng, flops = np.random.default_rng(0), np.geomspace(1e18, 1e21, 7)
    loss = 40 * flops**-0.06 * np.exp(0.01 * rng.normal(size=7))
    found, line = laws.power_law(flops, loss), linregress(np.log(flops), np.log(loss))
    t = 2.5705818366147395  # 5 degrees of freedom
    assert found.b_interval == pytest.approx((line.slope - t * line.stderr, line.slope + t * line.stderr))
    columns, at = np.stack([np.ones(7), np.log(flops)], -1), np.array([1, np.log(1e22)])
    variance = (found.residuals**2).sum() / 5 * (1 + at @ np.linalg.inv(columns.T @ columns) @ at)
    middle = line.intercept + line.slope * np.log(1e22)
    half = t * np.sqrt(variance)
    assert found.prediction(1e22) == pytest.approx((np.exp(middle - half), np.exp(middle + half)), rel=1e-6)


def test_the_frontier_has_what_nothing_cheaper_beats():
    flops, loss = np.array([(1, 3.0), (2, 3.5), (2, 2.5), (4, 2.4), (8, 2.45), (16, 2.0)]).T
    assert flops[laws.frontier(flops, loss)].tolist() == [1, 2, 4, 16]
    assert laws.frontier(flops[::-1], loss[::-1]).tolist() == [5, 3, 2, 0]


def test_runs_whose_flops_differ_by_rounding_are_one_budget():
    flops = np.array([1.0, 1.04, 0.999, 2.0, 2.2, 1.01])
    assert [sorted(group.tolist()) for group in laws.budgets(flops)] == [[0, 1, 2, 5], [3], [4]]


def test_a_parabola_is_numpys_and_its_minimum_has_the_variance_of_draws():
    rng = np.random.default_rng(1)
    sizes, flops = np.geomspace(1e7, 1e8, 6), np.full(6, 1e18)
    clean = 3 + 0.1 * (np.log(sizes) - 17.2) ** 2
    found = laws.parabola(sizes, flops, clean)
    assert found.log_size == pytest.approx(17.2, rel=1e-12)
    assert found(sizes) == pytest.approx(clean)
    noisy = clean * np.exp(0.003 * rng.normal(size=6))
    c2, c1, _ = np.polyfit(np.log(sizes), noisy, 2)
    assert laws.parabola(sizes, flops, noisy).log_size == pytest.approx(-c1 / 2 / c2)
    noise = 1e-4 * rng.normal(size=(4000, 6)) * clean.mean()
    minima = [laws.parabola(sizes, flops, clean + row).log_size for row in noise]
    assert np.std(minima) == pytest.approx(1e-4 * np.sqrt(found.variance), rel=0.05)


def test_parabolas_of_the_law_itself_have_its_exponent():
    """Grids that lie alike about each best size are bent alike: the minima are off by one factor, the exponent is exact."""
    sizes, flops = equal_flops(5, 7)
    found, drawn = laws.iso_flop(sizes, flops, law(sizes, flops / 6 / sizes) - E)
    assert found is not None
    assert len(drawn) == 5
    assert found.a == pytest.approx(EXPONENT, abs=1e-9)
    size, (low, high) = found.optimum(1e22)
    assert low < size < high
    assert size == pytest.approx(best_size(1e22), rel=0.1)


def test_parabolas_without_a_minimum_among_their_sizes_are_not_used():
    sizes, flops = equal_flops(4, 5)
    loss = law(sizes, flops / 6 / sizes)
    one_sided = np.where(flops == flops.min(), sizes > best_size(flops) * 0.99, True)
    found, drawn = laws.iso_flop(sizes[one_sided], flops[one_sided], loss[one_sided])
    assert found is not None
    assert (len(found.parabolas), len(drawn)) == (3, 3)  # three sizes are no parabola to trust
    moved = np.where(flops == flops.min(), sizes * 30, sizes)
    found, drawn = laws.iso_flop(moved, flops, law(moved, flops / 6 / moved))
    assert found is not None
    assert [parabola.inside for parabola in drawn] == [False, True, True, True]


def test_the_same_sizes_for_every_budget_bias_the_exponent_and_the_minima_show_it():
    """Without noise: about their own best size all minima have the same place, on one ladder of sizes they wander."""
    ladder = best_size(10**19.5) * np.exp(np.linspace(-3, 3, 9))
    flops = np.repeat(np.geomspace(1e18, 1e21, 5), 9)
    wandering, _ = laws.iso_flop(np.tile(ladder, 5), flops, law(np.tile(ladder, 5), flops / 6 / np.tile(ladder, 5)))
    sizes, flops = equal_flops(5, 7)
    centred, _ = laws.iso_flop(sizes, flops, law(sizes, flops / 6 / sizes))
    assert wandering is not None
    assert centred is not None
    assert EXPONENT - wandering.a > 0.01
    assert np.ptp([p.place for p in wandering.parabolas]) > 0.9
    assert np.ptp([p.place for p in centred.parabolas]) < 1e-6


def test_points_on_the_parametric_law_give_it_back():
    sizes, flops = equal_flops(5, 6)
    examples = flops / 6 / sizes
    found = laws.parametric(sizes, examples, law(sizes, examples), draws=20)
    for (name, (value, interval)), truth in zip(found.coefficients().items(), (*HOFFMANN, EXPONENT), strict=True):
        assert value == pytest.approx(truth, rel=1e-6), name
        assert interval == pytest.approx((truth, truth), rel=1e-4), name


def test_every_start_ends_in_the_same_place():
    rng = np.random.default_rng(2)
    sizes, flops = equal_flops(5, 6)
    x, z = np.log(sizes) - np.log(sizes).mean(), np.log(flops / sizes) - np.log(flops / sizes).mean()
    y = np.log(law(sizes, flops / 6 / sizes)) + 0.005 * rng.normal(size=30)
    ends = [laws.lbfgs(start, x, z, y) for start in laws.starts(x, z, y, 20)]
    scores = [score for score, _ in ends]
    assert max(scores) == pytest.approx(min(scores), rel=1e-6)
    # scipy's simplex, which knows no gradient, finds nothing better from there.
    best = min(ends, key=lambda end: end[0])
    objective = lambda theta: float(laws.huber(laws.log_law(theta, x, z)[0] - y))  # noqa: E731
    simplex = optimize.minimize(objective, best[1], method="Nelder-Mead", options=dict(maxiter=4000, fatol=1e-10))
    assert simplex.fun > best[0] * (1 - 1e-6)


def test_the_gradient_is_that_of_differences():
    rng = np.random.default_rng(3)
    theta, x, z = rng.normal(size=5), rng.normal(size=4), rng.normal(size=4)
    _, gradient = laws.log_law(theta, x, z)
    for i in range(5):
        step = 1e-6 * np.eye(5)[i]
        ends = [laws.log_law(theta + sign * step, x, z)[0] for sign in (1, -1)]
        np.testing.assert_allclose(gradient[:, i], (ends[0] - ends[1]) / 2e-6, atol=1e-8)


def test_many_fits_at_once_are_those_of_lbfgs():
    rng = np.random.default_rng(4)
    sizes, flops = equal_flops(5, 6)
    x, z = np.log(sizes) - np.log(sizes).mean(), np.log(flops / sizes) - np.log(flops / sizes).mean()
    y = np.log(law(sizes, flops / 6 / sizes))
    _, theta = laws.lbfgs(laws.starts(x, z, y, 1)[0], x, z, y)
    noisy = y + 0.005 * rng.normal(size=(8, 30))
    for found, one in zip(laws.refit(theta, x, z, noisy), noisy, strict=True):
        expected, best = laws.lbfgs(theta, x, z, one)
        assert laws.huber(laws.log_law(found, x, z)[0] - one) == pytest.approx(expected, rel=1e-4)
        np.testing.assert_allclose(found[3:], best[3:], atol=2e-3)


@pytest.mark.parametrize("k", [6.0, 7.3])
def test_the_closed_form_optimum_is_the_numeric_one(k):
    theta = np.array([np.log(A), np.log(B), np.log(E), ALPHA, BETA])
    size, examples = laws.optimum(theta, 1e21, k)
    numeric = optimize.minimize_scalar(
        lambda n: law(np.exp(n), 1e21 / k / np.exp(n)), bounds=(10, 30), method="bounded"
    )
    assert size == pytest.approx(numeric.x, abs=1e-4)
    assert np.exp(size + examples) * k == pytest.approx(1e21)


# --- intervals --------------------------------------------------------------------------------------------------------


def holds(interval, truth) -> bool:
    return bool(interval[0] <= truth <= interval[1])


def draw_frontier(seed: int, noise=0.01) -> list[bool]:
    """The exponent, and the best loss of a budget ten times the largest."""
    rng, offsets = np.random.default_rng(seed), np.linspace(-1.5, 1.5, 5)
    flops = np.geomspace(1e18, 1e21, 6)

    def losses(flops):
        return 40 * flops**-0.06 * (1 + 0.03 * offsets**2) * np.exp(noise * rng.normal(size=np.shape(offsets)))

    loss = np.concatenate([losses(c) for c in flops])
    every = np.repeat(flops, 5)
    front = laws.frontier(every, loss)
    found = laws.power_law(every[front], loss[front])
    return [holds(found.b_interval, -0.06), holds(found.prediction(1e22), losses(1e22).min())]


def draw_parabolas(seed: int, budgets=5, sizes=6, noise=0.003) -> list[bool]:
    """The exponent."""
    rng = np.random.default_rng(seed)
    n, flops = equal_flops(budgets, sizes)
    found, _ = laws.iso_flop(n, flops, law(n, flops / 6 / n) * np.exp(noise * rng.normal(size=len(n))))
    assert found is not None
    return [holds(found.a_interval, EXPONENT)]


def draw_parametric(seed: int, budgets=5, sizes=6, noise=0.005) -> list[bool]:
    """alpha, beta, E, the exponent of N*, N* of a budget ten times the largest; and a run of that budget."""
    rng = np.random.default_rng(seed)
    n, flops = equal_flops(budgets, sizes)
    d = flops / 6 / n
    found = laws.parametric(n, d, law(n, d) * np.exp(noise * rng.normal(size=len(n))), draws=200, seed=seed)
    got = found.coefficients()
    exponents = [holds(got[name][1], value) for name, value in (("alpha", ALPHA), ("beta", BETA), ("E", E))]
    size = best_size(1e22)
    run = law(size, 1e22 / 6 / size) * np.exp(noise * rng.normal())
    return [
        *exponents,
        holds(got["beta / (alpha + beta)"][1], EXPONENT),
        holds(found.optimum(1e22, 6)["N"][1], size),
        holds(found.prediction(size, 1e22 / 6 / size), run),
    ]


@pytest.mark.parametrize("draw", [draw_frontier, draw_parabolas, draw_parametric])
def test_intervals_of_95_percent_hold_the_truth(draw):
    """In at least 93 of 100 draws of noise, each."""
    held = np.sum([draw(seed) for seed in range(100)], axis=0)
    assert (held >= 93).all(), held


@pytest.mark.slow
@pytest.mark.parametrize(
    ("draw", "options"),
    [
        *((draw_frontier, dict(noise=noise)) for noise in (0.002, 0.02)),
        *(
            (draw_parabolas, dict(budgets=b, sizes=s, noise=noise))
            for b, s in ((3, 5), (4, 4), (6, 7))
            for noise in (0.001, 0.003)
        ),
        *(
            (draw_parametric, dict(budgets=b, sizes=s, noise=noise))
            for b, s in ((4, 5), (6, 7))
            for noise in (0.0005, 0.003, 0.01)
        ),
    ],
)
def test_intervals_hold_the_truth_in_many_draws(draw, options):
    """In 400: two standard errors of a frequency are 2.2 %. The figures are in docs/scaling-laws.md."""
    held = np.mean([draw(seed, **options) for seed in range(1000, 1400)], axis=0)
    print(draw.__name__, options, np.round(100 * held, 1))
    assert (held > 0.92).all(), held


# --- published points -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chinchilla():
    """N, D and loss of the 240 runs that Besiroglu et al. fit: without the five largest losses, with D = C / 6 N."""
    with np.load(GOLDEN) as found:
        sizes, flops, loss = found["sizes"], found["flops"], found["loss"]
    kept = loss < np.sort(loss)[-5]
    return sizes[kept], (flops / 6 / sizes)[kept], loss[kept]


def test_chinchillas_points_give_the_coefficients_of_their_replication(chinchilla):
    """arXiv 2404.10102, table 1, within its standard errors; and no worse a fit than its coefficients are."""
    sizes, examples, loss = chinchilla
    assert len(loss) == 240
    found = laws.parametric(sizes, examples, loss, draws=200)
    published = {
        "E": (1.8172, 0.03),
        "A": (482.01, 124.58),
        "B": (2085.43, 1293.23),
        "alpha": (0.3478, 0.02),
        "beta": (0.3658, 0.02),
    }
    got = found.coefficients()
    for name, (value, error) in published.items():
        assert got[name][0] == pytest.approx(value, abs=error), name
        assert holds(got[name][1], value), name
    assert got["E"][0] == pytest.approx(1.8172, abs=5e-5)
    theirs = np.log(
        published["E"][0]
        + published["A"][0] / sizes ** published["alpha"][0]
        + published["B"][0] / examples ** published["beta"][0]
    )
    assert laws.huber(found.residuals) < laws.huber(theirs - np.log(loss))


def test_chinchillas_own_coefficients_fit_its_points_worse(chinchilla):
    """What the replication reports: the first optimiser stopped early (equation 10 with the digits of the paper's source)."""
    sizes, examples, loss = chinchilla
    theta = np.array([6.0073404, 6.0179186, 0.5267228, 0.33917084, 0.2849083])
    residuals = np.log(loss) - laws.log_law(theta, np.log(sizes), np.log(examples))[0]
    found = laws.parametric(sizes, examples, loss, draws=20)
    assert laws.huber(residuals) > 1.2 * laws.huber(found.residuals)
