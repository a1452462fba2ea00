"""Sweeps: what is in them, how long it trains, and that the runs all come to an end whatever happens to them."""

import json
import os
import pathlib
import signal
import sys
import types

import numpy as np
import pytest
from runs import SMALL, finish, signal_at, start

from configs import EXPERIMENTS
from configs.fields import fields_of, values_of
from configs.overrides import resolve
from configs.schema import ConfigError
from launch import sweeps
from launch.pool import DIVERGED, DONE, FAILED, Member, run_all
from launch.sweep import folder_name, labels_of, main
from launch.sweeps.grids import changed, grid, random, together
from launch.sweeps.planners import epochs, flops_per_step, isoflop, ladder, parameters
from trainer.run_folder import read_metrics

TINY = EXPERIMENTS["griffin-tiny"]()


def rates_and_steps(configs) -> list[tuple[float, int]]:
    return [(config.optimizer.learning_rate, config.trainer.steps) for config in configs]


# --- what is in a sweep -----------------------------------------------------------------------------------------------


def test_a_grid_has_every_combination_and_pairs_have_none_but_their_own():
    values = {"optimizer.learning_rate": [0.1, 0.2], "trainer.steps": [100, 200]}
    assert rates_and_steps(grid(TINY, values)) == [(0.1, 100), (0.1, 200), (0.2, 100), (0.2, 200)]
    assert rates_and_steps(together(TINY, values)) == [(0.1, 100), (0.2, 200)]
    with pytest.raises(ValueError, match=r"shorter|longer"):
        list(together(TINY, values | {"trainer.steps": [100]}))


def test_random_rates_are_even_in_the_logarithm():
    ranges = {"optimizer.learning_rate": (1e-4, 1e-2)}
    drawn = [config.optimizer.learning_rate for config in random(TINY, ranges, 400, seed=3)]
    assert min(drawn) >= 1e-4
    assert max(drawn) < 1e-2
    assert abs(np.mean(np.array(drawn) < 1e-3) - 0.5) < 0.1  # four standard errors
    assert drawn == [config.optimizer.learning_rate for config in random(TINY, ranges, 400, seed=3)]


def test_a_field_that_does_not_exist_is_told_with_the_nearest():
    with pytest.raises(ConfigError, match=r"learning_rate"):
        changed(TINY, {"optimizer.learning_rat": 0.1})


FAMILIES = ("griffin-tiny", "gemma-tiny", "nfnet-tiny", "hawk-100m", "transformer-100m", "griffin-1b", "nfnet-f0")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_budget_buys_as_many_steps_as_it_pays_for(name):
    config = EXPERIMENTS[name]()
    budgets = [1e3 * flops_per_step(config), 4321.4 * flops_per_step(config)]
    assert [planned.trainer.steps for planned in isoflop([config], budgets)] == [1000, 4321]


@pytest.mark.parametrize(
    ("name", "count"),
    # Without the table: section 2.1 of the Griffin paper's sizes, in millions; DeepMind's NFNet-F0 has 71.5 million.
    [("griffin-100m", 89e6), ("hawk-400m", 375e6), ("transformer-1b", 1.120e9), ("nfnet-f0", 71.5e6)],
)
def test_parameters_are_the_published_ones(name, count):
    assert parameters(EXPERIMENTS[name]()) == pytest.approx(count, rel=0.01)


@pytest.mark.parametrize("name", ["griffin-100m", "gemma-2b", "nfnet-f0"])
def test_a_ladder_gives_each_parameter_its_share(name):
    config = EXPERIMENTS[name]()
    for ratio, planned in zip((5, 20), ladder([config], (5, 20)), strict=True):
        rows = planned.data.batch_size * getattr(planned.data, "sequence_length", 1)
        assert planned.trainer.steps * rows == pytest.approx(ratio * parameters(config), rel=1e-3)


def test_epochs_are_passes_over_the_examples():
    found = epochs([EXPERIMENTS["nfnet-tiny"]()], 1423, (4, 32))
    assert [config.trainer.steps for config in found] == [round(4 * 1423 / 64), round(32 * 1423 / 64)]


def test_warm_up_is_a_tenth_of_a_short_run_at_most():
    (short,) = isoflop([TINY], [100 * flops_per_step(TINY)])
    (long,) = isoflop([TINY], [1e5 * flops_per_step(TINY)])
    assert (short.optimizer.warmup_steps, long.optimizer.warmup_steps) == (10, TINY.optimizer.warmup_steps)


def test_a_budget_of_too_few_steps_is_refused():
    with pytest.raises(ConfigError, match="is 3 steps of griffin-tiny: at least 20"):
        list(isoflop([TINY], [3 * flops_per_step(TINY)]))


