"""What training changes in an image: a distorted crop, a flip, and RandAugment (arXiv 1909.13719) as 2102.06171 uses it."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance

from data.image_decoding import MARGIN, resized

AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)
COVER = 0.1  # of the image, at least
TRIES = 10
FILL = (128, 128, 128)

Table = Callable[["Pixels", float], np.ndarray]  # (pixels, magnitude / 10): uint8 (3 256)
Move = Callable[[Image.Image, float, np.random.Generator], Image.Image]  # (RGB, magnitude / 10, random)
values = np.arange(256)


def crop_and_flip(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 (H W 3) to float32 (size size 3): a part of it, resized without regard to its proportion, flipped half the time."""
    top, left, height, width = distorted_box(image.shape[0], image.shape[1], size, rng)
    flip = rng.random() < 0.5
    return resized(image[top : top + height, left : left + width], size, size, flip)


def distorted_box(height: int, width: int, size: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """(top, left, height, width) as TensorFlow's sample_distorted_bounding_box draws it: an aspect, then a height among
    those that give the area. After ten that don't fit, the centre, as much of it as evaluation would show."""
    for _ in range(TRIES):
        aspect = rng.uniform(*ASPECT)  # width over height
        low, high = (round(np.sqrt(share * height * width / aspect)) for share in AREA)
        high = min(high, height, int((width + 0.4999) / aspect))
        tall = int(rng.integers(min(low, high), high + 1))
        wide = round(tall * aspect)
        area = tall * wide / (height * width)
        if 0 < wide <= width and 0 < tall <= height and max(AREA[0], COVER) <= area <= AREA[1]:
            return int(rng.integers(height - tall + 1)), int(rng.integers(width - wide + 1)), tall, wide
    side = max(1, int(min(height, width) * size / (size + MARGIN)))
    return (height - side + 1) // 2, (width - side + 1) // 2, side, side


def rand_augment(image: np.ndarray, layers: int, magnitude: float, rng: np.random.Generator) -> np.ndarray:
    """uint8 (H W 3), same shape: `layers` operations drawn evenly, each applied; their magnitudes are in TABLES and MOVES."""
    return operate(image, [OPS[choice] for choice in rng.integers(len(OPS), size=layers)], magnitude / 10, rng)


@dataclass(frozen=True)
class Pixels:
    """An image whose values are still to be looked up in a table: tables in a row become one."""

    image: Image.Image
    table: np.ndarray | None = None  # uint8 (3 256)

    def counts(self) -> np.ndarray:
        """How often each value is there, int64 (3 256)."""
        found = np.array(self.image.histogram()).reshape(3, 256)
        if self.table is None:
            return found
        return np.array([np.bincount(to, of, 256) for to, of in zip(self.table, found, strict=True)]).astype(int)

    def then(self, table: np.ndarray) -> "Pixels":
        return Pixels(self.image, table if self.table is None else np.take_along_axis(table, self.table.astype(int), 1))

    def done(self) -> Image.Image:
        return self.image if self.table is None else self.image.point(self.table.ravel().tolist())


def operate(image: np.ndarray, names: list[str], m: float, rng: np.random.Generator) -> np.ndarray:
    """uint8 (H W 3), same shape: the operations, one after the other, at magnitude 10 m."""
    pixels = Pixels(Image.fromarray(image))
    for name in names:
        if name in TABLES:
            pixels = pixels.then(TABLES[name](pixels, m))
        else:
            pixels = Pixels(MOVES[name](pixels.done(), m, rng))
    return np.asarray(pixels.done())


def either(value: float, rng: np.random.Generator) -> float:
    """The value or its negative, evenly."""
    return value if rng.random() < 0.5 else -value


def affine(image: Image.Image, a: float, b: float, c: float, d: float, e: float, f: float) -> Image.Image:
    """What stands at (a x + b y + c, d x + e y + f) comes to (x, y)."""
    return image.transform(
        image.size, Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.NEAREST, fillcolor=FILL
    )


def rotate(image: Image.Image, m: float, rng: np.random.Generator) -> Image.Image:
    return image.rotate(either(30 * m, rng), Image.Resampling.NEAREST, fillcolor=FILL)


def autocontrast(pixels: Pixels, m: float) -> np.ndarray:
    """The least value becomes 0, the greatest 255."""
    return np.stack([ramp(*np.flatnonzero(of)[[0, -1]].tolist()) for of in pixels.counts()])


def ramp(low: int, high: int) -> np.ndarray:
    if low == high:
        return values.astype(np.uint8)
    scale = 255 / (high - low)
    return np.clip(np.trunc(values * scale - low * scale), 0, 255).astype(np.uint8)


def equalize(pixels: Pixels, m: float) -> np.ndarray:
    """Every value as often as any other, as far as that goes."""
    table = np.tile(values.astype(np.uint8), (3, 1))
    for to, of in zip(table, pixels.counts(), strict=True):
        step = (of.sum() - of[np.flatnonzero(of)[-1]]) // 255
        if step:
            to[:] = np.minimum((step // 2 + np.cumsum(of) - of) // step, 255)
    return table


def alike(table: np.ndarray) -> np.ndarray:
    return np.tile(np.clip(table, 0, 255).astype(np.uint8), (3, 1))


def contrast(pixels: Pixels, m: float) -> np.ndarray:
    """Away from a grey that the published code takes from the number of pixels, not from the image."""
    grey = min(255, pixels.image.width * pixels.image.height // 256)
    return alike(grey + np.float32(enhancement(m)) * (values - grey).astype(np.float32))


def color(image: Image.Image, m: float, rng: np.random.Generator) -> Image.Image:
    return image if enhancement(m) == 1 else ImageEnhance.Color(image).enhance(enhancement(m))


def sharpness(image: Image.Image, m: float, rng: np.random.Generator) -> Image.Image:
    return image if enhancement(m) == 1 else ImageEnhance.Sharpness(image).enhance(enhancement(m))


def cutout(image: Image.Image, m: float, rng: np.random.Generator) -> Image.Image:
    """A square of 2 x half pixels a side, cut at the image's borders, around any of its pixels."""
    half, changed = int(40 * m), image.copy()
    x, y = (int(rng.integers(side)) for side in image.size)
    box = (max(0, x - half), max(0, y - half), min(image.width, x + half), min(image.height, y + half))
    if half:
        changed.paste(FILL, box)
    return changed


def enhancement(m: float) -> float:
    """1 at a magnitude of 5, where it changes nothing."""
    return 1.8 * m + 0.1


TABLES: dict[str, Table] = {
    "autocontrast": autocontrast,
    "equalize": equalize,
    "invert": lambda pixels, m: alike(255 - values),
    "posterize": lambda pixels, m: alike(values & -(1 << (8 - min(8, int(4 * m))))),
    "solarize": lambda pixels, m: alike(np.where(values < int(256 * m), values, 255 - values)),
    "solarize_add": lambda pixels, m: alike(np.where(values < 128, values + int(110 * m), values)),
    "contrast": contrast,
    "brightness": lambda pixels, m: alike(np.float32(enhancement(m)) * values.astype(np.float32)),
}
MOVES: dict[str, Move] = {
    "rotate": rotate,
    "color": color,
    "sharpness": sharpness,
    "shear_x": lambda image, m, rng: affine(image, 1, either(0.3 * m, rng), 0, 0, 1, 0),
    "shear_y": lambda image, m, rng: affine(image, 1, 0, 0, either(0.3 * m, rng), 1, 0),
    "translate_x": lambda image, m, rng: affine(image, 1, 0, either(100 * m, rng), 0, 1, 0),
    "translate_y": lambda image, m, rng: affine(image, 1, 0, 0, 0, 1, either(100 * m, rng)),
    "cutout": cutout,
}
OPS = (*TABLES, *MOVES)
