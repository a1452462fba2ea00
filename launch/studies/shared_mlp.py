"""An MLP of one hidden layer that reads the states of a linear recurrence, the same at every step, and least squares beside it.

Shapes: B rows, one for every step of every sequence, L steps, F numbers of a state, D hidden units, O outputs.
"""

import functools
import math
from typing import Any

import numpy as np

from launch.studies.linear_states import FLOAT32

LINEAR = 0  # the width of a model without hidden units
BATCH, RATE = 256, 1e-2  # of 0.003 and 0.01 the better one for every target, width and N tried, with seed 0


def whitened(x: np.ndarray, trained: int) -> np.ndarray:
    """States (B L F) in a basis in which, over the first `trained` sequences, they have mean 0 and covariance 1, in float32.

    The MLP's first matrix could do the same, but Adam doesn't find it in any decent time: states are far from round.
    Directions in which states hardly vary hold rounding errors and are left out.
    """
    rows = x[:trained].reshape(-1, x.shape[-1]).astype(np.float64)
    mean = rows.mean(axis=0)
    variances, basis = np.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
    kept = variances > (10 * FLOAT32) ** 2 * variances[-1]
    return ((x - mean) @ (basis[:, kept] / np.sqrt(variances[kept]))).astype(np.float32)


def learned(given, judged, width: int, seed: int, steps: int) -> float:
    """Error on `judged` of an MLP trained on `given`, or of least squares if `width` is LINEAR; each is whitened states (B F)
    and standardised outputs (B O)."""
    import jax
    import jax.numpy as jnp

    (x, y), (x_other, y_other) = given, judged
    if width == LINEAR:
        guess = x_other @ (x.T.astype(np.float64) @ y / len(x))  # the covariance of x is 1
    else:
        weights = trainer(steps)(jax.random.key(seed), jnp.asarray(x), jnp.asarray(y), width=width)
        guess = np.asarray(jax.jit(mlp)(weights, x_other))
    return math.sqrt(np.square(guess - y_other).mean() / y_other.var(axis=0).mean())


def mlp(weights: dict[str, Any], x):
    """x (B F) to (B O) through D hidden units."""
    import jax

    return jax.nn.gelu(x @ weights["in"] + weights["bias"][None]) @ weights["out"] + weights["shift"][None]


@functools.cache
def trainer(steps: int):
    """A jitted function that trains an MLP with Adam, on a cosine to 0, from a key, states (B F) and outputs (B O)."""
    import jax
    import jax.numpy as jnp
    import optax

    rule = optax.scale_by_adam()

    @functools.partial(jax.jit, static_argnames="width")
    def train(key, x, y, width: int):
        a, b, order = jax.random.split(key, 3)
        weights = {
            "in": jax.random.normal(a, (x.shape[1], width)) / math.sqrt(x.shape[1]),
            "bias": jnp.zeros(width),
            "out": jax.random.normal(b, (width, y.shape[1])) / math.sqrt(width),
            "shift": jnp.zeros(y.shape[1]),
        }

        def step(carry, number):
            weights, state = carry
            rows = jax.random.randint(jax.random.fold_in(order, number), (BATCH,), 0, len(x))
            gradient = jax.grad(lambda w: jnp.mean(jnp.square(mlp(w, x[rows]) - y[rows])))(weights)
            updates, state = rule.update(gradient, state)
            now = -RATE * 0.5 * (1 + jnp.cos(jnp.pi * number.astype(jnp.float32) / steps))
            return (optax.apply_updates(weights, jax.tree.map(lambda u: now * u, updates)), state), None

        return jax.lax.scan(step, (weights, rule.init(weights)), jnp.arange(steps))[0][0]

    return train
