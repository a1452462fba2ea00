"""Biographies of made-up people (arXiv 2503.21676, section 2): rows from which a model learns facts, and is asked for them.

A person is a number. Name, facts and the templates that training uses of each are computed from the seed and that number, a
row from the seed and the row's number, so that there are as many as anyone asks for and none is stored. Words are ids of a
closed vocabulary, so that a token is all of a name's part or of a value's: the paper replaces tags after SentencePiece to
that end.
"""

import dataclasses
import functools
import hashlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from configs.schema import BiographyData
from data.dataset import Batch, Dataset, Origin, manifest_of
from data.order import ALGORITHM, mixed, permuted

FORMAT = "biographies-1"  # how numbers become rows: part of every manifest
TRAINING_ROWS = 2**40  # no run reads them all
BOS = 0


def no_knowledge(config: BiographyData) -> float:
    """The attribute loss (nats) of one who knows what values there are and nothing of anybody: the mean of ln(values)."""
    return float(np.mean([math.log(math.prod(sizes)) for sizes in config.values]))


@dataclass(frozen=True)
class Biographies:
    """One split: training has people as `sampling` says and their training templates; the held-out one, of each group of
    people in turn, uniformly drawn ones and the other templates."""

    config: BiographyData
    count: int
    held_out: bool

    def __len__(self) -> int:
        return self.count

    def read(self, indices: np.ndarray) -> Batch:
        """Rows [B] by number, int64 [B]. Fields: tokens, targets, segment_pos, int32 [B, T], weights, float32 [B, T], 1 but
        for padding; of held-out rows also values, int32 [B, T], where a target belongs to a value the number of its attribute
        from 1 on, else 0, and group, int32 [B], the place of theirs in `ranges_of`."""
        people, group = self.people(indices)
        words, values = told(self.config, people, self.held_out, indices)
        position = np.arange(self.config.sequence_length, dtype=np.int32)
        inside = np.broadcast_to(position < self.config.biography_tokens, (len(people), len(position)))
        batch = {
            "tokens": np.where(inside, words[:, :-1], BOS).astype(np.int32),
            "targets": words[:, 1:].astype(np.int32),
            "segment_pos": np.where(inside, position, -1).astype(np.int32),
            "weights": inside.astype(np.float32),
        }
        return batch | ({"values": values[:, 1:].astype(np.int32), "group": group} if self.held_out else {})

    def origins(self, indices: np.ndarray) -> list[list[Origin]]:
        people, group = self.people(indices)
        split, groups = "held_out" if self.held_out else "train", list(ranges_of(self.config))
        return [
            [Origin(f"biography of person {person} ({groups[which]}), {split}", int(i))]
            for person, which, i in zip(people, group, indices, strict=True)
        ]

    def people(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Whom rows [B] are about, int64 [B], and the places in `ranges_of` of the groups they stand for, int32 [B]."""
        config = self.config
        if not self.held_out:
            people = sampled(config, indices)
            return people, np.where(people < config.first, 2, 0).astype(np.int32)
        ranges = ranges_of(config).values()
        number, group = np.divmod(indices, len(ranges))
        start, size = (np.array(column)[group] for column in zip(*ranges, strict=True))
        word = random_words(config, "held-out people", number, 1)[:, 0]
        return start + (word % size.astype(np.uint64)).astype(np.int64), group.astype(np.int32)


def ranges_of(config: BiographyData) -> dict[str, tuple[int, int]]:
    """First person and number of people of each group that held-out rows are about. Earlier people come third, if there are
    any, and after them those whom sequential groups of the population hold."""
    unseen = math.prod(config.names) - config.unseen  # the last, so that no other population reaches them
    ranges = {"population": (config.first, config.population), "unseen": (unseen, config.unseen)}
    if config.first:
        ranges["earlier"] = (0, config.first)
    rule, numbers = config.sampled()
    for place in range(int(numbers[0]) if rule == "groups" else 0):
        start, size = sequential(config, int(numbers[0]), place)
        ranges[f"group_{place + 1}"] = (config.first + start, size)
    return ranges


def sequential(config: BiographyData, groups: int, place: Any) -> tuple[Any, Any]:
    """First of the population's people, from 0 on, and number of people of the groups at these places: numbers or arrays."""
    start = place * config.population // groups
    return start, (place + 1) * config.population // groups - start


def random_words(config: BiographyData, purpose: str, numbers: np.ndarray, count: int) -> np.ndarray:
    """uint64 [B, count] for numbers [B]: independent words, other ones for each purpose."""
    key = hashlib.sha256(f"podwright biographies {config.seed} {purpose}".encode()).digest()
    row = mixed(numbers.astype(np.uint64) + np.frombuffer(key[:8], "<u8"))
    place = mixed(np.arange(count, dtype=np.uint64) + np.frombuffer(key[8:16], "<u8"))
    return mixed(row[:, None] + place)


def sampled(config: BiographyData, indices: np.ndarray) -> np.ndarray:
    """Whom training rows [B] are about, int64 [B]. A row's number says to which batch it belongs."""
    who, returns, earlier = random_words(config, "people", indices, 3).T
    batch = indices // config.batch_size
    rule, numbers = config.sampled()
    if rule in ("power", "celebrities"):
        drawn = np.searchsorted(popularity(config), unit(who), side="right")
    else:
        start, size = np.zeros_like(batch), np.full_like(batch, config.population)
        if rule == "warmup":
            size = np.where(batch < numbers[1], int(numbers[0]), size)
        if rule == "groups":
            groups, batches = map(int, numbers)
            start, size = sequential(config, groups, batch // batches % groups)
        drawn = start + (who % size.astype(np.uint64)).astype(np.int64)
    people = config.first + drawn
    if config.replay:
        share = config.replay * config.first / (config.replay * config.first + config.population)
        people = np.where(unit(returns) < share, (earlier % np.uint64(config.first)).astype(np.int64), people)
    return people


def unit(words: np.ndarray) -> np.ndarray:
    """uint64 -> float64 in [0, 1)."""
    return (words >> np.uint64(11)) * 2.0**-53


@functools.cache
def popularity(config: BiographyData) -> np.ndarray:
    """P(person <= i), float64 [N], without the last, which is 1: people i = 1, 2, ... as i^-exponent, or the first few
    `weight` times as likely as each of the others."""
    rule, numbers = config.sampled()
    rank = np.arange(1, config.population + 1, dtype=np.float64)
    weights = rank ** -numbers[0] if rule == "power" else np.where(rank <= numbers[0], numbers[1], 1.0)
    return np.cumsum(weights)[:-1] / weights.sum()


def name_of(config: BiographyData, people: np.ndarray) -> np.ndarray:
    """Parts of names, int64 [B, parts] from 0: no two people have the same."""
    number = permuted(people, math.prod(config.names), config.seed, 0)
    return np.stack(np.unravel_index(number, config.names), axis=1)


def facts_of(config: BiographyData, people: np.ndarray) -> list[np.ndarray]:
    """Of each attribute its value's symbols, int64 [B, tokens] from 0, independent and uniform."""
    sizes = [size for value in config.values for size in value]
    symbols = (random_words(config, "facts", people, len(sizes)) % np.array(sizes, np.uint64)).astype(np.int64)
    return np.split(symbols, np.cumsum([len(value) for value in config.values])[:-1], axis=1)


def templates_of(config: BiographyData, people: np.ndarray) -> np.ndarray:
    """Of each person and attribute an order of the templates, int64 [B, A, templates]: training uses the first
    `training_templates` and evaluation the rest."""
    shape = (len(people), len(config.attributes), config.templates)
    return np.argsort(random_words(config, "templates", people, math.prod(shape[1:])).reshape(shape), axis=-1)


def told(config: BiographyData, people: np.ndarray, held_out: bool, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Biographies of people [B], int64 [B, T + 1] from BOS on, and where they have which attribute's value, from 1 on.

    A sentence is a name, a template's words and a value. Those of all attributes follow one another in a random order.
    """
    attributes = len(config.attributes)
    words = random_words(config, "held-out rows" if held_out else "rows", rows, 2 * attributes)
    order = np.argsort(words[:, :attributes], axis=1)
    train, count = config.training_templates, config.templates
    low, high = (train, count) if held_out else (0, train)
    place = low + (words[:, attributes:] % np.uint64(high - low)).astype(np.int64)
    template = np.take_along_axis(templates_of(config, people), place[:, :, None], axis=2)[:, :, 0]
    names, facts = name_of(config, people), facts_of(config, people)
    names = names + 1 + np.cumsum([0, *config.names[:-1]])
    word = 1 + sum(config.names)  # id of the first word of a template
    symbol = word + attributes * count * config.template_tokens  # and of the first value
    lengths = np.array([names.shape[1] + config.template_tokens + fact.shape[1] for fact in facts])
    # Where each attribute's sentence starts: behind those that stand before it.
    ends = np.cumsum(lengths[order], axis=1)
    starts = np.empty_like(ends)
    np.put_along_axis(starts, order, 1 + ends - lengths[order], axis=1)

    tokens = np.full((len(people), config.sequence_length + 1), BOS, np.int64)
    values = np.zeros_like(tokens)
    for a, (fact, sizes) in enumerate(zip(facts, config.values, strict=True)):
        said = word + (a * count + template[:, a, None]) * config.template_tokens + np.arange(config.template_tokens)
        value = fact + symbol + np.cumsum([0, *sizes[:-1]])
        places = starts[:, a, None] + np.arange(lengths[a])
        np.put_along_axis(tokens, places, np.concatenate([names, said, value], axis=1), axis=1)
        np.put_along_axis(values, places[:, -fact.shape[1] :], a + 1, axis=1)
        symbol += sum(sizes)
    return tokens, values


def open_biographies(config: BiographyData) -> Dataset:
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    content = {
        "kind": config.kind,
        "format": FORMAT,
        "order": ALGORITHM,
        "needs": {"vocab_size": config.vocab_size},
        **{name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()},
    }
    rows = config.held_out_rows * len(ranges_of(config))
    return Dataset(
        manifest=manifest_of(content, {"held_out_rows": rows, "skipped": 0}),
        train=Biographies(config, TRAINING_ROWS, held_out=False),
        held_out=Biographies(config, rows, held_out=True),
        batch_size=config.batch_size,
        seed=config.seed,
        summary=(
            f"biographies of {config.population:,} people from number {config.first:,} on, {config.sampling}: "
            f"{config.biography_tokens} tokens of {config.vocab_size:,}, made as they are read; {rows:,} held out",
            f"who knows nobody has an attribute loss of {no_knowledge(config):.4f} nats",
        ),
        skipped=[],
        shuffled=False,  # so that a row's number says to which step it belongs
    )
