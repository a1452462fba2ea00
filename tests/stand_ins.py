"""Schedulers' clients that stand in for the real ones: on PATH for a test, with a state that it reads and changes."""

import json
import os
import pathlib
import sys
import threading
import time
from collections.abc import Iterable

import fake_gcloud

from launch.cli import main
from launch.jobs import code, planned

EMPTY_WHEEL = b"PK\5\6" + 18 * b"\0"  # a zip file without files


def installed(folder: pathlib.Path, commands: Iterable[str], fake, monkeypatch, named: bool = False) -> pathlib.Path:
    """`folder` with programs of these names, which are on PATH and run the module `fake` with the folder and, where it stands for
    several, the program's name."""
    (folder / "bin").mkdir(parents=True)
    for command in commands:
        program = folder / "bin" / command
        own = f"{command} " if named else ""
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E {fake.__file__} {folder} {own}"$@"\n')
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    return folder


def without_code_and_plan(monkeypatch) -> None:
    """Of a launch whose hosts run stubs."""
    monkeypatch.setattr(code, "build_wheel", lambda ref: ("podwright-0.1.0-py3-none-any.whl", EMPTY_WHEEL))
    monkeypatch.setattr(planned, "plan_lines", lambda config, topology, spot: iter(["not here"]))


def known(folder: pathlib.Path) -> dict:
    with fake_gcloud.state(folder) as state:
        return json.loads(json.dumps(state))


def tell(folder: pathlib.Path, **facts) -> None:
    with fake_gcloud.state(folder) as state:
        state.update(facts)


def until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.03)


def in_background(argv: list[str]) -> tuple[threading.Thread, list[int]]:
    ended: list[int] = []
    thread = threading.Thread(target=lambda: ended.append(main(argv)), daemon=True)
    thread.start()
    return thread, ended
