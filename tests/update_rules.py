"""Update rules on a few small arrays, for the tests of what they do."""

import jax
import numpy as np
import optax

from configs.optimizer import OptimizerConfig
from trainer.optimizers import make_optimizer, make_schedule

RATE = 0.01
RULES = ("lion", "muon", "schedule-free", "shampoo", "soap")
KERNEL, HEAD, TABLE, NORM = "layers/groups/rec_0/mlp/down/kernel", "head/kernel", "embedding/table", "final_norm"
SHAPES = {KERNEL: (3, 6, 4), HEAD: (6, 5), TABLE: (7, 6), NORM: (6,)}


def normals(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


PARAMS, GRADIENTS = normals(0), [normals(seed) for seed in range(1, 13)]


def plain(name: str, **fields) -> OptimizerConfig:
    few = dict(learning_rate=RATE, warmup_steps=0, schedule="constant", clip_norm=0.0, weight_decay=0.1)
    return OptimizerConfig(name=name, **(few | fields))


def rule_of(config: OptimizerConfig) -> optax.GradientTransformation:
    return make_optimizer(config, make_schedule(config, 100), lambda name: name.endswith("kernel"), lambda name: True)


def followed(rule, params, gradients) -> list:
    """Parameters after each update."""
    state, update, found = rule.init(params), jax.jit(rule.update), []
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        found.append(params)
    return found


def same(got, expected, tolerance: float = 1e-6) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, expected)


def only(name: str, trees: list, layer: int | None = None) -> list:
    return [tree[name] if layer is None else tree[name][layer] for tree in trees]
