"""Rows cut out of folders that `podwright data prepare` made, on this machine or in cloud storage, in any mixture."""

import dataclasses
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.schema import PreparedData
from data.bad_records import BadRecord, substituted, with_bad
from data.dataset import PREFETCH_THREADS, Batch, DataError, Dataset, Examples, Origin, manifest_of
from data.files import read_file
from data.mixture import InOrder, Mixture
from data.order import ALGORITHM
from data.packing import PACKINGS, Part, fill_rows, pieces_of
from data.text import row_fields
from data.token_shards import DOCUMENTS, Span, TokenStream, bare, is_prompt, token_dtype
from data.tokenizers import Tokenizer, load_tokenizer
from data.vocabularies import vocabulary

FORMAT = "tokens-1"  # how documents become shards: part of every manifest
MANIFEST = "manifest.json"
FILES = "files.json"  # where the documents came from, by number
MODEL = "tokenizer.model"
CACHE = "~/.cache/podwright/packing"
REMOTE_THREADS = 8  # batches that are read from cloud storage at a time
PLAN = "plan-1"  # how documents are packed: part of every manifest, and of a plan's file name


@dataclass(frozen=True)
class SplitRows:
    """Row r holds tokens [r*T, r*T + T] of the documents laid end to end, so that each token is once a target."""

    stream: TokenStream
    length: int  # T
    token_bytes: np.ndarray  # int32 [vocab]
    documents: "Documents"

    def __len__(self) -> int:
        return max(len(self.stream) - 1, 0) // self.length

    def read(self, indices: np.ndarray) -> Batch:
        """Rows [B] by number, int64 [B]. Fields as of `data.text.Rows`."""
        rows, bad = substituted(self.spans, indices, len(self))
        ids = np.stack([row.ids for row in rows])
        position = np.array([row.position for row in rows])
        fields = row_fields(bare(ids), position, self.stream.bos_id, self.token_bytes, ~is_prompt(ids))
        return with_bad(fields, bad)

    def spans(self, indices: np.ndarray) -> list[Span | BadRecord]:
        return self.stream.cut(indices * self.length, np.full(len(indices), self.length + 1))

    def origins(self, indices: np.ndarray) -> list[list[Origin]]:
        rows, _ = substituted(self.spans, indices, len(self))
        found = []
        for first, row in zip(indices * self.length, rows, strict=True):
            begun = np.flatnonzero(row.ids[1 : self.length] == self.stream.bos_id) + 1
            later = self.stream.cut(first + begun, np.ones(len(begun), np.int64))
            found.append([self.documents.origin(span) for span in (row, *later)])
        return found


@dataclass(frozen=True)
class PackedRows:
    """Rows of pieces that share them, by a plan."""

    stream: TokenStream
    length: int
    token_bytes: np.ndarray
    documents: "Documents"
    ends: np.ndarray  # int64 [rows]: pieces up to a row's end
    starts: np.ndarray  # int64 [pieces]: first id in the stream
    places: np.ndarray  # int32 [pieces]

    def __len__(self) -> int:
        return len(self.ends)

    def read(self, indices: np.ndarray) -> Batch:
        """Rows [B] by number, int64 [B]. Fields as of `data.packing.fill_rows`."""
        rows, bad = substituted(self.spans, indices, len(self))
        parts = [[part_of(span) for span in row] for row in rows]
        return with_bad(fill_rows(parts, self.length, self.token_bytes), bad)

    def spans(self, indices: np.ndarray) -> list[list[Span] | BadRecord]:
        first = np.where(indices > 0, self.ends[indices - 1], 0)
        counts = self.ends[indices] - first
        pieces = np.repeat(first, counts) + np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        found = iter(self.stream.cut(self.starts[pieces], self.places[pieces] + 1))
        return [good_or_bad([next(found) for _ in range(count)]) for count in counts]

    def origins(self, indices: np.ndarray) -> list[list[Origin]]:
        rows, _ = substituted(self.spans, indices, len(self))
        return [[self.documents.origin(span) for span in row] for row in rows]


@dataclass(frozen=True)
class Documents:
    """Where the documents of a split came from, looked up when somebody asks."""

    folder: str
    shards: list[dict]
    read: dict[Any, Any] = dataclasses.field(default_factory=dict)  # what was looked up before

    def origin(self, span: Any) -> Origin:
        if isinstance(span, BadRecord):
            return Origin(span.source, span.place)
        if span.shard not in self.read:
            self.read[span.shard] = documents_of(self.folder, self.shards[span.shard])
        if FILES not in self.read:
            self.read[FILES] = files_of(self.folder)
        row = self.read[span.shard][span.document]
        return Origin(self.read[FILES][row["file"]], int(row["place"]), span.position)


def part_of(span: Span) -> Part:
    """A prompt comes before what is learned."""
    return Part(bare(span.ids), span.position, 1 + int(np.count_nonzero(is_prompt(span.ids[1:]))))


def good_or_bad(spans: list[Span | BadRecord]) -> list[Span] | BadRecord:
    bad = next((span for span in spans if isinstance(span, BadRecord)), None)
    return bad if bad is not None else spans  # type: ignore[return-value]


