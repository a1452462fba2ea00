"""What training changes in an image: a distorted crop, a flip, and RandAugment (arXiv 1909.13719) as 2102.06171 uses it."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from data.image_decoding import MARGIN, resized

AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)
COVER = 0.1  # of the image, at least
TRIES = 10
FILL = (128, 128, 128)

Op = Callable[[Image.Image, float, np.random.Generator], Image.Image]  # (RGB, magnitude / 10, random)


def crop_and_flip(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 (H W 3) to float32 (size size 3): a part of it, resized without regard to its proportion, flipped half the time."""
    top, left, height, width = distorted_box(image.shape[0], image.shape[1], size, rng)
    flip = rng.random() < 0.5
    cut = image[top : top + height, left : left + width]
    return resized(cut[:, ::-1] if flip else cut, size, size)


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
    """uint8 (H W 3), same shape: `layers` operations drawn evenly, each applied; magnitudes of the table in OPS."""
    picture = Image.fromarray(image)
    for choice in rng.integers(len(OPS), size=layers):
        picture = list(OPS.values())[choice](picture, magnitude / 10, rng)
    return np.asarray(picture)


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


def posterize(image: Image.Image, m: float, rng: np.random.Generator) -> Image.Image:
    bits = int(4 * m)
    return ImageOps.posterize(image, bits) if bits else Image.new("RGB", image.size)


def solarize_add(image: Image.Image, m: float, rng: np.random.Generator) -> Image.Image:
    """Values below 128 grow."""
    return image.point([min(255, value + int(110 * m)) if value < 128 else value for value in range(256)] * 3)


def contrast(image: Image.Image, m: float, rng: np.random.Generator) -> Image.Image:
    """Away from a grey that the published code takes from the number of pixels, not from the image."""
    grey = min(255, image.width * image.height // 256)
    return Image.blend(Image.new("RGB", image.size, (grey,) * 3), image, enhancement(m))


def cutout(image: Image.Image, m: float, rng: np.random.Generator) -> Image.Image:
    """A square of 2 x half pixels a side, cut at the image's borders, around any of its pixels."""
    half, changed = int(40 * m), image.copy()
    x, y = (int(rng.integers(side)) for side in image.size)
    box = (max(0, x - half), max(0, y - half), min(image.width, x + half), min(image.height, y + half))
    if half:
        changed.paste(FILL, box)
    return changed


def enhancement(m: float) -> float:
    return 1.8 * m + 0.1


OPS: dict[str, Op] = {
    "autocontrast": lambda image, m, rng: ImageOps.autocontrast(image),
    "equalize": lambda image, m, rng: ImageOps.equalize(image),
    "invert": lambda image, m, rng: ImageOps.invert(image),
    "rotate": rotate,
    "posterize": posterize,
    "solarize": lambda image, m, rng: ImageOps.solarize(image, int(256 * m)),
    "solarize_add": solarize_add,
    "color": lambda image, m, rng: ImageEnhance.Color(image).enhance(enhancement(m)),
    "contrast": contrast,
    "brightness": lambda image, m, rng: ImageEnhance.Brightness(image).enhance(enhancement(m)),
    "sharpness": lambda image, m, rng: ImageEnhance.Sharpness(image).enhance(enhancement(m)),
    "shear_x": lambda image, m, rng: affine(image, 1, either(0.3 * m, rng), 0, 0, 1, 0),
    "shear_y": lambda image, m, rng: affine(image, 1, 0, 0, either(0.3 * m, rng), 1, 0),
    "translate_x": lambda image, m, rng: affine(image, 1, 0, either(100 * m, rng), 0, 1, 0),
    "translate_y": lambda image, m, rng: affine(image, 1, 0, 0, 0, 1, either(100 * m, rng)),
    "cutout": cutout,
}
