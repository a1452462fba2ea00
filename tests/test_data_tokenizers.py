"""Tokenizers: exact round trips, exact byte counts, deterministic training, a cache, and plain words for bad input."""

import io

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import ConfigError, TextData
from data import DataError, tokenizers
from data.text import open_tokenizer
from data.tokenizers import (
    ByteTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
    paragraphs,
    train_sentencepiece,
    trained_tokenizer,
)

TEXT = 'def f(x):\n    """The quick brown fox jumps over 13 lazy dogs."""\n\treturn x + 1, "größe", \'漢字\'\n\n' * 40
AWKWARD = [
    "",
    " ",
    "▁",
    " ▁▁ a▁",
    "<s></s><unk><0x41>",
    "a\0b",
    "\r\n\t\x0b\u2028",
    "\ufeff\ufffd\ue000",
    "e\u0301é",
    "🙂👩‍👩‍👧",
]


@pytest.fixture(scope="module")
def trained():
    return SentencePieceTokenizer(train_sentencepiece(340, [TEXT]))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizers, "CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def check_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ids.ndim == 1
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert tokenizer.bos_id not in ids


@given(st.text())
@settings(deadline=None)
def test_bytes_give_back_any_text_and_count_its_bytes(text):
    check_round_trip(ByteTokenizer(), text)
    assert ByteTokenizer().encode(text).tolist() == list(text.encode())


@given(text=st.one_of(st.text(), st.text(alphabet="▁ <>0xA\n▁"), st.sampled_from(AWKWARD)))
@settings(deadline=None, max_examples=300)
def test_a_trained_sentencepiece_gives_back_any_text_and_counts_its_bytes(trained, text):
    check_round_trip(trained, text)


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_texts_come_back_from_both(trained, text):
    check_round_trip(ByteTokenizer(), text)
    check_round_trip(trained, text)


def test_a_trained_sentencepiece_is_shorter_than_bytes_and_keeps_digits_apart(trained):
    assert trained.vocab_size == 340
    assert len(trained.encode(TEXT)) < 0.7 * len(TEXT.encode())
    assert len(trained.encode("1313")) == 4


def test_bytes_have_257_ids_and_bos_is_no_text():
    tokenizer = ByteTokenizer()
    assert (tokenizer.vocab_size, tokenizer.bos_id, len(tokenizer.token_bytes)) == (257, 256, 257)
    assert tokenizer.decode([256, 104, 105, 256]) == "hi"
    assert tokenizer.token_bytes[256] == 0


def test_broken_bytes_decode_to_replacement_characters(trained):
    assert ByteTokenizer().decode([0xE6, 0xBC]) == "\ufffd"
    assert trained.decode(trained.encode("①")[:1]) == "\ufffd"
    assert trained.decode([trained.bos_id, *trained.encode("hi")]) == "hi"


def test_a_lone_surrogate_is_refused_alike(trained):
    for tokenizer in (ByteTokenizer(), trained):
        with pytest.raises(UnicodeEncodeError):
            tokenizer.encode("a\ud800")


def test_training_twice_gives_the_same_model(trained):
    assert train_sentencepiece(340, [TEXT]) == trained.model
    assert SentencePieceTokenizer(train_sentencepiece(341, [TEXT])).fingerprint != trained.fingerprint


@given(st.lists(st.text(alphabet="ab\n\r\u2028", max_size=60), max_size=5), st.integers(1, 20))
def test_training_text_is_cut_without_losing_any(texts, length):
    assert "".join(paragraphs(texts, length)) == "".join(texts)


def test_a_trained_model_is_cached_by_corpus_and_size(cache, trained):
    first = trained_tokenizer(340, "corpus1", lambda: [TEXT])
    assert first.fingerprint == trained.fingerprint
    (file,) = cache.iterdir()  # and no temporary one
    assert file.name == "bpe-1-340-corpus1.model"
    again = trained_tokenizer(340, "corpus1", lambda: pytest.fail("trained again"))
    assert again.fingerprint == first.fingerprint
    assert trained_tokenizer(341, "corpus1", lambda: [TEXT]).vocab_size == 341
    assert trained_tokenizer(340, "corpus2", lambda: [TEXT]).vocab_size == 340
    assert len(list(cache.iterdir())) == 3


