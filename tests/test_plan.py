"""A plan's figures are the arithmetic of a config and a topology, and its table says what they are made of.

What needs the compiler is in test_plan_aot.py.
"""

import dataclasses
import json
import pathlib
import re
import subprocess
import sys

import pytest
from test_hlo import golden

from configs.overrides import resolve
from configs.parameters import COUNTS
from launch import cli
from launch.plan import Compiled, Plan, make_plan
from launch.plan_table import count, lines, show
from models import FAMILIES
from sharding import aot
from sharding.topologies import find_topology

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def no_libtpu(monkeypatch):
    monkeypatch.setattr(aot, "has_libtpu", lambda: False)
    monkeypatch.setattr(aot, "prepare", lambda: None)


def planned(name: str, product: str, *words: str) -> Plan:
    return make_plan(resolve(name, words).config, find_topology(product), price=2.0)


@pytest.mark.parametrize(("name", "product"), [("griffin-7b", "v5p-128"), ("gemma3-27b", "v6e-256")])
def test_without_the_compiler_a_plan_is_closed_forms(name, product):
    plan = planned(name, product, "--data.batch_size", "256")
    config = plan.config
    assert plan.count == COUNTS[config.model.kind](config.model).total
    # float32 parameters over all devices, but for vectors; two moments, and two counts of steps
    assert plan.parameters == pytest.approx(4 * plan.count / plan.topology.devices, rel=0.03)
    assert plan.optimizer == 2 * plan.parameters + 2 * 4
    tokens = 256 * config.data.sequence_length
    flops = tokens * FAMILIES[config.model.kind].train_flops(config.model, config.data.sequence_length)
    peak = {"v5p-128": 64 * 459e12, "v6e-256": 256 * 918e12}[product]
    assert plan.step_seconds == pytest.approx(flops / peak)
    assert plan.chip_hours == pytest.approx(config.trainer.steps * flops / peak / 3600 * plan.topology.chips)
    assert plan.as_dict()["usd"] == pytest.approx(2 * plan.chip_hours)
    assert plan.as_dict()["fits"] is None


def test_without_the_compiler_the_table_says_so(capsys):
    show(planned("griffin-7b", "v5p-128"), "")
    out = capsys.readouterr().out
    assert "libtpu is not installed, nothing was compiled" in out
    assert "MFU" not in out
    assert all(f"{words} at least" in re.sub(" +", " ", out) for words in ("memory", "step", "steps:"))


def test_a_state_larger_than_memory_is_seen_without_the_compiler():
    (memory,) = (
        text
        for about, text, _ in lines(planned("gemma3-27b", "v5e-8", "--data.batch_size", "8"), "")
        if about == "memory"
    )
    assert re.search(r"at least 37\.\d\d of 16\.00 GiB a device, \d+ %: 21\.\d\d GiB too much", memory)


def compiled_plan(**changes) -> Plan:
    """As if the compiler had been there."""
    estimate = golden("mean_over_slices", "v5e-4", 2)
    compiled = Compiled(2**30, 2**20, 0, 2**21, 61.0, dataclasses.replace(estimate, **changes), "jax 1, libtpu 2")
    return dataclasses.replace(planned("griffin-400m", "v5e-16"), compiled=compiled)


def test_the_step_is_the_sum_that_the_table_prints():
    estimate = dict(flops=4e12, bytes=2e10, compute=0.2, roofline=0.1, streaming=0.05)
    plan = compiled_plan(**estimate)
    table = {about.strip(): text for about, text, _ in lines(plan, "")}
    total, compute, exposed = (float(n) for n in re.findall(r"([\d.]+) ms", table["step"]))
    assert total == pytest.approx(compute + exposed, abs=0.1)
    assert total == pytest.approx(1e3 * plan.step_seconds, abs=0.1)
    assert table["MFU"] == f"{100 * plan.flops / (16 * 197e12 * plan.step_seconds):.1f} %"
    assert table["temporaries"].strip() == "1.001 GiB"
    assert (table["DCN"].strip(), table["products"].strip()) == ("0.000524 GB", "4 TFLOP")
    assert table["HBM"].strip() == "20 GB"
    per_second = plan.config.data.batch_size * plan.config.data.sequence_length / plan.step_seconds
    assert table["speed"] == f"{per_second:,.0f} tokens/s, {per_second * 86400 / 1e9:.0f} billion a day"


