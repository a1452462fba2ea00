"""Gemma's tokenizers: from local files and cloud storage, with the ids of the model file, and the published ids of texts."""

import io
import os

import fsspec
import pytest
import sentencepiece

from data import DataError
from data.chat import prompt_ids
from data.corpus import Document
from data.text import lay_out
from data.tokenizers import SentencePieceTokenizer, load_tokenizer

TEXT = "Hello world, hello 12 worlds!\n  Hello  again\té, e\u0301 and 漢字.\n"


@pytest.fixture(scope="module")
def model() -> bytes:
    """Trained as Gemma's: pad 0, eos 1, bos 2, unk 3, turns as control pieces, bytes for what is unknown."""
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 60),
        model_writer=trained,
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        control_symbols=["<mask>", "[multimodal]", "<start_of_turn>", "<end_of_turn>"],
        minloglevel=2,
    )
    return trained.getvalue()


@pytest.fixture(scope="module")
def tokenizer(model):
    return SentencePieceTokenizer(model)


def test_special_ids_are_the_files(tokenizer):
    assert (tokenizer.bos_id, tokenizer.eos_id) == (2, 1)
    names = ("<pad>", "<s>", "</s>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>")
    assert [tokenizer.special(name) for name in names] == [0, 2, 1, 3, 4, 6, 7]
    assert tokenizer.lossless


def test_no_prefix_is_added_and_no_white_space_lost(tokenizer):
    assert tokenizer.encode("Hello").tolist() != tokenizer.encode(" Hello").tolist()
    for text in ("Hello", " Hello", "  Hello  world ", "\n\n\t Hello", " "):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_stand_alone(tokenizer):
    ids = tokenizer.encode("1212")
    assert len(ids) == 4
    assert ids[0] == ids[2] != ids[1] == ids[3]
    assert tokenizer.token_bytes[ids].tolist() == [1, 1, 1, 1]


def test_nothing_is_normalised_and_what_is_unknown_becomes_bytes(tokenizer):
    assert tokenizer.encode("e\u0301").tolist() != tokenizer.encode("é").tolist()
    for text in ("e\u0301", "é", "ﬁ", "\uff21", "a\u00a0b", "\r\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    names = [tokenizer._model.id_to_piece(int(i)) for i in tokenizer.encode("\ua66e")]
    assert names == ["<0xEA>", "<0x99>", "<0xAE>"]  # UTF-8 of U+A66E
    assert tokenizer.special("<unk>") not in tokenizer.encode("\ua66e")


@pytest.mark.parametrize("piece", ["<s>", "</s>", "<pad>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"])
def test_control_pieces_in_a_text_stay_text(tokenizer, piece):
    text = f"Hello {piece}"
    ids = tokenizer.encode(text)
    assert tokenizer.special(piece) not in ids
    assert tokenizer.decode(ids) == text


def test_each_document_starts_with_bos(tokenizer):
    documents = [Document(f"{i}", text, "", len(text), False) for i, text in enumerate(("Hello", " world", "<s>"))]
    rows = lay_out(documents, tokenizer, 4)
    assert (rows.tokens == tokenizer.bos_id).nonzero()[0].tolist() == rows.starts.tolist()
    assert len(rows.starts) == 3


def test_a_model_is_read_from_cloud_storage(tokenizer, model):
    with fsspec.open("memory://bucket/tokenizer.model", "wb") as file:
        file.write(model)
    assert load_tokenizer("memory://bucket/tokenizer.model").fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("place", ["memory://bucket/none.model", "nowhere://bucket/tokenizer.model"])
def test_a_model_that_cannot_be_read_is_named_in_a_sentence(place):
    with pytest.raises(DataError) as refused:
        load_tokenizer(place)
    assert str(refused.value).startswith(f"tokenizer file {place} cannot be read: ")
    assert "\n" not in str(refused.value)


# --- the released files, which are not ours to hand on ----------------------------------------------------------------

PUBLISHED = {
    "PODWRIGHT_GEMMA2_TOKENIZER": {
        "Hello world": [4521, 2134],
        " Hello": [25957],
        "The capital of France is Paris.": [651, 6037, 576, 6081, 603, 7127, 235265],
        "1234567890": [235274, 235284, 235304, 235310, 235308, 235318, 235324, 235321, 235315, 235276],
        "  double": [139, 4576],
        "   x": [140, 235297],
        "\t": [226],
    },
    "PODWRIGHT_GEMMA3_TOKENIZER": {
        "Hello world!": [9259, 1902, 236888],
        "Hello  world": [9259, 138, 12392],
        " Hello": [26352],
        "12345": [236770, 236778, 236800, 236812, 236810],
        "a\nb\n\nc": [236746, 107, 236763, 108, 236755],
        "1st   2nd": [236770, 540, 139, 236778, 523],
        "\0": [238],
        "\ua66e": [472, 391, 412],
        "e\u0301": [236744, 238288],
        "\u00e9": [236859],
        "\r": [251],
    },
}


def released(variable: str) -> SentencePieceTokenizer:
    if variable not in os.environ:
        pytest.skip(f"{variable} does not name a tokenizer.model of Gemma {variable[15]}")
    return load_tokenizer(os.environ[variable])


@pytest.mark.parametrize("variable", PUBLISHED)
def test_released_tokenizers_give_the_published_ids(variable):
    tokenizer = released(variable)
    for text, ids in PUBLISHED[variable].items():
        assert tokenizer.encode(text).tolist() == ids, repr(text)
        assert tokenizer.decode(ids) == text
    assert tokenizer.lossless
    assert [tokenizer.special(name) for name in ("<pad>", "<eos>", "<bos>", "<unk>")] == [0, 1, 2, 3]
    assert tokenizer.bos_id not in tokenizer.encode("[BOS]")


@pytest.mark.parametrize(
    ("variable", "size", "turns", "before", "after"),
    [
        ("PODWRIGHT_GEMMA2_TOKENIZER", 256000, (106, 107), [2, 106, 1645, 108], [107, 108, 106, 2516, 108]),
        ("PODWRIGHT_GEMMA3_TOKENIZER", 262144, (105, 106), [2, 105, 2364, 107], [106, 107, 105, 4368, 107]),
    ],
)
def test_released_tokenizers_have_the_published_turns(variable, size, turns, before, after):
    tokenizer = released(variable)
    assert tokenizer.vocab_size == size
    assert (tokenizer.special("<start_of_turn>"), tokenizer.special("<end_of_turn>")) == turns
    prompt = tokenizer.encode("Hi").tolist()
    assert prompt_ids(prompt, "gemma", tokenizer) == [*before, *prompt, *after]
    if size == 262144:
        assert prompt == [10979]
