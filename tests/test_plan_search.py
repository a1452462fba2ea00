"""`podwright plan --search`: what is tried, in which order, and what is said of it. The compiler is another function here;
tests/test_plan_aot.py has it."""

import json
import math
import re

import pytest

from configs.overrides import resolve
from configs.schema import MESH_FIELDS
from launch.plan_search import Candidate, candidates, nested, remedy, search, told, with_values
from sharding.arithmetic import predict, widths
from sharding.topologies import find_topology

V5E = find_topology("v5e-16")
PARAMETERS, FLOPS = 2_614_341_888, 2.5e15  # Gemma 2 2B


@pytest.fixture(scope="module")
def gemma():
    return resolve("gemma2-2b", ["--data.batch_size", "64", "--data.sequence_length", "2048"]).config


@pytest.fixture(scope="module")
def tried(gemma):
    return candidates(gemma, V5E, PARAMETERS, FLOPS)


def test_every_candidate_is_a_config_of_the_same_batch_that_fills_the_topology(gemma, tried):
    assert len({str(c.values) for c in tried}) == len(tried) > 100
    for one in tried:
        assert math.prod(one.values[f"mesh.{axis}"] for axis in MESH_FIELDS) == 16
        parts = math.prod(one.values[f"mesh.{axis}"] for axis in ("replica", "data", "fsdp"))
        assert 64 % (parts * one.values["trainer.microbatches"]) == 0
        assert with_values(gemma, one.values).data == gemma.data


def test_slices_are_replicas():
    config = resolve("griffin-1b", ["--data.batch_size", "64"]).config
    found = candidates(config, find_topology("v5e-16", 2), PARAMETERS, FLOPS)
    assert {c.values["mesh.replica"] for c in found} == {2}


def test_images_divide_rows_but_no_heads():
    found = candidates(resolve("nfnet-f0", ["--data.image_size", "36"]).config, V5E, PARAMETERS, FLOPS)
    assert {(c.values["mesh.tensor"], c.values["mesh.sequence"]) for c in found} == {
        (1, 1),
        (1, 2),
    }  # 4 can't halve 36 rows


def predicted(config, mesh, *words):
    sizes = dict.fromkeys(MESH_FIELDS, 1) | mesh
    values = dict(word.split("=") for word in words)
    return predict(with_values(config, values), V5E, sizes, PARAMETERS, FLOPS)


def test_arithmetic_divides_parameters_and_moments_and_counts_what_layers_keep(gemma):
    layer = predicted(gemma, {"fsdp": 16}, "trainer.remat=layer")
    on_host = predicted(gemma, {"fsdp": 16}, "trainer.remat=layer", "optimizer.offload=true")
    assert layer.bytes - on_host.bytes == pytest.approx(8 * PARAMETERS / 16)
    saved = predicted(gemma, {"fsdp": 16}, "trainer.remat=layer", "trainer.save=context")
    tokens = 64 * 2048 / 16
    assert saved.bytes - layer.bytes == pytest.approx(26 * tokens * 8 * 256 * 2)  # 8 heads of 256, bfloat16
    assert predicted(gemma, {"fsdp": 16}, "trainer.remat=none").seconds < layer.seconds


def test_arithmetic_counts_what_blocks_of_images_keep():
    """NFNet-F0 at 192 pixels: 48, 24, 12 and 6 pixels a side behind the stages; SGD has one moment."""
    config = resolve("nfnet-f0", []).config
    layer = predicted(config, {"fsdp": 16}, "trainer.remat=layer")
    on_host = predicted(config, {"fsdp": 16}, "trainer.remat=layer", "optimizer.offload=true")
    assert layer.bytes - on_host.bytes == pytest.approx(4 * PARAMETERS / 16)
    saved = predicted(config, {"fsdp": 16}, "trainer.remat=layer", "trainer.save=expand")
    pixels = 48**2 * 256 + 2 * 24**2 * 512 + 6 * 12**2 * 1536 + 3 * 6**2 * 1536
    assert saved.bytes - layer.bytes == pytest.approx(4096 / 16 * 2 * pixels)
    stage = predicted(config, {"fsdp": 16}, "trainer.remat=layer", "trainer.save=stage_3")
    halved = 12**2 * 768 + 2 * 6**2 * 768 + 6**2 * 1536  # a first block halves behind its first convolution
    pixels = halved + 2 * (3 * 6**2 * 768 + 6**2 * 1536)
    assert stage.bytes - layer.bytes == pytest.approx(4096 / 16 * 2 * pixels)


def test_widths_are_those_of_the_projections(gemma):
    assert widths(gemma.model, "global", 2) == {
        "input": 2304, "qkv": 4 * 256 + 2 * 4 * 256, "context": 4 * 256, "attn_out": 2304, "mlp_up": 9216, "mlp_out": 2304,
    }  # fmt: skip


