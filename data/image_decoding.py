"""Encoded images to pixels, and pixels to the size of a model: bicubic as TensorFlow and JAX resize, without antialiasing."""

import functools
import io

import numpy as np
from scipy.sparse import csr_array

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


@functools.lru_cache(maxsize=2048)
def cubic(old: int, new: int, channels: int = 1, flip: bool = False) -> csr_array:
    """Weights float32 (new C, old C) of Keys's cubic, a = -0.5, pixel centres at halves; neighbours outside count nothing and
    the others sum to 1. R. G. Keys, Cubic convolution interpolation for digital image processing, 1981."""
    place = ((np.arange(new) + 0.5) * old / new - 0.5)[:: -1 if flip else 1, None]
    index = np.floor(place).astype(np.int32) + np.arange(-1, 3, dtype=np.int32)  # of four neighbours
    x = np.abs(place - index)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where((index >= 0) & (index < old), np.where(x <= 1, near, far), 0)
    weights /= weights.sum(axis=1, keepdims=True)
    index = np.clip(index, 0, old - 1)[:, None] * np.int32(channels) + np.arange(channels, dtype=np.int32)[:, None]
    weights = np.broadcast_to(weights[:, None].astype(np.float32), index.shape)
    ends = np.arange(0, index.size + 1, 4, dtype=np.int32)
    return csr_array((weights.ravel(), index.ravel(), ends), shape=(new * channels, old * channels))


def resized(image: np.ndarray, height: int, width: int, flip: bool = False) -> np.ndarray:
    """(H W C), any type, to float32 (height width C), left and right exchanged on request. Values overshoot at edges."""
    rows, columns, channels = image.shape
    flat = image.astype(np.float32, order="C").reshape(rows, columns * channels)
    # A sparse matrix is fast over long rows, so that in the second product the columns are the rows, and are left so.
    low = cubic(rows, height) @ flat
    return (cubic(columns, width, channels, flip) @ low.T).T.reshape(height, width, channels)


def for_evaluation(image: np.ndarray, size: int) -> np.ndarray:
    """float32 (size size 3): both sides resized to size + MARGIN, whatever their proportion, and the centre cut out."""
    whole, start = resized(image, size + MARGIN, size + MARGIN), MARGIN // 2
    return whole[start : start + size, start : start + size]


def normalised(image: np.ndarray, out: np.ndarray | None = None, to: str = "imagenet") -> np.ndarray:
    """float32, same shape, of RGB values (H W 3) from 0 to 255; `to` as data.normalise."""
    scale, offset = per_row(image.shape[1], to)
    out = np.empty(image.shape, np.float32) if out is None else out
    rows = out.reshape(len(image), -1)  # a view: numpy is slow over an axis of three
    np.multiply(image.reshape(rows.shape), scale, out=rows, casting="same_kind")
    rows -= offset
    return out


@functools.lru_cache(maxsize=8)
def per_row(width: int, to: str) -> tuple[np.ndarray, np.ndarray]:
    if to == "centred":
        return np.full(3 * width, 2 / 255, np.float32), np.ones(3 * width, np.float32)
    return np.tile(1 / DEVIATION, width), np.tile(MEAN / DEVIATION, width)
