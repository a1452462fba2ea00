"""One run, top to bottom: config, mesh, data, abstract state, init or restore, compile, loop, and why it ended."""

import contextlib
import functools
import os
import pathlib
import signal
import time
from collections.abc import Iterable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from configs.schema import Config, ConfigError
from data import open_data
from data.left_out import batch_number
from sharding import hosts
from sharding.flags import compiled, compiler_options
from sharding.mesh import make_mesh, simulate_devices
from sharding.rules import rules_for
from trainer.announcement import announced, compiled_in
from trainer.bad_records import BadRecords
from trainer.certificate import AHEAD, Certificate, next_logged
from trainer.checkpoint import Checkpoints
from trainer.distill import distilled, open_teacher
from trainer.evaluate import evaluate, open_base, place_batch
from trainer.guard import Guard, read_rollbacks, recent_values, saved_part, with_recent, without_left_out
from trainer.ledger import Ledger
from trainer.metrics import Reporter
from trainer.offload import check_host_memory
from trainer.phases import COMPILE, DATA_WAIT, EVAL, RESTORE, SAVE, STEP, Phases
from trainer.preflight import check_data, check_hosts, check_program, code_hash
from trainer.privacy import Budget, opened, promise_of, with_noise
from trainer.profiling import StepProfiler
from trainer.program import make_program
from trainer.replay import batch_of
from trainer.run_folder import RunFolder
from trainer.step import State
from trainer.storage import folder_of
from trainer.tasks import check_fits, make_task
from trainer.watchdog import Watchdog


class Preempted(Exception):
    """The run was told to stop, saved its state and can be resumed."""


def train(
    config: Config,
    run: str | pathlib.Path,
    allow: Iterable[str] = (),
    profile: range | None = None,
    phase: Phases | None = None,
) -> dict[str, float]:
    """Train to `config.trainer.steps`, resuming if `run` holds a checkpoint; returns the last evaluation. `phase` is for a
    caller who knows when this attempt began.

    Raises ConfigError, DataError, StorageError, NumericsError, each with one sentence for the user, or Preempted
    after a signal, once the state is saved.
    """
    simulate_devices(config.mesh)
    use_compilation_cache(config.trainer.compilation_cache)
    phase = phase or Phases()
    with Watchdog(config.watchdog, phase, folder_of(run)), Ledger(phase) as ledger:
        return train_in_phases(config, run, frozenset(allow), profile, phase, ledger)


