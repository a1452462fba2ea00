"""Private runs from end to end: what they log and keep to themselves, where their budget ends them, and what they refuse."""

import contextlib
import json
import pathlib
import shutil
import signal

import jax
import numpy as np
import pytest
from runs import finish, open_privacy, saved_arrays, signal_at, start, train_command
from test_bad_input import refused
from test_hosts import launch_command

from configs.overrides import resolve
from data import open_data
from launch.cli import main
from sharding.mesh import one_device_mesh
from trainer.checksums import checksum
from trainer.privacy import Budget, Privacy
from trainer.run_folder import RunFolder, read_metrics

dp_accounting = pytest.importorskip("dp_accounting")

UNITS, BATCH, DELTA = 1423, 8, 1e-5  # of the digits
TINY = "--model.widths 16 --model.depths 1 --model.stem_widths 4,4,4,8 --model.group_width 4 --model.head_width 16 "
TINY += "--data.image_size 8 --optimizer.adaptive_clip 0 --optimizer.warmup_steps 1 --optimizer.schedule constant"
PRIVATE = f"--privacy.delta {DELTA} --privacy.seed 5"


def command(run: pathlib.Path, *words: str) -> list[str]:
    return train_command("nfnet-tiny", run, *f"{TINY} {PRIVATE} {' '.join(words)}".split())


def spent(steps: int, noise: float, rate: float = BATCH / UNITS, delta: float = DELTA) -> float:
    """Epsilon by dp-accounting alone: of units more or less, drawn by Poisson sampling."""
    accountant = dp_accounting.pld.PLDAccountant(
        dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=1e-4
    )
    step = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
    return float(accountant.compose(step, steps).get_epsilon(delta))


def meta(run: pathlib.Path, step: int) -> dict:
    return json.loads((run / "checkpoints" / str(step) / "meta" / "metadata").read_text())


# --- a run ------------------------------------------------------------------------------------------------------------------


STEPS, NOISE = 12, 0.8


def whole_words() -> list[str]:
    return [
        *f"--privacy.epsilon 8 --privacy.noise {NOISE} --privacy.rows 2".split(),
        *f"--trainer.steps {STEPS} --checkpoint.every 4 --checkpoint.keep_last 3".split(),
    ]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    """Most of a short run is compilation."""
    return f"--trainer.compilation_cache {tmp_path_factory.mktemp('cache')}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cache) -> pathlib.Path:
    run = tmp_path_factory.mktemp("private") / "run"
    code, out, err = finish(command(run, *whole_words(), cache))
    assert code == 0, out + err
    return run


@pytest.mark.multiprocess
def test_it_logs_what_it_spent_and_nothing_that_no_noise_hides(trained):
    records = read_metrics(trained, "train")
    assert list(records) == list(range(1, STEPS + 1))
    for step in (1, 5, STEPS):
        assert records[step]["epsilon"] == pytest.approx(spent(step, NOISE), rel=1e-4)
    private = {"loss", "clipped", "units"}
    assert not any(private & record.keys() for record in records.values())
    assert np.isfinite(read_metrics(trained, "eval")[STEPS]["loss"])  # of others' images
    lines = (trained / "log.txt").read_text().splitlines()
    steps = [line for line in lines if line.startswith("step ") and "images/s" in line]
    assert len(steps) == STEPS
    assert all("epsilon" in line and "loss" not in line for line in steps)
    assert any(
        line.startswith("privacy     epsilon 8 at delta 1e-05, noise 0.8 times the clip, rate 0.00562 of 1,423 units, ")
        and line.endswith("from privacy.seed, which whoever knows it can undo")
        for line in lines
    )


@pytest.mark.multiprocess
def test_it_keeps_its_promise_in_the_open_and_its_secret_to_itself(trained):
    promise = json.loads((trained / "privacy.json").read_text())
    assert promise.items() >= {
        "epsilon": 8, "delta": DELTA, "unit": "example", "units": UNITS, "expected_batch": BATCH, "noise": NOISE, "clip": 1.0,
        "rows_a_unit": 2, "secret_seed": False,
    }.items()  # fmt: skip
    assert promise["sampling_rate"] == BATCH / UNITS
    secret = trained / "privacy.secret"
    assert secret.stat().st_mode & 0o777 == 0o600
    told = [file for file in trained.rglob("*") if file.is_file() and file != secret]
    assert not any(secret.read_bytes() in file.read_bytes() for file in told)


