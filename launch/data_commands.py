"""`podwright data prepare | inspect | verify`: text into tokenised shards, and what is in them; and `data table`: images."""

import json
from typing import Any

from configs.schema import ConfigError
from launch.cli import Parser, subcommand

PREPARE = """\
podwright data prepare SOURCE --to DIR
SOURCE: 'stdlib', a file, or a folder of texts, .jsonl (.gz, .zst), .parquet, .arrow (Hugging Face) or .array_record (TFDS)
files; tables, lines and compressed files need the extra `data`. The same command goes on where one was killed."""

TABLE = """\
podwright data table chexpert|mimic SOURCE --to DIR
SOURCE: the folder of a release, with CheXpert's train.csv or MIMIC-CXR-JPG's mimic-cxr-2.0.0-chexpert.csv and -metadata.csv
in it. DIR gets tables for data.source, whose paths lead from there to the images; no patient is in two of them."""


def prepare(argv: list[str]) -> int:
    from data.prepare.pipeline import Settings
    from data.prepare.pipeline import prepare as run

    parser = Parser(prog="podwright data prepare", usage=PREPARE)
    parser.add_argument("source")
    parser.add_argument("--to", required=True, metavar="DIR", help="a new folder for the shards")
    parser.add_argument(
        "--tokenizer", default="bytes", help="'bytes', 'sentencepiece:N' (trained on it) or a .model file"
    )
    parser.add_argument("--pattern", default="", help="glob of the files below SOURCE, such as '**/*.md'")
    parser.add_argument("--field", default="text", help="where records and tables have the text")
    parser.add_argument("--held-out", type=share, default=0.01, help="share of documents kept for evaluation, by hash")
    parser.add_argument(
        "--near-duplicates",
        type=share,
        default=0.0,
        metavar="SIMILARITY",
        help="also drop documents this similar to an earlier one (Jaccard of runs of 5 words, estimated), such as 0.8",
    )
    parser.add_argument("--max-bytes", type=count, default=100 * 10**6, help="a longer document is unusable")
    parser.add_argument("--max-bad", type=share, default=0.1, help="share of documents that may be unusable")
    parser.add_argument("--license", default="", help="a note that goes with the data")
    parser.add_argument("--workers", type=count, default=0, help="processes; one a core unless given")
    options = parser.parse_args(argv)
    if "://" in options.to:
        raise ConfigError(f"--to {options.to} is not a folder of this machine: copy one there once it is made")
    if not 0 < options.held_out < 1:
        raise ConfigError(f"--held-out={options.held_out:g} leaves nothing on one side: give a share between 0 and 1")
    manifest = run(Settings(**vars(options)), say)
    say(*report(manifest), f"train on it with: --data.kind prepared --data.sources {options.to}")
    return 0


def report(manifest: dict[str, Any]) -> list[str]:
    counts, tokenizer = manifest["counts"], manifest["tokenizer"]
    documents = counts["documents"]
    lines = [
        f"documents   {documents['found']:,} found, {documents['used']:,} used, {documents['exact copies']:,} exact copies, "
        f"{documents['near copies']:,} near copies, {documents['unusable']:,} unusable"
    ]
    lines += [f"unusable    {number:,} {reason}" for reason, number in counts["unusable"].items()]
    if counts["files that cannot be read"]:
        lines.append(
            f"unusable    {counts['files that cannot be read']:,} files that cannot be read (bad_records.jsonl)"
        )
    for split in ("train", "held_out"):
        tokens, size = counts[f"{split} tokens"], counts[f"{split} bytes"]
        lines.append(
            f"{split:<12}{counts[f'{split} documents']:,} documents, {tokens:,} tokens in "
            f"{len(manifest['splits'][split]):,} shards, {size / max(tokens, 1):.2f} bytes a token"
        )
    lines.append(f"tokenizer   {tokenizer['spec']} of {tokenizer['vocab_size']:,} ids, {tokenizer['fingerprint'][:32]}")
    lines.append(f"licence     {manifest['license']}")
    lines.append(f"hash        {manifest['hash']}")
    return lines


def inspect(argv: list[str]) -> int:
    from data.prepare.inspect import examples, lengths
    from data.prepared import read_manifest

    parser = Parser(prog="podwright data inspect", usage="podwright data inspect DIR [--samples N] [--json]")
    parser.add_argument("folder")
    parser.add_argument("--samples", type=count, default=3, metavar="N", help="documents to show")
    parser.add_argument("--json", action="store_true", help="the manifest, and nothing else")
    options = parser.parse_args(argv)
    manifest = read_manifest(options.folder)
    if options.json:
        print(json.dumps(manifest, indent=1))
        return 0
    say(*report(manifest), "", "documents by tokens (training)")
    say(*lengths(options.folder, manifest))
    for origin, text in examples(options.folder, manifest, options.samples):
        say("", f"--- {origin}", text)
    return 0


def verify(argv: list[str]) -> int:
    from data.prepare.inspect import damage
    from data.prepared import DataError, read_manifest

    parser = Parser(prog="podwright data verify", usage="podwright data verify DIR")
    parser.add_argument("folder")
    options = parser.parse_args(argv)
    manifest = read_manifest(options.folder)
    shards = sum(len(split) for split in manifest["splits"].values())
    wrong = list(damage(options.folder, manifest, say))
    if wrong:
        raise DataError(f"{options.folder} is damaged: {len(wrong)} of {shards} shards ({'; '.join(wrong[:3])})")
    say(f"{options.folder}: {shards} shards as they were written")
    return 0


def table(argv: list[str]) -> int:
    from data.medical import SETS, write_tables

    parser = Parser(prog="podwright data table", usage=TABLE)
    parser.add_argument("set", choices=sorted(SETS))
    parser.add_argument("source")
    parser.add_argument("--to", required=True, metavar="DIR", help="folder for the tables, on this machine")
    options = parser.parse_args(argv)
    if "://" in options.source + options.to:
        raise ConfigError(
            "podwright data table reads and writes on this machine: its tables can be copied once they are made"
        )
    parts, left_out = write_tables(options.set, options.source, options.to)
    say(*(f"{part:<12}{rows:,} images in {options.to}/{part}.csv" for part, rows in parts.items()))
    if left_out:
        say(f"left out    {left_out:,} images without labels")
    say(f"train on it with: --data.source {options.to}/train.csv --data.held_out_source {options.to}/valid.csv")
    return 0


def say(*lines: str) -> None:
    for line in lines:
        print(line, flush=True)


def share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError
    return value


def count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError
    return value


def bench(argv: list[str]) -> int:
    from launch.data_bench import main as run

    return run(argv)


COMMANDS = {"prepare": prepare, "inspect": inspect, "verify": verify, "table": table, "bench": bench}


def main(argv: list[str]) -> int:
    """Raises ConfigError, DataError."""
    return subcommand("data", COMMANDS, argv)
