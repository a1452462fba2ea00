"""Low-rank adaptation (arXiv 2106.09685): each matrix W stays as it is, and W + alpha/r A B is used in its place.

A (in r) starts as noise and B (r out) as zeros, so that training begins with the base's own outputs. The base is part of
the state and of every checkpoint; only the adapters have gradients and moments.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs.schema import FinetuneConfig
from models.blocks import Linear
from models.convert.tensors import Tensor
from models.params import Init, Spec, normal, path_name, zeros
from trainer.tasks import Task

Adapters = dict[str, dict[str, jax.Array]]  # by the path of a Linear: a (layers in r), b (layers r out)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted:
    base: Any
    adapters: Adapters


def adapted(task: Task, config: FinetuneConfig) -> Task:
    """The same task, learning adapters alone."""

    def init(key: jax.Array, spec: Spec) -> Adapted:
        base = task.init(key, spec)
        return Adapted(base, new_adapters(base, config.lora_rank, jax.random.fold_in(key, 1), spec))

    def whole(model: Any) -> Any:
        return merged(model, config.lora_alpha / config.lora_rank)

    def is_adapter(name: str) -> bool:
        return name.startswith("adapters/")

    return dataclasses.replace(
        task,
        init=init,
        loss=lambda model, batch, key: task.loss(whole(model), batch, key),
        evaluate=lambda model, batch: task.evaluate(whole(model), batch),
        decays=is_adapter,
        learns=is_adapter,
        whole=whole,
        with_base=lambda model, base: Adapted(task.with_base(model.base, base), model.adapters),
    )


def new_adapters(base: Any, rank: int, key: jax.Array, spec: Spec) -> Adapters:
    found = {}
    nodes, _ = jax.tree_util.tree_flatten_with_path(base, is_leaf=lambda node: isinstance(node, Linear))
    for path, node in nodes:
        if not isinstance(node, Linear):
            continue
        shape, axes, num_in = node.kernel.shape, node.axes, node.num_in
        layers, shape = shape[: len(shape) - len(axes)], shape[len(shape) - len(axes) :]
        init = Init(key, spec, *layers).scope(path_name(path))
        inputs = math.prod(shape[:num_in])
        found[path_name(path)] = {
            "a": init.param("a", (*shape[:num_in], rank), (*axes[:num_in], None), normal(1 / inputs))[...],
            "b": init.param("b", (rank, *shape[num_in:]), (None, *axes[num_in:]), zeros)[...],
        }
    return found


def merged(model: Any, scale: float) -> Any:
    """The base with its adapters added, through which no gradient reaches it; a model without adapters as it is."""
    if not isinstance(model, Adapted):
        return model

    def add(path, leaf: jax.Array) -> jax.Array:
        linear, _, last = path_name(path).rpartition("/")
        if last != "kernel" or linear not in model.adapters:
            return leaf
        return leaf + scale * product(**model.adapters[linear], like=leaf)

    return jax.tree_util.tree_map_with_path(add, jax.lax.stop_gradient(model.base))


def product(a: jax.Array, b: jax.Array, like: jax.Array) -> jax.Array:
    """A B, shaped and divided over the devices as the kernel `like`."""
    stacked = a.ndim + b.ndim - 2 - like.ndim  # 1 where layers are
    layer = "l"[:stacked]
    ins, outs = "xyz"[: a.ndim - 1 - stacked], "uvw"[: b.ndim - 1 - stacked]
    equation = f"{layer}{ins}r,{layer}r{outs}->{layer}{ins}{outs}"
    return jnp.einsum(equation, a, b, out_sharding=jax.typeof(like).sharding.spec)


def merged_tensors(arrays: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The arrays of a merged model by their names, out of those of an `Adapted` on disk, a piece at a time."""

    def tensor(name: str, base: Tensor) -> Tensor:
        linear, _, last = name.rpartition("/")
        a, b = (arrays.get(f"adapters/{linear}/{part}") for part in "ab")
        if last != "kernel" or a is None or b is None:
            return base
        stacked = len(a.shape) + len(b.shape) - 2 > len(base.shape)

        def read(first: int, end: int) -> np.ndarray:
            left, right = a.read(first, end), b.read(first, end) if stacked else b.whole()
            left = left.reshape(*left.shape[:1], -1, left.shape[-1]) if stacked else left
            right = right.reshape(*right.shape[: 1 + stacked], -1)
            kernel = base.read(first, end)
            return kernel + (scale * np.matmul(left, right)).reshape(kernel.shape).astype(kernel.dtype)

        return Tensor(base.shape, base.dtype, read)

    found = {name.removeprefix("base/"): base for name, base in arrays.items() if name.startswith("base/")}
    return {name: tensor(name, base) for name, base in found.items()}
