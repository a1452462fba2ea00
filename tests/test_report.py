"""The page about a run says what its folder holds, says what is missing, and needs nothing but itself."""

import html
import json
import pathlib
import re
import shutil
import struct
import subprocess

import numpy as np
import pytest
from runs import finish, saved_arrays, train_command
from test_bad_input import refused

from data.prepare.pipeline import Settings, prepare
from launch.cli import main
from sharding import aot

SECTIONS = ["What it is", "Curves", "Plan and measured", "Goodput", "Data", "Checkpoints", "Environment", "Config"]
CHROMIUM = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
    """Two sources and a run of 6 steps on them, three rows of one for each of the other, with its page."""
    root = tmp_path_factory.mktemp("place")
    chance = np.random.default_rng(0)
    for name in ("books", "code"):
        texts = ["".join(chance.choice(list("abcde "), 300)) for _ in range(200)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        prepare(Settings(str(root / f"{name}.jsonl"), str(root / name), held_out=0.1, workers=1), lambda line: None)
    data = ("--data.kind", "prepared", "--data.sources", f"{root / 'books'},{root / 'code'}", "--data.weights", "3,1")
    steps = (
        "--trainer.steps",
        "6",
        "--checkpoint.every",
        "3",
        "--eval.every",
        "3",
        "--optimizer.learning_rate",
        "0.01",
    )
    code, _, err = finish(train_command("griffin-tiny", root / "run", *data, *steps))
    assert code == 0, err
    assert main(["report", str(root / "run")]) == 0
    return root


def logged(run: pathlib.Path, kind: str) -> list[dict]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == kind]


def sections(page: pathlib.Path) -> dict[str, str]:
    """What stands under each heading, as HTML; no part was skipped because of an error."""
    text = page.read_text()
    assert "could not be made" not in text
    names = re.findall(r"<h2>(.*?)</h2>", text)
    assert names == SECTIONS
    return dict(zip(names, re.split(r"<h2>.*?</h2>", text)[1:], strict=True))


def cells(text: str) -> list[list[str]]:
    """Of every row of every table."""
    rows = re.findall(r"<tr>(.*?)</tr>", text)
    return [[html.unescape(cell) for cell in re.findall(r"<t[dh]>(.*?)</t[dh]>", row)] for row in rows]


def reported(place: pathlib.Path, tmp_path: pathlib.Path, change) -> dict[str, str]:
    """Sections of the page about a copy of the run, once `change` has been made to it."""
    shutil.copytree(place / "run", tmp_path / "copy")
    change(tmp_path / "copy")
    assert main(["report", str(tmp_path / "copy"), "--to", str(tmp_path / "page.html")]) == 0
    return sections(tmp_path / "page.html")


def test_its_figures_are_those_of_the_log(place):
    found, run = sections(place / "run" / "report.html"), place / "run"
    facts = dict(cells(found["What it is"]))
    train, held_out = logged(run, "train"), logged(run, "eval")[-1]
    assert facts["state"] == "done, step 6 of 6"
    assert facts["last loss"] == f"loss {train[-1]['loss']:.4f} (step 6)"
    assert f"loss {held_out['loss']:.4f}" in facts["last held-out"]
    assert facts["mesh"] == "1 cpu device"
    assert "6 steps are logged, 2 evaluations." in found["Curves"]
    assert found["Curves"].count("<svg") == found["Goodput"].count("<svg") == 1
    for title in ("loss", "gradient norm", "learning rate", "tokens a second", "held-out bits_per_byte"):
        assert f">{title}</text>" in found["Curves"]

    rows = {row[0]: row[1:] for row in cells(found["Plan and measured"])}
    step = float(np.median([record["step_ms"] for record in train]))
    assert rows["step"][0] == "-"
    assert float(rows["step"][1].split()[0].replace(",", "")) == pytest.approx(step, rel=1e-3)
    needs = re.search(r"^compiled in .*; the step takes (\S+ [MG]iB) a device$", (run / "log.txt").read_text(), re.M)[1]
    used = max(record["memory_gib"] for record in train)
    assert rows["memory a device"] == [f"{needs}, by the compiler", f"{used:.2f} GiB"]
    value, unit = needs.split()
    state = float(re.search(r"(\S+) MiB of state", facts["model"])[1])
    assert state / 2**10 < float(value) / {"MiB": 2**10, "GiB": 1}[unit] < used  # the process has the step's and more
    assert "No plan was recorded." in found["Plan and measured"]
    assert "It ran on CPUs" in found["Plan and measured"]

    ledger = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    training = sum(row["seconds"].get("step", 0.0) for row in ledger)
    assert f"goodput {100 * training / (ledger[-1]['end'] - ledger[0]['start']):.1f}% of" in found["Goodput"]


