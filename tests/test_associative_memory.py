"""The study of a key-value memory: its pairs, its training and its replay against closed forms and a float64 AdamW; its verdicts
against curves made by hand."""

import json
import math
import xml.etree.ElementTree as xml
from dataclasses import asdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from configs.schema import ConfigError
from launch import study as command
from launch.studies import associative_memory as study
from launch.studies.associative_memory import COUNTS, LOADS, PAPER, RATES, REPLAYS, Arm
from launch.studies.key_value_memory import (
    LOOKS,
    NEW,
    OLD,
    drawn,
    keys_of,
    known,
    learned,
    pairs,
    share_of_old,
    started,
    tuned,
)


@pytest.fixture
def promotion():
    """optax counts steps in int32."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def test_keys_are_random_directions_and_values_uniform():
    keys, values = pairs(3)
    assert keys.shape == (OLD + NEW, 64)
    np.testing.assert_allclose(np.linalg.norm(keys, axis=1), 1, rtol=1e-6)
    assert np.linalg.norm(keys.mean(axis=0)) < 2 / math.sqrt(OLD)
    cosines = (keys[:2000] @ keys[2000:4000].T).ravel()
    assert np.square(cosines).mean() == pytest.approx(1 / 64, rel=0.01)  # of directions in 64 dimensions
    counts = np.bincount(values, minlength=30)
    assert len(counts) == 30
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < stats.chi2.ppf(0.9999, 29)
    assert (pairs(4).images != keys).all()


@pytest.mark.usefixtures("promotion")
def test_who_knows_no_pair_has_the_loss_of_a_guess_and_who_learned_some_recalls_those():
    data, params = started((0, 1))
    arm = asdict(Arm(old=256))
    before = jax.vmap(lambda p, d: known(p, d, arm))(params, data)
    for name in ("old", "new"):
        np.testing.assert_allclose(before[f"{name}_loss"], math.log(30), atol=0.05)
        np.testing.assert_allclose(before[f"{name}_right"], 1 / 30, atol=0.06)
    after = jax.vmap(lambda p, d: known(p, d, arm))(learned((0, 1), data, params, 256, 0.999, 500), data)
    assert float(after["old_right"].min()) == 1
    assert float(after["new_right"].max()) < 0.12  # nobody told it
    beyond = known(
        jax.tree.map(lambda leaf: leaf[0], learned((0,), *first(data, params), 256, 0.999, 500)),
        pairs(0),
        asdict(Arm(old=512)),
    )
    assert float(beyond["old_right"]) == pytest.approx(0.5 + 0.5 / 30, abs=0.06)  # it had the first 256 only


def first(*trees):
    return jax.tree.map(lambda leaf: leaf[:1], trees)


def nats_of(params: dict, keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Losses (N), float64, and how often the likeliest value is right."""
    hidden = np.maximum(keys @ params["hidden_0"]["kernel"] + params["hidden_0"]["bias"], 0)
    logits = hidden @ params["head"]["kernel"] + params["head"]["bias"]
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    return -np.log(p[np.arange(len(keys)), values]), logits.argmax(axis=1) == values


def adamw(params: dict, batches, rates, beta2: float) -> dict:
    """Decoupled weight decay 0.01 of matrices (Loshchilov & Hutter), moments of 0.9 and beta2, from zeros: float64."""
    params = {
        f"{layer}/{name}": np.array(leaf, np.float64) for layer, own in params.items() for name, leaf in own.items()
    }
    m, v = ({name: np.zeros_like(leaf) for name, leaf in params.items()} for _ in range(2))
    for t, ((keys, values), rate) in enumerate(zip(batches, rates, strict=True), 1):
        before = keys @ params["hidden_0/kernel"] + params["hidden_0/bias"]
        hidden = np.maximum(before, 0)
        logits = hidden @ params["head/kernel"] + params["head/bias"]
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        p[np.arange(len(keys)), values] -= 1
        p /= len(keys)
        back = (p @ params["head/kernel"].T) * (before > 0)
        gradient = {
            "hidden_0/kernel": keys.T @ back,
            "hidden_0/bias": back.sum(axis=0),
            "head/kernel": hidden.T @ p,
            "head/bias": p.sum(axis=0),
        }
        for name, g in gradient.items():
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = beta2 * v[name] + (1 - beta2) * g * g
            step = m[name] / (1 - 0.9**t) / (np.sqrt(v[name] / (1 - beta2**t)) + 1e-8)
            decay = 0.01 * params[name] if name.endswith("kernel") else 0.0
            params[name] = params[name] - rate * (step + decay)
    layers = {name.split("/")[0]: {} for name in params}
    for name, leaf in params.items():
        layers[name.split("/")[0]][name.split("/")[1]] = leaf
    return layers


