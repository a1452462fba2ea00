"""What saved steps are, without devices: sizes, whether they are whole and finite, how they differ, and adopting copies."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from configs.schema import Config, ConfigError, MeshConfig
from models.convert.tensors import Tensor
from sharding.mesh import abstract_mesh
from trainer.array_folder import read_arrays
from trainer.checkpoint import SET_ASIDE, TEMPORARY, describe, read_journal, write_whole
from trainer.checksums import fingerprint_of
from trainer.evaluate import read_config
from trainer.imported import abstract_arrays
from trainer.program import bytes_per_device, make_program
from trainer.run_folder import read_metrics
from trainer.saved import MANIFEST, MARKER, RESTORE_GIB, SavedSteps, array_entries
from trainer.storage import DamagedError, StorageError, entries, few, folder_of
from trainer.tasks import make_task

Progress = Callable[[Iterable[Any]], Iterable[Any]]
GIB = 2**30


@dataclass(frozen=True)
class Difference:
    """Of one array in two steps."""

    name: str
    shape: tuple[int, ...]
    size: int
    changed: int  # elements whose bits differ
    largest: float  # absolute difference
    relative: float  # norm of the difference, to the norm in the first


def losses(run: str) -> dict[int, float]:
    """Of each logged step; none, if nothing was logged."""
    with contextlib.suppress(OSError):
        return {step: record["loss"] for step, record in read_metrics(run, "train").items() if "loss" in record}
    return {}


def describe_step(saved: SavedSteps, step: int) -> tuple[str, str, str, str]:
    """Size, mesh it was saved on, when, and whether it is finite: in words."""
    try:
        manifest = saved.manifest(step)
    except DamagedError:
        return "?", "?", "?", "its manifest is damaged"
    entries = array_entries(manifest)
    if not entries:
        return "?", "?", "?", "not known"
    size = stored_bytes(saved, step)
    mesh, infinite = manifest["mesh"], [name for name, it in entries.items() if not it["finite"]]
    return in_gib(size), on_mesh(mesh["axes"], mesh["processes"]), manifest["written"], few(infinite) or "yes"


def stored_bytes(saved: SavedSteps, step: int) -> int:
    """Of the arrays of a step; 0 where its manifest doesn't tell. Raises StorageError."""
    try:
        entries = array_entries(saved.manifest(step))
    except DamagedError:
        return 0
    return sum(int(np.prod(it["shape"])) * np.dtype(it["dtype"]).itemsize for it in entries.values())


def on_mesh(axes: Mapping[str, int], hosts: int) -> str:
    sizes = " x ".join(f"{axis} {size}" for axis, size in axes.items() if size > 1) or "1 device"
    return sizes + (f" ({hosts} hosts)" if hosts > 1 else "")


def in_gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.2f} MiB"


def fit_on(config: Config, axes: Mapping[str, int], hosts: int) -> str:
    """Whether the steps of a run load on a mesh, and what that takes of a host."""
    devices = int(np.prod(list(axes.values())))
    where = on_mesh(axes, hosts)
    if devices % hosts:
        raise ConfigError(f"--hosts {hosts} don't divide the {devices} devices of the mesh: give a divisor")
    try:
        config = dataclasses.replace(config, mesh=MeshConfig(**axes))
        mesh = abstract_mesh(config.mesh, devices)
        with jax.sharding.use_abstract_mesh(mesh):
            held = bytes_per_device(make_program(config, make_task(config), mesh).state)
    except (ConfigError, ValueError) as error:
        return f"{where}: they do not load ({error})"
    host = held * devices // hosts
    return (
        f"{where}: they load, {in_gib(held)} a device; a host reads at most {in_gib(host)} and holds at most "
        f"{in_gib(min(host, RESTORE_GIB * GIB))} of it on the way"
    )


def opened(saved: SavedSteps, step: int) -> dict[str, Tensor]:
    """Arrays of a step by our slash-joined names, opened but not read. Raises StorageError."""
    return {name.replace(".", "/"): it for name, it in read_arrays(saved.folder / str(step) / "state").items()}


def wrong_with(saved: SavedSteps, step: int, progress: Progress) -> list[str]:
    """What an array of a step is not: there, as it was saved, finite. A sentence each."""
    try:
        said = array_entries(saved.manifest(step))
        arrays = opened(saved, step)
    except StorageError as error:
        return [str(error)]
    if not said:
        return ["its manifest has no checksums: it was written by an older podwright"]
    wrong = [f"{name} is not there" for name in said if name not in arrays]
    for name in progress([name for name in said if name in arrays]):
        try:
            found = fingerprint_of(arrays[name])
        except StorageError as error:
            wrong.append(str(error))
            continue
        if found.checksum != said[name]["checksum"]:
            wrong.append(f"{name} differs from its checksum")
        elif not found.finite:
            wrong.append(f"{name} is not finite")
    return wrong


def compare(
    first: SavedSteps, step: int, second: SavedSteps, other: int, progress: Progress
) -> Iterator[Difference | str]:
    """Array by array; a sentence where only one has it or the shapes differ."""
    ours, theirs = opened(first, step), opened(second, other)
    for name in progress(sorted(ours.keys() | theirs.keys())):
        if name not in ours or name not in theirs:
            yield f"{name} is only in step {step if name in ours else other}"
        elif ours[name].shape != theirs[name].shape or ours[name].dtype != theirs[name].dtype:
            yield f"{name} is {described(ours[name])} in step {step}, {described(theirs[name])} in step {other}"
        else:
            yield difference(name, ours[name], theirs[name])


