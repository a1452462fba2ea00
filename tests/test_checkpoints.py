"""A step counts if it is whole, what is read is what was saved, and nothing that somebody else wrote is ever deleted."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from configs.schema import CheckpointConfig, MeshConfig
from launch.cli import main
from models.convert.tensors import in_memory
from sharding.mesh import make_mesh
from trainer.checkpoint import Checkpoints, to_drop
from trainer.checksums import fingerprint_of, of_part, on_devices, on_host
from trainer.saved import MANIFEST, MARKER, SavedSteps
from trainer.storage import StorageError

ARRAYS = [
    np.random.default_rng(0).normal(size=(16, 5, 3)).astype(np.float32),
    np.arange(24, dtype=np.int32).reshape(8, 3),
    np.random.default_rng(1).normal(size=(8, 9)).astype(jnp.bfloat16),
    np.float32(2.5),
    np.array([True, False, True]),
]


def by_hand(array: np.ndarray) -> int:
    """The definition, an element at a time in Python's integers."""
    total = 0
    kind = {1: np.uint8, 2: np.uint16, 4: np.uint32}[array.dtype.itemsize]
    for place, bits in enumerate(np.atleast_1d(array).reshape(-1).view(kind).tolist()):
        value = bits ^ (place * 0x9E3779B1 % 2**32)
        value = (value ^ value >> 16) * 0x85EBCA6B % 2**32
        value = (value ^ value >> 13) * 0xC2B2AE35 % 2**32
        total += value ^ value >> 16
    return total % 2**32


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: str(array.dtype))
def test_a_checksum_is_the_same_on_devices_on_the_host_and_by_hand(array):
    expected = by_hand(np.asarray(array))
    assert on_devices({"a": jnp.asarray(array)})["a"].checksum == expected
    assert on_host({"a": jnp.asarray(array)})["a"].checksum == expected
    assert fingerprint_of(in_memory(np.asarray(array))).checksum == expected


@pytest.mark.parametrize("spec", [(), ("data",), ("fsdp", "data"), (None, "tensor"), (("data", "fsdp"), "tensor")])
def test_a_checksum_does_not_depend_on_how_an_array_is_divided(spec):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    array = np.random.default_rng(2).normal(size=(8, 4, 3)).astype(np.float32)
    with jax.set_mesh(mesh):
        divided = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
        assert on_devices({"a": divided})["a"].checksum == by_hand(array)
        assert on_host({"a": divided})["a"].checksum == by_hand(array)


def checksum_of(array: np.ndarray) -> int:
    return of_part(array, (0,), array.shape).checksum


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 199), st.integers(0, 31), st.integers(0, 199))
def test_a_flipped_bit_or_two_swapped_elements_change_a_checksum(place, bit, other):
    array = np.random.default_rng(3).normal(size=200).astype(np.float32)
    flipped = array.copy()
    flipped.view(np.uint32)[place] ^= np.uint32(1 << bit)
    assert checksum_of(flipped) != checksum_of(array)
    swapped = array.copy()
    swapped[[place, other]] = swapped[[other, place]]
    assert (checksum_of(swapped) == checksum_of(array)) == (place == other)


def state_of(step: int, value: float | None = None) -> dict:
    value = step if value is None else value
    return {"step": jnp.int32(step), "model": {"w": jnp.full((64, 32), value), "b": jnp.arange(40.0) * value}}


def save(
    folder: pathlib.Path, *steps: int, keep_last: int = 3, keep_every: int = 0, values: dict | None = None
) -> None:
    """Each step holds its own number, or its value of `values`."""
    checkpoints = Checkpoints(folder, CheckpointConfig(keep_last=keep_last, keep_every=keep_every))
    for step in steps:
        checkpoints.save(step, state_of(step, (values or {}).get(step)), {"data_hash": "d"})
    checkpoints.finish()
    checkpoints.close()


