"""What `podwright study optimizers` trains and measures, an update rule at a time; launch/studies/optimizers.py says which."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs.optimizer import OptimizerConfig
from data.images import load_digits
from launch import solutions
from launch.studies.small_mlps import (
    Counted,
    Params,
    Split,
    activations,
    initial,
    learn,
    learn_in_turn,
    learn_until,
    loss,
    next_updates,
    right,
    side_by_side,
    solution,
)
from trainer.sharpness import hessian_product, top_eigenvalue, trace

TRAINING = 1400  # of 1,797 images
SIZES, WIDER = (64, 64, 64, 10), (64, 128, 64, 10)
TASKS, STEPS, BATCH = 5, 200, 64  # steps a task
LOOKS, BETWEEN = 50, 10  # how often the training loss is looked at, and steps between two looks
UPDATES = 32  # that the diversity is of
PRODUCTS = 30  # with the Hessian, for its eigenvalue and for its trace
PRUNED_STEPS, PRUNED_BATCH, PRUNED_RATE = 4000, 60, 0.1


def load() -> Split:
    """All 1,797 digits: images float32 (N 64), of each pixel its mean taken away, divided by one number, the standard deviation
    of all that is left; labels int32 (N)."""
    pixels, labels = load_digits()
    images = pixels.reshape(len(pixels), -1).astype(np.float64)
    images = images - images.mean(axis=0)
    return Split(jnp.asarray(images / images.std(), jnp.float32), jnp.asarray(labels, jnp.int32))


def divided(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows to train on, 1,400, and the 397 to test on, which every seed draws for itself."""
    rows = np.random.default_rng((seed, 4)).permutation(1797).astype(np.int32)
    return rows[:TRAINING], rows[TRAINING:]


