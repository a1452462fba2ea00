"""seqio's vocabularies as our tokenizers, without seqio and TensorFlow: from what a prepared folder's manifest says of them."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from data.files import read_file
from data.tokenizers import SentencePieceTokenizer, Tokenizer

RESERVED = 3  # of seqio.ByteVocabulary, before the bytes: padding, end, unknown


class OffsetBytes:
    """seqio.ByteVocabulary: byte b is id 3 + b; documents start with padding, id 0, as a T5 decoder's inputs do."""

    bos_id = 0
    eos_id: int | None = 1

    def __init__(self, described: dict[str, Any]) -> None:
        self.vocab_size, self.fingerprint = described["vocab_size"], described["fingerprint"]
        self.token_bytes = np.zeros(self.vocab_size, np.int32)
        self.token_bytes[RESERVED : RESERVED + 256] = 1

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32) + RESERVED

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i - RESERVED for i in map(int, ids) if 0 <= i - RESERVED < 256).decode(errors="replace")

    def special(self, piece: str) -> int | None:
        return None


class BareIds:
    """seqio.PassThroughVocabulary and whatever else we know nothing of: ids are shown as numbers, and stand for no text."""

    bos_id = 0

    def __init__(self, described: dict[str, Any]) -> None:
        self.vocab_size, self.fingerprint = described["vocab_size"], described["fingerprint"]
        self.eos_id: int | None = described["eos_id"]
        self.token_bytes = np.zeros(self.vocab_size, np.int32)

    def encode(self, text: str) -> np.ndarray:
        return np.array([int(word) for word in text.split()], np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(str(int(i)) for i in ids)

    def special(self, piece: str) -> int | None:
        return None


class Pieces(SentencePieceTokenizer):
    """seqio.SentencePieceVocabulary: a model, perhaps without BOS, and further ids after its own."""

    def __init__(self, model: bytes, described: dict[str, Any]) -> None:
        super().__init__(model, described["bos_id"])
        further = described["vocab_size"] - self.vocab_size
        self.vocab_size = described["vocab_size"]
        self.token_bytes = np.pad(self.token_bytes, (0, further))

    def decode(self, ids: Iterable[int]) -> str:
        known = len(self._spelling)
        return super().decode([i for i in map(int, ids) if i < known])


def vocabulary(described: dict[str, Any], model: str) -> Tokenizer:
    """By a manifest's "tokenizer"; `model` is where a SentencePiece model would lie. Raises OSError."""
    if described["kind"] == "sentencepiece":
        return Pieces(read_file(model), described)
    return OffsetBytes(described) if described["kind"] == "bytes" else BareIds(described)