@pytest.mark.multiprocess
def test_a_checkpoint_knows_what_was_spent_and_nothing_of_its_batch(trained, tmp_path):
    """Checksums of a batch would tell who knows all others whether somebody is in it."""
    for step in (4, 8, STEPS):
        saved = meta(trained, step)
        assert saved["privacy"]["stretches"] == [{"steps": step, "rate": BATCH / UNITS, "noise": NOISE}]
        assert saved["privacy"]["epsilon"] == pytest.approx(spent(step, NOISE), rel=1e-4)
        assert saved["privacy"]["delta"] == DELTA
    assert not any("noise" in name for name in saved_arrays(trained, 4))
    config = resolve("nfnet-tiny", command(tmp_path, *whole_words())[7:]).config
    with contextlib.closing(RunFolder(tmp_path / "run", config)) as folder:
        _, data = open_privacy(config, one_device_mesh(), open_data(config.data), folder)
    with jax.set_mesh(one_device_mesh()):
        noted = {name: int(checksum(jax.numpy.asarray(field))) for name, field in data.train_batch(7).items()}
    saved = meta(trained, 8)["certificate"]["data"]
    assert saved.keys() == noted.keys()
    assert not {str(value) for value in saved.values()} & {str(value) for value in noted.values()}


@pytest.mark.multiprocess
def test_a_killed_run_continues_bit_for_bit(trained, cache, tmp_path):
    """The same units, the same noise; and no step is counted twice or forgotten."""
    run = tmp_path / "run"
    process = start(command(run, *whole_words(), cache))
    signal_at(process, run, 8, signal.SIGKILL, kind="save")
    process.communicate()
    code, out, err = finish(command(run, *whole_words(), cache))
    assert code == 0, err
    at = next(step for step in (4, 8, 12) if f"resumed from step {step}" in out)
    if at < STEPS:
        assert "resume verified" in out
    expected, got = saved_arrays(trained, STEPS), saved_arrays(run, STEPS)
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert value.tobytes() == got[name].tobytes(), name
    for step, record in read_metrics(trained, "train").items():
        for name in ("grad_norm", "epsilon", "learning_rate"):
            assert read_metrics(run, "train")[step][name] == record[name], f"{name} of step {step}"
    before, after = meta(trained, STEPS)["privacy"], meta(run, STEPS)["privacy"]
    assert sum(stretch["steps"] for stretch in after["stretches"]) == STEPS
    assert after["epsilon"] == before["epsilon"]


