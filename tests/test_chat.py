"""Prompts and responses: what is learned of them, how they share rows, and what is left out with its line."""

import json

import numpy as np
import pytest

from configs.schema import ChatData, ConfigError
from data import open_data
from data.chat import Example, end_ids, packed, prompt_ids
from data.dataset import DataError, Origin
from data.tokenizers import ByteTokenizer, SentencePieceTokenizer


def written(tmp_path, records, name="chat.jsonl"):
    file = tmp_path / name
    file.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return str(file)


def sums(count):
    return [{"prompt": f"{i}+{i}=", "response": str(2 * i)} for i in range(count)]


def examples(batch):
    """(text before the first learned byte, learned bytes) of every record in a batch of bytes."""
    for row in range(len(batch["tokens"])):
        for number in range(1, batch["segment_ids"][row].max() + 1):
            at = batch["segment_ids"][row] == number
            learned = batch["weights"][row][at] > 0
            text = [*batch["tokens"][row][at], batch["targets"][row][at][-1]]
            assert text[0] == 256
            assert list(batch["segment_pos"][row][at]) == list(range(at.sum()))
            assert list(batch["targets"][row][at][:-1]) == list(batch["tokens"][row][at][1:])
            before = bytes(text[1 : 1 + int(np.argmax(learned))])
            yield before.decode(), bytes(batch["targets"][row][at][learned].tolist()).decode()


@pytest.mark.parametrize("template", ["gemma", "plain"])
def test_each_record_is_there_once_and_only_its_response_is_learned(tmp_path, template):
    data = open_data(ChatData(files=written(tmp_path, sums(60)), template=template, sequence_length=160, held_out=0.2))
    found = [pair for split in (data.train, data.held_out) for pair in examples(split.read(np.arange(len(split))))]
    expected = set()
    for i in range(60):
        if template == "gemma":  # the format of Gemma's instruction-tuned models, spelled out by a tokenizer of bytes
            prompt = f"<start_of_turn>user\n{i}+{i}=<end_of_turn>\n<start_of_turn>model\n"
            expected.add((prompt, f"{2 * i}<end_of_turn>"))
        else:
            expected.add((f"{i}+{i}=", str(2 * i)))
    assert len(found) == 60
    assert set(found) == expected


def test_bytes_of_targets_are_those_of_the_responses(tmp_path):
    data = open_data(ChatData(files=written(tmp_path, sums(60)), template="plain", sequence_length=64, held_out=0.2))
    bytes_ = sum(int(s.read(np.arange(len(s)))["target_bytes"].sum()) for s in (data.train, data.held_out))
    assert bytes_ == sum(len(record["response"]) for record in sums(60))


def test_of_a_text_everything_is_learned(tmp_path):
    data = open_data(ChatData(files=written(tmp_path, [{"text": f"line {i}"} for i in range(40)]), held_out=0.2))
    assert {learned for _, learned in examples(data.held_out.read(np.arange(len(data.held_out))))} <= {
        f"line {i}" for i in range(40)
    }


def test_rows_are_filled_and_no_record_is_cut():
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 60, 500)
    rows = packed([Example(np.zeros(n, np.int32), 1, Origin("", 0)) for n in lengths], 64)
    used = [sum(map(len, row)) for row in rows]
    assert max(used) <= 64
    assert sum(len(row) for row in rows) == 500
    assert sum(used) / (64 * len(rows)) > 0.9


BAD = [
    ('{"prompt": "x"}', "without a response"),
    ('{"prompt": "x", "response": ""}', "without a response"),
    ('{"response": "x"}', "without a prompt"),
    ('{"prompt": "x", "response": "\\ud800"}', "with half a character in its response"),
    ("{", "not JSON"),
    ("[1]", "not a JSON object"),
    (json.dumps({"prompt": "x" * 300, "response": "y"}), "longer than the 256 tokens of a row"),
    ('{"prompt": [1, 2], "response": [257]}', "with a token id outside the vocabulary of 257"),
]


@pytest.mark.parametrize(("record", "reason"), BAD)
def test_what_cannot_be_used_is_counted_with_its_line(tmp_path, record, reason):
    data = open_data(ChatData(files=written(tmp_path, [*sums(40), record]), held_out=0.2))
    assert data.describe()[-1] == f"skipped 1 record: 1 {reason} (chat.jsonl:41)"


def test_bytes_that_are_no_text_spoil_one_record(tmp_path):
    file = tmp_path / "chat.jsonl"
    file.write_text(written(tmp_path, sums(40)) and (tmp_path / "chat.jsonl").read_text())
    file.write_bytes(file.read_bytes() + b'{"prompt": "\xff", "response": "y"}\n')
    data = open_data(ChatData(files=str(file), held_out=0.2))
    assert data.skipped == [("chat.jsonl:41", "not UTF-8")]


def test_files_of_a_folder_are_read_together(tmp_path):
    written(tmp_path, sums(40), "a.jsonl")
    written(tmp_path, [{"prompt": "p", "response": "r"}], "b.jsonl")
    counts = open_data(ChatData(files=str(tmp_path), held_out=0.2)).manifest["counts"]
    assert counts["train_records"] + counts["held_out_records"] == 41


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ("nowhere.jsonl", "nowhere.jsonl does not exist: give data.files a .jsonl file, or a folder of them"),
        (".", "holds no .jsonl file"),
        ("bad.jsonl", r"has no training record \(skipped 1 record: 1 not JSON \(bad.jsonl:1\)\)"),
    ],
)
def test_data_that_is_not_there_is_one_sentence(tmp_path, files, sentence):
    written(tmp_path / "..", [], "unused.jsonl")
    (tmp_path / "empty").mkdir()
    if files == "bad.jsonl":
        files = written(tmp_path, ["{"], "bad.jsonl")
    elif files == ".":
        files = str(tmp_path / "empty")
    with pytest.raises(DataError, match=sentence):
        open_data(ChatData(files=files))


def test_a_tokenizer_that_would_need_a_corpus_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data.tokenizer='sentencepiece:500' has no corpus to be trained on"):
        open_data(ChatData(files=written(tmp_path, sums(10)), tokenizer="sentencepiece:500"))


def test_turns_are_single_tokens_where_the_tokenizer_has_them():
    """Gemma's user turn of "Hi": start, user, newline, Hi, end, newline, start, model, newline."""
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["user\nHi\nmodel\n"] * 50),
        model_writer=model,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        control_symbols=["<start_of_turn>", "<end_of_turn>"],
        minloglevel=2,
        hard_vocab_limit=False,
    )
    tokenizer = SentencePieceTokenizer(model.getvalue())
    start, end = tokenizer.special("<start_of_turn>"), tokenizer.special("<end_of_turn>")
    assert start is not None
    assert end is not None
    assert tokenizer.special("<nothing>") is None
    ids = prompt_ids(tokenizer.encode("Hi").tolist(), "gemma", tokenizer)
    assert ids[0] == tokenizer.bos_id
    assert [i for i in ids if i in (start, end)] == [start, end, start]
    assert tokenizer.decode(ids) == "user\nHi\nmodel\n"
    assert end_ids("gemma", tokenizer) == [end]
    assert ByteTokenizer().special("<start_of_turn>") is None
