"""Poisson sampling: every unit enters a step's batch by its own coin, as the accounting of DP-SGD assumes.

A pure function of (secret, step): every host, restart and version of numpy draws the same. Who knows the secret knows
who took part in which step, and then the sampling protects nobody: keep it from whatever is released.
"""

import hashlib

import numpy as np

ALGORITHM = "shake256-coins"  # another rule draws other batches
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
