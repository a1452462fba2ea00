"""Every second of a run is in its ledger once, whatever ended its attempts."""

import json
import pathlib
import signal
import time

import pytest
from runs import finish, signal_at, start, train_command

from launch.cli import main
from launch.goodput import price_of, shares_of
from trainer import ledger as ledgers
from trainer import phases as phase_names
from trainer.ledger import Ledger, goodput, read_rows
from trainer.phases import COMPILE, DATA_WAIT, EVAL, IDLE, INIT, LOST, RESTORE, SAVE, STEP, Phases
from trainer.run_folder import read_metrics


class Clock:
    """Seconds that pass when told to; the wall clock can be set apart from them."""

    def __init__(self, monkeypatch):
        self.now, self.wall = 100.0, 1_000_000.0
        monkeypatch.setattr(phase_names.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(phase_names.time, "time", lambda: self.wall)

    def passes(self, seconds: float) -> None:
        self.now += seconds
        self.wall += seconds


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(ledgers, "EVERY", 3600)  # the ledger's own thread writes nothing in between
    return Clock(monkeypatch)


def attempt(clock: Clock, folder: pathlib.Path, steps: range, init=5.0, killed=False) -> None:
    """Each step 1 s after 0.25 s of waiting; an evaluation of 2 s and a save of 0.5 s after every 4th."""
    phase = Phases(clock.wall)
    clock.passes(init)
    with Ledger(phase) as ledger:
        ledger.open(folder)
        with phase(RESTORE):
            clock.passes(3.0)
        with phase(COMPILE):
            clock.passes(20.0)
        with phase(STEP):
            for step in steps:
                phase.at(step)
                with phase(DATA_WAIT):
                    clock.passes(0.25)
                clock.passes(1.0)
                if step % 4 == 0:
                    with phase(EVAL):
                        clock.passes(2.0)
                    with phase(SAVE):
                        clock.passes(0.5)
            if killed:
                ledger.book()
                clock.passes(0.75)  # what no row has
                ledger.book = lambda: None  # type: ignore[method-assign]
            else:
                phase.done()


def test_what_is_booked_is_what_passed(clock, tmp_path):
    """Steps 1 to 10, killed, 100.25 s later steps 5 to 12: 5 to 9 are trained again, which is all of step 8's evaluation."""
    attempt(clock, tmp_path, range(1, 11), killed=True)
    clock.passes(99.5)
    attempt(clock, tmp_path, range(5, 13))
    clock.wall -= 50_000  # the clock is set back: durations don't mind
    spent = goodput(list(read_rows(tmp_path)))
    expected = {
        INIT: 10.0,
        RESTORE: 6.0,
        COMPILE: 40.0,
        IDLE: 0.75 + 99.5,
        STEP: 10 + 3,
        DATA_WAIT: 0.25 * (10 + 3),
        EVAL: 2 * (2 + 1),
        SAVE: 0.5 * (2 + 1),
        LOST: 5 * 1.25 + 2.5,
    }
    assert spent.seconds == pytest.approx(expected, abs=1e-6)
    assert sum(spent.seconds.values()) == pytest.approx(spent.end - spent.start, abs=1e-3)
    assert (spent.attempts, spent.step) == (2, 12)
    assert list(spent.seconds.values()) == sorted(spent.seconds.values(), reverse=True)


def test_a_clock_set_back_and_long_rows_lose_nothing(clock, tmp_path, monkeypatch):
    monkeypatch.setattr(ledgers, "ROW_SECONDS", 10.0)
    phase = Phases(clock.wall)
    with Ledger(phase) as ledger:
        ledger.open(tmp_path)
        for _ in range(5):
            clock.passes(7.0)
            clock.wall -= 1000
            ledger.book()
    rows = list(read_rows(tmp_path))
    assert [row["end"] - row["start"] for row in rows] == [14.0, 14.0, 7.0]
    assert goodput(rows).seconds == {INIT: 35.0}
    attempt(clock, tmp_path, range(1, 2))  # by a clock that is 5,000 s behind
    spent = goodput(list(read_rows(tmp_path)))
    assert sum(spent.seconds.values()) == pytest.approx(spent.end - spent.start, abs=1e-3)
    assert spent.seconds[STEP] == pytest.approx(1.0)


def test_half_a_row_is_passed_over_and_kept(clock, tmp_path):
    attempt(clock, tmp_path, range(1, 3))
    whole = (tmp_path / ledgers.FILE).read_text()
    (tmp_path / ledgers.FILE).write_text(whole + '{"attempt": 2, "sta')
    attempt(clock, tmp_path, range(3, 4))
    assert (tmp_path / ledgers.FILE).read_text().startswith(whole + '{"attempt": 2, "sta\n')
    spent = goodput(list(read_rows(tmp_path)))
    assert sum(spent.seconds.values()) == pytest.approx(spent.end - spent.start, abs=1e-3)
    assert spent.seconds[STEP] == pytest.approx(3.0)


def test_a_killed_run_books_all_its_time_and_what_it_trained_twice(tmp_path):
    run = tmp_path / "run"
    command = train_command(
        "griffin-tiny", run, "--trainer.steps", "400", "--checkpoint.every", "20", "--eval.every", "30"
    )
    began = time.time()
    killed = start(command)
    signal_at(killed, run, 50, signal.SIGKILL)
    killed.communicate()
    trained = max(read_metrics(run, "train"))
    code, out, err = finish([*command, "--trainer.steps", str(trained + 10), "--allow", "trainer.steps"])
    ended = time.time()
    assert code == 0, err
    resumed = int(out.split("resumed from step ")[1].split()[0])
    rows = list(read_rows(run))
    spent = goodput(rows)
    assert sum(spent.seconds.values()) == pytest.approx(spent.end - spent.start, abs=1e-3)
    assert began - 0.1 < spent.start < began + 1.0  # the interpreter's own start
    assert spent.end < ended
    assert spent.attempts == 2
    assert set(spent.seconds) == set(phase_names.CAUSES)
    # What was trained again, by the other record of it.
    again = [r["step_ms"] / 1e3 for s, r in read_metrics(run, "train").items() if resumed < s <= trained]
    assert spent.seconds[LOST] == pytest.approx(sum(again), abs=1.0)
    assert spent.seconds[IDLE] < 3.0  # the second start came at once; a kill loses a second
    assert rows[-1]["step"] == trained + 10

    code, out, err = finish([*command[:3], "goodput", str(run)])
    assert code == 0, err
    assert f"goodput {100 * spent.seconds[STEP] / (spent.end - spent.start):.1f}% of" in out
    assert "2 attempts" in out
    assert (run / "goodput.svg").stat().st_size > 10_000


def test_causes_cost_what_their_devices_do(tmp_path, capsys):
    rows = [
        {"attempt": 1, "start": 0.0, "end": 3600.0, "step": 9, "seconds": {"step": 2700.0, "compile": 900.0}},
        {"attempt": 2, "start": 5400.0, "end": 7200.0, "step": 18, "seconds": {"step": 1800.0}},
    ]
    device = {"devices": 8, "device_kind": "TPU v5 lite"}
    (tmp_path / ledgers.FILE).write_text("".join(json.dumps(row | device) + "\n" for row in rows))
    assert main(["goodput", str(tmp_path)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    price = 8 * 1.20  # USD an hour
    for cause, hours, percent in (("step", 1.25, "62.5%"), ("idle", 0.5, "25.0%"), ("compile", 0.25, "12.5%")):
        assert [cause, f"{3600 * hours:,.1f}", "s", percent, "$", f"{price * hours:.2f}"] in lines
    assert price_of("TPU v5 lite") == 1.20
    assert price_of("cpu") is None
    halves = shares_of([row | device for row in rows], [(0.0, 3600.0), (3600.0, 7200.0)])
    assert halves == [pytest.approx({"step": 0.75, "compile": 0.25}), pytest.approx({"idle": 0.5, "step": 0.5})]


def test_a_run_without_a_ledger_is_told(tmp_path, capsys):
    assert main(["goodput", str(tmp_path)]) == 4
    assert f"{tmp_path} has no ledger of its time" in capsys.readouterr().err
