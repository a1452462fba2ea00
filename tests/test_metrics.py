"""What a run records: the same points in metrics.jsonl and in TensorBoard's curves, and an error where they can't be kept."""

import contextlib
import struct

import pytest
import tensorboardX.record_writer
from tensorboardX.proto.event_pb2 import Event

from trainer.metrics import Reporter
from trainer.run_folder import read_metrics
from trainer.storage import StorageError

LOSSES = {1: 2.5, 2: 1.25, 3: 0.625}


def reporter(folder) -> Reporter:
    return Reporter(folder, "tokens", 8, 1e3, steps=10, log_every=5)


def add_points(record: Reporter) -> None:
    for step in range(1, 100):
        record.record("train", step, {"loss": 1.0, "grad_norm": 1.0})


def points(folder) -> dict[tuple[str, int], float]:
    """TensorBoard's file, by its published framing: length, checksum, bytes, checksum."""
    (file,) = (folder / "tensorboard").glob("events.out.tfevents.*")
    data, at, found = file.read_bytes(), 0, {}
    while at < len(data):
        (size,) = struct.unpack_from("<Q", data, at)
        event = Event.FromString(data[at + 12 : at + 12 + size])
        found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        at += 12 + size + 4
    return found


def test_curves_hold_the_points_of_the_log(tmp_path):
    with reporter(tmp_path) as record:
        for step, loss in LOSSES.items():
            record.record("eval", step, {"loss": loss, "bad": float("nan")})
    assert points(tmp_path) == {("eval/loss", step): loss for step, loss in LOSSES.items()}
    assert {step: line["loss"] for step, line in read_metrics(tmp_path, "eval").items()} == LOSSES


def test_a_disk_too_full_for_curves_is_an_error_and_no_wait(tmp_path, monkeypatch):
    """tensorboardX's own thread dies of it, and whoever adds points then waits for ever."""
    with open("/dev/full", "wb", buffering=128) as full:
        monkeypatch.setattr(tensorboardX.record_writer, "open_file", lambda path: full)
        with reporter(tmp_path) as record:
            sentence = f"{tmp_path} could not be written: No space left on device"
            with pytest.raises(StorageError, match=sentence):
                add_points(record)
        with contextlib.suppress(OSError):
            full.close()
