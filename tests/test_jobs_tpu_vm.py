"""A job on TPU VMs, from the first question to gcloud until nothing is left: against a gcloud whose hosts are processes here."""

import json
import os
import pathlib
import re
import sys
import threading
import time

import fake_gcloud
import pytest
from runs import SMALL

from launch.cli import main
from launch.jobs import code, tpu_vm
from trainer.run_folder import read_metrics

PLACE = "--zone us-east5-a --project my-project-1"


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """A folder of the fake, which is on PATH."""
    folder = tmp_path / "cloud"
    (folder / "bin").mkdir(parents=True)
    program = folder / "bin" / "gcloud"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E {fake_gcloud.__file__} {folder} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(tpu_vm, "POLL", 0.2)
    monkeypatch.setattr(tpu_vm, "LAST", 1.0)
    yield folder
    with fake_gcloud.state(folder) as known:
        for resource in known.get("resources", {}).values():
            fake_gcloud.stop_machines(folder, resource, fake_gcloud.signal.SIGKILL)


@pytest.fixture(scope="session")
def wheel():
    return code.build_wheel(None)


def known(cloud: pathlib.Path) -> dict:
    with fake_gcloud.state(cloud) as state:
        return json.loads(json.dumps(state))


def tell(cloud: pathlib.Path, **facts) -> None:
    with fake_gcloud.state(cloud) as state:
        state.update(facts)


def verbs(cloud: pathlib.Path) -> list[str]:
    return [words[3] for words in known(cloud)["calls"] if words[:3] == ["compute", "tpus", "queued-resources"]]


def words(run: pathlib.Path, *more: str) -> list[str]:
    small = f"{SMALL['griffin-tiny']} --data.batch_size 8 --eval.batches 1 --trainer.log_every 1"
    launch = f"launch griffin-tiny --on tpu-vm --topology v5p-16 --run {run} --yes {PLACE} {small}"
    return [*launch.split(), *more]


def left(cloud: pathlib.Path) -> list[int]:
    """Processes of all machines that ever were."""
    return [p for entry in pathlib.Path("/proc").iterdir() if entry.name.isdecimal() for p in with_mark(entry, cloud)]


def with_mark(entry: pathlib.Path, cloud: pathlib.Path) -> list[int]:
    try:
        return [int(entry.name)] if f"FAKE_MACHINE={cloud}".encode() in (entry / "environ").read_bytes() else []
    except OSError:
        return []


@pytest.mark.multiprocess
def test_a_preempted_job_is_replaced_resumes_and_leaves_nothing(cloud, tmp_path, monkeypatch, capfd, wheel):
    monkeypatch.setattr(code, "build_wheel", lambda ref: wheel)
    run = tmp_path / "runs" / "first"

    def preempt():
        while not (run / "metrics.jsonl").exists() or max(read_metrics(run, "train"), default=0) < 3:
            time.sleep(0.02)
        fake_gcloud.preempt(cloud, "first")

    preemption = threading.Thread(target=preempt)
    preemption.start()
    ended = main(words(run, *"--trainer.steps 12 --checkpoint.every 100 --eval.every 100".split()))
    preemption.join()
    said = capfd.readouterr()
    assert ended == 0, said.err
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 13))
    assert verbs(cloud).count("create") == verbs(cloud).count("delete") == 2
    assert known(cloud)["resources"] == {}
    assert left(cloud) == []
    assert re.search(r"resumed from step \d+", said.out)
    assert (tmp_path / "runs" / "first-job" / "logs" / "first-1.log").exists()
