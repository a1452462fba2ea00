"""What goes wrong in a run's surroundings ends in one sentence and its exit code, and nothing saved is lost."""

import contextlib
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile

import pytest
from runs import ROOT, finish, saved_arrays, signal_at, start, train_command

from configs.overrides import resolve
from launch.cli import main
from trainer.run_folder import RunFolder, read_metrics
from trainer.storage import StorageError

NAME = "griffin-tiny"
AGAIN = "; once that is put right, continue with: podwright train .*"


def refused(capsys, arguments: list[str], code: int) -> str:
    """The sentence with which a command in this process ends."""
    assert main(arguments) == code
    said = capsys.readouterr().err
    assert said.startswith("podwright: ")
    assert said.count("\n") == 1
    return said.removeprefix("podwright: ").strip()


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


# --- before anything is trained ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("train griffin-tiny --optimizer.learnin-rate 1e-3", "perhaps --optimizer.learning_rate"),
        ("train grifin-tiny", "perhaps griffin-tiny"),
        ("train griffin-tiny --runn x", "perhaps --run"),
        ("train griffin-tiny --allow learning_rate", "perhaps optimizer.learning_rate"),
        ("config nfnet-tiny --mesh.sequence 3", "mesh.sequence=3 devices can't share the 16 rows of an image"),
        ("config nfnet-tiny --trainer.z_loss 0.1", "trainer.z_loss=0.1 contradicts model.kind='nfnet'"),
        ("sample", "required"),
        ("sample RUN --temperature -1", "--temperature -1 is out of range: 0 or more is allowed"),
        ("sample RUN --top-p 1.5", "--top-p 1.5 is out of range: above 0 and at most 1 is allowed"),
        ("sample RUN --top-k 0", "--top-k 0 is out of range: 1 or more is allowed"),
        ("sample RUN --prompt-file nowhere", "--prompt-file nowhere cannot be read: No such file or directory"),
        ("trian griffin-tiny", "perhaps train"),
    ],
)
def test_a_mistake_is_told_before_jax_is_loaded(arguments, sentence):
    program = "import sys; from launch.cli import main; code = main(sys.argv[1:]); assert 'jax' not in sys.modules; sys.exit(code)"
    ended = subprocess.run(
        [sys.executable, "-c", program, *arguments.split()], cwd=ROOT, text=True, capture_output=True
    )
    assert ended.returncode == 2, ended.stderr
    assert sentence in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_an_empty_corpus_is_named(tmp_path, capsys):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    said = refused(capsys, ["train", NAME, "--run", str(tmp_path / "run"), "--data.corpus", str(corpus)], code=3)
    assert said == f"folder {corpus} with pattern **/*.py has no file"


def test_files_that_are_not_utf8_are_counted(tmp_path, capsys):
    for i in range(3):
        (tmp_path / f"{i}.py").write_bytes(b"caf\xe9")
    said = refused(capsys, ["train", NAME, "--run", str(tmp_path / "run"), "--data.corpus", str(tmp_path)], code=3)
    assert "no usable document: skipped 3 files: 3 not UTF-8 (0.py, ...)" in said


def test_a_run_that_never_trained_may_change_its_mind(tmp_path, capsys):
    run = str(tmp_path / "run")
    refused(capsys, ["train", NAME, "--run", run, "--data.corpus", str(tmp_path / "typo")], code=3)
    (tmp_path / "typo").mkdir()
    said = refused(
        capsys, ["train", NAME, "--run", run, "--data.corpus", str(tmp_path / "typo"), "--data.seed", "1"], 3
    )
    assert said.endswith("has no file")


def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("precious")
    said = refused(capsys, ["train", NAME, "--run", str(tmp_path)], code=4)
    assert said == (
        f"{tmp_path} is not a podwright run (no config.json) and holds thesis.tex: give an empty or a new folder"
    )
    assert contents(tmp_path) == {"thesis.tex": b"precious"}


def test_a_file_is_no_run_folder(tmp_path, capsys):
    (tmp_path / "run").write_text("")
    assert refused(capsys, ["train", NAME, "--run", str(tmp_path / "run")], code=2).endswith("is a file: give a folder")


