"""podwright privacy: the words and figures of a private run's guarantee, held to dp-accounting and the run's own files."""

import json
import math

import dp_accounting
import pytest
from dp_accounting import pld
from runs import finish, train_command

from launch.cli import main
from trainer.run_folder import read_metrics

SMALL = "--model.stem_widths 8,8,8,16 --model.widths 32,32 --model.depths 1,1 --model.head_width 32"
PRIVATE = f"{SMALL} --optimizer.adaptive_clip 0 --optimizer.clip_norm 0 --eval.every 0 --checkpoint.every 2 --finetune.learns head"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("statement") / "run"
    words = f"{PRIVATE} --privacy.epsilon 5 --privacy.delta 1e-4 --trainer.steps 4"
    code, _, err = finish(train_command("nfnet-tiny", folder, *words.split()))
    assert code == 0, err
    return folder


def told(capsys, *words: str) -> str:
    assert main(["privacy", *map(str, words)]) == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.multiprocess
def test_figures_are_those_of_dp_accounting_for_what_the_run_did(run, capsys):
    """Of the newest checkpoint, and of an earlier one."""
    for step in (4, 2):
        assert main(["privacy", str(run), "--step", str(step), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["sampling_rate"] == 8 / 1423
        event = dp_accounting.PoissonSampledDpEvent(8 / 1423, dp_accounting.GaussianDpEvent(found["noise"]))
        accountant = pld.PLDAccountant(value_discretization_interval=1e-4)
        expected = accountant.compose(event, step).get_epsilon(1e-4)
        assert found["epsilon"] == pytest.approx(expected, rel=2e-3)
        assert found["stretches"] == [{"steps": step, "rate": 8 / 1423, "noise": found["noise"]}]
    assert found["epsilon"] < 5
    said = told(capsys, run)
    assert "of step 4 of" in said
    assert "any one image of the 1,423 in the training data" in said
    assert "WARNING" not in said
    logged = [record["epsilon"] for record in read_metrics(run, "train").values()]
    assert logged == sorted(logged)
    assert 0 < logged[0] < logged[-1] <= 5


@pytest.mark.multiprocess
def test_a_seed_and_losses_that_are_logged_are_warned_of(tmp_path, capsys):
    words = f"{PRIVATE} --privacy.epsilon 5 --privacy.delta 1e-4 --trainer.steps 1 --privacy.seed 3 --privacy.log_private true"
    code, _, err = finish(train_command("nfnet-tiny", tmp_path / "run", *words.split()))
    assert code == 0, err
    said = told(capsys, tmp_path / "run")
    assert said.count("WARNING") == 2
    assert "sampling and noise came from privacy.seed" in said
    assert "training losses and clipped shares" in said


@pytest.mark.multiprocess
def test_what_promises_nothing_is_one_sentence(run, tmp_path, capsys):
    code, _, err = finish(train_command("nfnet-tiny", tmp_path / "open", *SMALL.split(), "--trainer.steps", "1"))
    assert code == 0, err
    for words, said in (
        ([tmp_path / "open"], "was not trained privately: nothing about its data is promised"),
        ([run, "--step", "3"], f"--step 3 is not a checkpoint of {run}, which has 2, 4"),
        ([tmp_path / "none"], f"{tmp_path / 'none'} is not a podwright run"),
    ):
        assert main(["privacy", *map(str, words)]) in (2, 4)
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


def test_epsilon_is_rounded_up(monkeypatch, capsys):
    from launch import privacy

    found = {
        "run": "r", "step": 3, "epsilon": 1.00001, "delta": 1e-5, "budget": 2.0, "data": "documents", "unit": "example",
        "units": 10, "expected_batch": 2, "sampling_rate": 0.2, "noise": 1.0, "clip": 1.0, "epsilon_rdp": 1.5,
        "stretches": [{"steps": 2}, {"steps": 1}], "base": "runs/public", "secret_seed": True, "log_private": False,
    }  # fmt: skip
    said = " ".join(privacy.statement(found))
    assert "(1.001, 1e-05)-differentially private" in said
    assert "any one document of the 10" in said
    assert "3 steps" in said
    assert "runs/public" in said
    assert math.ceil(1000 * 1.00001) == 1001