def described(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def difference(name: str, ours: Tensor, theirs: Tensor) -> Difference:
    """A piece at a time, in float64."""
    changed, largest, square, norm = 0, 0.0, 0.0, 0.0
    for first, end, mine in ours.pieces():
        other = theirs.read(first, end)
        bits = f"u{mine.dtype.itemsize}"
        changed += int(np.count_nonzero(np.atleast_1d(mine).view(bits) != np.atleast_1d(other).view(bits)))
        a, b = mine.astype(np.float64), other.astype(np.float64)
        largest = max(largest, float(np.max(np.abs(b - a), initial=0.0)))
        square, norm = square + float(np.sum((b - a) ** 2)), norm + float(np.sum(a**2))
    size = int(np.prod(ours.shape))
    return Difference(name, ours.shape, size, changed, largest, float(np.sqrt(square / norm)) if norm else np.inf)


def findings(run: str) -> list[str]:
    """What a run's checkpoint folder holds, and what can be done with it: a line each."""
    saved = SavedSteps(folder_of(run) / "checkpoints")
    if not saved.folder.exists():
        return [f"{saved.folder} does not exist: nothing was saved yet"]
    journal, usable, lines = read_journal(saved.folder), saved.steps(), []
    for step in saved.found():
        lines.append(f"step {step}: {condition(saved, step, journal.get(str(step)), step in usable)}")
    for entry in entries(saved.folder):
        if entry.name.partition(".")[2].startswith(TEMPORARY[1:]):
            whose = journal.get(entry.name.partition(".")[0])
            lines.append(
                f"{entry.name}: a save that never ended"
                + (
                    "; the next start of this run removes it"
                    if whose == "saving"
                    else ", not of this run: remove it yourself"
                )
            )
        elif entry.name == SET_ASIDE:
            names = [it.name for it in entries(entry)]
            lines.append(f"set aside, damaged or superseded: {', '.join(names)} in {entry}; yours to remove")
    sound = [step for step in usable if not quick_look(saved, step)]
    lines.append(
        f"a resume starts from step {sound[-1]}, if its arrays are what was saved: podwright checkpoint verify {run}"
        if sound
        else "nothing here can be resumed from: a start of this run would begin anew"
        if not usable
        else "no step here can be resumed from, and a start of this run will say so"
    )
    return lines


def condition(saved: SavedSteps, step: int, journal: str | None, usable: bool) -> str:
    folder = saved.folder / str(step)
    if usable:
        wrong = quick_look(saved, step)
        whose = "" if journal else "; not written by this run, so never deleted by it"
        return (wrong or "committed, with a manifest") + whose
    missing = "no mark of a finished save" if not (folder / MARKER).exists() else "no manifest"
    if journal in ("saving", "deleting"):
        return f"{missing}: what a killed process left while {journal}; the next start of this run removes it"
    return (
        f"{missing}, so it does not count and is never deleted: a copy that lacks files? podwright checkpoint adopt "
        f"{saved.folder.parent} --step {step} makes it usable if its arrays are whole"
    )


def quick_look(saved: SavedSteps, step: int) -> str:
    """What is wrong with a step as far as can be seen without reading its arrays, or nothing."""
    try:
        said, arrays = array_entries(saved.manifest(step)), opened(saved, step)
    except StorageError as error:
        return f"damaged: {error}"
    missing = [name for name in said if name not in arrays]
    infinite = [name for name, it in said.items() if not it["finite"]]
    if missing:
        return f"damaged: {few(missing)} is not there"
    return f"saved while not finite: {few(infinite)}" if infinite else ""


def adopt_step(run: str, step: int, progress: Progress) -> str:
    """Makes a copied folder a step that counts, once its arrays are those of its manifest; without one, if they are those of
    the run's config. Returns what was done. Raises StorageError."""
    saved = SavedSteps(folder_of(run) / "checkpoints")
    folder = saved.folder / str(step)
    if saved.counts(step):
        return f"step {step} counts already"
    if not (folder / "state").exists():
        raise StorageError(f"{folder / 'state'} does not exist: the arrays of a step are there")
    file = folder.joinpath(*MANIFEST)
    if file.exists():
        if wrong := wrong_with(saved, step, progress):
            raise DamagedError(f"{folder} is not what was saved: {few(wrong, '; ')}")
        said = "every array is as it was saved"
    else:
        arrays = opened(saved, step)
        wanted = {name: (it.shape, it.dtype) for name, it in abstract_arrays(read_config(run)).items()}
        there = {name: (it.shape, it.dtype) for name, it in arrays.items()}
        if unfit := sorted(name for name in wanted.keys() | there.keys() if wanted.get(name) != there.get(name)):
            raise StorageError(f"{folder} does not hold the state of this run's config: {few(unfit)}")
        prints = {name: fingerprint_of(arrays[name]) for name in progress(wanted)}
        counted = int(arrays["step"].whole())
        if counted != step:
            raise StorageError(f"{folder} is of step {counted}: name it so")
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(describe(step, arrays, prints)))
        said = "it had no manifest: its arrays fit, but are not known to be what was saved"
    for place in (folder / "state", folder / "meta", folder):  # as orbax marks them, the step itself last
        if not (place / MARKER).exists():
            (place / MARKER).write_text(f"Checkpoint commit was successful to {place}")
    return f"step {step} counts from now on: {said}"
