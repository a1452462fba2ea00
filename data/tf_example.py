"""The features of a tf.train.Example, without TensorFlow: protocol buffers' wire format of three nested messages."""

import struct
from collections.abc import Iterator
from typing import Any

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


def features(record: bytes) -> dict[str, list[Any]]:
    """Values by feature name: bytes, floats or whole numbers. Raises ValueError if `record` is no Example."""
    found: dict[str, list[Any]] = {}
    for number, message in fields(record):  # Example: 1 Features
        if number != 1 or not isinstance(message, bytes):
            raise ValueError("no tf.train.Example")
        for number, entry in fields(message):  # Features: map 1
            if number != 1 or not isinstance(entry, bytes):
                raise ValueError("no tf.train.Example")
            pair = dict(fields(entry))  # 1 name, 2 Feature
            if not isinstance(pair.get(1), bytes):
                raise ValueError("no tf.train.Example")
            found[pair[1].decode()] = values(pair.get(2, b""))
    return found


def values(feature: bytes) -> list[Any]:
    """Feature: one of 1 BytesList, 2 FloatList, 3 Int64List, each with its values in field 1, numbers mostly packed."""
    out: list[Any] = []
    for kind, message in fields(feature):
        for _, value in fields(message):
            if kind == 1:
                out.append(value)
            elif kind == 2:
                content = value if isinstance(value, bytes) else struct.pack("<I", value)
                out += struct.unpack(f"<{len(content) // 4}f", content)
            elif isinstance(value, bytes):
                out += [signed(number) for number in packed(value)]
            else:
                out.append(signed(value))
    return out


def signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


def packed(content: bytes) -> Iterator[int]:
    at = 0
    while at < len(content):
        number, at = varint(content, at)
        yield number


def fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value): bytes of strings and messages, whole numbers else."""
    at = 0
    while at < len(message):
        key, at = varint(message, at)
        kind = key & 7
        value: Any
        if kind == VARINT:
            value, at = varint(message, at)
        elif kind == BYTES:
            length, at = varint(message, at)
            value, at = message[at : at + length], at + length
        elif kind in (FIXED64, FIXED32):
            length = 8 if kind == FIXED64 else 4
            value, at = int.from_bytes(message[at : at + length], "little"), at + length
        else:
            raise ValueError(f"wire type {kind}")
        if at > len(message):
            raise ValueError("cut off")
        yield key >> 3, value


def varint(content: bytes, at: int) -> tuple[int, int]:
    """(number, where the next field starts)."""
    number = shift = 0
    while True:
        if at >= len(content) or shift > 63:
            raise ValueError("cut off")
        number |= (content[at] & 127) << shift
        at += 1
        if content[at - 1] < 128:
            return number, at
        shift += 7
