"""What arithmetic says of meshes and configs, to choose which are worth compiling: memory and time of a device, from widths
and link speeds. Rough by design; the compiler has the last word."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from configs.schema import Config, ImageData, NFNetConfig
from models.nfnet import sides
from sharding.topologies import HOST_BANDWIDTH, Topology

EFFICIENCY = 0.7  # of the peak, by products and what lies between them
AGAIN = {"none": 0.0, "dots": 0.04, "layer": 1 / 3}  # forward passes in the backward pass / FLOPs of both
# A parameter; schedule-free with its average, Shampoo and SOAP with the four squares of a square matrix.
MOMENTS = {"adamw": 2, "sgd": 1, "lion": 1, "muon": 1, "schedule-free": 3, "shampoo": 6, "soap": 6}
BESIDE = 0.8  # of communication that runs beside computation, where there is enough of it


@dataclass(frozen=True)
class Predicted:
    bytes: float  # of HBM, a device
    seconds: float  # a step


def predict(config: Config, topology: Topology, mesh: dict[str, int], parameters: int, flops: float) -> Predicted:
    """`flops` are the model's, a step; `parameters` their number."""
    shards = mesh["fsdp"] * mesh["tensor"]
    micro, trainer = config.trainer.microbatches, config.trainer
    moments = 0 if config.optimizer.offload else MOMENTS[config.optimizer.name]
    state = 4 * parameters * (2 + moments) / shards  # with a gradient
    copies = 2 * parameters / shards if trainer.compute_dtype == "bfloat16" else 0.0
    again = max(0.0, AGAIN[trainer.remat] - 0.1 * bool(trainer.save))
    compute = flops * (1 + again) / (topology.peak * topology.devices * EFFICIENCY)
    rows = config.data.batch_size / (micro * row_parts(mesh) * mesh["sequence"])
    size, sent = 2 if trainer.compute_dtype == "bfloat16" else 4, 0.0
    layers = layers_of(config, mesh["tensor"])
    activations = sum(rows * size * kept(stage, layer, trainer) for stage, layer in layers)
    activations += 3 * rows * size * max(sum(layer.values()) for _, layer in layers)  # one layer and its gradients
    activations += 2 * 4 * parameters / mesh["tensor"] / len(layers)  # a layer's parameters, gathered twice
    if not isinstance(config.data, ImageData):
        activations += 3 * trainer.logits_mib * 2**20
        # Two reductions and gatherings of the residual a layer and pass, over the tensor axis.
        residual = rows * size * config.data.sequence_length * config.model.width  # type: ignore[union-attr]
        sent += micro * (mesh["tensor"] > 1) * len(layers) * 8 * residual
    gathers = 2 + (trainer.remat == "layer")
    sent += micro * (mesh["fsdp"] > 1) * 2 * parameters / mesh["tensor"] * (gathers + 2)
    sent += (mesh["data"] > 1) * 8 * parameters / shards
    links = 2 * topology.chip.link / topology.chip.devices
    network = sent / links + (mesh["replica"] > 1) * 8 * parameters / shards / (
        topology.chip.dcn / topology.chip.devices
    )
    if config.optimizer.offload:  # moments come and go; the gradient's norm must be known before
        network += 16 * parameters / shards / (HOST_BANDWIDTH / topology.chip.devices)
    hidden = min(BESIDE * network, compute)
    return Predicted(state + copies + activations, compute + network - hidden)


def meshes(config: Config, topology: Topology) -> Iterator[dict[str, int]]:
    """Slices are replicas; the devices of a slice are shared by data, fsdp, sequence and tensor."""
    devices = topology.devices // topology.slices
    language = not isinstance(config.model, NFNetConfig)
    for tensor, sequence in itertools.product((1, 2, 4, 8), (1, 2, 4)):
        if devices % (tensor * sequence) or (not language and tensor > 1):
            continue
        if language and not divides(config, tensor, sequence):
            continue
        rest = devices // (tensor * sequence)
        for data in (n for n in (1, 2, 4, 8, 16, 32, 64) if rest % n == 0):
            yield {
                "replica": topology.slices, "data": data, "fsdp": rest // data, "sequence": sequence, "tensor": tensor,
            }  # fmt: skip


def divided_further(mesh: dict[str, int], times: int) -> dict[str, int]:
    """The mesh of so many times the devices with which parameters are divided further."""
    return mesh | {"fsdp": mesh["fsdp"] * times}


def divides(config: Config, tensor: int, sequence: int) -> bool:
    model: Any = config.model
    if getattr(model, "dense", False) and sequence > 1:
        return False
    whole = [getattr(model, size, tensor) for size in ("num_heads", "mlp_width", "rnn_width", "state_size")]
    return all(size % tensor == 0 for size in whole) and config.data.sequence_length % sequence == 0  # type: ignore[union-attr]


def row_parts(mesh: dict[str, int]) -> int:
    """Into how many parts a mesh divides the rows of a batch."""
    return mesh["replica"] * mesh["data"] * mesh["fsdp"]


def layers_of(config: Config, tensor: int) -> list[tuple[str, dict[str, float]]]:
    """Of each layer its stage, if it has one, and the elements of a whole row or image that it makes, by the names of
    docs/memory.md."""
    model: Any = config.model
    if isinstance(config.data, ImageData):
        return [
            (
                block.name[0],
                {
                    "input": before**2 * block.channels_in,
                    "reduce": before**2 * block.mid,
                    "spatial": 2 * after**2 * block.mid,
                    "expand": after**2 * block.channels_out,
                },
            )
            for block, before, after in sides(model, config.data.image_size)
        ]
    kinds = [model.pattern[i % len(model.pattern)] for i in range(model.depth)]
    length = config.data.sequence_length
    return [("", {name: length * width for name, width in widths(model, kind, tensor).items()}) for kind in kinds]


def widths(model: Any, kind: str, tensor: int) -> dict[str, float]:
    """Elements a token of what a layer makes."""
    if kind == "lru":
        state = 2 * model.state_size / tensor
        mixer = {"rnn_in": state, "rnn": state * (1 + model.bidirectional), "rnn_out": model.width}
        return {"input": model.width, **mixer, "mlp_up": 2 * model.width / tensor}
    if kind == "rec":
        mixer = {"rnn_in": 2 * model.rnn_width / tensor, "rnn": model.rnn_width / tensor, "rnn_out": model.width}
    else:
        head = getattr(model, "head_dim", 0) or model.width // model.num_heads
        heads, kv_heads = model.num_heads / tensor, getattr(model, "num_kv_heads", 1)
        mixer = {"qkv": (heads + 2 * kv_heads) * head, "context": heads * head, "attn_out": model.width}
    return {"input": model.width, **mixer, "mlp_up": 2 * model.mlp_width / tensor, "mlp_out": model.width}


def kept(stage: str, layer: dict[str, float], trainer: Any) -> float:
    """Elements that wait for the backward pass."""
    if trainer.remat == "none":
        return 2.5 * sum(layer.values())  # with all that lies between the products
    if trainer.remat == "dots" or stage in trainer.save:
        return sum(layer.values())
    return layer["input"] + math.fsum(layer.get(name, 0.0) for name in trainer.save)
