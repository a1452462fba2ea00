"""Memory of the host: optimizer state that is kept there between updates, and whether these devices have any of it."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from configs.schema import Config, ConfigError

HOST = "pinned_host"


def check_host_memory(config: Config, mesh: Mesh) -> None:
    """Raises ConfigError if the config asks for memory of the host that a program of these devices cannot use."""
    device = mesh.devices.flat[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST in kinds:
        return
    for section, field, rest in ((config.trainer, "offload", "empty"), (config.optimizer, "offload", "false")):
        if getattr(section, field):
            raise ConfigError(
                f"{section.show(field)} needs memory of kind {HOST}, but {device.device_kind} devices have only "
                f"{', '.join(kinds)}: it must be {rest} here"
            )


def notes(config: Config, mesh: Mesh) -> list[str]:
    """XLA:CPU takes memory kinds for what they are, names of the same memory: it computes the same and copies once more."""
    offloads = config.trainer.offload or config.optimizer.offload
    return ["a CPU's host memory is its own: offload saves nothing here"] * bool(
        offloads and mesh.devices.flat[0].platform == "cpu"
    )


def moments_on_host(abstract: Any) -> Any:
    """Shapes and shardings of an optimizer's state, its arrays in the host's memory; counts stay where they are."""
    return of_arrays(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding.with_memory_kind(HOST)), abstract
    )


def moments_here(opt_state: Any) -> Any:
    """Inside a program: the arrays in the device's memory."""
    return of_arrays(lambda x: jax.device_put(x, jax.memory.Space.Device), opt_state)


def moments_away(opt_state: Any) -> Any:
    """Inside a program: the arrays in the host's memory."""
    return of_arrays(lambda x: jax.device_put(x, jax.memory.Space.Host), opt_state)


def of_arrays(change: Callable, opt_state: Any) -> Any:
    return jax.tree.map(lambda leaf: change(leaf) if leaf.ndim else leaf, opt_state)
