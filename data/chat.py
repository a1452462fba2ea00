"""Rows of prompts and responses, of which only the responses are learned; what cannot be used is counted, with its line."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.schema import ChatData, ConfigError
from data.dataset import Batch, DataError, Dataset, Origin, count_reasons, is_held_out, manifest_of
from data.order import ALGORITHM
from data.packing import Part, fill_rows
from data.tokenizers import Tokenizer, load_tokenizer

FORMAT = "chat-1"  # how records become rows: part of every manifest
OPEN_ROWS = 64  # unfinished rows among which the next record looks for room


class Unusable(Exception):
    """Why a record is left out, in a few words."""


@dataclass(frozen=True)
class Example:
    """One record: ids from BOS on, and from which on they are learned."""

    ids: np.ndarray  # int32 [n]
    learned_from: int
    origin: Origin

    def __len__(self) -> int:
        return len(self.ids) - 1  # places in a row: the last id is only a target


@dataclass(frozen=True)
class PackedRows:
    """One split. Each row holds whole examples one after the other, then padding."""

    rows: list[list[Example]]
    length: int  # T
    token_bytes: np.ndarray  # int32 [vocab]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, indices: np.ndarray) -> Batch:
        """Rows [B] by number, int64 [B]. Fields as of `data.packing.fill_rows`; what is learned are responses."""
        rows = [[Part(example.ids, 0, example.learned_from) for example in self.rows[i]] for i in indices]
        return fill_rows(rows, self.length, self.token_bytes)

    def origins(self, indices: np.ndarray) -> list[list[Origin]]:
        return [[example.origin for example in self.rows[i]] for i in indices]


def open_chat(config: ChatData) -> Dataset:
    """Reads and packs all records (in memory). Raises DataError when a split is left without a record."""
    tokenizer = open_chat_tokenizer(config)
    splits: dict[bool, list[Example]] = {False: [], True: []}
    skipped: list[tuple[str, str]] = []
    files = chat_files(Path(config.files).expanduser())
    for path in files:
        for line, text in lines(path):
            try:
                example = example_of(text, config, tokenizer, Origin(path.name, line))
                splits[is_held_out(text, config.held_out)].append(example)
            except Unusable as why:
                skipped.append((f"{path.name}:{line}", str(why)))
    for held_out, examples in splits.items():
        if not examples:
            lost = f" (skipped {count_reasons(skipped, 'record')})" if skipped else ""
            split = f"held-out record with data.held_out={config.held_out:g}" if held_out else "training record"
            raise DataError(f"{config.files} has no {split}{lost}: add records or change data.held_out")
    train, rest = (
        PackedRows(packed(splits[part], config.sequence_length), config.sequence_length, tokenizer.token_bytes)
        for part in (False, True)
    )
    content = {
        "kind": config.kind,
        "format": FORMAT,
        "order": ALGORITHM,
        "template": config.template,
        "sequence_length": config.sequence_length,
        "batch_size": config.batch_size,
        "tokenizer": {
            "spec": config.tokenizer,
            "vocab_size": tokenizer.vocab_size,
            "fingerprint": tokenizer.fingerprint,
        },
        "needs": {"vocab_size": tokenizer.vocab_size},
        "held_out": config.held_out,
        "files": [{"path": p.name, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()} for p in files],
    }
    counts = {"train_records": len(splits[False]), "held_out_records": len(splits[True]), "skipped": len(skipped)}
    fill = sum(map(len, splits[False])) / (len(train) * config.sequence_length)
    return Dataset(
        manifest=manifest_of(content, counts),
        train=train,
        held_out=rest,
        batch_size=config.batch_size,
        seed=config.seed,
        summary=(
            f"{config.files}: {len(splits[False]):,} training and {len(splits[True]):,} held-out records in {len(train):,} "
            f"and {len(rest):,} rows of {config.sequence_length}, {fill:.0%} full",
        ),
        skipped=skipped,
        unit="record",
    )


def open_chat_tokenizer(config: ChatData, manifest: dict | None = None) -> Tokenizer:
    if config.tokenizer.startswith("sentencepiece:"):
        raise ConfigError(
            f"{config.show('tokenizer')} has no corpus to be trained on: give 'bytes' or the base's .model file"
        )
    return load_tokenizer(config.tokenizer, manifest=manifest)


def chat_files(path: Path) -> list[Path]:
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files or not files[0].exists():
        what = f"folder {path} holds no .jsonl file" if path.is_dir() else f"{path} does not exist"
        raise DataError(f"{what}: give data.files a .jsonl file, or a folder of them")
    return files


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, text) of each line that is not blank. Bytes that are not UTF-8 make a record unusable, not a file."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            yield from ((number, line) for number, line in enumerate(file, start=1) if line.strip())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


def example_of(line: str, config: ChatData, tokenizer: Tokenizer, origin: Origin) -> Example:
    """Raises Unusable."""
    try:
        line.encode()
        record = json.loads(line)
    except UnicodeEncodeError:
        raise Unusable("not UTF-8") from None
    except json.JSONDecodeError:
        raise Unusable("not JSON") from None
    if not isinstance(record, dict):
        raise Unusable("not a JSON object")
    if "text" in record:
        end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        prompt, response = [tokenizer.bos_id], [*ids_of(record, "text", tokenizer), *end]
    else:
        prompt = prompt_ids(ids_of(record, "prompt", tokenizer), config.template, tokenizer)
        response = [*ids_of(record, "response", tokenizer), *end_ids(config.template, tokenizer)]
    example = Example(np.array([*prompt, *response], np.int32), len(prompt), origin)
    if len(example) > config.sequence_length:
        raise Unusable(f"longer than the {config.sequence_length} tokens of a row")
    return example


def ids_of(record: dict[str, Any], field: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of a field that is text, or a list of ids itself. Raises Unusable."""
    value = record.get(field)
    if isinstance(value, list) and value and all(type(i) is int for i in value):
        if not all(0 <= i < tokenizer.vocab_size for i in value):
            raise Unusable(f"with a token id outside the vocabulary of {tokenizer.vocab_size}")
        return value
    if not isinstance(value, str) or not value:
        raise Unusable(f"without a {field}")
    try:
        return tokenizer.encode(value).tolist()
    except UnicodeEncodeError:
        raise Unusable(f"with half a character in its {field}") from None