def restored(folder: pathlib.Path) -> tuple[int, list[str]]:
    """The step that a resume would start from, and what it says."""
    said: list[str] = []
    checkpoints = Checkpoints(folder, CheckpointConfig())
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state_of(0))
    state, manifest = checkpoints.restore_newest(abstract, said.append)
    checkpoints.close()
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), state, state_of(manifest["step"])))
    return manifest["step"], said


def flip(folder: pathlib.Path, step: int) -> None:
    """A bit in the middle of the largest file of a step's arrays."""
    file = max((folder / str(step) / "state").rglob("d/*"), key=lambda it: it.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_the_newest_step_that_is_what_was_saved_is_restored_and_a_damaged_one_is_kept_aside(tmp_path):
    save(tmp_path, 10, 20, 30)
    flip(tmp_path, 30)
    step, said = restored(tmp_path)
    assert step == 20
    assert "30 " in said[0] or "30" in said[0]
    assert "set aside" in said[1]
    assert (tmp_path / "set-aside" / "30" / "state").is_dir()
    assert restored(tmp_path) == (20, [])
    save(tmp_path, 30)
    assert restored(tmp_path) == (30, [])


def test_a_run_whose_steps_are_all_damaged_does_not_begin_anew(tmp_path):
    save(tmp_path, 10, 20)
    flip(tmp_path, 10)
    flip(tmp_path, 20)
    for _ in range(2):
        with pytest.raises(
            StorageError, match=r"none of the 2 checkpoints .* can be used: podwright checkpoint doctor"
        ):
            restored(tmp_path)
    assert SavedSteps(tmp_path).steps() == [10, 20]


@pytest.mark.parametrize("missing", [MARKER, "/".join(MANIFEST)])
def test_a_step_without_its_mark_or_its_manifest_does_not_count_and_is_never_deleted(tmp_path, missing):
    save(tmp_path, 10, 20)
    (tmp_path / "20" / missing).unlink()
    files = sorted(tmp_path.joinpath("20").rglob("*"))
    assert SavedSteps(tmp_path).steps() == [10]
    assert restored(tmp_path)[0] == 10
    save(tmp_path, 12, 14, 16, 18, keep_last=1)
    assert sorted(tmp_path.joinpath("20").rglob("*")) == files
    save(tmp_path, 20, keep_last=1)
    assert restored(tmp_path)[0] == 20
    assert (tmp_path / "set-aside" / "20" / "state").is_dir()


def test_what_somebody_else_put_there_survives_every_save(tmp_path):
    (tmp_path / "5").mkdir()
    (tmp_path / "5" / "notes.txt").write_text("mine")
    (tmp_path / "7.orbax-checkpoint-tmp-1").mkdir()
    save(tmp_path, *range(10, 22, 2), keep_last=2)
    assert (tmp_path / "5" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "7.orbax-checkpoint-tmp-1").is_dir()
    assert SavedSteps(tmp_path).steps() == [18, 20]


def test_what_a_killed_save_or_deletion_left_is_removed(tmp_path):
    save(tmp_path, 10, 20)
    journal = json.loads((tmp_path / "journal.json").read_text())
    assert journal == {"10": "saved", "20": "saved"}
    (tmp_path / "30.orbax-checkpoint-tmp-99").mkdir()
    (tmp_path / "10" / "meta" / "metadata").unlink()
    (tmp_path / "journal.json").write_text(json.dumps({"10": "deleting", "20": "saved", "30": "saving"}))
    assert restored(tmp_path)[0] == 20
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["20", "journal.json"]


def test_a_deletion_that_no_commit_followed_is_called_off(tmp_path):
    save(tmp_path, 10, 20)
    (tmp_path / "journal.json").write_text(json.dumps({"10": "deleting", "20": "saved"}))
    Checkpoints(tmp_path, CheckpointConfig()).close()
    assert SavedSteps(tmp_path).steps() == [10, 20]
    assert json.loads((tmp_path / "journal.json").read_text()) == {"10": "saved", "20": "saved"}


@pytest.mark.parametrize(
    ("finite", "keep_last", "keep_every", "dropped"),
    [
        ({1: True, 2: True, 3: True, 4: True}, 2, 0, [1, 2]),
        ({1: True, 2: True, 3: True, 4: True}, 1, 2, [1, 3]),
        ({1: True, 2: True, 3: False, 4: False}, 2, 0, [1]),  # 2 is the newest finite one
        ({1: True, 2: False, 3: False, 4: False}, 1, 0, [2, 3]),
        ({1: False, 2: False}, 1, 0, [1]),
    ],
)
def test_the_newest_finite_step_is_always_kept(finite, keep_last, keep_every, dropped):
    assert to_drop(finite, CheckpointConfig(keep_last=keep_last, keep_every=keep_every)) == dropped


def test_nans_never_push_out_the_last_finite_step_across_restarts(tmp_path):
    save(tmp_path, 1, 2, keep_last=1)
    for step in (3, 4, 5):
        save(tmp_path, step, keep_last=1, values={step: float("nan")})
    assert SavedSteps(tmp_path).steps() == [2, 5]


def test_a_state_of_other_shapes_is_refused_by_name(tmp_path):
    save(tmp_path, 10)
    other = {"step": jnp.int32(0), "model": {"w": jnp.zeros((64, 33)), "b": jnp.zeros(40)}}
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), other)
    with pytest.raises(StorageError, match=r"model/w is \[64, 32\] there and \[64, 33\] here"):
        SavedSteps(tmp_path).restore(10, abstract)


