"""What a mesh does not divide is chosen by one policy, said with its size, and costs what arithmetic says."""

import re

import jax
import pytest
from jax.sharding import PartitionSpec as P

from configs.overrides import resolve
from models.params import Init, named_leaves, storage
from sharding.fallbacks import fallbacks
from sharding.mesh import abstract_mesh
from sharding.rules import rules_for
from trainer.program import make_program
from trainer.tasks import make_task


def program_on(name: str, devices: int, *words: str):
    config = resolve(name, words).config
    mesh = abstract_mesh(config.mesh, devices)
    with jax.sharding.use_abstract_mesh(mesh):
        return make_program(config, make_task(config), mesh).state, mesh


# Parameters on fsdp 4 and tensor 4: an axis that does not divide its own dimension divides the largest that it can.
KEPT = [
    (("embed", "heads", None), (64, 8, 16), P("fsdp", "tensor", None)),
    (("embed", "heads", None), (64, 10, 16), P(("fsdp", "tensor"), None, None)),
    (("embed", "heads", None), (66, 8, 16), P(None, "tensor", "fsdp")),
    (("embed", "heads", None), (66, 10, 16), P(None, None, ("fsdp", "tensor"))),
    (("embed", "mlp"), (64, 100), P("fsdp", "tensor")),
    (("embed", "mlp"), (66, 48), P(None, ("tensor", "fsdp"))),
    (("embed", "mlp"), (66, 50), P(None, None)),
    (("gate_rows", None), (32, 8), P(("tensor", "fsdp"), None)),
    (("gate_rows", None), (8, 8), P("tensor", "fsdp")),
    ((None, None, "channels_in", "channels_out"), (3, 3, 8, 18), P(None, None, "fsdp", None)),
    ((None,), (64,), P(None)),  # a vector is whole
]


@pytest.mark.parametrize(("axes", "shape", "expected"), KEPT)
def test_an_axis_that_does_not_divide_its_dimension_divides_another(axes, shape, expected):
    mesh = abstract_mesh(resolve("griffin-tiny", ["--mesh.fsdp", "4", "--mesh.tensor", "4"]).config.mesh, 16)
    key = jax.random.key(0)
    with jax.sharding.use_abstract_mesh(mesh):
        spec = rules_for(mesh).spec
        assert storage(spec, shape, axes) == expected
        fitted = Init(key, spec).fitted(embed=shape[0], heads=10, mlp=50).spec
        assert storage(fitted, shape, axes) == expected  # that it is whole in use doesn't matter


def test_a_fitted_spec_has_only_what_the_mesh_divides():
    mesh = abstract_mesh(resolve("griffin-tiny", ["--mesh.fsdp", "2", "--mesh.tensor", "4"]).config.mesh, 8)
    key = jax.random.key(0)
    with jax.sharding.use_abstract_mesh(mesh):
        init = Init(key, rules_for(mesh).spec)
        assert init.fitted(heads=8, mlp=12).spec is init.spec
        assert init.fitted(heads=10, mlp=12).spec("batch", "mlp", "heads") == P(
            ("replica", "data", "fsdp"), "tensor", None
        )


@pytest.mark.parametrize("words", ["--mesh.fsdp 16", "--mesh.fsdp 8 --mesh.tensor 2"])
@pytest.mark.parametrize("name", ["recurrentgemma-2b", "griffin-7b", "gemma2-9b"])
def test_nothing_is_said_where_everything_divides(name, words):
    state, mesh = program_on(name, 16, *words.split())
    assert fallbacks(state, mesh) == []
    # Gate by gate, too: no matrix is whole.
    whole = [n for n, leaf in named_leaves(state.model).items() if leaf.sharding.is_fully_replicated]
    assert not [n for n in whole if n.endswith(("kernel", "table"))]


def test_recurrentgemma_on_four_devices_of_tensor_says_what_it_costs():
    """18 recurrences with two biases of 2560; of each, and of both moments, a device has all and not a quarter."""
    found = fallbacks(*program_on("recurrentgemma-2b", 16, "--mesh.fsdp", "4", "--mesh.tensor", "4"))
    heads, gates = sorted(found, reverse=True)
    assert heads == (
        "heads 10 is not a multiple of tensor 4 (2 divides it): each device computes all, groups/attn_2/mixer/q/kernel and "
        "1 more are divided along another dimension, 0.0 MiB more a device with moments"
    )
    assert gates.startswith(
        "gate_blocks 10 is not a multiple of tensor 4 (2 divides it): each device gathers their inputs"
    )
    cost = 18 * 2 * 2560 * 4 * 3 * 3 / 4 / 2**20
    assert gates.endswith(f"are copied, {cost:.1f} MiB more a device with moments")


def test_more_devices_than_a_width_has_parts_are_told_that_they_hold_copies():
    """Gemma 2 2B (2304 x 9216, heads of 256) on 4096: only norms and biases should be whole."""
    state, mesh = program_on("gemma2-2b", 4096, "--mesh.fsdp", "4096", "--data.batch_size", "4096")
    (sentence,) = fallbacks(state, mesh)
    assert "embed 2304 is not a multiple of fsdp 4096 (256 divides it)" in sentence
    matrices = {n: leaf for n, leaf in named_leaves(state.model).items() if n.endswith(("kernel", "table"))}
    large = sum(leaf.size for leaf in matrices.values() if leaf.sharding.is_fully_replicated)
    cost = float(re.search(r"([\d,.]+) MiB more", sentence)[1].replace(",", ""))
    assert cost == pytest.approx(3 * 4 * large * 4095 / 4096 / 2**20, abs=0.1)
    assert large > 2e9


def test_a_networks_channels_are_divided_where_they_can_be():
    words = "--mesh.fsdp 16 --model.widths 64,96,120,128"
    (sentence,) = fallbacks(*program_on("nfnet-tiny", 16, *words.split()))
    assert sentence.startswith("channels_out 60, 120 are not multiples of fsdp 16 (4 divides them): ")
