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
    capacity: float  # what the compiler leaves to programs
    temporaries_alone: bool = False  # `used` is without the arguments

    def __str__(self) -> str:
        takes = "its temporaries alone take" if self.temporaries_alone else "it takes"
        return (
            f"does not fit: {takes} {self.used:,.2f} GiB of the {self.capacity:,.2f} GiB HBM of a device, "
            f"{self.used - self.capacity:,.2f} GiB too much"
        )


def compile_for_tpu(traced: Any) -> Any:
    """The compiled program of a traced one. Raises TooLarge, ConfigError."""
    import jax

    from sharding.flags import compiled

    try:
        return compiled(traced.lower(lowering_platforms=("tpu",)))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise too_large(str(error)) or ConfigError(f"the compiler finds no room for this step: {reason}") from None


UNITS = {"K": 2**-20, "M": 2**-10, "G": 1.0, "T": 2.0**10}
SIZE = r"([\d.]+)([KMGT])\w*"


def too_large(message: str) -> TooLarge | None:
    """What the compiler's RESOURCE_EXHAUSTED says; None if it is another failure."""
    whole = re.search(rf"Used {SIZE} of {SIZE} hbm", message)
    part = re.search(rf"memory required for HLO temporaries \({SIZE}\) exceeds available HBM \({SIZE}\)", message)
    found = whole or part
    if not found:
        return None
    return TooLarge(float(found[1]) * UNITS[found[2]], float(found[3]) * UNITS[found[4]], temporaries_alone=not whole)
