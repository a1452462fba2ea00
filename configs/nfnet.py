"""NFNet experiments. The first line of a docstring is what `podwright configs` prints.

Three recipes: ImageNet from scratch and transfer as in arXiv 2102.06171 (its released code, and A.5), and pretraining on a web
collection as in arXiv 2310.16764. Transfer goes to the four sets of arXiv 2308.10888, too. Their images are the user's: `data.source` and `data.held_out_source` say where.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from configs.chest_xrays import EVALUATED, OBSERVATIONS
from configs.schema import (
    CheckpointConfig,
    Config,
    EvalConfig,
    FinetuneConfig,
    ImageData,
    MeshConfig,
    NFNetConfig,
    OptimizerConfig,
    TrainerConfig,
)


def tiny() -> Config:
    """Normaliser-free ResNet of 5 blocks on scikit-learn's handwritten digits: minutes on a CPU."""
    return Config(name="nfnet-tiny", model=NFNetConfig(), data=ImageData(batch_size=64), optimizer=sgd(batch_size=64))


def tiny_plus() -> Config:
    """nfnet-tiny's wider twin: as in the + variants, a block's middle is cut to whole groups."""
    model = NFNetConfig(stem_widths=(8, 16, 16, 48), widths=(96, 128, 160, 160), group_width=32, head_width=320)
    return Config(name="nfnet-tinyplus", model=model, data=ImageData(batch_size=64), optimizer=sgd(batch_size=64))


def sgd(batch_size: int, **rest) -> OptimizerConfig:
    """The recipe of arXiv 2102.06171, section 4.1: Nesterov momentum, learning rate 0.1 * batch / 256, and adaptive
    clipping, which takes the place of a clip by global norm."""
    fields = dict(learning_rate=0.1 * batch_size / 256, weight_decay=2e-5, **rest)
    return OptimizerConfig(name="sgd", beta1=0.9, clip_norm=0.0, adaptive_clip=0.01, **fields)


@dataclass(frozen=True)
class Size:
    """One variant's depth is this many times (1, 2, 6, 3) blocks; the rest as in table 1 of arXiv 2102.06171."""

    times: int
    pixels: int  # of training images
    eval_pixels: int
    dropout: float
    magnitude: float  # of RandAugment


SIZES = {
    "f0": Size(1, 192, 256, 0.2, 5.0),
    "f1": Size(2, 224, 320, 0.3, 10.0),
    "f2": Size(3, 256, 352, 0.4, 10.0),
    "f3": Size(4, 320, 416, 0.4, 15.0),
    "f4": Size(5, 384, 512, 0.5, 15.0),
    "f5": Size(6, 416, 544, 0.5, 15.0),
    "f6": Size(7, 448, 576, 0.5, 15.0),
    "f7": Size(8, 480, 608, 0.5, 15.0),
}
VARIANTS = tuple(f"{variant}{'plus' * plus}" for plus in (False, True) for variant in SIZES)
WEB = ("f0", "f1", "f3", "f4", "f7", "f3plus", "f4plus", "f7plus")  # that either paper pretrained on JFT
ROWS, EPOCHS, WARMUP_EPOCHS, IMAGENET = 4096, 360, 5, 1_281_167
WEB_IMAGES, WEB_CLASSES = 4_000_000_000, 30_000


def size_of(variant: str) -> Size:
    return SIZES[variant.removesuffix("plus")]


