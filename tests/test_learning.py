"""What `podwright demo` promises: the small Griffin learns more of its language than counts of byte pairs know."""

import itertools
import math
import sys
from collections import Counter

import pytest
from runs import finish

from configs.griffin import tiny
from data.corpus import open_corpus
from launch.evaluate import evaluate_run


@pytest.mark.slow
@pytest.mark.multiprocess
def test_griffin_tiny_beats_the_bigram_entropy_of_the_held_out_text(tmp_path):
    run = tmp_path / "run"
    code, _, err = finish([sys.executable, "-m", "launch", "train", "griffin-tiny", "--run", str(run)], timeout=3000)
    assert code == 0, err
    step, metrics = evaluate_run(str(run), batches=64)
    assert step == tiny().trainer.steps

    text = b"".join(d.text.encode() for d in open_corpus(tiny().data).split(held_out=True))
    pairs, first = Counter(itertools.pairwise(text)), Counter(text[:-1])
    entropy = -sum(n * math.log2(n / first[a]) for (a, _), n in pairs.items()) / (len(text) - 1)
    assert 2.5 < entropy < 4
    assert metrics["bits_per_byte"] < entropy - 0.5
