"""seqio's Tasks and Mixtures as sources: their own examples, in our rows, without TensorFlow in the process that trains."""

import sys

import numpy as np
import pytest
from runs import ROOT, finish, train_command

from configs.schema import ConfigError, PreparedData
from data import open_data, seqio_source
from data.dataset import DataError

pytestmark = [pytest.mark.parity, pytest.mark.slow]
seqio = pytest.importorskip("seqio")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seqio_source, "CACHE", str(tmp_path_factory.mktemp("seqio")))
        patch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
        patch.syspath_prepend(str(ROOT / "tests"))
        yield


def config(name, **fields):
    made = {"sources": (f"seqio:seqio_example:{name}",), "sequence_length": 32, "batch_size": 8, **fields}
    return PreparedData(**made)


def examples(name, split):
    """What seqio itself gives."""
    import seqio_example  # noqa: F401 (registers the Tasks)

    dataset = seqio.get_mixture_or_task(name).get_dataset(None, split=split, shuffle=False, num_epochs=1)
    return list(dataset.as_numpy_iterator())


@pytest.mark.parametrize(("split", "part"), [("train", "train"), ("validation", "held_out")])
def test_rows_hold_the_examples_of_the_task(split, part):
    data = open_data(config("tiny_lines", packing="best-fit", sequence_length=64))
    rows = getattr(data, part).sources[0]
    batch = rows.read(np.arange(len(rows)))
    found = []
    for ids, targets in zip(batch["segment_ids"], batch["targets"], strict=True):
        found += [tuple(targets[ids == number]) for number in range(1, ids.max() + 1)]
    assert sorted(found) == sorted(tuple(example["targets"]) for example in examples("tiny_lines", split))
    assert set(batch["tokens"][batch["segment_pos"] == 0]) == {0}  # documents start with T5's start, id 0


@pytest.mark.parametrize("packing", ["concat", "first-fit"])
def test_of_inputs_nothing_is_learned(packing):
    data = open_data(config("tiny_sums", packing=packing))
    rows = data.train.sources[0]
    batch = rows.read(np.arange(len(rows)))
    learned = batch["targets"][batch["weights"] > 0]
    answers = [token for example in examples("tiny_sums", "train") for token in example["targets"]]
    assert 0.8 < len(learned) / len(answers) <= 1  # the rest is held out
    assert set(learned) <= set(answers)
    questions = {tuple(e["inputs"]) + tuple(e["targets"]): len(e["inputs"]) for e in examples("tiny_sums", "train")}
    if packing == "first-fit":
        for ids, targets, weights in zip(batch["segment_ids"], batch["targets"], batch["weights"], strict=True):
            for number in range(1, ids.max() + 1):
                here = ids == number
                prompt = questions[tuple(targets[here])]
                assert weights[here].tolist() == [0.0] * prompt + [1.0] * (here.sum() - prompt)


def test_a_mixture_has_its_own_shares():
    data = open_data(config("tiny_mixture"))
    source, _ = data.train.examples(np.arange(10_000))
    shares = {folder.rpartition("/")[2]: count for folder, count in zip(data.sources, np.bincount(source), strict=True)}
    assert shares == {"tiny_lines": 7500, "tiny_capitals": 2500}
    again = open_data(config("tiny_mixture"))
    for name, rows in data.train_batch(5).items():
        assert np.array_equal(rows, again.train_batch(5)[name])


def test_a_run_trains_on_a_mixture_without_tensorflow(tmp_path):
    words = ["--data.kind", "prepared", "--data.sources", "seqio:seqio_example:tiny_mixture", "--trainer.steps", "2"]
    watch = (
        "import sys, atexit; from launch.cli import main; code = main(sys.argv[1:]); "
        "assert 'tensorflow' not in sys.modules; sys.exit(code)"
    )
    command = train_command("griffin-tiny", tmp_path / "run", *words)
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "HOME": str(tmp_path)}
    code, out, err = finish([sys.executable, "-c", watch, *command[3:]], env=environment)
    assert code == 0, err
    assert "preparing the seqio Task tiny_lines" in out
    assert "75 % of the rows read" in out
    code, out, err = finish(
        [sys.executable, "-m", "launch", "sample", str(tmp_path / "run"), "--prompt", "1 plus", "--tokens", "3"],
        env=environment,
    )
    assert code == 0, err


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (
            "seqio:seqio_example:tiny_line",
            "seqio_example registers no seqio Task or Mixture 'tiny_line'; there are .*tiny_lines",
        ),
        ("seqio:no_such_module:x", "the module no_such_module of data.sources is not found"),
    ],
)
def test_a_wrong_name_is_one_sentence(source, sentence):
    with pytest.raises(DataError, match=sentence):
        open_data(PreparedData(sources=(source,)))


def test_a_source_of_another_form_is_refused():
    with pytest.raises(ConfigError, match="'seqio:tiny' is not seqio:MODULE:TASK"):
        PreparedData(sources=("seqio:tiny",))
