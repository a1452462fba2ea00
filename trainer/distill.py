"""Distillation: the student learns the distribution that a teacher, another run's model, gives each next token.

The teacher is an argument of the step and no part of the state: divided over the mesh by its own rules, in the compute
dtype, without gradients or moments. A run notes in its checkpoints which step of the teacher's run teaches it, so that it
resumes with the same one.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, reshard

from configs.schema import Config, ConfigError, NFNetConfig
from data.tokenizers import tokenizer_from_file
from models import FAMILIES
from models.distillation import Output, log_z_target_and_expected
from models.params import cast_kernels, fitted
from models.remat import Remat, remat_of
from trainer.evaluate import load_model, read_config
from trainer.run_folder import read_manifest
from trainer.storage import folder_of
from trainer.tasks import Batch, Sums, Task


def distilled(task: Task, config: Config, manifest: dict) -> Task:
    """The same task, minimising the cross-entropy to `config.distill`'s teacher, or a mean of that and the task's own.

    Its loss takes the teacher as a keyword; "loss" remains that of the data, "distill_loss" is that of the teacher.
    Raises ConfigError if the teacher's tokens are not those of the data that `manifest` describes.
    """
    model, trainer, distill = config.model, config.trainer, config.distill
    dtype = jnp.dtype(trainer.compute_dtype)
    assert not isinstance(model, NFNetConfig)

    def output(model: Any, batch: Batch, remat: Remat, dropout_key: jax.Array | None = None) -> Output:
        x = model.features(batch["tokens"], batch["segment_pos"], dtype=dtype, remat=remat, dropout_key=dropout_key)
        return Output(x, model.embedding.table[...], model.config.logits_soft_cap)

    def loss(model: Any, batch: Batch, key: jax.Array, *, teacher: Any) -> tuple[jax.Array, Sums]:
        student = task.whole(model)
        log_z, target, expected = log_z_target_and_expected(
            output(student, batch, remat_of(trainer), jax.random.fold_in(key, 1)),
            output(jax.lax.stop_gradient(teacher), batch, "none"),
            batch["targets"],
            key,
            spec=fitted(student.embedding.spec, embed=teacher.config.width),
            num_tokens=student.embedding.vocab_size,
            samples=distill.samples,
            logits_mib=trainer.logits_mib,
        )
        weights = reshard(batch["weights"], jax.typeof(log_z).sharding.spec)
        tokens = jnp.maximum(jnp.sum(weights), 1.0)

        def mean(nats: jax.Array) -> jax.Array:
            return jnp.sum(weights * nats) / tokens

        metrics = {"loss": mean(log_z - target), "distill_loss": mean(log_z - expected)}
        total = distill.weight * metrics["distill_loss"] + (1 - distill.weight) * metrics["loss"]
        if trainer.z_loss:
            metrics["z_loss"] = trainer.z_loss * mean(jnp.square(log_z))
            total += metrics["z_loss"]
        return total, metrics

    teacher = read_config(distill.teacher)
    check_teacher(config, teacher, manifest)
    length = config.data.sequence_length  # type: ignore[union-attr]
    flops = task.units_per_step * FAMILIES[teacher.model.kind].train_flops(teacher.model, length) / 3  # forward alone
    return dataclasses.replace(task, loss=loss, flops_per_step=task.flops_per_step + flops)


def check_teacher(config: Config, teacher: Config, manifest: dict) -> None:
    """Raise ConfigError unless the teacher's ids mean what the student's mean."""
    where = config.distill.show("teacher")
    given, needed = (getattr(c.model, "vocab_size", None) for c in (teacher, config))
    if given != needed:
        has = f"model.vocab_size={given}" if given else f"model.kind={teacher.model.kind!r}"
        raise ConfigError(f"{where} has {has}, but the student has model.vocab_size={needed}: they must be the same")
    theirs, ours = teachers_tokenizer(config.distill.teacher, teacher), fingerprint(manifest)
    if theirs not in (None, ours):
        names = [getattr(c.data, "tokenizer", f"none of {c.data.kind}") for c in (teacher, config)]
        raise ConfigError(
            f"{where} was trained with tokenizer {names[0]} ({theirs[:24]}), but the student's is {names[1]} "
            f"({ours[:24]}): they must be the same, or an id is another text to each"
        )


def fingerprint(manifest: dict) -> str:
    return manifest["tokenizer"]["fingerprint"] if "tokenizer" in manifest else "none"


def teachers_tokenizer(run: str, config: Config) -> str | None:
    """Its fingerprint, as recorded by a run that has trained; an imported one's file is read. None if nothing tells."""
    if (folder_of(run) / "data_manifest.json").exists():
        return fingerprint(read_manifest(run))
    file = getattr(config.data, "tokenizer", "")
    return tokenizer_from_file(file).fingerprint if file.endswith(".model") else None


def open_teacher(config: Config, mesh: Mesh, meta: dict) -> tuple[Any, dict]:
    """The teacher in the compute dtype (None if there is none), and what a checkpoint's meta must say of it.

    `meta` is that of the checkpoint resumed from. Raises StorageError.
    """
    run, dtype = config.distill.teacher, jnp.dtype(config.trainer.compute_dtype)
    if not run:
        return None, {}
    teacher, step = load_model(run, read_config(run), mesh, meta.get("teacher_step"))
    return jax.jit(lambda model: cast_kernels(model, dtype))(teacher), {"teacher_step": step}
