"""Recording some steps of a run for TensorBoard, XProf and `podwright profile`."""

import contextlib
import pathlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from configs.schema import Config, ConfigError
from trainer.storage import StorageError, reason

FOLDER = "profile"  # of a run; TensorBoard's --logdir
PROGRAM = "step.hlo.txt"  # beside a trace: the compiled step, which knows the layer of each of its operations


def parse_steps(text: str, config: Config) -> range:
    """The steps of `--profile steps=10:15`: as in Python, 15 is the first that isn't recorded. Raises ConfigError."""
    found = re.fullmatch(r"(?:steps=)?(\d+):(\d+)", text)
    steps = range(int(found[1]), int(found[2])) if found else range(0)
    if not steps or steps[0] < 1:
        raise ConfigError(f"--profile {text} names no steps: give for example steps=10:15, for steps 10 to 14")
    if steps[-1] > config.trainer.steps:
        raise ConfigError(f"--profile {text} asks for step {steps[-1]}, but {config.trainer.show('steps')} is the last")
    return steps


class StepProfiler:
    """Records `steps` of a run, at most once; a run that ends among them keeps what there is."""

    def __init__(self, run: pathlib.Path, steps: range | None, say: Callable[[str], None]):
        self.steps, self.say = steps or range(0), say
        # A session has a folder of its own, so that nothing recorded is ever overwritten.
        self.session = run / FOLDER / "plugins" / "profile" / time.strftime("%Y_%m_%d_%H_%M_%S")
        self.recording = False

    def resumed(self, start: int) -> None:
        """To be told the step after which the run goes on."""
        if self.steps and self.steps[0] <= start:
            self.say(f"no profile: step {self.steps[0]} is behind, the run goes on from step {start}")

    def __enter__(self) -> "StepProfiler":
        return self

    def __exit__(self, *_: Any) -> None:
        if self.recording:
            self._stop()

    def before(self, step: int, program: Any) -> None:
        """`program` is the compiled step."""
        if self.steps and step == self.steps[0] and not self.session.exists():  # a rollback may lead here again
            with self._explained():
                self.session.mkdir(parents=True)
                (self.session / PROGRAM).write_text(program.as_text())
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0
            options.session_id = self.session.name
            jax.profiler.start_trace(self.session.parents[2], profiler_options=options)
            self.recording = True

    def after(self, step: int, results: Any) -> None:
        if self.recording and step == self.steps[-1]:
            jax.block_until_ready(results)
            self._stop()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError) as error:
            raise StorageError(f"the profile {self.session} could not be written: {reason(error)}") from error

    def _stop(self) -> None:
        self.recording = False
        with self._explained():
            jax.profiler.stop_trace()
        self.say(f"profile of steps {self.steps[0]} to {self.steps[-1]}: {self.session}")
