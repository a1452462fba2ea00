"""What a batch is made of, before any data is opened: a plan for a cluster has no corpus."""

import numpy as np

from configs.schema import BiographyData, DataConfig, ImageData, LongRangeData, RecallData

Field = tuple[tuple[int, ...], type]  # shape over all hosts, dtype


def batch_fields(config: DataConfig, held_out: bool = False) -> dict[str, Field]:
    """Name, shape and dtype of everything in a batch of this kind of data, as the `read` of its split returns it."""
    rows = config.batch_size
    if isinstance(config, ImageData):
        size = config.pixels_held_out if held_out else config.image_size
        labels: Field = ((rows, len(config.labels)), np.float32) if config.labels else ((rows,), np.int32)
        mixed: dict[str, Field] = {"labels_b": labels, "mix": ((rows,), np.float32)}
        return {
            **(mixed if config.mixes and not held_out else {}),
            "images": ((rows, size, size, config.channels), np.float32),
            "labels": labels,
            "weights": ((rows,), np.float32),
        }
    row = (rows, config.sequence_length)
    fields: dict[str, Field] = dict.fromkeys(("tokens", "targets", "segment_pos"), (row, np.int32))
    fields["weights"] = (row, np.float32)
    if isinstance(config, BiographyData):
        return fields | ({"values": (row, np.int32), "group": ((rows,), np.int32)} if held_out else {})
    if isinstance(config, LongRangeData):
        fields["labels"] = ((rows,), np.int32)
        given = fields.pop("tokens")
        fields[config.inputs] = ((*row, config.channels), np.float32) if config.channels else given
    elif not isinstance(config, RecallData):
        fields |= {"segment_ids": (row, np.int32), "target_bytes": ((rows,), np.int32)}
    return fields
