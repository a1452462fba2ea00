"""How many tokens a second of a core's time become rows: prepared shards beside grain's own pipeline and Hugging Face's streaming.

Run as `python -m benchmarks.data [--out FILE]`; needs the package `datasets` (extra `eval`) and two minutes. The documents are
Python's own sources, the tokenizer is bytes, rows are 64 of 2,048. Every side has a process of its own; they take turns,
three times each, and a figure is the median. Below them stands how long `griffin-tiny` waits for such data while it trains.
Sides:

podwright     prepared shards, `concat` and `best-fit`, with positions, segments and weights, shuffled by row
grain         the pipeline of grain's documentation: an ArrayRecord of tokenised documents, shuffled, packed by
              ConcatThenSplit or FirstFit (which MaxText's grain pipeline calls), batched
MaxText       its grain pipeline's steps for tokenised records, with grain's own classes: inputs and targets are both packed by
              FirstFit and padded, then targets are moved by one; without its parsing of tf.train.Example, so rather too fast
streaming     as torchtitan reads: `datasets` streams JSON lines, each text is tokenised as it comes and laid end to end
"""

import functools
import json
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np

from benchmarks.tables import arguments, machine, publish, table

LENGTH, ROWS = 2048, 64
SECONDS = 4.0  # that a side is measured for
ROUNDS = 3
STEPS, SETTLED = 100, 20  # of a training, and those before its wait is looked at
PAIR = ("inputs", "targets")


def main() -> None:
    options = arguments(__doc__)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_corpus(folder)
        found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for _ in range(ROUNDS):
            for side in SIDES:
                command = [sys.executable, "-m", "benchmarks.data", "--side", side, str(folder)]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
                found[side].append(json.loads(done.stdout.splitlines()[-1]))
                print(side, found[side][-1], file=sys.stderr, flush=True)
        wait = wait_of_training(folder)
    rows = []
    for side, runs in found.items():
        a_core, wall, memory, filled = (
            statistics.median(run[k] for run in runs) for k in ("core", "wall", "memory", "filled")
        )
        rows.append([side, f"{a_core / 1e6:,.2f}", f"{wall / 1e6:,.2f}", f"{memory:,.0f}", f"{filled:.1%}"])
    heads = ("side", "M tokens a second of processor time", "M tokens/s", "MiB", "places learned")
    said = f"`griffin-tiny` waits {wait:.2f} % of its time for data, over {STEPS - SETTLED} steps."
    publish(["# Input of text", "", *table(heads, rows), "", said, "", machine()], options.out)


def wait_of_training(folder: pathlib.Path) -> float:
    """Percent of the time, of training on the shards, after the steps that compile."""
    words = f"--data.kind prepared --data.sources {folder / 'shards'} --data.packing best-fit --trainer.steps {STEPS}"
    command = [sys.executable, "-m", "launch", "train", "griffin-tiny", "--run", str(folder / "run"), *words.split()]
    subprocess.run([*command, "--trainer.log_every", "10", "--eval.every", "0"], check=True, capture_output=True)
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    waits = [
        line["data_wait_percent"] for line in lines if line.get("step", 0) > SETTLED and "data_wait_percent" in line
    ]
    return statistics.mean(waits)


def write_corpus(folder: pathlib.Path) -> None:
    """The same documents as JSON lines, prepared shards and records of ids."""
    from array_record.python.array_record_module import ArrayRecordWriter

    from configs.schema import TextData
    from data.corpus import open_corpus
    from data.prepare.pipeline import Settings, prepare

    documents = open_corpus(TextData()).split(held_out=False)
    with open(folder / "corpus.jsonl", "w") as lines:
        lines.writelines(json.dumps({"text": document.text}) + "\n" for document in documents)
    prepare(Settings(str(folder / "corpus.jsonl"), str(folder / "shards"), held_out=0.01), lambda line: None)
    writer = ArrayRecordWriter(str(folder / "ids.array_record"), "group_size:1")
    for document in documents:
        writer.write(np.frombuffer(document.text.encode(), np.uint8).astype("<u2").tobytes())
    writer.close()


def ours(packing: str) -> Callable[[pathlib.Path], Iterator]:
    def batches(folder: pathlib.Path) -> Iterator:
        from configs.schema import PreparedData
        from data import open_data

        config = PreparedData(
            sources=(str(folder / "shards"),), packing=packing, sequence_length=LENGTH, batch_size=ROWS
        )
        return iter(open_data(config).train_batches(0))

    return batches


