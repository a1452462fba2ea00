"""Whether a resumed run is the one that was saved: what a save notes of itself, and what is compared after a restore.

Noted are checksums of the batch of the saved step, random bits of its key, and what compiled the step: they name what differs.
(Parameters and moments are held to checksums of their own whenever they are read.) That the step itself computes the same is seen on the first one after the restore, which
the log has, too: a killed run had done it, and a stopped one does it once more than it keeps (kind `ahead` in the log).
"""

import functools
import hashlib
import hmac
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
from jax.sharding import Mesh

from sharding import hosts
from sharding.flags import compiled, compiler_options
from sharding.mesh import describe
from trainer.checksums import checksum
from trainer.run_folder import read_metrics
from trainer.tasks import Batch

AHEAD = "ahead"  # kind of the log's record of a step that was done once more than the run keeps
COMPARED = ("loss", "grad_norm")
ON_ANOTHER_MESH = 1e-6  # relative difference of a loss whose sums were taken in another order
PLACES = ("mesh", "processes")  # facts about a program that change the order of sums


class Certificate:
    """Of one run, on every host; only the first has anything to compare with, and says it."""

    def __init__(
        self, mesh: Mesh, seed: int, lowered: jax.stages.Lowered, say: Callable[[str], None], secret: bytes = b""
    ) -> None:
        """`lowered` is the step before it is compiled; with a secret a checkpoint's notes tell nobody else of its batch."""
        self.seed, self.say, self.secret = seed, say, secret
        self.facts = facts(mesh, lowered)
        self._program: Callable | None = None
        self.then: dict[str, Any] = {}  # what the checkpoint notes
        self.expected: tuple[int, dict[str, float]] | None = None  # a step still to be compared, as logged

    def noted(self, step: jax.Array, batch: Batch) -> dict[str, Any]:
        """For a checkpoint's manifest: JSON-able. `batch` is the one of that step; both are on the devices."""
        if self._program is None:
            self._program = compiled(jax.jit(functools.partial(notes, self.seed)).lower(step, batch))
            hosts.meet()
        rows, bits = jax.device_get(self._program(step, batch))
        return {
            "data": {name: hidden(int(found), self.secret) for name, found in rows.items()},
            "RNG": list(map(int, bits)),
            "compiler": self.facts,
        }

    def resumed(self, then: dict[str, Any], now: dict[str, Any], step: int, logged: dict[str, float] | None) -> None:
        """Compare what the checkpoint of `step` notes of itself with what was restored; `logged` is the next step in the log."""
        if not then:
            self.say(f"resume not verified: checkpoint {step} is from before checkpoints noted what they hold")
            return
        differs = [name for name in ("data", "RNG") if then[name] != now[name]]
        if differs:
            told = "; ".join(f"{name} differs{self._where(name, then[name], now[name], step)}" for name in differs)
            self.say(f"resume not verified: {told}")
        elif logged is None:
            self.say(
                f"resume not verified by a step: the log has none after {step}; data, RNG and parameters are bit-identical"
                f"{self._changed(then['compiler'])}"
            )
        else:
            self.then, self.expected = then, (step + 1, logged)

    def ran(self, step: int, values: dict[str, float]) -> None:
        """To be told of every step; the first after a restore is compared with the log."""
        if self.expected is None or step != self.expected[0]:
            return
        logged, self.expected = self.expected[1], None
        same = "data, RNG and parameters are bit-identical"
        names = [name for name in COMPARED if name in values]  # a private run has no loss
        if all(equal(values[name], logged[name]) for name in names):
            self.say(f"resume verified: bit-identical (data, RNG, parameters, and step {step} as logged)")
            return
        name = next(name for name in names if not equal(values[name], logged[name]))
        found = f"step {step} gives {name} {values[name]!r}, the log has {logged[name]!r}"
        before = self.then["compiler"]
        if any(before[place] != self.facts[place] for place in PLACES):
            where = ", ".join(f"{p} {before[p]} → {self.facts[p]}" for p in PLACES if before[p] != self.facts[p])
            first, before_that = names[0], logged[names[0]]
            if before_that and abs(values[first] - before_that) <= ON_ANOTHER_MESH * abs(before_that):
                self.say(
                    f"resume verified: {same}; on another mesh ({where}) step {step} has the logged {first} to 1e-6"
                )
            else:
                self.say(f"resume not verified: on another mesh ({where}) {found}; {same}")
        elif changed := self._changed(before):
            self.say(f"resume not verified: {found}; {same}{changed}")
        else:
            self.say(f"resume not verified: {found}, though {same} and the compiler is the same")

    def _changed(self, before: dict[str, Any]) -> str:
        changed = [f"{name} {before.get(name)} → {now}" for name, now in self.facts.items() if before.get(name) != now]
        return f"; compiler differs: {', '.join(changed)}" if changed else ""

    def _where(self, name: str, then: Any, now: Any, step: int) -> str:
        if name == "RNG":
            return " (other random bits from trainer.seed, or another generator)"
        parts = [part for part in now if then.get(part) != now[part]] or sorted(then.keys() - now.keys())
        more = f" and {len(parts) - 2} more" if len(parts) > 2 else ""
        of = f"batch of step {step}: " if name == "data" else ""
        return f" ({of}{', '.join(parts[:2])}{more})"


def hidden(checksum: int, secret: bytes) -> int | str:
    return hmac.digest(secret, str(checksum).encode(), "sha256").hex()[:16] if secret else checksum


def equal(now: float, logged: float | None) -> bool:
    return not math.isfinite(now) if logged is None else now == logged


def next_logged(run: pathlib.Path, step: int) -> dict | None:
    """The record of the step after `step`, done by whoever wrote the checkpoint of `step` or by a resumed run after it."""
    return read_metrics(run, "train").get(step + 1) or read_metrics(run, AHEAD).get(step + 1)


def facts(mesh: Mesh, lowered: jax.stages.Lowered) -> dict[str, Any]:
    """What decides, with parameters, data and key, the bits that a step gives."""
    device = mesh.devices.flat[0]
    return {
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "platform": device.client.platform_version,
        "device": device.device_kind,
        "mesh": describe(mesh),
        "processes": jax.process_count(),
        "flags": " ".join(filter(None, (os.environ.get("XLA_FLAGS"), os.environ.get("LIBTPU_INIT_ARGS")))),
        "options": compiler_options(mesh),
        "program": hashlib.sha256(lowered.as_text().encode()).hexdigest()[:16],
    }


def notes(seed: int, step: jax.Array, batch: Batch) -> tuple[dict[str, jax.Array], jax.Array]:
    """Checksums of the fields of a batch, and bits of the key of its step (4), uint32."""
    key = jax.random.fold_in(jax.random.key(seed + 1), step - 1)
    return {name: checksum(field) for name, field in batch.items()}, jax.random.bits(key, (4,), jnp.uint32)
