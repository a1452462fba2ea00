"""What a run is: frozen, validated dataclasses. Pure Python, so a mistake is reported before jax is imported.

Every field stands on one line: default, help, allowed values, and what changing it in an existing run does
(`changes`): "recompile" (another XLA program), "data" (step N sees another batch), "checkpoint" (saved arrays no
longer fit), "result" (the same batches lead to other parameters). A field without `changes` is free to change.
"""

import dataclasses
import typing
from dataclasses import dataclass
from typing import ClassVar

from configs.biographies import BiographyData
from configs.data_sections import (
    ChatData,
    CVData,
    DataConfig,
    ImageData,
    PreparedData,
    RecallData,
    TextData,
    TokenizedData,
)
from configs.finetune import DistillConfig, FinetuneConfig
from configs.guard import UNGUARDED, GuardConfig
from configs.long_range_data import LongRangeData, check_long_range
from configs.model_sections import GemmaConfig, GriffinConfig, LRUConfig, ModelConfig, NFNetConfig
from configs.optimizer import PLAIN, OptimizerConfig
from configs.privacy import OPEN, PrivacyConfig, check_privacy
from configs.remat import check_remat
from configs.section import ConfigError, Section, setting
from configs.shared_images import check_shared_images, whole_images
from configs.watchdog import WatchdogConfig

_MATH = ("recompile", "result")  # same arrays, another computation


@dataclass(frozen=True, kw_only=True)
class MeshConfig(Section):
    """Devices along each axis; -1 takes what the others leave. Results agree across meshes to rounding."""

    section: ClassVar[str] = "mesh"
    replica: int = setting(1, "copies across slices", low=-1, changes=("recompile",))
    data: int = setting(-1, "data-parallel devices", low=-1, changes=("recompile",))
    fsdp: int = setting(1, "devices that share parameters and optimizer state", low=-1, changes=("recompile",))
    sequence: int = setting(
        1, "devices that share a sequence of tokens, or an image's rows", low=1, changes=("recompile",)
    )
    tensor: int = setting(1, "devices that share heads and hidden units", low=-1, changes=("recompile",))
    simulated_devices: int = setting(0, "CPU devices to simulate; 0 uses the real ones", low=0, changes=("recompile",))

    def check(self) -> None:
        sizes = {axis: getattr(self, axis) for axis in MESH_FIELDS}
        for axis, size in sizes.items():
            if size == 0:
                raise ConfigError(
                    f"{self.show(axis)} leaves no device: give a positive number, or -1 for the devices the other axes leave"
                )
        fill = [axis for axis, size in sizes.items() if size == -1]
        if len(fill) > 1:
            raise ConfigError(
                f"{self.show(fill[1])} contradicts {self.show(fill[0])}: only one axis can take the devices that are left"
            )


MESH_FIELDS = ("replica", "data", "fsdp", "sequence", "tensor")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section):
    section: ClassVar[str] = "checkpoint"
    every: int = setting(100, "steps between saves; the last step is always saved", low=1)
    keep_last: int = setting(3, "newest checkpoints kept", low=1)
    keep_every: int = setting(0, "also keep every step divisible by this; 0 for none", low=0)


