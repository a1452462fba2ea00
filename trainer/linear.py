"""Multinomial logistic regression by L-BFGS: a linear classifier on features that don't change."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax

STEPS = 300  # of L-BFGS at most; it ends where the gradient is below TOLERANCE
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Linear:
    """On features of zero mean and unit variance, which `mean` and `scale` make of them."""

    mean: np.ndarray  # (D)
    scale: np.ndarray  # (D)
    kernel: np.ndarray  # (D V)
    bias: np.ndarray  # (V)

    def logits(self, features: np.ndarray) -> np.ndarray:
        """(N D) -> (N V)."""
        return ((features - self.mean) / self.scale) @ self.kernel + self.bias


def fit(features: np.ndarray, labels: np.ndarray, num_classes: int, decay: float) -> Linear:
    """Minimises the mean of -log p(label) plus decay/2 |kernel|². features float32 (N D), labels int32 (N)."""
    mean, scale = features.mean(axis=0), features.std(axis=0) + 1e-6
    kernel, bias = minimised((features - mean) / scale, labels, num_classes, decay)
    return Linear(mean, scale, np.asarray(kernel), np.asarray(bias))


@functools.partial(jax.jit, static_argnums=2)
def minimised(features: jax.Array, labels: jax.Array, num_classes: int, decay: float) -> tuple[jax.Array, jax.Array]:
    def loss(weights):
        kernel, bias = weights
        logits = features @ kernel + bias[None]
        nats = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(nats) + decay / 2 * jnp.sum(kernel**2)

    rule = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry):
        weights, state, number, _ = carry
        value, gradient = value_and_grad(weights, state=state)
        updates, state = rule.update(gradient, state, weights, value=value, grad=gradient, value_fn=loss)
        return optax.apply_updates(weights, updates), state, number + 1, optax.tree.norm(gradient)

    def going(carry):
        return (carry[2] < STEPS) & (carry[3] > TOLERANCE)

    zeros = jnp.zeros((features.shape[1], num_classes)), jnp.zeros(num_classes)
    return jax.lax.while_loop(going, step, (zeros, rule.init(zeros), jnp.int32(0), jnp.float32(jnp.inf)))[0]


def scores(model: Linear, features: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    logits = model.logits(features)
    top = logits.max(axis=1, keepdims=True)
    nats = np.log(np.exp(logits - top).sum(axis=1)) + top[:, 0] - logits[np.arange(len(labels)), labels]
    return {"error_rate": float((logits.argmax(axis=1) != labels).mean()), "loss": float(nats.mean())}
