"""A run that was killed and started again is, bit for bit, the run that was never killed."""

import signal

import numpy as np
import pytest
from runs import finish, saved_arrays, signal_at, start, train_command

from trainer.run_folder import read_metrics

MESH = "--mesh.simulated_devices 8 --mesh.data 2 --mesh.fsdp 2 --mesh.tensor 2"
REST = {"nfnet-tiny": "--optimizer.ema 0.999 --optimizer.sam_rho 0.05 --optimizer.sam_share 0.5"}
CASES = [
    pytest.param("griffin-tiny", "", id="griffin-tiny"),
    pytest.param("nfnet-tiny", "", id="nfnet-tiny", marks=pytest.mark.slow),
    pytest.param("gemma-tiny", "", id="gemma-tiny", marks=pytest.mark.slow),
    pytest.param("lru-tiny", "", id="lru-tiny", marks=pytest.mark.slow),
    pytest.param("lra-matching-tiny", "", id="lra-matching-tiny", marks=pytest.mark.slow),
    pytest.param("griffin-tiny", MESH, id="griffin-tiny on 8 devices", marks=pytest.mark.slow),
]


@pytest.mark.multiprocess
@pytest.mark.parametrize(("name", "mesh"), CASES)
def test_a_killed_run_continues_bit_for_bit(tmp_path, name, mesh):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = ["--trainer.steps", "40", "--checkpoint.every", "10", "--eval.every", "20", *mesh.split()]
    options += REST.get(name, "").split()
    assert finish(train_command(name, whole, *options))[0] == 0

    process = start(train_command(name, killed, *options))
    # The save of step 20 waits for that of step 10 to be committed; its own may or may not be.
    signal_at(process, killed, 20, signal.SIGKILL, kind="save")
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    reached = max(read_metrics(killed, "train"))
    assert 20 <= reached < 40

    code, out, err = finish(train_command(name, killed, *options))
    assert code == 0, err
    assert any(f"resumed from step {step}" in out for step in (10, 20, 30))

    expected, got = (read_metrics(run, "train") for run in (whole, killed))
    assert list(expected) == list(got) == list(range(1, 41))
    for step in expected:
        for key in ("loss", "grad_norm", "learning_rate"):
            assert got[step][key] == expected[step][key], f"{key} of step {step}"
    evaluations = [read_metrics(run, "eval")[40] for run in (whole, killed)]
    assert evaluations[0] == evaluations[1]

    expected, got = saved_arrays(whole, 40), saved_arrays(killed, 40)
    assert expected.keys() == got.keys()
    for key in expected:
        assert expected[key].dtype == got[key].dtype
        assert expected[key].tobytes() == got[key].tobytes(), key
    moved = [key for key in expected if not np.array_equal(expected[key], saved_arrays(whole, 30)[key])]
    assert len(moved) > len(expected) / 2  # it was still learning: equality says something
