"""Pickles that name functions which are not there, or that do harm: what tests give to readers."""

import sys
import types
from collections.abc import Callable
from typing import Any


class Call:
    """Pickled as the call of a function, whose result is then given a state."""

    def __init__(self, function: object, *arguments: Any, state: Any = None):
        self.how = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.how


def named(monkeypatch: Any, module: str, name: str) -> Callable:
    """A function that pickle writes as `module.name`, whether there is such a package or not."""

    def function(*arguments: Any) -> None:
        raise AssertionError(f"{module}.{name} was called")

    function.__module__, function.__qualname__, function.__name__ = module, name, name
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        path = ".".join(parts[:end])
        if path not in sys.modules or end == len(parts):
            fake = types.ModuleType(path)
            fake.__dict__.update(vars(sys.modules[path]) if path in sys.modules else {})
            monkeypatch.setitem(sys.modules, path, fake)
    setattr(sys.modules[module], name, function)
    return function
