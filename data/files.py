"""Whole files, of this machine or of cloud storage."""

from pathlib import Path


def read_file(path: str) -> bytes:
    """Raises OSError, FileNotFoundError among them."""
    if "://" not in path:
        return Path(path).expanduser().read_bytes()
    import fsspec  # comes with gcsfs

    with fsspec.open(path, "rb") as file:
        return file.read()
