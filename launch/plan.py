"""`podwright plan NAME --topology T`: the step that `train` would run, compiled for TPUs that aren't there, and what it costs.

Without libtpu only what arithmetic tells is answered: bytes of the state, the model's FLOPs, and the time they take at peak.
"""

import dataclasses
import importlib.metadata
import json
import math
import pathlib
import time
from dataclasses import dataclass
from typing import Any

from configs.overrides import resolve
from configs.schema import Config, ConfigError
from launch.local import without
from sharding import aot
from sharding.hlo_time import Estimate, Machine, as_dict, estimate
from sharding.topologies import HOST_BANDWIDTH, PRICES_OF, Topology, find_topology

USAGE = """\
podwright plan NAME --topology T [--slices N] [--price USD] [--json FILE] [--section.field VALUE ...]
podwright plan NAME --topology T [--slices N] --search [--minutes M] [--best FILE] [--section.field VALUE ...]
T: a generation and a size, v5e-256 or v6e-16 (chips), v4-32, v5p-128 or tpu7x-128 (TensorCores, two a chip).
--price is USD a chip-hour; --json writes the same figures to a file, too.
--search tries meshes, recomputation, microbatches and offload for M minutes (10); --best writes the winner for
train's --config."""
OPTIONS = {"topology": "T", "slices": "N", "price": "USD", "json": "FILE", "search": "", "minutes": "M", "best": "FILE"}
DAY = 86400


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of the step, bytes a device."""

    temporaries: int
    outputs: int  # that don't take an argument's place
    host: int  # temporaries in the host's memory
    program: int
    seconds: float  # of compiling
    estimate: Estimate
    versions: str


@dataclass(frozen=True)
class Plan:
    config: Config
    topology: Topology
    mesh: dict[str, int]
    notes: list[str]  # on the mesh
    count: int  # of parameters
    parameters: int  # bytes a device, as the next three
    optimizer: int
    batch: int
    moments_on_host: int  # what of the optimizer's state is not in HBM
    unit: str  # what is counted: tokens or images
    units: int  # a step
    flops: float  # the model's, a step: matrix products of forward and backward pass, without recomputation
    price: float | None  # USD a chip-hour
    compiled: Compiled | None
    too_large: aot.TooLarge | None = None

    @property
    def memory(self) -> int:
        """Bytes a device; without the compiler, of what is known."""
        c = self.compiled
        return self.parameters + self.optimizer + self.batch + (c.temporaries + c.outputs + c.program if c else 0)

    @property
    def host(self) -> int:
        """Bytes of the host's memory a device; without the compiler, of what is known."""
        return self.moments_on_host + (self.compiled.host if self.compiled else 0)

    @property
    def peak_seconds(self) -> float:
        """A step's model FLOPs at the chips' peak."""
        return self.flops / (self.topology.peak * self.topology.devices)

    @property
    def step_seconds(self) -> float:
        return self.compiled.estimate.seconds if self.compiled else self.peak_seconds

    @property
    def mfu(self) -> float:
        return self.peak_seconds / self.step_seconds

    @property
    def hours(self) -> float:
        return self.config.trainer.steps * self.step_seconds / 3600

    @property
    def chip_hours(self) -> float:
        return self.hours * self.topology.chips

    def as_dict(self) -> dict[str, Any]:
        per_second = self.units / self.step_seconds
        found: dict[str, Any] = {
            "config": self.config.name,
            "topology": self.topology.name,
            "slices": self.topology.slices,
            "chips": self.topology.chips,
            "mesh": self.mesh,
            "parameters": self.count,
            "fits": None if self.compiled is None and self.too_large is None else self.too_large is None,
            "hbm_bytes": {
                "capacity": self.topology.hbm,
                "parameters": self.parameters,
                "optimizer": self.optimizer,
                "batch": self.batch,
            },
            "host_bytes": self.host,
            "model_flops": self.flops,
            "step_seconds_at_peak": self.peak_seconds,
        }
        if self.too_large:
            return found | {"needs_gib": self.too_large.used, "has_gib": self.too_large.capacity}
        if self.compiled:
            c = self.compiled
            found["hbm_bytes"] |= {"temporaries": c.temporaries, "outputs": c.outputs, "program": c.program}
            found |= {"compile_seconds": c.seconds, "versions": c.versions, "step": as_dict(c.estimate)}
        return found | {
            "notes": self.notes,
            "step_seconds": self.step_seconds,
            f"{self.unit}_per_second": per_second,
            f"{self.unit}_per_day": per_second * DAY,
            "mfu": self.mfu,
            "steps": self.config.trainer.steps,
            "hours": self.hours,
            "chip_hours": self.chip_hours,
            "usd_per_chip_hour": self.price,
            "usd": None if self.price is None else self.price * self.chip_hours,
        }


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    name, *rest = argv
    resolved = resolve(name, rest, OPTIONS)
    options = resolved.options
    if "topology" not in options:
        raise ConfigError("podwright plan needs the TPUs to plan for, for example --topology v5e-256")
    topology = find_topology(options["topology"], int(number("slices", options.get("slices", "1"), whole=True)))
    for option in OPTIONS:
        if option in options and option in (("price", "json") if "search" in options else ("minutes", "best")):
            raise ConfigError(
                f"--{option} is of {'one plan, not of' if 'search' in options else 'no use without'} --search"
            )
    check_plannable(resolved.config)
    price = number("price", options["price"]) if "price" in options else topology.chip.price
    file = file_for("json", options["json"]) if "json" in options else None
    best = file_for("best", options["best"]) if "best" in options else None
    aot.prepare()
    if "search" in options:
        from launch.plan_search import main as search

        words = without(rest, OPTIONS)
        return search(resolved.config, words, topology, number("minutes", options.get("minutes", "10")), best)
    from launch.plan_table import show

    plan = make_plan(resolved.config, topology, price)
    if file:
        file.write_text(json.dumps(plan.as_dict(), indent=1) + "\n")
    if plan.too_large:
        from launch.plan_search import remedy

        gib, state = 2**30, plan.parameters + plan.optimizer
        needs = plan.too_large.used + (state / gib if plan.too_large.temporaries_alone else 0)
        raise ConfigError(
            f"{plan.config.name} on {topology.name} {plan.too_large}; parameters are {plan.parameters / gib:.2f} GiB, "
            f"optimizer state {plan.optimizer / gib:.2f} GiB: {remedy(plan.config, topology, plan.mesh, needs)} "
            f"(docs/memory.md; --search compiles what it proposes)"
        )
    show(plan, "" if "price" in options else f", list price, {PRICES_OF}")
    return 0


