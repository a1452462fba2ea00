"""The section `privacy` of a config, differentially private training, and what a private run may not do (docs/privacy.md)."""

from dataclasses import dataclass
from typing import Any, ClassVar

from configs.section import ConfigError, Section, setting

_DATA = ("data", "result")


@dataclass(frozen=True, kw_only=True)
class PrivacyConfig(Section):
    """DP-SGD with the guarantee (epsilon, delta): arXiv 1607.00133, in the form of arXiv 2204.13650."""

    section: ClassVar[str] = "privacy"
    epsilon: float = setting(
        0.0,
        "the budget, which no step exceeds; 0: training is not private, and the rest of this section says nothing",
        low=0,
        changes=("result",),
    )
    delta: float = setting(0.0, "below one over the number of units", low=0, below=1, changes=("result",))
    noise: float = setting(
        0.0,
        "standard deviation of the noise over the clipped norm; 0: just enough for trainer.steps within the budget",
        low=0,
        changes=("result",),
    )
    clip: float = setting(
        1.0, "norm to which a unit's gradient is clipped, then called 1", above=0, changes=("recompile", "result")
    )
    unit: str = setting(
        "example",
        "whose presence stays unknown: an image's, a document's, or that of a whole group, such as all images of a patient",
        choices=("example", "group"),
        changes=_DATA,
    )
    rows: int = setting(
        1,
        "rows of a unit in one gradient: views of an image, images of a group, stretches of a document",
        low=1,
        changes=(*_DATA, "recompile"),
    )
    together: int = setting(
        1,
        "units whose gradients a device finds side by side, each a copy of all that learns",
        low=1,
        changes=("recompile",),
    )
    seed: int = setting(
        -1,
        "of sampling and noise; -1 draws a secret one. Who knows it can undo the noise: give one for experiments only",
        low=-1,
        changes=_DATA,
    )
    log_private: bool = setting(
        False,
        "also log the training loss and how many units are clipped, which no guarantee covers",
        changes=("recompile",),
    )

    def check(self) -> None:
        if self.epsilon and not self.delta:
            raise ConfigError(
                f"{self.show('epsilon')} needs privacy.delta, below one over the number of units, such as 1e-5"
            )


OPEN = PrivacyConfig()  # nothing is private


def check_privacy(config: Any) -> None:
    """Raises ConfigError where something else that the config asks for would break the guarantee."""
    privacy, data, guard = config.privacy, config.data, config.guard
    if not privacy.epsilon:
        return
    # Section, field, the only value that is allowed, and why.
    forbidden: list[tuple[Any, str, Any, str]] = [
        (guard, "threshold", 0.0, "it judges steps by losses that nothing hides"),
        (guard, "skip_batches", (), "a batch is drawn, and drawn batches are accounted for"),
        (config.optimizer, "sam_rho", 0.0, "its way up is another look at the batch, which is not accounted for"),
        (
            config.optimizer,
            "adaptive_clip",
            0.0,
            "units are clipped to privacy.clip before the noise, and noise needs no clip",
        ),
        (
            config.optimizer,
            "clip_norm",
            0.0,
            "units are clipped to privacy.clip before the noise, and noise needs no clip",
        ),
        (config.trainer, "microbatches", 1, "privacy.together says how many units a device works on at a time"),
        (config.distill, "teacher", "", "private distillation is not made here"),
        (config.mesh, "sequence", 1, "a device finds the gradients of its own units by itself"),
        (config.mesh, "tensor", 1, "a device finds the gradients of its own units by itself"),
    ]
    if data.kind == "images":
        forbidden += [
            (data, "mixup_alpha", 0.0, "a mixed image lets two people into one clipped gradient"),
            (data, "cutmix", False, "a mixed image lets two people into one clipped gradient"),
            (data, "multiplicity", 1, "privacy.rows says how many views of an image share its clipped gradient"),
        ]
    for section, field, only, why in forbidden:
        if getattr(section, field) != only:
            raise ConfigError(
                f"{section.show(field)} contradicts {privacy.show('epsilon')}: {why}; {only!r} is allowed"
            )
    if guard.policy == "rollback":
        raise ConfigError(
            f"{guard.show('policy')} contradicts {privacy.show('epsilon')}: a step that was taken has spent its part of the "
            f"budget; 'abort' and 'skip' are allowed"
        )
    if data.kind not in ("images", "text"):
        raise ConfigError(
            f"data.kind={data.kind!r} contradicts {privacy.show('epsilon')}: its rows are of several units or of none; "
            f"'images' and 'text' are allowed"
        )
    if privacy.unit == "group" and data.kind != "images":
        raise ConfigError(f"{privacy.show('unit')} contradicts data.kind={data.kind!r}: 'example' is a document there")
