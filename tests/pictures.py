"""Made-up images, and tables of them, for the tests of what reads and changes images."""

import csv
import io

import numpy as np
from PIL import Image


def picture(number, height=48, width=40):
    """Smooth, and another for each number."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin((number + 1) * x / 17 + c) + np.cos(y / (9 + c) + number) for c in range(3)]
    return np.uint8(np.clip(127 + 60 * np.stack(waves, -1), 0, 255))


def encoded(image, kind="JPEG", **options):
    out = io.BytesIO()
    Image.fromarray(image).save(out, kind, **options)
    return out.getvalue()


def write_table(file, rows):
    with open(file, "w", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return file
