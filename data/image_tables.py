"""Images that a table lists: a CSV with a row an image, which may have several labels, an owner and attributes.

Columns: `path`, below the table's folder; `label`, a class, or any number of `label:NAME`, from 0 to 1; perhaps `unit`, whose
image it is, such as a patient's; and any number of `group:NAME`, attributes that tell subgroups apart.
"""

import csv
import hashlib
import io
import json
import os
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from data.bad_records import BadRecord
from data.dataset import DataError, Origin, is_held_out
from data.files import files_below, read_file

LABEL, GROUP = "label:", "group:"
Label = int | np.ndarray  # a class, or of several labels float32 [L], from 0 to 1
Content = tuple[bytes, Label] | BadRecord


@dataclass(frozen=True)
class Table:
    folder: str
    files: tuple[str, ...]  # below the folder, in the table's order
    labels: np.ndarray  # int32 [n], or of several labels float32 [n, L]
    names: tuple[str, ...]  # of the classes, or of the labels
    owners: np.ndarray | None  # str [n]: the unit that each belongs to
    attributes: dict[str, np.ndarray]  # str [n] by name
    digest: str  # of files, labels and owners

    @property
    def classes(self) -> int:
        return len(self.names)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, indices: np.ndarray) -> Iterator[Content]:
        for index, content in zip(indices, files_below(self.folder, (self.files[i] for i in indices)), strict=True):
            label = self.labels[index] if self.labels.ndim == 2 else int(self.labels[index])
            yield BadRecord(self.files[index], 0, "unreadable") if content is None else (content, label)

    def origin(self, index: int) -> Origin:
        return Origin(self.files[index], 0)

    def held_out(self, share: float) -> np.ndarray:
        """By hash of the unit, where there is one: its images are on one side."""
        keys = self.files if self.owners is None else self.owners
        return np.array([is_held_out(str(key), share) for key in keys])


def open_table(name: str, labels: Sequence[str] = (), classes: tuple[str, ...] | None = None) -> Table:
    """`labels` are the columns label:NAME to learn, in the order of the model's outputs; without them the column `label` has a
    class, numbered as in `classes`. Raises DataError."""
    header, rows = read_table(name)
    columns = {column: [row[place] for row in rows] for place, column in enumerate(header)}
    offered = [column[len(LABEL) :] for column in header if column.startswith(LABEL)]
    if "path" not in columns:
        raise DataError(f"{name} has no column path: its columns are {', '.join(header)}")
    if missing := [one for one in labels if one not in offered]:
        has = f"there are {', '.join(LABEL + one for one in offered)}" if offered else "it has none of this kind"
        raise DataError(f"{name} has no column {LABEL}{missing[0]}, which data.labels names: {has}")
    if not labels and "label" not in columns:
        have = f": data.labels can name columns of it ({','.join(offered)})" if offered else ""
        raise DataError(f"{name} has no column label{have or ': its columns are ' + ', '.join(header)}")
    files, places = tuple(map(posixpath.normpath, columns["path"])), dict[str, int]()
    for row, (path, file) in enumerate(zip(columns["path"], files, strict=True), start=2):
        if not path or file.startswith("/") or "://" in path:
            raise DataError(f"{name} has path {path!r} in row {row}: a path from the table's folder is allowed")
        if (first := places.setdefault(file, row)) != row:
            raise DataError(f"{name} has path {path!r} in rows {first} and {row}: an image has one row")
    if labels:
        names = tuple(labels)
        values = np.stack([shares(name, LABEL + one, columns[LABEL + one]) for one in labels], axis=1)
    else:
        values, names = numbered(name, columns["label"], classes)
    owners = columns.get("unit")
    if owners and "" in owners:
        raise DataError(f"{name} has no unit in row {owners.index('') + 2}: in its column unit every image has one")
    listed = json.dumps([files, names, owners]).encode() + values.astype(values.dtype.newbyteorder("<")).tobytes()
    return Table(
        folder=os.path.dirname(name) or ".",
        files=files,
        labels=values,
        names=names,
        owners=None if owners is None else np.array(owners),
        attributes={c[len(GROUP) :]: np.array(columns[c]) for c in header if c.startswith(GROUP)},
        digest=hashlib.sha256(listed).hexdigest(),
    )


def read_table(name: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows, each as long as it. Raises DataError."""
    try:
        reader = csv.reader(io.StringIO(read_file(name).decode("utf-8-sig"), newline=""), strict=True)
        header, *rows = [[cell.strip() for cell in row] for row in reader if row]
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{name} is not a CSV in UTF-8: {error}") from None
    except ValueError:
        raise DataError(f"{name} is empty") from None
    if twice := [column for column in header if header.count(column) > 1]:
        raise DataError(f"{name} has the column {twice[0]} twice")
    if not rows:
        raise DataError(f"{name} has a header and no row")
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise DataError(f"{name} has {len(row)} cells in row {number}, but its header has {len(header)}")
    return header, rows


def shares(name: str, column: str, cells: list[str]) -> np.ndarray:
    """float32 [n], from 0 to 1. Raises DataError."""
    known: dict[str, float] = {}  # few are different
    for cell in dict.fromkeys(cells):
        try:
            known[cell] = float(cell)
        except ValueError:
            known[cell] = np.nan
        if not 0 <= known[cell] <= 1:
            raise DataError(
                f"{name} has {column} {cell!r} in row {cells.index(cell) + 2}: 0 or 1 is allowed, or a number between them"
            )
    return np.array([known[cell] for cell in cells], np.float32)


def numbered(name: str, cells: list[str], classes: tuple[str, ...] | None) -> tuple[np.ndarray, tuple[str, ...]]:
    """Classes int32 [n], and their names: as in `classes`, or in their order, which of whole numbers is by size. Raises
    DataError."""
    found = set(cells)
    if "" in found:
        raise DataError(f"{name} has no label in row {cells.index('') + 2}")
    if classes is None:
        whole = all(cell.isdecimal() for cell in found)
        classes = tuple(sorted(found, key=lambda cell: (int(cell) if whole else 0, cell)))
    elif unknown := sorted(found - set(classes)):
        raise DataError(
            f"{name} has label {unknown[0]!r} in row {cells.index(unknown[0]) + 2}, which no training image has"
        )
    numbers = {one: number for number, one in enumerate(classes)}
    return np.array([numbers[cell] for cell in cells], np.int32), classes
