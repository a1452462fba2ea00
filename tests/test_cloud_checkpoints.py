"""A run on gs:// is the run of a local folder, also where the store refuses, delays, cuts and resets one answer in ten."""

import random
import re

import pytest
from cloud import cloud
from runs import finish, signal_at, start, train_command

from trainer.run_folder import read_metrics

OPTIONS = [
    "--trainer.steps",
    "12",
    "--checkpoint.every",
    "3",
    "--checkpoint.keep_last",
    "2",
    "--eval.every",
    "0",
    "--model.depth",
    "2",
]
FAULTS = [429, 503, "slow", "reset", "cut"]


def logged(text: str) -> dict[int, str]:
    """Losses as printed, by step."""
    return {int(step): loss for step, loss in re.findall(r"^step +(\d+)/\d+ +loss +([\d.]+)", text, re.MULTILINE)}


@pytest.mark.multiprocess
def test_a_run_on_gs_with_a_store_that_fails_one_time_in_ten_is_the_local_run(tmp_path, monkeypatch):
    code, out, err = finish(train_command("griffin-tiny", tmp_path / "local", *OPTIONS))
    assert code == 0, err
    with cloud() as store:
        chance = random.Random(0)
        # (Half an answer to an upload that was finished: the real store takes the upload once more, the emulator does not.)
        store.proxy.fault = lambda line: (
            chance.choice(FAULTS[: 5 if line.startswith("GET") else 4]) if chance.random() < 0.1 else None
        )
        environment = store.environment | {"HOME": str(tmp_path / "home")}
        command = train_command("griffin-tiny", "gs://bucket/runs/a", *OPTIONS)
        code, far, err = finish(command, env=environment)
        assert code == 0, err
        assert len(store.proxy.injected) > 10
        assert set(store.proxy.injected) == set(FAULTS)
        assert logged(far) == logged(out)
        assert len(logged(out)) == 12

        # On another machine: nothing of the run is there yet.
        command[command.index("12")] = "15"
        environment["HOME"] = str(tmp_path / "another home")
        code, again, err = finish([*command, "--allow", "trainer.steps"], env=environment)
        assert code == 0, err
        assert "resumed from step 12" in again
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        seen = re.findall(r"runs%2Fa%2Fcheckpoints%2F(\d+)%2Fcommit_success.txt", "\n".join(store.proxy.seen))
        assert {3, 6, 9, 12, 15} <= set(map(int, seen))
        code, told, err = finish([*command[:3], "checkpoint", "verify", "gs://bucket/runs/a"], env=environment)
        assert code == 0, err
        assert told.count("every array is finite and as it was saved") == 2
    (mirror,) = (tmp_path / "another home" / ".cache" / "podwright" / "runs").iterdir()
    expected, got = read_metrics(tmp_path / "local", "train"), read_metrics(mirror, "train")
    assert list(got) == list(range(1, 16))
    assert all(got[step]["loss"] == expected[step]["loss"] for step in expected)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_store_that_is_lost_ends_the_run_with_its_cause(tmp_path):
    with cloud() as store:
        environment = store.environment | {"HOME": str(tmp_path)}
        command = train_command("griffin-tiny", "gs://bucket/runs/b", *OPTIONS)
        command[command.index("12")] = "100000"
        job = start(command, env=environment)
        (tmp_path / ".cache" / "podwright" / "runs").mkdir(parents=True)
        mirrors = tmp_path / ".cache" / "podwright" / "runs"
        while not any(mirrors.iterdir()):
            assert job.poll() is None, job.communicate()
        signal_at(job, next(mirrors.iterdir()), 6, 0, kind="save")
        store.proxy.fault = lambda line: 403
        _, err = job.communicate(timeout=300)
    assert job.returncode == 4, err
    assert re.search(r"podwright: gs://bucket/runs/b\S* could not be [\w ]+: .+", err), err
    assert "Traceback" not in err.split("podwright: gs://")[-1]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_who_started_last_owns_a_run_on_gs(tmp_path):
    with cloud() as store:
        command = train_command("griffin-tiny", "gs://bucket/runs/c", *OPTIONS)
        command[command.index("12")] = "100000"
        first = start(command, env=store.environment | {"HOME": str(tmp_path / "first")})
        mirrors = tmp_path / "first" / ".cache" / "podwright" / "runs"
        while not (mirrors.exists() and any(mirrors.iterdir())):
            assert first.poll() is None, first.communicate()
        signal_at(first, next(mirrors.iterdir()), 3, 0, kind="save")
        second = start(command, env=store.environment | {"HOME": str(tmp_path / "second")})
        _, err = first.communicate(timeout=300)
        second.kill()
        second.communicate()
    assert first.returncode == 4
    assert "another process has taken over gs://bucket/runs/c" in err
