"""The study of facts: what it reads off curves, what it fits, and that patched attention is attention."""

import dataclasses
import json
import math
import warnings
import xml.etree.ElementTree as xml

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import EXPERIMENTS
from configs.store import to_json
from data import open_data
from launch.studies import STUDIES, facts, facts_sampling
from launch.studies.facts_patching import all_maps, patched_logits, patched_nats
from launch.studies.study import mean_and_error, new_figure
from sharding.mesh import one_device_mesh
from sharding.rules import rules_for
from trainer.evaluate import place_batch
from trainer.tasks import make_task

BASE = math.log(16)


def curves(step, loss, right, unseen=None, sure=0.9, unsure=0.5) -> dict:
    return {
        "step": step,
        "attribute_loss": loss,
        "attribute_accuracy": right,
        "max_probability": [sure] * len(step),
        "entropy": [0.1] * len(step),
        "unseen_attribute_loss": unseen or loss,
        "unseen_attribute_accuracy": [0.0625] * len(step),
        "unseen_max_probability": [unsure] * len(step),
        "unseen_entropy": [1.0] * len(step),
    }


def test_phases_end_where_losses_pass_for_good():
    steps, losses = np.array([25, 50, 75, 100, 125]), np.array([4.0, 2.8, 2.6, 2.7, 1.0])
    assert facts.first_below(steps, losses, 2.8) == 50
    assert facts.first_below(steps, losses, 0.5) is None
    assert facts.stays_below(steps, losses, 2.65) == 125  # at 75 it was below and came back
    assert facts.stays_below(steps, losses, 2.75) == 75
    assert facts.stays_below(steps, losses, 0.9) is None
    assert facts.stays_below(steps, losses, 4.5) == 25
    assert facts.plateau_of(steps, losses, 2.75) == 75 - 50 + 50  # 1.02 x 2.75 at 50, 0.95 x 2.75 from 125 on
    assert facts.plateau_of(steps[:4], losses[:4], 2.75) == math.inf


def test_a_plateau_is_a_stretch_at_the_baseline_and_at_chance():
    size = {"baseline": BASE, "chance": 1 / 16}
    steps = list(range(25, 250, 25))
    losses = [4.0, 2.85, 2.80, 2.78, 2.77, 2.60, 2.75, 2.70, 1.0]  # 3 % are 2.69 to 2.86
    right = [0.0, 0.06, 0.06, 0.07, 0.12, 0.10, 0.13, 0.07, 0.9]  # twice chance is 0.125
    assert facts.plateau_steps({**size, "curves": curves(steps, losses, right)}) == 125 - 50


def test_the_law_of_the_plateau_is_that_of_least_squares():
    exact = [{"people": n, "known_at": 0.43 * n**0.81} for n in (512, 1024, 2048, 4096)]
    law = facts.plateau_law(exact)
    assert law["exponent"] == pytest.approx(0.81)
    assert law["scale"] == pytest.approx(0.43)
    assert law["r_squared"] == pytest.approx(1)
    ends = np.array([150, 275, 450, 1075])
    law = facts.plateau_law([{"people": n, "known_at": e} for n, e in zip((512, 1024, 2048, 4096), ends, strict=True)])
    x, y = np.log([512, 1024, 2048, 4096]), np.log(ends)
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    rest = y - y.mean() - slope * (x - x.mean())
    error = math.sqrt((rest**2).sum() / 2 / ((x - x.mean()) ** 2).sum())
    assert law["exponent"] == pytest.approx(slope)
    assert law["interval"] == pytest.approx(
        [slope - 4.302653 * error, slope + 4.302653 * error]
    )  # Student's t, 2 degrees
    assert law["r_squared"] == pytest.approx(1 - (rest**2).sum() / ((y - y.mean()) ** 2).sum())
    assert facts.plateau_law([*exact[:2], {"people": 4096, "known_at": None}]) is None


