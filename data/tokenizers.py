"""Text to token ids and back: raw bytes, or SentencePiece (trained on the corpus, or somebody's .model file)."""

import hashlib
import io
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from configs.schema import ConfigError
from data.dataset import DataError

CACHE = "~/.cache/podwright/tokenizers"
TRAINING = "bpe-1"  # name of the settings in train_sentencepiece: part of a cached model's file name
SPACE = "\u2581"  # SentencePiece writes a space so; a text that holds the character itself needs care
PROBE = " a  b\t\n\0\r\n é e\u0301 ﬁ ① 漢 🙂 "


class Tokenizer(Protocol):
    vocab_size: int
    bos_id: int
    eos_id: int | None  # ends a document, in models that were taught so; our own rows have no such token
    token_bytes: np.ndarray  # int32 [vocab_size]: bytes of UTF-8 a token stands for; 0 for control tokens
    fingerprint: str  # two tokenizers with one fingerprint give the same ids

    def encode(self, text: str) -> np.ndarray:
        """Ids, int32 [n], without BOS. Raises UnicodeEncodeError on lone surrogates, which no UTF-8 file holds."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; control tokens give nothing, bytes that are not UTF-8 give U+FFFD."""
        ...

    def special(self, piece: str) -> int | None:
        """Id of a piece by its name, such as <start_of_turn>; no text is encoded to one that the model file calls a control
        piece. None where there is none."""
        ...


class ByteTokenizer:
    """Ids 0 to 255 are the bytes of UTF-8, 256 is BOS: every text there and back exactly."""

    vocab_size = 257
    bos_id = 256
    eos_id: int | None = None
    fingerprint = "bytes-1"

    def __init__(self) -> None:
        self.token_bytes = np.array([1] * 256 + [0], np.int32)

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in map(int, ids) if i < 256).decode(errors="replace")

    def special(self, piece: str) -> int | None:
        return None


class SentencePieceTokenizer:
    """A SentencePiece model. `lossless` says whether every text comes back exactly: it takes byte fallback, no
    normalisation and no added prefix. Then token_bytes add up to a text's length, too; otherwise to that of the
    normalised text, an unknown token counting nothing."""

    def __init__(self, model: bytes, bos_id: int | None = None) -> None:
        """Raises ValueError with a clause when `model` is no SentencePiece model or has no BOS, and none is given."""
        import sentencepiece  # only those who use it wait for it

        if not model:  # SentencePiece would load nothing and complain at each call
            raise ValueError("is empty")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        except Exception:
            raise ValueError("is not a SentencePiece model") from None
        self.vocab_size = self._model.get_piece_size()
        self.bos_id = self._model.bos_id() if bos_id is None else bos_id
        if self.bos_id < 0:
            raise ValueError("has no BOS token, which marks where a document starts")
        eos = self._model.eos_id()
        self.eos_id = eos if eos >= 0 else None
        self.model = model
        self.fingerprint = f"sentencepiece-{hashlib.sha256(model).hexdigest()}"
        self._spelling = [self._bytes_of(i) for i in range(self.vocab_size)]
        self.token_bytes = np.array([len(spelling) for spelling in self._spelling], np.int32)
        byte_ids = {self._spelling[i]: i for i in range(self.vocab_size) if self._model.is_byte(i)}
        self._space_ids = [byte_ids.get(bytes([b]), -1) for b in SPACE.encode()]
        self.lossless = len(byte_ids) == 256 and self._spelled(self._model.encode(PROBE)) == PROBE

    def encode(self, text: str) -> np.ndarray:
        text.encode()  # SentencePiece itself would answer a lone surrogate with an unspecific RuntimeError
        if not self.lossless:
            return np.asarray(self._model.encode(text), np.int32)
        # SentencePiece would read U+2581 as a space: spell it as its three bytes instead.
        first, *others = text.split(SPACE)
        ids = self._model.encode(first)
        for part in others:
            ids += self._space_ids + self._model.encode(part)
        return np.asarray(ids, np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        ids = [int(i) for i in ids]
        return self._spelled(ids) if self.lossless else self._model.decode(ids)

    def special(self, piece: str) -> int | None:
        found = self._model.piece_to_id(piece)
        return found if self._model.id_to_piece(found) == piece else None

    def _spelled(self, ids: list[int]) -> str:
        return b"".join(self._spelling[i] for i in ids).decode(errors="replace")

    def _bytes_of(self, i: int) -> bytes:
        piece = self._model.id_to_piece(i)
        if self._model.is_byte(i):  # <0x0A>
            return bytes([int(piece[3:5], 16)])
        if self._model.is_control(i) or self._model.is_unknown(i) or self._model.is_unused(i):
            return b""
        return piece.replace(SPACE, " ").encode()


def load_tokenizer(
    spec: str,
    *,
    manifest: dict[str, Any] | None = None,
    corpus_hash: str | None = None,
    texts: Callable[[], Iterable[str]] | None = None,
) -> Tokenizer:
    """The tokenizer a config's `tokenizer` names: 'bytes', 'sentencepiece:N' or a .model file, also on gs://.

    manifest: that of the run, when the corpus is not open (sampling): its record finds the cached model, and another
    model than the run's is refused. corpus_hash, texts: what 'sentencepiece:N' is trained on if it is not cached yet.
    Raises ConfigError on a malformed spec, DataError when the model is missing, unusable or another one.
    """
    recorded = manifest["tokenizer"] if manifest else {}
    tokenizer: Tokenizer
    if spec == "bytes":
        tokenizer = ByteTokenizer()
    elif match := re.fullmatch(r"sentencepiece:([1-9]\d*)", spec):
        tokenizer = trained_tokenizer(int(match[1]), corpus_hash or recorded.get("trained_on"), texts)
    elif spec.endswith(".model"):
        tokenizer = tokenizer_from_file(spec)
    else:
        raise ConfigError(
            f"tokenizer={spec!r} is not known: 'bytes', 'sentencepiece:N' (N pieces, trained on the corpus) or the "
            f"path of a SentencePiece .model file is allowed"
        )
    if recorded and recorded["fingerprint"] != tokenizer.fingerprint:
        raise DataError(
            f"tokenizer {spec} is now {tokenizer.fingerprint[:24]}, but this run was trained with "
            f"{recorded['fingerprint'][:24]}: its ids mean other text; bring the original model back"
        )
    return tokenizer


def tokenizer_from_file(path: str) -> SentencePieceTokenizer:
    content = read_model(path)
    try:
        return SentencePieceTokenizer(content)
    except ValueError as error:
        raise DataError(f"tokenizer file {path} {error}") from None


def read_model(path: str) -> bytes:
    """A file's content: of this machine, or of cloud storage (gs://bucket/name, and what else fsspec knows)."""
    try:
        if "://" not in path:
            return Path(path).expanduser().read_bytes()
        import fsspec  # comes with gcsfs

        with fsspec.open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise DataError(
            f"tokenizer file {path} cannot be read: {error.strerror or error or type(error).__name__}"
        ) from None
    except Exception as error:  # of whatever a file system's own client raises: no permission, no driver, no network
        why = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"tokenizer file {path} cannot be read: {why}") from None


