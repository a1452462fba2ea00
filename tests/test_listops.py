"""ListOps: expressions of the published grammar and lengths, and their values."""

import collections
import dataclasses
import pathlib

import numpy as np
import pytest

import data.kept_rows
from configs.schema import LongRangeData
from data import DataError, open_data
from data.listops import SYMBOLS, TooLong, expression, grow

PUBLISHED = LongRangeData()
SHORT = LongRangeData(sequence_length=100, max_depth=4, max_args=5, min_length=19, max_length=101, held_out_rows=64)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> pathlib.Path:
    monkeypatch.setattr(data.kept_rows, "CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def value_of(text: str) -> int:
    """Written from the paper, on brackets as text and with numpy's median."""
    stack: list[list] = [[]]
    for word in text.split():
        if word.startswith("["):
            stack.append([word])
        elif word == "]":
            operator, *values = stack.pop()
            stack[-1].append(
                {
                    "[MIN": np.min,
                    "[MAX": np.max,
                    "[MED": lambda values: int(np.median(values)),
                    "[SM": lambda values: np.sum(values) % 10,
                }[operator](values)
            )
        else:
            stack[-1].append(int(word))
    ((value,),) = stack
    return int(value)


def depth_and_most_args(text: str) -> tuple[int, int, int]:
    """Levels of nodes, and the fewest and most values of a bracket."""
    open_brackets, deepest, counts = [0], 1, []
    for word in text.split():
        if word == "]":
            counts.append(open_brackets.pop())
        else:
            open_brackets[-1] += 1
            deepest = max(deepest, len(open_brackets))
            if word.startswith("["):
                open_brackets.append(0)
    return deepest, min(counts), max(counts)


def texts_of(batch) -> list[str]:
    return [
        " ".join(SYMBOLS[i] for i in row[: (positions >= 0).sum()])
        for row, positions in zip(batch["tokens"], batch["segment_pos"], strict=True)
    ]


def test_the_evaluator_of_these_tests_gives_the_papers_values():
    assert value_of("[MAX 2 9 [MIN 4 7 ] 0 ]") == 9  # the first example of arXiv 1804.06028
    assert value_of("[MAX 4 3 [MIN 2 3 ] 1 0 [MED 1 5 8 9 2 ] ]") == 5  # that of arXiv 2011.04006
    assert value_of("[SM 7 8 [MED 1 4 ] ]") == 7


@pytest.mark.parametrize(("config", "rows"), [(SHORT, 500), (PUBLISHED, 12)])
def test_expressions_have_their_values_and_are_of_the_grammar(config, rows):
    batch = open_data(config).train.read(np.arange(rows))
    texts = texts_of(batch)
    assert [value_of(text) for text in texts] == batch["labels"].tolist()
    lengths = np.array([len(text.split()) for text in texts])
    assert config.min_length < lengths.min() < lengths.max() < config.max_length
    levels, fewest, most = np.array([depth_and_most_args(text) for text in texts]).T
    assert levels.max() <= config.max_depth
    assert fewest.min() == 2
    assert most.max() == config.max_args
    assert {word for text in texts for word in text.split()} == set(SYMBOLS)


def accepted(trees: int) -> tuple[int, collections.Counter]:
    """How many trees of the published generator are kept, and their values."""
    draw, values = np.random.default_rng(5).random, collections.Counter()
    for _ in range(trees):
        tokens = bytearray()
        try:
            value = grow(draw, 1, PUBLISHED, tokens)
        except TooLong:
            continue
        if len(tokens) > 500:
            values[value] += 1
    return values.total(), values


def test_one_tree_in_twelve_is_long_enough():
    """8.3 %, as the published generator; the bounds are 4 standard deviations of 4,000 trees."""
    count, values = accepted(4000)
    assert count / 4000 == pytest.approx(0.083, abs=4 * (0.083 * 0.917 / 4000) ** 0.5)
    extremes = values[0] + values[9]
    assert extremes / count == pytest.approx(0.337, abs=4 * (0.337 * 0.663 / count) ** 0.5)


def test_a_quarter_of_the_nodes_are_operators():
    flat = dataclasses.replace(PUBLISHED, max_depth=2)
    draw, digits = np.random.default_rng(6).random, 0
    for _ in range(4000):
        tokens = bytearray()
        grow(draw, 1, flat, tokens)
        digits += len(tokens) == 1
    assert digits / 4000 == pytest.approx(0.75, abs=4 * (0.75 * 0.25 / 4000) ** 0.5)


@pytest.mark.slow
def test_values_are_spread_as_in_the_published_data():
    """0 and 9 16.8 to 16.9 % each, the others 7.3 to 9.1 %, of 26,953 expressions; bounds of 4 standard deviations more."""
    count, values = accepted(150_000)
    shares = np.array([values[digit] / count for digit in range(10)])
    slack = 4 * (0.169 * 0.831 / count) ** 0.5
    np.testing.assert_allclose(shares[[0, 9]], 0.1685, atol=slack)
    assert 0.073 - slack < shares[1:9].min() < shares[1:9].max() < 0.091 + slack


def test_what_is_trained_on_is_never_held_out_however_few_expressions_there_are():
    tiny = dataclasses.replace(SHORT, max_depth=2, max_args=2, min_length=1, max_length=6, held_out_rows=600)
    seen = {}
    for split in ("validation", "test"):
        opened = open_data(dataclasses.replace(tiny, held_out_split=split))
        seen[split] = set(texts_of(opened.held_out.read(np.arange(600))))
    seen["train"] = set(texts_of(opened.train.read(np.arange(4000))))
    assert sum(map(len, seen.values())) == len(set.union(*seen.values())) == 400  # 4 operators on 2 digits


def test_settings_that_no_expression_fits_are_told():
    nothing = dataclasses.replace(SHORT, max_depth=2, max_args=2, min_length=5)
    with pytest.raises(DataError, match=r"no expression for 'train' of more than data\.min_length=5 and fewer than"):
        expression(1, "train", nothing)
