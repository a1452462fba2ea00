"""Encoded images to pixels, and pixels to the size of a model: bicubic as TensorFlow and JAX resize, without antialiasing."""

import functools
import io

import numpy as np

from data.packages import needed

MEAN = np.array([0.485, 0.456, 0.406], np.float32) * 255  # of ImageNet, RGB
DEVIATION = np.array([0.229, 0.224, 0.225], np.float32) * 255
MARGIN = 32  # pixels that evaluation resizes to beyond what it crops (arXiv 2102.06171)


class BadImage(Exception):
    """Why an image cannot be used, in a few words."""


def decoded(content: bytes) -> np.ndarray:
    """uint8 (H W 3), RGB. Raises BadImage."""
    if content[:2] == b"\xff\xd8":
        try:
            return needed("simplejpeg", "a JPEG").decode_jpeg(content, colorspace="RGB")
        except ValueError:
            pass  # CMYK, which only Pillow turns into RGB, or damaged, which it finds, too
    image = needed("PIL.Image", "an image")
    try:
        with image.open(io.BytesIO(content)) as opened:
            return np.asarray(opened.convert("RGB"))
    except Exception as error:  # Pillow's decoders have each their own
        raise BadImage("cut off" if "truncated" in str(error) else "not a readable image") from None


@functools.lru_cache(maxsize=4096)
def cubic(old: int, new: int) -> np.ndarray:
    """Weights float32 (new, old) of Keys's cubic, a = -0.5, pixel centres at halves; neighbours outside count nothing and the
    others sum to 1. R. G. Keys, Cubic convolution interpolation for digital image processing, 1981."""
    place = (np.arange(new) + 0.5) * old / new - 0.5
    x = np.abs(place[:, None] - np.arange(old)[None])
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x <= 1, near, np.where(x < 2, far, 0.0))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H W C), any type, to float32 (height width C). Values overshoot at edges."""
    rows = np.tensordot(cubic(image.shape[0], height), image.astype(np.float32), axes=1)
    return np.einsum("vw,hwc->hvc", cubic(image.shape[1], width), rows, optimize=True)


def for_evaluation(image: np.ndarray, size: int) -> np.ndarray:
    """float32 (size size 3): both sides resized to size + MARGIN, whatever their proportion, and the centre cut out."""
    whole, start = resized(image, size + MARGIN, size + MARGIN), MARGIN // 2
    return whole[start : start + size, start : start + size]


def normalised(image: np.ndarray) -> np.ndarray:
    """float32, same shape, of RGB values from 0 to 255."""
    return (image.astype(np.float32) - MEAN) / DEVIATION