@pytest.mark.parametrize("name", sweeps.SWEEPS)
def test_members_of_a_sweep_differ_and_have_labels_and_folders_of_their_own(name):
    configs = list(sweeps.SWEEPS[name]())
    assert len(configs) > 1
    for names in (labels_of(configs), [folder_name(config) for config in configs]):
        assert len(set(names)) == len(configs)


def test_the_grid_of_convnets_is_the_papers():
    """arXiv 2310.16764: six sizes, budgets of 0.25 to 8 epochs of 976 thousand steps, learning rates in factors of two."""
    configs = list(sweeps.SWEEPS["convnets-scale-full"]())
    rates = [0.4, 0.8, 1.6]
    assert [config.optimizer.learning_rate for config in configs] == rates * 36
    assert len({config.name for config in configs}) == 6
    assert sorted({config.trainer.steps for config in configs}) == [244141, 488281, 976562, 1953125, 3906250, 7812500]
    small = list(sweeps.SWEEPS["convnets-scale"]())
    assert {config.optimizer.learning_rate for config in small} == {0.05, 0.1, 0.2}
    assert sorted({config.trainer.steps for config in small}) == [round(n * 1423 / 64) for n in (4, 8, 16, 32)]


def test_a_folder_is_named_after_what_the_config_says_wherever_that_was_said():
    words = ["--optimizer.learning_rate", "0.5"]
    one, other = resolve("griffin-tiny", words).config, changed(TINY, {"optimizer.learning_rate": 0.5})
    assert folder_name(one) == folder_name(other) != folder_name(TINY)


def test_a_field_that_comes_later_renames_no_folder_as_long_as_it_has_its_default(monkeypatch):
    before = folder_name(TINY)
    later = types.SimpleNamespace(field=types.SimpleNamespace(default=0))
    monkeypatch.setattr("launch.sweep.fields_of", lambda kinds: fields_of(kinds) | {"trainer.later": later})
    monkeypatch.setattr("launch.sweep.values_of", lambda config: values_of(config) | {"trainer.later": 0})
    assert folder_name(TINY) == before
    monkeypatch.setattr("launch.sweep.values_of", lambda config: values_of(config) | {"trainer.later": 1})
    assert folder_name(TINY) != before


# --- runs side by side ------------------------------------------------------------------------------------------------


def scripted(folder: pathlib.Path, name: str, *ends: str) -> Member:
    """Whose n-th start runs the n-th of these lines of Python."""
    program = (
        f"import os, pathlib, sys, time; tries = pathlib.Path({str(folder / name)!r}); "
        f"n = int(tries.read_text()) if tries.exists() else 0; tries.write_text(str(n + 1)); exec({ends!r}[n])"
    )
    return Member(name, [sys.executable, "-c", program], folder / f"run-{name}", folder / f"{name}.txt", steps=1)


def test_what_can_help_is_tried_again_and_no_run_harms_another(tmp_path, monkeypatch):
    monkeypatch.setattr("launch.pool.PAUSE", 0.1)
    told, refused, broken = "sys.exit(75)", "sys.exit(2)", "sys.exit(4)"
    members = [
        scripted(tmp_path, "fine", "pass"),
        scripted(tmp_path, "told to stop", told, told, told, "pass"),
        scripted(tmp_path, "refused", refused, "pass"),
        scripted(tmp_path, "not a number", "sys.exit(5)", "pass"),
        scripted(tmp_path, "store is back", broken, "pass"),
        scripted(tmp_path, "store is gone", broken, broken, broken, "pass"),
        scripted(tmp_path, "hangs", "sys.exit(124)", "sys.exit(124)", "pass"),
        scripted(tmp_path, "short of memory", "os.kill(os.getpid(), 9)", "pass"),
    ]
    assert run_all(members, 3, lambda member: None)
    found = {member.label: (member.state, member.tries, member.code) for member in members}
    assert found == {
        "fine": (DONE, 1, 0),
        "told to stop": (DONE, 4, 0),
        "refused": (FAILED, 1, 2),
        "not a number": (DIVERGED, 1, 5),
        "store is back": (DONE, 2, 0),
        "store is gone": (FAILED, 3, 4),
        "hangs": (FAILED, 2, 124),
        "short of memory": (DONE, 2, 0),
    }


