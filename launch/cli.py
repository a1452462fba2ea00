"""`podwright COMMAND …`: finds the command, runs it, and turns every failure into one sentence and an exit code.

Commands import what they need inside, so that a config error is told before jax has been loaded.
"""

import argparse
import contextlib
import difflib
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from configs.schema import ConfigError

LAST_SECONDS = 5.0  # that threads get at the end of a command that failed
EXIT_CODES = {
    "ConfigError": 2,
    "DataError": 3,
    "StorageError": 4,
    "ConversionError": 4,
    "NumericsError": 5,
    "GuaranteeError": 6,
    "SchedulerError": 69,
    "Preempted": 75,
    "AnotherHost": 76,
    "NotJoined": 76,
}


CONTINUING = {  # what comes before the command that continues, where something has to be done first
    "DataError": "once the data is put right, continue with",
    "StorageError": "once that is put right, continue with",
    "NumericsError": "the same steps would end the same way; without that batch, continue with",
}


def train(argv: list[str]) -> int:
    """train a config, or resume its run: train NAME [--run DIR] [--allow FIELDS] [--section.field VALUE]"""
    from configs.overrides import resolve
    from configs.suggestions import allowed_fields

    if not argv or argv[0] in ("-h", "--help"):
        return usage(train)
    name, *rest = argv
    resolved = resolve(name, rest, {"run": "DIR", "allow": "FIELDS", "profile": "steps=A:B"})
    run = resolved.options.get("run") or os.path.join("runs", resolved.config.name)
    allow = allowed_fields(resolved.options.get("allow", ""), resolved.config)
    from sharding import hosts
    from trainer.loop import train as run_training
    from trainer.phases import Phases, process_began
    from trainer.profiling import parse_steps
    from trainer.saved import SavedSteps
    from trainer.storage import StorageError, folder_of

    profile = parse_steps(resolved.options["profile"], resolved.config) if "profile" in resolved.options else None
    again = os.environ.get("PODWRIGHT_COMMAND") or shlex.join(["podwright", "train", *argv])
    phase = Phases(process_began(), again)
    hosts.join()
    try:
        run_training(resolved.config, run, allow, profile, phase)
    except ConfigError:
        raise
    except Exception as end:
        with contextlib.suppress(StorageError):  # whose own end this may be
            if phase.step and SavedSteps(folder_of(run) / "checkpoints").steps():
                numerics, policy = type(end).__name__ == "NumericsError", resolved.config.guard.policy
                first = CONTINUING.get(type(end).__name__, "continue with")
                if not numerics or policy == "abort":  # the other policies have done what they may
                    end.add_note(f"{first}: {again}" + " --guard.policy rollback" * numerics)
        raise
    return 0


def launch(argv: list[str]) -> int:
    """train on many hosts: launch NAME --on tpu-vm|gke|slurm|sky --topology T --run RUN [--yes], --on local --processes N"""
    from launch.jobs.commands import launch as main

    return main(argv)


def jobs(argv: list[str]) -> int:
    """what was launched: jobs list, logs JOB, follow JOB, stop JOB, restart JOB, doctor"""
    from launch.jobs.commands import jobs_main as main

    return main(argv)


def usage(command: Callable) -> int:
    print(f"podwright: {(command.__doc__ or '').strip()}")
    return 0


def sample(argv: list[str]) -> int:
    """continue prompts: sample RUN --prompt TEXT [--prompt TEXT ...]"""
    from launch.sample import main

    return main(argv)


def evaluate(argv: list[str]) -> int:
    """evaluate a run's newest checkpoint on all held-out data, on tasks, or by a probe: eval RUN [--tasks A,B] [--probe cv]"""
    from launch.evaluate import main

    return main(argv)


def logits(argv: list[str]) -> int:
    """float32 logits of given tokens: logits RUN --tokens F.npy --out G.npy"""
    from launch.logits import main

    return main(argv)


def import_checkpoint(argv: list[str]) -> int:
    """a run from DeepMind's or Hugging Face's checkpoint: import SRC --to RUN [--config NAME] [--verify]"""
    from launch.convert import import_main

    return import_main(argv)


def export(argv: list[str]) -> int:
    """a run's newest checkpoint for others: export RUN --format flax|hf|timm|haiku --to DIR"""
    from launch.convert import export_main

    return export_main(argv)


def demo(argv: list[str]) -> int:
    """train, kill, resume, sample and compare with gzip, in a few minutes"""
    from launch.demo import main

    return main(argv)


def plan(argv: list[str]) -> int:
    """memory, step time and cost on TPUs you don't have yet: plan NAME --topology T [--slices N] [--json FILE]"""
    from launch.plan import main

    return main(argv)


def profile(argv: list[str]) -> int:
    """what recorded steps were spent on: train ... --profile steps=10:15, then profile RUN"""
    from launch.profile import main

    return main(argv)


def data(argv: list[str]) -> int:
    """text into tokenised shards, and what is in them: data prepare SOURCE --to DIR, data inspect DIR, data verify DIR; data table"""
    from launch.data_commands import main

    return main(argv)


def goodput(argv: list[str]) -> int:
    """what every second of a run went to, over all its attempts, ranked, with its cost and a plot: goodput RUN"""
    from launch.goodput import main

    return main(argv)


def runs(argv: list[str]) -> int:
    """the runs there are: runs list [FOLDER], compare RUN RUN, tail RUN [--follow], archive RUN --to FOLDER"""
    from launch.runs import main

    return main(argv)


def report(argv: list[str]) -> int:
    """a run on one page that needs nothing else: report RUN [--to FILE.html]"""
    from launch.report import main

    return main(argv)