def stacked(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def initials(seeds: tuple[int, ...], sizes: tuple[int, ...]) -> Params:
    return stacked([initial(seed, sizes) for seed in seeds])


def at_place(tree: Any, *place: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[place], tree)


def at_row(split: Split, rows: np.ndarray) -> Split:
    return Split(split.images[rows], split.labels[rows])


# --- tasks one after the other -----------------------------------------------------------------------------------------------


def tasks(protocol: str, labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, Counted, Counted]:
    """Batches int32 (T S B) of rows to train on, orders of pixels int32 (T 64), and the rows to train and to test on.

    "permuted": all digits, the pixels of each task in an order of its own. "classes": 0 and 1, then 2 and 3, ... among all ten
    classes, in their own order.
    """
    rng, (train, test) = np.random.default_rng((seed, 1)), divided(seed)

    def counted(own: np.ndarray) -> Counted:
        pairs = labels[own] // 2 == np.arange(TASKS)[:, None]
        return Counted(own, (pairs if protocol == "classes" else np.ones_like(pairs)).astype(np.float32))

    if protocol == "permuted":
        orders = np.stack([rng.permutation(64) for _ in range(TASKS)]).astype(np.int32)
        return rng.choice(train, (TASKS, STEPS, BATCH)), orders, counted(train), counted(test)
    rows = np.stack([rng.choice(train[labels[train] // 2 == task], (STEPS, BATCH)) for task in range(TASKS)])
    orders = np.tile(np.arange(64, dtype=np.int32), (TASKS, 1))
    return rows, orders, counted(train), counted(test)


@functools.cache
def learning_in_turn(config: OptimizerConfig) -> Callable:
    """Compiled once for both protocols."""
    return side_by_side(functools.partial(learn_in_turn, config, load()), of_seeds=5)


def in_turn(
    config: OptimizerConfig, rates: tuple[float, ...], protocol: str, seeds: tuple[int, ...]
) -> dict[str, list[list[float]]]:
    """Measures after the last task, each a list by rate of lists by seed."""
    digits = load()
    labels = np.asarray(digits.labels)
    rows, orders, train, test = stacked([tasks(protocol, labels, seed) for seed in seeds])
    learned = learning_in_turn(config)
    accuracies, gradients, params = jax.device_get(
        learned(jnp.asarray(rates, jnp.float32), initials(seeds, SIZES), rows, orders, train, test)
    )

    def measured(rate: int, seed: int) -> dict[str, float]:
        matrix = accuracies[rate, seed].astype(np.float64)
        own = test.rows[seed]
        images = digits.images[own][:, orders[seed, -1]]
        return {
            "new": solutions.new_accuracy(matrix),
            "final": solutions.final_accuracy(matrix),
            "forgetting": solutions.forgetting(matrix),
            "backward_transfer": solutions.backward_transfer(matrix),
            "interference": solutions.interference(gradients[rate, seed]),
            **of_features(at_place(params, rate, seed), images, labels[own]),
        }

    return by_name([[measured(rate, seed) for seed in range(len(seeds))] for rate in range(len(rates))])


def by_name(rows: list[list[dict[str, float]]]) -> dict[str, list[list[float]]]:
    return {name: [[one[name] for one in row] for row in rows] for name in rows[0][0]}


def of_features(params: Params, images: jax.Array, labels: np.ndarray) -> dict[str, float]:
    """Of the last hidden layer; NaN where training diverged."""
    features = np.asarray(activations(params, images)[-2])
    if not np.all(np.isfinite(features)):
        return dict.fromkeys(("effective_rank", "participation_ratio", "class_cosine", "dead"), math.nan)
    return {
        "effective_rank": solutions.effective_rank(solutions.centred(features)),
        "participation_ratio": solutions.participation_ratio(features),
        "class_cosine": solutions.class_cosine(features, labels),
        "dead": solutions.dead_share(features),
    }


# --- the same training loss --------------------------------------------------------------------------------------------------


def same_loss(
    config: OptimizerConfig, rates: tuple[float, ...], target: float, seeds: tuple[int, ...]
) -> dict[str, Any]:
    """All digits, until the training loss is at most `target`: steps by rate and seed (0: never), and, at the rate at which
    every seed gets there and the seeds together soonest, the measures of each seed's solution.

    "rate" and "measures" are None where at no rate every seed gets there.
    """
    digits, starts = load(), initials(seeds, SIZES)
    train = np.stack([divided(seed)[0] for seed in seeds])
    rows, more = (
        np.stack(
            [np.random.default_rng((seed, stream)).choice(own, shape) for seed, own in zip(seeds, train, strict=True)]
        )
        for stream, shape in ((2, (LOOKS, BETWEEN, BATCH)), (3, (UPDATES, BATCH)))
    )
    learned = side_by_side(functools.partial(learn_until, config, digits, target), of_seeds=3)
    steps, params, state = learned(jnp.asarray(rates, jnp.float32), starts, train, rows)
    steps = np.asarray(steps)
    there = np.flatnonzero(np.all(steps > 0, axis=1))
    if not there.size:
        return {"steps": steps.tolist(), "rate": None, "measures": None}
    best = there[np.argmin(steps[there].sum(axis=1))]
    params, state = at_place(params, best), at_place(state, best)
    moves = side_by_side(functools.partial(next_updates, config, digits), of_seeds=3)
    updates = moves(jnp.asarray(rates[best : best + 1], jnp.float32), params, state, more)[0]
    found = jax.device_get(jax.vmap(functools.partial(solution, config))(params, state))
    measures = []
    for place, seed in enumerate(seeds):
        own, test = at_place(found, place), at_row(digits, divided(seed)[1])
        curvature = curved(at_row(digits, train[place]), own, jax.random.key(seed))
        measures.append(
            {"steps": int(steps[best, place])}
            | {name: float(value) for name, value in curvature.items()}
            | of_features(own, test.images, np.asarray(test.labels))
            | of_weights(own, at_place(starts, place), test)
            | {"update_rank": solutions.effective_rank(np.asarray(updates[place]))}
        )
    return {"steps": steps.tolist(), "rate": rates[best], "measures": measures}


@jax.jit
def curved(train: Split, params: Params, key: jax.Array) -> dict[str, jax.Array]:
    """Of the loss on all training images."""
    product, size = hessian_product(lambda params: loss(params, *train), params)
    return {
        "train_loss": loss(params, *train),
        "top_eigenvalue": top_eigenvalue(product, size, key, PRODUCTS),
        "trace": trace(product, size, key, PRODUCTS),
    }


def of_weights(params: Params, start: Params, test: Split) -> dict[str, float]:
    kernels = np.concatenate([layer["kernel"].ravel() for layer in params.values()])
    moved = jax.tree.leaves(jax.tree.map(lambda a, b: np.sum(np.square(a - b, dtype=np.float64)), params, start))
    return {
        "accuracy": accuracy(params, test, 1.0),
        "accuracy_30": accuracy(params, test, 0.3),
        "accuracy_10": accuracy(params, test, 0.1),
        "stable_rank": solutions.stable_rank(params["hidden_1"]["kernel"]),
        "near_zero": solutions.near_zero_share(kernels),
        "hoyer": solutions.hoyer(kernels),
        "distance": float(np.sqrt(sum(moved))),
    }


# --- power-propagation -------------------------------------------------------------------------------------------------------


def accuracy(params: Params, test: Split, keep: float) -> float:
    """With the largest weights of each kernel alone, the share `keep` of them, of the classifier's twice as many."""
    kept = {
        name: layer | {"kernel": solutions.pruned(layer["kernel"], min(1, keep * (2 if name == "head" else 1)))}
        for name, layer in params.items()
    }
    return float(np.mean(hits(kept, test)))


@jax.jit
def hits(params: Params, test: Split) -> jax.Array:
    return right(params, test)


def pruning(
    config: OptimizerConfig, keeps: tuple[float, ...], seeds: tuple[int, ...]
) -> dict[str, list[list[float]] | list[float]]:
    """Test accuracies by share of weights kept and seed, of the wider network trained on all digits; its sparsity by seed."""
    digits = load()
    tests = [at_row(digits, divided(seed)[1]) for seed in seeds]
    rows = np.stack(
        [np.random.default_rng((seed, 5)).choice(divided(seed)[0], (PRUNED_STEPS, PRUNED_BATCH)) for seed in seeds]
    )
    learned, rates = side_by_side(functools.partial(learn, config, digits), of_seeds=2), jnp.asarray([PRUNED_RATE])
    trained = jax.device_get(learned(rates, initials(seeds, WIDER), rows))
    models = [at_place(trained, 0, place) for place in range(len(seeds))]
    kernels = [np.concatenate([layer["kernel"].ravel() for layer in model.values()]) for model in models]
    return {
        "accuracy": [
            [accuracy(model, test, keep) for model, test in zip(models, tests, strict=True)] for keep in keeps
        ],
        "near_zero": [solutions.near_zero_share(weights) for weights in kernels],
        "hoyer": [solutions.hoyer(weights) for weights in kernels],
    }
