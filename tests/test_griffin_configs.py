"""The published Griffins as configs: their sizes are the papers' and the count told before jax is that of the model."""

import subprocess
import sys

import jax
import pytest
from runs import ROOT

from configs import EXPERIMENTS
from configs.parameters import COUNTS
from models.griffin import Griffin
from models.params import Init
from sharding.rules import Rules

CONFIGS = {name: config for name, make in EXPERIMENTS.items() if (config := make()).model.kind == "griffin"}
# Millions of parameters without the embedding, from the shapes in table 2 of arXiv 2402.19427.
PAPER = {
    "griffin": {"100m": 89, "200m": 163, "400m": 355, "1b": 1243, "3b": 2835, "7b": 6790, "14b": 13764},
    "hawk": {"100m": 94, "200m": 174, "400m": 375, "1b": 1304, "3b": 2997, "7b": 7176},
    "transformer": {"100m": 80, "200m": 142, "400m": 316, "1b": 1120, "3b": 2511, "7b": 5940},
}
RELEASED = {  # exact: (total, without embedding), arXiv 2404.07839 and the released files
    "recurrentgemma-2b": (2_682_862_080, 2_027_502_080),
    "recurrentgemma-9b": (8_579_977_216, 7_531_401_216),
}


def test_every_published_size_is_there():
    published = {f"{family}-{size}" for family, sizes in PAPER.items() for size in sizes} | RELEASED.keys()
    assert published <= CONFIGS.keys()
    named = {name for name in CONFIGS if name.startswith((*PAPER, "recurrentgemma")) and not name.endswith("-chat")}
    assert named - published == {"griffin-tiny", "griffin-tiny-private"}
    for name, config in CONFIGS.items():
        assert config.name == name


@pytest.mark.parametrize("name", CONFIGS)
def test_the_closed_form_counts_the_parameters_of_the_model(name, one_device):
    model = CONFIGS[name].model
    shapes = jax.eval_shape(lambda key: Griffin(model, Init(key, Rules().spec)), jax.random.key(0))
    count = COUNTS["griffin"](model)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count.total
    assert shapes.embedding.table.size == count.embedding


@pytest.mark.parametrize(("family", "size"), [(f, s) for f, sizes in PAPER.items() for s in sizes])
def test_the_papers_models_have_the_papers_sizes(family, size):
    config = CONFIGS[f"{family}-{size}"]
    count = COUNTS["griffin"](config.model)
    assert (count.total - count.embedding) / 1e6 == pytest.approx(PAPER[family][size], abs=1)
    assert config.model.num_gate_blocks == 16
    assert config.model.width == 128 * config.model.num_heads
    assert config.data.sequence_length == 2048
    tokens = config.trainer.steps * config.data.batch_size * config.data.sequence_length
    assert 18 < tokens / (count.total - count.embedding) < 28  # about 20 a parameter, as the paper counts them


@pytest.mark.parametrize("name", RELEASED)
def test_recurrentgemma_has_the_released_size(name):
    count = COUNTS["griffin"](CONFIGS[name].model)
    assert (count.total, count.total - count.embedding) == RELEASED[name]


def test_the_papers_transformer_sees_every_token_of_a_row():
    for name, config in CONFIGS.items():
        if name.startswith("transformer"):
            assert config.model.window >= config.data.sequence_length - 1


def test_config_tells_the_number_of_parameters_without_jax():
    program = "import sys; from launch.cli import main; main(sys.argv[1:]); assert 'jax' not in sys.modules"
    command = [sys.executable, "-c", program, "config", "recurrentgemma-2b"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1] == "2,682,862,080 parameters, 2,027,502,080 without the embedding"
