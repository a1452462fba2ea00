"""Which documents a text corpus has: files under a folder, hashed, split by path, every skipped one accounted for."""

import hashlib
import json
import os
import stat
import sysconfig
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from configs.schema import TextData
from data.dataset import DataError, count_reasons, is_held_out

# Not the library's own text: installed packages, tests (large, repetitive) and compiled files.
STDLIB_WITHOUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


@dataclass(frozen=True)
class Document:
    path: str  # relative to the corpus folder, with /
    text: str
    sha256: str  # of the file's bytes
    bytes: int
    held_out: bool


@dataclass(frozen=True)
class Corpus:
    name: str  # "stdlib" or the folder as the config has it
    folder: Path
    documents: list[Document]  # by path
    skipped: list[tuple[str, str]]  # (path, reason), by path

    def split(self, held_out: bool) -> list[Document]:
        return [d for d in self.documents if d.held_out == held_out]

    def training_hash(self) -> str:
        """sha256 over paths and contents of the training documents: what a tokenizer trained on them depends on."""
        listed = [(d.path, d.sha256) for d in self.split(held_out=False)]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def open_corpus(config: TextData) -> Corpus:
    """Reads every document into memory. Raises DataError when there is no training or no held-out document."""
    stdlib = config.corpus == "stdlib"
    folder = Path(sysconfig.get_path("stdlib") if stdlib else config.corpus).expanduser()
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise DataError(f"corpus folder {folder} {what}: give data.corpus a folder of text files, or 'stdlib'")
    skipped: list[tuple[str, str]] = []
    documents = []
    for path in matching_files(folder, config.pattern, STDLIB_WITHOUT if stdlib else frozenset(), skipped):
        content, reason = read_text(folder / path)
        if reason:
            skipped.append((path, reason))
        else:
            sha256 = hashlib.sha256(content).hexdigest()
            held_out = is_held_out(path, config.held_out)
            documents.append(Document(path, content.decode(), sha256, len(content), held_out))
    corpus = Corpus(config.corpus, folder, documents, sorted(skipped))
    check_splits(corpus, config)
    return corpus


def check_splits(corpus: Corpus, config: TextData) -> None:
    train, held_out = len(corpus.split(False)), len(corpus.split(True))
    if not corpus.documents:
        found = f"no usable document: skipped {count_reasons(corpus.skipped)}" if corpus.skipped else "no file"
        raise DataError(f"folder {corpus.folder} with pattern {config.pattern} has {found}")
    if not train or not held_out:
        missing = "training" if not train else "held-out"
        skipped = f" and skipped {count_reasons(corpus.skipped)}" if corpus.skipped else ""
        raise DataError(
            f"folder {corpus.folder} with pattern {config.pattern} has {train + held_out} usable documents{skipped}, but "
            f"data.held_out={config.held_out:g} leaves no {missing} one: change held_out or add documents"
        )


def matching_files(folder: Path, pattern: str, without: frozenset[str], skipped: list[tuple[str, str]]) -> list[str]:
    """Relative paths, with / and sorted, of everything under `folder` that matches, folders aside.

    Linked folders are not entered (they may lead in circles); they and unreadable ones are added to `skipped`.
    """
    parts = tuple(pattern.split("/"))
    found = []

    def unreadable(error: OSError) -> None:
        skipped.append((relative(error.filename), "unreadable"))

    def relative(path: str) -> str:
        return Path(path).relative_to(folder).as_posix()

    for parent, folders, files in os.walk(folder, onerror=unreadable):
        folders[:] = [name for name in folders if name not in without]
        for name in folders:
            if os.path.islink(os.path.join(parent, name)):
                skipped.append((relative(os.path.join(parent, name)), "linked folder"))
        paths = (relative(os.path.join(parent, name)) for name in files)
        found += [path for path in paths if matches(tuple(path.split("/")), parts)]
    return sorted(found)


def matches(path: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """A glob over path parts, as pathlib's: ** is any number of folders. (pathlib's own would walk all of a big
    site-packages before we could leave it out, and its match() has no ** before Python 3.13.)"""
    if not pattern:
        return not path
    if pattern[0] == "**":
        rest = pattern[1:] or ("*",)
        return any(matches(path[i:], rest) for i in range(len(path)))
    return bool(path) and fnmatchcase(path[0], pattern[0]) and matches(path[1:], pattern[1:])


def read_text(path: Path) -> tuple[bytes, str]:
    """(content, "") of a usable file, or (b"", why it is not usable)."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return b"", "not a regular file"  # a pipe would block for ever
        content = path.read_bytes()
        content.decode()
    except OSError:
        return b"", "unreadable"
    except UnicodeDecodeError:
        return b"", "not UTF-8"
    return (content, "") if content else (b"", "empty")
