"""The section `optimizer` of a config: the update rule and what surrounds it. See configs/schema.py."""

from dataclasses import dataclass
from typing import ClassVar

from configs.section import ConfigError, Section, setting

_MATH = ("recompile", "result")
RULES = ("adamw", "sgd", "lion", "muon", "schedule-free", "shampoo", "soap")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section):
    section: ClassVar[str] = "optimizer"
    name: str = setting("adamw", "update rule", choices=RULES, changes=("recompile", "checkpoint", "result"))
    learning_rate: float = setting(3e-3, "peak learning rate", above=0, changes=_MATH)
    schedule: str = setting("cosine", "after warm-up", choices=("cosine", "constant"), changes=_MATH)
    warmup_steps: int = setting(20, "steps of linear warm-up", low=0, changes=_MATH)
    final_fraction: float = setting(
        0.1, "learning rate at the end over its peak (cosine)", low=0, high=1, changes=_MATH
    )
    beta1: float = setting(
        0.9,
        "Adam's first moment, SGD's and Muon's Nesterov momentum, Lion's weight of the past",
        low=0,
        below=1,
        changes=_MATH,
    )
    beta2: float = setting(
        0.95, "Adam's second moment, Shampoo's and SOAP's statistics, Lion's momentum", low=0, below=1, changes=_MATH
    )
    eps: float = setting(1e-8, "Adam's epsilon", above=0, changes=_MATH)
    weight_decay: float = setting(
        0.1, "coupled L2 for sgd, decoupled for the others; matrices only, by name", low=0, changes=_MATH
    )
    clip_norm: float = setting(1.0, "global gradient norm clip; 0 for none", low=0, changes=_MATH)
    adaptive_clip: float = setting(0.0, "adaptive gradient clipping (NFNet: 0.01); 0 for none", low=0, changes=_MATH)
    power: float = setting(
        1.0,
        "sgd on phi, where matrices are phi |phi|^(power - 1): small weights stay small (2110.00296); 1 for none",
        low=1,
        changes=_MATH,
    )
    precondition_every: int = setting(
        10, "updates from one root (shampoo) or eigenbasis (soap) of the statistics to the next", low=1, changes=_MATH
    )
    precondition_limit: int = setting(
        1024,
        "longest side of a matrix that shampoo and soap have statistics of",
        low=0,
        changes=("recompile", "checkpoint", "result"),
    )
    graft: bool = setting(
        True,
        "shampoo's steps are as long as Adam's (2002.09018); false: as long as they come, which wants rates of its own",
        changes=_MATH,
    )
    ema: float = setting(
        0.0,
        "decay of an average of the parameters, min(ema, (1 + step) / (10 + step)) (2102.06171: 0.99999); 0 for none",
        low=0,
        below=1,
        changes=("recompile", "checkpoint"),
    )
    sam_rho: float = setting(
        0.0, "distance that sharpness-aware minimisation climbs (2102.06171: 0.05); 0 for none", low=0, changes=_MATH
    )
    sam_share: float = setting(
        1.0, "share of the batch that says where to climb (2102.06171: 0.2)", above=0, high=1, changes=_MATH
    )
    sam_ascent: str = setting(
        "synced",
        "climb with all devices' gradient, or each with that of its own rows (parameters whole on every device)",
        choices=("synced", "local"),
        changes=_MATH,
    )
    offload: bool = setting(False, "keep moments in the host's memory between updates", changes=("recompile",))

    def check(self) -> None:
        for name, default in (("sam_share", 1.0), ("sam_ascent", "synced")):
            if not self.sam_rho and getattr(self, name) != default:
                raise ConfigError(f"{self.show(name)} has no step to climb: give optimizer.sam_rho")
        both = ("shampoo", "soap")
        for name, default, rules in (
            ("precondition_every", 10, both),
            ("precondition_limit", 1024, both),
            ("graft", True, both[:1]),
        ):
            if self.name not in rules and getattr(self, name) != default:
                only = f"only {' and '.join(rules)} {'have' if len(rules) > 1 else 'has'} it"
                raise ConfigError(f"{self.show(name)} contradicts {self.show('name')}: {only}")
        if self.power != 1 and self.name != "sgd":
            raise ConfigError(
                f"{self.show('power')} contradicts {self.show('name')}, which divides by what keeps small weights small: "
                f"1 is allowed, or optimizer.name='sgd'"
            )
        if self.name == "schedule-free":
            self.check_schedule_free()

    def check_schedule_free(self) -> None:
        # Field, whether its value will not do, why, and what does.
        for name, wrong, why, allowed in (
            ("schedule", self.schedule != "constant", "its average takes the place of a decay", "'constant'"),
            ("beta1", self.beta1 == 0, "gradients are taken there between average and newest", "a number above 0"),
            ("ema", self.ema != 0, "it has an average of its own", "0"),
            ("offload", self.offload, "its average is found with every step", "false"),
        ):
            if wrong:
                raise ConfigError(f"{self.show(name)} contradicts {self.show('name')}: {why}; {allowed} is allowed")

    @property
    def averages(self) -> bool:
        """Whether a run keeps an average of its parameters, which is then the model that it makes."""
        return bool(self.ema) or self.name == "schedule-free"


PLAIN = OptimizerConfig()
