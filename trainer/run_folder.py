"""A run's folder: who may write to it, which config and data it was started with, and what it logged.

config.json          the resolved config          metrics.jsonl   one record a step, evaluation or save
data_manifest.json   what the data was            log.txt         what was printed
checkpoints/STEP/    committed states             tensorboard/    curves
"""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator

from etils import epath

from configs.compare import Difference, differences
from configs.schema import Config, ConfigError
from configs.store import from_json, to_json
from data.dataset import DataError
from trainer.mirror import Mirror, mirror_folder
from trainer.saved import SavedSteps
from trainer.storage import StorageError, folder_of, reason

REFUSED = ("data", "checkpoint", "result")  # a change with one of these effects breaks the promise of an exact resume


class RunFolder:
    """Claims `path` for this process. Raises StorageError if it can't be used, ConfigError if it belongs to another config.

    Of several hosts one is its `owner`; the others leave the folder alone.
    """

    def __init__(self, path: str | pathlib.Path, config: Config, allow: Iterable[str] = (), owner: bool = True):
        if "://" in str(path) and not str(path).startswith("gs://"):
            raise ConfigError(f"--run {path} is neither a folder of this machine nor one of gs://")
        self.mirror = Mirror(str(path)) if "://" in str(path) else None
        self.path = self.mirror.path if self.mirror else pathlib.Path(path).expanduser()
        self.address = self.mirror.address if self.mirror else self.path
        self.checkpoints = epath.Path(self.address) / "checkpoints"
        self.config_file = self.path / "config.json"
        self.config_hash = hashlib.sha256(to_json(config).encode()).hexdigest()
        self.changes: list[Difference] = []
        self.owner = owner
        if not owner:
            return
        try:
            if self.path.exists() and not self.path.is_dir():
                raise ConfigError(f"--run {self.path} is a file: give a folder")
            if not self.mirror and self.path.is_dir() and not self.config_file.exists():
                self._refuse_foreign()
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock()
            if self.mirror:
                self.mirror.fetch()
            self._match(config, frozenset(allow))
            if self.mirror:
                self.mirror.claim()
        except OSError as error:
            raise StorageError(f"run folder {self.path} cannot be written: {reason(error)}") from error

    def _refuse_foreign(self) -> None:
        ours = {"lock"}  # all that a run killed before its first write leaves behind
        found = sorted(entry.name for entry in self.path.iterdir() if entry.name not in ours)
        if found:
            names = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
            raise StorageError(
                f"{self.path} is not a podwright run (no config.json) and holds {names}: give an empty or a new folder"
            )

    def _lock(self) -> None:
        """One writer a folder; the operating system drops the lock when the process dies, however it dies."""
        self._lock_file = open(self.path / "lock", "a+")  # noqa: SIM115 (held open for the life of the run)
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock_file.seek(0)
            owner = self._lock_file.read().strip() or "another process"
            raise StorageError(f"{owner} is training in {self.path}: stop it first, or give another --run") from None
        self._lock_file.truncate(0)
        self._lock_file.write(f"process {os.getpid()} on {os.uname().nodename}")
        self._lock_file.flush()

    def _match(self, config: Config, allow: frozenset[str]) -> None:
        """Keep the config of a new run; hold one that has trained to its own, and an imported one to what fits its arrays."""
        if self.config_file.exists() and (self.has_trained() or self._saved_steps()):
            try:
                saved = from_json(self.config_file.read_text())
            except ConfigError as error:
                raise StorageError(f"{self.config_file} cannot be read back: {error}") from error
            self.changes = differences(saved, config)
            unfit = [d for d in self.changes if "checkpoint" in d.effects]
            held = set(REFUSED) if self.has_trained() else set()
            refused = [d for d in self.changes if set(d.effects) & held and d.path not in allow]
            if unfit:
                listed = "; ".join(str(d) for d in unfit)
                raise ConfigError(
                    f"{self.path} was started with another config and its checkpoints cannot fit: {listed}: give a new --run"
                )
            if refused:
                listed = "; ".join(str(d) for d in refused)
                names = ",".join(d.path for d in refused)
                raise ConfigError(
                    f"{self.path} was started with another config: {listed}: give a new --run, or resume with --allow {names}"
                )
        self.write("config.json", to_json(config))

    def has_trained(self) -> bool:
        """Whether there is anything to protect: a run that stopped before its first step may still change its mind."""
        metrics = self.path / "metrics.jsonl"
        return (metrics.exists() and metrics.stat().st_size > 0) or bool(self._saved_steps() - {"0"})

    def _saved_steps(self) -> set[str]:
        """Names below checkpoints/; step 0 alone is what `podwright import` leaves."""
        return {str(step) for step in SavedSteps(self.checkpoints).found()}

    def write(self, name: str, text: str) -> None:
        """Replace a small file in one step, so that a kill leaves the old or the new one, never half of it."""
        temporary = self.path / f".{name}.partial"
        temporary.write_text(text)
        os.replace(temporary, self.path / name)

    def check_data(self, manifest: dict, allowed: bool) -> None:
        """Keep the data manifest of a new run; refuse a resume on other data, naming what changed."""
        if not self.owner:
            return
        file = self.path / "data_manifest.json"
        if file.exists() and self.has_trained():
            saved = read_manifest(self.path)
            if saved["hash"] != manifest["hash"] and not allowed:
                raise DataError(
                    f"the data of {self.path} changed since it was started ({changed_entries(saved, manifest)}): "
                    f"bring the old data back, give a new --run, or resume with --allow data"
                )
        self.write("data_manifest.json", json.dumps(manifest, indent=1))

    def push(self, wait: bool = False) -> None:
        """Copy the files of a run on cloud storage there; earlier failures are raised. Raises StorageError."""
        if self.owner and self.mirror:
            self.mirror.push(wait)

    def close(self) -> None:
        if not self.owner:
            return
        if self.mirror:
            with contextlib.suppress(StorageError):  # what ended the run is told, not this
                self.mirror.push(wait=True)
            self.mirror.close()
        with contextlib.suppress(OSError):
            self._lock_file.truncate(0)
            self._lock_file.close()