def test_half_a_cached_model_is_trained_again(cache, trained):
    cache.mkdir()
    (cache / "bpe-1-340-corpus.model").write_bytes(trained.model[:500])
    assert trained_tokenizer(340, "corpus", lambda: [TEXT]).fingerprint == trained.fingerprint
    assert (cache / "bpe-1-340-corpus.model").read_bytes() == trained.model


def test_a_run_s_tokenizer_opens_without_its_corpus(cache, trained, tmp_path):
    record = {"tokenizer": {"fingerprint": trained.fingerprint, "trained_on": "corpus"}}
    config = TextData(corpus=str(tmp_path / "gone"), tokenizer="sentencepiece:340")
    with pytest.raises(DataError, match=r"is not at .*bpe-1-340-corpus.model: open the run's corpus once"):
        open_tokenizer(config, record)
    trained_tokenizer(340, "corpus", lambda: [TEXT])
    assert open_tokenizer(config, record).fingerprint == trained.fingerprint
    assert isinstance(open_tokenizer(TextData(corpus=str(tmp_path / "gone"))), ByteTokenizer)


def test_another_tokenizer_than_the_run_s_is_refused(trained, tmp_path):
    (tmp_path / "a.model").write_bytes(trained.model)
    record = {"tokenizer": {"fingerprint": "sentencepiece-0123456789abcdef"}}
    with pytest.raises(DataError, match="this run was trained with sentencepiece-0123456789: its ids mean other text"):
        load_tokenizer(str(tmp_path / "a.model"), manifest=record)


def test_a_model_file_keeps_its_own_bos(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()), model_writer=model, vocab_size=310, byte_fallback=True,
        model_type="bpe", bos_id=5, eos_id=6, pad_id=0, unk_id=3, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "other.model").write_bytes(model.getvalue())
    tokenizer = load_tokenizer(str(tmp_path / "other.model"))
    assert tokenizer.bos_id == 5
    assert not tokenizer.lossless  # this one normalises and adds a prefix
    assert tokenizer.decode(tokenizer.encode("return x")) == "return x"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"", "is empty"),
        (b"hello", "is not a SentencePiece model"),
    ],
)
def test_a_bad_model_file_is_named_in_a_sentence(tmp_path, content, message):
    path = tmp_path / "some.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=f"tokenizer file {path} {message}"):
        load_tokenizer(str(path))


def test_a_model_file_without_bos_is_refused(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()), model_writer=model, vocab_size=60, bos_id=-1, minloglevel=2,
        model_type="bpe",
    )  # fmt: skip
    (tmp_path / "no.model").write_bytes(model.getvalue())
    with pytest.raises(DataError, match="has no BOS token"):
        load_tokenizer(str(tmp_path / "no.model"))


@pytest.mark.parametrize("spec", ["", "byte", "sentencepiece", "sentencepiece:", "sentencepiece:0", "sentencepiece:-5"])
def test_an_unknown_tokenizer_is_a_config_error(spec):
    with pytest.raises(ConfigError, match=f"tokenizer='{spec}' is not known: 'bytes', 'sentencepiece:N'"):
        load_tokenizer(spec)


@pytest.mark.parametrize(
    ("size", "message"), [(50, r"the 256 bytes alone need \d+ pieces"), (9000, r"its text makes at most \d+ pieces")]
)
def test_a_size_the_corpus_cannot_give_is_refused(size, message):
    with pytest.raises(DataError, match=f"sentencepiece:{size} cannot be trained on this corpus: .*{message}"):
        train_sentencepiece(size, [TEXT])