def test_a_secret_is_drawn_once_and_kept(tmp_path):
    """As is the noise that was found; a run that has not trained may begin anew."""
    words = command(tmp_path, "--privacy.epsilon 8 --privacy.noise 0.7 --privacy.seed -1")[7:]

    def opened(run: str, *more: str):
        config = resolve("nfnet-tiny", [*words, *more]).config
        with contextlib.closing(
            RunFolder(tmp_path / run, config, allow=["privacy.noise", "privacy.epsilon"])
        ) as folder:
            return open_privacy(config, one_device_mesh(), open_data(config.data), folder)

    (first, data), (other, elsewhere) = opened("one"), opened("two")
    assert first.secret_seed
    assert len(first.secret) == 32
    assert first.secret != other.secret
    assert not np.array_equal(data.train.numbers(np.arange(500)), elsewhere.train.numbers(np.arange(500)))
    assert not np.array_equal(first.key(), other.key())
    assert json.loads((tmp_path / "one" / "privacy.json").read_text())["secret_seed"]
    assert opened("one")[0].secret != first.secret
    now, _ = opened("one")
    (tmp_path / "one" / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n')
    again, data = opened("one")
    assert again == now
    assert opened("one", "--privacy.noise", "0.1")[0] == now  # what it began with is what it goes on with
    more, _ = opened("one", "--privacy.epsilon", "9")
    assert (more.epsilon, more.noise, more.secret) == (9, now.noise, now.secret)
    record = json.loads((tmp_path / "one" / "privacy.json").read_text())
    assert (record["epsilon"], record["noise"]) == (9, now.noise)
    assert (tmp_path / "one" / "privacy.secret").stat().st_mode & 0o777 == 0o600


# --- the budget ---------------------------------------------------------------------------------------------------------------


def test_a_budget_counts_what_earlier_attempts_spent():
    """Of other noise and rates, too. 7 steps are within it, and the eighth is not."""
    noise, last = 0.5, 7
    epsilon = (spent(last, noise) + spent(last + 1, noise)) / 2
    privacy = Privacy(epsilon, DELTA, DELTA, UNITS, BATCH, noise, b"", True)
    first = Budget(privacy, 0, 4, {})
    assert first.last == 4
    again = Budget(privacy, 4, 20, first.meta(4))
    assert again.last == last
    for step in range(5, last + 1):
        assert again.epsilon(step) == pytest.approx(spent(step, noise), rel=1e-4)
    assert [stretch["steps"] for stretch in again.meta(last)["privacy"]["stretches"]] == [4, 3]
    assert Budget(privacy, last, 30, again.meta(last)).last == last
    assert Budget(privacy, 5, 30, again.meta(5)).last == last

    before = {"steps": 5, "rate": 0.02, "noise": 0.9}
    other = Budget(privacy, 5, 7, {"privacy": {"stretches": [before]}})
    assert other.last == 7
    accountant = dp_accounting.pld.PLDAccountant(
        dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=1e-4
    )
    for steps, rate, multiplier in ((5, 0.02, 0.9), (2, BATCH / UNITS, noise)):
        step = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(multiplier))
        accountant.compose(step, steps)
    assert other.epsilon(7) == pytest.approx(accountant.get_epsilon(DELTA), rel=1e-3)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_no_step_exceeds_the_budget_however_often_a_run_is_started(tmp_path, cache, capsys):
    """7 steps are within it, and the eighth is not; 4 of them are taken first. Logs what is asked for, too."""
    run, noise, last = tmp_path / "run", 0.5, 7
    epsilon = (spent(last, noise) + spent(last + 1, noise)) / 2
    words = [
        f"--privacy.epsilon {epsilon} --privacy.noise {noise} --checkpoint.every 2 --privacy.log_private true",
        cache,
    ]
    code, out, err = finish(command(run, *words, "--trainer.steps 4"))
    assert code == 0, err
    assert "the budget ends" not in out
    more = ("--trainer.steps 20", "--allow trainer.steps")
    code, out, err = finish(command(run, *words, *more))
    assert code == 0, err
    assert f"privacy     the budget ends at step {last} of 20: training does, too" in out
    assert "resumed from step 4" in out
    assert f"done: {last} steps" in out
    records = read_metrics(run, "train")
    assert list(records) == list(range(1, last + 1))
    for step, record in records.items():
        assert record["epsilon"] == pytest.approx(spent(step, noise), rel=1e-4)
        assert record["epsilon"] <= epsilon
        assert record["loss"] > 0
        assert 0 <= record["clipped"] <= 1
    assert meta(run, last)["privacy"]["stretches"] == [
        {"steps": steps, "rate": BATCH / UNITS, "noise": noise} for steps in (4, 3)
    ]
    before = saved_arrays(run, last)
    for again in (("--trainer.steps 20",), ("--trainer.steps 30", "--allow trainer.steps")):
        assert main(command(run, *words, *again)[3:]) == 0
        assert f"nothing to do: {run} already holds step {last} of {last}" in capsys.readouterr().out
    assert list(read_metrics(run, "train")) == list(range(1, last + 1))
    after = saved_arrays(run, last)
    assert all(np.array_equal(after[name], value) for name, value in before.items())


def test_noise_that_is_not_given_is_just_enough(tmp_path, capsys):
    config = resolve("nfnet-tiny", command(tmp_path, "--privacy.epsilon 2 --trainer.steps 300")[7:]).config
    with contextlib.closing(RunFolder(tmp_path / "run", config)) as folder:
        privacy, _ = open_privacy(config, one_device_mesh(), open_data(config.data), folder)
    assert spent(300, privacy.noise) <= 2 < spent(300, privacy.noise - 1e-3)
    assert privacy.steps_left([], 300) == 300
    assert spent(privacy.steps_left([], 400), privacy.noise) <= 2


# --- text, and several processes -----------------------------------------------------------------------------------------------


