"""Update rules beyond AdamW and SGD: against optax used directly, and power-propagation against its formula."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib
from update_rules import (
    GRADIENTS,
    HEAD,
    KERNEL,
    NORM,
    PARAMS,
    RATE,
    RULES,
    SHAPES,
    TABLE,
    followed,
    only,
    plain,
    rule_of,
    same,
)

from configs.optimizer import OptimizerConfig
from configs.overrides import resolve
from configs.schema import ConfigError
from sharding.arithmetic import MOMENTS
from trainer.optimizers import make_optimizer, make_schedule, power_propagated, schedule_free_average

pytestmark = pytest.mark.usefixtures("optax_promotes")


def test_lion_is_optaxs():
    theirs = optax.lion(RATE, 0.9, 0.95, weight_decay=0.1, mask={name: name.endswith("kernel") for name in SHAPES})
    same(followed(rule_of(plain("lion")), PARAMS, GRADIENTS), followed(theirs, PARAMS, GRADIENTS))


def test_muon_is_optaxs_on_each_hidden_layers_matrix_and_adamw_elsewhere():
    ours = followed(rule_of(plain("muon")), PARAMS, GRADIENTS)
    theirs = contrib.muon(RATE, beta=0.9, weight_decay=0.1, consistent_rms=0.2)
    for layer in range(3):
        same(only(KERNEL, ours, layer), followed(theirs, PARAMS[KERNEL][layer], only(KERNEL, GRADIENTS, layer)), 1e-5)
    for name, decay in ((HEAD, 0.1), (TABLE, 0.0), (NORM, 0.0)):
        adamw = optax.adamw(RATE, 0.9, 0.95, weight_decay=decay)
        same(only(name, ours), followed(adamw, PARAMS[name], only(name, GRADIENTS)))


def test_schedule_free_is_optaxs_and_so_is_its_average():
    ours, theirs = (
        make_optimizer(config, make_schedule(config, 100), lambda name: True, lambda name: True)
        if config
        else contrib.schedule_free_adamw(RATE, 5, 0.9, 0.95, weight_decay=0.1)
        for config in (plain("schedule-free", warmup_steps=5), None)
    )
    (a, first, our), (b, second, their) = ((PARAMS, rule.init(PARAMS), jax.jit(rule.update)) for rule in (ours, theirs))
    for gradient in GRADIENTS:
        updates, first = our(gradient, first, a)
        a = optax.apply_updates(a, updates)
        updates, second = their(gradient, second, b)
        b = optax.apply_updates(b, updates)
        same(a, b)
        same(schedule_free_average(first, a), contrib.schedule_free_eval_params(second, b))
    assert abs(a[NORM] - schedule_free_average(first, a)[NORM]).max() > 1e-3


def test_schedule_free_averages_what_a_rate_has_scaled():
    """A rate of 0 moves neither parameter nor average; what does not learn is in no average."""
    config = plain("schedule-free")
    rates = {KERNEL: 0.0, HEAD: 0.5, TABLE: 1.0, NORM: 1.0}
    names = lambda name: True  # noqa: E731
    rule = make_optimizer(config, make_schedule(config, 100), names, names, lambda name: name != NORM, rates.get)
    params, state, update = PARAMS, rule.init(PARAMS), jax.jit(rule.update)
    for gradient in GRADIENTS:
        updates, state = update(gradient | {NORM: np.zeros(6, np.float32)}, state, params)
        params = optax.apply_updates(params, updates)
    average = schedule_free_average(state, params)
    same((average[KERNEL], average[NORM]), (PARAMS[KERNEL], PARAMS[NORM]))
    assert abs(average[HEAD] - PARAMS[HEAD]).max() > 1e-3


def test_a_gradient_of_zeros_moves_nothing():
    zeros = jax.tree.map(np.zeros_like, PARAMS)
    for name in RULES:
        end = followed(rule_of(plain(name, weight_decay=0.0)), PARAMS, [zeros] * 3)[-1]
        same(end, PARAMS)


@pytest.mark.parametrize("alpha", [1.0, 2.0, 3.5])
def test_power_propagation_is_sgd_on_the_reparametrised_loss(alpha):
    """jax.grad finds the way through phi |phi|^(alpha - 1); momentum and decay are phi's."""
    x, y = (np.random.default_rng(seed).normal(size=(20, 6)).astype(np.float32) for seed in (1, 2))

    def loss(weights):
        return jnp.mean(jnp.square(x @ weights["kernel"] + weights["bias"] - y))

    def powered(phi):
        return phi | {"kernel": phi["kernel"] * jnp.abs(phi["kernel"]) ** (alpha - 1)}

    theta = {"kernel": PARAMS[TABLE][:6], "bias": PARAMS[NORM]}
    phi = theta | {"kernel": np.sign(theta["kernel"]) * np.abs(theta["kernel"]) ** (1 / alpha)}
    config = plain("sgd", power=alpha)
    ours, theirs = rule_of(config), rule_of(dataclasses.replace(config, power=1.0))
    if alpha == 1:
        ours = power_propagated(theirs, 1.0, lambda name: True)
    first, second = ours.init(theta), theirs.init(phi)
    for _ in range(20):
        updates, first = ours.update(jax.grad(loss)(theta), first, theta)
        theta = optax.apply_updates(theta, updates)
        updates, second = theirs.update(jax.grad(lambda phi: loss(powered(phi)))(phi), second, phi)
        phi = optax.apply_updates(phi, updates)
    same(theta, powered(phi), 1e-5)


