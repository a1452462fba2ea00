"""A tiny NFNet and simpler classifiers on scikit-learn's digits: is the network worth its parts?

Learning rates, and the decay, are chosen on the held-out digits, of four for each classifier: nobody is favoured.
"""

import dataclasses
import itertools
import math
import pathlib
from typing import Any, cast

import numpy as np

from configs.image_studies import digits
from configs.schema import ImageData
from data.images import Images
from launch.studies.study import Figures, Study

SEEDS = (0, 1, 2)
RATES = {"NFNet": (0.2, 0.4, 0.8, 1.6), "plain ConvNet": (0.01, 0.03, 0.1, 0.3)}
DECAYS = (1e-4, 1e-3, 1e-2, 1e-1)
NFNET, CONVNET = RATES
RUNS = {
    f"digits-nfnet --optimizer.learning_rate {rate} --trainer.seed {seed} --data.seed {seed}": rate
    for rate in RATES[NFNET]
    for seed in SEEDS
}


def measure(folders: dict[str, pathlib.Path]) -> Figures:
    import jax

    from launch.studies.study import trained

    found: dict[float, list[dict[str, float]]] = {rate: [] for rate in RATES[NFNET]}
    for words, folder in folders.items():
        found[RUNS[words]].append(last_evaluation(folder))
    with trained(next(iter(folders.values()))) as (_, model, _):
        parameters = sum(leaf.size for leaf in jax.tree.leaves(model))
    width = convnet_width(parameters)
    plain = {rate: [convnet(seed, rate, width) for seed in SEEDS] for rate in RATES[CONVNET]}
    linear = {decay: [logistic_regression(decay)] for decay in DECAYS}
    plain_parameters = sum(math.prod(shape) for shape in convnet_shapes(width))
    return {
        "classifiers": [
            best(NFNET, "learning rate", parameters, found),
            best(CONVNET, "learning rate", plain_parameters, plain),
            best("logistic regression", "decay", 650, linear),
        ]
    }


def best(name: str, what: str, parameters: int, runs: dict[float, list[dict[str, float]]]) -> dict[str, Any]:
    """The setting with the fewest mistakes, over all seeds, and how many each of them made."""
    errors = {value: float(np.mean([run["error_rate"] for run in found])) for value, found in runs.items()}
    value = min(errors, key=lambda value: errors[value])
    return {
        "name": name,
        "setting": f"{what} {value:g}",
        "parameters": parameters,
        "runs": runs[value],
        "tried": errors,
    }


def last_evaluation(folder: pathlib.Path) -> dict[str, float]:
    from trainer.run_folder import read_metrics

    evaluations = read_metrics(folder, "eval")
    return {name: evaluations[max(evaluations)][name] for name in ("error_rate", "loss")}


def logistic_regression(decay: float) -> dict[str, float]:
    """On the 64 pixels."""
    from data import open_data
    from trainer.linear import fit, scores

    data = open_data(digits().data)
    train, held_out = cast(Images, data.train), cast(Images, data.held_out)
    pixels, others = (split.pixels.reshape(len(split), -1).astype(np.float32) for split in (train, held_out))
    return scores(fit(pixels, train.labels, 10, decay), others, held_out.labels)


def convnet_shapes(width: int) -> list[tuple[int, ...]]:
    """Six convolutions of 3 by 3, every second of stride 2, and a classifier; of each its kernel and bias."""
    widths = [1, width, width, 2 * width, 2 * width, 4 * width, 4 * width]
    kernels = [(3, 3, a, b) for a, b in itertools.pairwise(widths)]
    return [shape for kernel in [*kernels, (widths[-1], 10)] for shape in (kernel, kernel[-1:])]


def convnet_width(parameters: int) -> int:
    """Of the ConvNet nearest in size."""
    return min(range(1, 129), key=lambda w: abs(sum(math.prod(s) for s in convnet_shapes(w)) - parameters))


