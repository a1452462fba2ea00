"""Sequences with a label each: Long Range Arena (arXiv 2011.04006) and small tasks like it.

Made-up rows are functions of (seed, split, number); those that take long to make are kept on disk. A row is its symbols or
pixels, then padding; of pairs each half is that for one document. Its label is there twice: as `labels`, for models that pool
a row, and as the token that is asked for at the row's last place, with the ids that follow those of the symbols, so that a
language model learns it as it is.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from configs.long_range_data import FILED, LongRangeData
from data.dataset import Batch, Dataset, Origin, manifest_of
from data.images import load_digits
from data.kept_rows import CACHE, KeptRows, name_of
from data.labelled_rows import Rows, Source, rows_of
from data.listops import expression
from data.long_range_files import open_files
from data.order import ALGORITHM, mixed
from data.pathfinder import draw_images

FORMAT = "long-range-1"  # how numbers and files become rows: part of every manifest
# Of a pixel's levels, by channel: what is 0 and what is 1 as a number (of CIFAR-10: mean and deviation in training).
SCALES = {
    "pathfinder": ((127.5,), (127.5,)),
    "digits": ((8.0,), (8.0,)),
    "cifar": ((125.307, 122.95, 113.866), (62.993, 62.089, 66.705)),
}
GREY = (0.299, 0.587, 0.114)  # of red, green and blue


@dataclass(frozen=True)
class Sequences:
    """One split."""

    config: LongRangeData
    source: Source

    def __len__(self) -> int:
        return len(self.source)

    def read(self, indices: np.ndarray) -> Batch:
        """Rows [B] by number, int64 [B]. Fields: tokens or pairs int32 [B, T], or values float32 [B, T, C]; segment_pos int32
        [B, T], -1 in padding, from 0 on in each document of a pair; labels int32 [B]; targets int32 and weights float32, [B, T]:
        the label's token, and 1, at the last place that is no padding."""
        symbols, lengths, labels = self.source.rows(indices)
        lengths = lengths[:, None, None] if lengths.ndim == 1 else lengths[:, :, None]  # of the row or its documents
        place = np.arange(self.config.sequence_length // lengths.shape[1], dtype=np.int32)[None, None]
        segment_pos = np.where(place < lengths, place, np.int32(-1))
        last = place == lengths - 1
        last[:, :-1] = False
        segment_pos, last = (a.reshape(len(labels), self.config.sequence_length) for a in (segment_pos, last))
        return {
            self.config.inputs: values(symbols, self.config.task) if self.config.channels else tokens(symbols),
            "segment_pos": segment_pos,
            "labels": labels.astype(np.int32),
            "targets": np.where(last, self.config.num_input_symbols + labels[:, None], 0).astype(np.int32),
            "weights": last.astype(np.float32),
        }

    def origins(self, indices: np.ndarray) -> list[list[Origin]]:
        return self.source.origins(indices)


def tokens(symbols: np.ndarray) -> np.ndarray:
    """int32 [n, T]; colours become grey."""
    return (np.rint(symbols @ np.array(GREY)) if symbols.ndim == 3 else symbols).astype(np.int32)


def values(symbols: np.ndarray, task: str) -> np.ndarray:
    """float32 [n, T, channels]"""
    zero, one = map(np.array, SCALES[task])
    return ((symbols.reshape(*symbols.shape[:2], -1) - zero) / one).astype(np.float32)


@dataclass(frozen=True)
class MadeUp:
    """As many rows as anyone asks for."""

    config: LongRangeData
    split: str
    count: int

    def __len__(self) -> int:
        return self.count

    def rows(self, indices: np.ndarray) -> Rows:
        name = f"podwright {self.config.task} {self.config.seed} {self.split}"
        (first,) = np.frombuffer(hashlib.sha256(name.encode()).digest()[:8], "<u8")
        keys = mixed(mixed(indices.astype(np.uint64)) + first)
        return {"listops": listops, "pathfinder": pathfinder, "first-token": first_token, "matching": matching}[
            self.config.task
        ](self.config, self.split, keys)

    def origins(self, indices: np.ndarray) -> list[list[Origin]]:
        return [[Origin(f"{self.config.task}, {self.split}", int(i))] for i in indices]


def listops(config: LongRangeData, split: str, keys: np.ndarray) -> Rows:
    symbols = np.zeros((len(keys), config.sequence_length), np.uint8)
    lengths, labels = np.empty((2, len(keys)), np.int64)
    for row, key in enumerate(keys.tolist()):
        found, labels[row] = expression(key, split, config)
        symbols[row, : len(found)], lengths[row] = np.frombuffer(found, np.uint8), len(found)
    return Rows(symbols, lengths, labels)


def pathfinder(config: LongRangeData, split: str, keys: np.ndarray) -> Rows:
    side = round(config.sequence_length**0.5)
    found = draw_images(keys, side, config.contour_length)
    return Rows(found.pixels.reshape(len(keys), -1), np.full(len(keys), side**2), found.labels.astype(np.int64))


def first_token(config: LongRangeData, split: str, keys: np.ndarray) -> Rows:
    """The first symbol is the label; the others have ids that no label has."""
    length = config.sequence_length
    words = mixed(keys[:, None] + mixed(np.arange(length, dtype=np.uint64)))
    symbols = (words % np.uint64(config.num_symbols)).astype(np.uint16)
    symbols[:, 1:] += config.num_symbols
    return Rows(symbols, np.full(len(keys), length), symbols[:, 0].astype(np.int64))


def matching(config: LongRangeData, split: str, keys: np.ndarray) -> Rows:
    """Two documents, each with a key at every eighth place on average, and one for sure, among symbols that are none: whether
    it is the same. A document has from half of the symbols that there is room for to all."""
    count, room = config.num_symbols, config.text_length
    words = mixed(keys[:, None] + mixed(np.arange(2 * (room + 3), dtype=np.uint64))).reshape(len(keys), 2, room + 3)
    drawn = (words[:, :, :3] >> np.uint64(1)).astype(np.int64)
    lengths = room - drawn[:, :, 0] % (room // 2 + 1)
    places = drawn[:, :, 1] % lengths
    labels = drawn[:, 1, 2] % 2
    away = (1 - labels) * (1 + drawn[:, 1, 2] // 2 % (count - 1))
    own = np.stack([drawn[:, 0, 2], drawn[:, 0, 2] + away], axis=1) % count
    symbols = (words[:, :, 3:] % np.uint64(count)).astype(np.uint16) + np.uint16(count)
    keyed = (words[:, :, 3:] >> np.uint64(20)) % np.uint64(8) == 0
    np.put_along_axis(keyed, places[:, :, None], True, axis=2)
    symbols = np.where(keyed, own[:, :, None].astype(np.uint16), symbols)
    texts = [[text[:length] for text, length in zip(*row, strict=True)] for row in zip(symbols, lengths, strict=True)]
    return rows_of(texts, labels, config)


@dataclass(frozen=True)
class Digits:
    """scikit-learn's digits: 64 pixels of 17 levels."""

    pixels: np.ndarray  # uint8 [n, 64]
    labels: np.ndarray  # int64 [n]
    numbers: np.ndarray  # int64 [n]: in scikit-learn's order

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, indices: np.ndarray) -> Rows:
        return Rows(self.pixels[indices], np.full(len(indices), 64), self.labels[indices])

    def origins(self, indices: np.ndarray) -> list[list[Origin]]:
        return [[Origin("digits", int(i))] for i in self.numbers[indices]]


def digits(split: str) -> Digits:
    """A tenth of them for each of the splits that are held out, by hash."""
    pixels, labels = load_digits()
    parts = ("validation", "test", *("train",) * 8)
    hashes = [hashlib.sha256(f"digits/{i}".encode()).digest() for i in range(len(labels))]
    numbers = np.flatnonzero([parts[int.from_bytes(one[:8], "big") % 10] == split for one in hashes])
    return Digits(pixels.reshape(-1, 64)[numbers], labels[numbers].astype(np.int64), numbers)


# What decides the rows of a task that is made up, besides seed, split and number.
DECIDES: dict[str, tuple[str, ...]] = {
    "listops": ("max_depth", "max_args", "min_length", "max_length"),
    "pathfinder": ("contour_length",),
    "first-token": ("num_symbols",),
    "matching": ("num_symbols",),
}
SLOW = ("listops", "pathfinder")


def open_long_range(config: LongRangeData) -> Dataset:
    """Raises DataError when a split is left without a row."""
    content = {
        "kind": config.kind,
        "format": FORMAT,
        "order": ALGORITHM,
        "needs": {"channels": config.channels}
        if config.channels
        else {"vocab_size": config.num_input_symbols + config.num_classes},
        **{name: getattr(config, name) for name in ("task", "inputs", "sequence_length", "batch_size", "seed")},
    }
    skipped: list[tuple[str, str]] = []
    train: Source
    held_out: Source
    if config.task in FILED:
        train, held_out, hashes, skipped = open_files(config)
        content["files"] = hashes
    elif config.task == "digits":
        train, held_out = digits("train"), digits(config.held_out_split)
    else:
        decided = {name: getattr(config, name) for name in DECIDES[config.task]}
        content |= {**decided, "training_rows": config.training_rows}
        train = made_up(config, "train", config.training_rows)
        held_out = made_up(config, config.held_out_split, config.held_out_rows)
    counts = {"training_rows": len(train), "held_out_rows": len(held_out), "skipped": len(skipped)}
    what = f"{config.sequence_length:,} {config.inputs}"
    if config.inputs == "pairs":
        what = f"two documents of {config.text_length:,} tokens"
    made = f", made as they are read{f' and kept in {CACHE}' * (config.task in SLOW)}" * (config.task in DECIDES)
    return Dataset(
        manifest=manifest_of(content, counts),
        train=Sequences(config, train),
        held_out=Sequences(config, held_out),
        batch_size=config.batch_size,
        seed=config.seed,
        summary=(
            f"{config.task}: {len(train):,} rows for training and {len(held_out):,} for {config.held_out_split} of "
            f"{what} at most, {config.num_classes} classes{made}",
        ),
        skipped=skipped,
        unit="row",
        workers=config.workers,
    )


def made_up(config: LongRangeData, split: str, count: int) -> Source:
    rows = MadeUp(config, split, count)
    if config.task not in SLOW:
        return rows
    decided = {name: getattr(config, name) for name in ("task", "seed", "sequence_length", *DECIDES[config.task])}
    return KeptRows(rows, name_of({"format": FORMAT, "split": split, **decided}), config.sequence_length)