@dataclass(frozen=True, kw_only=True)
class TrainerConfig(Section):
    section: ClassVar[str] = "trainer"
    steps: int = setting(300, "optimizer updates in all", low=1, changes=_MATH)
    seed: int = setting(0, "initialisation and dropout", low=0, changes=_MATH)
    compute_dtype: str = setting("float32", "dtype of matrix products", choices=("float32", "bfloat16"), changes=_MATH)
    remat: str = setting(
        "none",
        "what the backward pass recomputes: 'none' of a layer, all but its matrix products ('dots'), or the 'layer'",
        choices=("none", "dots", "layer"),
        changes=("recompile",),
    )
    microbatches: int = setting(
        1,
        "parts of a batch that run one after another, their gradients summed: each needs the memory of its own rows",
        low=1,
        changes=("recompile",),
    )
    save: tuple[str, ...] = setting(
        (), "tensors of a layer that remat 'layer' keeps on the device (docs/memory.md)", changes=("recompile",)
    )
    offload: tuple[str, ...] = setting(
        (), "tensors of a layer that remat 'layer' keeps in the host's memory", changes=("recompile",)
    )
    logits_mib: int = setting(
        256, "MiB of logits that a device holds at a time (language models)", low=1, changes=("recompile",)
    )
    z_loss: float = setting(
        0.0, "coefficient of log(Z)^2 in the training loss (language models); 0 for none", low=0, changes=_MATH
    )
    log_every: int = setting(10, "steps between printed lines; the metrics file has every step", low=1)
    compilation_cache: str = setting("~/.cache/podwright/xla", "folder of compiled programs; empty for none")


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Section):
    section: ClassVar[str] = "eval"
    every: int = setting(100, "steps between evaluations on held-out data; 0 for none before the end", low=0)
    batches: int = setting(8, "held-out batches an evaluation; 0 for all", low=0)


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run. `podwright config NAME` prints one; any field can be set as --section.field VALUE."""

    name: str = dataclasses.field(metadata=dict(help="what this config is called"))
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig = PLAIN
    finetune: FinetuneConfig = FinetuneConfig()  # noqa: RUF009 (frozen)
    distill: DistillConfig = DistillConfig()  # noqa: RUF009 (frozen)
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    trainer: TrainerConfig = TrainerConfig()
    guard: GuardConfig = UNGUARDED
    privacy: PrivacyConfig = OPEN
    eval: EvalConfig = EvalConfig()
    watchdog: WatchdogConfig = WatchdogConfig()  # noqa: RUF009 (frozen)

    def __post_init__(self) -> None:
        text, image = not isinstance(self.data, ImageData), isinstance(self.model, NFNetConfig)
        if text == image:
            raise ConfigError(
                f"data.kind={self.data.kind!r} contradicts model.kind={self.model.kind!r}: "
                f"{self.model.kind} trains on {'images' if image else 'text'}"
            )
        if self.mesh.tensor != 1 and image:
            raise ConfigError(
                f"{self.mesh.show('tensor')} contradicts model.kind={self.model.kind!r}: only language models divide heads "
                f"and hidden units among devices, the others need mesh.tensor=1; mesh.fsdp divides their parameters"
            )
        if not isinstance(self.data, ImageData) and self.data.sequence_length % self.mesh.sequence:
            raise ConfigError(
                f"{self.data.show('sequence_length')} is not a multiple of {self.mesh.show('sequence')}, the devices "
                f"that share a sequence"
            )
        if isinstance(self.data, ImageData) and isinstance(self.model, NFNetConfig):
            labels = len(self.data.labels)
            if labels and self.model.num_classes != labels:
                raise ConfigError(
                    f"{self.model.show('num_classes')} does not fit the {labels} labels of data.labels: {labels} is allowed"
                )
            check_shared_images(self.data, self.mesh)
        if isinstance(self.data, LongRangeData):
            check_long_range(self.model, self.data, self.mesh)
        if isinstance(self.model, LRUConfig):
            if self.model.pooling != "none" and not isinstance(self.data, LongRangeData):
                raise ConfigError(
                    f"{self.model.show('pooling')} contradicts data.kind={self.data.kind!r}, whose labels are those of tokens: "
                    f"'none' is allowed"
                )
            if self.model.dense and self.mesh.sequence > 1:
                raise ConfigError(
                    f"{self.mesh.show('sequence')} contradicts {self.model.show('recurrence')}: devices can't share a sequence "
                    f"whose states are no products, 1 is allowed"
                )
        check_remat(self.model, self.trainer)
        check_privacy(self)
        if image and self.trainer.z_loss:
            raise ConfigError(
                f"{self.trainer.show('z_loss')} contradicts model.kind={self.model.kind!r}: only language models have it, "
                f"0 is allowed"
            )
        if image and self.distill.teacher:
            raise ConfigError(
                f"{self.distill.show('teacher')} contradicts model.kind={self.model.kind!r}: only language models have a "
                f"teacher, it must be empty"
            )
        if isinstance(self.model, LRUConfig) and self.model.pooling != "none":
            for part, field, allowed in ((self.trainer, "z_loss", 0.0), (self.distill, "teacher", "")):
                if getattr(part, field) != allowed:
                    raise ConfigError(
                        f"{part.show(field)} contradicts {self.model.show('pooling')}: it is about tokens' successors, "
                        f"{allowed!r} is allowed"
                    )
        if self.optimizer.sam_ascent == "local":
            for section, field, most in (
                (self.mesh, "sequence", 1),
                (self.mesh, "tensor", 1),
                (self.distill, "teacher", ""),
            ):
                if getattr(section, field) != most:
                    raise ConfigError(
                        f"{self.optimizer.show('sam_ascent')} contradicts {section.show(field)}: a device climbs by itself, "
                        f"{most!r} is allowed, or optimizer.sam_ascent='synced'"
                    )
        if not image:
            for field, default in (("new_head", False), ("layer_decay", 1.0)):
                if getattr(self.finetune, field) != default:
                    raise ConfigError(
                        f"{self.finetune.show(field)} contradicts model.kind={self.model.kind!r}: only image models have it, "
                        f"{default!r} is allowed"
                    )
        if not isinstance(self.model, NFNetConfig) and self.distill.samples > self.model.vocab_size:
            raise ConfigError(
                f"{self.distill.show('samples')} is more than {self.model.show('vocab_size')} tokens: at most that many "
                f"are allowed, and 0 is all of them"
            )

    def notes(self) -> list[str]:
        """What is allowed but may not be meant, a sentence each."""
        model, data = self.model, self.data
        if isinstance(model, NFNetConfig) or isinstance(data, ImageData):
            return whole_images(model, data, self.mesh)
        if isinstance(model, LRUConfig) or model.window <= data.sequence_length:
            return []
        return [f"{model.show('window')} is longer than {data.show('sequence_length')}: attention sees whole rows"]


SECTIONS: tuple[str, ...] = tuple(f.name for f in dataclasses.fields(Config) if f.name != "name")
KINDS: dict[str, dict[str, type]] = {
    "model": {cls.kind: cls for cls in typing.get_args(ModelConfig)},
    "data": {cls.kind: cls for cls in typing.get_args(DataConfig)},
}

__all__ = [  # what others import from here without its being made here
    "BiographyData",
    "CVData",
    "ChatData",
    "DataConfig",
    "DistillConfig",
    "FinetuneConfig",
    "GemmaConfig",
    "GriffinConfig",
    "ImageData",
    "LRUConfig",
    "LongRangeData",
    "ModelConfig",
    "NFNetConfig",
    "OptimizerConfig",
    "PreparedData",
    "PrivacyConfig",
    "RecallData",
    "TextData",
    "TokenizedData",
    "WatchdogConfig",
]