def trained_tokenizer(
    size: int, corpus_hash: str | None, texts: Callable[[], Iterable[str]] | None
) -> SentencePieceTokenizer:
    """The cached model of this size for this corpus, trained and cached first where there is none yet."""
    path = Path(CACHE).expanduser() / f"{TRAINING}-{size}-{corpus_hash}.model"
    try:
        return SentencePieceTokenizer(path.read_bytes())
    except (OSError, ValueError):
        if texts is None or corpus_hash is None:
            raise DataError(
                f"the trained tokenizer sentencepiece:{size} is not at {path}: open the run's corpus once to train it "
                f"again, or copy the file from the machine that trained it"
            ) from None
    model = train_sentencepiece(size, texts())
    try:
        write_atomically(path, model)
    except OSError as error:
        raise DataError(f"the trained tokenizer cannot be written to {path}: {error.strerror or error}") from None
    return SentencePieceTokenizer(model)


def train_sentencepiece(size: int, texts: Iterable[str]) -> bytes:
    """A byte-pair model of `size` pieces (control tokens and 256 bytes among them): the same texts, the same model."""
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=paragraphs(texts),
            model_writer=model,
            vocab_size=size,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,  # indentation
            character_coverage=0.9995,
            max_sentence_length=2**20,
            num_threads=1,  # with more, ties fall as the threads do
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(f"tokenizer sentencepiece:{size} cannot be trained on this corpus: {in_words(error)}") from None
    return model.getvalue()


def in_words(error: RuntimeError) -> str:
    """What SentencePiece's trainer objects to; its own hints name options that a config does not have."""
    message = str(error)
    if most := re.search(r"size too high .*<= (\d+)", message):
        return f"its text makes at most {most[1]} pieces"
    if least := re.search(r"smaller than required_chars. \d+ vs (\d+)", message):
        return f"its characters and the 256 bytes alone need {least[1]} pieces"
    return message.strip() or "SentencePiece gives no reason"


def paragraphs(texts: Iterable[str], length: int = 2000) -> Iterator[str]:
    """Texts cut at line ends into pieces of about `length` characters, line ends kept: pieces are to learn them, too."""
    for text in texts:
        lines, size = [], 0
        for line in text.splitlines(keepends=True):
            lines.append(line)
            size += len(line)
            if size >= length:
                yield "".join(lines)
                lines, size = [], 0
        if lines:
            yield "".join(lines)


def write_atomically(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
