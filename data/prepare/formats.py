"""Documents out of files, by the file's format. A format is a way to cut a file into pieces and one to read a piece."""

import codecs
import gzip
import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from data.dataset import DataError
from data.packages import needed
from data.token_shards import open_records

END = 2**62


@dataclass(frozen=True)
class Piece:
    """A part of a file: from `start` to before `stop`, in bytes for lines, in rows or row groups for tables."""

    path: str  # below the source's folder
    start: int
    stop: int
    bytes: int  # about how much of the file this is


@dataclass(frozen=True)
class Unusable:
    """Stands where a document would, and says why there is none."""

    reason: str


Found = tuple[int, str | Unusable]  # where in the file (byte or row), and the text


@dataclass(frozen=True)
class Format:
    split: Callable[[str, str, int], list[Piece]]  # (file, its path below the folder, bytes a piece)
    read: Callable[[str, Piece, str], Iterator[Found]]  # (file, piece, name of the field with the text)


def whole(file: str, path: str, size: int) -> list[Piece]:
    return [Piece(path, 0, END, os.path.getsize(file))]


def read_text(file: str, piece: Piece, field: str) -> Iterator[Found]:
    """The whole file is one document."""
    try:
        with open(file, "rb") as content:
            yield 0, decoded(content.read())
    except OSError:
        yield 0, Unusable("unreadable")


def decoded(content: bytes) -> str | Unusable:
    try:
        return content.decode() or Unusable("empty")
    except UnicodeDecodeError:
        return Unusable("not UTF-8")


def split_lines(file: str, path: str, size: int) -> list[Piece]:
    total = os.path.getsize(file)
    return [Piece(path, at, min(at + size, total), min(size, total - at)) for at in range(0, total, size)]


def read_lines(file: str, piece: Piece, field: str) -> Iterator[Found]:
    """A document a line of JSON; a line belongs to the piece in which it starts."""
    try:
        with open(file, "rb") as lines:
            if piece.start:
                lines.seek(piece.start - 1)
                lines.readline()
            yield from json_lines(lines, lines.tell(), piece.stop, field)
    except OSError:
        yield piece.start, Unusable("unreadable")


def read_gzip(file: str, piece: Piece, field: str) -> Iterator[Found]:
    with gzip.open(file) as lines:
        yield from compressed(lines, field)


def read_zstd(file: str, piece: Piece, field: str) -> Iterator[Found]:
    with open(file, "rb") as raw:
        yield from compressed(io.BufferedReader(ZstdFrames(raw, needed("zstandard", file))), field)


class ZstdFrames(io.RawIOBase):
    """All frames of a file, decompressed. zstandard's own reader takes a file that breaks off for one that ends."""

    def __init__(self, raw: BinaryIO, zstandard: Any) -> None:
        self.raw, self.start = raw, zstandard.ZstdDecompressor().decompressobj
        self.frame: Any = None
        self.ready, self.compressed = b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.ready:
            self.compressed = self.compressed or self.raw.read(2**20)
            if not self.compressed:
                if self.frame is not None:
                    raise EOFError("a frame without its end")
                return 0
            self.frame = self.frame or self.start()
            self.ready = self.frame.decompress(self.compressed)
            self.compressed = self.frame.unused_data if self.frame.eof else b""
            self.frame = None if self.frame.eof else self.frame
        part, self.ready = self.ready[: len(buffer)], self.ready[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)


def compressed(lines: Any, field: str) -> Iterator[Found]:
    """What comes before the place where a compressed file breaks off is used."""
    at = 0
    try:
        for found in json_lines(lines, 0, END, field):
            at = found[0]
            yield found
    except Exception:  # each library has its own: OSError, EOFError, zlib.error, ZstdError
        yield at, Unusable("damaged or cut off from here on")


def json_lines(lines: BinaryIO, at: int, stop: int, field: str) -> Iterator[Found]:
    while at < stop and (line := lines.readline()):
        if line.strip():
            yield at, json_text(line, field)
        at += len(line)


def json_text(line: bytes, field: str) -> str | Unusable:
    try:
        record = json.loads(line.removeprefix(codecs.BOM_UTF8).decode())
    except UnicodeDecodeError:
        return Unusable("not UTF-8")
    except (json.JSONDecodeError, RecursionError):
        return Unusable("not JSON")
    return field_text(record.get(field) if isinstance(record, dict) else None, field)


