"""A run whose processes are killed again and again, at any moment, is bit for bit the run that nobody disturbed."""

import collections
import json
import pathlib
import random
import time

import pytest
from chaos.forks import start
from runs import saved_arrays, train_command

from trainer.run_folder import read_metrics
from trainer.saved import SavedSteps

SMALLEST = ["--model.depth", "2", "--trainer.log_every", "1000", "--eval.every", "0", "--checkpoint.keep_last", "2"]


class Job:
    """One job under attack: started, killed at a moment of the kind that is due, started again, until its steps are done."""

    def __init__(self, run: pathlib.Path, processes: int, words: list[str], chance: random.Random):
        self.run, self.processes, self.chance = run, processes, chance
        self.words = train_command("griffin-tiny", run, *words)[3:]
        self.log = run.parent / f"{run.name}.log"
        self.landed: collections.Counter[str] = collections.Counter()

    def finish(self) -> None:
        for process in self.start():
            process.join(600)
            assert process.exitcode == 0, self.tail()

    def start(self):
        self.began = time.monotonic()
        return start(self.words, self.processes, self.log)

    def attack(self, moment: str) -> bool:
        """Whether the kill came before the end."""
        processes = self.start()
        try:
            while not self.due(moment):
                if any(process.exitcode is not None for process in processes):
                    break
                time.sleep(0.002)
            time.sleep(self.chance.random() * (0.3 if moment == "any" else 0.03))
            doing = self.doing()
            victim = self.chance.choice(processes)
            victim.kill()
            victim.join()
            if victim.exitcode == 0:
                return False
            assert victim.exitcode == -9, f"exit code {victim.exitcode}: {self.tail()}"
            self.landed[doing] += 1
            return True
        finally:
            for process in processes:  # as a launcher does once one of them is gone
                process.kill()
                process.join()

    def due(self, moment: str) -> bool:
        self.aim = getattr(self, "aim", None) or (self.reached(), 1 + self.chance.randrange(6), self.chance.random())
        reached, further, share = self.aim
        there = (
            (time.monotonic() - self.began > 6 * share)
            if moment == "any"
            else any(self.run.glob("checkpoints/*.orbax-checkpoint-tmp*"))
            if moment == "save"
            else "deleting" in self.journal() and self.reached() > reached
            if moment == "deletion"
            else self.reached() >= reached + further
        )
        if there:
            self.aim = None
        return there

    def reached(self) -> int:
        file = self.run / "metrics.jsonl"
        return file.read_bytes().count(b"\n") if file.exists() else 0

    def journal(self) -> str:
        file = self.run / "checkpoints" / "journal.json"
        return file.read_text() if file.exists() else ""

    def doing(self) -> str:
        """What the disk shows of the moment."""
        if any(self.run.glob("checkpoints/*.orbax-checkpoint-tmp*")):
            return "save"
        states = json.loads(self.journal() or "{}")
        if any(state == "deleting" and (self.run / "checkpoints" / step).exists() for step, state in states.items()):
            return "deletion"
        return "commit" if "saving" in states.values() else "other"

    def tail(self) -> str:
        return "\n".join(file.read_text()[-2000:] for file in sorted(self.log.parent.glob(f"{self.log.name}.*")))


def assert_same(whole: pathlib.Path, killed: pathlib.Path, steps: int) -> None:
    expected, got = (read_metrics(run, "train") for run in (whole, killed))
    assert list(expected) == list(range(1, steps + 1))
    assert sorted(got) == list(expected)
    for step in expected:
        for key in ("loss", "grad_norm", "learning_rate"):
            assert got[step][key] == expected[step][key], f"{key} of step {step}"
    arrays = [saved_arrays(run, steps) for run in (whole, killed)]
    assert arrays[0].keys() == arrays[1].keys()
    for name, array in arrays[0].items():
        assert array.tobytes() == arrays[1][name].tobytes(), name


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("processes", "kills", "steps"),
    [
        pytest.param(1, 5, 40, id="alone"),
        pytest.param(1, 110, 900, id="alone for long", marks=pytest.mark.slow),
        pytest.param(2, 110, 900, id="two processes for long", marks=pytest.mark.slow),
    ],
)
def test_kills_at_any_moment_change_no_bit(tmp_path, processes, kills, steps):
    chance = random.Random(processes * kills)
    mesh = ["--mesh.simulated_devices", "2", "--mesh.data", "2"] if processes > 1 else []
    words = [*SMALLEST, *mesh, "--trainer.steps", str(steps), "--checkpoint.every"]
    Job(tmp_path / "whole", processes, [*words, str(steps)], chance).finish()
    job = Job(tmp_path / "killed", processes, [*words, "2"], chance)
    moments = ["step", "save", "deletion", "any"]
    done = 0
    while done < kills and job.attack(moments[done % len(moments)]):
        done += 1
    assert done == kills, f"the run ended after {done} kills: give it more steps"
    job.finish()
    print(f"{processes} processes, {done} kills: {dict(job.landed)}")
    assert_same(tmp_path / "whole", tmp_path / "killed", steps)
    assert len(SavedSteps(tmp_path / "killed" / "checkpoints").steps()) == 2
    assert not list((tmp_path / "killed" / "checkpoints").glob("*tmp*"))
    assert job.landed["save"]