def compiler(tried, factor=1.0, failing=()):
    """Answers with what was predicted, memory times `factor`; remembers what it was asked."""
    asked = []

    def compile_one(candidate):
        asked.append(candidate)
        if len(asked) - 1 in failing:
            return {"failed": "the compiler died"}
        size = candidate.predicted.bytes * factor
        if size > V5E.hbm:
            return {"fits": False, "needs_gib": size / 2**30}
        return {"fits": True, "hbm_bytes": {"all": size, "capacity": V5E.hbm}, "step_seconds": candidate.predicted.seconds, "mfu": 0.5}  # fmt: skip

    return compile_one, asked


def test_the_fastest_that_should_fit_are_compiled_and_ranked(tried):
    compile_one, asked = compiler(tried)
    found = search(tried, V5E.hbm, 5, compile_one, lambda line: None, workers=1)
    roomy = [c for c in tried if c.predicted.bytes < V5E.hbm]
    assert found[0].candidate == roomy[0]
    times = [one.plan["step_seconds"] for one in found if one.fits]
    assert times == sorted(times)
    assert all(one.fits for one in found[: len(times)])
    assert set(map(id, roomy)) <= set(map(id, asked))


def test_what_the_compiler_says_corrects_the_arithmetic(tried):
    compile_one, asked = compiler(tried, factor=3.0)
    found = search(tried, V5E.hbm, 5, compile_one, lambda line: None, workers=1)
    refused = [one for one in found if not one.fits]
    assert any(one.fits for one in found)
    # Once one has failed nothing that should need more is tried, and predictions are three times as large.
    assert len(refused) < 10
    assert all(c.predicted.bytes * 3 < 1.1 * V5E.hbm for c in asked[1:])


def test_a_compiler_that_dies_is_told_and_the_search_goes_on(tried):
    compile_one, _ = compiler(tried, failing={0})
    said = []
    found = search(tried, V5E.hbm, 5, compile_one, said.append, workers=1)
    assert "the compiler died" in said[0]
    assert not found[-1].fits
    assert "the compiler died" in told(found[-1])


def test_nothing_is_started_once_the_time_is_over(tried):
    compile_one, asked = compiler(tried)
    assert search(tried, V5E.hbm, 0, compile_one, lambda line: None, workers=2) == []
    assert asked == []


def test_train_takes_the_winners_file(gemma, tried, tmp_path):
    winner = next(c for c in tried if c.values["trainer.save"] and c.values["mesh.tensor"] == 2)
    file = tmp_path / "best.json"
    file.write_text(json.dumps(nested(winner.values)))
    config = resolve("gemma2-2b", ["--config", str(file)]).config
    assert config.trainer.save == winner.values["trainer.save"]
    assert config.mesh.tensor == 2
    by_words = resolve("gemma2-2b", [*winner.words_unlike(gemma)]).config
    assert by_words.trainer == config.trainer
    assert by_words.mesh == config.mesh


def test_candidates_are_told_by_what_differs():
    values = {f"mesh.{axis}": 1 for axis in MESH_FIELDS} | {
        "mesh.fsdp": 8, "trainer.remat": "layer", "trainer.save": ("context",), "trainer.offload": (),
        "trainer.microbatches": 2, "optimizer.offload": True,
    }  # fmt: skip
    said = Candidate(values, None).describe()
    assert said == "fsdp 8, remat layer+context, 2 microbatches, moments on the host"


@pytest.mark.parametrize(
    ("words", "product", "gib", "sentence"),
    [
        # Full recomputation of this step is 2.9 GiB by the compiler.
        (
            "--trainer.remat none",
            "v5e-256",
            31.6,
            r"by arithmetic, --trainer.remat layer fits, in 1\.\d\d times the time",
        ),
        # Activations of 16 rows a device are all but the whole, and microbatches of 4 rows take a quarter.
        (
            "--data.batch_size 256",
            "v5e-16",
            40,
            r"by arithmetic, --trainer.microbatches 4 fits, in 1\.0\d times the time",
        ),
        # State alone is 2.5e9 parameters of 16 bytes a device: 37 GiB. Eight devices have room for an eighth and a few rows.
        ("--data.batch_size 8", "v5e-1", 60, r"by arithmetic, v5e-8 is the smallest that it fits"),
        ("--data.batch_size 1", "v5e-1", 60, r"no mesh, recomputation or larger slice that this knows of would do"),
    ],
)
def test_what_does_not_fit_is_told_the_smallest_change(words, product, gib, sentence):
    config, topology = resolve("gemma-2b", words.split()).config, find_topology(product)
    mesh = dict.fromkeys(MESH_FIELDS, 1) | {"fsdp": topology.devices}
    assert re.fullmatch(sentence, remedy(config, topology, mesh, gib))
