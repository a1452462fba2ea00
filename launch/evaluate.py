"""`podwright eval RUN`: a run's newest checkpoint on all its held-out data, on tasks of lm-evaluation-harness, or under a probe."""

import argparse

from configs.schema import ConfigError


def main(argv: list[str]) -> int:
    from launch.cli import Parser

    parser = Parser(prog="podwright eval")
    parser.add_argument("run", help="folder of a run")
    parser.add_argument("--batches", type=int, default=0, help="held-out batches; 0 for all")
    parser.add_argument("--tasks", help="names of lm-evaluation-harness tasks, with commas, instead of held-out data")
    parser.add_argument("--tasks-folder", help="a folder with more tasks, YAML files as the harness reads them")
    parser.add_argument("--probe", help="'cv': what the model fills in where CVs don't tell (docs/probes.md)")
    parser.add_argument(
        "--samples",
        type=int,
        help="answers drawn of each CV and question, and texts that are probed in its place; 0, the default, for none (--probe)",
    )
    parser.add_argument("--to", help="folder for what a probe finds; RUN/cv-probe-STEP unless given (--probe)")
    options = parser.parse_args(argv)
    if options.probe is not None:
        return probe(options)
    for name in ("samples", "to"):
        if getattr(options, name) is not None:
            raise ConfigError(f"--{name} needs --probe, which says what to look for: cv is allowed")
    if options.tasks is not None:
        if options.batches:
            raise ConfigError("--batches counts held-out batches: leave it out with --tasks")
        names = list(dict.fromkeys(name for name in options.tasks.split(",") if name))
        if not names:
            raise ConfigError("--tasks is empty: give names of lm-evaluation-harness tasks, such as piqa,arc_easy")
        from launch.harness import score_tasks

        print(score_tasks(options.run, names, options.tasks_folder))
        return 0
    if options.tasks_folder is not None:
        raise ConfigError("--tasks-folder needs --tasks, which says what of it to run")
    step, metrics = evaluate_run(options.run, options.batches)
    print(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    return 0


def probe(options: argparse.Namespace) -> int:
    if options.probe != "cv":
        raise ConfigError(f"--probe {options.probe} is no probe: cv is allowed")
    for name in ("batches", "tasks", "tasks_folder"):
        if getattr(options, name):
            raise ConfigError(
                f"--{name.replace('_', '-')} is not for --probe, which has questions of its own: leave it out"
            )
    from launch.cv_probe import main

    print(*main(options.run, options.samples or 0, options.to), sep="\n")
    return 0


def evaluate_run(run: str, batches: int = 0) -> tuple[int, dict[str, float]]:
    """(step, metrics) of the newest checkpoint of `run`, on the mesh it was trained with."""
    from trainer.evaluate import evaluate, load_model, place_batch, read_config

    config = read_config(run)

    import functools

    import jax

    from data import open_data
    from sharding.mesh import make_mesh, simulate_devices
    from sharding.rules import rules_for
    from trainer.tasks import make_task

    simulate_devices(config.mesh)
    mesh, task, data = make_mesh(config.mesh), make_task(config), open_data(config.data)
    with jax.set_mesh(mesh):
        model, step = load_model(run, config, mesh)
        place = functools.partial(place_batch, mesh=mesh, spec=rules_for(mesh).spec)
        return step, evaluate(jax.jit(task.evaluate), {"": model}, data, batches, task, place)
