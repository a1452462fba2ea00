"""The sections of a config that start from, or learn from, another run: `finetune` and `distill`. See configs/schema.py."""

from dataclasses import dataclass
from typing import ClassVar

from configs.section import ConfigError, Section, setting

_ARCH = ("recompile", "checkpoint", "result")
_MATH = ("recompile", "result")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(Section):
    section: ClassVar[str] = "finetune"
    base: str = setting("", "a run whose newest parameters to start from; empty for random ones", changes=("result",))
    new_head: bool = setting(
        False, "start the classifier anew, for other classes than the base's (images)", changes=("result",)
    )
    layer_decay: float = setting(
        1.0,
        "each block's learning rate over that of the block above it, from the head down (images); 1 for all alike",
        above=0,
        high=1,
        changes=_MATH,
    )
    learns: tuple[str, ...] = setting(
        (),
        "parameters that learn, by their names or the places above them, such as head,final_conv; empty for all",
        changes=_ARCH,
    )
    lora_rank: int = setting(
        0,
        "rank of what is added to each matrix and alone learns (arXiv 2106.09685); 0: all parameters learn",
        low=0,
        changes=_ARCH,
    )
    lora_alpha: float = setting(16.0, "what is added is scaled by alpha / rank", above=0, changes=_MATH)

    def check(self) -> None:
        if self.new_head and not self.base:
            raise ConfigError(f"{self.show('new_head')} has nothing to start from: give finetune.base")
        if self.learns and self.lora_rank:
            raise ConfigError(
                f"{self.show('learns')} contradicts {self.show('lora_rank')}: only what is added learns then, and learns must be "
                f"empty"
            )


@dataclass(frozen=True, kw_only=True)
class DistillConfig(Section):
    """Learning from a larger model's distribution, as Gemma 2 and 3 do: arXiv 2408.00118, 2503.19786."""

    section: ClassVar[str] = "distill"
    teacher: str = setting(
        "", "a run whose newest parameters teach, of any family with the same tokenizer; empty for none", changes=_MATH
    )
    samples: int = setting(
        0,
        "tokens drawn from the teacher's distribution at each place (Gemma 3: 256); 0 for all of it (Gemma 2)",
        low=0,
        changes=_MATH,
    )
    weight: float = setting(
        1.0, "share of the loss that is the teacher's, the rest is the data's", above=0, high=1, changes=_MATH
    )

    def check(self) -> None:
        for name, default in (("samples", 0), ("weight", 1.0)):
            if not self.teacher and getattr(self, name) != default:
                raise ConfigError(f"{self.show(name)} has no teacher: give distill.teacher")
