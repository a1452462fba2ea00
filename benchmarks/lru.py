"""Forward and backward pass of one LRU layer: ours against a plain `jax.lax.associative_scan`, as S5's code has it.

Run as `python -m benchmarks.lru [--case CASE] [--out FILE]`. Shapes are those of Long Range Arena's tasks in arXiv 2303.06349, with
fewer rows. Both sides have the same parameters and inputs, float32 and complex64. Each runs in a process of its own, one at a
time and taking turns, so that what else the machine does falls on both.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.tables import arguments, machine, publish, table

CASES = {  # rows, tokens, width H, modes N
    "listops": (2, 2048, 128, 256),
    "scifar": (2, 1024, 512, 384),
}
SIDES = ("podwright", "associative_scan")
ROUNDS = 3
STEPS = 3  # that a process measures, after one that it doesn't
FIGURES = {
    "seconds": ("forward and backward", "{:.3f} s"),
    "cpu_seconds": ("processor time", "{:.3f} s"),  # hardly moved by other people's load
    "compile_seconds": ("tracing and compiling", "{:.1f} s"),
    "temporary_mib": ("memory for intermediate results", "{:,.0f} MiB"),
}


def main() -> None:
    options = arguments(__doc__, CASES)
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for turn in range(ROUNDS):
        for side in SIDES if turn % 2 == 0 else reversed(SIDES):  # neither is always the second
            found[side].append(from_a_process(side, options.case))
            print(f"round {turn + 1}/{ROUNDS}: {side} {found[side][-1]}", file=sys.stderr, flush=True)
    ours, theirs = found.values()
    rows = []
    for key, (name, shown) in FIGURES.items():
        a, b = ([run[key] for run in runs] for runs in (ours, theirs))
        ratios = [x / y for x, y in zip(a, b, strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        rows.append((name, shown.format(statistics.median(a)), shown.format(statistics.median(b)), spread))
    for key in ("loss", "grad_norm"):
        x, y = ours[0][key], theirs[0][key]
        rows.append((key, f"{x:.6g}", f"{y:.6g}", f"relative difference {abs(x - y) / abs(y):.1e}"))
    sizes = "{} rows of {} tokens, H {}, N {}".format(*CASES[options.case])
    note = f"{sizes}, float32; medians of {ROUNDS} rounds of {STEPS} steps."
    publish(
        [
            "# A layer of the LRU",
            "",
            *table(("", *SIDES, "ratio, median of rounds (range)"), rows),
            "",
            note,
            machine(),
        ],
        options.out,
    )


def from_a_process(side: str, case: str) -> dict[str, float]:
    program = f"import json; from benchmarks.lru import measure; print(json.dumps(measure({side!r}, {case!r})))"
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True)
    if ended.returncode:
        raise SystemExit(f"{side} ended with exit code {ended.returncode}")
    return json.loads(ended.stdout.splitlines()[-1])


def measure(side: str, case: str) -> dict[str, float]:
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from configs.schema import LRUConfig
    from models.lru import LRU
    from models.params import Init, named_leaves
    from sharding.mesh import one_device_mesh
    from sharding.rules import Rules

    rows, length, width, modes = CASES[case]
    positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
    u, dy = np.random.default_rng(0).normal(size=(2, rows, length, width)).astype(np.float32)
    config = LRUConfig(width=width, state_size=modes)
    with jax.set_mesh(one_device_mesh()):
        unit = jax.jit(lambda: LRU(config, Init(jax.random.key(0), Rules().spec)))()
        sides: dict[str, tuple[Any, Callable]] = {
            "podwright": (unit, lambda unit, u: unit(u, None, positions)[0]),
            "associative_scan": (jax.tree.map(np.asarray, named_leaves(unit)), plain),
        }
        parameters, layer = sides[side]

        def loss(parameters, u):
            return jnp.mean(layer(parameters, u) * dy)

        start = time.perf_counter()
        program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(parameters, u).compile()
        compiled = time.perf_counter() - start
        value, gradient = jax.block_until_ready(program(parameters, u))
        wall, cpu = [], []
        for _ in range(STEPS):
            start, used = time.perf_counter(), time.process_time()
            jax.block_until_ready(program(parameters, u))
            wall.append(time.perf_counter() - start)
            cpu.append(time.process_time() - used)
        needed = program.memory_analysis()
        assert needed
        return {
            "seconds": statistics.median(wall),
            "cpu_seconds": statistics.median(cpu),
            "compile_seconds": compiled,
            "temporary_mib": needed.temp_size_in_bytes / 2**20,
            "loss": float(value),
            "grad_norm": float(optax.tree.norm(gradient)),
        }


def plain(values: dict[str, Any], u: Any) -> Any:
    """y (B T H) of u (B T H) from our parameters by name, one row at a time, in the form of S5's `apply_ssm`."""
    import jax
    import jax.numpy as jnp

    eigenvalues = jnp.exp(-jnp.exp(values["nu_log"]) + 1j * jnp.exp(values["theta_log"]))
    b, c = values["to_state/kernel"], values["from_state/kernel"]
    b = (b[:, 0] + 1j * b[:, 1]) * jnp.exp(values["gamma_log"])[None]
    c = c[0] + 1j * c[1]

    def combine(left, right):
        return right[0] * left[0], right[0] * left[1] + right[1]

    def of_row(u):
        inputs = u.astype(jnp.complex64) @ b
        decays = jnp.broadcast_to(eigenvalues[None], inputs.shape)
        _, x = jax.lax.associative_scan(combine, (decays, inputs))
        return (x @ c).real + values["skip"][None] * u

    return jax.vmap(of_row)(u)


if __name__ == "__main__":
    main()