@pytest.mark.usefixtures("promotion")
@pytest.mark.parametrize("beta2", [0.999, 0.95])
def test_it_learns_by_adamw_on_a_cosine_and_then_at_a_constant_rate(beta2):
    """Against float64, on the same batches: rate 0.03 to 0 while it learns, Arm.rate after."""
    seeds, steps = (5,), 6
    data, params = started(seeds)
    mine, own = pairs(5), jax.tree.map(lambda leaf: np.asarray(leaf[0]), params)

    key = keys_of(seeds, 1)[0]
    rows = [np.asarray(jax.random.randint(jax.random.fold_in(key, t), (128,), 0, 1024)) for t in range(steps)]
    assert max(map(max, rows)) > 900
    rates = [0.03 * 0.5 * (1 + math.cos(math.pi * t / steps)) for t in range(steps)]
    expected = adamw(own, [(mine.images[r].astype(np.float64), mine.labels[r]) for r in rows], rates, beta2)
    found = learned(seeds, data, params, 1024, beta2, steps)
    for layer, leaves in expected.items():
        for name, leaf in leaves.items():
            off = np.abs(np.asarray(found[layer][name][0]) - leaf)
            assert np.quantile(off, 0.999) < 1e-3  # where a gradient is next to none float32 may find another sign
            assert np.median(off) < 1e-5

    arm = asdict(Arm(old=1024, new=64, rate=2e-3, replay=0.05, beta2=beta2))
    key = keys_of(seeds, 2)[0]
    rows = [np.asarray(drawn(jax.tree.map(jnp.asarray, arm), jax.random.fold_in(key, t))) for t in range(5)]
    given = [(mine.images[r].astype(np.float64), mine.labels[r]) for r in rows]
    curves = tuned(seeds, data, found, arm, looks=(2, 5))
    start = jax.tree.map(lambda leaf: np.asarray(leaf[0]), found)
    for place, count in enumerate((0, 2, 5)):
        after = adamw(start, given[:count], [2e-3] * count, beta2)
        for name, own in (("old", slice(0, 1024)), ("new", slice(OLD, OLD + 64))):
            nats, right = nats_of(after, mine.images[own].astype(np.float64), mine.labels[own])
            assert curves[f"{name}_loss"][0, place] == pytest.approx(nats.mean(), rel=2e-4)
            assert curves[f"{name}_right"][0, place] == pytest.approx(right.mean(), abs=2e-3)


def test_a_replayed_pair_comes_as_often_as_its_weight_says():
    """Once for every 8 times that a new one comes, with a weight of 1/8."""
    arm = {name: jnp.asarray(value) for name, value in asdict(Arm(old=1024, new=128, replay=1 / 8)).items()}
    assert float(share_of_old(arm)) == pytest.approx(1 / 2)
    assert float(share_of_old(asdict(Arm(replay=1)))) == pytest.approx(64 / 65)
    rows = np.asarray(jax.vmap(lambda key: drawn(arm, key))(jax.random.split(jax.random.key(0), 2000))).ravel()
    old, new = np.bincount(rows[rows < OLD], minlength=1024), np.bincount(rows[rows >= OLD] - OLD, minlength=128)
    assert (len(old), len(new)) == (1024, 128)
    assert old.mean() / new.mean() == pytest.approx(1 / 8, rel=0.02)
    for counts in (old, new):
        assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < stats.chi2.ppf(0.9999, len(counts) - 1)
    alone = drawn(arm | {"replay": jnp.float32(0)}, jax.random.key(1))
    assert int(alone.min()) >= OLD


