"""Saved steps of a run: which of them count, what they say of themselves, and reading them back.

checkpoints/STEP/state   the arrays (orbax)     checkpoints/STEP/commit_success.txt   orbax's mark of a finished save
checkpoints/STEP/meta    the manifest (JSON)    checkpoints/set-aside/STEP            damaged or superseded, never deleted
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from models.params import named_leaves
from sharding import hosts
from trainer.checksums import Fingerprint, fingerprints
from trainer.storage import DamagedError, StorageError, entries, everything_said, few, folder_of, reason
from trainer.trees import from_tree, to_tree

MARKER = "commit_success.txt"
MANIFEST = ("meta", "metadata")  # where orbax keeps a JSON item
RESTORE_GIB = 8  # of a checkpoint that a host holds on the way to its devices
NOT_DAMAGE = re.compile(
    "PERMISSION_DENIED|UNAVAILABLE|DEADLINE|UNAUTHENTICATED|RESOURCE_EXHAUSTED|Permission denied|Too many open files"
)


class SavedSteps:
    """The steps below one folder, on this machine or on cloud storage. Reads, and changes nothing."""

    def __init__(self, folder: epath.PathLike):
        path = folder_of(folder)
        self.folder = path if "://" in str(folder) else path.absolute()

    def steps(self) -> list[int]:
        """Those that count, ascending: committed by orbax, and with our manifest."""
        return [step for step in self.found() if self.counts(step)]

    def found(self) -> list[int]:
        """Every folder that is named like a step, ascending. Raises StorageError."""
        try:
            return sorted(int(entry.name) for entry in entries(self.folder) if entry.name.isdecimal())
        except Exception as error:
            raise StorageError(f"{self.folder} cannot be listed: {reason(error)}") from error

    def newest(self) -> int | None:
        return max(self.steps(), default=None)

    def counts(self, step: int) -> bool:
        folder = self.folder / str(step)
        try:
            return (folder / MARKER).exists() and folder.joinpath(*MANIFEST).exists()
        except Exception as error:
            raise StorageError(f"{folder} cannot be read: {reason(error)}") from error

    def manifest(self, step: int) -> dict[str, Any]:
        """What was written beside the arrays. Raises DamagedError, StorageError."""
        file = self.folder.joinpath(str(step), *MANIFEST)
        try:
            found = json.loads(file.read_text())
        except ValueError as error:
            raise DamagedError(f"{file} is not JSON: {reason(error)}") from error
        except Exception as error:
            raise StorageError(f"step {step} of {self.folder} cannot be read: {reason(error)}") from error
        if not isinstance(found, dict) or found.get("step") != step:
            raise DamagedError(f"{file} is not the manifest of step {step}")
        return found

    def restore(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        """The state of a step, laid out as `abstract_state` says, and its manifest. Every array is held to its checksum.

        Raises DamagedError, on every host if one of them finds damage, or StorageError."""
        manifest = self._agreed(step, lambda: self.manifest(step))
        state = self._read(step, to_tree(abstract_state), manifest, partial=False)
        return from_tree(abstract_state, state), manifest

    def restore_part(self, step: int, part: str, abstract: Any) -> Any:
        """One field of the state of a step, laid out as `abstract` says; nothing else is read. Raises as `restore`."""
        manifest = self._agreed(step, lambda: self.manifest(step))
        tree = self._read(step, {part: to_tree(abstract)}, manifest, partial=True)
        return from_tree(abstract, tree[part])

    def _read(self, step: int, tree: dict, manifest: dict[str, Any], partial: bool) -> dict:
        said = array_entries(manifest)
        check_shapes(self.folder / str(step), tree, said)

        def read() -> dict:
            # Hosts read their own shards and wait for nobody: one that fails must not leave the others at a barrier.
            alone = ocp.options.MultiprocessingOptions(
                primary_host=jax.process_index(),
                active_processes={jax.process_index()},
                barrier_sync_key_prefix=f"host-{jax.process_index()}",
            )
            held = max(RESTORE_GIB * 2**30, *map(shard_bytes, jax.tree.leaves(tree)))  # one shard at a time at least
            handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone, restore_concurrent_gb=held / 1e9)
            with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
                how = ocp.checkpoint_utils.construct_restore_args(tree)
                args = ocp.args.PyTreeRestore(item=tree, restore_args=how, partial_restore=partial)
                return reader.restore(self.folder / str(step) / "state", args=args)

        restored = self._agreed(step, read)
        wrong = differing(fingerprints(restored), said)
        if wrong:
            raise DamagedError(
                f"{self.folder / str(step)} is not what was saved: {few(wrong)} differs from its checksum"
            )
        return restored

    def _agreed(self, step: int, act: Any) -> Any:
        """What `act` returns; a failure on any host is everyone's. Raises DamagedError or StorageError."""
        failure, result = None, None
        try:
            result = act()
        except Exception as error:
            failure = error
        damaged = failure is not None and not NOT_DAMAGE.search(everything_said(failure))
        told = hosts.gathered(np.array(0 if failure is None else 1 if damaged else 2))
        if failure is None and not told.any():
            return result
        where = self.folder / str(step)
        if failure is None:
            kind = DamagedError if told.max() == 1 else StorageError
            raise kind(f"{where} could not be read by host {int(told.argmax())}, which says why")
        if isinstance(failure, StorageError):
            raise failure
        kind = DamagedError if told.max() == 1 else StorageError
        raise kind(f"{where} could not be read: {reason(failure)}") from failure


def shard_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    """Of what one device holds of an array."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def array_entries(manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What a manifest says of each array: shape, dtype, checksum, finite. Nothing, if it was written before there were any."""
    return manifest.get("arrays", {})


def check_shapes(where: epath.Path, tree: dict, said: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises StorageError unless the arrays wanted are those of the manifest, shape by shape."""
    wanted = {name: tuple(leaf.shape) for name, leaf in named_leaves(tree).items()}
    unfit = [
        f"{name} is {list(entry['shape']) if entry else 'missing'} there and {list(shape)} here"
        for name, shape in wanted.items()
        if (said and (entry := said.get(name)) is None) or (said and tuple(said[name]["shape"]) != shape)
    ]
    if unfit:
        raise StorageError(f"{where} does not fit this config: {few(unfit, '; ')}")


def differing(found: Mapping[str, Fingerprint], said: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Names of the arrays whose checksum is not the one that the manifest has of them."""
    return [name for name, it in found.items() if name in said and it.checksum != said[name]["checksum"]]