def test_zeros_stay_zeros_only_where_power_propagation_reaches():
    params = PARAMS | {name: np.where(PARAMS[name] > 0, PARAMS[name], 0) for name in (KERNEL, TABLE)}
    end = followed(rule_of(plain("sgd", power=2.0)), params, GRADIENTS)[-1]
    assert np.array_equal(end[KERNEL] == 0, params[KERNEL] == 0)
    assert not np.any(end[TABLE] == 0)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (
            "--optimizer.name schedule-free",
            "optimizer.schedule='cosine' contradicts optimizer.name='schedule-free': its average takes the place of a decay; "
            "'constant' is allowed",
        ),
        (
            "--optimizer.name schedule-free --optimizer.schedule constant --optimizer.ema 0.9",
            "optimizer.ema=0.9 contradicts optimizer.name='schedule-free': it has an average of its own; 0 is allowed",
        ),
        (
            "--optimizer.name schedule-free --optimizer.schedule constant --optimizer.beta1 0",
            "optimizer.beta1=0.0 contradicts optimizer.name='schedule-free': gradients are taken there between average and "
            "newest; a number above 0 is allowed",
        ),
        (
            "--optimizer.name schedule-free --optimizer.schedule constant --optimizer.offload true",
            "optimizer.offload=True contradicts optimizer.name='schedule-free': its average is found with every step; false "
            "is allowed",
        ),
        (
            "--optimizer.power 2",
            "optimizer.power=2.0 contradicts optimizer.name='adamw', which divides by what keeps small weights small: 1 is "
            "allowed, or optimizer.name='sgd'",
        ),
        (
            "--optimizer.precondition_every 5 --optimizer.name lion",
            "optimizer.precondition_every=5 contradicts optimizer.name='lion': only shampoo and soap have it",
        ),
        (
            "--optimizer.graft false --optimizer.name soap",
            "optimizer.graft=False contradicts optimizer.name='soap': only shampoo has it",
        ),
    ],
)
def test_a_wrong_combination_is_one_sentence(line, sentence):
    with pytest.raises(ConfigError) as error:
        resolve("griffin-tiny", line.split())
    assert str(error.value) == sentence


def test_plans_know_every_rules_moments():
    assert tuple(MOMENTS) == dataclasses.fields(OptimizerConfig)[0].metadata["choices"]
