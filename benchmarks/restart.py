"""From a kill to the next step: what a restart costs beside an uninterrupted start, by phase, the compiled programs in the cache.

Run as `python -m benchmarks.restart [--rounds 3] [--out FILE]`. Both start the same run; the restart restores a checkpoint.
"""

import argparse
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time

from benchmarks.tables import machine, publish, table
from trainer.ledger import read_rows
from trainer.run_folder import read_metrics

WORDS = ["--trainer.steps", "100000", "--checkpoint.every", "5", "--eval.every", "0", "--trainer.log_every", "1000"]
PHASES = ("init", "restore", "compile")


def attempt(run: pathlib.Path, cache: pathlib.Path, beyond: int) -> dict[str, float]:
    """Seconds until a step after `beyond` is logged, by phase; the process is then killed, once it has saved."""
    command = [sys.executable, "-m", "launch", "train", "griffin-tiny", "--run", str(run), *WORDS]
    command += ["--trainer.compilation_cache", str(cache)]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    try:
        while reached(run, "train") <= beyond:
            assert process.poll() is None, "it ended"
            time.sleep(0.01)
        took = time.perf_counter() - began
        while reached(run, "save") <= beyond + 5:
            time.sleep(0.01)
        time.sleep(1.5)  # the ledger books once a second
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    rows = list(read_rows(run))
    mine = [row["seconds"] for row in rows if row["attempt"] == rows[-1]["attempt"]]
    phases = {name: sum(row.get(name, 0.0) for row in mine) for name in PHASES}
    return phases | {"to the step": took}


def reached(run: pathlib.Path, kind: str) -> int:
    return max(read_metrics(run, kind), default=0) if (run / "metrics.jsonl").exists() else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out")
    options = parser.parse_args()
    starts, restarts = [], []
    with tempfile.TemporaryDirectory() as place:
        root = pathlib.Path(place)
        attempt(root / "warm", root / "cache", 0)
        attempt(root / "warm", root / "cache", reached(root / "warm", "train"))  # what only a restart compiles
        for number in range(options.rounds):
            run = root / str(number)
            starts.append(attempt(run, root / "cache", 0))
            restarts.append(attempt(run, root / "cache", reached(run, "train")))
    rows = []
    for name in (*PHASES, "to the step"):
        a, b = (statistics.median(side[name] for side in sides) for sides in (starts, restarts))
        rows.append([name, f"{a:.1f}", f"{b:.1f}", f"{b / a:.2f}" if a else "-"])
    a, b = (statistics.median(side["init"] + side["restore"] for side in sides) for sides in (starts, restarts))
    rows.append(["init and restore", f"{a:.1f}", f"{b:.1f}", f"{b / a:.2f}"])
    heads = ["seconds", "start", "restart", "ratio"]
    publish(["# From a kill to the next step", "", *table(heads, rows), "", machine()], options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