def field_text(value: Any, field: str) -> str | Unusable:
    if isinstance(value, bytes):
        return decoded(value)
    if not isinstance(value, str):
        return Unusable(f"without a text field {field!r}")
    if not value:
        return Unusable("empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        return Unusable("half a character in it")
    return value


def split_parquet(file: str, path: str, size: int) -> list[Piece]:
    """Groups of rows, together of about `size` bytes."""
    try:
        metadata = needed("pyarrow.parquet", file).ParquetFile(file).metadata
    except DataError:
        raise
    except Exception:
        return whole(file, path, size)  # reading it will say what is wrong
    pieces, start, held = [], 0, 0
    for group in range(metadata.num_row_groups):
        held += metadata.row_group(group).total_byte_size
        if held >= size or group + 1 == metadata.num_row_groups:
            pieces.append(Piece(path, start, group + 1, held))
            start, held = group + 1, 0
    return pieces


def read_parquet(file: str, piece: Piece, field: str) -> Iterator[Found]:
    row = 0
    try:
        table = needed("pyarrow.parquet", file).ParquetFile(file)
        row = sum(table.metadata.row_group(i).num_rows for i in range(min(piece.start, table.num_row_groups)))
        groups = range(piece.start, min(piece.stop, table.num_row_groups))
        if field not in table.schema_arrow.names:
            yield row, Unusable(f"a table without a column {field!r}: it has {', '.join(table.schema_arrow.names)}")
            return
        for batch in table.iter_batches(batch_size=256, row_groups=groups, columns=[field]):
            for value in batch.column(0).to_pylist():
                yield row, field_text(value, field)
                row += 1
    except DataError:
        raise
    except Exception:  # arrow's own errors, of which there are many
        yield row, Unusable("damaged or cut off from here on")


def read_arrow(file: str, piece: Piece, field: str) -> Iterator[Found]:
    """What `datasets` saves: a stream of record batches, or a file of them."""
    row = 0
    arrow, ipc = needed("pyarrow", file), needed("pyarrow.ipc", file)
    try:
        with arrow.memory_map(file) as source:
            try:
                reader = ipc.open_stream(source)
                batches = iter(reader)
            except arrow.ArrowInvalid:
                reader = ipc.open_file(source)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            if field not in reader.schema.names:
                yield row, Unusable(f"a table without a column {field!r}: it has {', '.join(reader.schema.names)}")
                return
            for batch in batches:
                for value in batch.column(field).to_pylist():
                    yield row, field_text(value, field)
                    row += 1
    except (arrow.ArrowException, OSError):
        yield row, Unusable("damaged or cut off from here on")


def split_records(file: str, path: str, size: int) -> list[Piece]:
    """Runs of records, by their number."""
    total = os.path.getsize(file)
    try:
        count = open_records(file).num_records()
    except RuntimeError:
        return whole(file, path, size)
    step = max(1, count * size // max(total, 1))
    return [Piece(path, i, min(i + step, count), total * min(step, count - i) // count) for i in range(0, count, step)]


def read_records(file: str, piece: Piece, field: str) -> Iterator[Found]:
    """A record is a tf.train.Example as TFDS writes it, a line of JSON, or the text itself."""
    try:
        reader = open_records(file)
    except RuntimeError:
        yield piece.start, Unusable("damaged or cut off from here on")
        return
    for row in range(piece.start, min(piece.stop, reader.num_records())):
        try:
            record = reader.read([row])[0]
        except RuntimeError:
            yield row, Unusable("a damaged record")
        else:
            yield row, record_text(record, field)


def record_text(record: bytes, field: str) -> str | Unusable:
    if record[:1] == b"{":
        return json_text(record, field)
    from data.tf_example import features

    try:
        found = features(record)
    except ValueError:
        return decoded(record)
    values = found.get(field, [])
    return field_text(values[0] if len(values) == 1 else None, field)


LINES = Format(split_lines, read_lines)
FORMATS = {
    ".jsonl": LINES,
    ".ndjson": LINES,
    ".json": LINES,
    ".jsonl.gz": Format(whole, read_gzip),
    ".json.gz": Format(whole, read_gzip),
    ".jsonl.zst": Format(whole, read_zstd),
    ".json.zst": Format(whole, read_zstd),
    ".parquet": Format(split_parquet, read_parquet),
    ".arrow": Format(whole, read_arrow),
    ".arrayrecord": Format(split_records, read_records),
    ".array_record": Format(split_records, read_records),
}
TEXT = Format(whole, read_text)


def format_of(path: str) -> Format:
    """By the file's name; what no other format claims is text. TFDS numbers its files: name.array_record-00000-of-00008."""
    name = os.path.basename(path)
    name = name.partition(".array_record-")[0] + ".array_record" if ".array_record-" in name else name
    return next((found for suffix, found in FORMATS.items() if name.endswith(suffix)), TEXT)
