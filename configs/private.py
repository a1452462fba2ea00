"""Private fine-tuning (docs/privacy.md): the four sets of arXiv 2308.10888 for a pod, and small ones for a laptop.

As in arXiv 2204.13650 the rate is constant, without momentum, decay and dropout, after large batches of clipped gradients; an average
of the parameters is free. Neither paper says with which sizes of batch, steps and rates NFNet-F3 was tuned: those are chosen here.
"""

import dataclasses
from collections.abc import Callable

from configs.griffin import tiny as griffin_tiny
from configs.nfnet import chexpert, mimic, on_a_pod, places365, transfer
from configs.schema import (
    CheckpointConfig,
    Config,
    EvalConfig,
    FinetuneConfig,
    ImageData,
    NFNetConfig,
    OptimizerConfig,
    PrivacyConfig,
    TrainerConfig,
)


def constant(rate: float, ema: float) -> OptimizerConfig:
    """Plain SGD on what clipping and noise have left."""
    return OptimizerConfig(
        name="sgd",
        learning_rate=rate,
        schedule="constant",
        warmup_steps=0,
        beta1=0.0,
        weight_decay=0.0,
        clip_norm=0.0,
        ema=ema,
    )


def on_private(config: Config, name: str, batch_size: int, steps: int, privacy: PrivacyConfig) -> Config:
    """NFNet-F3 of this config, privately: nothing is dropped, mixed or decayed."""
    assert isinstance(config.model, NFNetConfig)
    assert isinstance(config.data, ImageData)
    return dataclasses.replace(
        config,
        name=name,
        model=dataclasses.replace(config.model, dropout=0.0, stochastic_depth=0.0),
        data=dataclasses.replace(
            config.data, batch_size=batch_size, image_size=224, eval_size=224, label_smoothing=0.0
        ),
        optimizer=constant(1.0, ema=0.99),
        privacy=privacy,
        eval=EvalConfig(every=100, batches=0),
        **on_a_pod(steps),
    )


def imagenet() -> Config:
    """NFNet-F3 from its pretraining to ImageNet at epsilon 8 for images: arXiv 2308.10888."""
    # The paper's delta, 8e-7, is above one over the number of images.
    privacy = PrivacyConfig(epsilon=8.0, delta=5e-7, rows=4)
    return on_private(transfer("f3")(), "nfnet-f3-imagenet-private", 16384, 1000, privacy)


def places() -> Config:
    """NFNet-F3 from its pretraining to Places365 at epsilon 8 for images: arXiv 2308.10888."""
    return on_private(
        places365(), "nfnet-f3-places365-private", 16384, 1000, PrivacyConfig(epsilon=8.0, delta=5e-7, rows=4)
    )


def chest(config: Callable[[], Config], name: str, title: str) -> Callable[[], Config]:
    """A patient a unit, where the paper's is an image."""

    def experiment() -> Config:
        privacy = PrivacyConfig(epsilon=8.0, delta=1e-6, unit="group", rows=4)
        return on_private(config(), name, 4096, 500, privacy)

    experiment.__doc__ = f"NFNet-F3 from its pretraining to {title} at epsilon 8 for patients: arXiv 2308.10888."
    return experiment


# --- for a laptop -----------------------------------------------------------------------------------------------------

SMALL = NFNetConfig(
    stem_widths=(8, 8, 16, 32), widths=(32, 48, 64, 64), depths=(1, 1, 1, 1), group_width=16, head_width=128
)


def public_digits() -> Config:
    """A small NFNet on scikit-learn's digits, which are public: what private training on MNIST's starts from."""
    return Config(
        name="digits-public",
        model=SMALL,
        data=ImageData(batch_size=64),
        optimizer=OptimizerConfig(
            name="sgd",
            learning_rate=0.1,
            warmup_steps=20,
            final_fraction=0.0,
            weight_decay=2e-5,
            clip_norm=0.0,
            adaptive_clip=0.01,
        ),
        trainer=TrainerConfig(steps=400, log_every=50),
        checkpoint=CheckpointConfig(every=10**6),
        eval=EvalConfig(every=0, batches=0),
    )


def mnist() -> Config:
    """The same NFNet on 4,000 digits of MNIST privately, from scratch or, with finetune.base, from a public run."""
    return Config(
        name="mnist-private",
        model=SMALL,
        data=ImageData(source="mnist", batch_size=256, label_smoothing=0.0),
        optimizer=constant(1.0, ema=0.9),
        privacy=PrivacyConfig(epsilon=8.0, delta=1e-5, together=8),
        trainer=TrainerConfig(steps=120, log_every=20),
        checkpoint=CheckpointConfig(every=10**6),
        eval=EvalConfig(every=0, batches=0),
    )


def documents() -> Config:
    """griffin-tiny from its own run, privately on the documents of a folder, two rows of each a step."""
    config = griffin_tiny()
    return dataclasses.replace(
        config,
        name="griffin-tiny-private",
        data=dataclasses.replace(config.data, batch_size=64),
        optimizer=constant(0.05, ema=0.0),
        finetune=FinetuneConfig(base="runs/griffin-tiny"),
        privacy=PrivacyConfig(epsilon=8.0, delta=1e-4, rows=2),
        trainer=dataclasses.replace(config.trainer, steps=50),
    )


PRIVATE = {
    "nfnet-f3-imagenet-private": imagenet,
    "nfnet-f3-places365-private": places,
    "nfnet-f3-chexpert-private": chest(chexpert, "nfnet-f3-chexpert-private", "CheXpert's 14 observations"),
    "nfnet-f3-mimic-private": chest(mimic, "nfnet-f3-mimic-private", "MIMIC-CXR's 14 observations"),
    "digits-public": public_digits,
    "mnist-private": mnist,
    "griffin-tiny-private": documents,
}