def test_no_more_run_at_once_than_asked_for_each_on_cores_of_its_own(tmp_path):
    line = "print(time.time(), len(os.sched_getaffinity(0)), *os.sched_getaffinity(0), flush=True); time.sleep(0.7); print(time.time())"
    members = [scripted(tmp_path, f"run {n}", f"time.sleep(0.3); {line}") for n in range(5)]
    assert run_all(members, 2, lambda member: None)
    spans = []
    for member in members:
        start, end = member.log.read_text().splitlines()[1:]
        spans.append((float(start.split()[0]), float(end)))
        assert int(start.split()[1]) == max(1, len(os.sched_getaffinity(0)) // 2)
    at_once = [sum(a <= start < b for a, b in spans) for start, _ in spans]
    assert max(at_once) == 2


def test_one_runs_alone_while_memory_is_short(tmp_path, monkeypatch):
    monkeypatch.setattr("launch.pool.memory_left", lambda: 0.0)
    seen = []
    members = [scripted(tmp_path, f"run {n}", "time.sleep(0.6)") for n in range(3)]

    def changed(member):
        seen.append(sum(m.process is not None for m in members))

    assert run_all(members, 3, changed)
    assert max(seen) == 1


# --- the command ------------------------------------------------------------------------------------------------------

SMALLEST = resolve("griffin-tiny", [*SMALL["griffin-tiny"].split(), "--eval.batches", "1", "--trainer.log_every", "1"])


@pytest.fixture
def three(monkeypatch):
    """A sweep of three short runs."""

    def sweep():
        """For tests."""
        short = changed(SMALLEST.config, {"trainer.steps": 4, "optimizer.warmup_steps": 1})
        yield from grid(short, {"optimizer.learning_rate": [1e-3, 2e-3, 3e-3]})

    monkeypatch.setitem(sweeps.SWEEPS, "three", sweep)
    return sweep


def test_a_sweep_runs_what_is_missing_and_then_nothing(three, tmp_path, capsys):
    folders = [tmp_path / folder_name(config) for config in three()]
    assert main(["three", "--to", str(tmp_path), "--dry-run"]) == 0
    assert "3 runs" in capsys.readouterr().out
    assert not folders[0].exists()
    assert main(["three", "--to", str(tmp_path)]) == 0
    assert "3 of 3 runs are done" in capsys.readouterr().out
    for folder, rate in zip(folders, (1e-3, 2e-3, 3e-3), strict=True):
        assert json.loads((folder / "config.json").read_text())["optimizer"]["learning_rate"] == rate
        assert sorted(read_metrics(folder, "train")) == [1, 2, 3, 4]
        assert list(read_metrics(folder, "eval")) == [4]
    logs = {log: log.read_text() for log in tmp_path.glob("logs/*.txt")}
    assert len(logs) == 3
    assert main(["three", "--to", str(tmp_path)]) == 0
    assert {log: log.read_text() for log in logs} == logs  # none was even started


def test_what_failed_is_told_with_its_sentence_and_its_exit_code(three, tmp_path, capsys):
    words = ["three", "--to", str(tmp_path), "--model.vocab_size", "100"]  # fewer than the 257 ids of the bytes
    assert main(words) == 2
    said = capsys.readouterr().out
    assert said.count("failed: griffin-tiny") == 3
    assert "model.vocab_size" in said


TWO = """
import sys
from configs.overrides import resolve
from launch import sweeps
from launch.sweep import main
from launch.sweeps.grids import grid
def sweep():
    yield from grid(resolve("griffin-tiny", sys.argv[2:]).config, {"optimizer.learning_rate": [1e-3, 2e-3]})
sweeps.SWEEPS["two"] = sweep
sys.exit(main(["two", "--to", sys.argv[1], "--at-once", "1"]))
"""


@pytest.mark.multiprocess
def test_a_stopped_sweep_saves_and_goes_on(tmp_path):
    words = [*SMALL["griffin-tiny"].split(), "--trainer.log_every", "1", "--trainer.steps", "60", "--eval.batches", "1"]
    command = [sys.executable, "-c", TWO, str(tmp_path), *words]
    (first, _) = grid(resolve("griffin-tiny", words).config, {"optimizer.learning_rate": [1e-3, 2e-3]})
    folder = tmp_path / folder_name(first)
    process = start(command)
    signal_at(process, folder, 5, signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 75
    assert "stopped; continue with: podwright sweep two" in out
    stopped_at = max(read_metrics(folder, "train"))
    assert 5 <= stopped_at < 60
    code, out, _ = finish(command)
    assert code == 0
    assert "2 of 2 runs are done" in out
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 61))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["thre"], "there is no sweep 'thre', perhaps three"),
        (["three", "--at-once", "none"], "--at-once none is not a number of runs"),
        (["three", "--optimizer.learning_rate", "0.1"], "members 1 and 2 of the sweep are the same config"),
        (["three", "--trainer.stepps", "3"], "trainer.steps"),
    ],
)
def test_mistakes_are_one_sentence(three, words, sentence, tmp_path):
    with pytest.raises(ConfigError, match=sentence):
        main([*words, "--to", str(tmp_path)])
    assert not list(tmp_path.iterdir())
