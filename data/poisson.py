"""Poisson sampling: every unit enters a step's batch by its own coin, as the accounting of DP-SGD assumes.

A pure function of (secret, step): every host, restart and version of numpy draws the same. Who knows the secret knows
who took part in which step, and then the sampling protects nobody: keep it from whatever is released.
"""

import bisect
import hashlib
import math

import numpy as np

ALGORITHM = "shake256-coins"  # another rule draws other batches
NEGLIGIBLE = 1e-15  # probability of a batch that does not fit
COIN_BITS = 53  # rate * 2**53 is exact
BLOCK = 1 << 20  # coins tossed at once: 8 MB


def drawn(secret: bytes, step: int, units: int, rate: float) -> np.ndarray:
    """The units of a step, ascending: int64 [k], k ~ Binomial(units, rate), each in with probability `rate` by itself.

    One coin per unit rather than a size and then a subset of it, which has the same distribution: there is nothing to
    prove, and bits of a hash cannot be told from coins without the secret.
    """
    threshold = round(rate * 2**COIN_BITS)
    found = []
    for start in range(0, units, BLOCK):
        coins = tossed(secret, step, start // BLOCK, min(BLOCK, units - start))
        found.append(start + np.flatnonzero(coins < threshold))
    return np.concatenate(found)


def tossed(secret: bytes, step: int, block: int, coins: int) -> np.ndarray:
    """uint64 [coins], uniform in [0, 2**COIN_BITS)."""
    numbers = step.to_bytes(8, "little") + block.to_bytes(8, "little")
    stream = hashlib.shake_256(b"podwright poisson" + numbers + secret).digest(8 * coins)
    return np.frombuffer(stream, "<u8") >> np.uint64(64 - COIN_BITS)


def capacity(units: int, rate: float, multiple: int) -> int:
    """Rows to have ready: the least multiple that a batch exceeds with a probability of at most NEGLIGIBLE."""
    most = -(-units // multiple)
    fits = range(1, most + 1)
    return (
        multiple * fits[bisect.bisect_left(fits, True, key=lambda n: overflow(units, rate, n * multiple) <= NEGLIGIBLE)]
    )


def overflow(units: int, rate: float, capacity: int) -> float:
    """At least P(Binomial(units, rate) > capacity), for 0 < rate <= 1, and not 2 % more where that is NEGLIGIBLE.

    Terms of the tail fall ever faster, so a geometric series from the first two bounds their sum.
    """
    if capacity >= units:
        return 0.0
    first = capacity + 1
    falling = (units - first) * rate < (first + 1) * (1 - rate)
    if not falling:  # below the mode
        return 1.0
    ratio = (units - first) * rate / ((first + 1) * (1 - rate))
    choices = math.lgamma(units + 1) - math.lgamma(first + 1) - math.lgamma(units - first + 1)
    term = choices + first * math.log(rate) + (units - first) * math.log1p(-rate)
    return min(1.0, math.exp(term) / (1 - ratio))
