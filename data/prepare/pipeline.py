"""`podwright data prepare`: scan, decide, tokenise, describe. Every step that is done stays done if the process is killed."""

import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data.dataset import DataError, manifest_of
from data.order import ALGORITHM
from data.prepare.scan import exact_copies, near_copies, read_scan, scan_unit
from data.prepare.sources import Source, open_source
from data.prepare.workers import in_parallel
from data.prepare.write import SPLITS, write_unit
from data.prepared import FILES, FORMAT, MANIFEST, read_manifest
from data.token_shards import BLOCK
from data.tokenizers import Tokenizer, load_tokenizer, train_sentencepiece

WORK = ".unfinished"
TOKENIZER_SAMPLE = 200 * 10**6  # bytes of text that a tokenizer is trained on


@dataclasses.dataclass(frozen=True)
class Settings:
    source: str
    to: str
    tokenizer: str = "bytes"
    pattern: str = ""
    field: str = "text"
    held_out: float = 0.01
    near_duplicates: float = 0.0  # Jaccard similarity from which a document is a copy; 0 keeps all
    max_bytes: int = 100 * 10**6  # of one document
    max_bad: float = 0.1  # share of documents that may be unusable
    license: str = ""
    workers: int = 0  # 0: one a core


@dataclasses.dataclass
class Kept:
    """Which rows of each unit's scan are used, and how many are not, and why."""

    rows: list[np.ndarray]
    counts: dict[str, int]
    bad: list[tuple[int, int, str]]  # file, place, reason


def prepare(settings: Settings, say: Callable[[str], None]) -> dict[str, Any]:
    """Fills the folder `settings.to` and returns its manifest. Raises DataError, ConfigError."""
    folder = Path(settings.to).expanduser()
    work = folder / WORK
    source = open_source(settings.source, settings.pattern, settings.field)
    say(f"{settings.source}: {len(source.files):,} files, {source.bytes / 1e6:,.1f} MB, in {len(source.units):,} units")
    if ready := finished(folder, settings, source):
        say(f"{folder} holds them already: nothing to do")
        return ready
    with claimed(folder, work, settings, source):
        scans = [work / f"scan-{unit:05}.npz" for unit in range(len(source.units))]
        near = settings.near_duplicates > 0
        scan = functools.partial(scan_unit, source, settings.held_out, settings.max_bytes, near)
        todo: dict[int, tuple] = {unit: (file,) for unit, file in enumerate(scans) if not file.exists()}
        in_parallel(scan, todo, len(scans), settings.workers, "reading")
        kept = decide(scans, settings, source)
        write_bad(folder, source, kept)
        check_kept(settings, source, kept)
        tokenizer = open_tokenizer(settings, folder, source, kept)
        done = [work / f"shards-{unit:05}.json" for unit in range(len(source.units))]
        write = functools.partial(write_unit, source, folder, tokenizer)
        todo = {unit: (file, kept.rows[unit]) for unit, file in enumerate(done) if not file.exists()}
        in_parallel(write, todo, len(done), settings.workers, "tokenising")
        manifest = describe(settings, source, tokenizer, kept, done)
        for name, content in ((FILES, list(source.files)), (MANIFEST, manifest)):  # the manifest last: it says "done"
            temporary = work / name
            temporary.write_text(json.dumps(content, indent=1))
            os.replace(temporary, folder / name)
    shutil.rmtree(work, ignore_errors=True)
    return manifest


def asked(settings: Settings, source: Source) -> dict[str, Any]:
    """What decides the shards' content."""
    free = ("to", "workers", "max_bad", "license")
    sizes = [(path, os.path.getsize(os.path.join(source.folder, path))) for path in source.files]
    files = f"{len(sizes)} of sha256 {hashlib.sha256(json.dumps(sizes).encode()).hexdigest()}"
    return {k: v for k, v in dataclasses.asdict(settings).items() if k not in free} | {"format": FORMAT, "files": files}


def finished(folder: Path, settings: Settings, source: Source) -> dict[str, Any] | None:
    """The manifest, if the folder already holds just this. Raises DataError if it holds anything else."""
    if not (folder / MANIFEST).exists():
        return None
    manifest = read_manifest(str(folder))
    if manifest.get("asked") != asked(settings, source):
        raise DataError(f"{folder} already holds prepared data, of other settings or files: give another --to")
    return manifest


class claimed:
    """The folder is this process's until it ends, and what an earlier one left unfinished was of the same settings."""

    def __init__(self, folder: Path, work: Path, settings: Settings, source: Source) -> None:
        self.folder, self.work, self.asked = folder, work, asked(settings, source)

    def __enter__(self) -> None:
        try:
            strangers = [e.name for e in self.folder.iterdir()] if self.folder.is_dir() else []
            if strangers and not self.work.exists():
                raise DataError(f"{self.folder} holds {strangers[0]}: give --to an empty or a new folder")
            self.work.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.work / "lock", "a")
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another process is preparing {self.folder}: wait for it, or give another --to") from None
        except OSError as error:
            raise DataError(f"{self.folder} cannot be written: {error.strerror or error}") from None
        file = self.work / "asked.json"
        if file.exists():
            before = json.loads(file.read_text())
            other = [key for key in self.asked if before.get(key) != self.asked[key]]
            if other:
                raise DataError(
                    f"{self.folder} was begun with another {', '.join(other)}: give those again, another --to, or delete it"
                )
        else:
            temporary = self.work / "asked.partial"
            temporary.write_text(json.dumps(self.asked))
            os.replace(temporary, file)

    def __exit__(self, *error: Any) -> None:
        self.lock.close()


