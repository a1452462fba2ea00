"""Units of work on all cores, with progress. A unit that is done is on disk, so nothing is lost when this is killed."""

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

PLAIN_LINE_SECONDS = 10.0


work: Callable[..., None]  # of a process of the pool: what it does with each unit


def in_parallel(function: Callable[..., None], todo: Mapping[int, tuple], total: int, workers: int, what: str) -> None:
    """Calls function(unit, *arguments) for all of `todo`, of `total` units, in `workers` processes (0: one a core)."""
    if 0 < len(todo) < total:
        print(f"{what}: {total - len(todo):,} of {total:,} units were done before", flush=True)
    workers = min(workers or os.cpu_count() or 1, len(todo))
    progress = Progress(what, total, total - len(todo))
    with progress:
        if workers <= 1:
            for unit, arguments in todo.items():
                function(unit, *arguments)
                progress.advance()
            return
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, spawn, start, (os.getpid(), function)) as pool:
            futures = [pool.submit(run, unit, *arguments) for unit, arguments in todo.items()]
            try:
                for future in as_completed(futures):
                    future.result()
                    progress.advance()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def run(*arguments: Any) -> None:
    work(*arguments)


def start(parent: int, function: Callable[..., None]) -> None:
    """In a process of the pool: keep the function, which may be large, and end with the parent. Left alone, a pool's
    processes wait for ever for work from a parent that was killed."""
    global work
    work = function

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Progress:
    """A bar on a terminal, elsewhere a line every ten seconds."""

    def __init__(self, what: str, total: int, done: int) -> None:
        self.what, self.total, self.done = what, total, done
        self.said = time.monotonic()
        self.bar: Any = None

    def __enter__(self) -> "Progress":
        if sys.stdout.isatty():
            from rich.progress import Progress as Bar

            self.bar = Bar(transient=True)
            self.bar.start()
            self.task = self.bar.add_task(self.what, total=self.total, completed=self.done)
        return self

    def __exit__(self, *error: Any) -> None:
        if self.bar:
            self.bar.stop()

    def advance(self) -> None:
        self.done += 1
        if self.bar:
            self.bar.advance(self.task)
        elif time.monotonic() - self.said > PLAIN_LINE_SECONDS:
            self.said = time.monotonic()
            print(f"{self.what}: {self.done:,} of {self.total:,} units", flush=True)
