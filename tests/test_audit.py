"""The one-run audit: canaries are drawn fairly, the command bounds epsilon as the statistics say, and it can fail."""

import json
import pathlib
import sys

import jax
import numpy as np
import pytest
from pictures import encoded, picture
from runs import finish, train_command
from scipy import stats
from test_bad_input import refused

import launch.audit
from configs.schema import ImageData
from data import open_data
from data.canaries import draw
from data.dataset import DataError
from data.images import load_digits
from launch.audit import Claim
from launch.audit_bound import best_guesses
from launch.cli import main
from trainer.evaluate import read_config

# --- canaries ---------------------------------------------------------------------------------------------------------


def drawn(count=20_000, canaries=10_000, classes=10, seed=0):
    return draw(count, lambda place: f"images/{place}", classes, ImageData(canaries=canaries, seed=seed))


def test_coins_and_labels_are_fair_and_tell_nothing_of_each_other():
    one, other = drawn(), drawn(seed=1)
    assert stats.binomtest(int(one.included.sum()), 10_000).pvalue > 1e-3
    assert set(one.shifts) == set(range(1, 10))  # never the true label
    assert stats.chisquare(np.bincount(one.shifts)[1:]).pvalue > 1e-3
    place = one.places // 2000  # in the order of the source
    assert stats.chisquare(np.bincount(place)).pvalue > 1e-3
    for what in (one.shifts, place, other.included):
        table = [np.bincount(what[one.included == coin].astype(int), minlength=10) for coin in (False, True)]
        table = np.array(table)[:, np.sum(table, axis=0) > 0]
        assert stats.chi2_contingency(table).pvalue > 1e-3
    # Another seed tosses again, for the same canaries with the same labels.
    np.testing.assert_array_equal(one.places, other.places)
    np.testing.assert_array_equal(one.shifts, other.shifts)


def test_more_canaries_leave_those_that_there_were_as_they_are():
    few, many = drawn(canaries=100), drawn(canaries=1000)
    same = np.isin(many.places, few.places)
    np.testing.assert_array_equal(many.places[same], few.places)
    np.testing.assert_array_equal(many.included[same], few.included)
    np.testing.assert_array_equal(many.shifts[same], few.shifts)
    assert few.kept(20_000).tolist() == sorted(set(range(20_000)) - set(few.places[~few.included].tolist()))


def test_without_canaries_digits_are_what_they_were():
    for config, digest in (
        (ImageData(), "b23c9e40b9a472ebf7afaf20577228059ca49ac4681ca2f2103f58aeca95c7de"),
        (
            ImageData(batch_size=8, image_size=8, held_out=0.5, channels=3),
            "97b4958f8dfeda51ba59679db8024b83dee0324da872632bcf1e379c16a18e23",
        ),
    ):
        data = open_data(config)
        assert data.manifest["hash"] == digest
        assert len(data.canaries.included) == 0
        np.testing.assert_array_equal(data.train.labels, load_digits()[1][data.train.numbers])


def test_digits_have_the_wrong_labels_of_canaries_that_are_in_and_no_others():
    truth = load_digits()[1]
    plain, data = open_data(ImageData()), open_data(ImageData(canaries=300))
    canaries, numbers = data.canaries, data.canaries.examples.numbers
    assert len(numbers) == len(canaries.included) == 300
    assert set(numbers) <= set(plain.train.numbers)
    assert set(data.train.numbers) == set(plain.train.numbers) - set(numbers[~canaries.included])
    wrong = data.train.labels != truth[data.train.numbers]
    np.testing.assert_array_equal(np.sort(data.train.numbers[wrong]), numbers[canaries.included])
    as_scored = canaries.examples.views(np.arange(300), np.zeros(300, int))
    assert (as_scored["labels"] != truth[numbers]).all()
    of_canary = dict(zip(numbers.tolist(), as_scored["labels"].tolist(), strict=True))
    assert all(of_canary[n] == y for n, y in zip(data.train.numbers[wrong], data.train.labels[wrong], strict=True))
    np.testing.assert_array_equal(data.held_out.numbers, plain.held_out.numbers)
    np.testing.assert_array_equal(data.held_out.labels, truth[data.held_out.numbers])
    assert f"300 canaries, {canaries.included.sum()} of them in" in data.summary
    hashes = {open_data(ImageData(canaries=n, seed=seed)).manifest["hash"] for n in (0, 299, 300) for seed in (0, 1)}
    assert len(hashes) == 5  # coins are part of it, the seed alone is not


