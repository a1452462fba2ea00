"""`podwright sample` as a user meets it: several prompts, streaming, figures, and what it refuses."""

import re

import numpy as np
import pytest
from runs import finish, train_command
from test_bad_input import refused

from configs import EXPERIMENTS
from configs.store import to_json
from data.tokenizers import ByteTokenizer, SentencePieceTokenizer, train_sentencepiece
from launch.cli import main
from launch.sample import Spelling


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 2 updates on a small corpus."""
    place = tmp_path_factory.mktemp("sampled")
    (place / "corpus").mkdir()
    for i in range(40):
        (place / "corpus" / f"{i}.py").write_text("".join(f"x_{i} = {i * j}\n" for j in range(60)))
    options = ["--data.corpus", str(place / "corpus"), "--trainer.steps", "2"]
    code, out, err = finish(train_command("griffin-tiny", place / "run", *options))
    assert code == 0, out + err
    return place / "run"


def sampled(capsys, *words) -> tuple[str, str]:
    assert main(["sample", *map(str, words)]) == 0
    said = capsys.readouterr()
    return said.out, said.err


@pytest.mark.multiprocess
def test_each_prompt_of_several_is_continued_as_it_is_alone(run, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text("x_1 = 1\nx_1 = ")
    few = ["--tokens", 12, "--temperature", 0]
    alone, figures = sampled(capsys, run, "--prompt", "é", *few)
    assert alone.startswith("é")
    together, _ = sampled(capsys, run, "--prompt", "é", "--prompt-file", tmp_path / "prompt.txt", *few)
    blocks = re.split(r"--- prompt \d of 2 ---\n", together)
    assert blocks[1] == alone
    assert blocks[2].startswith("x_1 = 1\nx_1 = ")
    assert re.fullmatch(
        r"12 tokens, \d+ tokens/s after the first; state \d+ kB a sequence at any length, "
        r"keys and values of a Transformer of this size \d+ kB at 15 tokens\n",
        figures,
    )


def test_a_run_of_images_or_without_a_checkpoint_cannot_be_sampled(tmp_path, capsys):
    for name, folder in (("nfnet-tiny", "images"), ("griffin-tiny", "text")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(to_json(EXPERIMENTS[name]()))
    said = refused(capsys, ["sample", str(tmp_path / "images")], code=2)
    assert said == f"{tmp_path / 'images'} was trained on images: only text runs continue a prompt"
    tokenizer = dict(fingerprint=ByteTokenizer.fingerprint)
    (tmp_path / "text" / "data_manifest.json").write_text(f'{{"tokenizer": {tokenizer}}}'.replace("'", '"'))
    assert refused(capsys, ["sample", str(tmp_path / "text")], code=4) == f"{tmp_path / 'text'} has no checkpoint yet"


@pytest.mark.parametrize("tokenizer", ["bytes", "sentencepiece"])
def test_text_told_token_by_token_is_the_text_of_all_tokens(tokenizer):
    text = "def  größe(漢字):\n\treturn '🙂' * 3  # ▁ e\u0301\n"
    if tokenizer == "bytes":
        tokenizer = ByteTokenizer()
    else:
        tokenizer = SentencePieceTokenizer(train_sentencepiece(300, ["def size(x):\n    return x * 3\n"] * 50))
    for cut in (0, 3, 4, 8):  # characters of the prompt
        spelling = Spelling(tokenizer, np.concatenate([[tokenizer.bos_id], tokenizer.encode(text[:cut])]))
        pieces = [spelling.add(int(i)) for i in tokenizer.encode(text[cut:])] + [spelling.rest()]
        assert "".join(pieces) == text[cut:]
        assert not any("\ufffd" in piece for piece in pieces)
