"""The parts of NFNet's studies that figures rest on, against closed forms and scikit-learn; and a probe of a run."""

from types import SimpleNamespace

import numpy as np
import pytest
from runs import finish, saved_arrays, train_command
from sklearn.linear_model import LogisticRegression

from configs.overrides import resolve
from data import open_data
from data.images import load_digits
from launch.cli import main
from launch.studies import STUDIES
from launch.studies.digits import convnet_shapes, convnet_width
from launch.study import folder_name
from trainer import run_folder
from trainer.linear import fit, scores


def test_logistic_regression_is_scikit_learns():
    """Its C is 1 / (decay * rows); features are standardised first."""
    pixels, labels = load_digits()
    x, y = pixels.reshape(len(pixels), -1).astype(np.float32), labels.astype(np.int32)
    ours = fit(x[:1400], y[:1400], 10, decay=0.01)
    standard = (x - ours.mean) / ours.scale
    theirs = LogisticRegression(C=1 / (0.01 * 1400), max_iter=2000, tol=1e-8).fit(standard[:1400], y[:1400])
    np.testing.assert_allclose(ours.kernel.T, theirs.coef_, atol=2e-3)
    found = scores(ours, x[1400:], y[1400:])
    assert found["error_rate"] == pytest.approx(1 - theirs.score(standard[1400:], y[1400:]), abs=1e-9)
    p = theirs.predict_proba(standard[1400:])[np.arange(397), y[1400:]]
    assert found["loss"] == pytest.approx(-np.log(p).mean(), rel=1e-3)


@pytest.mark.parametrize("config", ["agc", "nfnet-f0"])
def test_every_rate_is_measured_with_and_without_clipping(monkeypatch, config):
    """One run ended by itself, three steps before its last."""
    words = [one for one in (*STUDIES["agc"].configs, *STUDIES["agc"].full) if one.startswith(f"{config} ")]
    logs = {"train": {97: {}, 100: {}}, "eval": {100: {"error_rate": 0.25, "loss": 1.0}}}
    diverged = {"train": {97: {}}, "eval": {50: {"error_rate": 0.9, "loss": 2.3}}}
    monkeypatch.setattr(run_folder, "read_metrics", lambda run, kind: (diverged if run == words[-1] else logs)[kind])
    steps = SimpleNamespace(trainer=SimpleNamespace(steps=100))
    monkeypatch.setattr("trainer.evaluate.read_config", lambda run: steps)
    found = STUDIES["agc"].measure({one: one for one in words})["runs"]
    assert len({(run["rate"], run["clipping"]) for run in found}) == len(found) == len(words) == 8
    assert [run["diverged_at"] for run in found] == [None] * 7 + [97]
    assert [run["error"] for run in found] == [0.25] * 7 + [None]


def test_every_study_of_images_has_runs_that_can_start():
    for name in ("agc", "digits", "private"):
        for group in (STUDIES[name].configs, STUDIES[name].full):
            folders = set()
            for words in group:
                config, *rest = words.split()
                resolve(config, rest)
                folders.add(folder_name(words))
            assert len(folders) == len(group)


def test_the_plain_convnet_is_as_large():
    sizes = {w: sum(np.prod(shape) for shape in convnet_shapes(w)) for w in (3, 40)}
    assert convnet_width(int(sizes[40])) == 40
    assert sizes[3] == 9 * (3 + 9 + 18 + 36 + 72 + 144) + (3 + 3 + 6 + 6 + 12 + 12) + 12 * 10 + 10


@pytest.mark.multiprocess
def test_a_run_is_probed_and_passes_its_parameters_on(tmp_path, capsys):
    """A linear classifier on its features, kept for the next time; and fine-tuning with another head, from its average."""
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    options = ["--trainer.steps", "12", "--eval.every", "0", "--optimizer.ema", "0.9"]
    code, out, err = finish(train_command("nfnet-tiny", base, *options))
    assert code == 0, err
    assert "ema_error_rate" in out

    assert main(["probe", str(base)]) == 0
    told = capsys.readouterr().out
    assert float(told.split("error_rate ")[1].split(",")[0]) < 0.2  # of a network that has hardly learned
    [kept] = (base / "features").iterdir()
    train = open_data(resolve("nfnet-tiny").config.data).train
    with np.load(kept) as found:
        assert found["train_features"].shape == (len(train), 32)
        np.testing.assert_array_equal(found["train_labels"], train.labels)
    before = kept.stat().st_mtime_ns
    assert main(["probe", str(base)]) == 0
    assert capsys.readouterr().out == told
    assert kept.stat().st_mtime_ns == before

    command = train_command(
        "nfnet-tiny", tuned, "--trainer.steps", "1", "--finetune.base", str(base), *["--model.num_classes", "12"]
    )
    code, _, err = finish(command)
    assert code == 2
    assert err.endswith(
        f"finetune.base={str(base)!r} tells 10 classes apart, but model.num_classes=12: finetune.new_head=true starts the "
        "classifier anew\n"
    )
    rate = ["--finetune.new_head", "true", "--optimizer.learning_rate", "1e-20", "--optimizer.adaptive_clip", "0"]
    code, out, err = finish([*command, *rate])
    assert code == 0, err
    average, got = saved_arrays(base, 12), saved_arrays(tuned, 1)
    assert got["model/head/kernel"].shape == (32, 12)
    same = [name for name in got if name.startswith("model/") and "head" not in name]
    assert len(same) > 20
    for name in same:
        np.testing.assert_array_equal(got[name], average[name.replace("model/", "ema/", 1)])
    assert not np.array_equal(average["model/stem/conv_0/kernel"], average["ema/stem/conv_0/kernel"])
