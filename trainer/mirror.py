"""The small files of a run that lives on cloud storage: written on this machine, and copied there at every save.

Objects cannot be appended to, so a run's log and metrics grow here and are copied whole. Checkpoints go there directly.
"""

import concurrent.futures
import hashlib
import json
import pathlib
import uuid

from etils import epath

from trainer.storage import StorageError, entries, few, reason

OWNER = "owner.json"  # whose run this is now: the newest process to start, as a preempted one can't give it back
HERE = ("lock", "checkpoints")  # what is not copied


class Mirror:
    """A folder of this machine for a run at `address`."""

    def __init__(self, address: str) -> None:
        self.address = epath.Path(address)
        self.path = mirror_folder(address)
        self.identity = uuid.uuid4().hex
        self._copied: dict[pathlib.Path, tuple[int, int]] = {}
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._copying: concurrent.futures.Future | None = None

    def fetch(self) -> None:
        """Bring here what is there, once the folder here is locked. What is there counts, unless what is here goes on from it:
        this machine's own run, that was killed between copies. Raises StorageError, also for a folder of something else."""
        try:
            found = {entry.name: entry for entry in entries(self.address) if entry.name != OWNER}
            if found and "config.json" not in found:
                raise StorageError(
                    f"{self.address} is not a podwright run (no config.json) and holds {few(sorted(found))}: give an empty or "
                    f"a new folder"
                )
            there = {
                name: entry.read_bytes() for name, entry in found.items() if name not in HERE and not entry.is_dir()
            }
        except StorageError:
            raise
        except Exception as error:
            raise StorageError(f"{self.address} cannot be read: {reason(error)}") from error
        for file in self.path.iterdir():
            if file.is_file() and file.name not in there and file.name not in HERE:
                file.unlink()
        for name, content in there.items():
            file = self.path / name
            if not (file.exists() and file.read_bytes().startswith(content)):
                file.write_bytes(content)

    def claim(self) -> None:
        """Whoever owned the run before finds out when it next copies. Raises StorageError."""
        try:
            (self.address / OWNER).write_text(json.dumps({"process": self.identity}))
        except Exception as error:
            raise StorageError(f"{self.address} cannot be written: {reason(error)}") from error

    def push(self, wait: bool = False) -> None:
        """Copy what changed, in the background; the failure of an earlier copy is raised here. Raises StorageError."""
        try:
            if self._copying is not None:
                self._copying.result()
            self._copying = self._thread.submit(self._copy)
            if wait:
                self._copying.result()
        except StorageError:
            raise
        except Exception as error:
            raise StorageError(f"{self.address} could not be written: {reason(error)}") from error

    def _copy(self) -> None:
        now = json.loads((self.address / OWNER).read_text())["process"]
        if now != self.identity:
            raise StorageError(
                f"another process has taken over {self.address}: this one stops, its newer steps are not kept"
            )
        for file in sorted(self.path.rglob("*")):
            inside = file.relative_to(self.path)
            if not file.is_file() or inside.parts[0] in HERE or file.name.endswith(".partial"):
                continue
            known = (file.stat().st_mtime_ns, file.stat().st_size)
            if self._copied.get(file) != known:
                self.address.joinpath(*inside.parts).write_bytes(file.read_bytes())
                self._copied[file] = known

    def close(self) -> None:
        self._thread.shutdown()


def mirror_folder(address: str) -> pathlib.Path:
    """Where this machine keeps the small files of the run at `address`, if it has trained it."""
    name = f"{epath.Path(address).name}-{hashlib.sha256(address.encode()).hexdigest()[:12]}"
    return pathlib.Path("~/.cache/podwright/runs").expanduser() / name