def model_of(variant: str, **rest) -> NFNetConfig:
    widths, times = (
        (384, 768, 2048, 2048) if variant.endswith("plus") else (256, 512, 1536, 1536),
        size_of(variant).times,
    )
    return NFNetConfig(
        channels=3,
        stem_widths=(16, 32, 64, widths[0] // 2),
        widths=widths,
        depths=(times, 2 * times, 6 * times, 3 * times),
        group_width=128,
        head_width=2 * widths[-1],
        **rest,
    )


def title(variant: str) -> str:
    return f"NFNet-{variant.removesuffix('plus').upper()}{'+' * variant.endswith('plus')}"


def on_a_pod(steps: int) -> dict:
    """What all recipes have in common."""
    return dict(
        mesh=MeshConfig(data=1, fsdp=-1),
        checkpoint=CheckpointConfig(every=500),
        trainer=TrainerConfig(steps=steps, compute_dtype="bfloat16", remat="layer"),
    )


def imagenet(size: Size, **rest) -> ImageData:
    return ImageData(
        source="imagenet/train",
        held_out_source="imagenet/validation",
        channels=3,
        image_size=size.pixels,
        eval_size=size.eval_pixels,
        augment="crop",
        **rest,
    )


def from_scratch(variant: str) -> Callable[[], Config]:
    size = size_of(variant)

    def experiment() -> Config:
        mixed = dict(randaugment_layers=4, randaugment_magnitude=size.magnitude, mixup_alpha=0.2, cutmix=True)
        return Config(
            name=f"nfnet-{variant}",
            model=model_of(variant, num_classes=1000, dropout=size.dropout, stochastic_depth=0.25),
            data=imagenet(size, batch_size=ROWS, **mixed),
            optimizer=sgd(ROWS, warmup_steps=IMAGENET * WARMUP_EPOCHS // ROWS, final_fraction=0.0, ema=0.99999),
            eval=EvalConfig(every=2500, batches=0),
            **on_a_pod(IMAGENET * EPOCHS // ROWS),
        )

    experiment.__doc__ = f"{title(variant)} on ImageNet from scratch, {EPOCHS} epochs: arXiv 2102.06171."
    return experiment


def pretraining(variant: str) -> Callable[[], Config]:
    """The papers do not say how long the warm-up is, whether the loss is softmax's, nor whether anything is dropped: here it is
    5,000 steps, it is, and nothing is. A run has one budget: `trainer.steps` moves the schedule's end with it."""

    def experiment() -> Config:
        return Config(
            name=f"nfnet-{variant}-pretrain",
            model=model_of(variant, num_classes=WEB_CLASSES),
            data=ImageData(
                source="web-images/train",
                held_out_source="web-images/held-out",
                channels=3,
                image_size=224,
                eval_size=256,
                augment="crop",
                batch_size=ROWS,
            ),
            optimizer=dataclasses.replace(sgd(ROWS, warmup_steps=5000, final_fraction=0.0), weight_decay=1e-6),
            eval=EvalConfig(every=5000, batches=32),
            **on_a_pod(WEB_IMAGES // ROWS),
        )

    experiment.__doc__ = f"{title(variant)} on 4 billion images of a web collection, one epoch: arXiv 2310.16764."
    return experiment


def finetuned(name: str, variant: str, num_classes: int, data: ImageData) -> Config:
    optimizer = sgd(data.batch_size, warmup_steps=5000, final_fraction=0.0, ema=0.9999, sam_rho=0.05, sam_share=0.2)
    return Config(
        name=name,
        model=model_of(variant, num_classes=num_classes, dropout=0.25, stochastic_depth=0.1),
        data=data,
        optimizer=dataclasses.replace(optimizer, learning_rate=0.1, weight_decay=1e-5, sam_ascent="local"),
        finetune=FinetuneConfig(base=f"runs/nfnet-{variant}-pretrain", new_head=True),
        eval=EvalConfig(every=1000, batches=0),
        **on_a_pod(15_000),
    )


def transfer(variant: str) -> Callable[[], Config]:
    """Update rule and rates of arXiv 2102.06171, A.5; 384 and 480 pixels of arXiv 2310.16764, which does not state the rest."""

    def experiment() -> Config:
        size = dataclasses.replace(size_of(variant), pixels=384, eval_pixels=480)
        return finetuned(f"nfnet-{variant}-finetune", variant, 1000, imagenet(size, batch_size=2048))

    experiment.__doc__ = (
        f"{title(variant)} from its pretraining to ImageNet at 384 pixels, with SAM: arXiv 2102.06171, A.5."
    )
    return experiment


def places365() -> Config:
    """NFNet-F3 from its pretraining to Places365's 365 scenes, evaluated on its 36,500: arXiv 2308.10888."""
    data = ImageData(
        source="places365/train",
        held_out_source="places365/validation",
        channels=3,
        image_size=224,
        augment="crop",
        batch_size=2048,
    )
    return finetuned("nfnet-f3-places365", "f3", 365, data)


def radiographs(folder: str) -> ImageData:
    """224 pixels, no statistics of the images; a box of 8 % of a radiograph would show less than its labels say."""
    return ImageData(
        source=f"{folder}/train.csv",
        held_out_source=f"{folder}/valid.csv",
        labels=OBSERVATIONS,
        evaluated=EVALUATED,
        loss="sigmoid",
        label_smoothing=0.0,
        normalise="centred",
        channels=3,
        image_size=224,
        batch_size=2048,
    )


def chexpert() -> Config:
    """NFNet-F3 from its pretraining to CheXpert's 14 observations, evaluated on 5: arXiv 2308.10888."""
    return finetuned("nfnet-f3-chexpert", "f3", len(OBSERVATIONS), radiographs("chexpert"))


def mimic() -> Config:
    """NFNet-F3 from its pretraining to MIMIC-CXR's 14 observations: arXiv 2308.10888."""
    data = dataclasses.replace(radiographs("mimic-cxr"), evaluated=())
    return finetuned("nfnet-f3-mimic", "f3", len(OBSERVATIONS), data)


PUBLISHED = {
    "nfnet-tinyplus": tiny_plus,
    **{f"nfnet-{variant}": from_scratch(variant) for variant in VARIANTS},
    **{f"nfnet-{variant}-pretrain": pretraining(variant) for variant in WEB},
    **{f"nfnet-{variant}-finetune": transfer(variant) for variant in WEB},
    "nfnet-f3-places365": places365,
    "nfnet-f3-chexpert": chexpert,
    "nfnet-f3-mimic": mimic,
}
