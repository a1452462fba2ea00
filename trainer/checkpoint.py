"""Saving: orbax writes in the background; each step carries a manifest, and only what this run wrote is ever deleted.

checkpoints/journal.json says of every step that a run began to save how far that came: "saving", "saved" or "deleting".
A folder that is no usable step and is in it as "saving" or "deleting" is what a killed process left; any other is somebody's.
"""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import NamedSharding

from configs.schema import CheckpointConfig
from models.params import named_leaves
from sharding import hosts
from trainer.checksums import Fingerprint, fingerprints
from trainer.saved import SavedSteps, array_entries
from trainer.storage import DamagedError, StorageError, entries, reason
from trainer.trees import to_tree

FORMAT = 1  # of the manifest
JOURNAL = "journal.json"
SET_ASIDE = "set-aside"
TEMPORARY = ".orbax-checkpoint-tmp"
PACKAGES = ("podwright", "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint")


class Checkpoints:
    """Saves steps below one folder, in the background; a save that failed is raised at the next call. One writer a folder."""

    def __init__(self, folder: epath.PathLike, config: CheckpointConfig):
        self.saved = SavedSteps(folder)
        self.folder = self.saved.folder
        # orbax narrates saves, and each part of one that fails; the cause itself is raised.
        for narrator in ("absl", "asyncio"):
            logging.getLogger(narrator).setLevel(logging.CRITICAL)
        with hosts.together(), self._explained("opened"):
            self.removed = self._remove_leftovers() if hosts.first() else []
        with self._explained("opened"):
            self.config, self.ours, self.retention = config, self._own_steps(), Retention()
            options = ocp.CheckpointManagerOptions(
                preservation_policy=self.retention, enable_async_checkpointing=True, save_root_metadata=False
            )
            # Trained numbers hardly compress, and compressing them takes longer than writing them.
            handlers = {
                "state": ocp.PyTreeCheckpointHandler(use_compression=False),
                "meta": ocp.JsonCheckpointHandler(),
            }
            self.manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> float:
        """Start saving; returns the seconds for which the caller was held up (copying from the devices, and the save before).

        Raises StorageError, also for an earlier save that failed in the background.
        """
        start = time.perf_counter()
        found = fingerprints(state)
        manifest = describe(step, named_leaves(state), found) | dict(meta)
        with self._explained("saved in the background"):
            self.manager.wait_until_finished()
        with self._explained(f"saved at step {step}"):
            self.ours[step] = manifest["finite"]
            self.retention.dropped = to_drop(self.ours, self.config)
            for old in self.retention.dropped:
                del self.ours[old]
            if hosts.first():
                if (self.folder / str(step)).exists():
                    self._set_aside(step)
                deleting = dict.fromkeys(map(str, self.retention.dropped), "deleting")
                self._write_journal(self._settled() | deleting | {str(step): "saving"})
            if step in self.manager.all_steps():
                hosts.meet()
                self.manager.reload()
            items = ocp.args.Composite(state=ocp.args.PyTreeSave(to_tree(state)), meta=ocp.args.JsonSave(manifest))
            if not self.manager.save(step, args=items, force=True):
                raise StorageError(f"{self.folder / str(step)} was not saved: orbax gives no reason")
        return time.perf_counter() - start

    def restore_newest(self, abstract_state: Any, say: Callable[[str], None]) -> tuple[Any, dict]:
        """State and manifest of the newest step that is what was saved. Newer ones that are damaged are told and set aside.
        Raises StorageError if there is none that can be used."""
        steps = self.saved.steps()
        damaged: list[int] = []
        for step in reversed(steps):
            try:
                state, manifest = self.saved.restore(step, abstract_state)
            except DamagedError as error:
                say(f"damaged: {error}")
                damaged.append(step)
                continue
            self.set_aside(damaged, say)
            if not array_entries(manifest):
                say(f"note: step {step} has no checksums: what was read is not known to be what was saved")
            return state, manifest
        raise StorageError(
            f"none of the {len(steps)} checkpoints of {self.folder} can be used: podwright checkpoint doctor "
            f"{self.folder.parent} says more"
        )

    def set_aside(self, steps: Sequence[int], say: Callable[[str], None]) -> None:
        """Out of the way, never deleted: they no longer count."""
        if not steps:
            return
        with hosts.together(), self._explained("put in order"):
            for step in steps:
                if hosts.first():
                    say(f"step {step} is set aside: {self._set_aside(step)}")
                self.ours.pop(step, None)
        self.manager.reload()

    def restore(self, step: int, abstract_state: Any) -> Any:
        """The state of a step. Raises StorageError."""
        return self.saved.restore(step, abstract_state)[0]

    def check(self) -> None:
        """Raise StorageError if a save in the background has failed."""
        with self._explained("saved in the background"):
            self.manager.check_for_errors()

    def finish(self) -> None:
        """Wait for the save under way and raise StorageError if it failed."""
        with self._explained("saved in the background"):
            self.manager.wait_until_finished()
            self.manager.check_for_errors()
            if hosts.first():
                self._write_journal(self._settled())

    def close(self) -> None:
        with contextlib.suppress(Exception):  # a failure worth telling has been raised by finish()
            self.manager.close()

    def _remove_leftovers(self) -> list[str]:
        """Names of what a killed save or deletion of ours left and is gone now."""
        removed = []
        journal = read_journal(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        for entry in entries(self.folder):
            step, _, rest = entry.name.partition(".")
            if journal.get(step) not in ("saving", "deleting"):
                continue
            if rest.startswith(TEMPORARY[1:]) or (not rest and not self.saved.counts(int(step))):
                entry.rmtree()
                removed.append(entry.name)
        self._write_journal(self._settled())
        return removed

    def _own_steps(self) -> dict[int, bool]:
        """Usable steps that a run of this folder wrote, and whether each is finite."""
        ours = {}
        for step in self.saved.steps():
            with contextlib.suppress(DamagedError):
                if read_journal(self.folder).get(str(step)):
                    ours[step] = bool(self.saved.manifest(step).get("finite", True))
        return ours

    def _settled(self) -> dict[str, str]:
        """The journal once no save is under way. (A deletion waits for a commit, which may never have come.)"""
        there = {str(step): self.saved.counts(step) for step in self.saved.found()}
        return {
            step: "saved" if there[step] else state
            for step, state in read_journal(self.folder).items()
            if step in there
        }

    def _write_journal(self, states: Mapping[str, str]) -> None:
        write_whole(self.folder / JOURNAL, json.dumps(states))

    def _set_aside(self, step: int) -> epath.Path:
        folder, number = self.folder / SET_ASIDE, 0
        folder.mkdir(parents=True, exist_ok=True)
        while (target := folder / (f"{step}-{number}" if number else str(step))).exists():
            number += 1
        (self.folder / str(step)).rename(target)
        return target

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except StorageError:
            raise
        except Exception as error:
            raise StorageError(f"{self.folder} could not be {what}: {reason(error)}") from error


def read_journal(folder: epath.Path) -> dict[str, str]:
    """How far each step that a run of this folder began to save has come."""
    file = folder / JOURNAL
    if not file.exists():
        return {}
    try:
        return dict(json.loads(file.read_text()))
    except ValueError:  # then nothing is known to be ours, and nothing is deleted
        return {}


class Retention:
    """What orbax asks before it deletes, once a newer step is committed."""

    def __init__(self) -> None:
        self.dropped: list[int] = []

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        return [info.step not in self.dropped for info in checkpoints]


def to_drop(ours: Mapping[int, bool], config: CheckpointConfig) -> list[int]:
    """Of a run's own steps, and whether each is finite: those that are neither among the newest, nor kept for good, nor the
    newest finite one."""
    steps, every = sorted(ours), config.keep_every
    keep = {*steps[-config.keep_last :], *[step for step in steps if ours[step]][-1:]}
    return [step for step in steps if step not in keep and not (every and step % every == 0)]


def describe(step: int, leaves: Mapping[str, Any], found: Mapping[str, Fingerprint]) -> dict[str, Any]:
    """The manifest of a step, but for what its caller knows of it; of arrays by their names on disk."""
    return {
        "format": FORMAT,
        "step": step,
        "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "mesh": mesh_of(leaves),
        "finite": all(it.finite for it in found.values()),
        "arrays": {
            name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype), **dataclasses.asdict(found[name])}
            for name, leaf in leaves.items()
        },
    }


def mesh_of(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of the mesh's axes, and whose devices they are."""
    shardings = [getattr(leaf, "sharding", None) for leaf in leaves.values()]
    axes = next((dict(it.mesh.shape) for it in shardings if isinstance(it, NamedSharding)), {})
    return {
        "axes": axes,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "kind": jax.devices()[0].device_kind,
    }


def versions() -> dict[str, str]:
    """Of the packages that decide what a step computes and how it is saved."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def write_whole(file: epath.Path, text: str) -> None:
    """Replace a small file in one step: a kill leaves the old or the new one. (Cloud storage replaces objects whole.)"""
    if "://" in str(file):
        file.write_text(text)
        return
    temporary = file.parent / f".{file.name}.partial"
    temporary.write_text(text)
    temporary.replace(file)
