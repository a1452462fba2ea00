"""Selective copying and induction heads (arXiv 2402.19427, section 6.2): how soon each model learns to recall, and whether
what it learned holds on longer rows."""

import dataclasses
import functools
import pathlib

from configs.schema import RecallData
from configs.studies import MIXERS
from launch.studies.study import COLOURS, Figures, Study, family, trained

LEARNED = 0.05  # share of questions that a model that has learned the task may still get wrong
LONGER = (1, 2, 4, 8)
ROWS = 256


def measure(runs: dict[str, pathlib.Path]) -> Figures:
    from trainer.run_folder import read_metrics

    models = {}
    for name, run in runs.items():
        curve = [(step, record["error_rate"]) for step, record in sorted(read_metrics(run, "eval").items())]
        models[name] = {
            "curve": curve,
            "learned_at": next((step for step, error in curve if error <= LEARNED), None),
            "errors": extrapolation(run),
        }
    return {"models": models}


def extrapolation(run: pathlib.Path) -> list[tuple[int, float]]:
    """(length of the rows, share of questions answered wrongly) for lengths up to 8 times the training one."""
    import jax

    from data import open_data
    from trainer.evaluate import evaluate
    from trainer.tasks import make_task

    with trained(run) as (config, model, place):
        assert isinstance(config.data, RecallData)
        program, errors = jax.jit(make_task(config).evaluate), []
        for times in LONGER:
            length = config.data.sequence_length * times
            longer = dataclasses.replace(
                config.data,
                sequence_length=length,
                batch_size=max(config.data.batch_size // times, 1),
                held_out_rows=ROWS,
            )
            metrics = evaluate(program, {"": model}, open_data(longer), 0, make_task(config), place)
            errors.append((length, metrics["error_rate"]))
        return errors


def table(figures: Figures) -> list[str]:
    lengths = [length for length, _ in next(iter(figures["models"].values()))["errors"]]
    head = f"{'wrong answers, %, on rows of':<36}{'learned at':>12}" + "".join(f"{n:>8}" for n in lengths)
    lines = [head]
    for name, model in figures["models"].items():
        when = f"step {model['learned_at']}" if model["learned_at"] else "not yet"
        lines.append(f"{name:<36}{when:>12}" + "".join(f"{100 * error:8.1f}" for _, error in model["errors"]))
    return lines


def draw(figures: Figures, figure, task: str) -> None:
    learning, longer = figure.subplots(1, 2)
    for name, model in figures["models"].items():
        style = {"color": COLOURS[family(name)], "label": family(name).capitalize()}
        learning.plot(*zip(*model["curve"], strict=True), **style)
        longer.plot(*zip(*model["errors"], strict=True), marker="o", **style)
    trained_at = next(iter(figures["models"].values()))["errors"][0][0]
    learning.set(title=f"{task}: learning", xlabel="step", ylabel="share of wrong answers", ylim=(-0.03, 1))
    longer.set(title="on longer rows", xlabel="tokens a row", xscale="log", ylim=(-0.03, 1))
    lengths = [trained_at * times for times in LONGER]
    longer.set_xticks(lengths, [str(n) for n in lengths])
    longer.minorticks_off()
    longer.axvline(trained_at, color="grey", linestyle=":")
    learning.legend(frameon=False)


def study(task: str, question: str) -> Study:
    return Study(
        question=question,
        configs=tuple(f"{task}-{name}-tiny" for name in MIXERS),
        full=tuple(f"{task}-{name}" for name in MIXERS),
        measure=measure,
        table=table,
        draw=functools.partial(draw, task=task),
    )


SELECTIVE_COPY = study("selective-copy", "can a model repeat the few symbols that stood among noise?")
INDUCTION = study("induction", "can a model find again what followed a marker?")
