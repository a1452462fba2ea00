"""The study of update rules: that it trains by them, against numpy, and how it compares; test_solutions.py has the measures."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch.cli import main
from launch.studies import STUDIES, optimizer_runs, optimizers, small_mlps
from launch.studies.study import new_figure

SIZES = (4, 5, 3, 3)


pytestmark = pytest.mark.usefixtures("optax_promotes")


# --- training ----------------------------------------------------------------------------------------------------------------


def toy(seed: int = 0) -> small_mlps.Split:
    rng = np.random.default_rng(seed)
    return small_mlps.Split(rng.normal(size=(30, 4)).astype(np.float32), rng.integers(3, size=30).astype(np.int32))


def numpy_gradient(params, images, labels):
    """By hand, float64: softmax minus one-hot, back through two ReLUs."""
    w = {name: {leaf: np.asarray(value, np.float64) for leaf, value in one.items()} for name, one in params.items()}
    first = np.maximum(images @ w["hidden_0"]["kernel"] + w["hidden_0"]["bias"], 0)
    second = np.maximum(first @ w["hidden_1"]["kernel"] + w["hidden_1"]["bias"], 0)
    logits = second @ w["head"]["kernel"] + w["head"]["bias"]
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    nats = -np.log(p[np.arange(len(labels)), labels]).mean()
    d = (p - np.eye(3)[labels]) / len(labels)
    found = {}
    for name, below, above in (("head", second, "head"), ("hidden_1", first, "hidden_1"), ("hidden_0", images, "")):
        found[name] = {"kernel": below.T @ d, "bias": d.sum(axis=0)}
        if above:
            d = (d @ w[above]["kernel"].T) * (below > 0)
    return nats, found


def walked(params, data, batches, rate, order, rho=0.0, momentum=0.9):
    """Nesterov's SGD, optax's form of it, where `rho` climbs first."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    speed = jax.tree.map(np.zeros_like, params)
    for rows in batches:
        images, labels = data.images[rows][:, order], data.labels[rows]
        gradient = numpy_gradient(params, images, labels)[1]
        if rho:
            scale = rho / np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(gradient)))
            there = jax.tree.map(np.add, params, jax.tree.map(scale.__mul__, gradient))
            gradient = numpy_gradient(there, images, labels)[1]
        speed = jax.tree.map(lambda v, g: momentum * v + g, speed, gradient)
        params = jax.tree.map(lambda w, v, g: w - rate * (momentum * v + g), params, speed, gradient)
    return params


def same(got, expected, tolerance=1e-4):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, expected)


@pytest.mark.parametrize("arm", ["sgd", "sgd, sam"])
def test_tasks_are_learned_in_turn_by_the_rule_at_each_rate_from_each_seed(arm):
    """Two tasks of three batches, moments kept, against a loop in float64; accuracies counted and gradients found by hand."""
    data, rates = toy(), (0.05, 0.2)
    config = optimizers.ARMS[arm][0]
    starts = [small_mlps.initial(seed, SIZES) for seed in (3, 4)]
    rng = np.random.default_rng(9)
    rows = rng.integers(20, size=(2, 2, 3, 8)).astype(np.int32)
    orders = np.array([[[0, 1, 2, 3], [3, 1, 0, 2]]] * 2, np.int32)
    train, test = (
        small_mlps.Counted(own, np.stack([data.labels[own] == 0, data.labels[own] > 0]).astype(np.float32))
        for own in np.split(np.arange(30, dtype=np.int32), [20])
    )
    assert min(own.counts.sum(axis=1).min() for own in (train, test)) >= 2
    on_device = small_mlps.Split(*map(jnp.asarray, data))
    learned = small_mlps.side_by_side(functools.partial(small_mlps.learn_in_turn, config, on_device), of_seeds=5)
    stack = optimizer_runs.stacked
    accuracies, gradients, found = learned(
        jnp.asarray(rates), stack(starts), rows, orders, stack([train] * 2), stack([test] * 2)
    )
    for i, rate in enumerate(rates):
        for seed, start in enumerate(starts):
            # One walk through both tasks would start the second anew; so the orders are applied to each batch before.
            batches = [(batch, orders[seed, task]) for task in range(2) for batch in rows[seed, task]]
            end = walked_through(start, data, batches, rate, config.sam_rho)
            same(optimizer_runs.at_place(found, i, seed), end)
            for task in range(2):
                images, labels = data.images[:, orders[seed, task]], data.labels
                own = test.rows[test.counts[task] == 1]
                hits = logits_of(end, images[own]).argmax(axis=1) == labels[own]
                assert float(accuracies[i, seed, 1, task]) == pytest.approx(hits.mean())
                own = train.rows[train.counts[task] == 1]
                gradient = numpy_gradient(end, images[own], labels[own])[1]
                flat = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(gradient)])
                np.testing.assert_allclose(gradients[i, seed, 1, task], flat, atol=1e-4)


