"""A resumed run says that it is the one that was saved, or what of it is another; each difference is made for real."""

import re
import shutil
import signal

import pytest
from runs import finish, signal_at, start, train_command

from trainer.run_folder import read_metrics

# `podwright` on a machine that reads or restores something else than was saved.
ALTERED = """
import sys
from data.dataset import Dataset
from launch.cli import main

if sys.argv[1] == "data":
    read = Dataset.train_batch
    def other(data, step):
        batch = read(data, step)
        batch["tokens"] = batch["tokens"].copy()
        batch["tokens"][3, 5] ^= 1
        return batch
    Dataset.train_batch = other
sys.exit(main(sys.argv[2:]))
"""


def command(run, *words: str) -> list[str]:
    steps = ("--trainer.steps", "30", "--checkpoint.every", "1000", "--eval.every", "0")
    return train_command("griffin-tiny", run, *steps, *words)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was told to stop, and the step that it saved."""
    run = tmp_path_factory.mktemp("certificate") / "stopped"
    process = start(command(run))
    signal_at(process, run, 3, signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == 75, err
    return run, int(re.search(r"after step (\d+)", err)[1])


def resumed(stopped, tmp_path, *words: str, altered: str = "", **options) -> list[str]:
    """What a copy of the run says of being resumed."""
    run = tmp_path / "run"
    shutil.copytree(stopped[0], run)
    again = command(run, *words)
    if altered:
        again = [again[0], "-c", ALTERED, altered, *again[again.index("launch") + 1 :]]
    code, out, err = finish(again, **options)
    assert code == 0, err
    return [line for line in out.splitlines() if line.startswith("resume ")]


@pytest.mark.multiprocess
def test_a_resumed_run_is_verified_with_a_step_that_the_stopped_one_had_done(stopped, tmp_path):
    step = stopped[1]
    assert list(read_metrics(stopped[0], "ahead")) == [step + 1]
    assert max(read_metrics(stopped[0], "train")) == step
    assert resumed(stopped, tmp_path) == [
        f"resume verified: bit-identical (data, RNG, parameters, and step {step + 1} as logged)"
    ]


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("altered", "words", "told"),
    [
        ("data", "", r"data differs \(batch of step {step}: tokens\)"),
        ("", "--trainer.seed 1 --allow trainer.seed", r"RNG differs \(other random bits from trainer\.seed, .*\)"),
    ],
)
def test_what_differs_is_named(stopped, tmp_path, altered, words, told):
    (line,) = resumed(stopped, tmp_path, *words.split(), altered=altered)
    assert re.fullmatch("resume not verified: " + told.format(step=stopped[1]), line), line


@pytest.mark.slow
@pytest.mark.multiprocess
def test_another_program_is_named(stopped, tmp_path):
    """Microbatches add up in another order, and a run may change their number."""
    (line,) = resumed(stopped, tmp_path, "--trainer.microbatches", "4")
    assert re.fullmatch(
        rf"resume not verified: step {stopped[1] + 1} gives (loss|grad_norm) \S+, the log has \S+; data, RNG and parameters "
        r"are bit-identical; compiler differs: program \w+ → \w+",
        line,
    ), line


@pytest.mark.slow
@pytest.mark.multiprocess
def test_another_mesh_is_verified_to_rounding(stopped, tmp_path):
    (line,) = resumed(stopped, tmp_path, "--mesh.simulated_devices", "2")
    step = stopped[1] + 1
    assert re.fullmatch(
        r"resume verified: data, RNG and parameters are bit-identical; on another mesh \(mesh 1 cpu device → 2 cpu devices.*\) "
        rf"step {step} has the logged loss to 1e-6",
        line,
    ), line


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_log_that_ends_with_the_save_is_no_proof(stopped, tmp_path):
    file = stopped[0] / "metrics.jsonl"
    whole = file.read_text()
    file.write_text("".join(line for line in whole.splitlines(keepends=True) if '"ahead"' not in line))
    try:
        (line,) = resumed(stopped, tmp_path)
    finally:
        file.write_text(whole)
    assert line == (
        f"resume not verified by a step: the log has none after {stopped[1]}; data, RNG and parameters are bit-identical"
    )