@contextlib.contextmanager
def unprivileged():
    """root may write anywhere: be nobody for a moment."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_read_only_folder_is_named():
    folder = pathlib.Path(tempfile.mkdtemp())
    folder.chmod(0o555)
    try:
        with unprivileged(), pytest.raises(StorageError, match="cannot be written: Permission denied"):
            RunFolder(folder / "run", resolve(NAME).config)
        assert contents(folder) == {}
    finally:
        shutil.rmtree(folder)


def test_meshes_and_batches_that_do_not_fit_the_devices_say_what_would(tmp_path, capsys):
    run = ["--run", str(tmp_path / "run")]
    said = refused(capsys, ["train", NAME, *run, "--mesh.data", "3"], code=2)
    assert "data 3 does not fill the 8 cpu devices here: the axes must multiply to 8" in said
    said = refused(capsys, ["train", NAME, *run, "--data.batch_size", "12"], code=2)
    assert said.startswith("data.batch_size=12 is not a multiple of 8")
    said = refused(capsys, ["train", NAME, *run, "--model.vocab_size", "200"], code=2)
    assert said == "model.vocab_size=200 does not fit the data, which needs 257"


# --- a run that exists ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> pathlib.Path:
    """A corpus and a run of 8 updates on it, saved every 4."""
    place = tmp_path_factory.mktemp("trained")
    (place / "corpus").mkdir()
    for i in range(40):
        (place / "corpus" / f"{i}.py").write_text("".join(f"x_{i} = {i * j}\n" for j in range(100)))
    code, out, err = finish(train_command(NAME, place / "run", *options(place)))
    assert code == 0, out + err
    return place


def options(place: pathlib.Path) -> list[str]:
    return ["--data.corpus", str(place / "corpus"), "--checkpoint.every", "4", "--trainer.steps", "8"]


def again(place: pathlib.Path, *overrides: str) -> list[str]:
    """The arguments of the same command, with more overrides."""
    return train_command(NAME, place / "run", *options(place), *overrides)[3:]


def test_what_it_prints(trained):
    lines = (trained / "run" / "log.txt").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("step 1/8"))
    assert first <= 25
    assert [line.split()[0] for line in lines[:4]] == ["run", "model", "mesh", "data"]
    assert lines[first - 1].startswith("compiled in ")
    steps = [line for line in lines if line.startswith("step ") and "loss" in line and "tokens/s" in line]
    assert len(steps) == 8
    assert len({len(line) for line in steps}) == 1  # aligned
    for part in ("loss", "grad", "tokens/s", " ms ", "wait", "mem", "mfu   n/a", "eta 0:"):
        assert part in steps[0]
    assert set(read_metrics(trained / "run", "save")) == {4, 8}
    assert list((trained / "run" / "tensorboard").glob("events*"))


def test_a_changed_config_is_refused_unless_allowed(trained, tmp_path, capsys):
    before = contents(trained / "run")
    said = refused(capsys, again(trained, "--optimizer.learning_rate", "0.1", "--data.seed", "3"), code=2)
    assert said == (
        f"{trained / 'run'} was started with another config: data.seed: 0 → 3; optimizer.learning_rate: 0.003 → 0.1: "
        f"give a new --run, or resume with --allow data.seed,optimizer.learning_rate"
    )
    said = refused(capsys, again(trained, "--model.mlp_width", "96", "--allow", "model.mlp_width"), code=2)
    assert "its checkpoints cannot fit: model.mlp_width: 64 → 96" in said
    after = contents(trained / "run")
    assert {k: v for k, v in after.items() if k != "lock"} == {k: v for k, v in before.items() if k != "lock"}

    shutil.copytree(trained / "run", tmp_path / "run")
    command = train_command(NAME, tmp_path / "run", *options(trained), "--trainer.steps", "10")
    code, out, err = finish([*command, "--allow", "trainer.steps"])
    assert code == 0, err
    assert "resumed from step 8" in out
    assert "changed     trainer.steps: 8 → 10" in out
    assert list(read_metrics(tmp_path / "run", "train")) == list(range(1, 11))


def test_a_finished_run_says_so(trained):
    code, out, _ = finish(train_command(NAME, trained / "run", *options(trained)))
    assert code == 0
    assert "already holds step 8 of 8" in out


def test_changed_data_is_refused(trained, capsys):
    file = trained / "corpus" / "7.py"
    kept = file.read_text()
    try:
        file.write_text(kept + "# one more\n")
        said = refused(capsys, again(trained), code=3)
    finally:
        file.write_text(kept)
    assert f"the data of {trained / 'run'} changed since it was started (7.py)" in said


def test_a_second_process_is_kept_out(trained, capsys):
    with contextlib.closing(RunFolder(trained / "run", resolve(NAME, again(trained)[4:]).config)):
        said = refused(capsys, again(trained), code=4)
    assert said == (
        f"process {os.getpid()} on {os.uname().nodename} is training in {trained / 'run'}: "
        f"stop it first, or give another --run"
    )


@pytest.mark.parametrize("damage", ["not JSON", "a field that does not exist"])
def test_a_damaged_config_is_named(trained, tmp_path, capsys, damage):
    shutil.copytree(trained / "run", tmp_path / "run")
    text = (tmp_path / "run" / "config.json").read_text()
    broken = text[:100] if damage == "not JSON" else text.replace('"mlp_width"', '"mpl_width"')
    (tmp_path / "run" / "config.json").write_text(broken)
    said = refused(capsys, train_command(NAME, tmp_path / "run", *options(trained))[3:], code=4)
    assert "config.json cannot be read back" in said
    assert (tmp_path / "run" / "config.json").read_text() == broken


def cut_short(run: pathlib.Path, step: int) -> None:
    for file in (run / "checkpoints" / str(step) / "state").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(file.read_bytes()[:500])


def test_damaged_checkpoints_are_named_and_kept(trained, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    cut_short(run, 8)
    cut_short(run, 4)
    before = contents(run / "checkpoints")
    arguments = train_command(NAME, run, *options(trained), "--trainer.steps", "10")[3:]
    said = refused(capsys, [*arguments, "--allow", "trainer.steps"], code=4)
    assert said.startswith(
        f"none of the 2 checkpoints of {run / 'checkpoints'} can be used: podwright checkpoint doctor"
    )
    assert contents(run / "checkpoints") == before


@pytest.mark.multiprocess
def test_where_only_the_newest_is_damaged_the_one_before_it_goes_on(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    cut_short(run, 8)
    damaged = contents(run / "checkpoints" / "8")
    code, out, err = finish(
        train_command(NAME, run, *options(trained), "--trainer.steps", "10", "--allow", "trainer.steps")
    )
    assert code == 0, err
    assert f"damaged: {run / 'checkpoints' / '8'} could not be read" in out
    assert "resumed from step 4" in out
    assert contents(run / "checkpoints" / "set-aside" / "8") == damaged


def test_what_is_no_run_cannot_be_sampled_or_evaluated(trained, tmp_path, capsys):
    for command in ("sample", "eval"):
        said = refused(capsys, [command, str(tmp_path)], code=4)
        assert said == f"{tmp_path} is not a podwright run: there is no {tmp_path / 'config.json'}"
    said = refused(capsys, ["sample", str(trained / "run"), "--tokens", "0"], code=2)
    assert "tokens must be at least 1" in said


# --- while it trains --------------------------------------------------------------------------------------------------


@pytest.mark.multiprocess
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_and_says_how_to_go_on(tmp_path, number):
    command = train_command(NAME, tmp_path / "run", "--trainer.steps", "2000", "--checkpoint.every", "1000")
    process = start(command)
    signal_at(process, tmp_path / "run", 3, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75
    told = err.strip().splitlines()
    assert len(told) == 1
    saved = max(read_metrics(tmp_path / "run", "save"))
    word = {signal.SIGINT: "ctrl-C", signal.SIGTERM: "SIGTERM"}[number]
    assert told[0].startswith(f"podwright: stopped by {word} after step {saved}, which is saved; continue with: ")
    assert f"podwright train {NAME} --run {tmp_path / 'run'}" in told[0]
    assert saved_arrays(tmp_path / "run", saved)["step"] == saved


@pytest.mark.multiprocess
def test_a_loss_that_is_not_finite_ends_the_run_and_is_never_saved(tmp_path):
    overrides = ["--optimizer.learning_rate", "1e30", "--optimizer.clip_norm", "0", "--optimizer.warmup_steps", "0"]
    code, _, err = finish(train_command(NAME, tmp_path / "run", *overrides, "--checkpoint.every", "1"))
    assert code == 5, err
    assert err.startswith("podwright: ")
    assert err.count("\n") == 1
    assert "at step" in err
    bad = max(read_metrics(tmp_path / "run", "train"))
    assert bad not in read_metrics(tmp_path / "run", "save")


@pytest.mark.multiprocess
def test_a_full_disk_fails_the_job_and_keeps_what_was_saved(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk]).returncode:
        pytest.skip("only root can mount a small disk")
    run = disk / "run"
    try:
        command = train_command(
            NAME, run, "--trainer.steps", "400", "--checkpoint.every", "5", "--checkpoint.keep_last", "100"
        )
        code, out, err = finish(command)
        assert code == 4, out + err
        assert re.fullmatch(rf"podwright: {run}\S* could not be [\w ]+: No space left on device{AGAIN}\n", err), err

        saved = max(int(f.name) for f in (run / "checkpoints").iterdir() if f.name.isdigit())
        arrays = saved_arrays(run, saved)
        assert arrays["step"] == saved
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        code, out, err = finish([*command[:-6], "--trainer.steps", str(saved + 2), "--allow", "trainer.steps"])
        assert code == 0, err
        assert f"resumed from step {saved}" in out
    finally:
        # Lazily: orbax's threads in this process may still hold a file that was read.
        subprocess.run(["umount", "--lazy", disk], check=True)