def open_prepared(config: PreparedData) -> Dataset:
    """Raises DataError where a source cannot be read, or the sources have other tokenizers than one another."""
    expanded = [folders_of(source) for source in config.sources]
    folders = [folder for source in expanded for folder, _ in source]
    manifests = [read_manifest(folder) for folder in folders]
    check_tokenizers(folders, manifests)
    tokenizer = tokenizer_of(folders[0], manifests[0])
    opened = [
        {split: open_split(config, folder, manifest, split, tokenizer) for split in ("train", "held_out")}
        for folder, manifest in zip(folders, manifests, strict=True)
    ]
    train: list[Examples] = [splits["train"] for splits in opened]
    held_out = InOrder([splits["held_out"] for splits in opened])
    check_rows(config, folders, train, held_out)
    stages = shares_of(config, expanded, [len(rows) for rows in train])
    seeds = [seed_of(config.seed, manifest["hash"]) for manifest in manifests]
    content = {
        "kind": config.kind,
        "format": PLAN,
        "order": ALGORITHM,
        "sequence_length": config.sequence_length,
        "batch_size": config.batch_size,
        "packing": config.packing,
        "sources": [manifest["hash"] for manifest in manifests],
        "stages": stages,
        "tokenizer": manifests[0]["tokenizer"],
        "needs": {"vocab_size": tokenizer.vocab_size},
    }
    counts = {
        "folders": folders,
        "train_rows": [len(rows) for rows in train],
        "held_out_rows": len(held_out),
        "skipped": 0,
    }
    return Dataset(
        manifest=manifest_of(content, counts),
        train=Mixture(train, seeds, [(step * config.batch_size, shares) for step, shares in stages]),
        held_out=held_out,
        batch_size=config.batch_size,
        seed=config.seed,
        summary=summary(config, folders, manifests, opened, stages),
        skipped=[],
        shuffled=False,
        sources=tuple(folders),
        threads=REMOTE_THREADS if any("://" in folder for folder in folders) else PREFETCH_THREADS,
        max_bad=config.max_bad,
    )


def check_rows(config: PreparedData, folders: list[str], train: list[Examples], held_out: Examples) -> None:
    for folder, rows in zip(folders, train, strict=True):
        if not len(rows):
            raise DataError(
                f"{folder} has fewer training tokens than one row of data.sequence_length={config.sequence_length}: lower it"
            )
    if not len(held_out):
        raise DataError(
            f"the held-out documents of {', '.join(folders)} are fewer tokens than one row of "
            f"data.sequence_length={config.sequence_length}: lower it"
        )


def folders_of(source: str) -> list[tuple[str, float]]:
    """The prepared folders that a source stands for, and the share of each in it."""
    if source.startswith("seqio:"):
        from data.seqio_source import seqio_folders

        return seqio_folders(source)
    return [(source.rstrip("/"), 1.0)]


def shares_of(
    config: PreparedData, expanded: list[list[tuple[str, float]]], sizes: list[int]
) -> list[tuple[int, list[float]]]:
    """(first step, share of each folder) of every stage; folders of `sizes` rows."""
    ends = np.cumsum([len(source) for source in expanded])
    totals = [int(part.sum()) for part in np.split(np.array(sizes), ends[:-1])]
    return [
        (step, [weight * share for weight, source in zip(weights, expanded, strict=True) for _, share in source])
        for step, weights in config.stages_of(totals)
    ]


def summary(
    config: PreparedData, folders: list[str], manifests: list[dict], opened: list[dict], stages: list
) -> tuple[str, ...]:
    lines = []
    for number, (source, manifest, splits) in enumerate(zip(folders, manifests, opened, strict=True)):
        counts = manifest["counts"]
        shares = " then ".join(f"{100 * shares[number]:.3g} %" for _, shares in stages)
        lines.append(
            f"{source}: {counts['train documents']:,} training documents, {counts['train tokens']:,} tokens in "
            f"{len(splits['train']):,} rows of {config.sequence_length}{fill(config, splits['train'])}"
            + (f"; {shares} of the rows read" if len(manifests) > 1 else "")
        )
    tokenizer = manifests[0]["tokenizer"]
    return (*lines, f"tokenizer {tokenizer['spec']} of {tokenizer['vocab_size']:,} ids; licence: {licences(manifests)}")


def licences(manifests: list[dict]) -> str:
    return ", ".join(dict.fromkeys(manifest["license"] for manifest in manifests))


def fill(config: PreparedData, rows: Any) -> str:
    if not isinstance(rows, PackedRows):
        return ""
    return f", {rows.places.sum() / (len(rows) * config.sequence_length):.1%} full by {config.packing}"


def seed_of(seed: int, source: str) -> int:
    """Sources of equal length have orders of their own, and other sources beside it don't change one's order."""
    return int.from_bytes(hashlib.sha256(f"podwright {seed} {source}".encode()).digest()[:8], "big")


