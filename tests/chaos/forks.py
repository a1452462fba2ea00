"""Trainings that start in a second: everything is imported once, and each process is a fork of that."""

import multiprocessing
import os
import pathlib
import socket
import sys
from multiprocessing.context import ForkServerProcess

PRELOAD = ["launch.cli", "trainer.loop", "trainer.inspect_saved", "data.text", "models.griffin", "tensorboardX"]


def run(words: list[str], environment: dict[str, str], log: str) -> None:
    """In the fork: `podwright WORDS`, its output appended to `log`."""
    os.environ.pop("XLA_FLAGS", None)
    os.environ.update(environment)
    output = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    from launch.cli import main

    code = 1
    try:
        code = main(words)
    finally:
        sys.stdout.flush()
        os._exit(code)


def start(words: list[str], processes: int, log: pathlib.Path) -> list[ForkServerProcess]:
    """The processes of one job, as a launcher starts them."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(PRELOAD)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    started = []
    for index in range(processes):
        told = {
            "PODWRIGHT_COORDINATOR": address,
            "PODWRIGHT_PROCESSES": str(processes),
            "PODWRIGHT_PROCESS": str(index),
        }
        told = told if processes > 1 else {}
        process = forks.Process(target=run, args=(words, told, f"{log}.{index}"))
        process.start()
        started.append(process)
    return started
