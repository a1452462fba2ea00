"""Before anything is compiled: do all hosts run the same? One that doesn't would hang all of them without a word."""

import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
import time
from collections import Counter

import jax

from configs.fields import values_of
from configs.schema import Config, ConfigError
from data.dataset import DataError
from sharding import hosts

PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "tensorstore", "numpy")
OWN = ("configs", "data", "models", "sharding", "trainer", "launch")
COMPILER = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
ITS_OWN = (
    "PROCESS",
    "COORDINATOR",
    "LOCAL_DEVICE",
    "CACHE",
    "DIR",
)  # in names of jax's variables that hosts may differ in
FREE = {"trainer.compilation_cache"}
CLOCK = 5.0  # seconds
SHOWN = 3  # differences


def check_hosts(config: Config, run: str | pathlib.Path) -> None:
    """Config, code, packages, compiler options and devices. Raises ConfigError on every host if one differs; clocks that
    differ are told."""
    if jax.process_count() == 1:
        return
    facts = {path: str(value) for path, value in values_of(config).items() if path not in FREE}
    facts["--run"] = str(run)
    facts |= {f"the package {name}": installed(name) for name in PACKAGES}
    facts["Python"] = platform.python_version()
    facts |= {f"the file {name}": content for name, content in code().items()}
    names = [n for n in os.environ if n.startswith("JAX_") and not any(part in n for part in ITS_OWN)]
    facts |= {f"the variable {name}": os.environ.get(name, "") for name in (*COMPILER, *names)}
    facts["devices"] = f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}"
    if difference := compare(facts):
        raise ConfigError(f"the hosts do not run the same: {difference}")
    check_clocks()


def check_data(manifest: dict) -> None:
    """Raises DataError on every host if one reads other data."""
    if difference := compare({"the data's hash": manifest["hash"]}):
        raise DataError(f"the hosts do not read the same data: {difference}")


def check_program(lowered: jax.stages.Lowered) -> None:
    """Raises ConfigError on every host if one would compile another step."""
    if jax.process_count() == 1:
        return
    program = hashlib.sha256(lowered.as_text().encode()).hexdigest()
    if difference := compare({"the lowered step's hash": program}):
        raise ConfigError(f"the hosts would compile different steps, and wait for each other for ever: {difference}")


def compare(facts: dict[str, str]) -> str:
    """How the hosts' facts differ, in words, the same on every host; empty if they don't."""
    if jax.process_count() == 1:
        return ""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    if len(set(hosts.exchanged(digest).values())) == 1:
        return ""
    return differing({index: json.loads(text) for index, text in hosts.exchanged(json.dumps(facts)).items()})


def differing(facts: dict[int, dict[str, str]]) -> str:
    """Facts by host -> who differs from most of them, or from host 0 where there is no majority, and in what."""
    found = []
    for name in sorted({name for said in facts.values() for name in said}, key=lambda name: name.startswith("the ")):
        values = {index: said.get(name, "nothing") for index, said in sorted(facts.items())}
        usual = Counter(values.values()).most_common(1)[0][0]  # of equals the first, which is host 0's
        for index, value in values.items():
            if value != usual:
                found.append(f"host {index} has {name} {short(value)} where others have {short(usual)}")
    return "; ".join(found[:SHOWN]) + (f"; and {len(found) - SHOWN} more differences" if len(found) > SHOWN else "")


def short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:12]}...")


def check_clocks() -> None:
    hosts.meet()
    now = {index: float(text) for index, text in hosts.exchanged(str(time.time())).items()}
    for index, clock in now.items():
        if hosts.first() and abs(clock - now[0]) > CLOCK:
            away = f"{abs(clock - now[0]):.0f} s {'ahead of' if clock > now[0] else 'behind'}"
            print(f"note: the clock of host {index} is {away} host 0's: logs won't match", file=sys.stderr, flush=True)


def installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@functools.cache
def code_hash() -> str:
    """Of all our source files together."""
    return hashlib.sha256(json.dumps(code()).encode()).hexdigest()[:16]


def code() -> dict[str, str]:
    """A hash of each of our source files."""
    root = pathlib.Path(__file__).resolve().parent.parent
    files = sorted(file for package in OWN for file in (root / package).rglob("*.py"))
    return {str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