def test_what_is_read_off_curves():
    figures = {"step": [0, 10, 100, 300]}
    record = {
        "old_right": [[0.9, 0.8, 0.6, 0.7], [0.9, 0.75, 0.8, 0.3], [0.9, 0.8, 0.85, 0.75]],
        "new_right": [[0.1, 0.2, 0.5, 0.9], [0.1, 0.2, 0.4, 0.9], [0.0, 0.1, 0.2, 0.3]],
    }
    assert study.collapse(figures, record) == [(100, pytest.approx(0.4)), (300, pytest.approx(0.8)), None]
    np.testing.assert_allclose(study.early_loss(figures, record), [0.3, 0.15, 0.1])
    np.testing.assert_allclose(study.at_last(record, "old_right"), [0.7, 0.3, 0.75])
    assert study.above(np.array([1, 2, 3]))
    assert not study.above(np.array([-1, 2, 1]))


def made(good: bool) -> dict:
    """Curves of a study in which all, or nothing, went as was to be shown."""
    steps, arms = (0, 50, 200, 4000), []
    for arm in study.ARMS:
        worse = COUNTS.index(arm.new) if good else 0
        last = 0.6 - 0.1 * worse + (0.2 * (arm.replay > 0) if good else -0.1 * (arm.replay > 0))
        dip = 0.5 if good else 0.9 if arm.replay else 0.8
        gained = (0.1, 0.4, 0.95) if good else (0.5, 0.6, 0.8)
        curves = {"old_right": (0.95, dip, dip, last), "new_right": (0.03, *gained)}
        both = {
            name: [[right + 0.001 * seed for right in curve] for seed in range(5)] for name, curve in curves.items()
        }
        arms.append(asdict(arm) | both | {f"{name}_loss": [[1.0] * 4] * 5 for name in ("old", "new")})
    figures = {"seeds": [10, 11, 12, 13, 14], "step": list(steps), "arms": arms}
    return figures | {"criteria": study.criteria(figures)}


def test_every_criterion_can_be_met_and_missed():
    yes, no = (made(good)["criteria"] for good in (True, False))
    assert [one["criterion"] for one in yes] == [one["criterion"] for one in no]
    assert len(yes) == 3 + 4 + 5 + 3 + 3
    assert all(one["met"] for one in yes)
    assert not any(one["met"] for one in no)


def test_the_arms_are_the_papers_but_for_what_is_varied():
    assert asdict(PAPER) == {
        "old": 8192,
        "new": 128,
        "rate": 1e-3,
        "replay": 0.0,
        "beta2": 0.999,
    }  # c.f. arXiv 2503.21676, appendix F.4
    assert len(study.ARMS) == len(LOADS) * len(COUNTS) + 2 * (len(RATES) - 1) + len(REPLAYS) + len(COUNTS)
    assert max(arm.new for arm in study.ARMS) == NEW
    assert (LOOKS[:5], LOOKS[-1], 200 in LOOKS) == ((1, 2, 3, 4, 5), 4000, True)


def test_the_study_measures_tabulates_and_draws(tmp_path, capsys):
    command.report(study.STUDY, lambda folders: made(True), {"": tmp_path}, tmp_path, command.new_figure())
    told = capsys.readouterr().out
    assert "8,192    128   0.001       0  0.999         95.2 (0.1)" in told
    assert "50: 7.0" in told
    assert "NO " not in told
    assert json.loads((tmp_path / "figures.json").read_text())["seeds"] == [10, 11, 12, 13, 14]
    words = {element.text for element in xml.parse(tmp_path / "plot.svg").iter() if element.text}
    assert {"2,048 new", "replay 0.125", "4,096 old", "rate"} <= words
    assert "NO " in "\n".join(study.table(made(False)))


def test_there_is_nothing_to_override(tmp_path):
    with pytest.raises(ConfigError, match="--full is not for the study associative-memory"):
        command.main(["associative-memory", "--to", str(tmp_path / "s"), "--full"])
