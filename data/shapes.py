"""What a batch is made of, before any data is opened: a plan for a cluster has no corpus."""

import numpy as np

from configs.schema import DataConfig, ImageData, RecallData

Field = tuple[tuple[int, ...], type]  # shape over all hosts, dtype


def batch_fields(config: DataConfig) -> dict[str, Field]:
    """Name, shape and dtype of everything in a batch of this kind of data, as its `read` returns it."""
    rows = config.batch_size
    if isinstance(config, ImageData):
        size = config.image_size
        return {
            "images": ((rows, size, size, config.channels), np.float32),
            "labels": ((rows,), np.int32),
            "weights": ((rows,), np.float32),
        }
    row = (rows, config.sequence_length)
    fields: dict[str, Field] = dict.fromkeys(("tokens", "targets", "segment_pos"), (row, np.int32))
    fields["weights"] = (row, np.float32)
    if not isinstance(config, RecallData):
        fields |= {"segment_ids": (row, np.int32), "target_bytes": ((rows,), np.int32)}
    return fields
