"""NFNet experiments. The first line of a docstring is what `podwright configs` prints."""

from configs.schema import Config, ImageData, NFNetConfig, OptimizerConfig


def tiny() -> Config:
    """Normaliser-free ResNet of 5 blocks on scikit-learn's handwritten digits: minutes on a CPU."""
    # The recipe of arXiv 2102.06171, section 4.1: Nesterov momentum, learning rate 0.1 * batch / 256, and adaptive
    # clipping, which takes the place of a clip by global norm.
    return Config(
        name="nfnet-tiny",
        model=NFNetConfig(),
        data=ImageData(batch_size=64),
        optimizer=OptimizerConfig(
            name="sgd", learning_rate=0.025, beta1=0.9, weight_decay=2e-5, clip_norm=0.0, adaptive_clip=0.01
        ),
    )