def train_in_phases(
    config: Config,
    run: str | pathlib.Path,
    allow: frozenset[str],
    profile: range | None,
    phase: Phases,
    ledger: Ledger,
) -> dict[str, float]:
    check_hosts(config, run)
    with hosts.together():
        folder = RunFolder(run, config, allow, owner=hosts.first())
        if folder.owner:
            ledger.open(folder.path)
    with hosts.together():
        mesh = make_mesh(config.mesh)
        spec = rules_for(mesh).spec
        check_batch(config, mesh)
        check_host_memory(config, mesh)
        # Of a private run's batches, whose units are drawn, `opened` knows the rows.
        rows = None if config.privacy.epsilon else hosts.host_rows(mesh, config.data.batch_size)
        data = open_data(config.data, rows)
        check_fits(config, data.manifest)
        promise = promise_of(config, data, folder) if config.privacy.epsilon else None
        rollbacks = read_rollbacks(folder.path) if hosts.first() else []
    promise, rollbacks = hosts.from_first([promise, rollbacks])
    privacy = None
    if promise:
        privacy, data = opened(config, mesh, data, promise)
    with hosts.together():
        folder.check_data(data.manifest, allowed="data" in allow)
    check_data(data.manifest)
    data = without_left_out(data, config.guard, rollbacks)

    task = make_task(config)
    if config.distill.teacher:
        task = distilled(task, config, data.manifest)
    checkpoints = Checkpoints(folder.checkpoints, config.checkpoint)

    reporter = Reporter(
        folder.path,
        task.unit,
        task.units_per_step,
        task.flops_per_step,
        config.trainer.steps,
        config.trainer.log_every,
        silent=not hosts.first(),
    )
    guard = Guard(config.guard, rollbacks, reporter)
    with (
        jax.set_mesh(mesh),
        stop_signals() as stop,
        reporter,
        contextlib.closing(checkpoints),
        contextlib.closing(folder),
    ):
        # Shapes and shardings of state and batch, and the step; nothing is allocated yet. `podwright plan` compiles the same.
        program = make_program(config, task, mesh, *([privacy.noise] if privacy else []))
        abstract = program.state
        latest = checkpoints.saved.newest()
        reporter.say(*(f"removed {name}, which a killed save or deletion had left" for name in checkpoints.removed))
        reporter.say(*announced(config, folder, mesh, data, task, abstract, latest))

        def first_state() -> State:
            shardings = jax.tree.map(lambda leaf: leaf.sharding, saved_part(abstract))
            base = open_base(config, mesh) if config.finetune.base else None
            init = jax.jit(lambda base: program.init(base=base), out_shardings=shardings, donate_argnums=0)
            return init(base)

        def with_history(state: State, step: int) -> State:
            """With what no checkpoint has: the key of a private run's noise, and what the guard compares the next steps with."""
            state = with_noise(state, abstract, privacy)
            if abstract.recent is None:
                return state
            values = recent_values(folder.path, step, config.guard.window) if hosts.first() else []
            return with_recent(state, abstract, hosts.from_first(values))

        meta: dict = {}
        if latest is None:
            state = first_state()
        else:
            with phase(RESTORE):
                state, meta = checkpoints.restore_newest(saved_part(abstract), reporter.say)
        start, steps = meta.get("step", 0), config.trainer.steps
        state = with_history(state, start)
        budget = None
        if privacy:
            budget = Budget(privacy, start, steps, meta)
            reporter.say(*budget.announced(steps))
            steps = min(steps, budget.last)
        if latest is not None:
            reporter.say(f"resumed from step {start}")
        if start >= steps:
            reporter.say(f"nothing to do: {folder.address} already holds step {start} of {steps}")
            return {}
        teacher, taught = open_teacher(config, mesh, meta)

        place = functools.partial(place_batch, mesh=mesh, spec=spec)
        lowering = time.perf_counter()
        with phase(COMPILE):
            lowered = program.trace(teacher).lower()
            check_program(lowered)
            step_program = compiled(lowered)
            reporter.say(compiled_in(step_program, time.perf_counter() - lowering))
            hosts.meet()
            secret = privacy.secret if privacy else b""
            certificate = Certificate(mesh, config.trainer.seed, lowered, reporter.say, secret)
            if start:
                now = certificate.noted(state.step, place(batch_of(data, start)))
                logged_next = next_logged(folder.path, start) if hosts.first() else None
                certificate.resumed(meta.get("certificate", {}), now, start, logged_next)

        @functools.cache
        def eval_program():
            with phase(COMPILE):
                evaluating = jax.jit(task.evaluate, compiler_options=compiler_options(mesh))
                ready = compiled(evaluating.trace(abstract.model, program.held_out).lower())
                hosts.meet()
            return ready

        def evaluate_now(state: State, step: int) -> dict[str, float]:
            if config.optimizer.name == "schedule-free":
                models = {"": state.ema}
            else:
                models = {"": state.model} | ({"ema_": state.ema} if config.optimizer.ema else {})
            metrics = evaluate(eval_program(), models, data, config.eval.batches, task, place)
            reporter.record("eval", step, metrics)
            if data.sources:
                reporter.record("epochs", step, data.epochs(step))
            told = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            reporter.say(f"step {step}: held-out {told}")
            return metrics

        def save(state: State, step: int, batch: dict[str, np.ndarray]) -> None:
            meta = {"config": folder.config_hash, "data_hash": data.manifest["hash"], "code": code_hash(), **taught}
            meta["next_batch"] = batch_number(step, data.left_out) + 1
            meta["certificate"] = certificate.noted(state.step, place(batch))
            if budget:
                meta |= budget.meta(step)
            blocked = checkpoints.save(step, saved_part(state), meta)
            reporter.record("save", step, {"blocked_ms": 1e3 * blocked})
            reporter.say(f"step {step}: saving to {checkpoints.folder / str(step)} (held up {1e3 * blocked:.0f} ms)")
            folder.push()

        def logged(step: int, metrics: dict, waited: float) -> bool:
            """Log a step; whether the run goes on from it, and does not roll back."""
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            if budget:
                values["epsilon"] = budget.epsilon(step)
            reporter.train(step, values, waited)
            certificate.ran(step, values)
            return guard.accepts(step, values)

        feed = contextlib.ExitStack()
        batches = feed.enter_context(contextlib.closing(data.train_batches(start)))
        substitute = "nothing" if privacy else "another record"
        bad_records = BadRecords(folder.path if hosts.first() else None, data.max_bad, reporter.say, substitute)
        evaluation: dict[str, float] = {}
        pending: tuple | None = None  # metrics of the step before, read only once the next one has been dispatched
        reporter.start_clock()
        with (
            feed,
            phase(STEP),
            jax.transfer_guard("disallow"),  # a hidden copy between host and device is an error, not a slow step
            StepProfiler(folder.path, profile if hosts.first() else None, reporter.say) as profiler,
        ):
            profiler.resumed(start)
            step, turn, go_back = start, 0, False
            while step < steps or go_back:
                if go_back:  # the newest state is a bad one: free it first
                    del state
                    with phase(RESTORE), jax.transfer_guard("allow"):
                        saved, data = guard.roll_back(checkpoints, data)
                        start = saved or 0
                        state = first_state() if saved is None else checkpoints.restore(saved, saved_part(abstract))
                        state = with_history(state, start)
                    feed.close()
                    batches = feed.enter_context(contextlib.closing(data.train_batches(start)))
                    step, pending, go_back = start, None, False
                    reporter.start_clock()
                step += 1
                phase.at(step)
                profiler.before(step, step_program)
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    asked = time.perf_counter()
                    with phase(DATA_WAIT), jax.profiler.TraceAnnotation("input"):
                        batch = bad_records.take(step, next(batches))
                    waited = time.perf_counter() - asked
                    state, metrics = step_program(state, place(batch), teacher)
                profiler.after(step, metrics)
                if pending and not logged(*pending):
                    go_back = True
                    continue
                pending = (step, metrics, waited)

                last = step == steps
                turn += 1  # which never comes again, as a step may
                if hosts.asked_to_stop(turn):
                    stop.append("SIGTERM")
                stopping = bool(stop)
                evaluating = last or (config.eval.every and step % config.eval.every == 0)
                saving = last or stopping or step % config.checkpoint.every == 0
                if evaluating or saving:
                    if not logged(*pending):  # so that a saved step is always a logged and a good one
                        go_back = True
                        continue
                    pending = None
                    if evaluating:
                        with phase(EVAL):
                            evaluation = evaluate_now(state, step)
                    if saving:
                        with phase(SAVE):
                            save(state, step, batch)
                    reporter.start_clock()
                checkpoints.check()
                if stopping:
                    break
            phase.done()
        with phase(SAVE):
            checkpoints.finish()
            folder.push(wait=True)
        if stop:
            if (
                step < steps and not privacy
            ):  # so that who resumes has a step to compare with; of a private run no more is told
                _, metrics = step_program(state, place(batch_of(data, step + 1)), teacher)
                reporter.record(
                    AHEAD, step + 1, {name: float(value) for name, value in jax.device_get(metrics).items()}
                )
            raise Preempted(f"stopped by {stop[0]} after step {step}, which is saved")
        reporter.say(f"done: {steps} steps; checkpoint {checkpoints.folder / str(step)}")
        return evaluation