def test_gains_are_those_of_the_same_seed():
    arms = [
        {"sampling": "uniform", "seed": 10, "known_at": 400},
        {"sampling": "uniform", "seed": 11, "known_at": 500},
        {"sampling": "power:0.8", "seed": 10, "known_at": 390},
        {"sampling": "power:0.8", "seed": 11, "known_at": 470},
        {"sampling": "power:0.8", "seed": 12, "known_at": 100},  # has no uniform run beside it
    ]
    assert facts_sampling.gains(arms, "power:0.8") == [-10, -30]
    assert mean_and_error([-10, -30]) == pytest.approx((-20, 10))


@pytest.mark.parametrize(
    ("old", "new", "first"),
    [
        ([1.0, 0.9, 0.7, 0.5], [0.1, 0.2, 0.29, 0.9], True),
        ([1.0, 0.9, 0.7, 0.5], [0.1, 0.2, 0.31, 0.9], False),  # new ones have gained 20 points, too
        ([1.0, 0.9, 0.9, 0.5], [0.1, 0.1, 0.1, 0.2], False),  # only after 200 steps
    ],
)
def test_forgetting_comes_first_if_20_points_are_lost_before_20_are_gained(old, new, first):
    run = {"step": [0, 100, 200, 300], "old_attribute_accuracy": old, "new_attribute_accuracy": new}
    assert facts.forgets_first(run) is first


def in_turn(learned: tuple[int, ...], forgets: int | None, right: tuple[float, ...] = (0.9,) * 4) -> dict:
    """An arm of four groups that each know nothing for some steps of their turn, then what is `right`, and 0.4 of that from
    `forgets` steps after it on."""
    steps = np.arange(10, 1001, 10)
    found = {"step": steps.tolist()}
    for group, start in enumerate((0, 250, 500, 750)):
        known = np.where(steps >= start + learned[group], right[group], 0.05)
        if forgets:
            known = np.where(steps >= start + 250 + forgets, 0.4 * right[group], known)
        found[f"group_{group + 1}_attribute_accuracy"] = known.tolist()
    return {"sampling": facts_sampling.SEQUENTIAL, "seed": 10, "known_at": None, "curves": found}


def test_groups_are_timed_from_the_start_of_their_turn_and_from_its_end():
    arm = in_turn((150, 60, 40, 250), 30)
    assert [facts_sampling.learned_in(arm, group, 0.45) for group in (1, 2, 3, 4)] == [150, 60, 40, 250]
    assert [facts_sampling.learned(arm, group) for group in (1, 2, 3, 4)] == [0.9] * 4
    assert [facts_sampling.forgotten_in(arm, group) for group in (1, 2)] == [(30, 0.45), (30, 0.45)]
    assert facts_sampling.forgotten_sooner(arm) == pytest.approx((2 * 30 - 60 + 2 * 30 - 40) / 2)
    assert facts_sampling.learned_in(in_turn((150, 260, 40, 40), 30), 2, 0.45) == math.inf  # after its turn
    assert facts_sampling.forgotten_in(in_turn((150, 60, 40, 40), None), 1)[0] == math.inf
    with warnings.catch_warnings(action="error"):  # numpy's, of what is no number
        assert not facts_sampling.sure([-100, -100, -math.inf])
    assert not facts_sampling.sure([-1, 1, -1])
    assert facts_sampling.sure([-10, -12, -11])