def check_plannable(config: Config) -> None:
    if config.distill.teacher:
        raise ConfigError(f"{config.distill.show('teacher')} can't be planned: only runs without a teacher can")


def number(option: str, text: str, whole: bool = False) -> float:
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        value = -1
    if not 0 <= value < math.inf:
        raise ConfigError(f"--{option} {text} is not a {'whole ' if whole else ''}number from 0 on")
    return value


def file_for(option: str, path: str) -> pathlib.Path:
    """Said before minutes of compiling, not after."""
    file = pathlib.Path(path).expanduser()
    if not file.parent.is_dir() or file.is_dir():
        raise ConfigError(
            f"--{option} {path} can't be written: {'it' if file.is_dir() else file.parent} is {'' if file.is_dir() else 'not '}a folder"
        )
    return file


def make_plan(config: Config, topology: Topology, price: float | None = None, compiled: bool = True) -> Plan:
    """Takes seconds without libtpu or `compiled`, and as long as the compiler with them. Raises ConfigError."""
    import jax

    from sharding.fallbacks import fallbacks
    from sharding.mesh import abstract_mesh, make_mesh, sizes_of, slice_notes
    from trainer.loop import check_batch
    from trainer.offload import HOST
    from trainer.program import bytes_per_device, make_program
    from trainer.tasks import make_task

    check_plannable(config)
    task = make_task(config)
    devices = aot.topology_devices(topology) if compiled and aot.has_libtpu() else None
    mesh: Any = make_mesh(config.mesh, devices) if devices else abstract_mesh(config.mesh, topology.devices)
    check_batch(config, mesh)
    with jax.set_mesh(mesh) if devices else jax.sharding.use_abstract_mesh(mesh):
        program = make_program(config, task, mesh)
        plan = Plan(
            config=config,
            topology=topology,
            mesh=sizes_of(mesh),
            notes=slice_notes(sizes_of(mesh), topology.slices) + fallbacks(program.state, mesh),
            count=sum(leaf.size for leaf in jax.tree.leaves(program.state.model)),
            parameters=bytes_per_device(program.state.model),
            optimizer=bytes_per_device(program.state.opt_state),
            batch=bytes_per_device(program.batch),
            moments_on_host=bytes_per_device(program.state.opt_state, HOST),
            unit=task.unit,
            units=task.units_per_step,
            flops=task.flops_per_step,
            price=price,
            compiled=None,
        )
        if devices is None:
            return plan
        began = time.perf_counter()
        try:
            executable = aot.compile_for_tpu(program.trace())
        except aot.TooLarge as too_large:
            return dataclasses.replace(plan, too_large=too_large)
        seconds = time.perf_counter() - began
    memory = executable.memory_analysis()
    found = Compiled(
        temporaries=memory.temp_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        host=memory.host_temp_size_in_bytes,
        program=memory.generated_code_size_in_bytes,
        seconds=seconds,
        estimate=estimate(executable.as_text(), machine(topology, mesh.devices.flat)),
        versions=f"jax {jax.__version__}, libtpu {importlib.metadata.version('libtpu')}",
    )
    return dataclasses.replace(plan, compiled=found)


def machine(topology: Topology, devices: Any) -> Machine:
    """The topology as a compiled program sees it, with its devices in the order of the mesh."""
    chip = topology.chip
    return Machine(
        peak=topology.peak,
        bandwidth=topology.bandwidth,
        clock=chip.clock,
        link=chip.link / chip.devices,
        dcn=chip.dcn / chip.devices,
        host=HOST_BANDWIDTH / chip.devices,
        places=tuple((getattr(d, "slice_index", 0), *d.coords) for d in devices),
        torus=chip.torus,
    )
