"""The section `data` of sequences with a label each: the tasks of Long Range Arena and small ones like them."""

from dataclasses import dataclass
from typing import Any, ClassVar

from configs.section import ConfigError, Section, setting

_DATA = ("data", "result")
_SHAPE = ("data", "result", "recompile")
SIDES = (32, 64, 128)  # pixels of a pathfinder image
FILED = ("text", "retrieval", "cifar")  # tasks whose rows a user brings; the others are made or packaged
PAIRED = ("matching", "retrieval")  # tasks on two documents a row
PIXELS = {"pathfinder": 1, "digits": 1, "cifar": 3}  # tasks on images, and the channels of a pixel


@dataclass(frozen=True, kw_only=True)
class LongRangeData(Section):
    """Sequences of symbols or pixels to classify: Long Range Arena (arXiv 2011.04006)."""

    section: ClassVar[str] = "data"
    kind: ClassVar[str] = "long-range"
    task: str = setting(
        "listops",
        "value of a nested expression; whether two discs are on one curve; handwritten digits; a row's first symbol; whether "
        "two made-up documents have one key; sentiment of a text; whether two texts are related; what an image shows",
        choices=("listops", "pathfinder", "digits", "first-token", "matching", *FILED),
        changes=_SHAPE,
    )
    files: str = setting("", "folder of a user's files (text, retrieval, cifar)", changes=_DATA)
    inputs: str = setting(
        "tokens",
        "pixels as one of so many levels of grey, or as numbers (values); two documents as one sequence with a separator "
        "between them, or a half of the row each (pairs), for models that encode them one by one",
        choices=("tokens", "values", "pairs"),
        changes=_SHAPE,
    )
    held_out_split: str = setting(
        "validation",
        "rows for evaluation: those to choose settings by, or those to report",
        choices=("validation", "test"),
        changes=("data",),
    )
    sequence_length: int = setting(
        2048,
        "tokens or pixels a row T, the end is padding; an image has T pixels, a document of pairs at most T / 2 tokens",
        low=2,
        changes=_SHAPE,
    )
    max_depth: int = setting(10, "nested brackets and a digit inside (listops)", low=2, changes=_DATA)
    max_args: int = setting(10, "values in a bracket, from 2 (listops)", low=2, changes=_DATA)
    min_length: int = setting(500, "an expression has more tokens (listops)", low=0, changes=_DATA)
    max_length: int = setting(2000, "an expression has fewer tokens (listops)", low=2, changes=_DATA)
    contour_length: int = setting(
        14, "dashes of a curve (pathfinder): 6, 9 or 14 for easy to hard", low=3, high=14, changes=_DATA
    )
    num_symbols: int = setting(
        8,
        "symbols that a row may begin with or keys; the rest is of as many others (first-token, matching)",
        low=2,
        changes=_SHAPE,
    )
    training_rows: int = setting(96_000, "rows that are made for training, again and again", low=1, changes=_DATA)
    held_out_rows: int = setting(2000, "rows that are made for evaluation", low=1, changes=("data",))
    workers: int = setting(0, "processes that make or read rows; 0 for two threads", low=0)
    batch_size: int = setting(32, "rows a step, over all devices", low=1, changes=_SHAPE)
    seed: int = setting(0, "which rows are made, and their order", low=0, changes=_DATA)

    @property
    def num_input_symbols(self) -> int:
        """Ids of a row's own tokens; the labels' ids follow them."""
        own = {"listops": 15, "digits": 17, "first-token": 2 * self.num_symbols, "matching": 2 * self.num_symbols}
        return own.get(self.task, 256) + (self.task in PAIRED)  # with the separator, in rows without one, too

    @property
    def separator(self) -> int:
        """Between two documents in one sequence."""
        return self.num_input_symbols - 1

    @property
    def text_length(self) -> int:
        """Most symbols of a text, or of each of two."""
        if self.task not in PAIRED:
            return self.sequence_length
        return (self.sequence_length - (self.inputs != "pairs")) // 2

    @property
    def num_classes(self) -> int:
        return {"listops": 10, "digits": 10, "cifar": 10, "first-token": self.num_symbols}.get(self.task, 2)

    @property
    def channels(self) -> int:
        """Numbers a pixel; 0 for tokens."""
        return PIXELS[self.task] if self.inputs == "values" else 0

    def check(self) -> None:
        if self.inputs == "values" and self.task not in PIXELS:
            raise ConfigError(
                f"{self.show('inputs')} contradicts {self.show('task')}: symbols are no numbers, 'tokens' is allowed"
            )
        if self.inputs == "pairs" and self.task not in PAIRED:
            raise ConfigError(
                f"{self.show('inputs')} contradicts {self.show('task')}: its rows are no pairs, 'tokens' is allowed"
            )
        if self.inputs == "pairs" and self.sequence_length % 2:
            raise ConfigError(
                f"{self.show('sequence_length')} is odd: with {self.show('inputs')} a document has half of it, give an even number"
            )
        if not self.text_length:
            raise ConfigError(
                f"{self.show('sequence_length')} has no room for two documents and a separator: at least 3 is allowed"
            )
        if bool(self.files) != (self.task in FILED):
            allowed = "the folder of its files is missing" if self.task in FILED else "it has no files, '' is allowed"
            raise ConfigError(f"{self.show('files')} contradicts {self.show('task')}: {allowed}")
        lengths = {"pathfinder": tuple(side**2 for side in SIDES), "digits": (64,), "cifar": (1024,)}.get(self.task)
        if lengths and self.sequence_length not in lengths:
            raise ConfigError(
                f"{self.show('sequence_length')} contradicts {self.show('task')}: its images have "
                f"{', '.join(map(str, lengths))} pixels"
            )
        if self.task == "listops":
            if self.max_length <= self.min_length + 1:
                raise ConfigError(f"{self.show('max_length')} leaves no length above {self.show('min_length')}")
            if self.max_length > self.sequence_length + 1:
                raise ConfigError(
                    f"{self.show('max_length')} does not fit {self.show('sequence_length')}: at most "
                    f"{self.sequence_length + 1} is allowed"
                )


def check_long_range(model: Any, data: LongRangeData, mesh: Any) -> None:
    """Raise ConfigError unless the model reads what the data gives: any language model learns the label as the token after the
    row; one that pools a row, or both documents of one, gives one logit a class."""
    pooling = getattr(model, "pooling", "none")
    if pooling != "none" and model.num_classes != data.num_classes:
        raise ConfigError(
            f"{model.show('num_classes')} does not fit {data.show('task')}, which has {data.num_classes} classes"
        )
    paired = data.inputs == "pairs"
    if paired != getattr(model, "pairs", paired):
        raise ConfigError(f"{model.show('pairs')} contradicts {data.show('inputs')}: {paired} is allowed")
    if paired and data.text_length % mesh.sequence:
        raise ConfigError(
            f"{data.show('sequence_length')} has documents of {data.text_length}, not a multiple of "
            f"{mesh.show('sequence')}, the devices that share a sequence"
        )
    if data.inputs != getattr(model, "inputs", "tokens"):
        raise ConfigError(
            f"{data.show('inputs')} contradicts model.kind={model.kind!r}, which reads "
            f"{getattr(model, 'inputs', 'tokens')}"
        )
    if getattr(model, "channels", 0) != data.channels:
        raise ConfigError(f"{model.show('channels')} does not fit {data.show('task')}: {data.channels} is allowed")