def test_images_of_a_folder_have_canaries_too(tmp_path):
    for label, name in enumerate(("ant", "bee", "cat")):
        (tmp_path / name).mkdir()
        for i in range(8):
            (tmp_path / name / f"{i}.png").write_bytes(encoded(picture(8 * label + i), "PNG"))

    def opened(**fields):
        return open_data(
            ImageData(source=str(tmp_path), channels=3, image_size=16, batch_size=4, **{"held_out": 0.3} | fields)
        )

    plain, data = opened(), opened(canaries=10, augment="crop")
    assert "canaries" not in plain.manifest
    labels, numbers = data.train.split.source.labels, data.canaries.examples.split.numbers
    included = dict(zip(numbers.tolist(), data.canaries.included.tolist(), strict=True))
    assert set(data.train.split.numbers) == {n for n in plain.train.split.numbers if included.get(int(n), True)}
    scored = data.canaries.examples.views(np.arange(10), np.arange(10))["labels"]
    assert ((scored - labels[numbers]) % 3 > 0).all()
    expected = labels.copy()
    expected[numbers] = scored
    own = np.arange(len(data.train))
    np.testing.assert_array_equal(
        data.train.views(own, own)["labels"], expected[data.train.split.numbers]
    )  # of private runs
    np.testing.assert_array_equal(
        data.train.read(own)["labels"], expected[data.train.split.numbers[data.train.indices(own)]]
    )
    held_out = data.held_out.read(np.arange(len(data.held_out)))
    np.testing.assert_array_equal(held_out["labels"], labels[data.held_out.split.numbers])
    assert data.canaries.views > 1
    assert opened(canaries=10).canaries.views == 1  # nothing is random there


def test_too_many_canaries_are_one_sentence():
    with pytest.raises(
        DataError, match=r"data\.canaries=2000 is more than the 1,423 training images of digits: at most"
    ):
        open_data(ImageData(canaries=2000))


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> pathlib.Path:
    """A run of a few steps on 101 canaries, which fill no batch."""
    run = tmp_path_factory.mktemp("trained") / "run"
    words = [
        "--eval.every",
        "0",
        "--trainer.steps",
        "3",
        "--data.canaries",
        "101",
        "--model.widths",
        "32",
        "--model.depths",
        "1",
    ]
    command = train_command("nfnet-tiny", run, *words)
    code, out, err = finish(command)
    assert code == 0, err
    assert "101 canaries, " in out
    return run


@pytest.mark.multiprocess
def test_the_bound_is_that_of_the_scores(trained, tmp_path, capsys):
    from launch.studies.study import trained as opened

    canaries = open_data(read_config(trained).data).canaries
    batch = canaries.examples.views(np.arange(101), np.zeros(101, int))
    images = np.pad(batch["images"], [(0, 3), *[(0, 0)] * 3])
    with opened(trained) as (_, model, place):
        program = jax.jit(lambda model, images: model(images, dtype=jax.numpy.float32, dropout_key=None))
        logits = np.asarray(program(model, place({"images": images})["images"]), np.float64)[:101]
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(101), batch["labels"]]

    step, scores, included = launch.audit.scored(str(trained), read_config(trained))
    assert step == 3
    np.testing.assert_allclose(scores, -losses, atol=1e-4)
    np.testing.assert_array_equal(included, canaries.included)
    assert main(["audit", str(trained), "--delta", "1e-3", "--json", str(tmp_path / "audit.json")]) == 0
    told = capsys.readouterr().out
    said = json.loads((tmp_path / "audit.json").read_text())
    guesses, correct, bound = best_guesses(scores, included, 1e-3)
    assert (said["canaries"], said["guesses"], said["correct"]) == (101, guesses, correct)
    assert said["bound"] == bound < 1  # after three steps
    assert (said["delta"], said["claimed"], said["broken"]) == (1e-3, None, False)
    assert f"{guesses} guesses, {correct} correct" in told
    assert "the run claims no epsilon" in told


