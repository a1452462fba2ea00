"""Rows of equal length from documents laid end to end, with what each token needs to know about its document."""

from dataclasses import dataclass

import numpy as np

from configs.schema import TextData
from data.corpus import Corpus, Document, open_corpus
from data.dataset import Batch, DataError, Dataset, Origin, count_reasons, manifest_of
from data.order import ALGORITHM
from data.tokenizers import Tokenizer, load_tokenizer

FORMAT = "rows-1"  # how documents become rows: part of every manifest


@dataclass(frozen=True)
class Rows:
    """One split. Row r holds tokens [r*T, r*T + T] of the stream, so that each token is once a target; the last
    tokens, too few for a row, are cut."""

    tokens: np.ndarray  # [n], uint16 or uint32: every document's BOS and ids
    starts: np.ndarray  # int64 [documents]: where each BOS stands
    length: int  # T
    token_bytes: np.ndarray  # int32 [vocab]
    names: tuple[str, ...]  # of the documents

    def __len__(self) -> int:
        return max(len(self.tokens) - 1, 0) // self.length

    def read(self, indices: np.ndarray) -> Batch:
        """Rows [B] by number, int64 [B]. Fields:

        tokens, targets  int32 [B, T]: ids, and those that follow them
        segment_pos      int32 [B, T]: position in the document, 0 at its BOS; not reset at a row's start
        segment_ids      int32 [B, T]: number of the document within the row, from 1
        weights          float32 [B, T]: 0 where the target is the next document's BOS, which nothing foretells
        target_bytes     int32 [B]: bytes of text behind the row's weighted targets
        """
        at = indices[:, None] * self.length + np.arange(self.length + 1)
        document = np.searchsorted(self.starts, at[:, 0], side="right") - 1
        bos = int(self.tokens[self.starts[0]])
        return row_fields(self.tokens[at].astype(np.int32), at[:, 0] - self.starts[document], bos, self.token_bytes)

    def origins(self, indices: np.ndarray) -> list[list[Origin]]:
        found = []
        for first in indices * self.length:
            last = np.searchsorted(self.starts, first + self.length, side="left")
            numbers = range(int(np.searchsorted(self.starts, first, side="right")) - 1, int(last))
            found.append([Origin(self.names[i], 0, max(0, int(first - self.starts[i]))) for i in numbers])
        return found


def row_fields(
    ids: np.ndarray, position: np.ndarray, bos: int, token_bytes: np.ndarray, learned: np.ndarray | None = None
) -> Batch:
    """The fields of `Rows.read` for ids, int32 [B, T + 1], in which every BOS starts a document and nothing else does;
    position: int64 [B], place of each row's first token in its document; learned: bool [B, T + 1], all unless given."""
    tokens, targets = ids[:, :-1], ids[:, 1:]
    starts = tokens == bos
    starts[:, 0] = False
    # Counts from the row's first token, less what they had reached where a document begins.
    segment_pos = position.astype(np.int32)[:, None] + np.arange(tokens.shape[1], dtype=np.int32)
    segment_ids = np.ones(tokens.shape, np.int32)
    for row, at in zip(*np.nonzero(starts), strict=True):
        segment_pos[row, at:] -= segment_pos[row, at]
        segment_ids[row, at:] += 1
    predicted = targets != bos
    if learned is not None:
        predicted &= learned[:, 1:]
    return {
        "tokens": np.ascontiguousarray(tokens),
        "targets": np.ascontiguousarray(targets),
        "segment_pos": segment_pos,
        "segment_ids": segment_ids,
        "weights": predicted.astype(np.float32),
        "target_bytes": (token_bytes[targets] * predicted).sum(axis=1, dtype=np.int32),
    }


def open_text(config: TextData) -> Dataset:
    """Reads, tokenises and lays out the corpus (in memory: two or four bytes a token). Raises DataError, ConfigError."""
    corpus = open_corpus(config)
    tokenizer = corpus_tokenizer(config, corpus)
    train = lay_out(corpus.split(held_out=False), tokenizer, config.sequence_length)
    held_out = lay_out(corpus.split(held_out=True), tokenizer, config.sequence_length)
    check_rows(corpus, config, train, "training")
    check_rows(corpus, config, held_out, "held-out")
    return Dataset(
        manifest=text_manifest(config, corpus, tokenizer, train, held_out),
        train=train,
        held_out=held_out,
        batch_size=config.batch_size,
        seed=config.seed,
        summary=summary(config, corpus, tokenizer, train, held_out),
        skipped=corpus.skipped,
    )


def open_tokenizer(config: TextData, manifest: dict | None = None) -> Tokenizer:
    """The tokenizer alone. With the run's manifest the corpus stays closed, and another tokenizer is refused."""
    if manifest is not None or not config.tokenizer.startswith("sentencepiece:"):
        return load_tokenizer(config.tokenizer, manifest=manifest)
    return corpus_tokenizer(config, open_corpus(config))


