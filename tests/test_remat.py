"""Rungs and names of rematerialisation: none changes a gradient, each keeps the arrays that docs/memory.md promises, and
the products that follow from them are not computed again."""

import functools
import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.overrides import resolve
from models import FAMILIES
from models.attention import self_attention
from models.params import Init, named_leaves
from models.remat import Named, named, rematted
from sharding.rules import Rules
from trainer.tasks import make_task

# Two scanned groups with neighbours of one kind, and a remainder with some, too.
SMALL = {
    "griffin-tiny": "--model.width 32 --model.rnn_width 48 --model.mlp_width 80 --model.num_heads 2 --model.window 16 "
    "--model.depth 8 --data.sequence_length 64 --data.batch_size 2",
    "gemma-tiny": "--model.width 32 --model.num_heads 2 --model.num_kv_heads 1 --model.head_dim 24 --model.mlp_width 80 "
    "--model.window 16 --model.pattern local,local,global --model.depth 8 --data.sequence_length 64 --data.batch_size 2",
    "nfnet-tiny": "--model.widths 32,32 --model.depths 1,2 --model.head_width 32 --model.dropout 0.1 "
    "--model.stochastic_depth 0.1 --data.batch_size 2",
}
CONFIGS = {name: resolve(name, words.split()).config for name, words in SMALL.items()}
B, T = 2, 64


def random_batch(name: str) -> dict[str, np.ndarray]:
    config, rng = CONFIGS[name], np.random.default_rng(0)
    if name.startswith("nfnet"):
        side = config.data.image_size
        return {"images": rng.normal(size=(B, side, side, 1)).astype(np.float32), "labels": np.array([3, 5])}
    tokens, targets = rng.integers(config.model.vocab_size, size=(2, B, T)).astype(np.int32)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32) % 40, (B, T))  # a document ends within the row
    return {"tokens": tokens, "targets": targets, "segment_pos": positions, "weights": np.ones((B, T), np.float32)}


@functools.cache
def initial(name: str):
    task = make_task(CONFIGS[name])
    return jax.jit(lambda: task.init(jax.random.key(0), Rules().spec))()


@functools.cache
def loss_and_gradients(name: str, rung: str) -> tuple[float, dict[str, np.ndarray]]:
    """`rung`: a value of trainer.remat, or `--trainer.save a,b --trainer.offload c` with 'layer'."""
    words = ["--trainer.remat", *(rung.split() if " " not in rung else ["layer", *rung.split()])]
    task = make_task(resolve(name, [*SMALL[name].split(), *words]).config)
    program = jax.jit(
        jax.value_and_grad(lambda m, b: task.loss(m, b, jax.random.key(1))[0]),
        compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True},  # sooner
    )
    loss, gradient = program(initial(name), random_batch(name))
    return float(loss), {k: np.asarray(v) for k, v in named_leaves(gradient).items()}


def rungs(name: str) -> list[str]:
    """The topmost that recomputes something, and half of the names on the device, half on the host."""
    names = CONFIGS[name].model.tensors
    top = "layer" if name.startswith("nfnet") else "dots"
    return [top, f"--trainer.save {','.join(names[1::2])} --trainer.offload {','.join(names[::2])}"]


def more_rungs(name: str) -> list[str]:
    ways = [f"--trainer.{how} {one}" for one in CONFIGS[name].model.tensors for how in ("save", "offload")]
    return ["layer", *ways]


def check_equal(name: str, rung: str) -> None:
    plain, again = loss_and_gradients(name, "none"), loss_and_gradients(name, rung)
    assert again[0] == pytest.approx(plain[0], rel=1e-6)
    for leaf, expected in plain[1].items():
        size = np.abs(expected).max()
        np.testing.assert_allclose(again[1][leaf], expected, rtol=1e-4, atol=1e-5 * size, err_msg=f"{rung}: {leaf}")


@pytest.mark.parametrize(
    ("name", "rung"),
    [
        # Of Griffin test_griffin.py has it.
        pytest.param(name, rung, marks=pytest.mark.slow if (name, rung) == ("griffin-tiny", "dots") else [])
        for name in SMALL
        for rung in rungs(name)
    ],
)
def test_no_rung_changes_a_loss_or_a_gradient(one_device, name, rung):
    check_equal(name, rung)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rung"), [(name, rung) for name in SMALL for rung in more_rungs(name)])
def test_no_other_rung_changes_a_loss_or_a_gradient(one_device, name, rung):
    check_equal(name, rung)


