"""Where labelled images are: a folder of classes, as ImageNet is laid out, ArrayRecord files of tf.train.Example, as TFDS
writes them, or a table (data/image_tables.py). Nothing is decoded here."""

import fnmatch
import glob
import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from configs.data_sections import is_table
from data.bad_records import BadRecord
from data.dataset import DataError, Origin, is_held_out
from data.files import files_below, folder_sizes, read_file
from data.image_tables import Content, Table, open_table
from data.tf_example import features
from data.token_shards import REQUESTS, in_words, open_records

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")
RECORDS = "*.array*record*"
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
        contents = files_below(self.folder, (self.files[i] for i in indices))
        for index, content in zip(indices, contents, strict=True):
            file = f"{self.folder}/{self.files[index]}"
            yield BadRecord(file, 0, "unreadable") if content is None else (content, int(self.labels[index]))

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
        if "://" not in self.files[0]:
            return map(self.read_one, indices)
        wanted: dict[int, list[int]] = {}
        for index in indices:
            wanted.setdefault(self.place(index)[0], []).append(int(index))
        with ThreadPoolExecutor(min(len(wanted), REQUESTS)) as threads:  # each file in one, which waits for the network
            found = threads.map(lambda some: [(index, self.read_one(index)) for index in some], wanted.values())
        contents = dict(pair for pairs in found for pair in pairs)
        return [contents[int(index)] for index in indices]

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


def open_source(name: str, labels: tuple[str, ...] = (), like: ImageSource | None = None) -> ImageSource:
    """`name` is a folder of classes, a folder of .array_record files, a pattern of such files, or a .csv; here or in cloud
    storage. A table has these labels, and the classes of the table `like`. Raises DataError."""
    path = name if "://" in name else str(Path(name).expanduser())
    if is_table(name):
        return open_table(path, labels, like.names if isinstance(like, Table) else None)
    folder, pattern = os.path.split(path) if glob.has_magic(path) else (path.rstrip("/"), RECORDS)
    try:
        sizes = folder_sizes(folder)
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error}") from None
    records = sorted(file for file in sizes if "/" not in file and fnmatch.fnmatch(file, pattern))
    if records:
        return open_record_files(name, folder, {file: sizes[file] for file in records})
    if not sizes and not os.path.isdir(folder):
        raise DataError(
            f"{name} is neither a folder of images nor of ArrayRecord files: give data.source one of these, or a .csv"
        )
    classes = sorted({file.partition("/")[0] for file in sizes if "/" in file})
    numbers = {one: label for label, one in enumerate(classes)}
    files = sorted(file.split("/") for file in sizes if "/" in file and file.lower().endswith(SUFFIXES))
    if not files:
        raise DataError(
            f"{name} has no images in folders, one a class ({', '.join(SUFFIXES)}), and no ArrayRecord files"
        )
    listed = [(f"{one}/{file}", numbers[one], sizes[f"{one}/{file}"]) for one, file in files]
    return ClassFolders(
        folder=folder,
        files=tuple(file for file, _, _ in listed),
        labels=np.array([label for _, label, _ in listed], np.int32),
        classes=len(classes),
        digest=hashlib.sha256(json.dumps(listed).encode()).hexdigest(),
    )


def open_record_files(name: str, folder: str, sizes: dict[str, int]) -> RecordFiles:
    """Of files of so many bytes. Raises DataError."""
    files = [f"{folder}/{file}" for file in sizes]
    try:
        labels = read_file(f"{folder}/{LABELS}").decode()
    except FileNotFoundError:
        raise DataError(
            f"{name} has no {LABELS}, the name of a class a line, as TFDS writes it: labels have no number"
        ) from None
    except OSError as error:
        raise DataError(f"{folder}/{LABELS} cannot be read: {error}") from None
    try:
        with ThreadPoolExecutor(REQUESTS) as threads:
            counts = list(threads.map(lambda file: open_records(file).num_records(), files))
    except RuntimeError as error:
        raise DataError(f"an ArrayRecord file of {name} cannot be read: {in_words(error)}") from None
    if not sum(counts):
        raise DataError(f"the ArrayRecord files of {name} are empty")
    classes = len(labels.split("\n")) - labels.endswith("\n")
    listed = [(file, size, count) for (file, size), count in zip(sizes.items(), counts, strict=True)]
    digest = hashlib.sha256(json.dumps([classes, *listed]).encode()).hexdigest()
    return RecordFiles(tuple(files), np.cumsum(counts), classes, digest, {})
