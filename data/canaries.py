"""Canaries of the one-run audit (arXiv 2305.08846, docs/audit.md): training images with wrong labels, each in by a coin of its own.

Which images are canaries, their labels and their coins come from hashes of different words with the image's name, so none tells
of another. Only the coins depend on `data.seed`. Whoever knows it knows who was in: it is the audit that must not look.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from configs.schema import ImageData
from data.dataset import DataError

ALGORITHM = "mislabelled-1"  # another rule makes other canaries


@dataclass(frozen=True)
class Drawn:
    """m of the images that training could use."""

    places: np.ndarray  # int64 [m], ascending: among those images
    included: np.ndarray  # bool [m]: the coins
    shifts: np.ndarray  # int64 [m], 1 to classes - 1: what is added to a label, modulo the classes
    digest: str

    @property
    def manifest(self) -> dict[str, Any]:
        """Nothing where there are none: manifests from before canaries stay as they are."""
        return {"canaries": {"algorithm": ALGORITHM, "sha256": self.digest}} if len(self.places) else {}

    def kept(self, count: int) -> np.ndarray:
        """int64 [n]: which of the `count` images training does use."""
        return np.setdiff1d(np.arange(count), self.places[~self.included])

    def told(self) -> list[str]:
        """For people."""
        return [f"{len(self.places):,} canaries, {int(self.included.sum()):,} of them in"] if len(self.places) else []


@dataclass(frozen=True)
class Canaries:
    examples: Any  # with `views(numbers, positions)`, as data.units has it: all m canaries with their wrong labels
    included: np.ndarray  # bool [m]
    views: int  # of an image, that are worth a look: 1 where nothing is random


def draw(count: int, name: Callable[[int], str], classes: int, config: ImageData) -> Drawn:
    """Of `count` images that training could use; `name` names one of them. Raises DataError."""
    names = [name(place) for place in range(count)] if config.canaries else []
    if config.canaries > count:
        raise DataError(
            f"{config.show('canaries')} is more than the {count:,} training images of {config.source}: at most as many are allowed"
        )
    ranks = np.array([number("canary", one) for one in names], np.uint64)
    places = np.sort(np.argsort(ranks, kind="stable")[: config.canaries])
    own = [names[place] for place in places]
    included = np.array([number(f"canary coin {config.seed}", one) % 2 for one in own], bool)
    shifts = np.array([1 + number("canary label", one) % (classes - 1) for one in own], np.int64)
    if count == len(own) - included.sum():
        raise DataError(f"{config.show('canaries')} leaves no image for training: give fewer")
    digest = hashlib.sha256(json.dumps([own, included.tolist(), shifts.tolist()]).encode()).hexdigest()
    return Drawn(places, included, shifts, digest)


def number(word: str, name: str) -> int:
    digest = hashlib.sha256(f"podwright {word} {name}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big")
