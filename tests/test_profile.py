"""`train --profile` and `podwright profile`: what is recorded, and what the words of it say."""

import re
from types import SimpleNamespace

import pytest
from runs import finish, train_command

from configs.overrides import resolve
from configs.schema import ConfigError
from launch.profile import Spent, costliest, layer_of, main, merged, shared, spent, trace_of
from sharding.hlo import parse
from trainer.profiling import parse_steps

# As a TPU's compiler writes it, less what the reader doesn't look at.
PROGRAM = """HloModule jit_train_step

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %fusion.1 = f32[8]{0} fusion(%p), kind=kLoop, calls=%c, metadata={op_name="jit(train_step)/jvp()/while/body/closed_call/rec_0/mlp/btd,df->btf/dot_general"}
  %fusion.2 = f32[8]{0} fusion(%p), kind=kLoop, calls=%c, metadata={op_name="jit(train_step)/transpose(jvp())/while/body/closed_call/checkpoint/rec_0/mlp/transpose(jvp(btd,df->btf))/dot_general"}
  %all-gather-start.1 = (f32[8]{0}, f32[8]{0}) all-gather-start(%p), metadata={op_name="jit(train_step)/jvp()/all_gather"}
  %all-gather-done.1 = f32[8]{0} all-gather-done(%all-gather-start.1), metadata={op_name="jit(train_step)/jvp()/all_gather"}
  %all-reduce.1 = f32[8]{0} all-reduce(%fusion.2), to_apply=%add, metadata={op_name="jit(train_step)/transpose(jvp())/psum"}
  ROOT %while.1 = f32[8]{0} while(%all-reduce.1), condition=%w, body=%b, metadata={op_name="jit(train_step)/while"}
}
"""


def event(name, start_ms, end_ms, **stats):
    start, end = start_ms * 1e6, end_ms * 1e6
    return SimpleNamespace(name=name, start_ns=start, duration_ns=end - start, stats=list(stats.items()))


def plane(name, **lines):
    found = [SimpleNamespace(name=line.replace("_", " "), events=events) for line, events in lines.items()]
    return SimpleNamespace(name=name, lines=found)


def tpu():
    """Two steps: computation from 0 to 10 and 12 to 30, a collective from 8 to 14, one from 30 to 33, then from 40 to 44."""
    operations = [
        event("%while.1 = f32[8] while(...)", 0, 44),
        event("%fusion.1 = f32[8] fusion(...)", 0, 10),
        event("all-gather-done.1", 8, 14),
        event("fusion.2", 12, 30),
        event("all-reduce.1", 30, 33),
        event("fusion.1", 40, 44),
        event("fusion.of_another_program", 50, 90),
    ]
    host = [
        event("train", 0, 20, step_num=10),
        event("train", 20, 40, step_num=11),
        event("input", 32, 37),
        event("other", 0, 100),
    ]
    return [
        plane("/device:TPU:0", XLA_Ops=operations, XLA_Modules=[event("jit_train_step", 0, 44)]),
        plane("/host:CPU", python=host),
    ]


INSTRUCTIONS = {i.name: i for computation in parse(PROGRAM).computations.values() for i in computation.instructions}


def test_a_steps_time_is_divided_among_what_the_device_did():
    trace = trace_of(tpu())
    assert trace.steps == 2
    (device,) = trace.devices
    found = spent(device, trace, INSTRUCTIONS)
    # Computation 10 + 18 + 4; communication alone 10 to 12 and 30 to 33, beside computation 8 to 10 and 12 to 14; of the
    # idle 33 to 40 the host waits for data until 37.
    assert found == Spent(compute=32 / 2, exposed=5 / 2, hidden=4 / 2, input=4 / 2, gaps=3 / 2)
    assert found.step == pytest.approx(44 / 2)


def test_the_costliest_operations_have_the_names_of_their_layers():
    found = dict(costliest(trace_of(tpu()), INSTRUCTIONS))
    assert list(found)[:2] == ["rec_0/mlp: dot_general, backward", "rec_0/mlp: dot_general"]
    assert found["rec_0/mlp: dot_general, backward"] == pytest.approx(18 / 2)
    assert found["rec_0/mlp: dot_general"] == pytest.approx((10 + 4) / 2)
    assert layer_of(INSTRUCTIONS["all-reduce.1"]) == "outside of layers: psum, backward"


def test_intervals_are_united_and_intersected():
    assert merged([(5, 6), (0, 2), (1, 3)]) == [(0, 3), (5, 6)]
    assert shared([(0, 3), (5, 6)], [(2, 5.5)]) == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("ten", "--profile ten names no steps: give for example steps=10:15"),
        ("steps=5:5", "--profile steps=5:5 names no steps"),
        ("0:3", "--profile 0:3 names no steps"),
        ("steps=299:302", "--profile steps=299:302 asks for step 301, but trainer.steps=300 is the last"),
    ],
)
def test_steps_that_cannot_be_recorded_are_refused(given, sentence):
    config = resolve("griffin-tiny", [], {}).config
    with pytest.raises(ConfigError) as error:
        parse_steps(given, config)
    assert str(error.value).startswith(sentence)


def test_a_recorded_run_says_where_its_time_went(tmp_path, capsys):
    run = tmp_path / "run"
    # A cached program may have the names of an earlier version: they are no part of the cache's key.
    words = ("--trainer.steps", "5", "--profile", "steps=3:5", "--trainer.compilation_cache", "")
    code, out, err = finish(train_command("griffin-tiny", run, *words))
    assert code == 0, err
    code, again, err = finish(
        train_command("griffin-tiny", run, *words, "--trainer.steps", "6", "--allow", "trainer.steps")
    )
    assert code == 0, err
    assert "no profile: step 3 is behind, the run goes on from step 5" in again
    assert "profile of steps 3 to 4: " in out
    assert main([str(run)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1].endswith("of 2 steps and 1 device")
    whole = float(said[1].split()[1])
    parts = {line.split()[0]: float(line.split()[1]) for line in said[2:6]}
    assert sum(parts.values()) == pytest.approx(whole, abs=0.05)
    assert parts["compute"] > 0
    assert len(said) == 10
    modules = r"(rec|attn)_\d/(mixer|mlp)|embedding|head|optimizer"
    assert any(re.search(modules, line) for line in said[7:]), said[7:]


def test_a_run_that_recorded_nothing_is_told_how(tmp_path):
    with pytest.raises(ConfigError, match="has no recorded steps: podwright train"):
        main([str(tmp_path)])
