"""Plans with the compiler: every product is one that libtpu knows, and a whole step's figures are those counted by hand."""

import json
import pathlib
import re
import subprocess
import sys

import pytest
from runs import ROOT, finish
from test_hlo import FOLDER, machine

from sharding.hlo_time import estimate
from sharding.topologies import CHIPS, find_topology, products

pytestmark = [pytest.mark.tpu_aot, pytest.mark.slow]
PRODUCTS = {"mean_over_slices": ("v5e-4", 2), "gather": ("v5e-8",), "layers_over_fsdp": ("v5e-8",)}


@pytest.fixture(scope="module", autouse=True)
def libtpu():
    pytest.importorskip("libtpu")


def plan(tmp_path: pathlib.Path, *words: str) -> tuple[dict, str]:
    """What `podwright plan` writes, and what it prints."""
    file = tmp_path / "plan.json"
    code, out, error = finish([sys.executable, "-m", "launch", "plan", *words, "--json", str(file)])
    assert code == 0, error
    return json.loads(file.read_text()), out


def test_libtpu_has_the_devices_that_a_product_is_said_to_have():
    names = [f"{chip}-{size}" for chip in CHIPS for size in products(chip) if size <= 4096]
    program = (
        "import sys; from sharding import aot; aot.prepare(); from sharding.topologies import find_topology\n"
        "for name in sys.argv[1:]: d = aot.topology_devices(find_topology(name)); print(name, len(d), d[0].device_kind)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, *names], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = [line.split(maxsplit=2) for line in ended.stdout.splitlines()]
    expected = [[name, str(find_topology(name).devices), find_topology(name).chip.kind] for name in names]
    assert found == expected


def test_meshes_of_which_no_axis_is_whole_rings_are_made_by_cutting_one():
    """64 x 64 on 16 x 16 x 16 chips, 32 x 8 on 16 x 16: mesh_utils assigns whole axes of the network, or cuts if it may."""
    cases = {"v5p-8192": (64, 64), "v5e-256": (32, 8)}
    program = (
        "import sys; from sharding import aot; aot.prepare(); from sharding.topologies import find_topology\n"
        "from sharding.mesh import make_mesh, sizes_of; from configs.schema import MeshConfig\n"
        f"for name, (data, fsdp) in {cases}.items():\n"
        "    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp), aot.topology_devices(find_topology(name)))\n"
        "    sizes = sizes_of(mesh)\n"
        "    print(name, sizes['data'], sizes['fsdp'], len({d.id for d in mesh.devices.flat}))"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.split("\n")[:-1] == ["v5p-8192 64 64 4096", "v5e-256 32 8 256"]


def test_small_programs_compile_to_what_was_kept_of_them(tmp_path):
    """A newer compiler may schedule otherwise; it still multiplies and sends the same."""
    subprocess.run([sys.executable, "tests/golden/make_hlo.py", str(tmp_path)], cwd=ROOT, check=True)
    kept = sorted(FOLDER.glob("*.txt"))
    assert len(kept) == 9
    for file in kept:
        where = machine(
            *PRODUCTS.get(file.stem, (file.stem.removeprefix("matmul_") if "matmul" in file.stem else "v5e-4",))
        )
        new, old = (estimate((folder / file.name).read_text(), where) for folder in (tmp_path, FOLDER))
        assert new.flops == old.flops, file.stem
        sent = [sorted((key, t.bytes) for key, t in found.collectives.items()) for found in (new, old)]
        assert sent[0] == sent[1], file.stem
        assert new.seconds == pytest.approx(old.seconds, rel=0.25), file.stem


def test_a_tiny_step_fits_and_takes_no_less_than_its_bound(tmp_path):
    found, out = plan(tmp_path, "griffin-tiny", "--topology", "v5e-16", "--data.batch_size", "64")
    step = found["step"]
    assert found["fits"]
    assert step["flops"] >= found["model_flops"] / 16
    assert found["step_seconds"] == step["seconds"] >= step["bound"] >= found["step_seconds_at_peak"]
    # Pure data parallelism: one gradient, in float32, is summed over 16 devices.
    (reduced,) = step["collectives"]
    assert reduced["kind"] == "all-reduce"
    assert reduced["bytes"] == pytest.approx(2 * 15 / 16 * 4 * found["parameters"], rel=0.01)
    assert not step["unread"]
    assert len(out.splitlines()) <= 40


def test_slices_exchange_gradients_over_the_slow_network(tmp_path):
    words = "--mesh.replica 2 --mesh.data 1 --mesh.fsdp 16 --data.batch_size 64"
    found, _ = plan(tmp_path, "griffin-tiny", "--topology", "v5e-16", "--slices", "2", *words.split())
    assert (found["chips"], found["notes"]) == (32, [])
    networks = {c["network"]: c["bytes"] for c in found["step"]["collectives"]}
    # Each of 16 devices exchanges its part of the float32 gradients with one device, half of it twice. Vectors have no parts,
    # and the gates of four recurrences are summed by quarters and divided afterwards.
    gates, layer, recurrence = 4 * 2 * 4 * 32**2, 3 * 128 + 2 * 384 + 128, (4 + 1 + 2 + 1 + 2) * 128
    vectors = 6 * layer + 4 * recurrence + 128
    matrices = found["parameters"] - gates - vectors
    assert networks["DCN"] == pytest.approx(4 * (vectors + gates / 4 + matrices / 16), rel=0.01)


def test_gradients_are_scattered_along_both_axes_of_a_slice(tmp_path):
    """On 4 x 4 chips, where a reduce-scatter over all 16 at once would be an all-reduce of twice the bytes."""
    sizes = "--model.width 2048 --model.mlp_width 4096 --model.num_heads 8 --model.head_dim 256 --model.depth 6"
    words = f"{sizes} --mesh.data 1 --mesh.fsdp 16 --data.batch_size 64 --trainer.compute_dtype bfloat16"
    found, _ = plan(tmp_path, "gemma-tiny", "--topology", "v5e-16", *words.split())
    sent = {c["kind"]: c["bytes"] for c in found["step"]["collectives"]}
    table = 256 * 2048  # its gradient is float32, those of the layers' matrices are bfloat16
    vectors = 6 * (4 * 2048 + 2 * 256) + 2048
    matrices = found["parameters"] - table - vectors
    assert sent["reduce-scatter"] == pytest.approx(15 / 16 * (2 * matrices + 4 * table), rel=0.01)
    assert sent["all-reduce"] < 0.02 * sent["reduce-scatter"]


def test_products_of_gemma_2b_are_those_counted_by_hand(tmp_path):
    """One row of 8192 tokens a device, every layer recomputed."""
    found, _ = plan(tmp_path, "gemma-2b", "--topology", "v5e-256")
    tokens, layers, width, hidden, features = 8192, 18, 2048, 16384, 256
    projections = layers * (2 * width * features * (8 + 1) + 3 * width * hidden)
    down = layers * width * hidden  # the last product of a layer, which nothing asks for again
    table = 256128 * width
    # Blocks of 1024 queries by 512 keys that are seen: of 8 x 16 those on or below the diagonal.
    pairs = sum(2 * (i + 1) for i in range(8)) * 1024 * 512
    attention = layers * 8 * features * pairs * (2 + 2 + 4 + 3)  # forward twice, dk and dv, dq
    by_hand = 2 * (tokens * (4 * projections - down + 4 * table) + attention)
    assert found["step"]["flops"] == pytest.approx(by_hand, rel=0.002)
    assert found["fits"]


def test_what_does_not_fit_is_said_in_one_sentence():
    words = ["gemma-tiny", "--topology", "v5e-1", "--data.batch_size", "8192"]
    code, _, error = finish([sys.executable, "-m", "launch", "plan", *words])
    assert code == 2
    assert "does not fit: " in error
    assert "GiB too much" in error
    assert error.count("\n") == 1


def test_what_is_proposed_to_a_step_that_does_not_fit_fits(tmp_path):
    words = ("gemma-2b", "--topology", "v5e-64", "--data.batch_size", "64", "--trainer.remat", "none")
    code, _, error = finish([sys.executable, "-m", "launch", "plan", *words])
    assert code == 2
    proposed = re.search(r"GiB too much; .* by arithmetic, (--[^,]*) fits, in", error)
    assert proposed, error
    assert plan(tmp_path, *words, *proposed[1].split())[0]["fits"]
