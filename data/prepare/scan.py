"""First pass: what documents there are. Hashes decide which are copies and which are held out, before any is tokenised."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data.dataset import is_held_out
from data.packages import needed
from data.prepare.formats import Unusable
from data.prepare.sources import Source

SCANNED = np.dtype(
    [
        ("key", "<u8", 2),  # of the text: the first 16 bytes of its sha256
        ("file", "<i8"),
        ("place", "<i8"),
        ("bytes", "<i8"),
        ("held_out", "?"),
        ("reason", "<i4"),  # 0 for a usable document, else 1 + an index into the unit's reasons
    ]
)
PERMUTATIONS = 128  # of a near-duplicate signature
SCHEME = "affine32"  # how datasketch hashes: kept signatures must be of one
SHINGLE = 5  # words that are compared together


def scan_unit(source: Source, held_out: float, max_bytes: int, signatures: bool, unit: int, file: Path) -> None:
    """Writes what the unit's documents are. A file that exists is whole."""
    rows, reasons, signed = [], [], []
    for number, (place, text) in source.read(unit):
        content = b"" if isinstance(text, Unusable) else text.encode()
        if not isinstance(text, Unusable) and len(content) > max_bytes:
            text = Unusable(f"longer than {max_bytes} bytes")
        if isinstance(text, Unusable):
            if text.reason not in reasons:
                reasons.append(text.reason)
            rows.append(((0, 0), number, place, len(content), False, 1 + reasons.index(text.reason)))
            continue
        key = key_of(content)
        rows.append((key, number, place, len(content), is_held_out(f"{key[0]:016x}{key[1]:016x}", held_out), 0))
        if signatures:
            signed.append(signature(text))
    table = np.array(rows, SCANNED)
    partial = file.with_suffix(".partial")
    with open(partial, "wb") as out:
        np.savez(out, table=table, reasons=json.dumps(reasons), signatures=np.array(signed, np.uint64))
    partial.rename(file)


def key_of(content: bytes) -> tuple[int, int]:
    first, second = np.frombuffer(hashlib.sha256(content).digest(), "<u8", count=2)
    return int(first), int(second)


def read_scan(file: Path) -> tuple[np.ndarray, list[str], np.ndarray]:
    """SCANNED [n] of a unit, its reasons, and a signature for each usable document."""
    with np.load(file) as found:
        return found["table"], json.loads(str(found["reasons"])), found["signatures"]


def exact_copies(keys: np.ndarray) -> np.ndarray:
    """bool [n]: whether an earlier document has the same key, uint64 [n, 2]."""
    order = np.lexsort((np.arange(len(keys)), keys[:, 1], keys[:, 0]))
    same = (keys[order][1:] == keys[order][:-1]).all(axis=1)
    copies = np.zeros(len(keys), bool)
    copies[order[1:][same]] = True
    return copies


def signature(text: str) -> np.ndarray:
    """MinHash of the text's runs of SHINGLE words, uint64 [PERMUTATIONS]."""
    datasketch = needed("datasketch", "--near-duplicates")
    words = text.split()
    shingles = {" ".join(words[i : i + SHINGLE]).encode() for i in range(max(1, len(words) - SHINGLE + 1))}
    hashed = datasketch.MinHash(num_perm=PERMUTATIONS, scheme=SCHEME)
    hashed.update_batch(sorted(shingles))
    return np.asarray(hashed.hashvalues, np.uint64)


def near_copies(signatures: Iterator[tuple[int, np.ndarray]], threshold: float) -> set[int]:
    """Numbers of the documents whose estimated Jaccard similarity to an earlier, kept one reaches `threshold`."""
    datasketch = needed("datasketch", "--near-duplicates")
    index = datasketch.MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)
    kept: dict[int, Any] = {}
    found: set[int] = set()
    for number, values in signatures:
        hashed = datasketch.MinHash(num_perm=PERMUTATIONS, hashvalues=values, scheme=SCHEME)
        if any(hashed.jaccard(kept[other]) >= threshold for other in index.query(hashed)):
            found.add(number)
        else:
            index.insert(number, hashed)
            kept[number] = hashed
    return found