def prompt_ids(prompt: list[int], template: str, tokenizer: Tokenizer) -> list[int]:
    """From BOS to where the response begins. Gemma: <start_of_turn>user\\n...<end_of_turn>\\n<start_of_turn>model\\n."""
    if template == "plain":
        return [tokenizer.bos_id, *prompt]
    start, end = (special_ids(piece, tokenizer) for piece in ("<start_of_turn>", "<end_of_turn>"))
    user, line, model = (tokenizer.encode(text).tolist() for text in ("user\n", "\n", "model\n"))
    return [tokenizer.bos_id, *start, *user, *prompt, *end, *line, *start, *model]


def end_ids(template: str, tokenizer: Tokenizer) -> list[int]:
    """What a response ends with: its turn's end, or the tokenizer's end of a document."""
    if template == "gemma":
        return special_ids("<end_of_turn>", tokenizer)
    return [] if tokenizer.eos_id is None else [tokenizer.eos_id]


def special_ids(piece: str, tokenizer: Tokenizer) -> list[int]:
    """A special token, spelled out by tokenizers that have no token for it."""
    found = tokenizer.special(piece)
    return tokenizer.encode(piece).tolist() if found is None else [found]


def packed(examples: list[Example], length: int) -> list[list[Example]]:
    """Examples in rows of `length` places: each goes to the first of the latest rows that has room."""
    done: list[list[Example]] = []
    rows: list[tuple[list[Example], int]] = []  # unfinished ones, and their room
    for example in examples:
        for i, (row, room) in enumerate(rows):
            if len(example) <= room:
                row.append(example)
                rows[i] = (row, room - len(example))
                break
        else:
            rows.append(([example], length - len(example)))
            if len(rows) > OPEN_ROWS:
                done.append(rows.pop(0)[0])
    return done + [row for row, _ in rows]
