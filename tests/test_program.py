"""The program that a plan compiles is the program that a run compiles, and both know a batch before there is one."""

import hashlib
import json

import jax
import numpy as np
import pytest
from runs import SMALL

from configs.overrides import resolve
from configs.schema import ConfigError
from data import open_data
from data.shapes import batch_fields
from sharding import flags
from sharding.fallbacks import fallbacks
from sharding.flags import FLAGS, Flag
from sharding.mesh import abstract_mesh, make_mesh
from trainer.loop import train
from trainer.program import bytes_per_device, make_program
from trainer.tasks import make_task


def sha(lowered) -> str:
    return hashlib.sha256(lowered.as_text().encode()).hexdigest()


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        (
            "griffin-tiny",
            "--mesh.fsdp 4 --mesh.tensor 2 --trainer.microbatches 2 --data.batch_size 16 --model.mlp_width 63",
        ),
        pytest.param("nfnet-tiny", "--mesh.data 2 --mesh.fsdp 4 --data.batch_size 8", marks=pytest.mark.slow),
    ],
)
def test_train_compiles_the_program_that_plan_compiles(name, mesh, tmp_path, monkeypatch, capsys):
    words = f"{mesh} --trainer.steps 1 --eval.batches 1"
    config = resolve(name, [*SMALL[name].split(), *words.split(), "--trainer.compilation_cache", ""]).config
    compiled = []
    original = jax.stages.Lowered.compile

    def recording(lowered, *args, **kwargs):
        compiled.append(sha(lowered))
        return original(lowered, *args, **kwargs)

    monkeypatch.setattr(jax.stages.Lowered, "compile", recording)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        train(config, tmp_path / "run")
        mesh = make_mesh(config.mesh)
        with jax.set_mesh(mesh):
            planned = sha(make_program(config, make_task(config), mesh).trace().lower())
            fallen = fallbacks(make_program(config, make_task(config), mesh).state, mesh)
    step, *_ = compiled  # and the evaluation, and what a checkpoint notes of itself
    assert step == planned
    assert len(fallen) == (name == "griffin-tiny")
    assert all(f"note        {sentence}\n" in capsys.readouterr().out for sentence in fallen)


@pytest.mark.parametrize("evaluates", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_train_and_plan_compile_with_the_options_of_the_chips(evaluates, tmp_path, monkeypatch):
    """An option that no compiler has is noticed wherever it is given."""
    flag = Flag("xla_no_such_option", "true", "to be noticed")
    words = [*SMALL["griffin-tiny"].split(), "--trainer.steps", "1", "--trainer.compilation_cache", ""]
    config = resolve("griffin-tiny", words).config
    refused = pytest.raises(ConfigError, match="does not know the compiler option xla_no_such_option")
    standard = jax.numpy_dtype_promotion("standard")
    if evaluates:  # the step is compiled without the option, the evaluation after it with
        original = flags.compiled

        def then_with_the_option(lowered):
            monkeypatch.setitem(FLAGS, "cpu", (flag,))
            return original(lowered)

        monkeypatch.setattr("trainer.loop.compiled", then_with_the_option)
    else:
        monkeypatch.setitem(FLAGS, "cpu", (flag,))
        mesh = make_mesh(config.mesh)
        with standard, jax.set_mesh(mesh), refused:
            flags.compiled(make_program(config, make_task(config), mesh).trace().lower())
    with standard, jax.numpy_rank_promotion("allow"), refused:
        train(config, tmp_path / "run")


def chat_lines(folder) -> str:
    file = folder / "chat.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{n}?", "response": f"{n}!"}) + "\n" for n in range(200)))
    return str(file)


@pytest.mark.parametrize("name", ["griffin-tiny", "griffin-tiny-chat", "induction-griffin-tiny", "nfnet-tiny"])
def test_batches_are_what_their_fields_say_before_data_is_opened(name, tmp_path):
    words = ["--data.files", chat_lines(tmp_path)] if name.endswith("chat") else []
    config = resolve(name, words).config
    batch = open_data(config.data).train_batch(0)
    expected = {field: (shape, np.dtype(dtype)) for field, (shape, dtype) in batch_fields(config.data).items()}
    assert {field: (rows.shape, rows.dtype) for field, rows in batch.items()} == expected


def test_bytes_a_device_are_those_of_a_state_that_exists():
    words = "--data.batch_size 8 --mesh.data 2 --mesh.fsdp 2 --mesh.tensor 2"
    config = resolve("griffin-tiny", [*SMALL["griffin-tiny"].split(), *words.split()]).config
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        program = make_program(config, make_task(config), mesh)
        state = jax.jit(program.init)()
    device = mesh.devices.flat[0]
    held = sum(s.data.nbytes for leaf in jax.tree.leaves(state) for s in leaf.addressable_shards if s.device == device)
    absent = abstract_mesh(config.mesh, 8)
    with jax.sharding.use_abstract_mesh(absent):
        planned = make_program(config, make_task(config), absent)
    assert bytes_per_device(planned.state) == held
