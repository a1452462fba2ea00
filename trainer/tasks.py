"""A task ties model, loss, data and metrics; the loop sees only this interface. Adding a task = a function and a line."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import reshard

from configs.schema import BiographyData, Config, ConfigError, ImageData, LongRangeData, NFNetConfig
from data.biographies import ranges_of
from models import FAMILIES
from models.params import Init, Spec, refilled
from models.remat import remat_of
from models.token_loss import log_p_and_likeliest, log_z_and_target

Batch = dict[str, jax.Array]
Sums = dict[str, jax.Array]


@dataclass(frozen=True)
class Task:
    """What the loop needs to know of a kind of training."""

    init: Callable[[jax.Array, Spec], Any]  # (key, spec) -> model
    # (model, batch, key) -> what training minimises, and the metrics of it: "loss", and what else there is; trainer.distill
    # adds a keyword, `teacher`
    loss: Callable[..., tuple[jax.Array, Sums]]
    weight: Callable[[Batch], jax.Array]  # what the means in loss and metrics are over: tokens, or images
    evaluate: Callable[[Any, Batch], Sums]  # (model, held-out batch) -> sums over the batch
    summarise: Callable[[dict[str, Any]], dict[str, float]]  # sums over all batches -> metrics by name
    headline: str  # the metric that evaluations are judged by; lower is better
    unit: str  # what throughput counts: tokens or images
    units_per_step: int
    flops_per_step: float  # matrix FLOPs of forward and backward
    decays: Callable[[str], bool]  # parameter name -> weight decay applies
    clips: Callable[[str], bool]  # parameter name -> adaptive clipping applies
    learns: Callable[[str], bool] | None = None  # parameter name -> it is trained; None: all are
    rates: Callable[[str], float] | None = None  # parameter name -> of the learning rate; None: 1 for all
    prepare: Callable[[Any], Any] | None = None  # model -> what `loss` takes in its place; done once a step
    whole: Callable[[Any], Any] = lambda model: model  # what is trained -> the model that is sampled from
    with_base: Callable[[Any, Any], Any] = refilled  # (what init gave, model to start from) -> what is trained


def make_task(config: Config) -> Task:
    from trainer.frozen import partly  # which need Task
    from trainer.lora import adapted

    task = TASKS[config.data.kind](config)
    if config.optimizer.sam_rho:  # climbs with a share of the batch first
        task = dataclasses.replace(task, flops_per_step=task.flops_per_step * (1 + config.optimizer.sam_share))
    if config.privacy.epsilon:  # of each unit so many rows, and a batch of units in expectation
        rows = config.privacy.rows
        task = dataclasses.replace(
            task, units_per_step=rows * task.units_per_step, flops_per_step=rows * task.flops_per_step
        )
    if config.finetune.learns:
        task = partly(task, config.finetune.learns)
    return adapted(task, config.finetune) if config.finetune.lora_rank else task


def language_modelling(config: Config) -> Task:
    """Next-token prediction; judged by bits per byte, which no choice of tokenizer can flatter."""
    family, data, trainer = FAMILIES[config.model.kind], config.data, config.trainer
    assert not isinstance(data, ImageData)
    assert not isinstance(config.model, NFNetConfig)

    def loss(model, batch: Batch, key: jax.Array) -> tuple[jax.Array, Sums]:
        nats, log_z = token_losses(config, model, batch, key)
        weights = reshard(batch["weights"], jax.typeof(nats).sharding.spec)  # devices may share a sequence
        tokens = jnp.maximum(jnp.sum(weights), 1.0)
        mean = jnp.sum(weights * nats) / tokens
        if not trainer.z_loss:
            return mean, {"loss": mean}
        z_loss = trainer.z_loss * jnp.sum(weights * jnp.square(log_z)) / tokens
        return mean + z_loss, {"loss": mean, "z_loss": z_loss}

    def evaluate(model, batch: Batch) -> Sums:
        nats, _ = token_losses(config, model, batch)
        weights = reshard(batch["weights"], jax.typeof(nats).sharding.spec)
        return {
            "nats": jnp.sum(weights * nats),
            "tokens": jnp.sum(weights),
            "bytes": jnp.sum(batch["target_bytes"]).astype(jnp.float32),
        }

    def summarise(sums: dict[str, float]) -> dict[str, float]:
        return {
            "bits_per_byte": sums["nats"] / math.log(2) / max(sums["bytes"], 1.0),
            "loss": sums["nats"] / max(sums["tokens"], 1.0),
        }

    return Task(
        init=lambda key, spec: family.model(config.model, Init(key, spec)),
        loss=loss,
        weight=lambda batch: jnp.sum(batch["weights"]),
        evaluate=evaluate,
        summarise=summarise,
        headline="bits_per_byte",
        unit="tokens",
        units_per_step=data.batch_size * data.sequence_length,
        flops_per_step=data.batch_size * data.sequence_length * family.train_flops(config.model, data.sequence_length),
        decays=family.decays,
        clips=family.clips,
        rates=family.rates(config.model),
    )


def recall(config: Config) -> Task:
    """Next-symbol prediction where rows ask for it; judged by the share of questions answered wrongly."""
    dtype = jnp.dtype(config.trainer.compute_dtype)

    def evaluate(model, batch: Batch) -> Sums:
        logits = model(batch["tokens"], batch["segment_pos"], dtype=dtype)
        losses = cross_entropy(logits, batch["targets"])
        targets, weights = (reshard(batch[n], jax.typeof(losses).sharding.spec) for n in ("targets", "weights"))
        wrong = jnp.argmax(logits, axis=-1) != targets
        return {
            "nats": jnp.sum(losses * weights),
            "wrong": jnp.sum(jnp.where(wrong, weights, 0.0)),
            "questions": jnp.sum(weights),
        }

    def summarise(sums: dict[str, float]) -> dict[str, float]:
        count = max(sums["questions"], 1.0)
        return {"error_rate": sums["wrong"] / count, "loss": sums["nats"] / count}

    task = language_modelling(config)
    return dataclasses.replace(task, evaluate=evaluate, summarise=summarise, headline="error_rate")


def sequence_classification(config: Config) -> Task:
    """A label for each row; judged by the share of wrong ones. A model that pools a row has a logit for each class; for others
    the label is the token that follows the row (`recall`)."""
    if getattr(config.model, "pooling", "none") == "none":
        return recall(config)
    data, trainer = config.data, config.trainer
    assert isinstance(data, LongRangeData)

    def logits_of(model, batch: Batch, **options) -> jax.Array:
        dtype = jnp.dtype(trainer.compute_dtype)
        return model(batch[data.inputs], batch["segment_pos"], dtype=dtype, **options)

    def loss(model, batch: Batch, key: jax.Array) -> tuple[jax.Array, Sums]:
        logits = logits_of(model, batch, remat=remat_of(trainer), dropout_key=key)
        mean = jnp.mean(cross_entropy(logits, batch["labels"]))
        return mean, {"loss": mean}

    def evaluate(model, batch: Batch) -> Sums:
        logits = logits_of(model, batch)
        losses, rows = (
            cross_entropy(logits, batch["labels"]),
            jnp.sum(batch["weights"], axis=1),
        )  # 0 behind the last row
        labels, rows = (reshard(a, jax.typeof(losses).sharding.spec) for a in (batch["labels"], rows))
        wrong = jnp.argmax(logits, axis=-1) != labels
        return {
            "nats": jnp.sum(losses * rows),
            "wrong": jnp.sum(jnp.where(wrong, rows, 0.0)),
            "questions": jnp.sum(rows),
        }

    return dataclasses.replace(
        recall(config),
        loss=loss,
        weight=lambda batch: jnp.float32(batch["labels"].shape[0]),
        evaluate=evaluate,
    )


def biographies(config: Config) -> Task:
    """Next-token prediction; judged by what a model knows of people, arXiv 2503.21676, section 2.

    The attribute loss is the loss of all tokens of values over the number of attributes, the accuracy the share of values
    whose every token is the likeliest; `max_probability` and `entropy` are means over those tokens, and `loss` over all.
    Metrics of people other than the population have their group's name before them.
    """
    dtype, data = jnp.dtype(config.trainer.compute_dtype), config.data
    assert isinstance(data, BiographyData)
    attributes, groups = len(data.attributes), list(ranges_of(data))

    def evaluate(model, batch: Batch) -> Sums:
        logits = model(batch["tokens"], batch["segment_pos"], dtype=dtype)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        nats = log_z - logit_of(logits, batch["targets"])
        expected = jnp.sum(jnp.exp(logits - log_z[..., None]) * logits, axis=-1)
        targets, weights, values = (
            reshard(batch[name], jax.typeof(nats).sharding.spec) for name in ("targets", "weights", "values")
        )
        value = (values > 0).astype(nats.dtype)
        wrong = jnp.argmax(logits, axis=-1) != targets
        # (B T A) -> (B A): which values have a wrong token.
        own = values[..., None] == jnp.arange(1, attributes + 1)[None, None]
        lost = jnp.sum(jnp.where(own & wrong[..., None], 1.0, 0.0), axis=1) > 0
        rows = {
            "rows": (jnp.sum(weights, axis=1) > 0).astype(nats.dtype),
            "value_tokens": jnp.sum(value, axis=1),
            "value_nats": jnp.sum(value * nats, axis=1),
            "wrong": jnp.sum(lost.astype(nats.dtype), axis=1),
            "max_probability": jnp.sum(value * jnp.exp(jnp.max(logits, axis=-1) - log_z), axis=1),
            "entropy": jnp.sum(value * (log_z - expected), axis=1),
            "tokens": jnp.sum(weights, axis=1),
            "nats": jnp.sum(weights * nats, axis=1),
        }
        member = (batch["group"][:, None] == jnp.arange(len(groups))[None]) & (rows["rows"] > 0)[:, None]
        return {name: jnp.sum(jnp.where(member, of_row[:, None], 0.0), axis=0) for name, of_row in rows.items()}

    def summarise(sums: dict[str, Any]) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for place, group in enumerate(groups):
            of = {name: float(total[place]) for name, total in sums.items()}
            if of["rows"]:
                asked = of["rows"] * attributes
                found = {
                    "attribute_loss": of["value_nats"] / asked,
                    "attribute_accuracy": 1 - of["wrong"] / asked,
                    "max_probability": of["max_probability"] / of["value_tokens"],
                    "entropy": of["entropy"] / of["value_tokens"],
                    "loss": of["nats"] / of["tokens"],
                }
                metrics |= {name if place == 0 else f"{group}_{name}": one for name, one in found.items()}
        return metrics

    task = language_modelling(config)
    return dataclasses.replace(task, evaluate=evaluate, summarise=summarise, headline="attribute_loss")


def image_classification(config: Config) -> Task:
    """Classification with label smoothing and mixed labels; judged by the error rate on held-out images. Where several labels
    may be true together, both are means over labels: loss over all, error rate and log loss over the evaluated ones."""
    family, data, finetune = FAMILIES[config.model.kind], config.data, config.finetune
    model_config = config.model
    assert isinstance(model_config, NFNetConfig)
    assert isinstance(data, ImageData)
    dtype = jnp.dtype(config.trainer.compute_dtype)
    normaliser = NORMALISERS[data.loss]
    counted = np.array([name in (data.evaluated or data.labels) for name in data.labels], np.float32)

    def loss(model, batch: Batch, key: jax.Array) -> tuple[jax.Array, Sums]:
        logits = model(batch["images"], dtype=dtype, dropout_key=key, remat=remat_of(config.trainer))
        if data.labels:
            targets = batch["labels"]
            if data.mixes:
                targets = batch["mix"][:, None] * targets + (1 - batch["mix"][:, None]) * batch["labels_b"]
            mean = mean_of(jnp.mean(yes_or_no(logits, targets), axis=-1), batch)
            return mean, {"loss": mean}
        hit = logit_of(logits, batch["labels"])
        if data.mixes:
            share = batch["mix"]
            hit = share * hit + (1 - share) * logit_of(logits, batch["labels_b"])
        smooth = data.label_smoothing
        expected = (1 - smooth) * hit + smooth * jnp.mean(logits, axis=-1)
        mean = mean_of(normaliser(logits) - expected, batch)
        return mean, {"loss": mean}

    def mean_of(lost: jax.Array, batch: Batch) -> jax.Array:
        if not config.privacy.epsilon:
            return jnp.mean(lost)
        weights = batch["weights"]  # of a private run images that cannot be used have no other in their place
        return jnp.sum(weights * lost) / jnp.maximum(jnp.sum(weights), 1.0)

    def evaluate(model, batch: Batch) -> Sums:
        logits = model(batch["images"], dtype=dtype, dropout_key=None)
        labels, weights = batch["labels"], batch["weights"]
        if data.labels:
            wrong = (logits > 0) != (reshard(labels, jax.typeof(logits).sharding.spec) > 0.5)
            return {
                "nats": jnp.sum(yes_or_no(logits, labels) @ counted / counted.sum() * weights),
                "wrong": jnp.sum(wrong.astype(jnp.float32) @ counted / counted.sum() * weights),
                "images": jnp.sum(weights),
            }
        hit = logit_of(logits, labels)
        # The place of the label among the classes; of equal logits the earlier class is ahead, as argmax has it.
        classes = jnp.arange(logits.shape[-1])[None]
        level = (logits == hit[:, None]) & (classes < labels[:, None])
        ahead = jnp.sum((logits > hit[:, None]) | level, axis=-1)
        right, sure = ahead == 0, confidence(logits, data.loss)
        bins = jnp.arange(CALIBRATION_BINS)[None]
        bin = jnp.minimum((sure * CALIBRATION_BINS).astype(jnp.int32), CALIBRATION_BINS - 1)[:, None] == bins
        return {
            "nats": jnp.sum((normaliser(logits) - hit) * weights),
            "wrong": jnp.sum(jnp.where(right, 0.0, weights)),
            "wrong_5": jnp.sum(jnp.where(ahead < 5, 0.0, weights)),
            "images": jnp.sum(weights),
            # How much surer the model was than right, in each bin of how sure it was.
            "too_sure": jnp.sum(jnp.where(bin, ((sure - right.astype(sure.dtype)) * weights)[:, None], 0.0), axis=0),
        }

    def summarise(sums: dict[str, Any]) -> dict[str, float]:
        count = max(sums["images"], 1.0)
        if data.labels:
            return {"error_rate": sums["wrong"] / count, "loss": sums["nats"] / count}
        top_5 = {"top_5_error": sums["wrong_5"] / count} if model_config.num_classes > 5 else {}
        return {
            "error_rate": sums["wrong"] / count,
            **top_5,
            "loss": sums["nats"] / count,
            "calibration_error": float(abs(sums["too_sure"]).sum() / count),
        }

    def with_base(model: Any, base: Any) -> Any:
        return refilled(model, base, keep=lambda name: finetune.new_head and name.startswith("head/"))

    return Task(
        init=lambda key, spec: family.model(model_config, Init(key, spec)),
        loss=loss,
        weight=lambda batch: jnp.float32(batch["labels"].shape[0]),
        evaluate=evaluate,
        summarise=summarise,
        headline="error_rate",
        unit="images",
        units_per_step=data.batch_size,
        flops_per_step=data.batch_size * family.train_flops(model_config, data.image_size),
        decays=family.decays,
        clips=family.clips,
        rates=None
        if finetune.layer_decay == 1
        else lambda name: finetune.layer_decay ** family.below_head(model_config, name),
        with_base=with_base,
        prepare=family.prepare,
    )


CALIBRATION_BINS = 15  # of the expected calibration error, as Guo et al. 2017 (arXiv 1706.04599) take them
NORMALISERS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "softmax": lambda logits: jax.nn.logsumexp(logits, axis=-1),
    "sigmoid": lambda logits: jnp.sum(
        jax.nn.softplus(logits), axis=-1
    ),  # -sum y log s(z) + (1 - y) log s(-z), less y z
}


def yes_or_no(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-y log s(z) - (1 - y) log s(-z) of each label, with s the logistic function: (B L), (B L) -> (B L)."""
    return jax.nn.softplus(logits) - reshard(targets, jax.typeof(logits).sharding.spec) * logits


