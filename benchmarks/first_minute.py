"""What a newcomer meets: the weight of the install, the wait for an error message, the wait for the first step.

Run as `python -m benchmarks.first_minute [--out FILE]`. Installs into a temporary folder, through pip's or uv's cache.
"""

import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

from benchmarks.tables import arguments, machine, publish, table

PROJECT = pathlib.Path(__file__).resolve().parent.parent
ERROR_RUNS = 5
TYPO = ["--optimizer.learnin-rate", "1e-3"]
# MaxText as of 2026-08-22 on such a machine (two cores, busy, so its seconds are pessimistic), Python 3.12, installed
# with uv from its own list without accelerators and Google Cloud. Not measured in the same run: it needs 3.4 GB.
MAXTEXT = {
    "packages": "216",
    "size": "3,400 MB",
    "install": "195 s (uv)",
    "error": "33 s",
    "message": "18,717 characters",
    "suggests": "no",
    "lines": "872",
    "misfit": "no: two shapes",
}
# Printed by the fresh environment's Python, where only the standard library is sure to exist.
WEIGH = """
import importlib.metadata as metadata
sizes = {}
for package in metadata.distributions():
    files = [package.locate_file(file) for file in package.files or []]
    sizes[package.name] = sum(file.stat().st_size for file in files if file.exists())
for name in sorted(sizes, key=sizes.get, reverse=True):
    print(name, sizes[name])
"""


@dataclass(frozen=True)
class Ended:
    """A finished command."""

    seconds: float
    code: int
    message: str  # its standard error


@dataclass(frozen=True)
class FirstStep:
    """A training run as seen from the shell."""

    seconds: float
    lines: int  # printed before the line of step 1


def main() -> None:
    options = arguments(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        publish(measure(pathlib.Path(folder)), options.out)


def measure(folder: pathlib.Path) -> list[str]:
    """Lines of the report; everything is written below `folder`."""
    environment = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    bare = bytes_below(environment)
    installer, seconds = install(environment)
    size = bytes_below(environment) - bare
    packages = weights(environment)

    podwright = str(environment / "bin" / "podwright")
    errors = [finish([podwright, "train", "griffin-tiny", *TYPO], folder) for _ in range(ERROR_RUNS)]
    message = errors[0].message
    cache, again = folder / "cache", folder / "warm"
    cold = first_step(podwright, folder / "cold", cache)
    warm = first_step(podwright, again, cache)
    misfit = finish([podwright, "train", "griffin-tiny", "--run", str(again), "--model.width", "96"], folder)

    rows = [
        ("packages installed", f"{len(packages)}", MAXTEXT["packages"]),
        ("disk space of the install", f"{size / 1e6:,.0f} MB", MAXTEXT["size"]),
        ("installing (the downloads depend on the network)", f"{seconds:.0f} s ({installer})", MAXTEXT["install"]),
        (
            f"shell to the error of a mistyped option, median of {ERROR_RUNS}",
            f"{statistics.median(error.seconds for error in errors):.2f} s",
            MAXTEXT["error"],
        ),
        ("length of that message", f"{len(message.strip()):,} characters", MAXTEXT["message"]),
        ("it suggests the right name", yes("learning_rate" in message), MAXTEXT["suggests"]),
        ("shell to first step, nothing compiled before", f"{cold.seconds:.1f} s", ""),
        ("shell to first step, compilation cached", f"{warm.seconds:.1f} s", ""),
        ("lines printed before the first step", f"{cold.lines}", MAXTEXT["lines"]),
        (
            "resumed with another width, the message names the field",
            yes("model.width" in misfit.message),
            MAXTEXT["misfit"],
        ),
    ]
    return [
        "# The first minute",
        "",
        *table(("", "podwright", "MaxText (not in this run)"), rows),
        "",
        machine(),
        "MaxText: version of 2026-08-22, measured earlier on such a machine under load 12, so its seconds are pessimistic.",
        "",
        f"The mistyped option `{' '.join(TYPO)}` ends with exit code {errors[0].code} and says:",
        "",
        f"    {message.strip()}",
        "",
        f"Another width ends with exit code {misfit.code} and says:",
        "",
        f"    {misfit.message.strip()}",
        "",
        "Heaviest packages: " + ", ".join(f"{name} {weight / 1e6:,.0f} MB" for name, weight in packages[:12]) + ".",
    ]


def install(environment: pathlib.Path) -> tuple[str, float]:
    """Install the core into `environment` as the Makefile does; the installer's name and the seconds it took."""
    python = str(environment / "bin" / "python")
    uv = shutil.which("uv")
    command = (
        [uv, "pip", "install", "--python", python]
        if uv
        else [python, "-m", "pip", "install", "--disable-pip-version-check"]
    )
    start = time.perf_counter()
    subprocess.run([*command, "-qq", "-e", str(PROJECT)], check=True)
    return "uv" if uv else "pip", time.perf_counter() - start


def bytes_below(folder: pathlib.Path) -> int:
    """Disk space of a folder, as `du` counts it."""
    return sum(512 * path.lstat().st_blocks for path in folder.rglob("*"))


def weights(environment: pathlib.Path) -> list[tuple[str, int]]:
    """Packages and bytes, heaviest first, without our own and what every environment starts with."""
    listed = subprocess.run([environment / "bin" / "python", "-c", WEIGH], check=True, capture_output=True, text=True)
    pairs = [line.split() for line in listed.stdout.splitlines()]
    return [(name, int(size)) for name, size in pairs if name not in ("pip", "setuptools", "podwright")]


def finish(command: list[str], folder: pathlib.Path) -> Ended:
    start = time.perf_counter()
    ended = subprocess.run(command, cwd=folder, env=user(folder), capture_output=True, text=True)
    return Ended(time.perf_counter() - start, ended.returncode, ended.stderr)


def first_step(podwright: str, run: pathlib.Path, cache: pathlib.Path) -> FirstStep:
    """Train two steps into a new run: a step's metrics are read, and printed, once the next one is on its way."""
    steps = ["--trainer.steps", "2", "--optimizer.warmup_steps", "1", "--trainer.log_every", "1", "--eval.batches", "1"]
    command = [podwright, "train", "griffin-tiny", "--run", str(run), "--trainer.compilation_cache", str(cache), *steps]
    start = time.perf_counter()
    seen: FirstStep | None = None
    told: list[str] = []
    with subprocess.Popen(
        command, cwd=run.parent, env=user(run.parent), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout
        for line in process.stdout:
            if seen is None and line.startswith("step 1/"):
                seen = FirstStep(time.perf_counter() - start, len(told))
            told.append(line)
    if seen is None or process.returncode:
        raise SystemExit(f"training ended with exit code {process.returncode}:\n{''.join(told)}")
    return seen


def user(folder: pathlib.Path) -> dict[str, str]:
    """The environment of a newcomer: an empty home, and no path by which Python would find this checkout."""
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HOME": str(folder), "COLUMNS": "120"}


def yes(true: bool) -> str:
    return "yes" if true else "no"


if __name__ == "__main__":
    main()
