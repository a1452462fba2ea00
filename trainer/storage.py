"""Where a run's files are, and what is wrong when they cannot be read or written, in words."""

import logging
import pathlib
import re

from etils import epath

# It prints a traceback, and then raises what we tell in a sentence.
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)


class StorageError(RuntimeError):
    """Reading or writing a run's files failed; the sentence says which, why and what is still safe."""


class DamagedError(StorageError):
    """A committed step is not what was saved."""


def reason(error: BaseException) -> str:
    """First line of the innermost cause: what the file system said, not what each layer above made of it."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if system := re.search(r"([^:]+) \[os_error_code=", str(error)):  # tensorstore's way to quote the operating system
        return system[1].strip()
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def everything_said(error: BaseException) -> str:
    """An exception's own words and those of what caused it."""
    words = []
    while error is not None:
        words.append(str(error))
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return "\n".join(words)


def few(names: list[str], separator: str = ", ") -> str:
    return separator.join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def folder_of(run: epath.PathLike) -> epath.Path:
    """A run's folder, on this machine or on cloud storage (gs://...)."""
    return epath.Path(run) if "://" in str(run) else epath.Path(pathlib.Path(run).expanduser())


def entries(folder: epath.Path) -> list[epath.Path]:
    """What is in a folder, by name; nothing if it does not exist. (On cloud storage an empty one doesn't.)"""
    try:
        return sorted(folder.iterdir(), key=lambda entry: entry.name)
    except FileNotFoundError:
        return []
