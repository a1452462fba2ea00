"""Small runs as a user starts them, for the tests that need whole processes."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp

from trainer.privacy import opened, promise_of
from trainer.run_folder import read_metrics

ROOT = pathlib.Path(__file__).resolve().parent.parent
SMALL = {
    # A scanned group and one more layer each: what compiles soonest and still has every part.
    "griffin-tiny": "--model.width 32 --model.rnn_width 32 --model.mlp_width 64 --model.window 16 --model.pattern rec,attn "
    "--model.depth 3 --data.sequence_length 64",
    "gemma-tiny": "--model.width 32 --model.head_dim 16 --model.mlp_width 64 --model.window 16 "
    "--model.pattern local,global --model.depth 3 --data.sequence_length 64",
    "lru-tiny": "--model.width 32 --model.state_size 32 --model.depth 3 --data.sequence_length 64",
    "lra-matching-tiny": "--model.depth 3 --data.sequence_length 64 --data.held_out_rows 32",
    "nfnet-tiny": "--model.widths 32,32 --model.depths 1,2 --model.head_width 32 --model.dropout 0.1 "
    "--model.stochastic_depth 0.1",
}


def open_privacy(config, mesh, data, folder):
    """Privacy and drawn data as a run in this RunFolder on one host has them."""
    return opened(config, mesh, data, promise_of(config, data, folder))


def train_command(name: str, run: pathlib.Path, *overrides: str) -> list[str]:
    """`podwright train NAME --run RUN` with a model that compiles in seconds."""
    common = "--data.batch_size 8 --eval.batches 1 --trainer.log_every 1"
    words = [*SMALL[name].split(), *common.split(), *overrides]
    return [sys.executable, "-m", "launch", "train", name, "--run", str(run), *words]


def start(command: list[str], **options) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    environment |= {"JAX_PLATFORMS": "cpu", "COLUMNS": "200"} | options.pop("env", {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)


def finish(command: list[str], timeout: float = 600, **options) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command run to its end."""
    process = start(command, **options)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()  # if it took too long
    return process.returncode, out, err


def signal_at(
    process: subprocess.Popen, run: pathlib.Path, step: int, number: signal.Signals, kind: str = "train"
) -> None:
    """Send a signal once a record of this kind is logged for `step` or a later one."""
    while process.poll() is None:
        if (run / "metrics.jsonl").exists() and max(read_metrics(run, kind), default=0) >= step:
            process.send_signal(number)
            return
        time.sleep(0.01)
    raise AssertionError(f"ended before step {step}: {process.communicate()}")


def saved_arrays(run: pathlib.Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by its slash-joined name on disk, read with orbax alone."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        folder = (run / "checkpoints" / str(step) / "state").absolute()
        names = reader.metadata(folder).item_metadata.tree
        # Whatever devices saved them.
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), names)
        tree = reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=as_numpy))

    def flatten(node, path):
        if isinstance(node, dict):
            for key, child in node.items():
                yield from flatten(child, [*path, key])
        else:
            yield "/".join(path), np.asarray(node)

    return dict(flatten(tree, []))
