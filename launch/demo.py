"""`podwright demo`: what the project promises, shown in a few minutes on a laptop: train, kill, resume, sample."""

import gzip
import itertools
import lzma
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

RULE = "-" * 100
COMPARED_BATCHES = 64  # of held-out data; all of it would take minutes


def main(argv: list[str]) -> int:
    from configs.overrides import resolve
    from launch.cli import demo, usage
    from trainer.run_folder import read_metrics

    if "-h" in argv or "--help" in argv:
        return usage(demo)
    resolved = resolve("griffin-tiny", argv, {"run": "DIR"})
    config, run = resolved.config, pathlib.Path(resolved.options.get("run") or unused("runs/demo"))
    here = [] if "run" in resolved.options else ["--run", str(run)]
    command = [sys.executable, "-m", "launch", "train", "griffin-tiny", *here, *argv]
    kill_after = config.checkpoint.every + config.trainer.log_every

    heading("1. Train a small Griffin on Python's own source code, and kill it without warning")
    print("$ " + show(command))
    killed = train_until_killed(command, run, kill_after)
    before = read_metrics(run, "train")
    if killed:
        print(f"\nkilled (SIGKILL) after step {max(before)}")

    heading("2. Start the same command again: it resumes from the last committed checkpoint")
    print("$ " + show(command))
    code = subprocess.run(command).returncode
    if code:
        return code
    after = read_metrics(run, "train")
    if killed:
        print(f"\n{repeated(run, before, after)}")

    heading("3. Compare with compressors on the same held-out bytes")
    print(comparison(run, config))

    heading("4. Continue a prompt")
    sample = ["sample", str(run), "--prompt", "def main(", "--tokens", "300"]
    print("$ " + shlex.join(["podwright", *sample]))
    from launch.cli import main as podwright

    return podwright(sample)


def unused(folder: str) -> str:
    """`folder`, or the first of folder-2, folder-3, ... that does not exist: an earlier demonstration stays."""
    names = itertools.chain([folder], (f"{folder}-{n}" for n in itertools.count(2)))
    return next(name for name in names if not os.path.exists(name))


def heading(text: str) -> None:
    print(f"\n{RULE}\n{text}\n{RULE}", flush=True)


def show(command: list[str]) -> str:
    return shlex.join(["podwright", *command[3:]])


def train_until_killed(command: list[str], run: pathlib.Path, step: int) -> bool:
    """Run `command` and SIGKILL it once `step` is logged; False if it ended by itself first."""
    from trainer.run_folder import read_metrics

    process = subprocess.Popen(command)
    while process.poll() is None:
        time.sleep(0.05)
        if (run / "metrics.jsonl").exists() and max(read_metrics(run, "train"), default=0) >= step:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            return True
    return False


def repeated(run: pathlib.Path, before: dict[int, dict], after: dict[int, dict]) -> str:
    """Whether the steps that were trained twice, before the kill and after the resume, logged the same bits."""
    from trainer.run_folder import read_metrics

    saved = max((s for s in read_metrics(run, "save") if s <= max(before)), default=0)
    twice = [step for step in before if step > saved]
    keys = ("loss", "grad_norm")
    same = all(before[step][key] == after[step][key] for step in twice for key in keys)
    return f"steps {saved + 1} to {max(before)} were trained twice; losses and gradient norms bit-identical: {'yes' if same else 'NO'}"


def comparison(run: pathlib.Path, config) -> str:
    """Held-out bits per byte of the run, gzip -9, xz -9 and the corpus' own bigram entropy, as a table."""
    from data import open_data
    from data.text import bigram_entropy, held_out_bytes
    from launch.evaluate import evaluate_run

    batches = open_data(config.data).held_out_batches(COMPARED_BATCHES)
    held_out = held_out_bytes(config.data)[: sum(int(batch["target_bytes"].sum()) for batch in batches)]
    step, metrics = evaluate_run(str(run), COMPARED_BATCHES)
    rows = [
        (f"griffin-tiny after {step} steps", metrics["bits_per_byte"]),
        ("their own bigram entropy", bigram_entropy(held_out)),
        ("gzip -9", 8 * len(gzip.compress(held_out, 9)) / len(held_out)),
        ("xz -9", 8 * len(lzma.compress(held_out, preset=9)) / len(held_out)),
    ]
    lines = [f"bits per byte of {len(held_out):,} held-out bytes (lower is better):"]
    return "\n".join(lines + [f"  {name:<40}{value:6.3f}" for name, value in rows])
