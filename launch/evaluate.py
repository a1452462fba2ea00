"""`podwright eval RUN`: a run's newest checkpoint on all its held-out data."""


def main(argv: list[str]) -> int:
    from launch.cli import Parser

    parser = Parser(prog="podwright eval")
    parser.add_argument("run", help="folder of a run")
    parser.add_argument("--batches", type=int, default=0, help="held-out batches; 0 for all")
    options = parser.parse_args(argv)
    step, metrics = evaluate_run(options.run, options.batches)
    print(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
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
        return step, evaluate(jax.jit(task.evaluate), model, data, batches, task, place)
