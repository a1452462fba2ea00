"""`podwright privacy RUN`: what a run's parameters keep private, in words that can be held to it."""

import json
import math
import textwrap
from typing import Any

from configs.schema import ConfigError


def main(argv: list[str]) -> int:
    from launch.cli import Parser

    parser = Parser(prog="podwright privacy")
    parser.add_argument("run", help="folder of a run that was trained with privacy.epsilon")
    parser.add_argument("--step", type=int, help="of which checkpoint; the newest if not given")
    parser.add_argument("--json", action="store_true", help="as JSON")
    options = parser.parse_args(argv)
    found = spent(options.run, options.step)
    print(json.dumps(found, indent=1) if options.json else "\n".join(statement(found)))
    return 0


def spent(run: str, step: int | None = None) -> dict[str, Any]:
    """What the run promised and what its checkpoint says was spent, epsilon computed again. Raises ConfigError, StorageError."""
    from trainer.accounting import Stretch, epsilon, rdp_epsilon
    from trainer.evaluate import read_config
    from trainer.privacy import RECORD
    from trainer.saved import SavedSteps
    from trainer.storage import StorageError, folder_of

    config, folder = read_config(run), folder_of(run)
    saved = SavedSteps(folder / "checkpoints")
    step = saved.newest() if step is None else step
    if step is None:
        raise StorageError(f"{run} has no checkpoint yet")
    if step not in saved.steps():
        raise ConfigError(f"--step {step} is not a checkpoint of {run}, which has {', '.join(map(str, saved.steps()))}")
    meta = saved.manifest(step).get("privacy")
    if meta is None:
        raise ConfigError(f"step {step} of {run} was not trained privately: nothing about its data is promised")
    promise = json.loads((folder / RECORD).read_text())
    stretches = [Stretch(**one) for one in meta["stretches"]]
    delta = promise["delta_of_accountant"]
    return {
        "run": str(run),
        "step": step,
        **promise,
        "budget": promise["epsilon"],
        "epsilon": epsilon(stretches, delta),
        "epsilon_rdp": rdp_epsilon(stretches, delta),
        "stretches": meta["stretches"],
        "base": config.finetune.base,
        "data": "images" if config.data.kind == "images" else "documents",
    }


def statement(found: dict[str, Any]) -> list[str]:
    """Paragraphs, wrapped."""
    unit, one = {"images": ("image", "an image"), "documents": ("document", "a document")}[found["data"]]
    whose = unit if found["unit"] == "example" else f"group of {unit}s"
    each = one if found["unit"] == "example" else f"a {whose}"
    steps = sum(one["steps"] for one in found["stretches"])
    epsilon, delta = math.ceil(1000 * found["epsilon"]) / 1000, found["delta"]
    paragraphs = [
        f"The parameters of step {found['step']} of {found['run']}, and all that is computed from them, are "
        f"({epsilon:g}, {delta:g})-differentially private: whatever anyone concludes from them, and from earlier checkpoints "
        f"of the run, is at most e^{epsilon:g} times as likely, but for a probability of {delta:g}, as it would be had any one "
        f"{whose} of the {found['units']:,} in the training data not been there.",
        f"By: {steps:,} steps, each of a Poisson sample of {found['expected_batch']:,} {whose}s in expectation (rate "
        f"{found['sampling_rate']:.4g}); gradients clipped to norm {found['clip']:g} for {each}; Gaussian noise of "
        f"{found['noise']:g} times that on their sum. Neighbouring data have one {whose} more or less. Accounted for by privacy "
        f"loss distributions (dp-accounting); Renyi accounting gives {found['epsilon_rdp']:.3g}. The budget is "
        f"{found['budget']:g}.",
        f"Not covered: how many {whose}s there are; the data held out, on which metrics are measured; which numbers of the config were chosen by looking at "
        "other runs on the same data; privacy.secret, data.seed and the checksums and record names in the run folder, so "
        "release parameters, not the folder; sums in 32-bit floating point, which the theory takes for real numbers.",
    ]
    if found["base"]:
        paragraphs.append(
            f"The parameters of {found['base']}, from which it started, count as public: if they learned from the same people, add "
            "what that cost."
        )
    if found["unit"] == "example":
        paragraphs.append(
            f"One who is in k {unit}s is protected k times less: (k x {epsilon:g}) at least, with a larger delta."
        )
    if not found["secret_seed"]:
        paragraphs.append(
            "WARNING: sampling and noise came from privacy.seed, which stands in the config: whoever reads that can undo both, and "
            "against them nothing is private."
        )
    if found["log_private"]:
        paragraphs.append(
            "WARNING: metrics.jsonl, log.txt and tensorboard have training losses and clipped shares (privacy.log_private), which "
            "nothing hides: keep them."
        )
    return [line for text in paragraphs for line in [*textwrap.wrap(text, 110), ""]][:-1]
