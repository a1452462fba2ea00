"""Which files a source has, and how its documents are divided into units of work: the same on every machine."""

import dataclasses
import os
import stat
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from data.corpus import STDLIB_WITHOUT, matching_files
from data.dataset import DataError
from data.prepare.formats import FORMATS, Found, Piece, format_of

SMALLEST_UNIT, LARGEST_UNIT, UNITS = 4 * 2**20, 256 * 2**20, 256  # bytes of input, and how many units to aim at


@dataclasses.dataclass(frozen=True)
class Source:
    """Files below a folder and how they are cut. A unit becomes a shard."""

    name: str  # as it was given
    folder: str
    field: str  # of records: where the text is
    files: tuple[str, ...]  # below the folder, sorted
    units: tuple[tuple[tuple[int, Piece], ...], ...]  # with the number of each piece's file
    skipped: list[tuple[str, str]]  # (path, reason): files that cannot be read at all

    @property
    def bytes(self) -> int:
        return sum(piece.bytes for unit in self.units for _, piece in unit)

    def read(self, unit: int) -> Iterator[tuple[int, Found]]:
        """(number of the file, (place in it, text or why there is none)) of every document of a unit, in order."""
        for file, piece in self.units[unit]:
            for found in format_of(piece.path).read(os.path.join(self.folder, piece.path), piece, self.field):
                yield file, found


def open_source(name: str, pattern: str, text_field: str) -> Source:
    """`name` is 'stdlib', a file or a folder. Without a pattern a folder's tables, records or lines are taken, and where it
    has none, all its files as texts. Raises DataError."""
    stdlib = name == "stdlib"
    path = Path(sysconfig.get_path("stdlib") if stdlib else name).expanduser()
    skipped: list[tuple[str, str]] = []
    if path.is_file():
        folder, found = path.parent, [path.name]
    elif path.is_dir():
        folder = path
        wanted = pattern or ("**/*.py" if stdlib else "**/*")
        found = matching_files(folder, wanted, STDLIB_WITHOUT if stdlib else frozenset(), skipped)
        if not pattern and not stdlib:
            found = without_notes(found)
    elif "://" in name:
        raise DataError(
            f"{name} is not on this machine: copy it here first (`gcloud storage cp -r`), then prepare the copy"
        )
    else:
        raise DataError(f"{name} is neither a file nor a folder: give what holds the texts, or 'stdlib'")
    files = [one for one in found if usable(folder / one, one, skipped)]
    if not files:
        with_pattern = f" that matches {pattern}" if pattern else ""
        raise DataError(f"{path} holds no file{with_pattern}: nothing to prepare")
    units = cut(folder, files)
    if not units:
        raise DataError(f"the files of {path} are all empty: nothing to prepare")
    return Source(name, str(folder), text_field, tuple(files), units, sorted(skipped))


def without_notes(paths: list[str]) -> list[str]:
    """Data sets in tables, records or lines have files about themselves beside them, which are no texts."""
    data = [
        path
        for path in paths
        if any(suffix in path.rpartition("/")[2] for suffix in FORMATS if suffix != ".json")
        and not path.rpartition("/")[2].startswith(("cache-", "."))
    ]
    return data or [path for path in paths if not any(part.startswith(".") for part in path.split("/"))]


def usable(file: Path, path: str, skipped: list[tuple[str, str]]) -> bool:
    try:
        regular = stat.S_ISREG(file.stat().st_mode)  # a pipe would block for ever
    except OSError:
        skipped.append((path, "unreadable"))
        return False
    if not regular and not file.is_dir():
        skipped.append((path, "not a regular file"))
    return regular


def cut(folder: Path, files: list[str]) -> tuple[tuple[tuple[int, Piece], ...], ...]:
    total = sum(os.path.getsize(folder / path) for path in files)
    size = min(max(total // UNITS, SMALLEST_UNIT), LARGEST_UNIT)
    units: list[tuple[tuple[int, Piece], ...]] = []
    pieces: list[tuple[int, Piece]] = []
    held = 0
    for number, path in enumerate(files):
        for piece in format_of(path).split(str(folder / path), path, size):
            pieces.append((number, piece))
            held += piece.bytes
            if held >= size:
                units.append(tuple(pieces))
                pieces, held = [], 0
    return (*units, tuple(pieces)) if pieces else tuple(units)