def trained_by(run: str | pathlib.Path | epath.Path) -> str | None:
    """Who trains in a run now ("process 12 on pod-0"), None for nobody. Of a run on gs:// only processes of this machine are seen."""
    try:
        with open(lock_folder(run) / "lock") as lock:
            owner = lock.read().strip()
            if owner:  # what ended in order leaves none; a run that begins just now is not to find the lock taken
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return owner
    except OSError:  # no lock: nobody has ever trained in it here
        return None
    return None


@contextlib.contextmanager
def kept_still(run: str | pathlib.Path | epath.Path) -> Iterator[None]:
    """Nobody on this machine begins to train in a run meanwhile. Raises StorageError if somebody does already."""
    if owner := trained_by(run):
        raise StorageError(f"{owner} is training in {run}: stop it first")
    folder = lock_folder(run)
    if not folder.exists():  # of a run on gs:// that this machine has never trained
        yield
        return
    try:
        lock = open(folder / "lock", "a")  # noqa: SIM115 (held open for as long)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise StorageError(f"{folder / 'lock'} cannot be locked: {reason(error)}") from None
    with lock:
        yield


def lock_folder(run: str | pathlib.Path | epath.Path) -> pathlib.Path:
    return mirror_folder(str(run)) if "://" in str(run) else pathlib.Path(run).expanduser()


def changed_entries(saved: dict, now: dict) -> str:
    """In words, which files (or fields) of two data manifests differ."""
    before = {f["path"]: f["sha256"] for f in saved.get("files", [])}
    after = {f["path"]: f["sha256"] for f in now.get("files", [])}
    names = sorted(p for p in before.keys() | after.keys() if before.get(p) != after.get(p))
    if not names:
        names = sorted(
            k for k in saved.keys() | now.keys() if k not in ("hash", "files") and saved.get(k) != now.get(k)
        )
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def read_manifest(run: str | pathlib.Path) -> dict:
    """What the data of a run was. Raises StorageError if the run never got as far as its data."""
    file = folder_of(run) / "data_manifest.json"
    try:
        return json.loads(file.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise StorageError(f"{file} cannot be read: {reason(error)}") from None


def read_metrics(run: str | pathlib.Path, kind: str) -> dict[int, dict]:
    """Records of one kind ("train", "eval", "save") by step. A step repeated after a resume counts as last written; what a
    rollback undid doesn't count."""
    records: dict[int, dict] = {}
    with (folder_of(run) / "metrics.jsonl").open() as lines:
        for line in lines:
            with contextlib.suppress(json.JSONDecodeError):  # a kill can leave half a last line
                record = json.loads(line)
                if record.get("kind") == "rollback":
                    records = {step: kept for step, kept in records.items() if step <= record["step"]}
                if record.get("kind") == kind:
                    records[record["step"]] = record
    return records
