"""`podwright plan` in a process of its own, as a user runs it."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any


def plan(words: Sequence[str]) -> dict[str, Any]:
    """What `plan --json` writes, and "peak_gib", the most memory that the process held."""
    with tempfile.TemporaryDirectory() as folder:
        out, errors = pathlib.Path(folder) / "plan.json", pathlib.Path(folder) / "errors"
        command = [sys.executable, "-m", "launch", "plan", *words, "--json", str(out)]
        with errors.open("w") as err:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=err)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if not out.exists():
            raise SystemExit(f"{' '.join(command)} failed:\n{errors.read_text()[-2000:]}")
        # A process starts from the memory of the one that forks it: callers keep jax out of theirs.
        return json.loads(out.read_text()) | {"peak_gib": usage.ru_maxrss / 2**20}