def walked_through(params, data, batches, rate, rho):
    """`walked` over batches that each have an order of pixels."""
    images = np.concatenate([data.images[rows][:, order] for rows, order in batches])
    labels = np.concatenate([data.labels[rows] for rows, _ in batches])
    places = np.arange(len(labels)).reshape(len(batches), -1)
    return walked(params, small_mlps.Split(images, labels), places, rate, np.arange(4), rho)


def logits_of(params, images):
    first = np.maximum(images @ params["hidden_0"]["kernel"] + params["hidden_0"]["bias"], 0)
    second = np.maximum(first @ params["hidden_1"]["kernel"] + params["hidden_1"]["bias"], 0)
    return second @ params["head"]["kernel"] + params["head"]["bias"]


def test_training_ends_at_the_first_look_below_the_target():
    """Losses of a float64 loop decide which look that is; state and parameters are those of it, so that updates go on."""
    data, rate = toy(), 0.1
    config, start = optimizers.rule("sgd"), small_mlps.initial(3, SIZES)
    rows = np.random.default_rng(2).integers(20, size=(6, 2, 8)).astype(np.int32)
    train, order = np.arange(20, dtype=np.int32), np.arange(4)
    ends = [walked(start, data, rows[: looks + 1].reshape(-1, 8), rate, order) for looks in range(6)]
    losses = [numpy_gradient(end, data.images[train], data.labels[train])[0] for end in ends]
    look = next(i for i in range(1, 5) if losses[i] < min(losses[:i]) and losses[i + 1] != losses[i])
    target = (losses[look] + min(losses[:look])) / 2
    on_device = small_mlps.Split(*map(jnp.asarray, data))
    steps, params, state = jax.jit(functools.partial(small_mlps.learn_until, config, on_device))(
        target, rate, start, train, rows
    )
    assert int(steps) == 2 * (look + 1)
    same(params, ends[look])
    moved = small_mlps.next_updates(config, on_device, rate, params, state, rows[look + 1])
    after = walked(start, data, rows[: look + 2].reshape(-1, 8), rate, order)
    total = np.concatenate([np.ravel(a - b) for a, b in zip(*map(jax.tree.leaves, (after, ends[look])), strict=True)])
    np.testing.assert_allclose(moved.sum(axis=0), total, atol=1e-5)
    never = functools.partial(small_mlps.learn_until, config, on_device)
    assert int(jax.jit(never)(0.0, rate, start, train, rows)[0]) == 0


def test_schedule_free_is_judged_by_its_average():
    """Which is the mean of z_1 .. z_t where the rate is constant: x_(t+1) = (1 - 1/t) x_t + z/t, arXiv 2405.15682."""
    data, config = toy(), optimizers.rule("schedule-free")
    start = small_mlps.initial(3, SIZES)
    rule = small_mlps.make_rule(config, jnp.float32(0.05))
    step = jax.jit(functools.partial(small_mlps.update, config, rule))
    params, state, newest = start, rule.init(start), []
    for rows in np.random.default_rng(0).integers(20, size=(5, 8)):
        params, state = step((params, state), small_mlps.Split(data.images[rows], data.labels[rows]))
        found = next(filter(is_schedule_free, jax.tree.leaves(state, is_leaf=is_schedule_free)))
        newest.append(found.z)
    average = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *newest)
    same(small_mlps.solution(config, params, state), average, 1e-5)
    assert abs(params["hidden_0"]["kernel"] - average["hidden_0"]["kernel"]).max() > 1e-3


def is_schedule_free(node) -> bool:
    return type(node).__name__ == "ScheduleFreeState"


def test_a_network_that_diverged_has_no_measures():
    params = small_mlps.initial(3, SIZES)
    params["hidden_1"]["kernel"][0, 0] = np.inf
    images, labels = toy()
    found = optimizer_runs.of_features(params, jnp.asarray(images), labels)
    assert all(np.isnan(value) for value in found.values())
    params["hidden_1"]["kernel"][0, 0] = 1
    finite = optimizer_runs.of_features(params, jnp.asarray(images), labels)
    assert finite.keys() == found.keys()
    assert np.isfinite(list(finite.values())).all()