def confidence(logits: jax.Array, loss: str) -> jax.Array:
    """The probability of the likeliest class: (B V) -> (B)."""
    best = jnp.max(logits, axis=-1)
    return jax.nn.sigmoid(best) if loss == "sigmoid" else jnp.exp(best - jax.nn.logsumexp(logits, axis=-1))


def check_fits(config: Config, manifest: dict) -> None:
    """Raise ConfigError if the model has fewer outputs than the data has tokens or classes, or other channels."""
    for field, needed in manifest["needs"].items():
        given = getattr(config.model, field)
        if given < needed or (field == "channels" and given != needed):
            raise ConfigError(f"model.{field}={given} does not fit the data, which needs {needed}")


TASKS: dict[str, Callable[[Config], Task]] = {
    "text": language_modelling,
    "prepared": language_modelling,
    "chat": language_modelling,
    "cvs": language_modelling,
    "recall": recall,
    "long-range": sequence_classification,
    "biographies": biographies,
    "images": image_classification,
}


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """-log softmax(logits)[label] for logits (... V) in float32 and labels (...), with V divided as it comes."""
    return jax.nn.logsumexp(logits, axis=-1) - logit_of(logits, labels)


def logit_of(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """(... V), (...) -> (...)."""
    classes = jnp.arange(logits.shape[-1], dtype=labels.dtype)
    hit = labels[..., None] == jnp.expand_dims(classes, tuple(range(labels.ndim)))
    hit = reshard(hit, jax.typeof(logits).sharding.spec)
    return jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)


