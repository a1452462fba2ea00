"""The section `data` of made-up biographies, from which a model learns facts about people. See configs/data_sections.py."""

import math
from dataclasses import dataclass
from typing import ClassVar

from configs.section import ConfigError, Section, setting

_DATA = ("data", "result")
_SHAPE = (*_DATA, "recompile")
# What stands before the first colon of `sampling`, and what must follow it.
SAMPLING = {
    "uniform": "uniform",
    "power": "power:EXPONENT",
    "celebrities": "celebrities:PEOPLE:WEIGHT",
    "warmup": "warmup:PEOPLE:BATCHES",
    "groups": "groups:GROUPS:BATCHES",
}
COUNTS = ("PEOPLE", "BATCHES", "GROUPS")


@dataclass(frozen=True, kw_only=True)
class BiographyData(Section):
    """Biographies of made-up people, never twice the same: arXiv 2503.21676, section 2."""

    section: ClassVar[str] = "data"
    kind: ClassVar[str] = "biographies"
    population: int = setting(1024, "people that training speaks of", low=1, changes=_DATA)
    first: int = setting(0, "number of the first of them; those before are `earlier` people", low=0, changes=_DATA)
    unseen: int = setting(1024, "people that nobody trains on, for evaluation", low=1, changes=_DATA)
    names: tuple[int, ...] = setting(
        (20, 20, 20), "first, middle, ... and last names there are, a token each", low=1, changes=(*_DATA, "checkpoint")
    )
    attributes: tuple[str, ...] = setting(
        ("16", "16", "16"),
        "values that each attribute may have: 16, or 200x12x31 for three tokens of 200, 12 and 31",
        changes=(*_DATA, "checkpoint"),
    )
    templates: int = setting(8, "sentences an attribute may be told in", low=2, changes=(*_DATA, "checkpoint"))
    training_templates: int = setting(
        6,
        "those of them that training uses of a person, others for each; evaluation uses the rest",
        low=1,
        changes=_DATA,
    )
    template_tokens: int = setting(
        2, "words between name and value, each template's own", low=1, changes=(*_DATA, "checkpoint")
    )
    sampling: str = setting(
        "uniform",
        "whom a row is about: uniform, power:EXPONENT, celebrities:PEOPLE:WEIGHT, warmup:PEOPLE:BATCHES (first these alone), "
        "groups:GROUPS:BATCHES (one after the other)",
        changes=_DATA,
    )
    replay: float = setting(
        0.0,
        "how often training returns to a person earlier than `first`, over one of the population",
        low=0,
        changes=_DATA,
    )
    sequence_length: int = setting(18, "tokens a row T, one biography each", low=2, changes=_SHAPE)
    batch_size: int = setting(64, "rows a step, over all devices", low=1, changes=_SHAPE)
    held_out_rows: int = setting(
        512,
        "rows of an evaluation about each of: the population, unseen people, earlier ones, and each of `groups`",
        low=1,
        changes=_DATA,
    )
    seed: int = setting(0, "names, facts, which templates train, and the rows", low=0, changes=_DATA)

    @property
    def values(self) -> tuple[tuple[int, ...], ...]:
        """How many symbols each token of each attribute's value is one of."""
        return tuple(self.sizes_of(words) for words in self.attributes)

    @property
    def biography_tokens(self) -> int:
        """Of all sentences: name, template and value."""
        return sum(len(self.names) + self.template_tokens + len(value) for value in self.values)

    @property
    def vocab_size(self) -> int:
        """BOS, names, words of templates, symbols of values."""
        words = len(self.attributes) * self.templates * self.template_tokens
        return 1 + sum(self.names) + words + sum(map(sum, self.values))

    def sizes_of(self, words: str) -> tuple[int, ...]:
        sizes = tuple(int(size) if size.isdecimal() else 0 for size in words.split("x"))
        if min(sizes) < 1 or math.prod(sizes) < 2:
            raise ConfigError(
                f"{self.show('attributes')}: {words!r} is no number of values above 1, such as 16 or 200x12x31"
            )
        return sizes

    def sampled(self) -> tuple[str, list[float]]:
        """The rule and its numbers. Raises ConfigError."""
        rule, *words = self.sampling.split(":")
        if rule not in SAMPLING:
            raise ConfigError(f"{self.show('sampling')} is none of {', '.join(SAMPLING.values())}")
        try:
            numbers = [float(word) for word in words]
        except ValueError:
            numbers = []
        form = SAMPLING[rule]
        whole = [number for name, number in zip(form.split(":")[1:], numbers, strict=False) if name in COUNTS]
        if len(numbers) != form.count(":") or not all(0 <= n < math.inf for n in numbers) or any(n % 1 for n in whole):
            raise ConfigError(
                f"{self.show('sampling')} is not {form}, with numbers from 0 on, whole but for EXPONENT and WEIGHT"
            )
        return rule, numbers

    def check(self) -> None:
        if self.training_templates >= self.templates:
            raise ConfigError(
                f"{self.show('training_templates')} leaves none of {self.show('templates')} for evaluation: at most "
                f"{self.templates - 1} are allowed"
            )
        if self.first + self.population + self.unseen > math.prod(self.names):
            raise ConfigError(
                f"{self.show('names')} make {math.prod(self.names):,} people, fewer than {self.show('first')}, "
                f"{self.show('population')} and {self.show('unseen')} together"
            )
        if self.biography_tokens > self.sequence_length:
            raise ConfigError(
                f"{self.show('sequence_length')} is shorter than a biography, which has {self.biography_tokens} tokens"
            )
        if self.replay and not self.first:
            raise ConfigError(f"{self.show('replay')} has nobody to return to: give data.first above 0")
        rule, numbers = self.sampled()
        if rule in ("celebrities", "warmup", "groups") and not 1 <= numbers[0] <= self.population:
            raise ConfigError(f"{self.show('sampling')} is not from 1 to {self.show('population')}")
        if rule in ("groups", "celebrities") and not numbers[1]:
            raise ConfigError(f"{self.show('sampling')} ends with 0, a number above it is allowed")
