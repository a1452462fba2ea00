"""Rows that ask for what stood earlier in them (arXiv 2402.19427, section 6.2; 2312.00752, section 4.1).

Row i is computed from the seed and i alone, so there are as many as anyone asks for and none is stored.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from configs.schema import RecallData
from data.dataset import Batch, Dataset, Origin, manifest_of
from data.order import ALGORITHM, mixed

FORMAT = "recall-1"  # how numbers become rows: part of every manifest
TRAINING_ROWS = 2**40  # no run reads them all


@dataclass(frozen=True)
class Questions:
    """One split."""

    config: RecallData
    count: int
    split: str

    def __len__(self) -> int:
        return self.count

    def read(self, indices: np.ndarray) -> Batch:
        """Rows [B] by number, int64 [B]. Fields: tokens, targets, segment_pos, int32 [B, T], and weights, float32 [B, T],
        1 where the row asks; a target stands where it is asked for."""
        make = {"selective-copy": selective_copy, "induction": induction}[self.config.task]
        tokens, targets, asked = make(self.config, random_words(self.config, self.split, indices))
        position = np.arange(tokens.shape[1], dtype=np.int32)
        return {
            "tokens": tokens.astype(np.int32),
            "targets": np.where(asked, targets, 0).astype(np.int32),
            "segment_pos": np.ascontiguousarray(np.broadcast_to(position, tokens.shape)),
            "weights": asked.astype(np.float32),
        }

    def origins(self, indices: np.ndarray) -> list[list[Origin]]:
        return [[Origin(f"{self.config.task}, {self.split}", int(i))] for i in indices]


def random_words(config: RecallData, split: str, indices: np.ndarray) -> np.ndarray:
    """uint64 [B, 2 T] for rows [B]: two independent words a token."""
    key = hashlib.sha256(f"podwright recall {config.seed} {split}".encode()).digest()
    row = mixed(indices.astype(np.uint64) + np.frombuffer(key[:8], "<u8"))
    place = mixed(np.arange(2 * config.sequence_length, dtype=np.uint64) + np.frombuffer(key[8:16], "<u8"))
    return mixed(row[:, None] + place)


def selective_copy(config: RecallData, words: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """tokens, targets, asked [B, T]: `num_copied` symbols at random places among noise (id 0); then as many markers, at
    which the symbols are asked for in order."""
    rows, copied = len(words), config.num_copied
    context = config.sequence_length - copied
    places = np.sort(np.argsort(words[:, :context], axis=1)[:, :copied], axis=1)
    symbols = 1 + words[:, -copied:] % (config.num_symbols - 2)
    tokens = np.zeros((rows, config.sequence_length), np.int64)
    np.put_along_axis(tokens, places, symbols.astype(np.int64), axis=1)
    tokens[:, context:] = config.num_symbols - 1
    targets, asked = np.zeros_like(tokens), np.zeros(tokens.shape, bool)
    targets[:, context:], asked[:, context:] = symbols, True
    return tokens, targets, asked


def induction(config: RecallData, words: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """tokens, targets, asked [B, T]: random symbols, one marker among them and one at the end, where the symbol that
    followed the first is asked for."""
    length, marker = config.sequence_length, config.num_symbols - 1
    tokens = (words[:, :length] % marker).astype(np.int64)
    place = (words[:, -1] % (length - 2)).astype(np.int64)
    row = np.arange(len(tokens))
    tokens[row, place], tokens[:, -1] = marker, marker
    targets, asked = np.zeros_like(tokens), np.zeros(tokens.shape, bool)
    targets[:, -1], asked[:, -1] = tokens[row, place + 1], True
    return tokens, targets, asked


def open_recall(config: RecallData) -> Dataset:
    content = {
        "kind": config.kind,
        "format": FORMAT,
        "order": ALGORITHM,
        "needs": {"vocab_size": config.num_symbols},
        **{name: getattr(config, name) for name in ("task", "num_symbols", "sequence_length", "batch_size", "seed")},
        **({"num_copied": config.num_copied} if config.task == "selective-copy" else {}),
        "held_out_rows": config.held_out_rows,
    }
    return Dataset(
        manifest=manifest_of(content, {"held_out_rows": config.held_out_rows, "skipped": 0}),
        train=Questions(config, TRAINING_ROWS, "train"),
        held_out=Questions(config, config.held_out_rows, "held_out"),
        batch_size=config.batch_size,
        seed=config.seed,
        summary=(
            f"{config.task}: rows of {config.sequence_length} tokens and {config.num_symbols} symbols, made as they are "
            f"read; {config.held_out_rows:,} held out",
        ),
        skipped=[],
    )
