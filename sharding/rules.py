"""The one table from logical axis names to mesh axes. Models name axes only logically; nothing else names mesh axes."""

import dataclasses
import functools
import math
from dataclasses import dataclass

from jax.sharding import AbstractMesh, Mesh, PartitionSpec

FSDP = "fsdp"  # a mesh may have several axes of it: fsdp, fsdp_2, ...
BATCH = ("replica", "data", FSDP)


@dataclass(frozen=True)
class Rules:
    """Which mesh axes divide which logical axis; None leaves it whole on every device.

    Parameters are divided along `embed` (fully sharded) and along one of the tensor axes; a layer gathers its
    parameters' `embed` axis before it multiplies. Activations are divided along batch, seq and the tensor axes.
    """

    batch: tuple[str, ...] | str | None = BATCH
    seq: tuple[str, ...] | str | None = None  # tokens of a sequence; see `rules_for`
    embed: tuple[str, ...] | str | None = "fsdp"  # the parameters' model width; the activations' width stays whole
    mlp: tuple[str, ...] | str | None = "tensor"
    heads: tuple[str, ...] | str | None = "tensor"
    kv_heads: tuple[str, ...] | str | None = None  # few: replicated over the tensor axis
    rnn: tuple[str, ...] | str | None = "tensor"  # recurrence channels
    gate_blocks: tuple[str, ...] | str | None = "tensor"  # diagonal blocks of the RG-LRU gates
    gate_rows: tuple[str, ...] | str | None = ("tensor", "fsdp")  # the rows of all blocks, as they are stored
    vocab: tuple[str, ...] | str | None = "tensor"
    layers: tuple[str, ...] | str | None = None  # stacked layers are scanned over
    channels_in: tuple[str, ...] | str | None = None
    channels_out: tuple[str, ...] | str | None = "fsdp"  # convolution and dense kernels of NFNet

    def spec(self, *names: str | None) -> PartitionSpec:
        """PartitionSpec of an array whose axes have these logical names (None: not divided).

        Raises ValueError if one mesh axis would divide two axes of the same array.
        """
        axes = [None if name is None else getattr(self, name) for name in names]
        used = [mesh_axis for axis in axes if axis for mesh_axis in ((axis,) if isinstance(axis, str) else axis)]
        if len(used) != len(set(used)):
            table = {name: axis for name, axis in zip(names, axes, strict=True) if axis}
            raise ValueError(f"one mesh axis would divide two axes of one array: {table}")
        return PartitionSpec(*axes)

    def size(self, name: str, mesh: Mesh | AbstractMesh) -> int:
        """Number of parts into which `mesh` divides the logical axis `name`."""
        axis = getattr(self, name)
        return math.prod(mesh.shape[a] for a in ((axis,) if isinstance(axis, str) else axis or ()))


def rules_for(mesh: Mesh | AbstractMesh) -> Rules:
    """The rules on this mesh, with all its axes of fsdp. Only where it has devices to share a sequence do they divide it: the
    models that can't (and decoding, which has one token to divide) then never see that axis."""
    fsdp = tuple(axis for axis in mesh.axis_names if axis.startswith(FSDP))
    return _rules("sequence" if mesh.shape["sequence"] > 1 else None, fsdp)


@functools.cache
def _rules(seq: str | None, fsdp: tuple[str, ...]) -> Rules:
    """One object a table: models keep its `spec`, and two models are of one structure only if theirs is the same."""
    if len(fsdp) == 1:
        return Rules(seq=seq)
    batch, gate_rows = (*BATCH, *fsdp[1:]), ("tensor", *fsdp)
    return Rules(seq=seq, batch=batch, embed=fsdp, gate_rows=gate_rows, channels_out=fsdp)


def logical_axes() -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(Rules))
