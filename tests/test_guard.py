"""After a bad batch a run goes on as one that never saw it, or left its update out; or it ends in one sentence."""

import json
import math
import re
import signal
import socket
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import SMALL, finish, saved_arrays, start, train_command

from configs.guard import GuardConfig, windows_of
from configs.overrides import resolve
from configs.schema import ConfigError
from data.left_out import batch_number, merged
from sharding import hosts
from sharding.mesh import make_mesh
from trainer.guard import Guard, NumericsError, judge, read_rollbacks
from trainer.program import make_program
from trainer.run_folder import read_metrics
from trainer.tasks import make_task

# `podwright` with some batches of the data spoilt, by their numbers from 1: weights that are no numbers, or other targets.
POISONED = """
import sys
from data.dataset import Dataset
from data.left_out import batch_number
from launch.cli import main

bad, how = set(map(int, sys.argv[1].split(","))), sys.argv[2]
read = Dataset.train_batch

def poisoned(data, step):
    batch = read(data, step)
    if batch_number(step, data.left_out) + 1 in bad:
        if how == "nan":
            batch["weights"] = batch["weights"] * float("nan")
        else:
            batch["targets"] = (batch["targets"] + 128) % 256
    return batch

Dataset.train_batch = poisoned
sys.exit(main(sys.argv[3:]))
"""
STEPS = ("--trainer.steps", "20", "--checkpoint.every", "5", "--checkpoint.keep_last", "9", "--eval.every", "0")
ROLLBACK = ("--guard.policy", "rollback")


def poisoned(command: list[str], bad: str, how: str = "nan") -> list[str]:
    return [command[0], "-c", POISONED, bad, how, *command[command.index("launch") + 1 :]]


def command(run, *words: str) -> list[str]:
    return train_command("griffin-tiny", run, *STEPS, *words)


def assert_same(run, other, last: int = 20) -> None:
    expected, got = (read_metrics(folder, "train") for folder in (other, run))
    assert list(expected) == list(range(1, last + 1))
    assert sorted(got) == list(expected)
    for step in expected:
        for key in ("loss", "grad_norm", "learning_rate"):
            assert got[step][key] == expected[step][key], f"{key} of step {step}"
    expected, got = saved_arrays(other, last), saved_arrays(run, last)
    assert expected.keys() == got.keys()
    for key in expected:
        assert expected[key].tobytes() == got[key].tobytes(), key


@pytest.fixture(scope="module")
def without_13(tmp_path_factory):
    """A run that was told from the start to leave out batch 13."""
    run = tmp_path_factory.mktemp("guard") / "reference"
    code, _, err = finish(command(run, "--guard.skip_batches", "13"))
    assert code == 0, err
    return run


@pytest.mark.multiprocess
def test_a_rollback_gives_the_run_that_never_saw_the_batch(tmp_path, without_13):
    run = tmp_path / "run"
    code, out, err = finish(poisoned(command(run, *ROLLBACK), "13"))
    assert code == 0, err
    assert re.search(
        r"step 13: grad_norm nan, loss nan; rolled back to step 10, batch 13 left out \(rollback 1 of", out
    )
    (rollback,) = read_rollbacks(run)
    assert rollback["step"] == 13
    assert rollback["returned_to"] == 10
    assert rollback["batches"] == [13, 13]
    assert rollback["values"]["loss"] is None
    assert_same(run, without_13)
    manifest = json.loads((run / "checkpoints" / "20" / "meta" / "metadata").read_text())
    assert manifest["next_batch"] == 22  # of 20 steps and one batch left out


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_run_killed_after_its_rollback_still_leaves_the_batch_out(tmp_path, without_13):
    run = tmp_path / "run"
    process = start(poisoned(command(run, *ROLLBACK), "13"), stdout=subprocess.DEVNULL)
    while not (run / "rollbacks.jsonl").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    code, out, err = finish(poisoned(command(run, *ROLLBACK), "13"))
    assert code == 0, err
    assert "resumed from step 1" in out
    assert "rolled back" not in out
    assert_same(run, without_13)
    code, out, err = finish([sys.executable, "-m", "launch", "replay", str(run), "--step", "18"])
    assert code == 0, err
    assert out.count("bit-identical") == 2