@pytest.mark.multiprocess
def test_language_models_train_privately_too(tmp_path):
    """Documents are units: of 40 of them 3 or 4 are held out."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i in range(40):
        (corpus / f"{i}.py").write_text("".join(f"x_{i} = {i * j}\n" for j in range(30)))
    words = f"--data.corpus {corpus} --data.sequence_length 16 --model.pattern rec --model.depth 1 --model.width 16 "
    words += "--model.rnn_width 16 --model.mlp_width 16 --optimizer.clip_norm 0 --trainer.steps 2 --privacy.rows 2 "
    words += "--privacy.epsilon 50 --privacy.delta 1e-3 --privacy.noise 0.5 --privacy.seed 1"
    run = tmp_path / "run"
    code, _, err = finish(train_command("griffin-tiny", run, *words.split()))
    assert code == 0, err
    promise, records = json.loads((run / "privacy.json").read_text()), read_metrics(run, "train")
    assert promise["unit"] == "example"
    assert 30 < promise["units"] < 40
    assert list(records) == [1, 2]
    assert records[2]["epsilon"] == pytest.approx(spent(2, 0.5, 8 / promise["units"], 1e-3), rel=1e-4)
    assert records[2]["grad_norm"] > 0


@pytest.mark.slow
@pytest.mark.multiprocess
def test_processes_train_as_one_does(tmp_path):
    words = (
        f"{TINY} {PRIVATE} --privacy.epsilon 8 --privacy.noise {NOISE} --trainer.steps 3 --mesh.data 2 --mesh.fsdp 2"
    )
    code, _, err = finish(
        train_command("nfnet-tiny", tmp_path / "one", "--mesh.simulated_devices", "4", *words.split())
    )
    assert code == 0, err
    code, _, err = finish(launch_command("nfnet-tiny", tmp_path / "two", 2, *words.split()))
    assert code == 0, err
    one, two = (saved_arrays(tmp_path / run, 3) for run in ("one", "two"))
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


# --- what is refused ------------------------------------------------------------------------------------------------------------


NFNET = "config nfnet-tiny --privacy.epsilon 8 --privacy.delta 1e-5 --optimizer.adaptive_clip 0"
GRIFFIN = "config griffin-tiny --privacy.epsilon 8 --privacy.delta 1e-5 --optimizer.clip_norm 0"
SEEN = "units are clipped to privacy.clip before the noise, and noise needs no clip; 0.0 is allowed"
ALONE = "a device finds the gradients of its own units by itself; 1 is allowed"
MIXED = "a mixed image lets two people into one clipped gradient"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("config nfnet-tiny --privacy.epsilon 8", "privacy.epsilon=8.0 needs privacy.delta, below one over the number of units, such as 1e-5"),
        (f"{GRIFFIN} --guard.threshold 6", "guard.threshold=6.0 | it judges steps by losses that nothing hides; 0.0 is allowed"),
        (f"{GRIFFIN} --guard.skip_batches 3", "guard.skip_batches=('3',) | a batch is drawn, and drawn batches are accounted for; () is allowed"),
        (f"{NFNET} --optimizer.sam_rho 0.05", "optimizer.sam_rho=0.05 | its way up is another look at the batch, which is not accounted for; 0.0 is allowed"),
        (f"{NFNET} --optimizer.adaptive_clip 0.01", f"optimizer.adaptive_clip=0.01 | {SEEN}"),
        (f"{GRIFFIN} --optimizer.clip_norm 1", f"optimizer.clip_norm=1.0 | {SEEN}"),
        (f"{GRIFFIN} --trainer.microbatches 2", "trainer.microbatches=2 | privacy.together says how many units a device works on at a time; 1 is allowed"),
        (f"{GRIFFIN} --distill.teacher runs/t", "distill.teacher='runs/t' | private distillation is not made here; '' is allowed"),
        (f"{GRIFFIN} --mesh.sequence 2", f"mesh.sequence=2 | {ALONE}"),
        (f"{GRIFFIN} --mesh.tensor 2", f"mesh.tensor=2 | {ALONE}"),
        (f"{NFNET} --data.source x --data.channels 3 --model.channels 3 --data.mixup_alpha 0.2", f"data.mixup_alpha=0.2 | {MIXED}; 0.0 is allowed"),
        (f"{NFNET} --data.source x --data.channels 3 --model.channels 3 --data.cutmix true", f"data.cutmix=True | {MIXED}; False is allowed"),
        (f"{NFNET} --data.source x --data.channels 3 --model.channels 3 --data.multiplicity 2 --data.augment crop", "data.multiplicity=2 | privacy.rows says how many views of an image share its clipped gradient; 1 is allowed"),
        (f"{GRIFFIN} --guard.policy rollback", "guard.policy='rollback' | a step that was taken has spent its part of the budget; 'abort' and 'skip' are allowed"),
        (f"{GRIFFIN} --privacy.unit group", "privacy.unit='group' contradicts data.kind='text': 'example' is a document there"),
    ],
)  # fmt: skip
def test_what_would_break_the_guarantee_is_refused_and_why(arguments, sentence, capsys):
    assert refused(capsys, arguments.split(), code=2) == sentence.replace(" | ", " contradicts privacy.epsilon=8.0: ")


def test_data_whose_rows_are_of_nobody_is_refused(capsys):
    private = "--privacy.epsilon 8 --privacy.delta 1e-5 --optimizer.clip_norm 0"
    said = refused(capsys, f"config selective-copy-hawk-tiny {private}".split(), code=2)
    assert said == (
        "data.kind='recall' contradicts privacy.epsilon=8.0: its rows are of several units or of none; 'images' and 'text' are "
        "allowed"
    )


def arguments(run: pathlib.Path, *words: str) -> list[str]:
    return command(run, "--privacy.epsilon 8", *words)[3:]


def test_a_delta_that_gives_units_away_is_refused(tmp_path, capsys):
    said = refused(capsys, arguments(tmp_path / "run", f"--privacy.delta {1 / UNITS}"), code=2)
    assert said == (
        f"privacy.delta={1 / UNITS} is not below one over the 1,423 units of the training data: with that, giving away a whole "
        f"unit would count as private; at most 7e-05 is sensible"
    )
    assert not (tmp_path / "run" / "privacy.secret").exists()


def test_a_batch_of_more_than_everybody_is_refused(tmp_path, capsys):
    said = refused(capsys, arguments(tmp_path / "run", "--data.batch_size 1424"), code=2)
    assert said == "data.batch_size=1424 is more than the 1,423 units of the training data"


def test_groups_that_nobody_knows_are_refused(tmp_path, capsys):
    said = refused(capsys, arguments(tmp_path / "run", "--privacy.unit group"), code=2)
    assert said == (
        "privacy.unit='group', but data.source='digits' does not say whose each image is: a table with a column `unit` does "
        "(docs/data.md)"
    )


def test_a_budget_that_no_noise_keeps_is_refused(tmp_path, capsys):
    said = refused(capsys, command(tmp_path / "run", "--privacy.epsilon 1e-9 --privacy.delta 1e-12")[3:], code=2)
    assert said.startswith("privacy.epsilon=1e-09 cannot be kept over ")
    assert "no noise multiplier up to 100000 keeps" in said


def test_a_run_that_trained_without_privacy_does_not_become_private(tmp_path, capsys):
    config = resolve("nfnet-tiny", command(tmp_path)[7:]).config
    with contextlib.closing(RunFolder(tmp_path / "run", config)) as folder:
        (folder.path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n')
    said = refused(capsys, arguments(tmp_path / "run"), code=2)
    assert said.endswith("privacy.epsilon: 0.0 → 8.0: give a new --run, or resume with --allow privacy.epsilon")
    said = refused(capsys, arguments(tmp_path / "run", "--allow privacy.epsilon"), code=2)
    assert said == (
        f"{tmp_path / 'run'} has trained without privacy, which no later step brings back: give a new --run"
    )


@pytest.mark.multiprocess
def test_a_run_without_its_secret_does_not_go_on(trained, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "privacy.secret").unlink()
    said = refused(capsys, command(run, *whole_words(), "--trainer.steps 20 --allow trainer.steps")[3:], code=4)
    assert said.startswith(
        f"{run / 'privacy.secret'} is gone, without which this run cannot draw its noise and its batches as before: bring it "
        f"back, or give a new --run"
    )
    assert not (run / "privacy.secret").exists()