def corpus_tokenizer(config: TextData, corpus: Corpus) -> Tokenizer:
    training = corpus.split(held_out=False)
    return load_tokenizer(
        config.tokenizer, corpus_hash=corpus.training_hash(), texts=lambda: (d.text for d in training)
    )


def held_out_bytes(config: TextData) -> bytes:
    """The held-out documents, one after the other: what a compressor is given for comparison."""
    return b"".join(d.text.encode() for d in open_corpus(config).split(held_out=True))


def held_out_stretches(config: TextData, length: int) -> np.ndarray:
    """int32 [n, length + 1]: whole stretches of held-out documents, BOS before each. The first of every document comes
    before the second of any. Raises DataError if no document is that long."""
    corpus = open_corpus(config)
    tokenizer = corpus_tokenizer(config, corpus)
    found = []
    for document in corpus.split(held_out=True):
        ids = tokenizer.encode(document.text)
        found += [(i, ids[i * length : (i + 1) * length]) for i in range(len(ids) // length)]
    if not found:
        raise DataError(f"no held-out document of {corpus.folder} has {length} tokens")
    found.sort(key=lambda stretch: stretch[0])  # stable: documents keep their order
    return np.stack([np.concatenate([[tokenizer.bos_id], ids]) for _, ids in found]).astype(np.int32)


def bigram_entropy(text: bytes) -> float:
    """Bits a byte, given the byte before, by the text's own frequencies: no bigram model does better."""
    symbols = np.frombuffer(text, np.uint8).astype(np.int64)
    pairs = np.bincount(symbols[:-1] * 256 + symbols[1:], minlength=2**16).reshape(256, 256)
    share = pairs / np.maximum(pairs.sum(axis=1, keepdims=True), 1)
    seen = pairs > 0
    return float(-(pairs[seen] * np.log2(share[seen])).sum() / pairs.sum())


def lay_out(documents: list[Document], tokenizer: Tokenizer, length: int) -> Rows:
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    bos = np.array([tokenizer.bos_id], dtype)
    pieces, starts, end = [], [], 0
    for document in documents:
        ids = tokenizer.encode(document.text).astype(dtype)
        pieces += [bos, ids]
        starts.append(end)
        end += 1 + len(ids)
    names = tuple(document.path for document in documents)
    return Rows(np.concatenate(pieces), np.array(starts, np.int64), length, tokenizer.token_bytes, names)


def check_rows(corpus: Corpus, config: TextData, rows: Rows, split: str) -> None:
    if not len(rows):
        skipped = f" (skipped {count_reasons(corpus.skipped)})" if corpus.skipped else ""
        raise DataError(
            f"folder {corpus.folder} with pattern {config.pattern} has {len(corpus.documents)} usable documents"
            f"{skipped}, but its {len(rows.tokens)} {split} tokens are fewer than the {config.sequence_length + 1} of "
            f"one row: add documents, or lower data.sequence_length"
        )


def text_manifest(config: TextData, corpus: Corpus, tokenizer: Tokenizer, train: Rows, held_out: Rows) -> dict:
    """The folder itself stays out: the same files elsewhere are the same data."""
    described = {"spec": config.tokenizer, "vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint}
    if config.tokenizer.startswith("sentencepiece:"):
        described["trained_on"] = corpus.training_hash()
    content = {
        "kind": config.kind,
        "format": FORMAT,
        "order": ALGORITHM,
        "sequence_length": config.sequence_length,
        "batch_size": config.batch_size,
        "tokenizer": described,
        "needs": {"vocab_size": tokenizer.vocab_size},
        "files": [
            {"path": d.path, "sha256": d.sha256, "bytes": d.bytes, "split": "held_out" if d.held_out else "train"}
            for d in corpus.documents
        ],
    }
    counts = {
        "folder": str(corpus.folder),
        "files": len(corpus.documents),
        "bytes": sum(d.bytes for d in corpus.documents),
        "train_tokens": len(train.tokens),
        "train_rows": len(train),
        "held_out_tokens": len(held_out.tokens),
        "held_out_rows": len(held_out),
        "skipped": len(corpus.skipped),
    }
    return manifest_of(content, counts)


def summary(config: TextData, corpus: Corpus, tokenizer: Tokenizer, train: Rows, held_out: Rows) -> tuple[str, str]:
    size = sum(d.bytes for d in corpus.documents)
    exact = "" if getattr(tokenizer, "lossless", True) else " (it normalises: bits per byte are of what it keeps)"
    return (
        f"{config.corpus}: {len(train.starts):,} training and {len(held_out.starts):,} held-out files, "
        f"{size / 1e6:,.1f} MB, tokenizer {config.tokenizer} of {tokenizer.vocab_size:,} ids{exact}",
        f"{len(train.tokens):,} training tokens in {len(train):,} rows of {config.sequence_length} "
        f"({len(train) / config.batch_size:,.1f} steps of {config.batch_size} an epoch), held out "
        f"{len(held_out.tokens):,} in {len(held_out):,}",
    )
