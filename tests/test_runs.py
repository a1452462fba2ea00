"""What `podwright runs` says of runs is what they logged, and an archived run is the same run."""

import hashlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import pytest
from cloud import cloud
from runs import finish, signal_at, start, train_command
from test_bad_input import contents, refused

from launch import archive
from launch.cli import main
from launch.curves import BINS, draw
from launch.run_state import continuing, last_records, read_state
from launch.runs import draw_losses
from launch.studies.study import new_figure
from trainer.run_folder import kept_still
from trainer.storage import StorageError

OPTIONS = ("--trainer.steps", "6", "--checkpoint.every", "3", "--eval.every", "2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """runs/a, trained; runs/papers, no run; runs/b, a copy that says it had another learning rate."""
    place = tmp_path_factory.mktemp("house") / "runs"
    code, out, err = finish(train_command("griffin-tiny", place / "a", *OPTIONS))
    assert code == 0, err
    (place / "printed.txt").write_text(out)
    (place / "papers").mkdir()
    shutil.copytree(place / "a", place / "b")
    text = (place / "b" / "config.json").read_text()
    (place / "b" / "config.json").write_text(text.replace('"learning_rate": 0.003', '"learning_rate": 0.01'))
    return place


def logged(run: pathlib.Path, kind: str) -> list[dict]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == kind]


def listed(capsys, folder) -> dict[str, list[str]]:
    """The cells of `runs list` by the run's name."""
    capsys.readouterr()
    assert main(["runs", "list", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    return {cells[0]: cells[1:] for cells in (re.split(" {2,}", line) for line in lines)}


def test_the_list_has_what_the_logs_have(folder, capsys):
    found = listed(capsys, folder)
    assert found["run"] == ["config", "state", "step", "loss", "held-out", "goodput", "age"]
    config, state, step, loss, held_out, goodput, _ = found["a"]
    assert (config, state, step) == ("griffin-tiny", "done", "6/6")
    assert float(loss) == pytest.approx(logged(folder / "a", "train")[-1]["loss"], abs=1e-4)
    assert float(held_out) == pytest.approx(logged(folder / "a", "eval")[-1]["loss"], abs=1e-4)
    rows = [json.loads(line) for line in (folder / "a" / "ledger.jsonl").read_text().splitlines()]
    training = sum(row["seconds"].get("step", 0.0) for row in rows)
    assert goodput == f"{100 * training / (rows[-1]['end'] - rows[0]['start']):.1f}%"
    assert "2 runs in" in " ".join(found)
    assert "papers" not in found


def test_the_state_of_a_run_is_read_off_what_it_left(folder, tmp_path, capsys):
    def variant(name: str, *more: dict, saved: bool = False) -> None:
        shutil.copytree(folder / "a", tmp_path / name)
        if not saved:
            shutil.rmtree(tmp_path / name / "checkpoints" / "6")
        with open(tmp_path / name / "metrics.jsonl", "a") as log:
            log.writelines(json.dumps(record) + "\n" for record in more)

    variant("failed")
    variant("diverged", {"kind": "train", "step": 7, "loss": None, "grad_norm": None})
    variant("stopped", {"kind": "ahead", "step": 7, "loss": 1.0})
    variant("rolled-back", {"kind": "rollback", "step": 3, "bad_step": 6})
    variant("gone-on", {"kind": "rollback", "step": 3, "bad_step": 6}, {"kind": "train", "step": 4, "loss": 9.5})
    variant("whole", saved=True)
    variant("broken", saved=True)
    (tmp_path / "broken" / "config.json").write_text("{")
    bad = [{"kind": "train", "step": step, "loss": None} for step in (7, 8, 9)]
    variant("skipped", *bad[:2])
    variant("skipped-too-many", *bad)
    for name in ("skipped", "skipped-too-many"):
        file = tmp_path / name / "config.json"
        text = file.read_text().replace('"policy": "abort"', '"policy": "skip"')
        file.write_text(text.replace('"limit": 5', '"limit": 2'))
    variant("imported")
    (tmp_path / "imported" / "checkpoints" / "3").rename(tmp_path / "imported" / "checkpoints" / "0")
    (tmp_path / "imported" / "metrics.jsonl").unlink()
    variant("new")
    for name in ("metrics.jsonl", "ledger.jsonl"):
        (tmp_path / "new" / name).unlink()
    with open(tmp_path / "whole" / "metrics.jsonl", "a") as log:
        log.write('{"kind": "tra')  # what a kill leaves
    found = listed(capsys, tmp_path)
    states = {name: cells[1] for name, cells in found.items() if len(cells) == 7}
    assert states.pop("run") == "state"
    assert states == {
        "failed": "failed",
        "diverged": "diverged",
        "stopped": "preempted",
        "rolled-back": "failed",
        "gone-on": "failed",
        "whole": "done",
        "skipped": "failed",
        "skipped-too-many": "diverged",
        "imported": "imported",
        "new": "failed",
    }
    assert found["diverged"][2:4] == ["7/6", "not finite"]
    assert found["rolled-back"][2] == "3/6"
    assert found["rolled-back"][4] == f"{logged(folder / 'a', 'eval')[0]['loss']:.5g}"  # that of step 2
    assert found["gone-on"][2:4] == ["4/6", "9.5"]
    assert found["new"][2:6] == ["0/6", "-", "-", "-"]
    assert found["broken"][1].startswith("unreadable: config.json is not JSON")


def test_a_long_log_is_read_from_its_end(tmp_path):
    file = tmp_path / "metrics.jsonl"
    with file.open("w") as log:
        for step in range(1, 30_001):
            log.write(json.dumps({"kind": "train", "step": step, "loss": 1 / step, "padding": "x" * 60}) + "\n")
            if step in (10, 29_000):
                log.write(json.dumps({"kind": "eval", "step": step, "loss": 2.0}) + "\n")
    from etils import epath

    few = last_records(epath.Path(file))
    assert few[-1]["step"] == 30_000
    assert 1000 < len(few) < 15_000
    with file.open("a") as log:  # the end has no evaluation that counts any more
        log.write(json.dumps({"kind": "rollback", "step": 28_000}) + "\n")
    records = last_records(epath.Path(file))
    assert [r["step"] for r in records if r["kind"] == "eval"] == [10]
    assert max(r["step"] for r in records if r["kind"] == "train") == 28_000


def test_the_command_that_continues_means_the_same_config(folder):
    from configs.overrides import resolve

    for run in ("a", "b"):
        it = read_state(folder / run)
        words = " ".join(continuing(it.config, it.run)).split()
        assert words[:3] == ["podwright", "train", "griffin-tiny"]
        found = resolve("griffin-tiny", words[3:], {"run": "DIR"})
        assert found.options == {"run": str(folder / run)}
        assert found.config == it.config


def test_compare_says_what_differs_and_draws_what_was_logged(folder, tmp_path, capsys):
    assert main(["runs", "compare", str(folder / "a"), str(folder / "b")]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^optimizer.learning_rate +0.003 +0.01 +recompiles, changes the result$", out, re.M)
    last, tested = logged(folder / "a", "train")[-1], logged(folder / "a", "eval")[-1]
    for name, value in (("loss", last["loss"]), ("grad_norm", last["grad_norm"]), ("held-out loss", tested["loss"])):
        (line,) = re.findall(rf"^{name} +(\S+) +(\S+)$", out, re.M)
        assert list(map(float, line)) == pytest.approx([value, value], rel=1e-4)
    assert out.splitlines()[-1] == f"plot {folder / 'compare-a-b.svg'}"
    assert (folder / "compare-a-b.svg").read_text().count("<svg") == 1

    figure = new_figure()
    draw_losses(figure, ["a", "b"], [read_state(folder / "a"), read_state(folder / "b")])
    flops = float(re.search(r"step +512 tokens, (\S+) FLOPs", (folder / "printed.txt").read_text())[1])
    for axis, kind, unit in zip(figure.axes, ("train", "train", "eval", "eval"), (1, flops, 1, flops), strict=True):
        records = logged(folder / "a", kind)
        for line in axis.lines:
            assert line.get_xdata() == pytest.approx([unit * record["step"] for record in records], rel=5e-3)
            assert list(line.get_ydata()) == [record["loss"] for record in records]

    assert main(["runs", "compare", str(folder / "a"), str(folder / "b"), "--to", str(tmp_path / "plot.png")]) == 0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_long_curve_is_few_points_of_which_none_is_lost():
    import numpy as np

    values = np.random.default_rng(0).normal(size=100_003)
    axis = new_figure().subplots()
    draw(axis, (np.arange(len(values)) + 1.0, values), "#000000")
    (line,), (band,) = axis.lines, axis.collections
    assert len(line.get_xdata()) == BINS
    counts = len(values) / BINS
    assert np.mean(line.get_ydata()) == pytest.approx(values.mean(), abs=3 / counts)
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (values.min(), values.max())


def test_tail_tells_the_last_records(folder, capsys):
    assert main(["runs", "tail", str(folder / "a"), "-n", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    records = [json.loads(line) for line in (folder / "a" / "metrics.jsonl").read_text().splitlines()][-3:]
    for line, record in zip(lines, records, strict=True):
        kind, step, *values = re.split(" {2,}", line)
        assert (kind, step) == (record["kind"], f"step {record['step']}")
        assert len(values) == len(record) - 2
        for value in values:
            name, number = value.split()
            assert float(number.replace(",", "")) == pytest.approx(record[name], rel=1e-4)
    assert main(["runs", "tail", str(folder / "a"), "-n", "0", "--follow"]) == 0  # it lives no more
    assert capsys.readouterr().out == ""


def test_an_archive_is_the_same_run_and_the_source_goes_only_when_asked(folder, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(folder / "a", run)
    (run / "notes.txt~").write_text("what a listing may leave out")
    before = contents(run)
    assert main(["runs", "archive", str(run), "--to", str(tmp_path / "kept" / "a")]) == 0
    assert contents(run) == before
    copied = contents(tmp_path / "kept" / "a")
    manifest = json.loads(copied.pop("archive.json"))
    assert copied == {name: content for name, content in before.items() if name != "lock"}
    assert manifest["source"] == str(run)
    assert manifest["files"] == {name: [len(c), hashlib.sha256(c).hexdigest()] for name, c in copied.items()}

    assert main(["runs", "archive", str(run), "--to", str(tmp_path / "moved"), "--remove"]) == 0
    assert not run.exists()
    moved = contents(tmp_path / "moved")
    assert {name: c for name, c in moved.items() if name != "archive.json"} == copied
    capsys.readouterr()
    assert main(["checkpoint", "verify", str(tmp_path / "moved")]) == 0
    assert capsys.readouterr().out.count("every array is finite and as it was saved") == 2
    assert listed(capsys, tmp_path)["moved"][1] == "done"


def test_an_archive_that_was_killed_is_no_run_and_goes_on(folder, tmp_path, capsys, monkeypatch):
    copy, count = archive.copied, 0

    def fails_late(source, target):
        nonlocal count
        count += 1
        if count > 20:
            raise OSError(28, "No space left on device")
        return copy(source, target)

    monkeypatch.setattr(archive, "copied", fails_late)
    command = ["runs", "archive", str(folder / "a"), "--to", str(tmp_path / "a"), "--remove"]
    said = refused(capsys, command, code=4)
    assert said.endswith("No space left on device; what is there so far is kept, the same command goes on")
    assert (folder / "a" / "config.json").exists()
    assert refused(capsys, ["runs", "tail", str(tmp_path / "a")], code=4).startswith(f"{tmp_path / 'a'} is not a")
    monkeypatch.setattr(archive, "copied", copy)
    assert main(command[:-1]) == 0
    assert contents(tmp_path / "a").keys() - {"archive.json"} == contents(folder / "a").keys() - {"lock"}


def test_nothing_is_removed_unless_the_copy_is_the_same(folder, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(folder / "a", run)
    whole = archive.sum_of

    def damaged(file):
        return "0" * 64 if file.name == "log.txt" else whole(file)

    monkeypatch.setattr(archive, "sum_of", damaged)
    said = refused(capsys, ["runs", "archive", str(run), "--to", str(tmp_path / "x"), "--remove"], code=4)
    assert (
        said
        == f"{tmp_path / 'x' / 'log.txt'}, read back, is not what {run / 'log.txt'} is: start the same command again"
    )
    assert {k: v for k, v in contents(run).items() if k != "lock"} == {
        k: v for k, v in contents(folder / "a").items() if k != "lock"
    }
    monkeypatch.setattr(archive, "sum_of", whole)
    copy = archive.copied

    def meanwhile(source, target):
        if source.name == "log.txt":
            with open(run / "metrics.jsonl", "a") as log:
                log.write("\n")
        return copy(source, target)

    monkeypatch.setattr(archive, "copied", meanwhile)
    said = refused(capsys, ["runs", "archive", str(run), "--to", str(tmp_path / "y"), "--remove"], code=4)
    assert said == f"{run} changed while it was copied: somebody is training in it; nothing was removed"
    assert (run / "config.json").exists()
    (run / "more").symlink_to(folder)
    said = refused(capsys, ["runs", "archive", str(run), "--to", str(tmp_path / "z")], code=4)
    assert said == f"{run / 'more'} is a link or no file: put a file in its place first"


@pytest.mark.parametrize("lost", ["log.txt", "checkpoints"])
def test_a_copy_that_lost_something_after_it_was_read_back_removes_nothing(folder, tmp_path, capsys, monkeypatch, lost):
    run, copy = tmp_path / "run", archive.copied
    shutil.copytree(folder / "a", run)
    before = contents(run)

    def loses(source, target):
        found = copy(source, target)
        if source.name == "config.json":  # the last one
            whole = target.parent / lost
            whole.unlink() if whole.is_file() else shutil.rmtree(whole)
        return found

    monkeypatch.setattr(archive, "copied", loses)
    said = refused(capsys, ["runs", "archive", str(run), "--to", str(tmp_path / "x"), "--remove"], code=4)
    assert "nothing was removed" in said
    assert contents(run) == before


def test_mistakes_are_one_sentence(folder, tmp_path, capsys):
    a, b = str(folder / "a"), str(folder / "b")
    for command in (["tail"], ["archive", "--to", str(tmp_path / "x")], ["compare", a]):
        said = refused(capsys, ["runs", command[0], str(folder / "paper"), *command[1:]], code=4)
        assert said == f"{folder / 'paper'} is not a podwright run: there is no {folder / 'paper' / 'config.json'}"
    shutil.copytree(folder / "a", tmp_path / "long-context")
    said = refused(capsys, ["runs", "tail", str(tmp_path / "long-contxt")], code=4)
    assert said.endswith(f"there is no {tmp_path / 'long-contxt' / 'config.json'}, perhaps {tmp_path / 'long-context'}")
    said = refused(capsys, ["runs", "tail", str(folder / "papers")], code=4)
    assert said == f"{folder / 'papers'} is not a podwright run: there is no {folder / 'papers' / 'config.json'}"
    said = refused(capsys, ["runs", "compare", a, a], code=2)
    assert said == f"podwright runs compare needs two runs or more, but only {a} was given"
    said = refused(capsys, ["runs", "compare", a, b, "--to", f"{b}/plot.svg"], code=2)
    assert said == f"--to {b}/plot.svg is in the folder of a run, {b}: give a file outside"
    said = refused(capsys, ["runs", "compare", a, b, "--to", str(folder / "nowhere" / "plot.svg")], code=4)
    assert said == f"{folder / 'nowhere' / 'plot.svg'} cannot be written: No such file or directory"
    said = refused(capsys, ["runs", "compare", a, b, "--to", "thesis.tex"], code=2)
    assert said == "--to thesis.tex is neither of .svg nor of .png, the kinds of plot there are"
    said = refused(capsys, ["runs", "archive", a, "--to", str(folder / "papers" / ".." / "b")], code=2)
    assert said.startswith(f"--to {folder / 'papers' / '..' / 'b'} exists already and holds checkpoints, config.json")
    (folder / "file").write_text("precious")
    said = refused(capsys, ["runs", "archive", a, "--to", str(folder / "file")], code=2)
    assert said == f"--to {folder / 'file'} exists already: give a new folder"
    said = refused(capsys, ["runs", "archive", a, "--to", f"{a}/kept"], code=2)
    assert said == f"--to {a}/kept and the run {a} are one in the other: give a folder elsewhere"
    said = refused(capsys, ["runs", "list", str(folder.parent / "rnus")], code=2)
    assert said == f"there is no folder {folder.parent / 'rnus'}, perhaps {folder}"
    said = refused(capsys, ["runs", "list", a], code=2)
    assert said == f"{a} is a run, not a folder of runs: podwright runs list {folder}"
    assert refused(capsys, ["runs", "tial", a], code=2).startswith("there is no command runs 'tial', perhaps tail")
    assert (folder / "file").read_text() == "precious"


@pytest.mark.multiprocess
def test_a_living_run_is_running_until_it_is_told_to_stop(folder, tmp_path, capsys):
    run = tmp_path / "live"
    words = ("--trainer.steps", "100000", "--checkpoint.every", "50000", "--eval.every", "50000")
    nowhere = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}  # a pipe that nobody reads would stop it
    process = start(train_command("griffin-tiny", run, *words), **nowhere)
    follower = None
    try:
        signal_at(process, run, 2, 0)
        assert listed(capsys, tmp_path)["live"][1] == "running"
        said = refused(capsys, ["runs", "archive", str(run), "--to", str(tmp_path / "x")], code=4)
        assert said == f"process {process.pid} on {os.uname().nodename} is training in {run}: stop it first"
        assert not (tmp_path / "x").exists()
        follower = start([sys.executable, "-m", "launch", "runs", "tail", str(run), "-n", "1", "--follow"])
        assert follower.stdout.readline().startswith("train   step ")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=300) == 75
        out, err = follower.communicate(timeout=300)
        assert follower.returncode == 0, err
    finally:
        for one in filter(None, (process, follower)):
            one.kill()
            one.communicate()
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(out.splitlines()) > 1
    assert out.splitlines()[-1].startswith(f"ahead   step {records[-1]['step']}  ")
    last = [record for record in records if record["kind"] == "train"][-1]["step"]
    assert listed(capsys, tmp_path)["live"][1:3] == ["preempted", f"{last}/100000"]


def test_who_archives_keeps_others_from_training(folder):
    with kept_still(folder / "a"):
        assert listed_state(folder / "a") == "done"
        with pytest.raises(StorageError, match=r"lock cannot be locked"), kept_still(folder / "a"):
            pass


def listed_state(run: pathlib.Path) -> str:
    return read_state(run).state


@pytest.mark.multiprocess
def test_runs_on_gs(folder, tmp_path):
    """Up, listed, reported on, down again: the same bytes."""
    with cloud() as store:
        environment = store.environment | {"HOME": str(tmp_path)}
        script = tmp_path / "script.py"
        script.write_text(
            "import sys\nfrom launch.cli import main\n"
            "for line in sys.stdin.read().splitlines():\n"
            "    print('$', line, flush=True)\n    code = main(line.split())\n    print('->', code, flush=True)\n"
        )
        address = "gs://bucket/runs"
        lines = [
            f"runs archive {folder / 'a'} --to {address}/a",
            f"runs archive {folder / 'b'} --to {address}/a",
            f"runs list {address}",
            f"runs tail {address}/a -n 2 --follow",
            f"report {address}/a",
            f"runs compare {address}/a {folder / 'b'} --to {address}/plot.svg",
            f"runs archive {address}/a --to {tmp_path / 'back'} --remove",
            f"runs list {address}",
            f"runs tail {address}/a",
        ]
        told = tmp_path / "lines"
        told.write_text("\n".join(lines))
        with told.open() as stdin:
            code, out, err = finish(
                [sys.executable, str(script)],
                env=environment | {"PYTHONPATH": str(pathlib.Path(archive.__file__).parent.parent)},
                stdin=stdin,
            )
    assert code == 0, out + err
    parts = re.split(r"^\$ .*\n", out, flags=re.M)[1:]
    codes = [int(re.search(r"^-> (\d+)", part, re.M)[1]) for part in parts]
    assert codes == [0, 2, 0, 0, 0, 0, 0, 0, 4], out + err
    assert re.search(r"^a +griffin-tiny +done +6/6 ", parts[2], re.M)
    back = contents(tmp_path / "back")
    back.pop("archive.json")
    page = back.pop("report.html").decode()
    assert page.count("<h2>") == 8
    assert "could not be made" not in page
    assert f"--run {address}/a " in page
    assert page.count("<td>not read</td>") == 2
    assert back == {name: content for name, content in contents(folder / "a").items() if name != "lock"}
    assert parts[7].startswith(f"no runs in {address}")  # the plot is there
