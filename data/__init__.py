"""Where examples come from. A source is one file and one line in SOURCES."""

import dataclasses
from collections.abc import Callable
from typing import Any

from configs.schema import ChatData, DataConfig, ImageData, RecallData, TextData
from data.chat import open_chat
from data.dataset import Batch, DataError, Dataset
from data.images import open_images
from data.recall import open_recall
from data.text import open_text

SOURCES: dict[str, Callable[[Any], Dataset]] = {
    TextData.kind: open_text,
    ChatData.kind: open_chat,
    RecallData.kind: open_recall,
    ImageData.kind: open_images,
}


def open_data(config: DataConfig, process_index: int = 0, process_count: int = 1) -> Dataset:
    """The data of a run as host `process_index` of `process_count` sees it.

    Raises DataError when there is nothing usable, ConfigError when the batch does not divide among the hosts.
    """
    data = SOURCES[config.kind](config)
    return dataclasses.replace(data, process_index=process_index, process_count=process_count)


__all__ = ["SOURCES", "Batch", "DataError", "Dataset", "open_data"]