def token_losses(
    config: Config, model: Any, batch: Batch, dropout_key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """-log p (nats) of every target and the logarithm of its softmax's sum, (B T) each, in float32 and not yet weighted."""
    assert not isinstance(config.model, NFNetConfig)
    dtype, trainer = jnp.dtype(config.trainer.compute_dtype), config.trainer
    x = model.features(
        batch["tokens"], batch["segment_pos"], dtype=dtype, remat=remat_of(trainer), dropout_key=dropout_key
    )
    log_z, target = model.embedding.without_logits(
        log_z_and_target, x, batch["targets"], config.model.logits_soft_cap, trainer.logits_mib
    )
    return log_z - target, log_z


def token_scores(config: Config, model: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """log p (nats, float32) of every target and whether it is the likeliest token, (B T) each; without a gradient."""
    assert not isinstance(config.model, NFNetConfig)
    x = model.features(batch["tokens"], batch["segment_pos"], dtype=jnp.dtype(config.trainer.compute_dtype))
    log_p, likeliest = model.embedding.without_logits(
        log_p_and_likeliest, x, batch["targets"], config.model.logits_soft_cap, config.trainer.logits_mib
    )
    return log_p, likeliest == reshard(batch["targets"], jax.typeof(likeliest).sharding.spec)


def document_sums(nats: jax.Array, weights: jax.Array, segment_pos: jax.Array, num_documents: int) -> Sums:
    """Sums over each document of a row: "nats", times their weights, and "tokens", of the weights; (B S) each.

    Documents count from the row's first token, whether it begins one or not; each later 0 in segment_pos (B T) begins the
    next. Those after the first S = num_documents are left out.
    """
    starts = (segment_pos == 0) & (jnp.arange(segment_pos.shape[1]) > 0)[None]
    document, weights = (reshard(a, jax.typeof(nats).sharding.spec) for a in (jnp.cumsum(starts, axis=1), weights))
    inside = document[:, :, None] == jnp.arange(num_documents)[None, None]
    return {
        name: jnp.sum(jnp.where(inside, values[:, :, None], 0.0), axis=1)
        for name, values in (("nats", nats * weights), ("tokens", weights))
    }
