"""`seqio:MODULE:NAME` as a source: what another process, with TensorFlow, made of the Task or Mixture, kept in a cache."""

import hashlib
import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

from data.dataset import DataError

CACHE = "~/.cache/podwright/seqio"


def seqio_folders(source: str) -> list[tuple[str, float]]:
    """Prepared folders and their shares: one of a Task, several of a Mixture. Raises DataError."""
    _, module, name = source.split(":")
    folder = Path(CACHE).expanduser() / f"{name}-{code_hash(module)}"
    shares = folder / "shares.json"
    if not shares.exists():
        if importlib.util.find_spec("seqio") is None:
            raise DataError(f"{source} needs the package seqio: pip install -e '.[seqio]'")
        command = [sys.executable, "-m", "data.prepare.seqio_tasks", module, name, str(folder)]
        quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, env={**os.environ, **quiet}, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            told = [line for line in done.stderr.splitlines() if line.startswith("DataError: ")]
            last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise DataError(told[-1].removeprefix("DataError: ") if told else f"{source} could not be read: {last}")
    return [(str(folder / task), share) for task, share in json.loads(shares.read_text()).items()]


def code_hash(module: str) -> str:
    """Of the module's source, found without running it: a Task that was changed is prepared again."""
    where = [os.getcwd(), *sys.path]
    spec = None
    for part in module.split("."):
        spec = importlib.machinery.PathFinder.find_spec(part, where)
        if spec is None:
            raise DataError(f"the module {module} of data.sources is not found here or in this environment")
        where = list(spec.submodule_search_locations or [])
    assert spec is not None
    content = Path(spec.origin).read_bytes() if spec.origin else b""
    return hashlib.sha256(module.encode() + content).hexdigest()[:16]
