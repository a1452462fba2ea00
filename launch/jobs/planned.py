"""What `launch` says before it acts: whether the step can fit, how long it takes and what that costs, by arithmetic alone.
`podwright plan` compiles it."""

from collections.abc import Iterator

from configs.schema import Config, ConfigError
from sharding.topologies import PRICES_OF, Topology

GIB = 2**30


def plan_lines(config: Config, topology: Topology, spot: bool) -> Iterator[str]:
    """Takes seconds. Raises ConfigError where what is certain does not fit, or where a mesh is not the topology's."""
    if config.distill.teacher:
        yield "not planned: only runs without a teacher can be"
        return
    from launch.plan import make_plan
    from sharding.arithmetic import predict

    plan = make_plan(config, topology, topology.chip.price, compiled=False)
    state = plan.parameters + plan.optimizer
    if state > topology.hbm:
        raise ConfigError(
            f"{config.name} does not fit {topology.describe()}: parameters and optimizer state are {state / GIB:.2f} GiB a "
            f"device, which has {topology.hbm / GIB:.2f}: `podwright plan {config.name} --topology {topology.name} "
            f"--slices {topology.slices} --search` looks for what fits"
        )
    guess = predict(config, topology, plan.mesh, plan.count, plan.flops)
    hours = config.trainer.steps * guess.seconds / 3600
    fit = "" if guess.bytes <= topology.hbm else ", which may well be too much"
    axes = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    yield f"{plan.count:,} parameters on {topology.devices:,} devices ({axes})"
    yield f"about {guess.bytes / GIB:.1f} of {topology.hbm / GIB:.1f} GiB a device{fit}; about {1e3 * guess.seconds:,.0f} ms a step"
    cost = f"{config.trainer.steps:,} steps: about {hours:,.1f} hours, {hours * topology.chips:,.0f} chip-hours"
    if plan.price is None:
        yield f"{cost}; no public price of {topology.name} is known"
    else:
        usd, kind = hours * topology.chips * plan.price, "; spot costs less" if spot else ""
        yield f"{cost}, ${usd:,.0f} at the list price of {PRICES_OF} (${plan.price:.2f} a chip-hour{kind})"
    yield f"a rough guess; podwright plan {config.name} --topology {topology.name} --slices {topology.slices} compiles the step"
