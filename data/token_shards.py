"""Tokenised documents on disk: ArrayRecord files of equal blocks of a stream of tokens, which any row can be cut out of.

A shard is its documents laid end to end, BOS before each. Record k holds tokens [k * BLOCK, (k + 1) * BLOCK) of it behind
two numbers: which document of the shard the first token belongs to, and its place in that document. So a row needs the
blocks that it touches and nothing else: no index in memory, and a document of a gigabyte costs no more than others. Beside
a shard stands DOCUMENTS, a row of numbers a document, for those who want to know where a text came from.
"""

import struct
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.bad_records import BadRecord
from data.dataset import DataError

BLOCK = 4096  # tokens
HEADER = np.dtype([("document", "<i8"), ("position", "<i8")])
DOCUMENTS = np.dtype(
    [
        ("start", "<i8"),  # of its BOS in the shard's stream
        ("file", "<i8"),  # number of the file that it came from, in the manifest
        ("place", "<i8"),  # in that file: a byte, or a row
        ("bytes", "<i8"),  # of its text
    ]
)
REQUESTS = 32  # shards in cloud storage that one batch reads from at a time
WRITER_OPTIONS = "group_size:1"


PROMPT = 2**31  # is added to the ids that are read and not learned, where a split has such


def token_dtype(vocab_size: int, prompts: bool = False) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 2**16 and not prompts else "<u4")


def bare(ids: np.ndarray) -> np.ndarray:
    """Ids without PROMPT, int32, same shape."""
    return (ids & np.uint32(PROMPT - 1) if ids.dtype == np.uint32 else ids).astype(np.int32)


def is_prompt(ids: np.ndarray) -> np.ndarray:
    """bool, same shape."""
    return ids >= PROMPT if ids.dtype == np.uint32 else np.zeros(ids.shape, bool)


def records_of(stream: np.ndarray, starts: np.ndarray) -> Iterable[bytes]:
    """The records of a shard: its tokens [n], and where its documents start in them."""
    for at in range(0, len(stream), BLOCK):
        document = int(np.searchsorted(starts, at, side="right")) - 1
        yield np.array((document, at - starts[document]), HEADER).tobytes() + stream[at : at + BLOCK].tobytes()


class Block(NamedTuple):
    """A record."""

    ids: np.ndarray  # [BLOCK], or fewer at the end
    document: int  # of the first id, in the shard
    position: int  # of the first id in its document

    def place(self, offset: int, bos_id: int) -> tuple[int, int]:
        """Of id `offset`: its place in its document, and this document's number in the shard."""
        begun = np.flatnonzero(self.ids[1 : offset + 1] == bos_id)
        if len(begun):
            return offset - int(begun[-1]) - 1, self.document + len(begun)
        return offset + self.position, self.document


class Span(NamedTuple):
    """A stretch of a stream."""

    ids: np.ndarray  # [n], uint16 or uint32, PROMPT added where it is not learned
    position: int  # of the first id in its document
    shard: int
    document: int  # in the shard


