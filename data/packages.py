"""Packages that only some data needs."""

import importlib
from typing import Any

from data.dataset import DataError


def needed(module: str, file: str, extra: str = "data") -> Any:
    """Raises DataError, in one sentence, where the package is not installed; `file` is what needs it, `extra` what installs it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0].replace("PIL", "pillow")
        raise DataError(f"{file} needs the package {package}: pip install -e '.[{extra}]'") from None
