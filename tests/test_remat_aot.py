"""On a TPU, what is offloaded leaves HBM for the host, and what is kept takes what docs/memory.md says, by the compiler's
account: podwright plan, a chip of v5e-4."""

import functools
import json
import pathlib
import sys
import tempfile

import pytest
from runs import finish

pytestmark = [pytest.mark.tpu_aot, pytest.mark.slow]

ROWS, T = 4, 2048  # of a chip; bfloat16
WORDS = "--data.batch_size 16 --data.sequence_length 2048 --trainer.compute_dtype bfloat16 --trainer.remat layer"
MODELS = {
    "griffin-tiny": "--model.width 256 --model.rnn_width 256 --model.mlp_width 512 --model.num_heads 2 --model.depth 12",
    "gemma-tiny": "--model.width 256 --model.mlp_width 512 --model.num_heads 2 --model.num_kv_heads 1 "
    "--model.head_dim 128 --model.depth 12 --model.window 1024",
}
INPUT, UP = ROWS * T * 256 * 2, ROWS * T * 2 * 512 * 2  # bytes of a layer


@pytest.fixture(scope="module", autouse=True)
def libtpu():
    pytest.importorskip("libtpu")


@functools.cache
def planned(name: str, words: str = "") -> dict:
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "plan.json"
        given = [name, "--topology", "v5e-4", *f"{WORDS} {MODELS[name]} {words}".split(), "--json", str(file)]
        code, _, error = finish([sys.executable, "-m", "launch", "plan", *given])
        assert code == 0, error
        return json.loads(file.read_text())


# As `layer`, without the scans inside groups that there are where nothing but inputs is kept.
INPUTS = "--trainer.save input"


def more(name: str, words: str, part: str, than: str = INPUTS) -> int:
    return planned(name, words)["hbm_bytes"][part] - planned(name, than)["hbm_bytes"][part]


def copies(plan: dict) -> dict[str, float]:
    return {c["network"]: c["bytes"] for c in plan["step"]["collectives"] if c["kind"] == "copy"}


# Whole groups in a loop: of 12 layers of Gemma, two groups, the compiler makes a program without one.
DEPTHS = "--model.depth 48", "--model.depth 96"
FURTHER = 48  # layers


def grown(name: str, words: str, part: str) -> int:
    """By how much 48 further layers raise a part of HBM."""
    few, many = (planned(name, f"{words} {depth}")["hbm_bytes"][part] for depth in DEPTHS)
    return many - few


@pytest.mark.parametrize("name", MODELS)
def test_inputs_on_the_host_leave_hbm(name):
    """A further layer then takes no more than its gradient, float32, and its weights, bfloat16."""
    words = "--trainer.offload input"
    assert grown(name, words, "temporaries") < 1.5 * grown(name, words, "parameters") + 0.15 * FURTHER * INPUT
    assert grown(name, words, "temporaries") < grown(name, INPUTS, "temporaries") - 0.85 * FURTHER * INPUT
    assert planned(name, f"{INPUTS} {DEPTHS[1]}")["host_bytes"] == 0
    away = planned(name, f"{words} {DEPTHS[1]}")
    assert away["host_bytes"] == pytest.approx(96 * INPUT, rel=0.02)
    assert copies(away) == pytest.approx({"to host": 96 * INPUT, "from host": 96 * INPUT}, rel=0.02)


@pytest.mark.parametrize("name", MODELS)
def test_a_kept_product_takes_its_size_and_spares_its_flops(name):
    words = "--trainer.save mlp_up"
    kept = grown(name, words, "temporaries") - grown(name, INPUTS, "temporaries")
    assert kept == pytest.approx(FURTHER * UP, rel=0.15)
    with_input, with_up = (planned(name, f"{w} {DEPTHS[0]}")["step"]["flops"] for w in (INPUTS, words))
    assert with_input - with_up == pytest.approx(48 * 2 * ROWS * T * 256 * 2 * 512, rel=0.01)


def test_scans_inside_groups_take_less():
    assert more("gemma-tiny", "", "temporaries") < 0
    assert more("gemma-tiny", "", "program") < 0


def test_moments_on_the_host_come_for_the_update_alone():
    name, words = "griffin-tiny", "--optimizer.offload true"
    moments = 2 * planned(name)["hbm_bytes"]["parameters"]
    assert more(name, words, "optimizer", than="") == -moments
    # Those of gates, 64 features wide here, are padded to the 128 lanes of a register on their way.
    assert moments <= planned(name, words)["host_bytes"] < 1.06 * moments
    assert copies(planned(name, words)) == pytest.approx({"to host": moments, "from host": moments}, rel=0.06)
    # Fetched at the start of the step they would be temporaries beside the activations: 1.5 times their size, as measured.
    assert more(name, words, "temporaries", than="") < 0.3 * moments
