"""`podwright plan NAME --topology T --search`: which mesh, recomputation, microbatches and offload make a step fastest.

All that is searched leaves the result of training alone: the batch is the config's. Arithmetic ranks the candidates
(sharding/arithmetic.py), the compiler measures the best of them in processes of their own until the time is over.
"""

import concurrent.futures
import functools
import itertools
import json
import math
import os
import pathlib
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from configs.fields import values_of
from configs.overrides import override
from configs.schema import MESH_FIELDS, Config, ConfigError, MeshConfig, NFNetConfig
from configs.store import to_json
from sharding import aot
from sharding.arithmetic import Predicted, divided_further, meshes, predict, row_parts
from sharding.topologies import Topology, find_topology, products

GIB = 2**30
SLACK = 1.1  # predictions over the memory by less are still compiled
MICROBATCHES = (1, 2, 4)


@dataclass(frozen=True)
class Candidate:
    values: dict[str, Any]  # dotted field -> value
    predicted: Predicted

    @property
    def words(self) -> list[str]:
        return [
            word
            for field, value in self.values.items()
            for word in (f"--{field}", ",".join(value) if isinstance(value, tuple) else str(value).lower())
        ]

    def words_unlike(self, config: Config) -> list[str]:
        """Those that change something."""
        before = values_of(config)
        changed = {field: value for field, value in self.values.items() if before[field] != value}
        return Candidate(changed, self.predicted).words

    def describe(self) -> str:
        mesh = " ".join(f"{axis} {n}" for axis in MESH_FIELDS if (n := self.values[f"mesh.{axis}"]) > 1) or "1 device"
        saved = "+" + "+".join(self.values["trainer.save"]) if self.values["trainer.save"] else ""
        parts = [f"remat {self.values['trainer.remat']}{saved}"]
        if self.values["trainer.microbatches"] > 1:
            parts.append(f"{self.values['trainer.microbatches']} microbatches")
        if self.values["optimizer.offload"]:
            parts.append("moments on the host")
        return f"{mesh}, {', '.join(parts)}"


@dataclass(frozen=True)
class Found:
    candidate: Candidate
    plan: dict[str, Any]  # of `plan --json`

    @property
    def fits(self) -> bool:
        return bool(self.plan.get("fits"))

    @property
    def bytes(self) -> float:
        """Of HBM; infinite if the compiler failed for another reason."""
        if not self.fits:
            return self.plan.get("needs_gib", math.inf) * GIB
        return sum(size for part, size in self.plan["hbm_bytes"].items() if part != "capacity")


