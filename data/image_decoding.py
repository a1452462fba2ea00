"""Encoded images to pixels, and pixels to the size of a model: bicubic as TensorFlow and JAX resize, without antialiasing."""

import functools
import io

import numpy as np

from data.packages import needed

MEAN = np.array([0.485, 0.456, 0.406], np.float32) * 255  # of ImageNet, RGB
DEVIATION = np.array([0.229, 0.224, 0.225], np.float32) * 255
MOST_PIXELS = 2**27  # a file of a few bytes can claim more than a host's memory
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")  # of Pillow, with 8 bits a channel
MARGIN = 32  # pixels that evaluation resizes to beyond what it crops (arXiv 2102.06171)


class BadImage(Exception):
    """Why an image cannot be used, in a few words."""


def decoded(content: bytes) -> np.ndarray:
    """uint8 [H, W, 3], red, green and blue, of a JPEG, PNG or WebP by its content, not its name. Grey becomes colour, and
    transparency and the orientation that a camera noted are left out. Raises BadImage."""
    if content[:3] == b"\xff\xd8\xff":
        simplejpeg = needed("simplejpeg", "a JPEG")
        try:
            height, width, *_ = simplejpeg.decode_jpeg_header(content)
            if height * width <= MOST_PIXELS:
                return simplejpeg.decode_jpeg(content, "RGB")
        except ValueError:
            pass  # it also refuses what is merely unusual; Pillow tells that from what is damaged
    return decoded_by_pillow(content)


def decoded_by_pillow(content: bytes) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(content), formats=("JPEG", "PNG", "WEBP"))
    except UnidentifiedImageError:
        raise BadImage("no JPEG, PNG or WebP" if content else "empty") from None
    except Image.DecompressionBombError:
        raise BadImage("too large") from None
    except Exception:  # of a damaged header Pillow's parsers raise whatever comes
        raise BadImage("damaged or cut off") from None
    if image.width * image.height > MOST_PIXELS:
        raise BadImage("too large")
    if image.mode not in MODES:
        raise BadImage(f"an image of {image.mode} pixels")
    try:
        if image.format == "PNG":  # whose checksums are not looked at while it is decoded
            image.verify()
            image = Image.open(io.BytesIO(content))
        return np.array(image.convert("RGB"))
    except Exception:
        raise BadImage("damaged or cut off") from None


@functools.lru_cache(maxsize=4096)
def cubic(old: int, new: int) -> np.ndarray:
    """Weights float32 (new, old) of Keys's cubic, a = -0.5, pixel centres at halves; neighbours outside count nothing and the
    others sum to 1. R. G. Keys, Cubic convolution interpolation for digital image processing, 1981."""
    place = (np.arange(new) + 0.5) * old / new - 0.5
    x = np.abs(place[:, None] - np.arange(old)[None])
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x <= 1, near, np.where(x < 2, far, 0.0))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


@functools.lru_cache(maxsize=4096)
def taps(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """The four neighbours of each new pixel, int64 (4 new), and their weights in `cubic`, float32 (4 new)."""
    first = np.floor((np.arange(new) + 0.5) * old / new - 0.5).astype(np.int64) - 1
    index = first + np.arange(4)[:, None]
    inside = (index >= 0) & (index < old)
    index = np.clip(index, 0, old - 1)
    return index, np.where(inside, cubic(old, new)[np.arange(new), index], 0).astype(np.float32)


def resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H W C), any type, to float32 (height width C). Values overshoot at edges."""
    return along(along(image, height, 0), width, 1)


def along(image: np.ndarray, new: int, axis: int) -> np.ndarray:
    """One axis of (H W C) resized, float32."""
    indices, weights = taps(image.shape[axis], new)
    shape = (new, 1, 1) if axis == 0 else (new, 1)
    total = image.take(indices[0], axis) * weights[0].reshape(shape)
    term = np.empty_like(total)
    for index, weight in zip(indices[1:], weights[1:], strict=True):
        total += np.multiply(image.take(index, axis), weight.reshape(shape), out=term)
    return total


def for_evaluation(image: np.ndarray, size: int) -> np.ndarray:
    """float32 (size size 3): both sides resized to size + MARGIN, whatever their proportion, and the centre cut out."""
    whole, start = resized(image, size + MARGIN, size + MARGIN), MARGIN // 2
    return whole[start : start + size, start : start + size]


def normalised(image: np.ndarray) -> np.ndarray:
    """float32, same shape, of RGB values from 0 to 255."""
    return image * (1 / DEVIATION) - MEAN / DEVIATION
