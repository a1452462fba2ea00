"""The two sides of `benchmarks.nfnet`: a whole training step of ours, and of timm in PyTorch with the same work."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from configs.overrides import resolve
from configs.schema import Config, ImageData, NFNetConfig

Batch = dict[str, np.ndarray]
SIDES = ("podwright", "timm")


@dataclass(frozen=True)
class Case:
    """One line of the table, and how many steps of it a process measures after how many that it doesn't."""

    title: str
    words: str  # of the command line
    warm_up: int
    steps: int

    @property
    def config(self) -> Config:
        name, *words = self.words.split()
        # timm rescales what stochastic depth keeps and has only the exact GELU: neither changes what a step costs.
        return resolve(name, [*words, "--model.gelu_approximate", "false", "--model.ws_eps_mode", "add_var"]).config


# timm's side mixes no images and keeps no average.
SMALL = (
    "--trainer.compute_dtype float32 --trainer.remat none --data.mixup_alpha 0 --data.cutmix false --optimizer.ema 0"
)
CASES = {
    "f0": Case(
        "dm_nfnet_f0, 64 pixels, 16 images", f"nfnet-f0 {SMALL} --data.image_size 64 --data.batch_size 16", 2, 6
    ),
    "f0-96": Case(
        "dm_nfnet_f0, 96 pixels, 8 images", f"nfnet-f0 {SMALL} --data.image_size 96 --data.batch_size 8", 2, 6
    ),
    # timm derives the stem's widths from its last
    "tiny": Case("nfnet-tiny, 16 pixels, 64 images", "nfnet-tiny --model.stem_widths 4,8,16,32", 10, 60),
}


def measure(side: str, case: Case) -> dict[str, float]:
    """Images a second of one side, in this process."""
    step, parameters = (our_step if side == SIDES[0] else their_step)(case.config)
    wall, cpu = [], []
    for number in range(case.warm_up + case.steps):
        start, used = time.perf_counter(), time.process_time()
        step()
        if number >= case.warm_up:
            wall.append(time.perf_counter() - start)
            cpu.append(time.process_time() - used)
    return {
        "images_per_second": case.config.data.batch_size / statistics.median(wall),
        "cpu_seconds": statistics.median(cpu),
        "parameters": parameters,
    }


def random_batch(config: Config) -> Batch:
    from data.shapes import batch_fields

    assert isinstance(config.model, NFNetConfig)
    rng = np.random.default_rng(0)
    images, labels = (batch_fields(config.data)[name][0] for name in ("images", "labels"))
    return {
        "images": rng.normal(size=images).astype(np.float32),
        "labels": rng.integers(0, config.model.num_classes, size=labels).astype(np.int32),
        "weights": np.ones(labels, np.float32),
    }


def our_step(config: Config) -> tuple[Callable[[], None], int]:
    """The very program that `train` runs."""
    import jax

    from sharding.mesh import one_device_mesh
    from trainer.program import make_program
    from trainer.tasks import make_task

    jax.set_mesh(one_device_mesh())
    program = make_program(config, make_task(config), one_device_mesh())
    state, batch = jax.jit(program.init)(), jax.tree.map(jax.numpy.asarray, random_batch(config))

    def step() -> None:
        nonlocal state
        state, metrics = program.step(state, batch, None)
        jax.block_until_ready((state, metrics))

    return step, sum(leaf.size for leaf in jax.tree.leaves(state.model))


def their_step(config: Config) -> tuple[Callable[[], None], int]:
    """timm's network and adaptive clipping, PyTorch's SGD."""
    import timm
    import torch
    from timm.utils.agc import adaptive_clip_grad

    m, o, data = config.model, config.optimizer, config.data
    assert isinstance(m, NFNetConfig)
    assert isinstance(data, ImageData)
    network = timm.create_model(
        "dm_nfnet_f0",
        pretrained=False,
        num_classes=m.num_classes,
        in_chans=m.channels,
        depths=m.depths,
        channels=m.widths,
        group_size=m.group_width,
        stem_chs=m.stem_widths[-1],
        num_features=m.head_width,
        drop_rate=m.dropout,
        drop_path_rate=m.stochastic_depth,
    ).train()
    optimizer = torch.optim.SGD(
        network.parameters(), o.learning_rate, momentum=o.beta1, weight_decay=o.weight_decay, nesterov=True
    )
    loss = torch.nn.CrossEntropyLoss(label_smoothing=data.label_smoothing)
    batch = random_batch(config)
    images = torch.from_numpy(batch["images"].transpose(0, 3, 1, 2).copy())
    labels = torch.from_numpy(batch["labels"].astype(np.int64))
    clipped = [p for name, p in network.named_parameters() if not name.startswith("head.fc.weight")]

    def step() -> None:
        optimizer.zero_grad()
        loss(network(images), labels).backward()
        adaptive_clip_grad(clipped, clip_factor=o.adaptive_clip)
        optimizer.step()

    return step, sum(p.numel() for p in network.parameters())