def run_with(tmp_path: pathlib.Path, *steps: int) -> pathlib.Path:
    run = tmp_path / "run"
    save(run / "checkpoints", *steps)
    return run


def test_verify_names_the_damaged_step_and_array(tmp_path, capsys):
    run = run_with(tmp_path, 10, 20)
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert capsys.readouterr().out.count("every array is finite and as it was saved") == 2
    flip(run / "checkpoints", 20)
    assert main(["checkpoint", "verify", str(run)]) == 4
    told = capsys.readouterr()
    assert "step 10: every array is finite and as it was saved" in told.out
    assert "step 20: " in told.out
    assert "1 of 2 checkpoints" in told.err


def test_diff_tells_what_changed_and_by_how_much(tmp_path, capsys):
    run = run_with(tmp_path, 10, 20)
    assert main(["checkpoint", "diff", str(run), "10", "20"]) == 0
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert lines["model/w"][1:] == ["64x32", "100.0", "%", "10", "1"]  # 20 is 10 + 10, its norm the same again
    assert lines["model/b"][1:] == ["40", "97.5", "%", "390", "1"]  # 39 of 40 places; 39 x 10 at most
    assert main(["checkpoint", "diff", str(run), "10", "10"]) == 0
    assert capsys.readouterr().out == "3 arrays are equal, bit for bit; 0 differ\n"


def test_a_copy_without_its_mark_is_adopted_if_it_is_whole(tmp_path, capsys):
    run = run_with(tmp_path, 10, 20)
    for step in (10, 20):
        (run / "checkpoints" / str(step) / MARKER).unlink()
    flip(run / "checkpoints", 20)
    assert main(["checkpoint", "doctor", str(run)]) == 0
    assert "checkpoint adopt" in capsys.readouterr().out
    assert main(["checkpoint", "adopt", str(run), "--step", "10"]) == 0
    assert main(["checkpoint", "adopt", str(run), "--step", "20"]) == 4
    assert "is not what was saved" in capsys.readouterr().err
    assert SavedSteps(run / "checkpoints").steps() == [10]
    assert restored(run / "checkpoints")[0] == 10


@pytest.mark.parametrize("words", ["verfy x", "verify x --step 3", "diff x 1 2", "list x"])
def test_a_mistake_is_one_sentence(words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["checkpoint", *words.split()]) in (2, 4)
    assert capsys.readouterr().err.count("\n") == 1
