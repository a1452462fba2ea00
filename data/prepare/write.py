"""Second pass: a unit's documents that were kept, tokenised, as a shard of each split."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np

from data.dataset import DataError
from data.prepare.scan import key_of
from data.prepare.sources import Source
from data.token_shards import DOCUMENTS, records_of, token_dtype, write_records
from data.tokenizers import Tokenizer

SPLITS = ("train", "held_out")


def write_unit(source: Source, folder: Path, tokenizer: Tokenizer, unit: int, done: Path, kept: np.ndarray) -> None:
    """`kept` are the rows of the unit's scan that are used. Documents of a shard stand in the order of their hashes, so
    that neighbours in a file are none in a row of tokens. `done` is written last: where it exists, the shards are whole."""
    wanted = {(int(row["file"]), int(row["place"])): row for row in kept}
    found: dict[str, list] = {split: [] for split in SPLITS}
    dtype = token_dtype(tokenizer.vocab_size)
    for number, (place, text) in source.read(unit):
        row = wanted.get((number, place))
        if row is None:
            continue
        key = tuple(map(int, row["key"]))
        if not isinstance(text, str) or key_of(text.encode()) != key:
            raise DataError(
                f"{source.files[number]} changed while it was being prepared: start again with another --to"
            )
        ids = tokenizer.encode(text).astype(dtype)
        found[SPLITS[int(row["held_out"])]].append((key, number, place, int(row["bytes"]), ids))
    if sum(map(len, found.values())) != len(kept):
        raise DataError(f"{source.name} lost documents while it was being prepared: start again with another --to")
    described = {}
    for split, documents in found.items():
        documents.sort(key=lambda document: document[:3])
        if documents:
            described[split] = write_shard(folder / f"{split}-{unit:05}", documents, tokenizer.bos_id, dtype)
    half = partial(done)
    half.write_text(json.dumps(described))
    os.replace(half, done)


def write_shard(base: Path, documents: list, bos_id: int, dtype: np.dtype) -> dict:
    """BASE.arrayrecord and BASE.documents.npy. Returns what the manifest says of them."""
    bos = np.array([bos_id], dtype)
    stream = np.concatenate([part for *_, ids in documents for part in (bos, ids)])
    table = np.empty(len(documents), DOCUMENTS)
    table["start"] = np.cumsum([0, *(1 + len(ids) for *_, ids in documents[:-1])])
    for name, column in (("file", 1), ("place", 2), ("bytes", 3)):
        table[name] = [document[column] for document in documents]
    records, notes = base.with_suffix(".arrayrecord"), base.with_suffix(".documents.npy")
    content = hashlib.sha256()

    def hashed():
        for record in records_of(stream, table["start"]):
            content.update(record)
            yield record

    write_records(partial(records), hashed())
    with open(partial(notes), "wb") as out:
        np.save(out, table)
    for file in (records, notes):
        os.replace(partial(file), file)
    return {
        "file": records.name,
        "tokens": len(stream),
        "documents": len(documents),
        "bytes": int(table["bytes"].sum()),
        "sha256": content.hexdigest(),  # of its records one after the other, however the file packs them
        "documents_sha256": hashlib.sha256(table.tobytes()).hexdigest(),
    }


def partial(file: Path) -> Path:
    return file.with_name(f".{file.name}.partial")
