"""Which sizes to train for how long: by budgets of compute, by tokens a parameter, or by epochs.

FLOPs are those of `Task.flops_per_step`: all matrix products of forward and backward pass, those of attention and the logits
included. A run's schedule always ends with its budget, so every budget is a run of its own (arXiv 2203.15556, section 3;
arXiv 2310.16764, section 2). How learning rates follow size is for the caller to say: planners only change lengths.
"""

from collections.abc import Iterable, Iterator

from configs.schema import Config, ConfigError
from launch.sweeps.grids import changed

FEWEST = 20  # steps, below which neither warm-up nor decay mean much
WARM_UP = 0.1  # of all steps at most


def isoflop(configs: Iterable[Config], budgets: Iterable[float]) -> Iterator[Config]:
    """Every config with as many steps as each budget of training FLOPs buys. Raises ConfigError where those are too few."""
    budgets = tuple(budgets)
    for config in configs:
        for budget in budgets:
            yield lasting(config, budget / flops_per_step(config), f"a budget of {budget:.3g} FLOPs")


def ladder(configs: Iterable[Config], tokens_per_parameter: Iterable[float]) -> Iterator[Config]:
    """Every config with each of these numbers of tokens (or images) a parameter, the table of embeddings not counted."""
    ratios = tuple(tokens_per_parameter)
    for config in configs:
        for ratio in ratios:
            steps = ratio * parameters(config) / units_per_step(config)
            yield lasting(config, steps, f"{ratio:g} {'images' if is_images(config) else 'tokens'} a parameter")


def epochs(configs: Iterable[Config], examples: int, numbers: Iterable[float]) -> Iterator[Config]:
    """Every config for each number of passes over so many examples (rows of text, or images)."""
    numbers = tuple(numbers)
    for config in configs:
        for number in numbers:
            yield lasting(config, number * examples / config.data.batch_size, f"{number:g} epochs")


def lasting(config: Config, steps: float, asked: str) -> Config:
    """With these steps, rounded, at most a tenth of them warm-up. The learning rate is left alone."""
    whole = round(steps)
    if whole < FEWEST:
        raise ConfigError(f"{asked} is {steps:.3g} steps of {config.name}: at least {FEWEST} are needed")
    warm_up = min(config.optimizer.warmup_steps, round(WARM_UP * whole))
    return changed(config, {"trainer.steps": whole, "optimizer.warmup_steps": warm_up})


def flops_per_step(config: Config) -> float:
    from trainer.tasks import make_task

    return make_task(config).flops_per_step


def units_per_step(config: Config) -> int:
    """Tokens, or images."""
    from trainer.tasks import make_task

    return make_task(config).units_per_step


def is_images(config: Config) -> bool:
    return config.data.kind == "images"


def parameters(config: Config) -> int:
    """Without the table of embeddings, which no layer multiplies by; nothing is allocated."""
    import jax

    from models.params import named_leaves
    from sharding.mesh import one_device_mesh
    from sharding.rules import rules_for
    from trainer.tasks import make_task

    task, mesh = make_task(config), one_device_mesh()
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(lambda: task.init(jax.random.key(0), rules_for(mesh).spec))
    return sum(leaf.size for name, leaf in named_leaves(shapes).items() if name != "embedding/table")
