"""Two images in one: MixUp (arXiv 1710.09412) and CutMix (1905.04899) as arXiv 2102.06171 mixes them."""

import numpy as np


def mix_up(a: np.ndarray, b: np.ndarray, alpha: float, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """Images (H W C) and the share of `a` in their sum."""
    share = float(rng.beta(alpha, alpha))
    return share * a + (1 - share) * b, share


def cut_mix(a: np.ndarray, b: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """`b` with a patch of `a`, (H W C), and the share of its area that is `a`, after the patch is cut at the borders."""
    height, width = a.shape[:2]
    side = np.sqrt(1 - rng.random())
    tall, wide = int(side * height), int(side * width)
    y, x = int(rng.integers(height)), int(rng.integers(width))
    top, bottom = max(0, y - tall // 2), min(height, y - tall // 2 + tall)
    left, right = max(0, x - wide // 2), min(width, x - wide // 2 + wide)
    mixed = b.copy()
    mixed[top:bottom, left:right] = a[top:bottom, left:right]
    return mixed, (bottom - top) * (right - left) / (height * width)
