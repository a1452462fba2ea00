"""Importing and exporting take far less memory than the model: the widths and tables of 2B models, fewer layers."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from published import BFLOAT16
from runs import ROOT

from configs import EXPERIMENTS
from configs.parameters import COUNTS
from models.convert.families import FAMILIES
from models.convert.layout import LanguageModel, their_shapes
from models.convert.safetensors_files import write_safetensors
from models.convert.tensors import Tensor
from trainer.imported import abstract_arrays

DEPTH = 8
# What a process needs before it has read anything, and the pieces that are in flight: not a share of the model.
LIMIT = 1.5 * 2**30
PROGRAM = """
import json, re, sys
from launch.cli import main
code = main(sys.argv[1:])
# Not getrusage: what it says starts from the memory of the process that started this one.
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
print(json.dumps({"code": code, "peak": 1024 * peak}))
"""


def peak_of(*words) -> int:
    """Bytes of resident memory that a command takes at most."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, words)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["code"] == 0, done.stderr
    return told["peak"]


def random_tensor(shape: tuple[int, ...]) -> Tensor:
    """bfloat16 noise that is drawn as it is written."""

    def read(first: int, end: int) -> np.ndarray:
        rng = np.random.default_rng(first)
        return (rng.standard_normal((end - first, *shape[1:]), np.float32) * 0.02).astype(BFLOAT16)

    return Tensor(shape, np.dtype(BFLOAT16), read)


@pytest.fixture(params=["recurrentgemma-2b", "gemma-2b"])
def checkpoint(request, tmp_path) -> Iterator[tuple[pathlib.Path, LanguageModel]]:
    experiment = EXPERIMENTS[request.param]()
    config = dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, depth=DEPTH))
    model, family = config.model, FAMILIES[config.model.kind]
    arrays = {n.removeprefix("model/"): a.shape for n, a in abstract_arrays(config).items() if n.startswith("model/")}
    folder = tmp_path / "theirs"
    folder.mkdir()
    shapes = their_shapes(model, family.layouts["hf"](model), arrays)
    write_safetensors(folder, {name: random_tensor(shape) for name, shape in shapes.items()}, file_bytes=10**9)
    (folder / "config.json").write_text(json.dumps(family.described(config)))
    yield folder, model
    shutil.rmtree(tmp_path)  # pytest would keep these gigabytes for three runs


@pytest.mark.slow
def test_import_and_export_hold_a_small_part_of_the_model(checkpoint, tmp_path):
    folder, model = checkpoint
    total = COUNTS[model.kind](model).total
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert size == pytest.approx(2 * total, rel=1e-3)  # padding rows of the table are not in it
    peaks = {
        "import": peak_of("import", folder, "--to", tmp_path / "run"),
        "export to hf": peak_of("export", tmp_path / "run", "--format", "hf", "--to", tmp_path / "hf"),
        "export to flax": peak_of("export", tmp_path / "run", "--format", "flax", "--to", tmp_path / "flax"),
        "import of flax": peak_of(
            "import", tmp_path / "flax", "--to", tmp_path / "again", "--config", tmp_path / "run", "--dtype", "bfloat16"
        ),
    }
    told = ", ".join(f"{command} {peak / 2**30:.2f} GiB" for command, peak in peaks.items())
    print(f"{size / 2**30:.2f} GiB of bfloat16, {4 * total / 2**30:.2f} GiB in float32: {told}")
    for command, peak in peaks.items():
        assert peak < LIMIT < 4 * total / 3, command