@pytest.mark.multiprocess
def test_a_skipped_update_leaves_all_as_it_was_and_the_others_bit_for_bit(tmp_path):
    """The run with policy `abort` is the reference of the steps before."""
    skipping, ending = tmp_path / "skipping", tmp_path / "ending"
    words = ("--checkpoint.every", "1", "--checkpoint.keep_last", "20", "--trainer.steps", "9")
    code, out, err = finish(poisoned(command(skipping, *words, "--guard.policy", "skip"), "7"))
    assert code == 0, err
    assert "step 7: grad_norm nan, loss nan; its update is skipped" in out
    code, _, err = finish(poisoned(command(ending, *words), "7"))
    assert code == 5
    assert err.startswith(
        "podwright: grad_norm nan, loss nan at step 7; the same steps would end the same way; without "
    )
    assert err.endswith(" --guard.policy rollback\n")
    logs = [read_metrics(run, "train") for run in (skipping, ending)]
    for step in range(1, 7):
        for key in ("loss", "grad_norm", "learning_rate"):
            assert logs[0][step][key] == logs[1][step][key]
    before, after, expected = saved_arrays(skipping, 6), saved_arrays(skipping, 7), saved_arrays(ending, 6)
    assert before.keys() == after.keys() == expected.keys()
    changed = {key for key in before if before[key].tobytes() != after[key].tobytes()}
    schedules = {key for key in before if before[key].dtype == np.int32 and re.fullmatch(r"opt_state/.*count", key)}
    assert changed - schedules == {"step"}
    assert len(changed & schedules) == 1  # the schedule's: the rate of a step does not depend on what was skipped
    assert len(schedules) == 2
    assert not [key for key in before if before[key].tobytes() != expected[key].tobytes()]
    assert saved_arrays(skipping, 9)["step"] == 9
    assert all(np.isfinite(value).all() for value in saved_arrays(skipping, 9).values())


@pytest.mark.multiprocess
def test_bad_batches_without_end_end_the_run(tmp_path):
    bad = ",".join(map(str, range(6, 30)))
    run = tmp_path / "run"
    code, _, err = finish(poisoned(command(run, *ROLLBACK, "--guard.limit", "2"), bad))
    assert code == 5
    assert err == (
        "podwright: grad_norm nan, loss nan at step 6, after 2 rollbacks, all that guard.limit allows: "
        f"{run / 'rollbacks.jsonl'} lists them\n"
    )
    assert saved_arrays(run, 5)["step"] == 5


def test_skips_in_a_row_without_end_end_the_run(tmp_path):
    said = []
    reporter = types.SimpleNamespace(folder=tmp_path, say=said.append)
    guard = Guard(GuardConfig(policy="skip", limit=2), [], reporter)
    for step, loss in enumerate([math.nan, math.nan, 1.0, math.nan, math.nan], start=1):
        assert guard.accepts(step, {"loss": loss, "bad": float(math.isnan(loss))})
    assert said == [f"step {step}: loss nan; its update is skipped" for step in (1, 2, 4, 5)]
    with pytest.raises(
        NumericsError, match=r"loss nan at step 6, after 2 skipped updates in a row, all that guard\.limit"
    ):
        guard.accepts(6, {"loss": math.nan, "bad": 1.0})


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_spike_takes_along_the_batches_before_it_and_what_learned_from_them(tmp_path):
    """Batches 14 to 17 are left out: checkpoint 15 has learned from two of them, 10 from none."""
    run, reference = tmp_path / "run", tmp_path / "reference"
    spikes = (*ROLLBACK, "--guard.threshold", "2", "--guard.window", "8")
    code, out, err = finish(poisoned(command(run, *spikes, "--guard.batches", "4"), "17", "targets"))
    assert code == 0, err
    told = r"step 17: (loss|grad_norm) \S+, \S+ robust deviations above its median.*; rolled back to step 10, batches 14 to 17"
    assert re.search(told, out)
    assert out.count("rolled back") == 1
    assert finish(command(reference, *spikes, "--guard.skip_batches", "14-17"))[0] == 0
    assert_same(run, reference)
    for key, value in saved_arrays(run, 15).items():  # made again
        assert value.tobytes() == saved_arrays(reference, 15)[key].tobytes(), key
    logs = read_metrics(run, "train"), read_metrics(reference, "train")
    scores = [[log[step]["loss_z"] for step in log] for log in logs]
    assert scores[0] == scores[1]  # what a step is compared with has come back, too
    assert scores[0][:8] == [0.0] * 8
    assert all(scores[0][8:])