def test_a_bound_above_the_claim_fails(trained, monkeypatch, capsys):
    included = np.arange(200) % 2 == 0
    monkeypatch.setattr(launch.audit, "scored", lambda run, config: (3, included.astype(float), included))
    bound = best_guesses(included.astype(float), included, 1e-5)[2]
    for epsilon in (bound + 0.01, bound - 0.01):
        monkeypatch.setattr(launch.audit, "claim_of", lambda run, step, epsilon=epsilon: Claim(epsilon, 1e-5))
        code = main(["audit", str(trained)])
        out, err = capsys.readouterr()
        assert f"claimed is {epsilon:.4g}" in out
        assert code == (0 if epsilon > bound else 6)
        assert ("proves nothing" in out) == (epsilon > bound)
        assert err.startswith("podwright: the guarantee does not hold") == (epsilon < bound)


def test_mistakes_are_one_sentence(trained, tmp_path, capsys):
    run = str(trained)
    without = tmp_path / "without"
    without.mkdir()
    config = json.loads((trained / "config.json").read_text())
    config["data"]["canaries"] = 0
    (without / "config.json").write_text(json.dumps(config))
    assert refused(capsys, ["audit", str(without)], 2) == (
        f"{without} was trained without canaries, and nothing can be guessed: train a run with --data.canaries 200, say "
        f"(docs/audit.md)"
    )
    assert "--delta 1 is out of range" in refused(capsys, ["audit", run, "--delta", "1"], 2)
    assert "can't be written" in refused(capsys, ["audit", run, "--json", str(tmp_path / "no" / "where.json")], 2)
    assert "required: RUN" in refused(capsys, ["audit"], 2)
    assert "is not a podwright run" in refused(capsys, ["audit", str(tmp_path / "nowhere")], 4)
    config["data"]["canaries"] = 100
    (without / "config.json").write_text(json.dumps(config))
    (without / "data_manifest.json").write_text((trained / "data_manifest.json").read_text())
    assert "changed since it was trained (canaries)" in refused(capsys, ["audit", str(without)], 3)


# --- the test that can fail -------------------------------------------------------------------------------------------

FORGOTTEN = """
import sys
import trainer.private_gradient
trainer.private_gradient.noised = lambda total, noise, key, task: total
from launch.cli import main
sys.exit(main(sys.argv[1:]))
"""


def audited(run: pathlib.Path, program: list[str], *words: str) -> tuple[int, dict, str]:
    """Exit code of the audit, its figures and complaints, of the config `audit` trained with these words."""
    command = ["train", "audit", "--run", str(run), "--privacy.seed", "0", *words]
    code, _, err = finish([sys.executable, *program, *command], timeout=1200)
    assert code == 0, err
    code, _, err = finish([sys.executable, "-m", "launch", "audit", str(run), "--json", str(run / "audit.json")])
    return code, json.loads((run / "audit.json").read_text()), err


@pytest.mark.slow
@pytest.mark.multiprocess
def test_private_training_shows_less_than_it_claims_and_without_noise_it_shows_more(tmp_path):
    """Trainings that differ in their noise alone. The last claims epsilon 2 and does not keep it."""
    program = ["-m", "launch"]
    code, private, _ = audited(tmp_path / "private", program, "--privacy.epsilon", "2")
    assert code == 0
    assert 1.9 < private["claimed"] <= 2
    assert private["bound"] <= private["claimed"]
    assert private["canaries"] == 300

    words = ["--privacy.epsilon", "1e30", "--privacy.noise", "1e-6"]
    code, silent, _ = audited(tmp_path / "silent", program, *words)
    assert code == 0  # it claims nothing else
    assert silent["bound"] > 1.5 * private["claimed"]

    code, forgotten, err = audited(tmp_path / "forgotten", ["-c", FORGOTTEN], "--privacy.epsilon", "2")
    assert code == 6
    assert forgotten["claimed"] == private["claimed"]
    assert forgotten["bound"] > 1.5 * forgotten["claimed"]
    assert err.startswith("podwright: the guarantee does not hold")


@pytest.mark.slow
@pytest.mark.multiprocess
def test_private_training_shows_less_than_it_claims_where_noise_does_not_drown_the_model(tmp_path):
    """At a learning rate so low that guesses are better than coins."""
    words = ["--privacy.epsilon", "2", "--optimizer.learning_rate", "0.005"]
    code, private, _ = audited(tmp_path / "run", ["-m", "launch"], *words)
    assert code == 0
    assert private["bound"] <= private["claimed"] <= 2