def main(config: Config, given: list[str], topology: Topology, minutes: float, best: pathlib.Path | None) -> int:
    """Prints what it tries as it goes, then the ranking; writes the winner's fields to `best`. `given` are the words that made
    the config of its name."""
    from trainer.tasks import make_task

    task = make_task(config)
    options = candidates(config, topology, number_of_parameters(task), task.flops_per_step)
    if not options:
        raise ConfigError(f"no mesh of {topology.describe()} takes {config.data.show('batch_size')}")
    print(f"search      {config.name} on {topology.describe()}: {len(options):,} candidates of one batch")
    if not aot.has_libtpu():
        print(
            "analytic    libtpu is not installed, nothing was compiled: pip install -e '.[tpu]' for more than a guess"
        )
        for guess in [c for c in options if c.predicted.bytes < topology.hbm][:10]:
            step, memory = 1e3 * guess.predicted.seconds, guess.predicted.bytes / GIB
            print(f"  {step:9,.0f} ms  {memory:7.2f} GiB   {guess.describe()}")
        return 0
    workers = max(1, (os.cpu_count() or 1) // 2)
    print(f"compiling   the best by arithmetic for {minutes:g} minutes, {workers} at a time")
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "config.json"
        file.write_text(to_json(config))
        compiler = functools.partial(compile_one, file, topology, pathlib.Path(folder))
        found = search(options, topology.hbm, 60 * minutes, compiler, lambda line: print(line, flush=True), workers)
    fit = [one for one in found if one.fits]
    print(f"ranked      {len(fit)} that fit, of {len(found)} compiled and {len(options):,} candidates")
    for place, one in enumerate(fit, 1):
        print(f"{place:3}  {told(one)}")
    if not fit:
        raise ConfigError(f"nothing that was compiled fits {topology.name}: more minutes, or more devices")
    words = shlex.join([*given, *fit[0].candidate.words_unlike(config)])
    print(f"best        podwright train {config.name} {words}")
    if best:
        best.write_text(json.dumps(nested(fit[0].candidate.values), indent=2) + "\n")
        print(f"            or --config {best}")
    return 0


def number_of_parameters(task: Any) -> int:
    import jax

    from sharding.mesh import abstract_mesh
    from sharding.rules import rules_for

    mesh = abstract_mesh(MeshConfig(), 1)
    with jax.sharding.use_abstract_mesh(mesh):
        model = jax.eval_shape(lambda: task.init(jax.random.key(0), rules_for(mesh).spec))
    return sum(leaf.size for leaf in jax.tree.leaves(model))


def compile_one(config: pathlib.Path, topology: Topology, folder: pathlib.Path, candidate: Candidate) -> dict[str, Any]:
    """What `plan --json` says of it, in a process of its own: a compiler that dies takes nothing with it."""
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".json") as out:
        command = [sys.executable, "-m", "launch", "plan", str(config), "--topology", topology.name]
        command += ["--slices", str(topology.slices), "--json", out.name, *candidate.words]
        done = subprocess.run(command, text=True, capture_output=True)
        text = pathlib.Path(out.name).read_text()
    if not text:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    return json.loads(text)


def nested(values: dict[str, Any]) -> dict[str, Any]:
    """As `--config FILE` takes it."""
    tree: dict[str, Any] = {}
    for path, value in values.items():
        section, _, name = path.partition(".")
        tree.setdefault(section, {})[name] = value
    return tree


def candidates(config: Config, topology: Topology, parameters: int, flops: float) -> list[Candidate]:
    """All that the config allows on the topology, the fastest by arithmetic first."""
    found = []
    for mesh, remat, micro, offload in itertools.product(
        meshes(config, topology), remats(config), MICROBATCHES, (False, True)
    ):
        values = {f"mesh.{axis}": size for axis, size in mesh.items()} | remat
        values |= {"trainer.microbatches": micro, "optimizer.offload": offload}
        if config.data.batch_size % (row_parts(mesh) * micro):
            continue
        try:
            changed = with_values(config, values)
        except ConfigError:
            continue
        found.append(Candidate(values, predict(changed, topology, mesh, parameters, flops)))
    found.sort(key=lambda c: (c.predicted.seconds, c.predicted.bytes))
    return found


def with_values(config: Config, values: dict[str, Any]) -> Config:
    """Raises ConfigError where the config doesn't allow them."""
    words = Candidate(values, Predicted(0, 0)).words
    return override(config, config.name, words, {}).config


def remats(config: Config) -> list[dict[str, Any]]:
    if isinstance(config.model, NFNetConfig):
        later = [name for name in config.model.tensors if name.startswith("stage_")][
            1:
        ]  # the first keep most, for least
        kinds: list[tuple[str, tuple[str, ...]]] = [("none", ())]
        kinds += [("layer", tuple(later[first:])) for first in range(len(later) + 1)]
    else:
        named = tuple(name for name in ("rnn", "context") if name in config.model.tensors)
        products = tuple(n for n in config.model.tensors if n not in ("input", "mlp_up"))
        kinds = [("none", ()), ("dots", ()), ("layer", ()), ("layer", named), ("layer", products)]
    return [{"trainer.remat": remat, "trainer.save": save, "trainer.offload": ()} for remat, save in kinds]


