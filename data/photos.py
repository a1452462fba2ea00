"""Images of a folder or of records as batches: augmented and mixed for training, as published for evaluation. Everything random
comes from the seed and the position in the endless stream, so that neither hosts nor workers change a pixel."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from configs.schema import ImageData
from data.augment import crop_and_flip, rand_augment
from data.bad_records import BadRecord, substituted, with_bad
from data.canaries import Canaries, draw
from data.dataset import Batch, DataError, Dataset, Origin, manifest_of
from data.image_decoding import BadImage, decoded, for_evaluation, normalised, resized
from data.image_sources import ImageSource, open_source
from data.image_tables import Content, Label, Table
from data.mixing import cut_mix, mix_up
from data.order import ALGORITHM, example_at

FORMAT = "photos-2"  # how images become batches: part of every manifest
VIEWS = 8  # of a canary
Photo = tuple[np.ndarray, Label]  # uint8 (H W 3), and what it shows


@dataclass(frozen=True)
class Split:
    """Which images of a source."""

    source: ImageSource
    numbers: np.ndarray  # int64 [n]: in the source
    shifts: Mapping[int, int] = field(default_factory=dict)  # of the labels of canaries, by number in the source

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def owners(self) -> np.ndarray | None:
        """str [n]: the unit, such as a patient, that each image belongs to, where the source names them."""
        owners = self.source.owners if isinstance(self.source, Table) else None
        return None if owners is None else owners[self.numbers]

    def name(self, index: int) -> str:
        origin = self.source.origin(int(self.numbers[index]))
        return f"{origin.source}/{origin.place}"

    def photos(self, indices: np.ndarray, bad: list[BadRecord]) -> Iterator[Photo]:
        """One after the other, int64 [n]. What cannot be used is added to `bad`, and another image stands for it."""
        for index, content in zip(indices, self.encoded(indices), strict=True):
            photo = self.photo(int(index), content)
            if isinstance(photo, BadRecord):
                [photo], found = substituted(self.again, np.array([index]), len(self))
                bad += found
            yield photo

    def encoded(self, indices: np.ndarray) -> Iterator[Content]:
        return iter(self.source.read(self.numbers[indices]))

    def again(self, indices: np.ndarray) -> list[Photo | BadRecord]:
        return [self.photo(int(i), content) for i, content in zip(indices, self.encoded(indices), strict=True)]

    def photo(self, index: int, content: Content) -> Photo | BadRecord:
        if isinstance(content, BadRecord):
            return content
        shift = self.shifts.get(int(self.numbers[index]), 0)
        try:
            return decoded(content[0]), (content[1] + shift) % self.source.classes if shift else content[1]
        except BadImage as why:
            origin = self.source.origin(int(self.numbers[index]))
            return BadRecord(origin.source, origin.place, str(why))


@dataclass(frozen=True)
class TrainingPhotos:
    """One image after the other of an endless stream of epochs, each epoch in another order and with other augmentation."""

    split: Split
    config: ImageData

    def __len__(self) -> int:
        return len(self.split)

    @property
    def units(self) -> np.ndarray | None:
        """int64 [N], from 0 without gaps: whose each image is, such as a patient's; None where the source doesn't say."""
        owners = self.split.owners
        return None if owners is None else np.unique(owners, return_inverse=True)[1].astype(np.int64)

    def read(self, positions: np.ndarray) -> Batch:
        """Images [B] by position, int64 [B]. Fields: images float32 [B, H, W, 3], normalised; labels int32 [B], or of several
        labels float32 [B, L]; weights float32 [B]; where images are mixed also labels_b, as labels, of the other image, and mix
        float32 [B], the share of `labels`."""
        size, bad = self.config.image_size, list[BadRecord]()
        batch = {
            "images": np.empty((len(positions), size, size, 3), np.float32),
            "labels": empty_labels(self.config, len(positions)),
            "weights": np.ones(len(positions), np.float32),
        }
        if self.config.mixes:
            other = {"labels_b": empty_labels(self.config, len(positions)), "mix": np.ones(len(positions), np.float32)}
            batch |= other
        photos = self.split.photos(self.wanted(positions), bad)  # a decoded image is large: one at a time
        for place, position in enumerate(positions):
            rng = np.random.Generator(np.random.Philox(key=key_of(self.config.seed, int(position))))
            whole, batch["labels"][place] = next(photos)
            image = self.fitted(whole, rng)
            if self.config.mixes:
                whole, batch["labels_b"][place] = next(photos)
                image, batch["mix"][place] = self.mixed(image, self.fitted(whole, rng), int(position), rng)
            self.finish(image, rng, batch["images"][place])
        return with_bad(batch, bad)

    def views(self, numbers: np.ndarray, draws: np.ndarray) -> Batch:
        """Of private training: images [B] by number, augmented as the draws say; nothing stands for one that cannot be used,
        since another one's image would be in a batch without being drawn."""
        size, bad = self.config.image_size, list[BadRecord]()
        batch = {
            "images": np.zeros((len(numbers), size, size, 3), np.float32),
            "labels": np.zeros_like(empty_labels(self.config, len(numbers))),
            "weights": np.zeros(len(numbers), np.float32),
        }
        contents = self.split.encoded(numbers)
        for place, (number, content) in enumerate(zip(numbers, contents, strict=True)):
            photo = self.split.photo(int(number), content)
            if isinstance(photo, BadRecord):
                bad.append(photo)
                continue
            rng = np.random.Generator(np.random.Philox(key=key_of(self.config.seed, int(draws[place]))))
            whole, batch["labels"][place] = photo
            self.finish(self.fitted(whole, rng), rng, batch["images"][place])
            batch["weights"][place] = 1
        return with_bad(batch, bad)

    def wanted(self, positions: np.ndarray) -> np.ndarray:
        """Images in the order of their use: each position's own, and the one that it is mixed with."""
        own = self.indices(positions)
        return np.stack([own, self.partners(positions)], axis=1).ravel() if self.config.mixes else own

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """With a multiplicity, as many neighbours have the same image, and an epoch has as many times the positions."""
        return example_at(positions // self.config.multiplicity, len(self.split), self.config.seed)

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

    def finish(self, image: np.ndarray, rng: np.random.Generator, out: np.ndarray) -> None:
        if self.config.randaugment_layers:
            whole = np.clip(image, 0, 255).astype(np.uint8)  # cubic interpolation overshoots
            image = rand_augment(whole, self.config.randaugment_layers, self.config.randaugment_magnitude, rng)
        normalised(image, out, self.config.normalise)

    def origins(self, positions: np.ndarray) -> list[list[Origin]]:
        return [[self.split.source.origin(int(self.split.numbers[i]))] for i in self.indices(positions)]


@dataclass(frozen=True)
class HeldOutPhotos:
    split: Split
    config: ImageData

    def __len__(self) -> int:
        return len(self.split)

    @property
    def attributes(self) -> dict[str, np.ndarray]:
        """By name str [N], such as each patient's sex: the subgroups that errors are compared between."""
        found = self.split.source.attributes if isinstance(self.split.source, Table) else {}
        return {name: values[self.split.numbers] for name, values in found.items()}

    def read(self, indices: np.ndarray) -> Batch:
        """Images [B] by number, int64 [B]. Fields: images float32 [B, H, W, 3], normalised, labels int32 [B], or of several labels
        float32 [B, L], weights float32 [B]."""
        size, bad = self.config.pixels_held_out, list[BadRecord]()
        batch = {
            "images": np.empty((len(indices), size, size, 3), np.float32),
            "labels": empty_labels(self.config, len(indices)),
            "weights": np.ones(len(indices), np.float32),
        }
        for place, (image, label) in enumerate(self.split.photos(indices, bad)):
            normalised(for_evaluation(image, size), batch["images"][place], self.config.normalise)
            batch["labels"][place] = label
        return with_bad(batch, bad)

    def origins(self, indices: np.ndarray) -> list[list[Origin]]:
        return [[self.split.source.origin(int(self.split.numbers[i]))] for i in indices]


def empty_labels(config: ImageData, rows: int) -> np.ndarray:
    return np.empty((rows, len(config.labels)), np.float32) if config.labels else np.empty(rows, np.int32)


def key_of(seed: int, position: int) -> tuple[int, int]:
    digest = hashlib.sha256(f"podwright images {seed} {position}".encode()).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")


def far_moves(config: ImageData) -> list[str]:
    """A sentence, where RandAugment leaves little of an image: its magnitudes are for the sizes that they were published with."""
    pixels = round(10 * config.randaugment_magnitude)
    if not config.randaugment_layers or 2 * pixels <= config.image_size:
        return []
    return [
        f"{config.show('randaugment_magnitude')} moves images by {pixels} pixels, more than half of "
        f"{config.show('image_size')}: little of them is left to see"
    ]


def shared_owners(train: Split, held_out: Split) -> list[str]:
    """A sentence, where both have images of the same unit."""
    ours, theirs = train.owners, held_out.owners
    if ours is None or theirs is None or not len(both := np.intersect1d(ours, theirs)):
        return []
    return [
        f"{len(both):,} units ({both[0]}, ...) have training and held-out images: held-out metrics flatter the model"
    ]


def open_photos(config: ImageData) -> Dataset:
    """Raises DataError."""
    source = open_source(config.source, config.labels)
    if config.held_out_source:
        other = open_source(config.held_out_source, config.labels, source)
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
    canaries = draw(len(train), train.name, source.classes, config)
    numbers = train.numbers[canaries.places]
    train = replace(train, shifts=dict(zip(numbers.tolist(), canaries.shifts.tolist(), strict=True)))
    all_canaries = TrainingPhotos(replace(train, numbers=numbers), config)
    train = replace(train, numbers=train.numbers[canaries.kept(len(train))])
    augmentation = ("augment", "randaugment_layers", "randaugment_magnitude", "mixup_alpha", "cutmix")
    later = {  # what older manifests have none of
        **({"multiplicity": config.multiplicity} if config.multiplicity > 1 else {}),
        **({"labels": list(config.labels)} if config.labels else {}),
        **({"normalise": config.normalise} if config.normalise != "imagenet" else {}),
    }
    content = {
        "kind": config.kind,
        "format": FORMAT,
        "order": ALGORITHM,
        "images": [source.digest, other.digest, None if config.held_out_source else config.held_out],
        "image_size": [config.image_size, config.pixels_held_out],
        **{name: getattr(config, name) for name in augmentation},
        **later,
        "needs": {"num_classes": source.classes, "channels": 3},
        "batch_size": config.batch_size,
        **canaries.manifest,
    }
    counts = {"images": len(source), "train_images": len(train), "held_out_images": len(rest), "skipped": 0}
    return Dataset(
        manifest=manifest_of(content, counts),
        train=TrainingPhotos(train, config),
        held_out=HeldOutPhotos(rest, config),
        batch_size=config.batch_size,
        seed=config.seed,
        summary=(
            f"{config.source}: {len(train):,} training and {len(rest):,} held-out images of {source.classes:,} "
            f"{'labels' if config.labels else 'classes'}, {config.image_size} by {config.image_size} ({len(train) * config.multiplicity / config.batch_size:,.1f} steps of "
            f"{config.batch_size} an epoch)",
            *far_moves(config),
            *shared_owners(train, rest),
            *canaries.told(),
        ),
        skipped=[],
        canaries=Canaries(all_canaries, canaries.included, VIEWS if config.augments else 1),
        shuffled=False,
        workers=config.workers,
        max_bad=config.max_bad,
    )