def replay(argv: list[str]) -> int:
    """a step of a run once more: its documents, their losses, gradient norms by layer: replay RUN --step N"""
    from launch.replay import main

    return main(argv)


def checkpoint(argv: list[str]) -> int:
    """what is saved, and whether it is whole: checkpoint list RUN, verify RUN, doctor RUN, diff RUN A B, adopt RUN --step N"""
    from launch.checkpoint_commands import main

    return main(argv)


def study(argv: list[str]) -> int:
    """train and compare the models of a study: study NAME [--to DIR] [--full] [--section.field VALUE]"""
    from launch.study import main

    return main(argv)


def sweep(argv: list[str]) -> int:
    """train the runs of a sweep side by side, or those still missing: sweep NAME [--to DIR] [--at-once N] [--dry-run]"""
    from launch.sweep import main

    return main(argv)


def fit(argv: list[str]) -> int:
    """scaling laws of the runs in a folder, how far to trust them, and what to train next: fit SWEEP [--to DIR] [--budget FLOPS]"""
    from launch.fit import main

    return main(argv)


def probe(argv: list[str]) -> int:
    """a linear classifier on the features of an image run: probe RUN [--data.field VALUE]"""
    from launch.probe import main

    return main(argv)


def fairness(argv: list[str]) -> int:
    """how evenly image runs do by class and by group, and what further ones change: fairness RUN [OTHER ...] [--groups FILE.csv]"""
    from launch.fairness import main

    return main(argv)


def privacy(argv: list[str]) -> int:
    """what a private run's parameters keep private, and at which epsilon: privacy RUN [--step N] [--json]"""
    from launch.privacy import main

    return main(argv)


def audit(argv: list[str]) -> int:
    """a lower bound on the epsilon of an image run with canaries, and whether its claim can hold: audit RUN [--json FILE]"""
    from launch.audit import main

    return main(argv)


def configs(argv: list[str]) -> int:
    """list the experiments"""
    from launch.config_commands import configs as run

    return run(argv)


def config(argv: list[str]) -> int:
    """print a config and where each value came from: config NAME, or compare two: config diff A B"""
    from configs.parameters import parameter_lines
    from launch.config_commands import config as run

    return run(argv, parameter_lines)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "demo": demo,
    "configs": configs,
    "config": config,
    "plan": plan,
    "train": train,
    "launch": launch,
    "jobs": jobs,
    "sample": sample,
    "eval": evaluate,
    "logits": logits,
    "import": import_checkpoint,
    "export": export,
    "profile": profile,
    "runs": runs,
    "report": report,
    "goodput": goodput,
    "replay": replay,
    "checkpoint": checkpoint,
    "data": data,
    "study": study,
    "sweep": sweep,
    "fit": fit,
    "probe": probe,
    "fairness": fairness,
    "privacy": privacy,
    "audit": audit,
}


def ignored(raised: "sys.UnraisableHookArgs") -> None:
    """Python's own hook, but for one noise: when a save fails, orbax closes an event loop to which tensorstore's threads
    still want to report. The failure itself is raised where it can be told."""
    if not (raised.exc_type is RuntimeError and str(raised.exc_value) == "Event loop is closed"):
        sys.__unraisablehook__(raised)


def subcommand(name: str, commands: Mapping[str, Callable[[list[str]], int]], argv: list[str]) -> int:
    """`podwright NAME COMMAND ...`, of commands that have parsers of their own. Raises ConfigError for one there isn't."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"podwright {name} {' | '.join(commands)}: each tells more with --help")
        return 0
    if argv[0] not in commands:
        near = difflib.get_close_matches(argv[0], commands, n=1, cutoff=0)
        raise ConfigError(f"there is no command {name} {argv[0]!r}, perhaps {near[0]}; there are {', '.join(commands)}")
    return commands[argv[0]](argv[1:])


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are our one-sentence errors."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str):
        raise ConfigError(f"{self.prog}: {message}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script and of `python -m launch`; returns the exit code."""
    if argv is not None:
        return run_command(list(argv))
    code = run_command(sys.argv[1:])
    if code:
        leave_threads(code)
    return code


def leave_threads(code: int) -> None:
    """Ends the process if threads don't end soon: those of a save that failed wait ten minutes for a signal, and Python for them."""
    deadline = time.monotonic() + LAST_SECONDS
    others = [thread for thread in threading.enumerate() if thread is not threading.main_thread() and not thread.daemon]
    for thread in others:
        thread.join(max(0.0, deadline - time.monotonic()))
    if any(thread.is_alive() for thread in others):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_command(argv: list[str]) -> int:
    sys.unraisablehook = ignored
    if not argv or argv[0] in ("-h", "--help", "help"):
        print("podwright: pretraining on TPU pods, in JAX\n")
        for name, run in COMMANDS.items():
            print(f"  {name:10}{(run.__doc__ or '').strip()}")
        return 0
    try:
        if argv[0] not in COMMANDS:
            near = difflib.get_close_matches(argv[0], COMMANDS, n=1, cutoff=0)
            raise ConfigError(f"there is no command {argv[0]!r}, perhaps {near[0]}; commands are {', '.join(COMMANDS)}")
        return COMMANDS[argv[0]](argv[1:])
    except KeyboardInterrupt:
        print("podwright: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone: not an error
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return 0
    except Exception as error:
        code = next((EXIT_CODES[c.__name__] for c in type(error).__mro__ if c.__name__ in EXIT_CODES), None)
        if code is None:
            raise  # our bug: the only case with a traceback, exit code 1
        print("podwright:", "; ".join([str(error), *getattr(error, "__notes__", [])]), file=sys.stderr)
        return code