def remedy(config: Config, topology: Topology, mesh: dict[str, int], needs: float) -> str:
    """The smallest change that should make a step of `needs` GiB a device fit: of the fastest with fewest fields, or devices.

    The compiler's figure corrects the arithmetic. Nothing here is compiled, and the sentence says so.
    """
    from trainer.tasks import make_task

    task = make_task(config)
    parameters, flops = number_of_parameters(task), task.flops_per_step
    config = with_values(config, {f"mesh.{axis}": size for axis, size in mesh.items()})  # -1 is no size to compare with
    now = predict(config, topology, mesh, parameters, flops)
    room = topology.hbm * now.bytes / (needs * GIB)  # in bytes as predicted
    fit = [c for c in candidates(config, topology, parameters, flops) if SLACK * c.predicted.bytes < room]
    if fit:
        least = min(fit, key=lambda c: (len(c.words_unlike(config)), c.predicted.seconds))
        words, slower = shlex.join(least.words_unlike(config)), least.predicted.seconds / now.seconds
        return f"by arithmetic, {words} fits, in {slower:.2f} times the time"
    generation = topology.name.partition("-")[0]
    for size in sorted(products(generation)):
        larger = find_topology(f"{generation}-{size}", topology.slices)
        grown = divided_further(mesh, larger.devices // topology.devices)
        if larger.devices <= topology.devices or config.data.batch_size % row_parts(grown):
            continue
        if SLACK * predict(config, larger, grown, parameters, flops).bytes < room:
            return f"by arithmetic, {larger.name} is the smallest that it fits"
    return "no mesh, recomputation or larger slice that this knows of would do"


def search(
    options: list[Candidate],
    capacity: float,
    seconds: float,
    compile_one: Callable[[Candidate], dict[str, Any]],
    say: Callable[[str], None],
    workers: int,
) -> list[Found]:
    """Compiles candidates until the time is over, and returns them: those that fit by their step time, then the others."""
    deadline, waiting = time.monotonic() + seconds, list(options)
    found: list[Found] = []
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        running: dict[concurrent.futures.Future, Candidate] = {}
        while True:
            while len(running) < workers and time.monotonic() < deadline:
                candidate = next_one(waiting, found, capacity)
                if candidate is None:
                    break
                waiting.remove(candidate)
                running[pool.submit(compile_one, candidate)] = candidate
            if not running:
                break
            done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                one = Found(running.pop(future), future.result())
                found.append(one)
                say(f"{len(found):3}  {told(one)}")
    return sorted(found, key=lambda one: (not one.fits, one.plan.get("step_seconds", 0.0) if one.fits else one.bytes))


def next_one(waiting: list[Candidate], found: list[Found], capacity: float) -> Candidate | None:
    """The fastest that should fit, predictions corrected by what has been compiled, and that hasn't failed in a smaller form."""
    least = min((one.candidate.predicted.bytes for one in found if not one.fits), default=math.inf)
    room = (c for c in waiting if c.predicted.bytes < least and c.predicted.bytes * scale(c, found) < SLACK * capacity)
    return next(room, None)


def scale(candidate: Candidate, found: list[Found]) -> float:
    """What the compiler needed over what was predicted, of those that keep alike, or of all."""
    known = [one for one in found if one.bytes < math.inf]
    alike = [one for one in known if one.candidate.values["trainer.remat"] == candidate.values["trainer.remat"]]
    return statistics.median([one.bytes / one.candidate.predicted.bytes for one in alike or known] or [1.0])


def told(one: Found) -> str:
    if "failed" in one.plan:
        return f"{'failed':>12}  {one.plan['failed']}: {one.candidate.describe()}"
    if not one.fits:
        return f"{'does not fit':>12}  {one.bytes / GIB:7.2f} GiB                  {one.candidate.describe()}"
    step, mfu = 1e3 * one.plan["step_seconds"], 100 * one.plan["mfu"]
    return f"{step:9,.0f} ms  {one.bytes / GIB:7.2f} GiB  MFU {mfu:5.1f} %   {one.candidate.describe()}"
