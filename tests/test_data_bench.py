"""`podwright data bench`: what it measures is what it divides by what is needed."""

import json

import pytest
from PIL import Image

from configs.overrides import resolve
from configs.schema import ConfigError
from launch.cli import main
from launch.data_bench import measure, read_plan, report

FOUND = {"rows": 1000, "wall": 2.0, "processor": 4.0, "bytes": 2**20, "memory": 0.5}


def test_chips_a_core_feeds_are_its_speed_over_what_a_chip_takes(tmp_path):
    config = resolve("griffin-1b", ["--data.batch_size", "64", "--data.sequence_length", "2048"]).config
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"step_seconds": 0.5, "chips": 16, "topology": "v5e-16"}))
    lines = report(config, FOUND, read_plan(str(plan)))
    # 1,000 rows of 2,048 in 2 seconds and 4 of processor time; a chip takes 64 rows of 2,048 / 0.5 s / 16 = 16,384 tokens/s.
    assert "1,024,000 tokens/s on this machine" in lines[1]
    assert "512,000 tokens a second of processor time (2.00 cores busy)" in lines[2]
    assert lines[-1].endswith("31.2 chips a core, at the 16,384 tokens/s a chip of v5e-16")


def test_without_a_plan_chips_run_at_their_peak():
    config = resolve("griffin-1b", ["--data.batch_size", "64", "--data.sequence_length", "2048"]).config
    lines = report(config, FOUND, None)
    # Six FLOPs a parameter and token, and attention: 1.3 billion parameters make a little more than 7.8 GFLOP.
    v5e = next(line for line in lines if "of v5e a core" in line)
    speed = float(v5e.split(" tokens/s")[0].split()[-1].replace(",", ""))
    assert 197e12 / 12e9 < speed < 197e12 / 7.8e9


def test_the_input_of_a_config_is_run():
    config = resolve("nfnet-tiny", []).config
    found = measure(config, 0.3)
    assert found["rows"] >= 64
    assert found["wall"] >= 0.3
    assert found["bytes"] == 64 * (16 * 16 * 4 + 4 + 4)


def test_images_are_compared_with_decoding_alone():
    config = resolve("nfnet-tiny", []).config
    lines = report(config, {**FOUND, "decode": 0.003}, None)
    # 1,000 images in 4 seconds are 4 ms each, of which decoding takes 3.
    assert "decoding    alone gives 333 images a second of processor time: the input reaches 75% of that" in lines


def test_decoding_is_measured_on_the_images_of_a_folder(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(6):
            Image.new("RGB", (400, 300), (i, 0, 0)).save(tmp_path / name / f"{i}.jpg")
    words = ["--data.source", str(tmp_path), "--data.channels", "3", "--model.channels", "3", "--data.batch_size", "4"]
    once = measure(resolve("nfnet-tiny", words).config, 0.2)["decode"]
    twice = measure(resolve("nfnet-tiny", [*words, "--data.mixup_alpha", "0.2"]).config, 0.2)["decode"]
    assert 1e-5 < once < 0.1
    assert 1.3 < twice / once < 3  # a mixed image is two


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["griffin-tiny", "--seconds", "ten"], "--seconds ten is not a number"),
        (
            ["griffin-tiny", "--plan", "/nowhere.json"],
            "--plan /nowhere.json is not what `podwright plan --json` writes",
        ),
    ],
)
def test_a_mistake_is_one_sentence(words, sentence, capsys):
    assert main(["data", "bench", *words]) == 2
    assert sentence in capsys.readouterr().err
    with pytest.raises(ConfigError):
        read_plan("/nowhere.json")
