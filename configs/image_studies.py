"""The configs behind docs/studies on NFNets: clipping at large rates, rivals on digits, and a scaling law in miniature; and the
one of docs/audit.md.

The first line of a docstring is what `podwright configs` prints. launch/studies says which runs are made of them.
"""

import dataclasses
from collections.abc import Callable

from configs.nfnet import sgd
from configs.privacy import PrivacyConfig
from configs.schema import CheckpointConfig, Config, EvalConfig, ImageData, NFNetConfig, TrainerConfig

SIZES = {"xs": (8, 1), "s": (16, 1), "m": (24, 1), "l": (32, 2)}  # channels of a group, blocks of the third stage


def agc() -> Config:
    """nfnet-tiny in batches of 256, at the recipe's learning rate: with adaptive clipping or, overridden, without."""
    return Config(
        name="agc",
        model=NFNetConfig(),
        data=ImageData(batch_size=256),
        optimizer=sgd(256, warmup_steps=10),
        trainer=TrainerConfig(steps=80),
        checkpoint=CheckpointConfig(every=80),
        eval=EvalConfig(every=20, batches=0),
    )


def digits() -> Config:
    """nfnet-tiny on half of the digits, to be compared with simpler classifiers on the other half."""
    return Config(
        name="digits-nfnet",
        model=NFNetConfig(),
        data=ImageData(batch_size=128, held_out=0.5),
        optimizer=dataclasses.replace(sgd(128, warmup_steps=20, final_fraction=0.0), learning_rate=0.8),
        trainer=TrainerConfig(steps=300),
        checkpoint=CheckpointConfig(every=300),
        eval=EvalConfig(every=50, batches=0),
    )


def scale(size: str) -> Callable[[], Config]:
    group, depth = SIZES[size]

    def experiment() -> Config:
        model = NFNetConfig(
            stem_widths=(8, 8, 16, 2 * group),
            widths=(4 * group, 6 * group, 8 * group, 8 * group),
            depths=(1, 1, depth, 1),
            group_width=group,
            head_width=16 * group,
        )
        return Config(
            name=f"convnets-scale-{size}",
            model=model,
            data=ImageData(batch_size=64, label_smoothing=0.0),
            optimizer=dataclasses.replace(sgd(64, warmup_steps=10, final_fraction=0.0), learning_rate=0.1),
            trainer=TrainerConfig(steps=178, log_every=100),
            checkpoint=CheckpointConfig(every=10**6),
            eval=EvalConfig(every=0, batches=0),
        )

    experiment.__doc__ = f"NFNet with groups of {group} channels on digits, one size of the small scaling study."
    return experiment


def audit() -> Config:
    """NFNet of one block on 192 digits, 158 of them canaries, until it knows them by heart: for `podwright audit`."""
    return Config(
        name="audit",
        model=NFNetConfig(widths=(32,), depths=(1,), head_width=64),
        data=ImageData(batch_size=64, held_out=0.8, label_smoothing=0.0, canaries=300),
        optimizer=dataclasses.replace(
            sgd(64, warmup_steps=0, final_fraction=1.0), learning_rate=0.5, weight_decay=0.0, adaptive_clip=0.0
        ),
        trainer=TrainerConfig(steps=300, log_every=50),
        checkpoint=CheckpointConfig(every=300),
        eval=EvalConfig(every=0, batches=0),
        privacy=PrivacyConfig(delta=1e-5, together=8),
    )


STUDIES = {
    "audit": audit,
    "agc": agc,
    "digits-nfnet": digits,
    **{f"convnets-scale-{size}": scale(size) for size in SIZES},
}
