"""Two seqio Tasks of lines, their Mixture, and a Task with inputs: for the tests of seqio sources."""

import functools

import seqio
import tensorflow as tf

LINES = [f"line {i}: {'wort ' * (i % 7 + 1)}" for i in range(300)]
PAIRS = [(f"{a} plus {b}", str(a + b)) for a in range(40) for b in range(40)]
SPLITS = {"train": slice(0, 250), "validation": slice(250, 300)}
BYTES = seqio.ByteVocabulary()


def lines(split, shuffle_files=False, seed=None, upper=False):
    chosen = LINES[SPLITS[split]]
    return tf.data.Dataset.from_tensor_slices({"targets": [line.upper() for line in chosen] if upper else chosen})


def sums(split, shuffle_files=False, seed=None):
    questions, answers = zip(*PAIRS, strict=True)
    return tf.data.Dataset.from_tensor_slices({"inputs": list(questions), "targets": list(answers)})


encoded = [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos]
for name, upper in (("tiny_lines", False), ("tiny_capitals", True)):
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(functools.partial(lines, upper=upper), splits=("train", "validation")),
        preprocessors=encoded,
        output_features={"targets": seqio.Feature(BYTES)},
    )
seqio.TaskRegistry.add(
    "tiny_sums",
    source=seqio.FunctionDataSource(functools.partial(sums), splits=("train",)),
    preprocessors=encoded,
    output_features={"inputs": seqio.Feature(BYTES, add_eos=False), "targets": seqio.Feature(BYTES)},
)
seqio.MixtureRegistry.add("tiny_mixture", [("tiny_lines", 3.0), ("tiny_capitals", 1.0)])
