"""Attention's forward and backward pass compiled ahead of time for TPUs: JAX's splash kernels, our blocks, the square.

Run as `python -m benchmarks.attention [--out FILE]`, without a TPU; needs the extra `tpu`. Nothing is executed: memory is
the compiler's, and work is counted from the blocks that a program computes. One sequence in bfloat16.
"""

import importlib.util
import os
import sys

from benchmarks.scan import CHIPS, ENVIRONMENT
from benchmarks.tables import arguments, machine, publish, table

# tokens, query heads, key-value heads, head features, keys a query sees, soft cap
LAYERS = {
    "Gemma 2 2B, local": (8192, 8, 4, 256, 4096, 50.0),
    "Gemma 2 2B, global": (8192, 8, 4, 256, 8192, 50.0),
    "Gemma 3 12B, local": (32768, 16, 8, 256, 1024, 0.0),
    "Gemma 3 12B, global": (32768, 16, 8, 256, 32768, 0.0),
}
SIDES = {"splash kernels": "tpu", "blocks of queries": "xla", "square": None}
NOTES = """
- Beyond the layer's arrays: temporary memory of one layer's forward and backward pass; the arrays are q, k, v, the result
  and their gradients.
- Pairs: queries times keys whose scores are computed, over those that the mask leaves, in the forward pass and, for the
  kernels, in those for dk and dv and for dq. Their time is not known before a TPU has run them.
""".strip()


def main() -> None:
    options = arguments(__doc__)
    if importlib.util.find_spec("libtpu") is None:
        sys.exit("benchmarks.attention compiles with libtpu, which is not installed: pip install -e '.[tpu]'")
    for name, value in ENVIRONMENT.items():  # before jax is imported
        os.environ.setdefault(name, value)
    lines = ["# Attention, compiled for TPUs", ""]
    for chip in CHIPS:
        rows = [row(layer, side, chip) for layer in LAYERS for side in SIDES]
        heads = ("layer", "program", "arrays MiB", "beyond them MiB", "pairs computed / seen")
        lines += [f"## {chip}", "", *table(heads, rows), ""]
    publish([*lines, NOTES, "", machine()], options.out)


def row(layer: str, side: str, chip: str) -> list[str]:
    length, heads, kv_heads, features, _, _ = LAYERS[layer]
    arrays = 4 * length * (heads + kv_heads) * features * 2
    cells = [layer, side, f"{arrays / 2**20:,.0f}"]
    return [*cells, temporaries(layer, side, chip), computed(layer, side)]


def temporaries(layer: str, side: str, chip: str) -> str:
    """MiB, or why the program does not compile."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from configs.schema import MESH_FIELDS

    device = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip].topology).devices[0]
    axes = (jax.sharding.AxisType.Explicit,) * len(MESH_FIELDS)
    mesh = jax.sharding.Mesh([[[[[device]]]]], MESH_FIELDS, axis_types=axes)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    length, heads, kv_heads, features, _, _ = LAYERS[layer]
    arrays = [
        jax.ShapeDtypeStruct((1, length, n, features), jnp.bfloat16, sharding=whole)
        for n in (heads, kv_heads, kv_heads, heads)
    ]
    positions = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=whole)

    def both(q, k, v, dout, positions):
        out, pullback = jax.vjp(lambda q, k, v: attention(layer, side, q, k, v, positions), q, k, v)
        return out, pullback(dout)

    try:
        with jax.set_mesh(mesh):
            compiled = jax.jit(both).trace(*arrays, positions).lower(lowering_platforms=("tpu",)).compile()
    except jax.errors.JaxRuntimeError as error:
        return "does not fit" if "memory on HBM" in str(error) else str(error).splitlines()[0][:60]
    return f"{compiled.memory_analysis().temp_size_in_bytes / 2**20:,.0f}"


def attention(layer: str, side: str, q, k, v, positions):
    import jax
    import jax.numpy as jnp

    from models.attention import self_attention

    window, soft_cap = LAYERS[layer][4:]
    if SIDES[side]:
        return self_attention(q, k, v, positions, window - 1, soft_cap, implementation=SIDES[side])  # type: ignore[arg-type]
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32)
    scores = soft_cap * jnp.tanh(scores / soft_cap) if soft_cap else scores
    index, documents = jnp.arange(q.shape[1]), jnp.cumsum(positions == 0, axis=1)
    distance = index[:, None] - index[None, :]
    mask = ((distance >= 0) & (distance < window))[None] & (documents[:, :, None] == documents[:, None, :])
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -1e30), axis=-1).astype(v.dtype)
    return jnp.einsum("bnts,bsnh->btnh", weights, v)


def computed(layer: str, side: str) -> str:
    import jax.numpy as jnp

    from models.attention_blocks import Tiling
    from models.kernels import splash_tpu

    length, _, _, _, window, _ = LAYERS[layer]
    left = None if window == length else window - 1
    seen = window * (window + 1) / 2 + (length - window) * window
    if side == "square":
        return f"{length**2 / seen:.2f}"
    if side == "blocks of queries":
        tiling = Tiling.of(length, length, left)
        return f"{tiling.count * tiling.size * tiling.span / seen:.2f}"
    sizes = splash_tpu.block_sizes((0,), length, length, jnp.bfloat16)
    mask, found = splash_tpu.window(length, length, left), []
    passes = [
        (sizes.block_q, sizes.block_kv),
        (sizes.block_q_dkv, sizes.block_kv_dkv),
        (sizes.block_q_dq, sizes.block_kv_dq),
    ]
    for q, kv in passes:
        assert q is not None
        assert kv is not None
        blocks = [(slice(i, i + q), slice(j, j + kv)) for i in range(0, length, q) for j in range(0, length, kv)]
        found.append(f"{sum(mask[block].any() for block in blocks) * q * kv / seen:.2f}")
    return ", ".join(found)


if __name__ == "__main__":
    main()