def grains(packing: str) -> Callable[[pathlib.Path], Iterator]:
    def batches(folder: pathlib.Path) -> Iterator:
        import grain
        from absl import flags
        from grain import experimental

        flags.FLAGS.mark_as_parsed()
        source = grain.sources.ArrayRecordDataSource(str(folder / "ids.array_record"))
        documents = grain.MapDataset.source(source).seed(0).shuffle().repeat()
        ids = documents.map(lambda record: {"tokens": np.frombuffer(record, "<u2").astype(np.int32)})
        if packing == "first-fit":  # which, unlike ConcatThenSplit, takes no document longer than a row
            ids = ids.map(lambda one: {"tokens": one["tokens"][: LENGTH + 1]})
            packed = experimental.FirstFitPackIterDataset(
                ids.to_iter_dataset(), length_struct={"tokens": LENGTH + 1}, num_packing_bins=ROWS
            )
        else:
            packed = experimental.ConcatThenSplitIterDataset(
                ids.to_iter_dataset(), length_struct={"tokens": LENGTH + 1}
            )
        return iter(packed.batch(ROWS))

    return batches


def maxtexts(folder: pathlib.Path) -> Iterator:
    import grain
    from absl import flags
    from grain import experimental

    flags.FLAGS.mark_as_parsed()
    source = grain.sources.ArrayRecordDataSource(str(folder / "ids.array_record"))
    options = grain.ReadOptions(num_threads=16, prefetch_buffer_size=500)  # its defaults
    records = grain.MapDataset.source(source).shuffle(seed=0).repeat().to_iter_dataset(options)
    pairs = records.map(lambda one: dict.fromkeys(PAIR, np.frombuffer(one, "<u2")[:LENGTH].astype(np.int32)))
    packed = experimental.FirstFitPackIterDataset(
        pairs, length_struct=dict.fromkeys(PAIR, LENGTH), num_packing_bins=ROWS
    )
    padded = functools.partial(experimental.batch_and_pad, batch_size=ROWS, pad_value=0)
    return iter(packed.batch(ROWS, batch_fn=padded).map(moved))


def moved(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Each target is the token after its input; the last has none, and so have those of padding."""
    for name in ("targets", "targets_segment_ids"):
        batch[name] = np.pad(batch[name], [(0, 0), (0, 1)])[:, 1:]
    batch["targets_segment_ids"] = np.where(batch["targets"] != 0, batch["targets_segment_ids"], 0)
    return batch


def streaming(folder: pathlib.Path) -> Iterator:
    import datasets

    stream = datasets.load_dataset("json", data_files=str(folder / "corpus.jsonl"), split="train", streaming=True)
    held: list[int] = []
    rows: list[list[int]] = []
    while True:
        for document in stream:
            held.extend([256, *document["text"].encode()])
            while len(held) > LENGTH:
                rows.append(held[: LENGTH + 1])
                held = held[LENGTH:]
            while len(rows) >= ROWS:
                batch, rows = np.array(rows[:ROWS], np.int32), rows[ROWS:]
                yield {"tokens": batch[:, :-1], "targets": batch[:, 1:]}


SIDES: dict[str, Callable[[pathlib.Path], Iterator]] = {
    "podwright, concat": ours("concat"),
    "podwright, best-fit": ours("best-fit"),
    "grain, ConcatThenSplit": grains("concat"),
    "grain, FirstFit": grains("first-fit"),
    "MaxText's steps, FirstFit": maxtexts,
    "datasets, streaming": streaming,
}


def measure(side: str, folder: pathlib.Path) -> dict[str, float]:
    batches = SIDES[side](folder)
    for _ in range(3):
        batch = next(batches)
    began, used, count, learned = time.perf_counter(), time.process_time(), 0, 0
    while time.perf_counter() - began < SECONDS:
        batch = next(batches)
        count += 1
    wall, spent = time.perf_counter() - began, time.process_time() - used
    if "weights" in batch:
        learned = int(np.count_nonzero(batch["weights"]))
    elif "targets_segment_ids" in batch:
        learned = int(np.count_nonzero(batch["targets_segment_ids"]))
    elif "tokens_segment_ids" in batch:
        learned = int(np.count_nonzero(batch["tokens_segment_ids"][:, 1:]))
    else:
        learned = ROWS * LENGTH
    return {
        "core": count * ROWS * LENGTH / spent,
        "wall": count * ROWS * LENGTH / wall,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "filled": learned / (ROWS * LENGTH),
    }


if __name__ == "__main__":
    if "--side" in sys.argv:
        print(json.dumps(measure(sys.argv[-2], pathlib.Path(sys.argv[-1]))))
    else:
        main()
