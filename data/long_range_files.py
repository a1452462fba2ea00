"""The tasks of Long Range Arena whose data a user brings, as files in a folder.

    text       train.tsv, test.tsv: LABEL<tab>TEXT a line, or .jsonl: {"label": 0, "text": "..."}; of IMDB 1 is positive
    retrieval  new_aan_pairs.train.tsv, .eval.tsv, .test.tsv, as released: LABEL, ID, ID, TEXT, TEXT between tabs
    cifar      data_batch_1.bin to data_batch_5.bin and test_batch.bin of CIFAR-10's binary version; the last 5,000 images for
               training are the validation split

Texts are read as bytes and cut to what a row holds of each.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configs.long_range_data import PAIRED, LongRangeData
from data.dataset import DataError, Origin
from data.labelled_rows import Rows, Source, rows_of

IMAGE = 32 * 32 * 3
VALIDATION_IMAGES = 5000
Found = tuple[
    Source, Source, dict[str, str], list[tuple[str, str]]
]  # train, held out, sha256 by file, what was skipped


class Unusable(Exception):
    """Why a row is left out, in a few words."""


def open_files(config: LongRangeData) -> Found:
    """Both splits of a folder. Raises DataError where a file is missing or has nothing usable."""
    folder = Path(config.files).expanduser()
    if not folder.is_dir():
        raise DataError(f"{config.show('files')} is not a folder: give the one with the files of {config.show('task')}")
    return open_images(config, folder) if config.task == "cifar" else open_lines(config, folder)


@dataclass(frozen=True)
class Lines:
    """Rows that are lines of a file. Only where they are is kept."""

    config: LongRangeData
    file: Path
    starts: np.ndarray  # int64 [n]: byte
    numbers: np.ndarray  # int64 [n]: of lines, from 1

    def __len__(self) -> int:
        return len(self.starts)

    def rows(self, indices: np.ndarray) -> Rows:
        texts, labels = [], np.empty(len(indices), np.int64)
        with open(self.file, "rb") as file:
            for row, start in enumerate(self.starts[indices].tolist()):
                file.seek(start)
                found, labels[row] = parsed(self.config, self.file, file.readline())
                texts.append(found)
        return rows_of(texts, labels, self.config)

    def origins(self, indices: np.ndarray) -> list[list[Origin]]:
        return [[Origin(self.file.name, int(i))] for i in self.numbers[indices]]


def open_lines(config: LongRangeData, folder: Path) -> Found:
    hashes: dict[str, str] = {}
    skipped: list[tuple[str, str]] = []
    splits = []
    for split in ("train", config.held_out_split):
        file = file_of(config, folder, split)
        starts, numbers, position, digest = [], [], 0, hashlib.sha256()
        for number, line in lines(file):
            try:
                parsed(config, file, line)
                starts.append(position)
                numbers.append(number)
            except Unusable as why:
                skipped.append((f"{file.name}:{number}", str(why)))
            position += len(line)
            digest.update(line)
        if not starts:
            lost = f": all {len(skipped)} lines are unusable, {skipped[0][0]} is {skipped[0][1]}" if skipped else ""
            raise DataError(f"{file} has no row for {split}{lost}")
        hashes[file.name] = digest.hexdigest()
        splits.append(Lines(config, file, np.array(starts), np.array(numbers)))
    return splits[0], splits[1], hashes, skipped


def file_of(config: LongRangeData, folder: Path, split: str) -> Path:
    """Raises DataError where there is none."""
    if config.task == "retrieval":
        names = [f"new_aan_pairs.{'eval' if split == 'validation' else split}.tsv"]
    else:
        names = [f"{split}.tsv", f"{split}.jsonl"]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    other = "; data.held_out_split='test' takes the test split" if split == "validation" else ""
    raise DataError(f"{folder} has no {' or '.join(names)}{other}")


def lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line with its end). Raises DataError."""
    try:
        with open(file, "rb") as opened:
            yield from enumerate(opened, start=1)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from None


def parsed(config: LongRangeData, file: Path, line: bytes) -> tuple[list[np.ndarray], int]:
    """The text of a line, or both, uint8 [n], and its label. Raises Unusable."""
    fields = of_json(line) if file.suffix == ".jsonl" else line.rstrip(b"\r\n").split(b"\t")
    label, *texts = [fields[0], *fields[3:]] if config.task in PAIRED and len(fields) == 5 else fields
    if len(texts) != (2 if config.task in PAIRED else 1):
        raise Unusable(f"of {len(fields)} columns")
    if not all(texts):
        raise Unusable("without a text")
    if label not in (b"0", b"1", b"0.0", b"1.0"):
        raise Unusable("without a label that is 0 or 1")
    return [np.frombuffer(text, np.uint8) for text in texts], int(float(label))


def of_json(line: bytes) -> list[bytes]:
    """[label, text]. Raises Unusable."""
    try:
        record = json.loads(line)
        return [str(record["label"]).encode(), record["text"].encode()]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Unusable("not JSON with a label and a text") from None


@dataclass(frozen=True)
class ImageFiles:
    """Rows of CIFAR-10's binary files: a label, then 1,024 bytes of each colour, line by line."""

    files: tuple[Path, ...]
    places: np.ndarray  # int64 [n, 2]: which file, and which image in it

    def __len__(self) -> int:
        return len(self.places)

    def rows(self, indices: np.ndarray) -> Rows:
        records = np.stack([images_in(self.files[file])[image] for file, image in self.places[indices]])
        colours = records[:, 1:].reshape(len(records), 3, 1024)
        return Rows(np.swapaxes(colours, 1, 2), np.full(len(records), 1024), records[:, 0].astype(np.int64))

    def origins(self, indices: np.ndarray) -> list[list[Origin]]:
        return [[Origin(self.files[file].name, int(image))] for file, image in self.places[indices]]


def images_in(file: Path) -> np.ndarray:
    """uint8 [images, 3073], read where it is looked at. Raises DataError."""
    try:
        size = file.stat().st_size
        if not size or size % (IMAGE + 1):
            raise DataError(f"{file} has {size:,} bytes, not {IMAGE + 1:,} an image: CIFAR-10's binary version does")
        return np.memmap(file, np.uint8, "r", shape=(size // (IMAGE + 1), IMAGE + 1))
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from None


def open_images(config: LongRangeData, folder: Path) -> Found:
    skipped: list[tuple[str, str]] = []
    hashes: dict[str, str] = {}

    def usable(names: list[str]) -> tuple[tuple[Path, ...], np.ndarray]:
        files, places = tuple(folder / name for name in names), []
        for number, file in enumerate(files):
            labels = images_in(file)[:, 0]
            hashes[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
            skipped.extend((f"{file.name}:{image}", "of no class from 0 to 9") for image in np.flatnonzero(labels > 9))
            places += [(number, image) for image in np.flatnonzero(labels <= 9)]
        return files, np.array(places, np.int64).reshape(-1, 2)

    files, places = usable([f"data_batch_{number}.bin" for number in range(1, 6)])
    apart = min(VALIDATION_IMAGES, len(places) // 10)
    train, validation = (
        ImageFiles(files, places[: len(places) - apart]),
        ImageFiles(files, places[len(places) - apart :]),
    )
    held_out = validation if config.held_out_split == "validation" else ImageFiles(*usable(["test_batch.bin"]))
    for split, rows in (("train", train), (config.held_out_split, held_out)):
        if not len(rows):
            raise DataError(f"{folder} has no image for {split}")
    return train, held_out, hashes, skipped