# --- data --------------------------------------------------------------------------------------------------------------------


def test_every_seed_divides_the_digits_and_draws_its_tasks():
    labels = np.asarray(optimizer_runs.load().labels)
    train, test = optimizer_runs.divided(100)
    assert sorted([*train, *test]) == list(range(1797))
    assert (len(train), len(test)) == (1400, 397)
    assert set(test) != set(optimizer_runs.divided(101)[1])
    rows, orders, trained, tested = optimizer_runs.tasks("classes", labels, 100)
    assert [sorted(set(labels[batches.ravel()])) for batches in rows] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    for own, of, count in ((trained, train, 1400), (tested, test, 397)):
        assert np.array_equal(own.rows, of)
        assert own.counts.sum() == count
        assert set(labels[of][own.counts[3] == 1]) == {6, 7}
    assert np.array_equal(orders, np.tile(np.arange(64), (5, 1)))
    permuted, orders, trained, tested = optimizer_runs.tasks("permuted", labels, 100)
    assert all(sorted(order) == list(range(64)) for order in orders)
    assert len({tuple(order) for order in orders}) == 5
    assert trained.counts.all()
    assert tested.counts.all()
    assert (trained.counts.shape, tested.counts.shape) == ((5, 1400), (5, 397))
    assert np.array_equal(trained.rows, train)
    assert np.array_equal(tested.rows, test)
    assert rows.shape == permuted.shape == (5, 200, 64)
    assert not {*rows.ravel(), *permuted.ravel()} & set(test)
    images = np.asarray(optimizer_runs.load().images)
    np.testing.assert_allclose(images.mean(axis=0), 0, atol=1e-6)
    assert images.std() == pytest.approx(1, abs=1e-5)


# --- comparisons -------------------------------------------------------------------------------------------------------------


def test_values_are_found_between_two_rates_and_nowhere_else():
    new, values = np.array([0.9, 0.96, 0.98, 0.97]), np.array([0.8, 0.7, 0.5, 0.1])
    assert optimizers.where_new_is(0.97, new, values) == pytest.approx(0.6)
    assert optimizers.where_new_is(0.96, new, values) == pytest.approx(0.7)
    assert optimizers.where_new_is(0.99, new, values) is None
    assert optimizers.where_new_is(0.9, new, values) is None
    assert optimizers.where_new_is(0.85, new, values) is None


def test_the_jackknife_of_a_mean_is_the_standard_error():
    """Where interpolation is linear in the seeds' values: all reach the target at the second rate."""
    final = np.random.default_rng(0).normal(size=(3, 6))
    found = {"new": np.repeat([[0.9], [0.97], [0.98]], 6, axis=1).tolist(), "final": final.tolist()}
    mean, error = optimizers.jackknife(optimizers.matched(found, 0.97, "final"))
    assert mean == pytest.approx(final[1].mean())
    assert error == pytest.approx(final[1].std(ddof=1) / np.sqrt(6))
    assert optimizers.jackknife(optimizers.matched(found, 0.99, "final")) is None


def made_up(gain: np.ndarray, pruned: float, unpruned: float = 0.97) -> dict:
    """Figures in which new tasks are learned alike, and Shampoo's final accuracy is higher by `gain` (seeds)."""
    seeds, arms = len(gain), tuple(optimizers.ARMS)
    noise = np.random.default_rng(0).normal(size=seeds) / 10  # the same for all rules: it must not matter
    new = np.repeat([[0.95], [0.98], [0.995]], seeds, axis=1)
    base = {name: np.full((3, seeds), 0.4).tolist() for name in optimizers.IN_TURN}

    def of(arm: str) -> dict:
        final = 0.5 + noise + (gain if arm == "shampoo" else 0)
        return base | {"new": new.tolist(), "final": np.tile(final, (3, 1)).tolist()}

    measures = dict.fromkeys(optimizers.SHOWN, 1.5)
    curves = {"1": [0.98, 0.9, 0.9, 0.6, 0.4, 0.3], "2": [unpruned, 0.9, 0.9, pruned, 0.4, 0.3]}
    return {
        "seeds": list(range(seeds)),
        "in_turn": {arm: {protocol: of(arm) for protocol in optimizers.PROTOCOLS} for arm in arms},
        "same_loss": {
            arm: {"rate": 0.1, "measures": [measures] * seeds} if arm != "lion" else {"rate": None, "measures": None}
            for arm in arms
        },
        "pruning": {
            power: {"accuracy": [[value] * seeds for value in curve], "near_zero": [0.1] * seeds}
            for power, curve in curves.items()
        },
    }


