"""Where examples come from. A source is one file and one line in SOURCES."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from configs.schema import (
    BiographyData,
    ChatData,
    CVData,
    DataConfig,
    ImageData,
    LongRangeData,
    PreparedData,
    RecallData,
    TextData,
)
from data.biographies import open_biographies
from data.chat import open_chat
from data.dataset import Batch, DataError, Dataset
from data.images import open_images
from data.long_range import open_long_range
from data.planted import open_planted
from data.prepared import open_prepared
from data.recall import open_recall
from data.text import open_text

SOURCES: dict[str, Callable[[Any], Dataset]] = {
    TextData.kind: open_text,
    PreparedData.kind: open_prepared,
    ChatData.kind: open_chat,
    CVData.kind: open_planted,
    RecallData.kind: open_recall,
    LongRangeData.kind: open_long_range,
    BiographyData.kind: open_biographies,
    ImageData.kind: open_images,
}


def open_data(config: DataConfig, rows: np.ndarray | None = None) -> Dataset:
    """The data of a run as a host sees it that reads these rows of every batch (None: all). Raises DataError when there is
    nothing usable."""
    return dataclasses.replace(SOURCES[config.kind](config), rows=rows)


__all__ = ["SOURCES", "Batch", "DataError", "Dataset", "open_data"]
