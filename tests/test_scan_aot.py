"""The scan kernels compile for every TPU generation we train on, and nothing is copied around them."""

import os
import re

import jax
import jax.numpy as jnp
import pytest

from models.rg_lru import rg_lru_scan
from models.scan import linear_scan

pytestmark = [pytest.mark.tpu_aot, pytest.mark.slow]

# What libtpu must find to compile on a machine without a TPU, quietly and next to other processes that do the same.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
CHIPS = {
    "v4": ("v4:2x2x1", {"chip_config_name": "megacore"}),
    "v5e": ("v5e:2x2", {}),
    "v5p": ("v5p:2x2x1", {}),
    "v6e": ("v6e:2x2", {}),
}
SIZES = [(8, 2048, 2560), (8, 8192, 4096)]  # RecurrentGemma 2B's width with its blocks of 256, and 9B's


@pytest.fixture(scope="module")
def libtpu():
    pytest.importorskip("libtpu", reason="compiles for TPUs with libtpu, of the extra `tpu`")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


@pytest.fixture(params=CHIPS)
def chip(libtpu, request):
    from jax.experimental import topologies

    name, options = CHIPS[request.param]
    topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    return jax.sharding.SingleDeviceSharding(topology.devices[0])


def compiled_text(function, chip, *arrays) -> str:
    arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=chip) for shape, dtype in arrays]
    # The tests' "highest" precision would make bf16 products on a TPU float32 ones; training asks for the default.
    with jax.default_matmul_precision("default"):
        return jax.jit(function).trace(*arrays).lower(lowering_platforms=("tpu",)).compile().as_text()


def moves(text: str, size: int) -> list[str]:
    """Instructions that copy, transpose, pad or re-lay an array as large as the activations."""
    found = []
    for line in text.splitlines():
        match = re.search(r"= \(?\w+\[([\d,]*)\]\S* (copy|copy-start|transpose|pad|reshape|concatenate|slice)\(", line)
        if match and match[1]:
            elements = 1
            for extent in match[1].split(","):
                elements *= int(extent)
            if elements >= size // 2:
                found.append(line.strip()[:160])
    return found


@pytest.mark.parametrize("shape", SIZES)
def test_linear_scan_compiles_without_copies(chip, shape):
    batch, _, width = shape
    big, state = (shape, jnp.bfloat16), ((batch, width), jnp.float32)

    def both(a, x, h0, dh, dh_last):
        out, pullback = jax.vjp(linear_scan, a, x, h0)
        return out, pullback((dh, dh_last))

    text = compiled_text(both, chip, big, big, state, big, state)
    assert text.count('custom_call_target="tpu_custom_call"') == 2
    assert moves(text, batch * shape[1] * width) == []


@pytest.mark.parametrize("shape", SIZES)
def test_rg_lru_compiles_without_copies(chip, shape):
    check_rg_lru(chip, shape, groups=shape[2] // 256)


@pytest.mark.parametrize(("groups", "block"), [(16, 64), (16, 96), (16, 128), (16, 160), (8, 320), (8, 512)])
def test_rg_lru_compiles_without_copies_for_every_gate_block(libtpu, groups, block):
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    check_rg_lru(jax.sharding.SingleDeviceSharding(topology.devices[0]), (2, 1024, groups * block), groups)


def check_rg_lru(chip, shape, groups):
    batch, length, width = shape
    big, state = (shape, jnp.bfloat16), ((batch, width), jnp.float32)
    gate = [((groups, width // groups, width // groups), jnp.bfloat16), ((groups, width // groups), jnp.float32)]

    def both(u, positions, dh, dh_last, *rest):
        out, pullback = jax.vjp(lambda u, *rest: rg_lru_scan(u, positions, *rest), u, *rest)
        return out, pullback((dh, dh_last))

    arrays = [big, ((batch, length), jnp.int32), big, state, *gate, *gate, ((width,), jnp.float32), state]
    text = compiled_text(both, chip, *arrays)
    assert text.count('custom_call_target="tpu_custom_call"') == 2
    assert moves(text, batch * length * width) == []
