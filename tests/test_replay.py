"""A step rebuilt is the step that was: its loss to the bit, its documents where they came from, its gradient in parts."""

import json
import re
import sys

import numpy as np
import pytest
from runs import finish, train_command

from data.prepare.pipeline import Settings, prepare
from trainer.run_folder import read_metrics


def replayed(run, *words):
    return finish([sys.executable, "-m", "launch", "replay", str(run), *words])


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    """5 steps with checkpoints after 2 and 4, of prepared documents whose text tells their number."""
    root = tmp_path_factory.mktemp("replay")
    texts = [f"<{i}> " + "lorem ipsum " * (i % 9) for i in range(400)]
    (root / "raw.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare(Settings(str(root / "raw.jsonl"), str(root / "data"), held_out=0.1, workers=1), lambda line: None)
    words = ["--data.kind", "prepared", "--data.sources", str(root / "data"), "--data.packing", "best-fit"]
    words += ["--trainer.steps", "5", "--checkpoint.every", "2", "--eval.every", "0", "--trainer.microbatches", "2"]
    code, _, err = finish(train_command("griffin-tiny", root / "run", *words))
    assert code == 0, err
    return root


@pytest.fixture(scope="module")
def fourth(text_run):
    """What is said of step 4."""
    code, out, err = replayed(text_run / "run", "--step", "4", "--documents", "1000")
    assert code == 0, err
    return out


def test_a_step_after_a_checkpoint_is_the_same_to_the_bit(text_run, fourth):
    out = fourth
    assert "parameters of checkpoint 2 and 1 steps run again" in out
    logged = read_metrics(text_run / "run", "train")[4]
    assert re.search(rf"loss +{logged['loss']:.6g} \(logged {logged['loss']:.6g}, bit-identical\)", out)
    assert re.search(rf"grad_norm +{logged['grad_norm']:.6g} \(logged .*, bit-identical\)", out)
    # The norms of the layers make that of the whole, which the run itself logged.
    norms = [float(n) for n in re.findall(r"^  (?:layer|embedding|final_norm).*?  +([\d.e+-]+)  ", out, re.MULTILINE)]
    assert len(norms) == 5  # the table, the last norm and three layers
    assert np.sqrt(np.sum(np.square(norms))) == pytest.approx(logged["grad_norm"], rel=1e-3)
    # And the losses of the documents that of the batch.
    pieces = re.findall(r"^ +([\d.]+) +(\d+) tokens  row (\d+)  raw.jsonl at ([\d,]+)", out, re.MULTILINE)
    nats = np.array([(float(loss), int(tokens)) for loss, tokens, _, _ in pieces])
    assert (nats[:, 0] * nats[:, 1]).sum() / nats[:, 1].sum() == pytest.approx(logged["loss"], rel=1e-4)
    assert np.array_equal(nats[:, 0], sorted(nats[:, 0], reverse=True))


def test_documents_are_found_where_it_says(text_run, fourth):
    raw = (text_run / "raw.jsonl").read_bytes()
    found = re.findall(r"raw.jsonl at ([\d,]+)(?:, from token ([\d,]+))?\n +(.*)", fourth)
    assert len(found) > 10
    for place, token, shown in found:
        text = json.loads(raw[int(place.replace(",", "")) :].splitlines()[0])["text"]
        start = max(0, int((token or "0").replace(",", "")) - 1)  # BOS is token 0
        assert text[start:].startswith(shown[1:-1][:40])


def test_a_quick_replay_says_that_it_is_none_of_the_log(text_run):
    _, out, _ = replayed(text_run / "run", "--step", "2", "--quick")
    assert "parameters as initialised, not those it met" in out
    assert "bit-identical" not in out


@pytest.mark.parametrize(
    ("step", "sentence"), [("6", "--step 6 is none of .*: it has steps 1 to 5"), ("0", "--step 0 is none of")]
)
def test_a_step_that_is_none_is_one_sentence(step, sentence, text_run):
    code, _, err = replayed(text_run / "run", "--step", step)
    assert code == 2
    assert re.search(sentence, err)


def test_changed_data_is_refused(text_run, tmp_path):
    file = text_run / "run" / "data_manifest.json"
    saved = file.read_text()
    file.write_text(json.dumps(json.loads(saved) | {"hash": "another", "sources": ["another"]}))
    code, _, err = replayed(text_run / "run", "--step", "1")
    file.write_text(saved)
    assert code == 3
    assert "changed since it was trained (sources" in err


@pytest.mark.slow
def test_images_are_replayed_too(tmp_path):
    words = ["--trainer.steps", "2", "--eval.every", "0"]
    code, _, err = finish(train_command("nfnet-tiny", tmp_path / "run", *words))
    assert code == 0, err
    code, out, err = replayed(tmp_path / "run", "--step", "2", "--documents", "100")
    assert code == 0, err
    assert out.count("bit-identical") == 2  # dropout and stochastic depth draw the same again
    assert len(re.findall(r"row \d+, label \d  digits at [\d,]+", out)) == 8
    assert "layer stage_1, block_1" in out