def test_criteria_are_judged_by_paired_differences():
    gain = np.array([0.05, 0.07, 0.06, 0.04])
    figures = made_up(gain, pruned=0.71)
    difference, error = optimizers.difference(figures, "shampoo", "adamw", "classes", 0.97)
    assert difference == pytest.approx(0.055)
    assert error == pytest.approx(gain.std(ddof=1) / 2)
    assert [one["met"] for one in optimizers.criteria(figures)] == [True] * 6
    assert optimizers.criteria(figures)[0]["measured"] == "+5.5 (0.6) points"
    unsure = optimizers.criteria(made_up(np.array([0.3, -0.2, 0.1, 0.0]), pruned=0.69))
    assert [one["met"] for one in unsure] == [False] * 4 + [True, False]
    worse = optimizers.criteria(made_up(-gain, pruned=0.71, unpruned=0.95))
    assert [one["met"] for one in worse] == [False] * 5 + [True]
    for arm in optimizers.ARMS:
        figures["in_turn"][arm]["permuted"]["new"] = np.full((3, 4), 0.9).tolist()
    assert [one["measured"] for one in optimizers.criteria(figures)][:2] == ["not reached"] * 2
    assert [one["met"] for one in optimizers.criteria(figures)][:2] == [False] * 2


def test_the_table_and_the_plot_hold_every_rule():
    figures = made_up(np.array([0.05, 0.07, 0.06, 0.04]), pruned=0.71)
    figures["criteria"] = optimizers.criteria(figures)
    told = "\n".join(STUDIES["optimizers"].table(json.loads(json.dumps(figures))))
    assert all(told.count(f"\n{arm} ") == 3 for arm in optimizers.ARMS)
    assert "lion                 at no rate do all seeds get there" in told
    assert told.count("\nmet     ") == 6 - told.startswith("met")
    figure = new_figure()
    STUDIES["optimizers"].draw(figures, figure)
    assert len(figure.axes) == 6
    assert [len(axes.containers) for axes in figure.axes[:3]] == [len(optimizers.ARMS)] * 2 + [2]


def test_a_part_is_made_once_and_again_where_its_settings_change(tmp_path):
    made = []

    def make(*given):
        made.append(given)
        return {"new": [1.5]}

    for rate in (0.1, 0.1, 0.2):
        assert optimizers.kept(tmp_path, "sgd, sam, classes", make, (rate,), "classes") == {"new": [1.5]}
    assert made == [((0.1,), "classes"), ((0.2,), "classes")]
    assert [file.name for file in (tmp_path / "parts").iterdir()] == ["sgd-sam-classes.json"]


@pytest.mark.parametrize(("words", "given"), [(["--full"], "--full"), (["--to", "x", "--a.b", "1"], "--a.b 1")])
def test_what_the_study_has_no_use_for_is_refused(words, given, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["study", "optimizers", *words]) == 2
    assert (
        capsys.readouterr()
        .err.strip()
        .endswith(f"{given} is not for the study optimizers, which trains no runs of configs: --to DIR is allowed")
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_study_runs_small_and_again_from_what_it_kept(tmp_path, monkeypatch, capsys):
    for name, small in dict(STEPS=2, LOOKS=2, BETWEEN=3, UPDATES=3, PRODUCTS=3, PRUNED_STEPS=2).items():
        monkeypatch.setattr(optimizer_runs, name, small)
    for name, small in dict(SEEDS=(0, 1), NUM_RATES=2, TARGET=3.0).items():
        monkeypatch.setattr(optimizers, name, small)
    few = ("shampoo", "adamw", "schedule-free")
    monkeypatch.setattr(optimizers, "ARMS", {arm: optimizers.ARMS[arm] for arm in few})
    optimizer_runs.learning_in_turn.cache_clear()
    assert main(["study", "optimizers", "--to", str(tmp_path)]) == 0
    first = capsys.readouterr().out
    assert "training loss 3" in first
    assert (tmp_path / "plot.svg").stat().st_size > 1000
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert np.shape(figures["in_turn"]["shampoo"]["classes"]["final"]) == (2, 2)
    assert len(figures["same_loss"]["schedule-free"]["measures"]) == 2
    monkeypatch.setattr(optimizer_runs, "in_turn", None)
    assert main(["study", "optimizers", f"--to={tmp_path}"]) == 0
    assert capsys.readouterr().out == first
