"""What prepared data holds, and whether it is still what was written."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data.dataset import DataError, manifest_of
from data.order import permuted
from data.prepared import documents_of, files_of, tokenizer_of
from data.token_shards import Span, TokenStream, bare, in_words, open_records, token_dtype

BAR = 40  # characters of the longest bar of a histogram
SHOWN = 400  # characters of a sample


def local(folder: str) -> str:
    return folder.rstrip("/") if "://" in folder else str(Path(folder).expanduser())


def lengths(folder: str, manifest: dict[str, Any]) -> Iterator[str]:
    """A histogram of the training documents' tokens, by powers of two."""
    counts: dict[int, int] = {}
    tokens: dict[int, int] = {}
    for shard in manifest["splits"]["train"]:
        sizes = np.diff(documents_of(local(folder), shard)["start"], append=shard["tokens"])
        bins = np.floor(np.log2(sizes)).astype(int)
        for power in np.unique(bins):
            here = bins == power
            counts[power] = counts.get(power, 0) + int(here.sum())
            tokens[power] = tokens.get(power, 0) + int(sizes[here].sum())
    most = max(counts.values(), default=1)
    for power in range(min(counts, default=0), max(counts, default=-1) + 1):
        number = counts.get(power, 0)
        bar = "#" * -(-BAR * number // most)
        yield f"{2**power:>12,} to {2 ** (power + 1) - 1:<12,} {number:>10,} {tokens.get(power, 0):>15,} tokens  {bar}"


def examples(folder: str, manifest: dict[str, Any], samples: int) -> Iterator[tuple[str, str]]:
    """(where it came from, decoded beginning) of some training documents: the same ones each time."""
    shards = manifest["splits"]["train"]
    tokenizer = tokenizer_of(folder, manifest)
    ends = np.cumsum([shard["documents"] for shard in shards])
    total = int(ends[-1])
    files = files_of(local(folder))
    dtype = token_dtype(tokenizer.vocab_size, manifest.get("prompts", False))
    for number in permuted(np.arange(min(samples, total)), total, 0, 0):
        shard = int(np.searchsorted(ends, number, side="right"))
        table = documents_of(local(folder), shards[shard])
        place = int(number) - int(ends[shard] - shards[shard]["documents"])
        row = table[place]
        size = (table["start"][place + 1] if place + 1 < len(table) else shards[shard]["tokens"]) - row["start"]
        stream = TokenStream(
            [f"{local(folder)}/{shards[shard]['file']}"],
            [shards[shard]["tokens"]],
            dtype,
            tokenizer.bos_id,
        )
        span = stream.cut(np.array([row["start"]]), np.array([min(size, 4 * SHOWN)]))[0]
        text = tokenizer.decode(bare(span.ids[1:])) if isinstance(span, Span) else f"({span.reason})"
        shown = text[:SHOWN] + (" ..." if len(text) > SHOWN or size > 4 * SHOWN else "")
        yield f"{files[row['file']]} at {row['place']:,}: {row['bytes']:,} bytes, {size - 1:,} tokens", shown


def damage(folder: str, manifest: dict[str, Any], say: Callable[[str], None]) -> Iterator[str]:
    """What is wrong, a clause for each shard; reads everything."""
    content = {k: v for k, v in manifest.items() if k not in ("counts", "hash", "license", "made", "asked")}
    if manifest_of(content, {})["hash"] != manifest["hash"]:
        yield "the manifest itself was changed"
    for split in manifest["splits"].values():
        for shard in split:
            found = hashlib.sha256()
            try:
                reader = open_records(f"{local(folder)}/{shard['file']}")
                for at in range(reader.num_records()):
                    found.update(reader.read([at])[0])
                table = documents_of(local(folder), shard)
            except DataError as error:
                yield str(error)
                continue
            except Exception as error:  # the reader's own kinds
                yield f"{shard['file']} cannot be read: {in_words(error)}"
                continue
            if found.hexdigest() != shard["sha256"]:
                yield f"{shard['file']} holds other tokens than were written"
            elif hashlib.sha256(table.tobytes()).hexdigest() != shard["documents_sha256"]:
                yield f"the table of documents of {shard['file']} was changed"
            else:
                say(f"{shard['file']}: {shard['tokens']:,} tokens, right")
