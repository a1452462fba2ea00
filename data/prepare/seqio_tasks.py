"""seqio's Tasks and Mixtures as prepared folders. TensorFlow is imported here and nowhere else, in a process of its own:

    python -m data.prepare.seqio_tasks MODULE NAME DIR

writes DIR/NAME of every Task that NAME stands for, and last DIR/shares.json, {task: share}. Examples come in the order of
their split, unshuffled and untrimmed: order and rows are made when they are read.
"""

import hashlib
import importlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data.dataset import DataError, is_held_out, manifest_of
from data.order import ALGORITHM
from data.prepare.write import SPLITS, write_shard
from data.prepared import FILES, FORMAT, MANIFEST, MODEL
from data.token_shards import BLOCK, PROMPT, token_dtype
from data.vocabularies import vocabulary

SHARD_TOKENS = 2**24
HELD_OUT = 0.01  # of a Task without a split for it
SHARES = "shares.json"


def main(module: str, name: str, folder: str) -> None:
    """Raises DataError."""
    import seqio

    try:
        importlib.import_module(module)
    except ImportError as error:
        raise DataError(f"the module {module} of data.sources cannot be imported: {error}") from None
    try:
        found = seqio.get_mixture_or_task(name)
    except ValueError:
        known = sorted([*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()])
        raise DataError(f"{module} registers no seqio Task or Mixture {name!r}; there are {', '.join(known)}") from None
    mixed = isinstance(found, seqio.Mixture)
    tasks = found.tasks if mixed else [found]
    rates = [float(found.get_rate(task)) if mixed else 1.0 for task in tasks]
    for task in tasks:
        print(f"preparing the seqio Task {task.name}", flush=True)
        write_task(task, Path(folder) / task.name)
    shares = {task.name: rate / sum(rates) for task, rate in zip(tasks, rates, strict=True)}
    write_text(Path(folder) / SHARES, json.dumps(shares))


def write_task(task: Any, folder: Path) -> None:
    if (folder / MANIFEST).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    features = task.output_features
    if "targets" not in features:
        raise DataError(f"the seqio Task {task.name} has no feature 'targets', which is what a language model learns")
    described = describe_vocabulary(features["targets"].vocabulary, folder)
    tokenizer = vocabulary(described, str(folder / MODEL))
    prompts = "inputs" in features
    held = next((split for split in ("validation", "test") if split in task.splits), None)
    sources = [("train", None if held is None else "train"), *([(held, "held_out")] if held else [])]
    shards: dict[str, list] = {split: [] for split in SPLITS}
    counts = {"found": 0, "used": 0, "exact copies": 0, "near copies": 0, "unusable": 0}
    for number, (source, goes_to) in enumerate(sources):
        pending: dict[str, list] = {split: [] for split in SPLITS}
        for place, ids in enumerate(examples(task, source, prompts, tokenizer.bos_id)):
            counts["found"] += 1
            if len(ids) < 1 or (prompts and (ids >= PROMPT).all()):
                counts["unusable"] += 1
                continue
            digest = hashlib.sha256(ids.tobytes()).digest()
            split = goes_to or SPLITS[is_held_out(digest.hex(), HELD_OUT)]
            key = tuple(map(int, np.frombuffer(digest, "<u8", count=2)))
            size = int(tokenizer.token_bytes[ids[ids < PROMPT]].sum())
            pending[split].append((key, number, place, size, ids.astype(token_dtype(tokenizer.vocab_size, prompts))))
            counts["used"] += 1
            if sum(len(one[-1]) for one in pending[split]) >= SHARD_TOKENS:
                flush(folder, split, pending, shards, tokenizer.bos_id, prompts)
        for split in SPLITS:
            flush(folder, split, pending, shards, tokenizer.bos_id, prompts)
    if not shards["train"] or not shards["held_out"]:
        raise DataError(
            f"the seqio Task {task.name} has too few examples: both its training and held-out part need one"
        )
    totals = {
        f"{s} {what}": sum(one[what] for one in shards[s]) for s in SPLITS for what in ("documents", "tokens", "bytes")
    }
    content = {
        "kind": "tokens",
        "format": FORMAT,
        "order": ALGORITHM,
        "block": BLOCK,
        "prompts": prompts,
        "tokenizer": {"spec": f"seqio:{task.name}", **described},
        "splits": shards,
    }
    about = {"license": "not stated", "made": time.strftime("%Y-%m-%d"), "asked": {"seqio": task.name}}
    unusable = {"without targets": counts["unusable"]} if counts["unusable"] else {}
    noted = {**totals, "documents": counts, "unusable": unusable, "files that cannot be read": 0}
    write_text(folder / FILES, json.dumps([f"seqio:{task.name}/{source}" for source, _ in sources]))
    write_text(folder / MANIFEST, json.dumps(manifest_of(content, noted) | about, indent=1))


def flush(folder: Path, split: str, pending: dict, shards: dict, bos_id: int, prompts: bool) -> None:
    if not pending[split]:
        return
    documents, pending[split] = sorted(pending[split], key=lambda one: one[:3]), []
    base = folder / f"{split}-{len(shards[split]):05}"
    shards[split].append(write_shard(base, documents, bos_id, documents[0][-1].dtype))


def examples(task: Any, split: str, prompts: bool, bos_id: int) -> Iterator[np.ndarray]:
    """Ids of each example, int64 [n]: of `inputs`, with PROMPT added, and of `targets`. Raises DataError."""
    dataset = task.get_dataset(sequence_length=None, split=split, shuffle=False, num_epochs=1, seed=0)
    for number, example in enumerate(dataset.as_numpy_iterator()):
        parts = [np.asarray(example["inputs"], np.int64) + PROMPT] if prompts else []
        ids = np.concatenate([*parts, np.asarray(example["targets"], np.int64)])
        if (ids == bos_id).any():
            raise DataError(
                f"example {number} of {task.name}/{split} holds id {bos_id}, which starts documents here: leave it to us"
            )
        yield ids


def describe_vocabulary(given: Any, folder: Path) -> dict[str, Any]:
    """What data.vocabularies needs; a SentencePiece model is written beside it."""
    import seqio

    described = {"vocab_size": given.vocab_size, "eos_id": given.eos_id, "bos_id": 0}
    if isinstance(given, seqio.SentencePieceVocabulary):
        (folder / MODEL).write_bytes(given.sp_model)
        bos = given.bos_id
        described |= {"kind": "sentencepiece", "bos_id": bos if bos is not None and bos >= 0 else 0}
        content = given.sp_model
    elif isinstance(given, seqio.ByteVocabulary):
        described["kind"], content = "bytes", b"seqio bytes"
    else:
        described["kind"], content = "ids", type(given).__name__.encode()
    digest = hashlib.sha256(content + json.dumps(described, sort_keys=True).encode()).hexdigest()
    return described | {"fingerprint": f"seqio-{described['kind']}-{digest}"}


def write_text(file: Path, text: str) -> None:
    half = file.with_name(f".{file.name}.partial")
    half.write_text(text)
    os.replace(half, file)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except DataError as error:
        print(f"DataError: {error}", file=sys.stderr)
        sys.exit(3)
