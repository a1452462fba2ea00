"""A run copied elsewhere, file by file, each read back and held to the checksum of what was read.

TARGET/archive.json names the source from the first moment and, at the end, every file with its checksum. config.json comes
last: until then what is there is no run, and the same command goes on where it was killed.
"""

import concurrent.futures
import contextlib
import datetime
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from etils import epath

from configs.schema import ConfigError
from trainer.evaluate import read_config
from trainer.mirror import OWNER
from trainer.run_folder import kept_still
from trainer.saved import SavedSteps
from trainer.storage import StorageError, entries, few, folder_of, reason

MANIFEST, LAST = "archive.json", "config.json"
NOT_COPIED = ("lock", OWNER, MANIFEST)  # of who trains there, and of an archive that the source itself is
PIECE = 1 << 24  # bytes
COPIERS = 8  # files at a time
Progress = Callable[[Iterable[Any]], Iterable[Any]]


def archive_run(run: str, to: str, remove: bool, progress: Progress) -> str:
    """Copies a run that nobody trains to a folder that does not exist; with `remove`, the run goes once the copy is known to be
    the same. Returns what was done. Raises ConfigError, StorageError."""
    read_config(run)
    if remove and os.path.islink(folder_of(run)):
        raise ConfigError(f"{run} is a link: --remove needs the folder that it leads to")
    source, target = (it if "://" in str(it) else it.resolve() for it in (folder_of(run), folder_of(to)))
    if target == source or target in source.parents or source in target.parents:
        raise ConfigError(f"--to {to} and the run {run} are one in the other: give a folder elsewhere")
    with explained(f"{source} could not be copied to {target}"), kept_still(run):
        if remove:
            check_ended(run)
        claim(target, source, to)
        before = files_of(source)
        names = sorted(name for name in before if name != LAST)
        copiers = concurrent.futures.ThreadPoolExecutor(COPIERS)
        try:
            sums = list(progress(copiers.map(lambda name: copied(source / name, target / name), names)))
        finally:
            copiers.shutdown(cancel_futures=True)
        files = dict(zip(names, sums, strict=True))
        if files_of(source) != before:
            raise StorageError(f"{source} changed while it was copied: somebody is training in it; nothing was removed")
        files[LAST] = copied(source / LAST, target / LAST)
        check_whole(source, target, before)
        write_manifest(target, source, {name: [before[name][0], files[name]] for name in sorted(files)})
        if remove:
            os.sync()  # before anything goes, the copy is on its disk
            source.rmtree()
    total = sum(length for length, _ in before.values())
    done = f"{len(before)} files, {total / 2**20:,.1f} MiB, copied to {target} and read back: each has its checksum"
    return f"{done}; {source} {'is removed' if remove else 'is still there'}"


def check_ended(run: str) -> None:
    """Of a run on gs:// it may be unknown whether another machine trains it: that is no time to remove it. Raises StorageError."""
    from launch.run_state import UNKNOWN, read_state

    if read_state(run).state == UNKNOWN:
        raise StorageError(
            f"{run} has noted no end, and another machine may be training it: archive it without --remove, or remove it yourself"
        )


def claim(target: epath.Path, source: epath.Path, to: str) -> None:
    """Raises ConfigError where there is anything but what an earlier archive of this run has left."""
    there = entries(target) if target.exists() and target.is_dir() else []
    if there:
        said = {}
        with contextlib.suppress(OSError, ValueError):
            said = json.loads((target / MANIFEST).read_text())
        if said.get("source") != str(source) or said.get("files"):
            raise ConfigError(f"--to {to} exists already and holds {few([it.name for it in there])}: give a new folder")
    elif target.exists():
        raise ConfigError(f"--to {to} exists already: give a new folder")
    target.mkdir(parents=True, exist_ok=True)
    write_manifest(target, source, {})


def write_manifest(target: epath.Path, source: epath.Path, files: dict[str, list]) -> None:
    """`files`: bytes and sha256 by name; none until all are there."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    (target / MANIFEST).write_text(json.dumps({"source": str(source), "written": now, "files": files}, indent=1) + "\n")


def files_of(folder: epath.Path) -> dict[str, tuple[int, Any]]:
    """Of every file of a run by its name within it: bytes, and what changes when it is written again. Raises StorageError for
    what is no file, such as a link, which may lead anywhere."""
    if "://" in str(folder):
        import fsspec  # comes with gcsfs

        files, root = fsspec.core.url_to_fs(str(folder))
        files.invalidate_cache()
        found = {
            path[len(root.rstrip("/")) + 1 :]: (entry["size"], entry.get("generation") or str(entry.get("mtime")))
            for path, entry in files.find(root, detail=True).items()
        }
    else:  # not by epath, which leaves out what ends in ~
        found = {}
        for place, folders, names in os.walk(folder, onerror=raised):
            for path in (os.path.join(place, name) for name in folders + names):
                about = os.lstat(path)
                if stat.S_ISDIR(about.st_mode):
                    continue
                if not stat.S_ISREG(about.st_mode):
                    raise StorageError(f"{path} is a link or no file: put a file in its place first")
                found[os.path.relpath(path, folder)] = (about.st_size, about.st_mtime_ns)
    return {name: about for name, about in found.items() if name not in NOT_COPIED}


def raised(error: OSError) -> None:
    raise error


def copied(source: epath.Path, target: epath.Path) -> str:
    """sha256 of a file that is now in both places. Raises StorageError if the copy, read back, is something else."""
    wanted = hashlib.sha256()
    for piece in pieces(source):
        wanted.update(piece)
    if target.exists() and sum_of(target) == wanted.hexdigest():  # an earlier try came so far
        return wanted.hexdigest()
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as out:
        for piece in pieces(source):
            out.write(piece)
    if sum_of(target) != wanted.hexdigest():
        raise StorageError(f"{target}, read back, is not what {source} is: start the same command again")
    return wanted.hexdigest()


def pieces(file: epath.Path) -> Iterator[bytes]:
    with file.open("rb") as content:
        while piece := content.read(PIECE):
            yield piece


def sum_of(file: epath.Path) -> str:
    found = hashlib.sha256()
    for piece in pieces(file):
        found.update(piece)
    return found.hexdigest()


def check_whole(source: epath.Path, target: epath.Path, before: dict[str, tuple[int, Any]]) -> None:
    """The same names, the same lengths, the same saved steps. Raises StorageError."""
    there = {name: length for name, (length, _) in files_of(target).items()}
    wanted = {name: length for name, (length, _) in before.items()}
    unlike = sorted(name for name in there.keys() | wanted.keys() if there.get(name) != wanted.get(name))
    steps = [SavedSteps(folder / "checkpoints").steps() for folder in (source, target)]
    if unlike or steps[0] != steps[1]:
        raise StorageError(
            f"{target} is not what {source} is ({few(unlike) or 'its saved steps'}): nothing was removed"
        )


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    try:
        yield
    except (ConfigError, StorageError):
        raise
    except Exception as error:  # cloud storage has errors of its own
        raise StorageError(f"{what}: {reason(error)}; what is there so far is kept, the same command goes on") from None
