"""Made-up rows that take long to make, kept in a file, so that only the first epoch of the first run makes them.

A row has a place of its own and a checksum: what is not there yet, or was written by half, is made again. Any number of
processes may read and write, since they all write the same.
"""

import contextlib
import hashlib
import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.dataset import Origin
from data.labelled_rows import Rows, Source

CACHE = "~/.cache/podwright/long-range"


def name_of(decides: dict[str, Any]) -> str:
    """Of a file of rows by all that decides them."""
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class KeptRows:
    """The rows of another source, whose symbols fit into bytes."""

    source: Source
    name: str
    length: int  # T

    def __len__(self) -> int:
        return len(self.source)

    def origins(self, indices: np.ndarray) -> list[list[Origin]]:
        return self.source.origins(indices)

    def rows(self, indices: np.ndarray) -> Rows:
        record = np.dtype([("symbols", "u1", self.length), ("length", "<u4"), ("label", "<u4"), ("crc", "<u4")])
        found = np.zeros(len(indices), record)
        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(open(self.file(), "r+b", buffering=0))
            except OSError:  # nowhere to keep them
                return self.source.rows(indices)
            for row, index in enumerate(indices.tolist()):
                content = os.pread(file.fileno(), record.itemsize, index * record.itemsize)
                if len(content) == record.itemsize:
                    found[row] = np.frombuffer(content, record)[0]
            missing = np.flatnonzero([one["crc"] != checksum(one) for one in found])
            if missing.size:
                made = self.source.rows(indices[missing])
                found["symbols"][missing], found["length"][missing], found["label"][missing] = made
                for row in missing.tolist():
                    found["crc"][row] = checksum(found[row])
                with contextlib.suppress(OSError):  # a full disk
                    for row in missing.tolist():
                        os.pwrite(file.fileno(), found[row].tobytes(), int(indices[row]) * record.itemsize)
        return Rows(found["symbols"], found["length"].astype(np.int64), found["label"].astype(np.int64))

    def file(self) -> Path:
        path = Path(CACHE).expanduser() / self.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        return path


def checksum(record: np.void) -> int:
    return zlib.crc32(record.tobytes()[:-4])
