"""Safetensors: read a tensor at a time, written a piece at a time, in one file or several with an index."""

import json
import os
import pathlib
import struct
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from models.convert.tensors import ConversionError, Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FILE_BYTES = 5 * 10**9  # of one file, as Hugging Face cuts them
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}


def holds_safetensors(source: pathlib.Path) -> bool:
    return source.suffix == ".safetensors" or (source.is_dir() and any(source.glob("*.safetensors*")))


def read_safetensors(source: pathlib.Path) -> dict[str, Tensor]:
    """The tensors of a file, or of a folder with one file or an index. Raises ConversionError."""
    return {name: tensor for file in _files(source) for name, tensor in _read_file(file).items()}


def _files(source: pathlib.Path) -> list[pathlib.Path]:
    if source.is_file():
        return [source]
    index = source / INDEX
    if not index.exists():
        files = sorted(source.glob("*.safetensors"))
        if len(files) != 1:
            raise ConversionError(f"{source} has {len(files)} safetensors files and no {INDEX} that lists them")
        return files
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ConversionError(f"{index} is not an index of safetensors files") from None
    absent = [name for name in names if not (source / name).exists()]
    if absent:
        raise ConversionError(f"{index} lists {len(names)} files, of which {len(absent)} are not there: {absent[0]}")
    return [source / name for name in names]


def _read_file(file: pathlib.Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ConversionError(f"{file} needs the package safetensors: install podwright's extra `hf`") from None

    def tensor(name: str, shape: tuple[int, ...], dtype: np.dtype) -> Tensor:
        def read(first: int, end: int) -> np.ndarray:
            # The file is opened anew for each tensor: while it is open, all that was read of it counts as our memory.
            with safe_open(file, "numpy") as opened:
                return opened.get_slice(name)[first:end] if shape else opened.get_tensor(name)

        return Tensor(shape, dtype, read)

    found = {}
    try:
        with safe_open(file, "numpy") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no dict)
                part = opened.get_slice(name)
                if part.get_dtype() not in DTYPES:
                    raise ConversionError(
                        f"{file}: {name} is {part.get_dtype()}, {', '.join(DTYPES)} are what can be imported"
                    )
                found[name] = tensor(name, tuple(part.get_shape()), DTYPES[part.get_dtype()])
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"{file} cannot be read, it is cut short or no safetensors file: {error}") from None
    return found


def write_safetensors(folder: pathlib.Path, tensors: Mapping[str, Tensor], file_bytes: int = FILE_BYTES) -> None:
    """model.safetensors, or several files and their index where one would hold more than `file_bytes`."""
    files: list[list[str]] = [[]]
    size = total = 0
    for name, tensor in tensors.items():
        if files[-1] and size + _bytes(tensor) > file_bytes:
            files.append([])
            size = 0
        files[-1].append(name)
        size, total = size + _bytes(tensor), total + _bytes(tensor)
    if len(files) == 1:
        _write_file(folder / SINGLE, tensors)
        return
    weight_map: dict[str, str] = {}
    for i, names in enumerate(files, start=1):
        file = f"model-{i:05}-of-{len(files):05}.safetensors"
        _write_file(folder / file, {name: tensors[name] for name in names})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _bytes(tensor: Tensor) -> int:
    return int(np.prod(tensor.shape)) * tensor.dtype.itemsize


def _write_file(path: pathlib.Path, tensors: Mapping[str, Tensor]) -> None:
    """The format is a header of JSON behind its length, then the bytes; its own writer wants all tensors at once."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + _bytes(tensor)
        header[name] = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            for _, _, piece in tensor.pieces():
                file.write(np.ascontiguousarray(piece).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
