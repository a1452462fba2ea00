"""Orbax folders an array at a time: to read parts of a checkpoint, and to write one that is larger than memory.

Orbax keeps the tree and how it is read back; the arrays are zarr arrays in one key-value store, by dotted names. It can
only save arrays that exist, so it saves a tree of placeholders, whose arrays are then replaced piece by piece.
"""

import contextlib
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from models.convert.tensors import PIECE, Tensor
from trainer.storage import StorageError, reason
from trainer.trees import to_tree

PLACEHOLDER = np.zeros((), np.float32)
DRIVERS = {".zarray": "zarr", "zarr.json": "zarr3"}  # by the file that describes an array


def read_arrays(folder: pathlib.Path) -> dict[str, Tensor]:
    """Every array of an orbax folder by its dotted name, opened but not read. Raises StorageError."""
    try:
        store, context = _store(folder), ts.Context()
        keys = [key.decode() for key in ts.KvStore.open(store, context=context).result().list().result()]
        names = {key.rpartition("/")[0]: key.rpartition("/")[2] for key in keys if key.endswith(tuple(DRIVERS))}
        opening = {
            name: ts.open(_spec(store, name, DRIVERS[file]), read=True, context=context) for name, file in names.items()
        }
        return {name: _opened(name, future.result()) for name, future in opening.items()}
    except Exception as error:
        raise StorageError(f"{folder} cannot be read as an orbax checkpoint: {reason(error)}") from error


def is_orbax(folder: pathlib.Path) -> bool:
    return any((folder / name).exists() for name in ("manifest.ocdbt", "_METADATA"))


def _store(folder: pathlib.Path) -> dict[str, Any]:
    if "://" in str(folder):
        bucket, _, path = str(folder).partition("://")[2].partition("/")
        files = {"driver": "gcs", "bucket": bucket, "path": f"{path}/"}
    else:
        files = {"driver": "file", "path": f"{folder.absolute()}/"}
    return {"driver": "ocdbt", "base": files} if (folder / "manifest.ocdbt").exists() else files


def _spec(store: dict[str, Any], name: str, driver: str) -> dict[str, Any]:
    return {"driver": driver, "kvstore": {**store, "path": f"{store.get('path', '')}{name}/"}}


def _opened(name: str, array: ts.TensorStore) -> Tensor:
    def read(first: int, end: int) -> np.ndarray:
        try:
            return np.asarray((array[first:end] if array.rank else array).read().result())
        except Exception as error:
            raise StorageError(f"array {name} cannot be read, the checkpoint is damaged: {reason(error)}") from error

    return Tensor(tuple(array.shape), np.dtype(array.dtype.numpy_dtype), read)


def placeholders(names: Iterable[str]) -> dict[str, Any]:
    """What orbax is given to save in the place of arrays: a scalar for each slash-joined name."""
    return to_tree(dict.fromkeys(names, PLACEHOLDER))


def write_tree(folder: pathlib.Path, arrays: Mapping[str, Tensor], flat: bool = False) -> None:
    """A new orbax folder of nested dicts, by slash-joined names. Raises StorageError.

    `flat`: of one dict, whose keys are the names up to their last slash, of dicts with what follows it.
    """
    keys = {name: tuple(name.rsplit("/", 1) if flat else name.split("/")) for name in arrays}
    tree: dict[str, Any] = {}
    for *folders, leaf in keys.values():
        node = tree
        for folder_name in folders:
            node = node.setdefault(folder_name, {})
        node[leaf] = PLACEHOLDER
    with _explained(folder), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute(), tree)
    fill(folder, {".".join(keys[name]): tensor for name, tensor in arrays.items()})


def fill(folder: pathlib.Path, arrays: Mapping[str, Tensor]) -> None:
    """Replace the placeholders of an orbax folder by arrays, by dotted names, a piece of each in memory.

    Raises StorageError.
    """
    metadata = json.loads((folder / "_METADATA").read_text())
    assert metadata["use_ocdbt"]
    assert not metadata["use_zarr3"]
    store, context = _store(folder), ts.Context()  # one context: writers that don't share it fight for the store's root
    batch: dict[str, Tensor] = {}  # small arrays are written together, since each commit waits for the disk
    held = 0
    for name, tensor in arrays.items():
        size = int(np.prod(tensor.shape)) * tensor.dtype.itemsize
        if held + size > PIECE:
            _write_together(folder, store, context, batch)
            batch, held = {}, 0
        if size <= PIECE:
            batch[name], held = tensor, held + size
            continue
        with _explained(folder):
            array = _created(store, context, name, tensor).result()
        for first, end, piece in tensor.pieces():
            with _explained(folder):
                array[first:end].write(piece).result()
    _write_together(folder, store, context, batch)


def _write_together(
    folder: pathlib.Path, store: dict[str, Any], context: ts.Context, batch: Mapping[str, Tensor]
) -> None:
    values = [tensor.whole() for tensor in batch.values()]
    with _explained(folder):
        opening = [_created(store, context, name, tensor) for name, tensor in batch.items()]
        arrays = [future.result() for future in opening]
        writing = [array.write(value) for array, value in zip(arrays, values, strict=True)]
        for future in writing:
            future.result()


def _created(store: dict[str, Any], context: ts.Context, name: str, tensor: Tensor) -> ts.Future:
    # A piece is a whole chunk: none is read back to be completed, and hosts later read only the layers they need.
    chunk = (tensor.rows_a_piece(), *tensor.shape[1:])[: len(tensor.shape)]
    return ts.open(
        {**_spec(store, name, "zarr"), "metadata": {"compressor": {"id": "zstd", "level": 1}}},
        create=True,
        delete_existing=True,
        dtype=ts.dtype(tensor.dtype),
        shape=tensor.shape,
        chunk_layout=ts.ChunkLayout(chunk_shape=chunk),
        context=context,
    )


@contextlib.contextmanager
def _explained(folder: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise StorageError(f"{folder} could not be written: {reason(error)}") from error
