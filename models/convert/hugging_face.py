"""What the folders of all families have in common at Hugging Face: config.json, and a head beside the table."""

import json
import pathlib
from typing import Any

from models.convert.tensors import ConversionError, Tensor


def read_config(file: pathlib.Path) -> dict[str, Any]:
    """Raises ConversionError."""
    try:
        given = json.loads(file.read_text())
    except (OSError, ValueError):
        given = None
    if not isinstance(given, dict):
        raise ConversionError(f"{file} cannot be read: a Hugging Face checkpoint needs it, or give --config")
    return given


def without_head(source: str, tensors: dict[str, Tensor], table: str, family: str) -> dict[str, Tensor]:
    """Without lm_head, which some files store although it is the table. Raises ConversionError if it is another one."""
    head = tensors.get("lm_head.weight")
    if head is None or table not in tensors:
        return tensors
    same = head.shape == tensors[table].shape and all(
        (piece == tensors[table].read(first, end)).all() for first, end, piece in head.pieces()
    )
    if not same:
        raise ConversionError(f"{source}: lm_head.weight is not {table}, but {family} reads and writes with one table")
    return {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