def decide(scans: list[Path], settings: Settings, source: Source) -> Kept:
    """Of equal documents the first is kept, in the source's order; the split goes by the text's hash, so that copies could
    not be in both."""
    found = [read_scan(file) for file in scans]
    tables = [table for table, _, _ in found]
    table = np.concatenate(tables)
    usable = np.flatnonzero(table["reason"] == 0)
    copy = np.zeros(len(table), bool)
    copy[usable] = exact_copies(table["key"][usable])
    near: set[int] = set()
    if settings.near_duplicates:
        signed = (values for _, _, signatures in found for values in signatures)
        numbered = ((int(n), values) for n, values in zip(usable, signed, strict=True))
        near = near_copies(((n, values) for n, values in numbered if not copy[n]), settings.near_duplicates)
        copy[list(near)] = True
    keep = (table["reason"] == 0) & ~copy
    bad = [
        (int(row["file"]), int(row["place"]), reasons[row["reason"] - 1])
        for rows, reasons, _ in found
        for row in rows[rows["reason"] > 0]
    ]
    counts = {
        "found": len(table),
        "used": int(keep.sum()),
        "exact copies": int(copy.sum()) - len(near),
        "near copies": len(near),
        "unusable": len(bad),
    }
    ends = np.cumsum([len(one) for one in tables])[:-1]
    return Kept([one[k] for one, k in zip(tables, np.split(keep, ends), strict=True)], counts, bad)


def write_bad(folder: Path, source: Source, kept: Kept) -> None:
    """Everything that was left out for being unusable, a line each."""
    lines: list[dict[str, Any]] = [{"file": path, "reason": reason} for path, reason in source.skipped]
    lines += [{"file": source.files[file], "place": place, "reason": reason} for file, place, reason in kept.bad]
    if lines:
        (folder / "bad_records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def check_kept(settings: Settings, source: Source, kept: Kept) -> None:
    bad, found = kept.counts["unusable"], kept.counts["found"]
    if bad and bad > settings.max_bad * found:
        file, place, _ = kept.bad[0]
        raise DataError(
            f"{bad:,} of {found:,} documents are unusable, more than --max-bad {settings.max_bad:g} allows "
            f"({', '.join(f'{n:,} {why}' for why, n in reasons_of(kept).items())}; the first is {source.files[file]} at {place})"
        )
    held_out = sum(int(rows["held_out"].sum()) for rows in kept.rows)
    for split, count in (("training", kept.counts["used"] - held_out), ("held-out", held_out)):
        if not count:
            raise DataError(
                f"{settings.source} has {kept.counts['used']:,} usable documents, but --held-out {settings.held_out:g} "
                f"leaves no {split} one: change it or add documents"
            )


def reasons_of(kept: Kept) -> dict[str, int]:
    return dict(sorted(Counter(reason for *_, reason in kept.bad).items()))


def open_tokenizer(settings: Settings, folder: Path, source: Source, kept: Kept) -> Tokenizer:
    """The one asked for; a SentencePiece model is kept beside the shards, so that these need nothing else."""
    model = folder / "tokenizer.model"
    if settings.tokenizer == "bytes":
        return load_tokenizer("bytes")
    if not model.exists():
        prefix, _, size = settings.tokenizer.partition(":")
        if prefix == "sentencepiece" and size.isdecimal():
            content = train_sentencepiece(int(size), sample(source, kept))
        else:
            content = load_tokenizer(settings.tokenizer).model  # type: ignore[attr-defined]
        partial = folder / WORK / "tokenizer.partial"
        partial.write_bytes(content)
        os.replace(partial, model)
    return load_tokenizer(str(model))


def sample(source: Source, kept: Kept) -> Iterator[str]:
    """Training documents by hash, together of about TOKENIZER_SAMPLE bytes, in the source's order."""
    training = [rows[~rows["held_out"]] for rows in kept.rows]
    total = sum(int(rows["bytes"].sum()) for rows in training)
    share = 2**64 - 1 if total <= TOKENIZER_SAMPLE else int(2**64 * TOKENIZER_SAMPLE / total)
    for unit, rows in enumerate(training):
        wanted = {(int(row["file"]), int(row["place"])) for row in rows[rows["key"][:, 1] <= np.uint64(share)]}
        for file, (place, text) in source.read(unit) if wanted else ():
            if (file, place) in wanted and isinstance(text, str):
                yield text


def describe(settings: Settings, source: Source, tokenizer: Tokenizer, kept: Kept, done: list[Path]) -> dict[str, Any]:
    shards = [json.loads(file.read_text()) for file in done]
    content = {
        "kind": "tokens",
        "format": FORMAT,
        "order": ALGORITHM,
        "block": BLOCK,
        "tokenizer": {
            "spec": settings.tokenizer,
            "vocab_size": tokenizer.vocab_size,
            "fingerprint": tokenizer.fingerprint,
            "bos_id": tokenizer.bos_id,
        },
        "splits": {split: [unit[split] for unit in shards if split in unit] for split in SPLITS},
    }
    counts = {
        **{
            f"{split} {what}": sum(shard[what] for shard in content["splits"][split])  # type: ignore[index]
            for split in SPLITS
            for what in ("documents", "tokens", "bytes")
        },
        "documents": kept.counts,
        "unusable": reasons_of(kept),
        "files that cannot be read": len(source.skipped),
    }
    about = {
        "license": settings.license or "not stated",
        "made": time.strftime("%Y-%m-%d"),
        "asked": asked(settings, source),
    }
    return manifest_of(content, counts) | about
