"""Checkpoints: orbax writes them in the background; names on disk are ours, so no framework outlives its use there."""

import contextlib
import logging
import pathlib
import re
import time
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from configs.schema import CheckpointConfig
from models.params import path_name


class StorageError(RuntimeError):
    """Reading or writing a run's files failed; the sentence says which, why and what is still safe."""


class Checkpoints:
    """The committed steps below one folder. Saves run in the background; a failed one is raised at the next call."""

    def __init__(self, folder: pathlib.Path, config: CheckpointConfig):
        self.folder = folder
        # orbax narrates saves, and each part of one that fails; the cause itself is raised.
        for narrator in ("absl", "asyncio"):
            logging.getLogger(narrator).setLevel(logging.CRITICAL)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.keep_last,
            keep_period=config.keep_every or None,
            enable_async_checkpointing=True,
        )
        with self._explained("opened"):
            self.manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def latest(self) -> int | None:
        """Newest committed step, or None."""
        return self.manager.latest_step()

    def save(self, step: int, state: Any, meta: dict) -> float:
        """Start saving; returns the seconds for which the caller was held up (copying from the devices)."""
        start = time.perf_counter()
        with self._explained(f"saved at step {step}"):
            self.manager.save(
                step, args=ocp.args.Composite(state=ocp.args.StandardSave(to_tree(state)), meta=ocp.args.JsonSave(meta))
            )
        return time.perf_counter() - start

    def restore(self, step: int, abstract_state: Any) -> tuple[Any, dict]:
        """The state of a committed step, laid out as `abstract_state` says, and its meta."""
        with self._explained(f"restored from step {step}"):
            saved = self.manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(to_tree(abstract_state)), meta=ocp.args.JsonRestore()
                ),
            )
        return from_tree(abstract_state, saved["state"]), saved["meta"]

    def restore_part(self, step: int, part: str, abstract: Any) -> Any:
        """One field of the state of a committed step, laid out as `abstract` says; nothing else is read."""
        tree = {part: to_tree(abstract)}
        with self._explained(f"restored from step {step}"), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            layout = ocp.checkpoint_utils.construct_restore_args(tree)
            how = ocp.args.PyTreeRestore(item=tree, restore_args=layout, partial_restore=True)
            saved = reader.restore((self.folder / str(step) / "state").absolute(), args=how)
        return from_tree(abstract, saved[part])

    def drop(self, step: int) -> None:
        """Delete a committed step."""
        with self._explained(f"rid of step {step}"):
            self.manager.delete(step)

    def check(self) -> None:
        """Raise StorageError if a save in the background has failed."""
        with self._explained("saved in the background"):
            self.manager.check_for_errors()

    def finish(self) -> None:
        """Wait for the save under way and raise StorageError if it failed."""
        with self._explained("saved in the background"):
            self.manager.wait_until_finished()
            self.manager.check_for_errors()

    def close(self) -> None:
        with contextlib.suppress(Exception):  # a failure worth telling has been raised by finish()
            self.manager.close()

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise StorageError(f"{self.folder} could not be {what}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """First line of the innermost cause: what the file system said, not what each layer above made of it."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if system := re.search(r"([^:]+) \[os_error_code=", str(error)):  # tensorstore's way to quote the operating system
        return system[1].strip()
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def concrete(abstract: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Shapes with shardings on the abstract mesh of the same axes -> the same on these devices (or on none)."""

    def place(leaf):
        spec = leaf.sharding.spec if leaf.sharding is not None else PartitionSpec()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, abstract)


def to_tree(state: Any) -> dict:
    """Nested dicts by our names (model/layers/groups/rec_0/...), for any pytree of a run."""
    tree: dict = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        *folders, last = path_name(path).split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = leaf
    return tree


def from_tree(like: Any, tree: dict) -> Any:
    """The inverse of `to_tree`: the structure of `like` with the leaves of `tree`."""
    paths, structure = jax.tree_util.tree_flatten_with_path(like)
    leaves = []
    for path, _ in paths:
        node = tree
        for part in path_name(path).split("/"):
            node = node[part]
        leaves.append(node)
    return jax.tree.unflatten(structure, leaves)
