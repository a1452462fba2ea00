"""How long a run may stay in one phase before it counts as stuck."""

from dataclasses import dataclass
from typing import ClassVar

from configs.section import Section, setting


@dataclass(frozen=True, kw_only=True)
class WatchdogConfig(Section):
    section: ClassVar[str] = "watchdog"
    policy: str = setting(
        "exit",
        "when a phase is stuck or a host is lost: 'tell' what is known, or also 'exit' with code 124",
        choices=("tell", "exit"),
    )
    init: float = setting(3600.0, "seconds until the program can be compiled, the data's preparation included", above=0)
    compile: float = setting(7200.0, "seconds to compile", above=0)
    restore: float = setting(3600.0, "seconds to read a checkpoint", above=0)
    data_wait: float = setting(900.0, "seconds to wait for a batch", above=0)
    step: float = setting(
        120.0,
        "seconds of a step, or 20 median steps if they are longer; the first steps have 10 times as long",
        above=0,
    )
    save: float = setting(1800.0, "seconds for which a save may hold up training, or the last one take", above=0)
    eval: float = setting(3600.0, "seconds of an evaluation", above=0)
    silence: float = setting(30.0, "seconds without a sign of life after which another host counts as lost", above=0)
