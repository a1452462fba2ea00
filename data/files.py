"""Files and folders, of this machine or of cloud storage."""

import os
import posixpath
from collections.abc import Iterable
from pathlib import Path


def read_file(path: str) -> bytes:
    """Raises OSError, FileNotFoundError among them."""
    if "://" not in path:
        return Path(path).expanduser().read_bytes()
    import fsspec  # comes with gcsfs

    with fsspec.open(path, "rb") as file:
        return file.read()


def read_files(paths: list[str]) -> list[bytes | None]:
    """Files of cloud storage, many at a time; None for one that is not there. Raises OSError."""
    import fsspec

    files, _ = fsspec.core.url_to_fs(paths[0])
    found = files.cat(sorted({path.partition("://")[2] for path in paths}), on_error="return")
    for content in found.values():
        if isinstance(content, Exception) and not isinstance(content, FileNotFoundError):
            raise content
    contents = (found[path.partition("://")[2]] for path in paths)
    return [None if isinstance(content, Exception) else content for content in contents]


def files_below(folder: str, names: Iterable[str]) -> Iterable[bytes | None]:
    """Contents in order, None for what cannot be read: of this machine one after the other, of cloud storage many at a time."""
    paths = [f"{folder}/{name}" for name in names]
    if "://" not in folder:
        return map(content_of, paths)
    roots = [path.partition("://") for path in paths]  # cloud storage knows no ..
    return read_files([f"{scheme}://{posixpath.normpath(path)}" for scheme, _, path in roots])


def content_of(file: str) -> bytes | None:
    try:
        with open(file, "rb") as opened:
            return opened.read()
    except OSError:
        return None


def folder_sizes(folder: str) -> dict[str, int]:
    """Bytes of each file of a folder and of the folders in it, by path below it, without hidden ones. Of this machine also
    those folders themselves, as `NAME/`: cloud storage has no empty ones. Nothing, where there is no such folder."""
    if "://" in folder:
        import fsspec

        files, root = fsspec.core.url_to_fs(folder)
        found = files.find(root, detail=True)
        sizes = {path[len(root.rstrip("/")) + 1 :]: entry["size"] for path, entry in found.items()}
        return {path: size for path, size in sizes.items() if path.count("/") <= 1 and not path.startswith(".")}
    if not os.path.isdir(folder):
        return {}
    sizes = {}
    for entry in os.scandir(folder):
        if entry.is_dir() and not entry.name.startswith("."):
            inside = {f"{entry.name}/{one.name}": one.stat().st_size for one in os.scandir(entry.path) if one.is_file()}
            sizes |= {f"{entry.name}/": 0, **inside}
        elif entry.is_file():
            sizes[entry.name] = entry.stat().st_size
    return sizes
