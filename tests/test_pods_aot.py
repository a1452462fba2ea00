"""No pod config needs more memory or sends more than was recorded of it: benchmarks/pods.json, the table in docs/pods.md."""

import datetime
import functools
import json
import subprocess
import sys

import pytest
from runs import ROOT

from benchmarks.pods import BEGIN, END, PAGE, PODS, RECORDS, page

RECORDED = json.loads(RECORDS.read_text())


@functools.cache
def found(name: str) -> dict:
    """In a process of its own: libtpu wants its environment before jax is imported."""
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.pods", "--case", name], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.partition("\n")[0].removeprefix(name))


def needs_no_more(name: str) -> None:
    pytest.importorskip("libtpu")
    now, then = found(name), RECORDED[name]
    for figure in ("hbm_bytes", "network_bytes"):
        assert now[figure] <= 1.03 * then[figure], (figure, now["versions"], then["versions"])


def test_the_page_shows_the_recorded_figures_of_every_config():
    assert list(RECORDED) == list(PODS)
    assert all(RECORDED[name]["words"] == words for name, words in PODS.items())
    assert PAGE.read_text().partition(BEGIN)[2].partition(END)[0] == page(RECORDED)


@pytest.mark.tpu_aot
def test_the_config_of_the_day_needs_no_more():
    """One a day of those below, for CI."""
    needs_no_more(list(PODS)[datetime.date.today().toordinal() % len(PODS)])


@pytest.mark.tpu_aot
@pytest.mark.slow
@pytest.mark.parametrize("name", PODS)
def test_no_config_needs_more(name):
    needs_no_more(name)