def check_batch(config: Config, mesh: Mesh) -> None:
    if config.privacy.epsilon:  # a drawn batch has the room that the devices need
        return
    devices, microbatches = rules_for(mesh).size("batch", mesh), config.trainer.microbatches
    shards = devices * microbatches
    if config.data.batch_size % shards:
        product = f" times {config.trainer.show('microbatches')}" if microbatches > 1 else ""
        raise ConfigError(
            f"data.batch_size={config.data.batch_size} is not a multiple of {shards}, the devices that divide a batch "
            f"(replica * data * fsdp){product}: {config.data.batch_size // shards * shards or shards} is"
        )


def use_compilation_cache(folder: str) -> None:
    if folder:
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(folder).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@contextlib.contextmanager
def stop_signals() -> Iterator[list[str]]:
    """Collects SIGINT and SIGTERM, so that the loop can save first; a second one of them interrupts at once.

    One of several hosts leaves SIGTERM to jax, which tells it to all (`hosts.asked_to_stop`), and makes SIGINT one.
    """
    received: list[str] = []
    alone = jax.process_count() == 1

    def note(number, frame):
        if received:
            raise KeyboardInterrupt
        if alone:
            received.append({signal.SIGINT: "ctrl-C", signal.SIGTERM: "SIGTERM"}[number])
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    heard = (signal.SIGINT, signal.SIGTERM) if alone else (signal.SIGINT,)
    before = {number: signal.signal(number, note) for number in heard}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
