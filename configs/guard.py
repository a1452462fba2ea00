"""The section of a config that says what a run does about a loss or a gradient gone wrong (docs/survive.md)."""

import re
from dataclasses import dataclass
from typing import ClassVar

from configs.section import ConfigError, Section, setting


@dataclass(frozen=True, kw_only=True)
class GuardConfig(Section):
    section: ClassVar[str] = "guard"
    policy: str = setting(
        "abort",
        "after a bad step: end the run, skip its update, or roll back to a checkpoint and leave its batch out",
        choices=("abort", "skip", "rollback"),
        changes=("recompile",),
    )
    threshold: float = setting(
        0.0,
        "robust z-score of the loss or the gradient norm above which a step is bad; 0: only NaN and infinity are",
        low=0,
        changes=("recompile",),
    )
    window: int = setting(
        128, "good steps whose median and spread a z-score compares with", low=8, changes=("recompile",)
    )
    batches: int = setting(1, "batches that a rollback leaves out, the bad step's the last of them", low=1)
    limit: int = setting(5, "rollbacks of a run, or skipped updates in a row, after which it ends", low=1)
    skip_batches: tuple[str, ...] = setting(
        (), "batches to leave out, as 41-45,60; counted from 1 as if none were", changes=("data", "result")
    )

    def check(self) -> None:
        windows_of(self.skip_batches)


def windows_of(words: tuple[str, ...]) -> list[tuple[int, int]]:
    """("41-45", "60") -> [(41, 45), (60, 60)]. Raises ConfigError."""
    windows = []
    for word in words:
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", word)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not 1 <= first <= last:
            raise ConfigError(
                f"guard.skip_batches={','.join(words)} names no batches in {word!r}: numbers from 1 and ranges of them are "
                f"allowed, such as 41-45,60"
            )
        windows.append((first, last))
    return windows


UNGUARDED = GuardConfig()  # a bad step ends the run