def convnet(seed: int, rate: float, width: int) -> dict[str, float]:
    """Held-out metrics of a ConvNet with ReLUs and nothing else, on the NFNet's batches, schedule, momentum and smoothing; its
    gradient is clipped to a norm of 1, without which it diverges at the larger rates."""
    import jax
    import jax.numpy as jnp
    import optax

    from data import open_data
    from trainer.optimizers import make_schedule

    config = digits()
    images = cast(ImageData, config.data)
    data = open_data(dataclasses.replace(images, seed=seed))
    schedule = make_schedule(dataclasses.replace(config.optimizer, learning_rate=rate), config.trainer.steps)
    rule = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(schedule, momentum=0.9, nesterov=True))

    def forward(weights: list[Any], images):
        x = images
        for i in range(6):
            kernel, bias = weights[2 * i : 2 * i + 2]
            strides = (1 + i % 2,) * 2
            x = jax.lax.conv_general_dilated(x, kernel, strides, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            x = jax.nn.relu(x + bias[None, None, None])
        return x.mean(axis=(1, 2)) @ weights[12] + weights[13][None]

    @jax.jit
    def step(weights, state, batch):
        def loss(weights):
            target = optax.smooth_labels(jax.nn.one_hot(batch["labels"], 10), images.label_smoothing)
            return optax.losses.softmax_cross_entropy(forward(weights, batch["images"]), target).mean()

        updates, state = rule.update(jax.grad(loss)(weights), state, weights)
        return optax.apply_updates(weights, updates), state

    rng = np.random.default_rng(seed)
    weights = [
        jnp.asarray(rng.normal(size=s) * math.sqrt(2 / math.prod(s[:-1])) if len(s) > 1 else np.zeros(s), jnp.float32)
        for s in convnet_shapes(width)
    ]
    state = rule.init(weights)
    for number in range(config.trainer.steps):
        weights, state = step(weights, state, data.train_batch(number))
    rows = data.held_out.read(np.arange(len(data.held_out)))
    logits = np.asarray(jax.jit(forward)(weights, rows["images"]), np.float64)
    nats = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(logits)), rows["labels"]]
    return {"error_rate": float((logits.argmax(axis=1) != rows["labels"]).mean()), "loss": float(nats.mean())}


def table(figures: Figures) -> list[str]:
    lines = [f"{'':<40}{'parameters':>12}{'wrong, %':>26}{'log loss':>10}"]
    for one in figures["classifiers"]:
        errors, losses = ([run[name] for run in one["runs"]] for name in ("error_rate", "loss"))
        spread = f"{100 * np.mean(errors):.2f} ({', '.join(f'{100 * error:.2f}' for error in errors)})"
        name = f"{one['name']}, {one['setting']}"
        lines.append(f"{name:<40}{one['parameters']:>12,}{spread:>26}{np.mean(losses):>10.3f}")
    tried = [
        f"{one['name']}: " + ", ".join(f"{float(value):g} {100 * error:.2f}" for value, error in one["tried"].items())
        for one in figures["classifiers"]
    ]
    return [*lines, "", "wrong, %, with every setting tried", *tried]


def draw(figures: Figures, figure) -> None:
    axes = figure.subplots()
    names = [f"{one['name']}\n{one['setting']}" for one in figures["classifiers"]]
    for place, one in enumerate(figures["classifiers"]):
        errors = [100 * run["error_rate"] for run in one["runs"]]
        axes.barh(place, np.mean(errors), color="#2166ac" if one["name"] == NFNET else "#999999", height=0.6)
        axes.plot(errors, [place] * len(errors), linestyle="", marker="o", color="black", markersize=4)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlabel="held-out digits classified wrongly, % (dots: seeds)")


STUDY = Study(
    question="does a tiny NFNet tell digits apart better than a plain ConvNet of its size, and than logistic regression?",
    configs=tuple(RUNS),
    full=tuple(RUNS),
    measure=measure,
    table=table,
    draw=draw,
)
