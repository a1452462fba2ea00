"""NFNet experiments. The first line of a docstring is what `podwright configs` prints.

The published sizes train on whatever `data.source` names; by default that is the digits of nfnet-tiny, blown up and in
three equal channels, which shows that a size runs and nothing more.
"""

from collections.abc import Callable
from dataclasses import dataclass

from configs.schema import (
    CheckpointConfig,
    Config,
    EvalConfig,
    ImageData,
    MeshConfig,
    NFNetConfig,
    OptimizerConfig,
    TrainerConfig,
)


def tiny() -> Config:
    """Normaliser-free ResNet of 5 blocks on scikit-learn's handwritten digits: minutes on a CPU."""
    return Config(name="nfnet-tiny", model=NFNetConfig(), data=ImageData(batch_size=64), optimizer=sgd(batch_size=64))


def sgd(batch_size: int, **rest) -> OptimizerConfig:
    """The recipe of arXiv 2102.06171, section 4.1: Nesterov momentum, learning rate 0.1 * batch / 256, and adaptive
    clipping, which takes the place of a clip by global norm."""
    return OptimizerConfig(
        name="sgd",
        learning_rate=0.1 * batch_size / 256,
        beta1=0.9,
        weight_decay=2e-5,
        clip_norm=0.0,
        adaptive_clip=0.01,
        **rest,
    )


@dataclass(frozen=True)
class Size:
    """One variant's depth is this many times (1, 2, 6, 3) blocks; sizes and dropout as in table 1 of arXiv 2102.06171."""

    times: int
    pixels: int  # of training images
    dropout: float


SIZES = {
    "f0": Size(1, 192, 0.2),
    "f1": Size(2, 224, 0.3),
    "f2": Size(3, 256, 0.4),
    "f3": Size(4, 320, 0.4),
    "f4": Size(5, 384, 0.5),
    "f5": Size(6, 416, 0.5),
    "f6": Size(7, 448, 0.5),
    "f7": Size(8, 480, 0.5),
}
ROWS, EPOCHS, WARMUP_EPOCHS, IMAGENET = 4096, 360, 5, 1_281_167


def experiment_name(variant: str, plus: bool) -> str:
    """Spelt out: a plus sign is not one in URLs and in the names of folders on gs://."""
    return f"nfnet-{variant}{'plus' if plus else ''}"


def published(variant: str, plus: bool) -> Callable[[], Config]:
    """The function of one variant, or of its wider twin: "+", of the released code."""
    size, name = SIZES[variant], experiment_name(variant, plus)

    def experiment() -> Config:
        widths = (384, 768, 2048, 2048) if plus else (256, 512, 1536, 1536)
        model = NFNetConfig(
            num_classes=1000,
            channels=3,
            stem_widths=(16, 32, 64, widths[0] // 2),
            widths=widths,
            depths=(size.times, 2 * size.times, 6 * size.times, 3 * size.times),
            group_width=128,
            head_width=2 * widths[-1],
            dropout=size.dropout,
            stochastic_depth=0.25,
        )
        return Config(
            name=name,
            model=model,
            data=ImageData(channels=3, image_size=size.pixels, batch_size=ROWS),
            optimizer=sgd(ROWS, warmup_steps=IMAGENET * WARMUP_EPOCHS // ROWS, final_fraction=0.0),
            mesh=MeshConfig(data=1, fsdp=-1),
            checkpoint=CheckpointConfig(every=500),
            trainer=TrainerConfig(steps=IMAGENET * EPOCHS // ROWS, compute_dtype="bfloat16", remat="layer"),
            eval=EvalConfig(every=500, batches=16),
        )

    experiment.__doc__ = (
        f"NFNet-{variant.upper()}{'+' if plus else ''}, arXiv 2102.06171: sizes and update rule, no augmentation yet."
    )
    return experiment


PUBLISHED = {experiment_name(v, plus): published(v, plus) for plus in (False, True) for v in SIZES}