def test_the_mixture_is_as_asked_and_as_read(place):
    """6 batches of 8 rows are 48: of three to one, 36 and 12."""
    found = sections(place / "run" / "report.html")["Data"]
    rows = {row[0]: row[1:] for row in cells(found)}
    for name, asked, read in (("books", "75 %", "36"), ("code", "25 %", "12")):
        _, share, seen, count, _ = rows[str(place / name)]
        assert (share, seen, count) == (asked, asked, read)
    assert "Seen is as of step 6" in found
    assert "Bad records: none was noted." in found


def test_bad_records_are_counted_once_each(place, tmp_path):
    bad = [("a", 1, "cut short"), ("a", 1, "cut short"), ("a", 2, "cut short"), ("b", 1, "no picture")]
    lines = [json.dumps({"step": 1, "source": s, "place": p, "reason": r}) + "\n" for s, p, r in bad]
    found = reported(place, tmp_path, lambda run: (run / "bad_records.jsonl").write_text("".join(lines)))
    assert "Bad records: 3 (2 cut short, 1 no picture)" in found["Data"]


def test_checkpoints_are_what_orbax_reads(place):
    found = sections(place / "run" / "report.html")["Checkpoints"]
    rows = {row[0]: row[1:] for row in cells(found)}
    losses = {record["step"]: record["loss"] for record in logged(place / "run", "train")}
    for step in (3, 6):
        size = sum(array.nbytes for array in saved_arrays(place / "run", step).values())
        assert rows[str(step)][0] == f"{size / 2**20:.2f} MiB"
        assert rows[str(step)][3:] == ["yes", f"{losses[step]:.4f}", "as saved"]
    assert rows.keys() == {"step", "3", "6"}


