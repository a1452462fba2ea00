"""Images of a folder or of records as batches: augmented and mixed for training, as published for evaluation. Everything random
comes from the seed and the position in the endless stream, so that neither hosts nor workers change a pixel."""

import hashlib
from dataclasses import dataclass

import numpy as np

from configs.schema import ImageData
from data.augment import crop_and_flip, rand_augment
from data.bad_records import BadRecord, substituted, with_bad
from data.dataset import Batch, DataError, Dataset, Origin, manifest_of
from data.image_decoding import BadImage, decoded, for_evaluation, normalised, resized
from data.image_sources import ImageSource, open_source
from data.mixing import cut_mix, mix_up
from data.order import ALGORITHM, example_at

FORMAT = "photos-1"  # how images become batches: part of every manifest
Photo = tuple[np.ndarray, int]  # uint8 (H W 3), label


@dataclass(frozen=True)
class Split:
    """Which images of a source."""

    source: ImageSource
    numbers: np.ndarray  # int64 [n]: in the source

    def __len__(self) -> int:
        return len(self.numbers)

    def photo(self, index: int) -> Photo | BadRecord:
        number = int(self.numbers[index])
        read = self.source.read(number)
        if isinstance(read, BadRecord):
            return read
        try:
            return decoded(read[0]), read[1]
        except BadImage as why:
            origin = self.source.origin(number)
            return BadRecord(origin.source, origin.place, str(why))

    def photos(self, indices: np.ndarray) -> tuple[list[Photo], list[BadRecord]]:
        return substituted(lambda some: [self.photo(int(i)) for i in some], indices, len(self))


@dataclass(frozen=True)
class TrainingPhotos:
    """One image after the other of an endless stream of epochs, each epoch in another order and with other augmentation."""

    split: Split
    config: ImageData

    def __len__(self) -> int:
        return len(self.split)

    def read(self, positions: np.ndarray) -> Batch:
        """Images [B] by position, int64 [B]. Fields: images float32 [B, H, W, 3], normalised; labels int32 [B]; weights float32
        [B]; where images are mixed also labels_b int32 [B], of the other image, and mix float32 [B], the share of `labels`."""
        photos, bad = self.split.photos(self.indices(positions))
        partners: list[Photo] = []
        if self.config.mixes:
            partners, others = self.split.photos(self.partners(positions))
            bad = bad + others
        images, shares = [], np.ones(len(positions), np.float32)
        for place, position in enumerate(positions):
            rng = np.random.Generator(np.random.Philox(key=key_of(self.config.seed, int(position))))
            image = self.fitted(photos[place][0], rng)
            if partners:
                image, shares[place] = self.mixed(image, self.fitted(partners[place][0], rng), int(position), rng)
            images.append(self.finished(image, rng))
        batch = {
            "images": np.stack(images),
            "labels": np.array([label for _, label in photos], np.int32),
            "weights": np.ones(len(positions), np.float32),
        }
        if partners:
            batch |= {"labels_b": np.array([label for _, label in partners], np.int32), "mix": shares}
        return with_bad(batch, bad)

    def indices(self, positions: np.ndarray) -> np.ndarray:
        return example_at(positions, len(self.split), self.config.seed)

    def partners(self, positions: np.ndarray) -> np.ndarray:
        """Of another order, and never the same image, unless there is only one."""
        own, other = self.indices(positions), example_at(positions, len(self.split), key_of(self.config.seed, -1)[0])
        return np.where(own == other, (other + 1) % len(self.split), other)

    def fitted(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        size = self.config.image_size
        return crop_and_flip(image, size, rng) if self.config.augment == "crop" else resized(image, size, size)

    def mixed(self, a: np.ndarray, b: np.ndarray, position: int, rng: np.random.Generator) -> tuple[np.ndarray, float]:
        """Where both are asked for, every second image of the stream is mixed one way, the others the other way."""
        if self.config.cutmix and (not self.config.mixup_alpha or position % 2):
            return cut_mix(a, b, rng)
        return mix_up(a, b, self.config.mixup_alpha, rng)

    def finished(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if self.config.randaugment_layers:
            whole = np.clip(image, 0, 255).astype(np.uint8)  # cubic interpolation overshoots
            image = rand_augment(whole, self.config.randaugment_layers, self.config.randaugment_magnitude, rng)
        return normalised(image)

    def origins(self, positions: np.ndarray) -> list[list[Origin]]:
        return [[self.split.source.origin(int(self.split.numbers[i]))] for i in self.indices(positions)]


@dataclass(frozen=True)
class HeldOutPhotos:
    split: Split
    size: int

    def __len__(self) -> int:
        return len(self.split)

    def read(self, indices: np.ndarray) -> Batch:
        """Images [B] by number, int64 [B]. Fields: images float32 [B, H, W, 3], normalised, labels int32 [B], weights float32 [B]."""
        photos, bad = self.split.photos(indices)
        batch = {
            "images": np.stack([normalised(for_evaluation(image, self.size)) for image, _ in photos]),
            "labels": np.array([label for _, label in photos], np.int32),
            "weights": np.ones(len(photos), np.float32),
        }
        return with_bad(batch, bad)

    def origins(self, indices: np.ndarray) -> list[list[Origin]]:
        return [[self.split.source.origin(int(self.split.numbers[i]))] for i in indices]


def key_of(seed: int, position: int) -> tuple[int, int]:
    digest = hashlib.sha256(f"podwright images {seed} {position}".encode()).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")


def open_photos(config: ImageData) -> Dataset:
    """Raises DataError."""
    source = open_source(config.source)
    if config.held_out_source:
        other = open_source(config.held_out_source)
        if other.classes != source.classes:
            raise DataError(
                f"{config.held_out_source} has {other.classes} classes, but {config.source} has {source.classes}"
            )
        train, rest = Split(source, np.arange(len(source))), Split(other, np.arange(len(other)))
    else:
        held = source.held_out(config.held_out)
        other, train, rest = source, Split(source, np.flatnonzero(~held)), Split(source, np.flatnonzero(held))
        if held.all() or not held.any():
            raise DataError(
                f"{config.source} has {len(source)} images, but data.held_out={config.held_out:g} leaves {int(held.sum())} of "
                f"them held out and {int((~held).sum())} for training: both need one"
            )
    augmentation = ("augment", "randaugment_layers", "randaugment_magnitude", "mixup_alpha", "cutmix")
    content = {
        "kind": config.kind,
        "format": FORMAT,
        "order": ALGORITHM,
        "images": [source.digest, other.digest, None if config.held_out_source else config.held_out],
        "image_size": [config.image_size, config.pixels_held_out],
        **{name: getattr(config, name) for name in augmentation},
        "needs": {"num_classes": source.classes, "channels": 3},
        "batch_size": config.batch_size,
    }
    counts = {"images": len(source), "train_images": len(train), "held_out_images": len(rest), "skipped": 0}
    return Dataset(
        manifest=manifest_of(content, counts),
        train=TrainingPhotos(train, config),
        held_out=HeldOutPhotos(rest, config.pixels_held_out),
        batch_size=config.batch_size,
        seed=config.seed,
        summary=(
            f"{config.source}: {len(train):,} training and {len(rest):,} held-out images of {source.classes:,} classes, "
            f"{config.image_size} by {config.image_size} ({len(train) / config.batch_size:,.1f} steps of {config.batch_size} "
            f"an epoch)",
        ),
        skipped=[],
        shuffled=False,
        workers=config.workers,
        max_bad=config.max_bad,
    )