def check_tokenizers(folders: list[str], manifests: list[dict]) -> None:
    prints = [manifest["tokenizer"]["fingerprint"] for manifest in manifests]
    for folder, other in zip(folders[1:], prints[1:], strict=True):
        if other != prints[0]:
            raise DataError(
                f"{folder} was tokenised by {other[:24]}, but {folders[0]} by {prints[0][:24]}: prepare both with one"
            )


def tokenizer_of(source: str, manifest: dict[str, Any]) -> Tokenizer:
    """The one that a prepared folder holds."""
    model = f"{source.rstrip('/')}/{MODEL}"
    if manifest["tokenizer"]["fingerprint"].startswith("seqio-"):
        return vocabulary(manifest["tokenizer"], model)
    spec = "bytes" if manifest["tokenizer"]["fingerprint"].startswith("bytes") else model
    return load_tokenizer(spec, manifest=manifest)


def open_prepared_tokenizer(config: PreparedData, manifest: dict[str, Any] | None = None) -> Tokenizer:
    """The tokenizer alone. With the run's manifest, another one than the run's is refused."""
    folder, _ = folders_of(config.sources[0])[0]
    return tokenizer_of(folder, manifest or read_manifest(folder))


def open_split(config: PreparedData, source: str, manifest: dict, split: str, tokenizer: Tokenizer) -> Any:
    shards = manifest["splits"][split]
    folder = source.rstrip("/") if "://" in source else str(Path(source).expanduser())
    stream = TokenStream(
        [f"{folder}/{shard['file']}" for shard in shards],
        [shard["tokens"] for shard in shards],
        token_dtype(tokenizer.vocab_size, manifest.get("prompts", False)),
        tokenizer.bos_id,
    )
    documents = Documents(folder, shards)
    if config.packing == "concat":
        return SplitRows(stream, config.sequence_length, tokenizer.token_bytes, documents)
    rows = config.sequence_length
    return PackedRows(stream, rows, tokenizer.token_bytes, documents, **packing_plan(config, folder, manifest, split))


def packing_plan(config: PreparedData, folder: str, manifest: dict, split: str) -> dict[str, np.ndarray]:
    """The fields of PackedRows, computed once and kept: each shard is packed by itself."""
    name = f"{PLAN}-{config.packing}-{config.sequence_length}-{split}-{manifest['hash']}"
    cache = Path(CACHE).expanduser() / name
    fields = ("ends", "starts", "places")
    if not (cache / "done").exists():
        shards = manifest["splits"][split]
        offsets = np.cumsum([0, *(shard["tokens"] for shard in shards)])
        parts = [pack_shard(config, folder, shard, int(at)) for shard, at in zip(shards, offsets[:-1], strict=True)]
        rows = np.cumsum([0, *(len(part["places"]) for part in parts)])
        for part, before in zip(parts, rows[:-1], strict=True):
            part["ends"] += before
        cache.mkdir(parents=True, exist_ok=True)
        for field in fields:
            whole = np.concatenate([part[field] for part in parts]) if parts else np.zeros(0, np.int64)
            half = cache / f".{field}.{np.random.default_rng().integers(2**62)}"
            with open(half, "wb") as out:
                np.save(out, whole)
            half.replace(cache / f"{field}.npy")
        (cache / "done").touch()
    return {field: np.load(cache / f"{field}.npy", mmap_mode="r") for field in fields}


def pack_shard(config: PreparedData, folder: str, shard: dict, offset: int) -> dict[str, np.ndarray]:
    starts = documents_of(folder, shard)["start"]
    document, first, places = pieces_of(np.diff(starts, append=shard["tokens"]), config.sequence_length)
    row = PACKINGS[config.packing](places, config.sequence_length)
    order = np.argsort(row, kind="stable")
    counts = np.bincount(row)
    return {
        "ends": np.cumsum(counts),
        "starts": offset + starts[document[order]] + first[order],
        "places": places[order].astype(np.int32),
    }


def documents_of(folder: str, shard: dict) -> np.ndarray:
    """DOCUMENTS of a shard. Raises DataError."""
    file = f"{folder}/{shard['file'].removesuffix('.arrayrecord')}.documents.npy"
    try:
        table = np.load(io.BytesIO(read_file(file)))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {error}") from None
    if table.dtype != DOCUMENTS or len(table) != shard["documents"]:
        raise DataError(f"{file} is damaged: `podwright data verify` says what else is")
    return table


def files_of(folder: str) -> list[str]:
    """Raises DataError."""
    try:
        return json.loads(read_file(f"{folder}/{FILES}"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}/{FILES} cannot be read: {error}") from None


def read_manifest(folder: str) -> dict[str, Any]:
    """Raises DataError if the folder does not hold prepared data."""
    try:
        manifest = json.loads(read_file(f"{folder.rstrip('/')}/{MANIFEST}"))
        found = manifest["format"]
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{folder} holds no prepared data (no {MANIFEST}): `podwright data prepare` makes it") from None
    except OSError as error:
        raise DataError(f"{folder}/{MANIFEST} cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{folder}/{MANIFEST} is damaged: copy it again, or prepare it again") from None
    if found != FORMAT:
        raise DataError(f"{folder} is of format {found}, but this version reads {FORMAT}: prepare it again")
    return manifest