def test_a_damaged_checkpoint_is_named(place, tmp_path):
    def damage(run: pathlib.Path) -> None:
        for file in (run / "checkpoints" / "3" / "state").rglob("*"):
            if file.is_file() and file.stat().st_size > 5000:
                content = bytearray(file.read_bytes())
                content[len(content) // 2] ^= 255
                file.write_bytes(content)

    rows = {row[0]: row[-1] for row in cells(reported(place, tmp_path, damage)["Checkpoints"])}
    assert rows["6"] == "as saved"
    assert rows["3"] != "as saved"


def test_the_config_says_what_was_given_to_the_run(place):
    found = html.unescape(sections(place / "run" / "report.html")["Config"])
    saved = json.loads((place / "run" / "config.json").read_text())
    origins = dict(re.findall(r"^  (\S+\.\S+) +.*?  (this run|default|experiment griffin-tiny) +#", found, re.M))
    assert origins.keys() == {f"{s}.{f}" for s, body in saved.items() if s != "name" for f in body if f != "kind"}
    assert origins["optimizer.learning_rate"] == origins["data.weights"] == origins["model.width"] == "this run"
    assert origins["optimizer.beta1"] == "default"
    assert re.search(r"optimizer.learning_rate +0.01 +this run", found)


def test_versions_and_devices_are_those_of_the_checkpoint(place):
    facts = dict(cells(sections(place / "run" / "report.html")["Environment"]))
    said = json.loads((place / "run" / "checkpoints" / "6" / "meta" / "metadata").read_text())
    assert facts["devices"] == "1 x cpu"
    assert facts["hosts"] == "1"
    assert {name: facts[name] for name in said["versions"]} == said["versions"]
    assert facts["hash of podwright's code"] == said["code"]


def test_a_plan_stands_beside_what_was_measured(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(aot, "has_libtpu", lambda: False)  # arithmetic alone: nothing is compiled
    words = ["plan", "griffin-tiny", "--topology", "v5e-4", "--mesh.data", "4"]
    found = reported(place, tmp_path, lambda run: main([*words, "--json", str(run / "plan.json")]))["Plan and measured"]
    plan = json.loads((tmp_path / "copy" / "plan.json").read_text())
    rows = {row[0]: row[1:] for row in cells(found)}
    planned, unit = rows["step"][0].split()
    assert float(planned) == pytest.approx({"ms": 1e3, "s": 1}[unit] * plan["step_seconds"], rel=1e-3)
    assert rows["memory a device"][0].endswith("of 16.00 GiB")
    assert "griffin-tiny on v5e-4, 4 chips, by arithmetic alone" in found
    assert "Planned were 4 chips of v5e-4; measured are 1 x cpu." in found


def test_what_is_missing_is_said(place, tmp_path):
    def only_config(run: pathlib.Path) -> None:
        for entry in run.iterdir():
            if entry.name != "config.json":
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    found = reported(place, tmp_path, only_config)
    assert dict(cells(found["What it is"]))["state"] == "failed, step 0 of 6"
    for name, sentence in {
        "Curves": "Nothing was logged yet",
        "Plan and measured": "Nothing was measured yet.",
        "Goodput": "The run has no ledger of its time",
        "Data": "The run never got as far as its data",
        "Checkpoints": "Nothing is saved that counts.",
        "Environment": "Versions are noted in checkpoints, and nothing is saved yet.",
    }.items():
        assert sentence in html.unescape(found[name])


def test_without_matplotlib_there_are_no_plots(place, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    found = reported(place, tmp_path, lambda run: None)
    assert "<svg" not in "".join(found.values())
    for name in ("Curves", "Goodput"):
        assert "a plot needs matplotlib" in found[name]


def test_a_run_that_went_wrong_says_how(place, tmp_path):
    def resumed_and_diverged(run: pathlib.Path) -> None:
        shutil.rmtree(run / "checkpoints" / "6")
        with open(run / "log.txt", "a") as log:
            log.write("resume verified: bit-identical (data, RNG, parameters, and step 4 as logged)\n")
        with open(run / "metrics.jsonl", "a") as log:
            log.write('{"kind": "train", "step": 5, "loss": null, "grad_norm": null}\n')

    found = reported(place, tmp_path, resumed_and_diverged)
    facts = dict(cells(found["What it is"]))
    assert facts["state"] == "diverged, step 5 of 6"
    assert facts["last loss"] == "loss not finite (step 5)"
    assert facts["resumed"].startswith("resume verified: bit-identical")
    assert "--guard.policy rollback" in found["What it is"]
    assert "The loss was not finite at 1 steps, first at 5." in found["Curves"]


def test_the_page_needs_nothing_else(place):
    text = (place / "run" / "report.html").read_text()
    assert "<script" not in text.lower()
    assert not re.search(r"""<(link|img|iframe|object|embed|base)\b|\bon\w+=["']|@import""", text, re.I)
    assert not [where for where in re.findall(r"""(?:href|src)=["'](.*?)["']""", text) if not where.startswith("#")]
    assert not [where for where in re.findall(r"url\((.*?)\)", text) if not where.startswith("#")]
    named = set(re.findall(r"https?://[^\s\"'<]+", text))
    assert named == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names, which nobody fetches


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium")
def test_a_browser_shows_it(place, tmp_path):
    page, picture = place / "run" / "report.html", tmp_path / "page.png"
    size = ["--window-size=1200,3000", f"file://{page}"]
    command = ["chromium", *CHROMIUM, f"--user-data-dir={tmp_path / 'profile'}"]
    subprocess.run([*command, f"--screenshot={picture}", *size], check=True, capture_output=True, timeout=300)
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert struct.unpack(">II", content[16:24]) == (1200, 3000)
    from PIL import Image

    pixels = np.asarray(Image.open(picture).convert("RGB")).reshape(-1, 3)
    shown = {tuple(colour) for colour in np.unique(pixels, axis=0)}
    assert {(0x21, 0x66, 0xAC), (0xB2, 0x18, 0x2B), (0x1B, 0x78, 0x37)} <= shown  # loss, held-out, goodput's steps
    assert 0.5 < (pixels == 255).all(1).mean() < 0.99
    dom = subprocess.run(
        [*command, "--dump-dom", *size], check=True, capture_output=True, text=True, timeout=300
    ).stdout
    assert re.findall(r"<h2>(.*?)</h2>", dom) == SECTIONS
    assert "<h1>run (griffin-tiny)</h1>" in dom


def test_mistakes_are_one_sentence(place, capsys):
    said = refused(capsys, ["report", str(place / "rum")], code=4)
    assert (
        said
        == f"{place / 'rum'} is not a podwright run: there is no {place / 'rum' / 'config.json'}, perhaps {place / 'run'}"
    )
    said = refused(capsys, ["report", str(place / "books")], code=4)
    assert said == f"{place / 'books'} is not a podwright run: there is no {place / 'books' / 'config.json'}"
    config = place / "run" / "config.json"
    before = config.read_text()
    said = refused(capsys, ["report", str(place / "run"), "--to", str(config)], code=2)
    assert said == f"--to {config} is no page: give a file that ends in .html"
    assert config.read_text() == before
    said = refused(capsys, ["report", str(place / "run"), "--to", str(place / "nowhere" / "page.html")], code=4)
    assert said == f"{place / 'nowhere' / 'page.html'} cannot be written: No such file or directory"
