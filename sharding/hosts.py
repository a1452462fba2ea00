"""Several processes that train together, one a host: joining them, agreeing, and what each of them reads."""

import contextlib
import itertools
import json
import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from sharding.joining import gather, impatient
from sharding.rules import rules_for

PATIENCE = 3600  # seconds that hosts wait for one that prepares data or compiles; one that died ends all much sooner

# How `podwright launch --on local` tells its processes apart.
ADDRESS, COUNT, INDEX = "PODWRIGHT_COORDINATOR", "PODWRIGHT_PROCESSES", "PODWRIGHT_PROCESS"

meetings = itertools.count()  # each has a number of its own


class AnotherHost(Exception):
    """Another host could not go on; it says why itself."""


def join() -> None:
    """Join the job's other processes, if there are any. Must run before jax starts its backend.

    On TPU pods, Slurm and Kubernetes jax finds them itself; a machine that is no part of such a job stays alone. After 30
    seconds it is told who is missing. Raises NotJoined.
    """
    if INDEX in os.environ:
        count, index = int(os.environ[COUNT]), int(os.environ[INDEX])
        gather(os.environ[ADDRESS], count, index)
        jax.distributed.initialize(os.environ[ADDRESS], count, index)
        return
    try:
        with impatient():
            jax.distributed.initialize()
    except ValueError as error:
        if "coordinator_address" not in str(error):
            raise
    except RuntimeError as error:
        # Called by a program that has used jax before. On a pod orbax would miss the connection, and say so.
        if "must be called before" not in str(error):
            raise


def on_this_machine() -> int:
    """How many processes of the job share this machine, and thus its simulated devices."""
    return int(os.environ.get(COUNT, 1))


def first() -> bool:
    """Whether this is the process that writes and prints for all."""
    return jax.process_index() == 0


def meet() -> None:
    """Wait for all hosts, before they run what each of them compiled on its own.

    Collectives between CPUs (gloo) give up on a host that comes more than 30 seconds late, whatever XLA's flags say.
    """
    if jax.process_count() > 1:
        ocp.multihost.get_barrier_sync_fn()(key=f"podwright-{next(meetings)}", timeout_ms=1000 * PATIENCE)


def publish(topic: str, text: str) -> None:
    """Let all hosts read what this one says of a topic, in place of what it said before; through the coordinator, host 0,
    without which this blocks or fails."""
    client = ocp.multihost.get_jax_distributed_client()
    client.key_value_set(f"podwright/{topic}/{jax.process_index()}", text, allow_overwrite=True)


def published(topic: str) -> dict[int, str]:
    """What each host has said of a topic, by its number."""
    said = ocp.multihost.get_jax_distributed_client().key_value_dir_get(f"podwright/{topic}/")
    return {int(key.rpartition("/")[2]): text for key, text in said}


def exchanged(text: str) -> dict[int, str]:
    """What every host says here, by its number. Waits for all."""
    topic = f"exchange-{next(meetings)}"
    publish(topic, text)
    meet()
    return published(topic)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A failure inside is every host's: those without one of their own raise AnotherHost instead of waiting for ever."""
    failure: BaseException | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if jax.process_count() > 1:
        meet()
        failed = np.flatnonzero(multihost_utils.process_allgather(np.array(failure is not None)))
        if failure is None and failed.size:
            raise AnotherHost(f"host {failed[0]} could not go on, and says why")
    if failure is not None:
        raise failure


def gathered(own: np.ndarray) -> np.ndarray:
    """(hosts ...): the array of each host, of one shape on all."""
    if jax.process_count() == 1:
        return own[None]
    with jax.transfer_guard("allow"):
        return np.asarray(multihost_utils.process_allgather(own))


def from_first(told: Any) -> Any:
    """What the first host gives, on every host; anything that JSON knows."""
    if jax.process_count() == 1:
        return told
    text = np.frombuffer(json.dumps(told).encode(), np.uint8)
    length = multihost_utils.broadcast_one_to_all(np.array(len(text)))
    text = multihost_utils.broadcast_one_to_all(np.resize(text, int(length)))
    return json.loads(np.asarray(text).astype(np.uint8).tobytes())


def asked_to_stop(step: int) -> bool:
    """Whether a host was told to stop and all are to do so after this step: the same answer on every host. (jax listens for
    SIGTERM and for a cloud's notice of preemption.)"""
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)


def host_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Which rows of a batch this process's devices need, ascending; hosts that share sequences or tensors need the same."""
    sharding = NamedSharding(mesh, rules_for(mesh).spec("batch"))
    parts = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[part] for part in parts]))