def write_run(folder, name: str, evaluations: dict[int, dict], **data) -> None:
    config = EXPERIMENTS[name]()
    folder.mkdir()
    (folder / "config.json").write_text(
        to_json(dataclasses.replace(config, data=dataclasses.replace(config.data, **data)))
    )
    records = [{"kind": "eval", "step": step, **metrics} for step, metrics in evaluations.items()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_figures_are_those_of_the_runs(tmp_path):
    names = ("attribute_loss", "attribute_accuracy", "max_probability", "entropy")

    def told(**groups):
        return {
            f"{group}{name}": value
            for group, values in groups.items()
            for name, value in zip(names, values, strict=True)
        }

    base = {
        25: told(**{"": (2.82, 0.1, 0.1, 2.8), "unseen_": (2.9, 0.06, 0.1, 2.8)}),
        50: told(**{"": (2.0, 0.4, 0.5, 1.0), "unseen_": (6.0, 0.05, 0.4, 1.5)}),
    }
    tuned = {10: told(**{"": (3.0, 0.3, 0.5, 1.0), "unseen_": (6.0, 0.1, 0.4, 1.5), "earlier_": (2.5, 0.2, 0.5, 1.0)})}
    write_run(tmp_path / "base", "facts-transformer-tiny", base)
    write_run(tmp_path / "tuned", "facts-transformer-tiny", tuned, first=1024, population=128, replay=0.125)
    write_run(tmp_path / "more", "facts-transformer-tiny", base, population=4096)
    turns = {50: base[50] | {f"group_{group}_attribute_accuracy": group / 10 for group in (1, 2, 3, 4)}}
    write_run(tmp_path / "turns", "facts-transformer-tiny", turns, population=2048, sampling=facts_sampling.SEQUENTIAL)
    write_run(tmp_path / "many", "facts-transformer-tiny", tuned, first=1024, population=2048)
    runs = {
        facts.of_replay(0, 2048): tmp_path / "many",
        facts.of_arm(facts_sampling.SEQUENTIAL, 12): tmp_path / "turns",
        facts.of_size("transformer", 1024): tmp_path / "base",
        facts.of_size("transformer", 4096): tmp_path / "more",  # a size of the full study, too
        facts.of_replay(0.125): tmp_path / "tuned",
    }
    found = facts.measure(runs)
    (size, more), (replay, many) = found["sizes"], found["replays"]
    assert more["people"] == 4096
    assert (size["family"], size["people"], size["generic_at"], size["known_at"]) == ("transformer", 1024, 25, 50)
    assert size["baseline"] == pytest.approx(BASE)
    assert size["chance"] == 1 / 16
    assert size["curves"]["unseen_attribute_loss"] == [2.9, 6.0]
    assert replay == {
        "replay": 0.125,
        "people": 128,
        "step": [0, 10],
        "old_attribute_accuracy": [0.4, 0.2],
        "new_attribute_accuracy": [0.05, 0.3],
        "old_attribute_loss": [2.0, 2.5],
        "new_attribute_loss": [6.0, 3.0],
    }
    assert many == {**replay, "replay": 0, "people": 2048}
    (arm,) = found["arms"]
    assert (arm["sampling"], arm["seed"], arm["known_at"]) == ("groups:4:250", 12, 50)
    assert arm["curves"]["group_3_attribute_accuracy"] == [0.3]
    assert found["laws"] == {}


def figures(good: bool) -> dict:
    steps = [100, 200, 300, 400]
    sizes = [
        {
            "family": mixer,
            "people": people,
            "baseline": BASE,
            "chance": 1 / 16,
            "curves": curves(
                steps,
                [BASE, BASE, 1.0, 0.1],
                [0.06, 0.07, 0.5, 0.95 if good else 0.85],
                [BASE, BASE, 3.0, 9.0 if good else 4.0],
            ),
            "generic_at": 100,
            "known_at": round(people**0.8 if good else people**0.2),
            "known_at_other": [200, 300],
        }
        for mixer in ("transformer", "griffin", "hawk")
        for people in (512, 1024, 2048, 4096)
    ]
    arms = [
        {
            "sampling": sampling,
            "seed": seed,
            "known_at": 400 + seed + (0 if sampling == "uniform" or not good else -50 - seed % 2),
        }
        for sampling in facts.ARMS
        for seed in facts.SEEDS
    ]
    for seed in facts.SEEDS:
        first = 0.4 + 0.1 * (seed % 2)
        arm = in_turn((100, 60, 80, 80), 20 if good else 40, (first, 0.7 if good else 0.45, 0.8, 0.8))
        arms.append(arm | {"seed": seed})
    replays = [
        {
            "replay": weight,
            "people": facts.NEW,
            "step": [0, 200, 400],
            "old_attribute_accuracy": [1.0, 0.7 if good else 0.9, 0.8],
            "new_attribute_accuracy": [0.1, 0.2, 0.9],
            "old_attribute_loss": [0.0, 1.0, 2.0 - weight if good else 2.0],
            "new_attribute_loss": [8.0, 4.0, 0.3],
        }
        for weight in facts.REPLAYS
    ]
    replays += [replays[0] | {"people": people} for people in facts.MORE]
    laws = {m: facts.plateau_law([s for s in sizes if s["family"] == m]) for m in ("transformer", "griffin", "hawk")}
    patched = {"late": [(50, BASE), (75, 1.0 if good else BASE)], "early": [(50, BASE), (75, BASE if good else 1.0)]}
    attention = {"before": [0.3, 0.4], "replay 0": [0.3, 0.41 if good else 0.5]}
    return {"sizes": sizes, "laws": laws, "arms": arms, "replays": replays, "patched": patched, "attention": attention}


def test_every_claim_can_fail():
    yes, no = (dict(facts.judged(figures(good))) for good in (True, False))
    assert list(yes) == list(no)
    assert len(yes) == 3 * 3 + 5 + 2 + 3 + 2 + 2
    assert all(yes.values())
    assert not any(no.values())


def test_the_study_draws_and_tabulates_its_figures(tmp_path):
    found, figure = figures(True), new_figure()
    STUDIES["facts"].draw(found, figure)
    figure.savefig(tmp_path / "plot.svg", metadata={"Date": None})
    words = {element.text for element in xml.parse(tmp_path / "plot.svg").iter() if element.text}
    assert {"Hawk", "Griffin", "Transformer", "1,024 people", "replay 0.125", "early", "2,048 new"} <= words
    table = "\n".join(STUDIES["facts"].table(found))
    assert "transformer: known at 1.00 people^0.80" in table
    assert "128 new, replay 0.125 old people right 100.0 %, at worst 70.0" in table
    assert "group 2: 70.0 % (0.0) right at the end of its turn, 28.0 % at last; half of that learned in 60 60" in table
    assert "60 60 60 steps, lost in 20 20 20 20 20" in table
    assert "NO" not in table
    assert "NO" in "\n".join(STUDIES["facts"].table(figures(False)))


def test_a_model_patched_with_its_own_attention_is_itself_and_learns_no_queries():
    config = EXPERIMENTS["facts-transformer-tiny"]()
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=4))
    task, mesh = make_task(config), one_device_mesh()
    with jax.set_mesh(mesh):
        spec = rules_for(mesh).spec
        rows = place_batch(open_data(config.data).train_batch(0), mesh, spec)

        @jax.jit
        def found(key):
            model = task.init(key, spec)
            maps = all_maps(model, rows["tokens"], rows["segment_pos"])
            own = patched_logits(model, rows["tokens"], maps)
            itself = model(rows["tokens"], rows["segment_pos"], dtype=jnp.float32)
            loss = jax.grad(lambda model, reference: jnp.sum(patched_nats(model, reference, rows)), (0, 1))
            return maps, own, itself, loss(model, model)

        maps, own, itself, gradient = found(jax.random.key(0))
        np.testing.assert_allclose(np.asarray(own), np.asarray(itself), atol=2e-5)
    assert all(float(jnp.max(jnp.abs(leaf))) == 0 for leaf in jax.tree.leaves(gradient[1]))
    mixer = gradient[0].layers.groups["attn_0"].mixer
    assert float(jnp.max(jnp.abs(mixer.q.kernel[...]))) == 0
    assert float(jnp.max(jnp.abs(mixer.v.kernel[...]))) > 0
    for block in maps:
        np.testing.assert_allclose(np.asarray(block).sum(-1), 1, rtol=1e-5)
        assert not np.triu(np.asarray(block), 1).any()