@pytest.mark.slow
@pytest.mark.multiprocess
def test_hosts_roll_back_together(tmp_path):
    words = ("--mesh.simulated_devices", "4", "--mesh.data", "2", "--mesh.fsdp", "2", *ROLLBACK)
    words += ("--guard.threshold", "1000", "--guard.window", "8")

    def together(run, bad: str, *more: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            told = {hosts.ADDRESS: f"127.0.0.1:{free.getsockname()[1]}", hosts.COUNT: "2"}
        job = poisoned(command(run, *words, *more), bad)
        second = start(job, env=told | {hosts.INDEX: "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        code, out, err = finish(job, env=told | {hosts.INDEX: "0"})
        assert code == 0, err
        assert second.wait(60) == 0
        return out

    assert "rolled back to step 10" in together(tmp_path / "run", "13")
    together(tmp_path / "reference", "99", "--guard.skip_batches", "13")
    assert_same(tmp_path / "run", tmp_path / "reference")


@pytest.mark.parametrize("name", ["griffin-tiny", "nfnet-tiny"])
def test_a_guarded_step_fits_any_mesh(name):
    words = "--mesh.data 2 --mesh.fsdp 4 --data.batch_size 8 --guard.policy skip --guard.threshold 9 --guard.window 16"
    config = resolve(name, [*SMALL[name].split(), *words.split()]).config
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        program = make_program(config, make_task(config), mesh)
        before, (after, metrics) = program.state, program.trace().out_info
    assert before.recent.shape == (16, 2)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert (old.shape, old.dtype) == (new.shape, new.dtype)
    assert {"loss", "grad_norm", "bad", "loss_z", "grad_norm_z"} <= set(metrics)


def test_a_score_is_the_distance_from_the_median_in_robust_deviations():
    rng = np.random.default_rng(0)
    recent = rng.normal((3.0, 0.5), (0.1, 0.05), (128, 2)).astype(np.float32)
    values = np.array([3.9, 0.6], np.float32)
    deviation = 1.4826 * np.median(np.abs(recent - np.median(recent, 0)), 0)
    expected = (values - np.median(recent, 0)) / deviation
    assert deviation == pytest.approx([0.1, 0.05], rel=0.2)  # for a normal distribution it is the standard deviation

    def judged(loss, norm, recent=recent, threshold=5.0):
        bad, after, told = jax.jit(judge)(
            {"loss": jnp.float32(loss), "grad_norm": jnp.float32(norm)}, recent, threshold
        )
        return bool(bad), np.asarray(after), told

    bad, after, told = judged(*values)
    assert bad
    assert [float(told["loss_z"]), float(told["grad_norm_z"])] == pytest.approx(expected, rel=1e-5)
    np.testing.assert_array_equal(after, recent)  # a bad step is no measure of later ones
    bad, after, _ = judged(*values, threshold=20.0)
    assert not bad
    np.testing.assert_array_equal(after, [*recent[1:], values])
    assert not judged(0.1, 0.01)[0]  # lower is no spike
    early = np.where(np.arange(128)[:, None] < 100, np.nan, recent).astype(np.float32)
    assert not judged(1e6, 1e6, early)[0]
    assert judged(float("inf"), 1.0, early)[0]
    assert judged(1.0, float("nan"), early)[0]


def test_the_batch_of_a_step_is_the_next_that_is_not_left_out():
    windows = merged([range(20, 22), range(3, 5), range(4, 8), range(8, 9)])
    kept = [number for number in range(40) if number not in {*range(3, 9), 20, 21}]
    assert [batch_number(step, windows) for step in range(len(kept))] == kept
    assert windows == (range(3, 9), range(20, 22))


@pytest.mark.parametrize("word", ["0", "5-4", "a", "1-", "-3"])
def test_windows_that_are_none_are_one_sentence(word):
    with pytest.raises(ConfigError, match=rf"guard\.skip_batches=7,{word} names no batches in '{word}'"):
        windows_of(("7", word))
    assert windows_of(("41-45", "60")) == [(41, 45), (60, 60)]


def test_a_journal_is_lines_of_json(tmp_path):
    (tmp_path / "rollbacks.jsonl").write_text(json.dumps({"step": 3}) + "\n")
    assert read_rollbacks(tmp_path) == [{"step": 3}]
