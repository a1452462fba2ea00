"""A run on gs:// is the run of a local folder, also where the store refuses, delays, cuts and resets one answer in ten."""

import random
import re

import pytest
from cloud import cloud
from runs import finish, signal_at, start, train_command

from configs.overrides import resolve
from configs.schema import ConfigError
from trainer.run_folder import RunFolder, read_metrics
from trainer.storage import StorageError

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


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("share", "every", "steps"),
    [pytest.param(0, 3, 6, id="sound"), pytest.param(0.1, 3, 12, id="one in ten fails", marks=pytest.mark.slow)],
)
def test_a_run_on_gs_is_the_local_run_and_goes_on_elsewhere(tmp_path, share, every, steps):
    options = f"--checkpoint.every {every} --checkpoint.keep_last 2 --eval.every 0 --model.depth 2".split()
    further = ["--trainer.steps", str(steps + every), "--allow", "trainer.steps"]
    words = [*options, "--trainer.steps", str(steps)]
    local = tmp_path / "local"
    for more in ([], further):
        code, out, err = finish(train_command("griffin-tiny", local, *words, *more))
        assert code == 0, err
    with cloud() as store:
        chance = random.Random(0)
        # (Half an answer to an upload that was finished: the real store takes the upload once more, the emulator does not.)
        store.proxy.fault = lambda line: (
            chance.choice(FAULTS[: 5 if line.startswith("GET") else 4]) if chance.random() < share else None
        )
        secret = "ya29.never-to-be-written"
        environment = store.environment | {"HOME": str(tmp_path / "home"), "GOOGLE_AUTH_TOKEN_FOR_TESTING": secret}
        command = train_command("griffin-tiny", "gs://bucket/runs/a", *words)
        code, out, err = finish(command, env=environment)
        assert code == 0, err
        assert set(store.proxy.injected) == (set(FAULTS) if share else set())

        # On another machine: nothing of the run is there yet.
        environment["HOME"] = str(tmp_path / "another home")
        code, again, error = finish([*command, *further], env=environment)
        assert code == 0, error
        assert f"resumed from step {steps}" in again
        seen = re.findall(r"runs%2Fa%2Fcheckpoints%2F(\d+)%2Fcommit_success.txt", "\n".join(store.proxy.seen))
        assert set(range(every, steps + 2 * every, every)) <= set(map(int, seen))
        code, told, error = finish([*command[:3], "checkpoint", "verify", "gs://bucket/runs/a"], env=environment)
        assert code == 0, error
        assert told.count("every array is finite and as it was saved") == 2
    (mirror,) = (tmp_path / "another home" / ".cache" / "podwright" / "runs").iterdir()
    expected, got = read_metrics(local, "train"), read_metrics(mirror, "train")
    assert list(got) == list(expected) == list(range(1, steps + every + 1))
    assert all(got[step][key] == expected[step][key] for step in expected for key in ("loss", "grad_norm"))
    written = [file.read_bytes() for file in mirror.rglob("*") if file.is_file()]
    written += [text.encode() for text in (out, err, again)]
    assert not [content for content in written if secret.encode() in content]


def test_a_folder_of_something_else_is_refused_untouched_and_a_refused_start_takes_nothing_over(tmp_path, monkeypatch):
    """In this process: nothing is trained."""
    with cloud() as store:
        for name, value in (store.environment | {"HOME": str(tmp_path)}).items():
            monkeypatch.setenv(name, value)
        (tmp_path / "papers").mkdir()
        (tmp_path / "papers" / "thesis.tex").write_text("precious")
        store.upload(tmp_path / "papers", "papers")
        config = resolve("griffin-tiny").config
        with pytest.raises(
            StorageError, match=r"gs://bucket/papers is not a podwright run \(no config\.json\) and holds thesis"
        ):
            RunFolder("gs://bucket/papers", config)
        folder = RunFolder("gs://bucket/run", config)
        folder.push(wait=True)
        (tmp_path / "other").mkdir()
        monkeypatch.setenv("HOME", str(tmp_path / "other"))  # another machine, another width
        (folder.path / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 1.0}\n')
        folder.push(wait=True)
        with pytest.raises(ConfigError, match="was started with another config"):
            RunFolder("gs://bucket/run", resolve("griffin-tiny", ["--model.width", "32"]).config)
        folder.push(wait=True)  # still its owner
        RunFolder("gs://bucket/run", config)
        with pytest.raises(StorageError, match="another process has taken over"):
            folder.push(wait=True)


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
