"""ListOps (arXiv 1804.06028) as Long Range Arena makes it (arXiv 2011.04006): nested operators on digits, and their value.

Expression i is the first that is accepted of an endless stream of trees that (seed, split, i) alone decides, so there is
neither a file nor an order in which expressions must be made. Which split an expression may belong to is decided by its hash:
an expression that is trained on is never held out, however few there are. Within a split two numbers may have the same one,
which at the published lengths does not happen.
"""

import hashlib
import random
from collections.abc import Callable

from configs.long_range_data import LongRangeData
from data.errors import DataError

OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
SYMBOLS = (*OPERATORS, "]", *"0123456789")  # ids are places in this
END, ZERO = 4, 5
OPERATOR_SHARE = 0.25  # of nodes above the greatest depth
SPLITS = ("validation", "test", *("train",) * 6)  # by the hash of an expression
TRIES = 200_000  # at the published lengths one tree in 12 is accepted


class TooLong(Exception):
    """The tree has as many tokens as no accepted one."""


def expression(key: int, split: str, config: LongRangeData) -> tuple[bytes, int]:
    """Ids of the tokens and the value of the first accepted tree of stream `key`. Raises DataError where none is found."""
    draw = random.Random(key).random  # whose sequence Python promises not to change
    for _ in range(TRIES):
        tokens = bytearray()
        try:
            value = grow(draw, 1, config, tokens)
        except TooLong:
            continue
        if len(tokens) > config.min_length and SPLITS[hashlib.sha256(tokens).digest()[0] % len(SPLITS)] == split:
            return bytes(tokens), value
    raise DataError(
        f"{TRIES:,} trees have no expression for {split!r} of more than {config.show('min_length')} and fewer than "
        f"{config.show('max_length')} tokens with {config.show('max_depth')} and {config.show('max_args')}: allow others"
    )


def grow(draw: Callable[[], float], depth: int, config: LongRangeData, tokens: bytearray) -> int:
    """Appends a random node at this depth, with all below it, to `tokens`; returns its value. Raises TooLong as soon as the
    tree cannot be accepted, which changes nothing about those that are."""
    if depth == config.max_depth or draw() > OPERATOR_SHARE:
        digit = int(10 * draw())
        tokens.append(ZERO + digit)
        return digit
    count, operator = 2 + int((config.max_args - 1) * draw()), int(len(OPERATORS) * draw())
    tokens.append(operator)
    values = [grow(draw, depth + 1, config, tokens) for _ in range(count)]
    tokens.append(END)
    if len(tokens) >= config.max_length:
        raise TooLong
    return evaluated(OPERATORS[operator], values)


def evaluated(operator: str, values: list[int]) -> int:
    """Of two or more digits a digit. The median of an even number is the mean of the middle two, rounded down."""
    if operator == "[MIN":
        return min(values)
    if operator == "[MAX":
        return max(values)
    if operator == "[SM":
        return sum(values) % 10
    middle = sorted(values)
    return (middle[(len(values) - 1) // 2] + middle[len(values) // 2]) // 2
