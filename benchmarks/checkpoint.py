"""Saving and restoring beside orbax called bare and beside the disk: what a save holds up, and what share of the disk it gets.

Run as `python -m benchmarks.checkpoint [--mib 512] [--rounds 3] [--out FILE]`. The sides take turns on the same state and disk.
"""

import argparse
import contextlib
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.tables import machine, publish, table
from configs.schema import CheckpointConfig, MeshConfig
from sharding.mesh import make_mesh
from trainer.checkpoint import Checkpoints
from trainer.saved import SavedSteps

PIECE = 1 << 24


def state_of(mib: int, mesh: Any, axis: str) -> Any:
    """Float32 matrices of 32 MiB, rows divided along one axis: random, as trained parameters don't compress either."""
    count = mib // 32
    here = NamedSharding(mesh, PartitionSpec(axis))
    make = jax.jit(lambda key: jax.random.normal(key, (2048, 4096)), out_shardings=here)
    return {"model": {str(i): make(jax.random.key(i)) for i in range(count)}, "step": jnp.int32(0)}


def written_by_hand(folder: pathlib.Path, mib: int) -> float:
    """MiB/s of plain sequential writes of as many bytes and one fsync."""
    block = os.urandom(PIECE)
    start = time.perf_counter()
    with open(folder / "plain", "wb", buffering=0) as file:
        for _ in range(mib * 2**20 // PIECE):
            file.write(block)
        os.fsync(file.fileno())
    return mib / (time.perf_counter() - start)


def read_by_hand(folder: pathlib.Path, mib: int) -> float:
    forget(folder / "plain")
    start = time.perf_counter()
    with open(folder / "plain", "rb", buffering=0) as file:
        while file.read(PIECE):
            pass
    return mib / (time.perf_counter() - start)


def forget(path: pathlib.Path) -> None:
    """Out of the page cache, so that a read comes from the disk."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def sync() -> None:
    subprocess.run(["sync"], check=True)


def ours(folder: pathlib.Path, state: Any, mib: int) -> tuple[float, float]:
    """Seconds that a save held its caller up, MiB/s until all is on the disk."""
    with contextlib.closing(Checkpoints(folder, CheckpointConfig())) as checkpoints:
        start = time.perf_counter()
        blocked = checkpoints.save(1, state, {})
        checkpoints.finish()
        sync()
        return blocked, mib / (time.perf_counter() - start)


def bare(folder: pathlib.Path, state: Any, mib: int, chunk: int | None = None) -> tuple[float, float]:
    """With chunks of at most so many bytes, or one a shard."""
    how = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=chunk), state)
    with ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        start = time.perf_counter()
        checkpointer.save(folder / "1", args=ocp.args.PyTreeSave(state, save_args=how))
        blocked = time.perf_counter() - start
        checkpointer.wait_until_finished()
        sync()
        return blocked, mib / (time.perf_counter() - start)


def restored(folder: pathlib.Path, abstract: Any, mib: int) -> float:
    """MiB/s, every array held to its checksum."""
    forget(folder)
    start = time.perf_counter()
    jax.block_until_ready(SavedSteps(folder).restore(1, abstract)[0])
    return mib / (time.perf_counter() - start)


def restored_bare(folder: pathlib.Path, abstract: Any, mib: int) -> float:
    forget(folder)
    start = time.perf_counter()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        how = ocp.checkpoint_utils.construct_restore_args(abstract)
        args = ocp.args.PyTreeRestore(item=abstract, restore_args=how)
        jax.block_until_ready(checkpointer.restore(folder / "1", args=args))
    return mib / (time.perf_counter() - start)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out")
    options = parser.parse_args()
    mesh, other = make_mesh(MeshConfig(data=1, fsdp=8)), make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCHMARK_FOLDER")) as place:
        root = pathlib.Path(place)
        with jax.set_mesh(mesh):
            state = state_of(options.mib, mesh, "fsdp")
            same = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
            columns = NamedSharding(other, PartitionSpec(None, "tensor"))
            across = {
                "model": {
                    n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=columns) for n, x in state["model"].items()
                },
                "step": same["step"],
            }
            ours(root / "warm", state, options.mib)  # compiles the checksums
            for number in range(options.rounds + 1):
                a, b = root / f"ours-{number}", root / f"bare-{number}"
                row: dict[str, float] = {}
                row["disk, write and fsync (MiB/s)"] = written_by_hand(root, options.mib)
                row["held up, ours (ms)"], row["saved, ours (MiB/s)"] = ours(a, state, options.mib)
                row["held up, orbax bare (ms)"], row["saved, orbax bare (MiB/s)"] = bare(b, state, options.mib)
                row["disk, read (MiB/s)"] = read_by_hand(root, options.mib)
                row["restored, ours with checksums (MiB/s)"] = restored(a, same, options.mib)
                row["restored, orbax bare (MiB/s)"] = restored_bare(b, same, options.mib)
                row["on another mesh, ours with checksums (MiB/s)"] = restored(a, across, options.mib)
                row["on another mesh, orbax bare (MiB/s)"] = restored_bare(b, across, options.mib)
                shutil.rmtree(b)
                bare(b, state, options.mib, chunk=2**20)
                row["on another mesh, orbax bare, chunks of 1 MiB (MiB/s)"] = restored_bare(b, across, options.mib)
                row["held up, ours (ms)"] *= 1e3
                row["held up, orbax bare (ms)"] *= 1e3
                shutil.rmtree(a)
                shutil.rmtree(b)
                if number:  # the first round compiles
                    for name, value in row.items():
                        found.setdefault(name, []).append(value)
                print(f"round {number} of {options.rounds}", file=sys.stderr)
    rows = [[name, f"{statistics.median(v):,.0f}", f"{min(v):,.0f} to {max(v):,.0f}"] for name, v in found.items()]
    middle = {name: statistics.median(values) for name, values in found.items()}
    ratios = {
        "held up: ours / orbax bare": ("held up, ours (ms)", "held up, orbax bare (ms)"),
        "saved: ours / disk": ("saved, ours (MiB/s)", "disk, write and fsync (MiB/s)"),
        "saved: orbax bare / disk": ("saved, orbax bare (MiB/s)", "disk, write and fsync (MiB/s)"),
        "restored: ours / disk": ("restored, ours with checksums (MiB/s)", "disk, read (MiB/s)"),
        "restored: orbax bare / disk": ("restored, orbax bare (MiB/s)", "disk, read (MiB/s)"),
    }
    rows += [[name, f"{middle[a] / middle[b]:.2f}", ""] for name, (a, b) in ratios.items()]
    heads = ["", "median", "range"]
    publish([f"# Checkpoints of {options.mib} MiB", "", *table(heads, rows), "", machine()], options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
