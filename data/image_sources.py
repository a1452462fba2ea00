"""Where labelled images are: a folder of classes, as ImageNet is laid out, or ArrayRecord files of tf.train.Example, as TFDS
writes them. Nothing is decoded here."""

import glob
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data.bad_records import BadRecord
from data.dataset import DataError, Origin, is_held_out
from data.tf_example import features
from data.token_shards import open_records

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")
Content = tuple[bytes, int] | BadRecord
LABELS = "label.labels.txt"  # of TFDS: the name of a class a line


class ImageSource(Protocol):
    @property
    def classes(self) -> int: ...

    @property
    def digest(self) -> str:
        """Of what there is: another source has another one."""
        ...

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray) -> Iterable[Content]:
        """Encoded images and their labels, by number, int64 [n]."""
        ...

    def origin(self, index: int) -> Origin: ...

    def held_out(self, share: float) -> np.ndarray:
        """bool [n]: which images are kept for evaluation, by hash of where they are."""
        ...


@dataclass(frozen=True)
class ClassFolders:
    """FOLDER/CLASS/IMAGE; classes are numbered by name."""

    folder: str
    files: tuple[str, ...]  # below the folder, sorted
    labels: np.ndarray  # int32 [n]
    classes: int
    digest: str

    def __len__(self) -> int:
        return len(self.files)

    def read(self, indices: np.ndarray) -> Iterable[Content]:
        return map(self.read_one, indices)

    def read_one(self, index: int) -> Content:
        file = os.path.join(self.folder, self.files[index])
        try:
            return Path(file).read_bytes(), int(self.labels[index])
        except OSError:
            return BadRecord(file, 0, "unreadable")

    def origin(self, index: int) -> Origin:
        return Origin(self.files[index], 0)

    def held_out(self, share: float) -> np.ndarray:
        return np.array([is_held_out(file, share) for file in self.files])


@dataclass(frozen=True)
class RecordFiles:
    """Records with the features `image`, encoded, and `label`."""

    files: tuple[str, ...]
    ends: np.ndarray  # int64 [files]: records up to each file's end
    classes: int
    digest: str
    readers: dict[int, Any]

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getstate__(self) -> dict:
        return {**self.__dict__, "readers": {}}  # a file is opened where it is read

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)

    def place(self, index: int) -> tuple[int, int]:
        file = int(np.searchsorted(self.ends, index, side="right"))
        return file, index - (int(self.ends[file - 1]) if file else 0)

    def read(self, indices: np.ndarray) -> Iterable[Content]:
        return map(self.read_one, indices)

    def read_one(self, index: int) -> Content:
        number, place = self.place(index)
        file = self.files[number]
        try:
            reader = self.readers.setdefault(number, None) or open_records(file)
            self.readers[number] = reader
            found = features(reader.read([place])[0])
        except RuntimeError:
            return BadRecord(file, place, "a damaged record")
        except ValueError:
            return BadRecord(file, place, "no tf.train.Example")
        image, label = found.get("image", []), found.get("label", [])
        if len(image) != 1 or not isinstance(image[0], bytes):
            return BadRecord(file, place, "without an image")
        if len(label) != 1 or not isinstance(label[0], int) or not 0 <= label[0] < self.classes:
            return BadRecord(file, place, f"without a label from 0 to {self.classes - 1}")
        return image[0], label[0]

    def origin(self, index: int) -> Origin:
        number, place = self.place(index)
        return Origin(os.path.basename(self.files[number]), place)

    def held_out(self, share: float) -> np.ndarray:
        names = [f"{origin.source}/{origin.place}" for origin in map(self.origin, range(len(self)))]
        return np.array([is_held_out(name, share) for name in names])


def open_source(name: str) -> ImageSource:
    """`name` is a folder of classes, a folder of .array_record files, or a pattern of such files. Raises DataError."""
    path = Path(name).expanduser()
    pattern = str(path / "*.array*record*") if path.is_dir() else str(path)
    records = sorted(glob.glob(pattern)) if path.is_dir() or glob.has_magic(pattern) else []
    if records:
        return open_record_files(name, records)
    if not path.is_dir():
        raise DataError(f"{name} is neither a folder of images nor of ArrayRecord files: give data.source one of these")
    classes = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    files = [
        (f"{one}/{file}", label)
        for label, one in enumerate(classes)
        for file in sorted(os.listdir(path / one))
        if file.lower().endswith(SUFFIXES)
    ]
    if not files:
        raise DataError(
            f"{name} has no images in folders, one a class ({', '.join(SUFFIXES)}), and no ArrayRecord files"
        )
    listed = [(file, label, os.path.getsize(path / file)) for file, label in files]
    return ClassFolders(
        folder=str(path),
        files=tuple(file for file, _ in files),
        labels=np.array([label for _, label in files], np.int32),
        classes=len(classes),
        digest=hashlib.sha256(json.dumps(listed).encode()).hexdigest(),
    )


def open_record_files(name: str, files: list[str]) -> RecordFiles:
    labels = Path(files[0]).parent / LABELS
    if not labels.exists():
        raise DataError(f"{name} has no {LABELS}, the name of a class a line, as TFDS writes it: labels have no number")
    try:
        counts = [open_records(file).num_records() for file in files]
    except RuntimeError as error:
        raise DataError(f"an ArrayRecord file of {name} cannot be read: {error}") from None
    if not sum(counts):
        raise DataError(f"the ArrayRecord files of {name} are empty")
    classes = len(labels.read_text().split("\n")) - labels.read_text().endswith("\n")
    listed = [(os.path.basename(file), os.path.getsize(file), count) for file, count in zip(files, counts, strict=True)]
    digest = hashlib.sha256(json.dumps([classes, *listed]).encode()).hexdigest()
    return RecordFiles(tuple(files), np.cumsum(counts), classes, digest, {})
