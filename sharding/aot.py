"""Compiling for TPUs that aren't there, with libtpu on any machine."""

import importlib.util
import os
import re
from dataclasses import dataclass
from typing import Any

from configs.schema import ConfigError
from sharding.topologies import Topology

# What libtpu must find to compile without a TPU, quietly and beside other processes that do the same.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
}


def prepare() -> None:
    """To be called before jax is imported: it and libtpu read their environment once."""
    os.environ.update(ENVIRONMENT)


def has_libtpu() -> bool:
    return importlib.util.find_spec("libtpu") is not None


def topology_devices(topology: Topology) -> list:
    from jax.experimental import topologies

    return topologies.get_topology_desc(
        platform="tpu", topology_name=topology.libtpu_name, **topology.libtpu_options
    ).devices


@dataclass(frozen=True)
class TooLarge(Exception):
    """The compiler found no way to fit a program into HBM; GiB of a device."""

    used: float
    capacity: float

    def __str__(self) -> str:
        return (
            f"does not fit: it takes {self.used:,.2f} GiB of {self.capacity:,.2f} GiB HBM a device, "
            f"{self.used - self.capacity:,.2f} GiB too much"
        )


def compile_for_tpu(traced: Any) -> Any:
    """The compiled program of a traced one. Raises TooLarge."""
    import jax

    try:
        return traced.lower(lowering_platforms=("tpu",)).compile()
    except jax.errors.JaxRuntimeError as error:
        raise too_large(str(error)) or error from None


def too_large(message: str) -> TooLarge | None:
    """What the compiler's RESOURCE_EXHAUSTED says; None if it is another failure."""
    found = re.search(r"Used ([\d.]+)([KMGT])\w* of ([\d.]+)([KMGT])\w* hbm", message)
    if not found:
        return None
    unit = {"K": 2**-20, "M": 2**-10, "G": 1.0, "T": 2.0**10}
    return TooLarge(float(found[1]) * unit[found[2]], float(found[3]) * unit[found[4]])


def check_devices(found: int, topology: Topology) -> None:
    if found != topology.devices:
        raise ConfigError(f"libtpu knows {found} devices in {topology.libtpu_name}, but we {topology.devices}")