def test_the_table_fits_on_a_screen():
    plan = compiled_plan(unread={f"thing {n}": 3 for n in range(2)})
    kinds = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
    traffic = next(iter(plan.compiled.estimate.collectives.values()))
    every = {(kind, network): traffic for kind in kinds for network in ("ICI", "DCN")}
    full = dataclasses.replace(plan.compiled, estimate=dataclasses.replace(plan.compiled.estimate, collectives=every))
    found = list(lines(dataclasses.replace(plan, compiled=full, notes=["one", "two"]), ", list price"))
    assert len(found) <= 40
    assert max(len(text) + len(remark) for _, text, remark in found) < 150


def test_amounts_have_words():
    assert [count(n) for n in (950, 12_345, 3.2e6, 4.56e9, 1.2e12)] == [
        "950",
        "12,345",
        "3.2 million",
        "4.56 billion",
        "1.2 trillion",
    ]


REFUSED = [
    ("griffin-400m", "podwright plan needs the TPUs to plan for, for example --topology v5e-256"),
    ("griffin-400m --topology v5e-17", "--topology v5e-17 is not known, perhaps v5e-16: v5e is known with 1, 4, 8, 16"),
    ("griffin-400m --topology v5e-16 --slices two", "--slices two is not a whole number from 0 on"),
    ("griffin-400m --topology v5e-16 --minutes 3", "--minutes is of no use without --search"),
    ("griffin-400m --topology v5e-16 --search --json f", "--json is of one plan, not of --search"),
    ("griffin-tiny --topology v5e-16 --search --distill.teacher runs/t", "can't be planned: only runs without a teacher can"),
    ("griffin-400m --topology v5e-16 --price nan", "--price nan is not a number from 0 on"),
    ("griffin-400m --topology v5e-16 --json /no/such/folder/f", "--json /no/such/folder/f can't be written: /no/such/folder is not a folder"),
    ("griffin-400m --topology v5e-16 --mesh.fsdp 3", "fsdp 3 does not fill the 16 tpu devices here: the axes must multiply to 16; set one to -1\n"),
    ("griffin-400m --topology v5e-16 --data.batch_size 24", "data.batch_size=24 is not a multiple of 16"),
    ("griffin-400m --topology v5e-16 --distill.teacher runs/x", "distill.teacher='runs/x' can't be planned"),
    ("griffin-400m --topologie v5e-16", "--topologie is not a field, perhaps --topology"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "sentence"), REFUSED)
def test_a_mistake_is_one_sentence(words, sentence, capsys):
    assert cli.main(["plan", *words.split()]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_a_wrong_topology_is_told_before_jax_is_loaded():
    program = (
        "import sys, launch.cli; code = launch.cli.main(['plan', 'griffin-tiny', '--topology', 'v5e-17']); "
        "print(code, 'jax' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert ended.stdout.split() == ["2", "False"]


def test_the_json_holds_what_the_table_says(tmp_path, capsys):
    file = tmp_path / "plan.json"
    assert cli.main(["plan", "griffin-tiny", "--topology", "v5e-4", "--price", "3", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert (found["chips"], found["mesh"]["data"], found["usd_per_chip_hour"]) == (4, 4, 3.0)
    assert f"{found['parameters']:,} parameters" in capsys.readouterr().out
    assert found["hbm_bytes"]["parameters"] == 4 * found["parameters"]


# What libtpu 0.0.42.1 says, and how XLA for TPUs has long said it.
TEMPORARIES = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (146.54G) exceeds available "
    "HBM (15.75G)."
)
WHOLE = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 31.62G of 15.75G hbm. "
    "Exceeded hbm capacity by 15.87G."
)


def test_what_does_not_fit_says_by_how_much():
    assert str(aot.too_large(TEMPORARIES)) == (
        "does not fit: its temporaries alone take 146.54 GiB of the 15.75 GiB HBM of a device, 130.79 GiB too much"
    )
    assert str(aot.too_large(WHOLE)) == (
        "does not fit: it takes 31.62 GiB of the 15.75 GiB HBM of a device, 15.87 GiB too much"
    )
    assert aot.too_large(WHOLE.replace("31.62G", "800.0M")).used == 800 / 1024
    assert aot.too_large("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem.") is None