@dataclass
class TokenStream:
    """The shards of a split, end to end."""

    files: list[str]  # paths, or gs:// addresses
    tokens: list[int]  # of each
    dtype: np.dtype
    bos_id: int

    def __post_init__(self) -> None:
        self.ends = np.cumsum(self.tokens)
        self.readers: list[Any] = [None] * len(self.files)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getstate__(self) -> dict:
        return {**self.__dict__, "readers": [None] * len(self.files)}  # a file is opened where it is read

    def cut(self, starts: np.ndarray, lengths: np.ndarray) -> list[Span | BadRecord]:
        """The tokens [start, start + length) of the stream, for each pair, or what could not be read of them."""
        blocks: dict[tuple[int, int], Block | BadRecord] = {}
        spans = [self._parts(int(a), int(n)) for a, n in zip(starts, lengths, strict=True)]
        wanted: dict[int, set[int]] = {}
        for parts in spans:
            for shard, first, last in parts:
                wanted.setdefault(shard, set()).update(range(first // BLOCK, (last - 1) // BLOCK + 1))
        ordered = [(shard, sorted(numbers)) for shard, numbers in wanted.items()]
        if len(ordered) > 1 and "://" in self.files[0]:  # each waits for the network
            with ThreadPoolExecutor(min(len(ordered), REQUESTS)) as threads:
                read = list(threads.map(lambda one: self._read(*one), ordered))
        else:
            read = [self._read(*one) for one in ordered]
        for (shard, numbers), records in zip(ordered, read, strict=True):
            blocks |= {(shard, k): record for k, record in zip(numbers, records, strict=True)}
        return [self._joined(span, blocks) for span in spans]

    def _joined(
        self, span: list[tuple[int, int, int]], blocks: dict[tuple[int, int], Block | BadRecord]
    ) -> Span | BadRecord:
        parts, place = [], None
        for shard, first, last in span:
            for k in range(first // BLOCK, (last - 1) // BLOCK + 1):
                block = blocks[shard, k]
                if isinstance(block, BadRecord):
                    return block
                parts.append(block.ids[max(first - k * BLOCK, 0) : last - k * BLOCK])
                place = place or block.place(first % BLOCK, self.bos_id)
        assert place is not None
        return Span(np.concatenate(parts) if len(parts) > 1 else parts[0], place[0], span[0][0], place[1])

    def _parts(self, start: int, length: int) -> list[tuple[int, int, int]]:
        """(shard, first, last) of [start, start + length), a span a shard."""
        found, end = [], start + length
        shard = int(np.searchsorted(self.ends, start, side="right"))
        while start < end:
            base = int(self.ends[shard]) - self.tokens[shard]
            last = min(end, int(self.ends[shard]))
            if last > start:
                found.append((shard, start - base, last - base))
            start, shard = last, shard + 1
        return found

    def _read(self, shard: int, numbers: list[int]) -> list[Block | BadRecord]:
        """Blocks of a shard. Raises DataError where the file as a whole cannot be read."""
        try:
            if self.readers[shard] is None:
                self.readers[shard] = open_records(self.files[shard])
            found = self.readers[shard].read(numbers)
        except RuntimeError as error:
            if self.readers[shard] is None:
                raise DataError(f"{self.files[shard]} cannot be read: {in_words(error)}") from None
            found = [self._read_one(shard, number) for number in numbers]
        return [self._checked(shard, number, one) for number, one in zip(numbers, found, strict=True)]

    def _read_one(self, shard: int, number: int) -> bytes | BadRecord:
        try:
            return self.readers[shard].read([number])[0]
        except RuntimeError:
            return BadRecord(self.files[shard], number, "a damaged block")

    def _checked(self, shard: int, number: int, record: bytes | BadRecord) -> Block | BadRecord:
        """Whether it has the length that it must have; a file of other content with the same name has not."""
        if isinstance(record, BadRecord):
            return record
        ids = np.frombuffer(record, self.dtype, offset=HEADER.itemsize)
        if len(ids) != min(BLOCK, self.tokens[shard] - number * BLOCK):
            return BadRecord(self.files[shard], number, "a block of another length")
        return Block(ids, *struct.unpack_from("<qq", record))


def open_records(file: str) -> Any:
    """An ArrayRecord reader for random access. Raises RuntimeError where the file is missing or cut off."""
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(file, options="readahead_buffer_size:0", file_reader_buffer_size=2**15)
    if not reader.ok():
        raise RuntimeError("it has no end, or is no ArrayRecord file")
    return reader


def write_records(file: Path, records: Iterable[bytes]) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(file), WRITER_OPTIONS)
    for record in records:
        writer.write(record)
    writer.close()


def in_words(error: Exception) -> str:
    """The first line of what a library says: the rest is for its authors."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