def array(*shape: int, axes: tuple = ("batch", "seq"), dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    axes = (*axes, *[None] * (len(shape) - len(axes)))
    sharding = jax.sharding.NamedSharding(jax.sharding.get_mesh(), Rules().spec(*axes))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def layer_of(kind: str):
    """One layer of a family, its input and positions, all without values."""
    config = CONFIGS["griffin-tiny" if kind in ("rec", "attn") else "gemma-tiny"].model

    def alone():
        model = FAMILIES[config.kind].model(config, Init(jax.random.key(0), Rules().spec))
        groups = model.layers.groups
        layer = next(groups[place] for place in groups if place.startswith(kind))
        return jax.tree.map(lambda leaf: leaf[0], layer)

    return jax.eval_shape(alone), array(B, T, config.width), array(B, T, dtype=jnp.int32)


def applied(remat):
    return lambda layer, x, positions: rematted(lambda layer, x: layer(named(x, "input"), positions), remat)(layer, x)


def kept(kind: str, remat) -> Counter:
    """Shapes and memories of what a layer's gradient keeps: what its pullback closes over."""
    found: Counter = Counter()

    def trace(layer, x, positions):
        _, pull = jax.vjp(lambda layer, x: applied(remat)(layer, x, positions), layer, x)
        for leaf in map(jax.typeof, jax.tree.leaves(pull)):
            found[leaf.shape, "host" if leaf.memory_space == jax.memory.Space.Host else "device"] += 1

    jax.eval_shape(trace, *layer_of(kind))
    return found


# Of the sizes in SMALL: D 32, L 48, F 80; Griffin 2 heads of 16 and one key-value head, Gemma 2 of 24 and one.
PROMISED = {
    ("rec", "rnn_in"): [(B, T, 48), (B, T, 48)],
    ("rec", "rnn_out"): [(B, T, 32)],
    ("rec", "mlp_up"): [(B, T, 2, 80)],
    ("attn", "qkv"): [(B, T, 2, 16), (B, T, 1, 16), (B, T, 1, 16)],
    ("attn", "context"): [(B, T, 2, 16), (B, 2, T)],
    ("attn", "attn_out"): [(B, T, 32)],
    ("attn", "mlp_up"): [(B, T, 2, 80)],
    ("local", "qkv"): [(B, T, 2, 24), (B, T, 1, 24), (B, T, 1, 24)],
    ("local", "context"): [(B, T, 2, 24), (B, 2, T)],
    ("local", "attn_out"): [(B, T, 32)],
    ("local", "mlp_up"): [(B, T, 2, 80)],
    ("local", "mlp_out"): [(B, T, 32)],
}


@pytest.mark.parametrize(("kind", "name"), PROMISED)
def test_a_name_keeps_what_is_promised_and_nothing_else(one_device, kind, name):
    base = kept(kind, "layer")
    expected = Counter(PROMISED[kind, name])
    for remat, memory in ((Named(save=(name,)), "device"), (Named(offload=(name,)), "host")):
        more, less = kept(kind, remat) - base, base - kept(kind, remat)
        assert more == Counter({(shape, memory): count for shape, count in expected.items()})
        assert not [shape for shape, _ in less if shape[:2] == (B, T)]  # only parameters that nothing reads again


def test_an_offloaded_input_leaves_the_device(one_device):
    x = ((B, T, 32), "device")
    assert kept("attn", "layer")[x] == kept("attn", Named(save=("input",)))[x] == 1
    assert kept("attn", Named(offload=("input",)))[x] == 0
    assert kept("attn", Named(offload=("input",)))[(B, T, 32), "host"] == 1


@pytest.mark.parametrize(("how", "memory"), [("save", "device"), ("offload", "host")])
@pytest.mark.parametrize(("stage", "side", "blocks"), [("stage_0", 7, 1), ("stage_1", 4, 2)])
def test_a_stage_keeps_what_its_convolutions_give_and_nothing_of_another(one_device, how, memory, stage, side, blocks):
    """Pictures of 28 pixels are 7 a side behind the stem, and halved, rounded up, in the second stage's first block."""
    config = CONFIGS["nfnet-tiny"].model
    model = jax.eval_shape(lambda: FAMILIES["nfnet"].model(config, Init(jax.random.key(0), Rules().spec)))
    images = array(B, 28, 28, 1, axes=("batch", "seq"))

    def kept_of(remat) -> Counter:
        found: Counter = Counter()

        def trace(model, images):
            _, pull = jax.vjp(lambda model: model.logits(images, remat=remat), model)
            for leaf in map(jax.typeof, jax.tree.leaves(pull)):
                found[leaf.shape, "host" if leaf.memory_space == jax.memory.Space.Host else "device"] += 1

        jax.eval_shape(trace, model, images)
        return found

    expected = Counter({((B, side, side, 16), memory): 3 * blocks, ((B, side, side, 32), memory): blocks})
    if stage == "stage_1":  # its first block narrows before it halves
        expected += Counter({((B, 7, 7, 16), memory): 1})
        expected -= Counter({((B, 4, 4, 16), memory): 1})
    if how == "offload":  # inputs, which are always kept, move, too
        expected += Counter({((B, 7, 7, 32), memory): 1, ((B, 4, 4, 32), memory): blocks - 1})
    assert kept_of(Named(**{how: (stage,)})) - kept_of("layer") == expected


def product_flops(jaxpr) -> int:
    """Of all dot_generals, those inside calls, branches and loops included; of platforms' branches, the default's."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            left = eqn.invars[0].aval.shape
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
            continue
        inner = [p for p in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr) if is_jaxpr(p)]
        counts = [product_flops(getattr(p, "jaxpr", p)) for p in inner]
        if eqn.primitive.name == "cond":
            counts = [max(counts)]
        total += sum(counts) * eqn.params.get("length", 1)
    return total


def is_jaxpr(value) -> bool:
    return hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")


@functools.cache
def gradient_flops(kind: str, remat) -> int:
    gradient = jax.grad(lambda layer, x, positions: applied(remat)(layer, x, positions).sum(), argnums=(0, 1))
    return product_flops(jax.make_jaxpr(gradient)(*layer_of(kind)).jaxpr)


@functools.cache
def attention_flops(heads: int, features: int) -> int:
    q, kv = array(B, T, heads, features), array(B, T, 1, features)
    positions = array(B, T, dtype=jnp.int32)
    traced = jax.make_jaxpr(functools.partial(self_attention, left=15, implementation="xla"))(q, kv, kv, positions)
    return product_flops(traced.jaxpr)


# Products that a kept name spares, each once a token: the projection that makes it.
SPARED = {
    ("rec", "rnn_in"): 2 * 32 * 48,
    ("rec", "rnn_out"): 48 * 32,
    ("rec", "mlp_up"): 32 * 2 * 80,
    ("attn", "qkv"): 32 * (2 + 1 + 1) * 16,
    ("attn", "attn_out"): 2 * 16 * 32,
    ("attn", "mlp_up"): 32 * 2 * 80,
    ("local", "qkv"): 32 * (2 + 1 + 1) * 24,
    ("local", "attn_out"): 2 * 24 * 32,
    ("local", "mlp_up"): 32 * 2 * 80,
    ("local", "mlp_out"): 80 * 32,
}


@pytest.mark.parametrize(("kind", "name"), SPARED)
def test_a_kept_product_is_not_computed_again(one_device, kind, name):
    spared = gradient_flops(kind, "layer") - gradient_flops(kind, Named(save=(name,)))
    assert spared == 2 * B * T * SPARED[kind, name]


@pytest.mark.parametrize(("kind", "heads", "features"), [("attn", 2, 16), ("local", 2, 24)])
def test_a_kept_context_spares_the_forward_pass_of_attention(one_device, kind, heads, features):
    spared = gradient_flops(kind, "layer") - gradient_flops(kind, Named(save=("context",)))
    assert spared == attention_flops(heads, features) > 0


@pytest.mark.parametrize("kind", ["attn", "local"])
def test_with_every_name_kept_no_product_is_computed_again(one_device, kind):
    names = ("qkv", "context", "attn_out", "mlp_up", "mlp_out")
    assert gradient_flops(kind, Named(save=names)) == gradient_flops(kind, "none")
    assert gradient_flops(kind, "layer") > gradient_flops(kind, "none")


def test_dots_computes_no_product_again_but_those_of_a_recurrences_gates(one_device):
    assert gradient_flops("local", "dots") == gradient_flops("local", "none")


@pytest.mark.parametrize(("remat", "layers"), [("layer", 3), (Named(save=("qkv",)), 5), ("dots", 5)])
def test_neighbours_that_are_computed_again_are_one_program(one_device, remat, layers):
    """The unit of memory is a layer: local, local | global in the scanned groups; local, local in the remainder."""
    task = make_task(CONFIGS["gemma-tiny"])
    model = jax.eval_shape(lambda: task.init(jax.random.key(0), Rules().spec))
    tokens = array(B, T, dtype=jnp.int32)
    traced = jax.make_jaxpr(lambda m, t, p: m.features(t, p, dtype=jnp.float32, remat=remat))(model, tokens, tokens)
    assert count(traced.jaxpr, "checkpoint", "remat2", "remat") == layers


def count(jaxpr, *primitives: str) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        inner = [p for p in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr) if is_jaxpr(p)]
        total += eqn.primitive.name in primitives
        total += sum(count(getattr(p, "jaxpr", p), *primitives) for p in inner)
    return total
