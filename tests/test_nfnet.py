"""NFNet against a float64 numpy forward pass written from the paper, published sizes, and itself on eight devices."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from oracle_nfnet import np_forward

from configs import EXPERIMENTS
from configs.schema import MeshConfig, NFNetConfig
from models import nfnet
from models.nfnet import NFNet, plan_blocks, train_flops
from models.params import Init, named_leaves, path_name
from sharding.mesh import make_mesh
from sharding.rules import Rules

# Stage 1 has 10 channels inside its blocks, cut to 2 groups of 4; 37 by 42 pixels give odd and even sides to strides.
TINY = NFNetConfig(
    num_classes=10,
    channels=3,
    stem_widths=(4, 4, 8, 8),
    widths=(16, 20, 32, 32),
    depths=(1, 2, 3, 1),  # of the third stage, blocks 1 and 2 are a scan
    group_width=4,
    head_width=48,
)
TOLERANCE = 2e-6  # measured: 4e-7, on logits with a standard deviation of 0.4


@pytest.fixture(autouse=True)
def short_stages_are_loops(monkeypatch):
    monkeypatch.setattr(nfnet, "MOST_UNROLLED", 2)


IMAGES = np.random.default_rng(1).normal(size=(2, 37, 42, 3)).astype(np.float32)


@functools.cache
def initialised() -> NFNet:
    return jax.jit(lambda key: NFNet(TINY, Init(key, Rules().spec)))(jax.random.key(0))


def abstract(config: NFNetConfig) -> NFNet:
    return jax.eval_shape(lambda key: NFNet(config, Init(key, Rules().spec)), jax.random.key(0))


def filled(config: NFNetConfig) -> NFNet:
    """Parameters with telling values; at initialisation zero skip gains would hide every residual branch.

    Convolution kernels are small, and tiny in their first output channel, so that both eps rules matter.
    """
    rng = np.random.default_rng(0)

    def value(path, leaf):
        name, x = path_name(path), rng.normal(size=leaf.shape)
        if name.endswith("gain") and not name.endswith("skip_gain"):
            x = 1 + 0.3 * x
        elif name.endswith("skip_gain"):
            x = rng.uniform(0.5, 1.0)
        elif name.endswith("bias"):
            x = 0.1 * x
        elif x.ndim == 4:
            x *= 0.1 / math.sqrt(np.prod(x.shape[:-1]))
            x[..., 0] *= 0.01
        else:
            x *= 3 / math.sqrt(x.shape[0])
        return jax.device_put(np.asarray(x, np.float32), leaf.sharding.spec)

    return jax.tree_util.tree_map_with_path(value, abstract(config))


def changed(model: NFNet, change) -> NFNet:
    """The model with `change(name, value)` for every parameter."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: change(path_name(path), leaf), model)


@jax.jit
def evaluate(model, images):
    return model(images)


@jax.jit
def train(model, images, key):
    return model(images, dropout_key=key)


@jax.jit
def train_gradient(model, images):
    """Gradient and logits of one training step's loss."""

    def loss(model):
        logits = model(images, dropout_key=jax.random.key(0))
        return jnp.mean(logits**2), logits

    return jax.grad(loss, has_aux=True)(model)


def in_float64(model) -> dict[str, np.ndarray]:
    return {k: np.asarray(v, np.float64) for k, v in named_leaves(model).items()}


def reference(model, config):
    return np_forward(in_float64(model), config, IMAGES)


# --- the claims -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("eps_mode", "approximate"), [("max_nvar", True), ("add_var", False)])
def test_logits_equal_float64_reference(one_device, eps_mode, approximate):
    config = dataclasses.replace(TINY, ws_eps_mode=eps_mode, gelu_approximate=approximate)
    model = filled(config)
    expected = reference(model, config)
    assert expected.std() > 0.3
    np.testing.assert_allclose(evaluate(model, IMAGES), expected, atol=TOLERANCE)


KINDS = {  # of parameters, by the ends and beginnings of their names
    "stem kernels": r"stem/.*kernel",
    "block kernels": r"stages/.*/(reduce|spatial_.|expand)/kernel",
    "shortcut kernels": r".*/shortcut/kernel",
    "squeeze-excite kernels": r".*/(squeeze|excite)/kernel",
    "squeeze-excite biases": r".*/(squeeze|excite)/bias",
    "gains": r".*/gain",
    "biases": r"(stem|final_conv|stages/.*/(reduce|spatial_.|expand|shortcut))\b.*bias",
    "skip gains": r".*skip_gain",
    "final kernel": r"final_conv/kernel",
    "head": r"head/.*",
}


@pytest.mark.parametrize(("eps_mode", "approximate"), [("max_nvar", True), ("add_var", False)])
def test_gradients_equal_differences_of_the_float64_reference(one_device, eps_mode, approximate):
    """Central differences along random directions, one through all parameters of a kind at once."""
    config = dataclasses.replace(
        TINY, widths=(16, 20), depths=(1, 3), ws_eps_mode=eps_mode, gelu_approximate=approximate
    )
    model, images, rng = filled(config), IMAGES[:1, :19, :22], np.random.default_rng(7)
    weight, parameters = rng.normal(size=config.num_classes), in_float64(filled(config))
    scaled = jnp.asarray(weight[None], jnp.float32)
    gradient = in_float64(jax.jit(jax.grad(lambda m, x: jnp.sum(m(x) * scaled)))(model, images))
    matched = {kind: [n for n in parameters if re.fullmatch(pattern, n)] for kind, pattern in KINDS.items()}
    assert sorted(n for names in matched.values() for n in names) == sorted(parameters)
    for kind, names in matched.items():
        # As large as each parameter is, since the first channel's kernels are tiny.
        way = {n: rng.normal(size=parameters[n].shape) * (abs(parameters[n]) + 1e-6) for n in names}

        def moved(step, way=way):
            return np_forward(parameters | {n: parameters[n] + step * w for n, w in way.items()}, config, images)

        expected = ((moved(1e-5) - moved(-1e-5)) / 2e-5 @ weight).item()
        found = sum((gradient[n] * w).sum() for n, w in way.items())
        size = math.sqrt(sum((gradient[n] ** 2 * w**2).sum() for n, w in way.items()))
        print(f"{kind}: {found:.6g}, differences {expected:.6g}, off by {abs(found - expected) / size:.2g}")
        assert abs(found - expected) <= 1e-5 * size, kind


def symmetric_conv(x, kernel, bias, stride=1, groups=1):
    pad = [(kernel.shape[0] // 2,) * 2] * 2
    numbers = ("NHWC", "HWIO", "NHWC")
    y = lax.conv_general_dilated(x, kernel, (stride,) * 2, pad, dimension_numbers=numbers, feature_group_count=groups)
    return y + bias[None, None, None, :]


def replan(**changes):
    return lambda config: [
        dataclasses.replace(plan, **{field: change(plan) for field, change in changes.items()})
        for plan in plan_blocks(config)
    ]


def block_with(identity, transition):
    """A block whose shortcuts start from other tensors: each a choice between the raw input and the activated one."""

    def call(self, x, key, expected_variance, drop_rate):
        def activate(x):
            return nfnet.scaled_gelu(x, self.config.gelu_approximate)

        h = activate(x) * lax.rsqrt(expected_variance)
        start = (transition if self.shortcut else identity)(x, h)
        if self.shortcut:
            start = self.shortcut(nfnet.halve(start) if self.stride == 2 else start)
        h = self.spatial_1(activate(self.spatial_0(activate(self.reduce(h)))))
        h = nfnet.squeeze_excite(self.expand(activate(h)), self.squeeze, self.excite)
        return start + self.config.alpha * self.skip_gain[...] * h

    return call


def raw(x, h):
    return x


def activated(x, h):
    return h


TRAPS = {
    "identity shortcut from the activated input": ("Block.__call__", block_with(activated, activated)),
    "projected shortcut from the raw input": ("Block.__call__", block_with(raw, raw)),
    "no beta": ("plan_blocks", replan(expected_variance=lambda plan: 1.0)),
    "beta 1/var": ("plan_blocks", replan(expected_variance=lambda plan: plan.expected_variance**2)),
    "variance reset before a transition": (
        "plan_blocks",
        replan(expected_variance=lambda plan: 1.0 if plan.block == 0 else plan.expected_variance),
    ),
    "symmetric padding": ("conv", symmetric_conv),
    "GELU in squeeze-excite": ("jax.nn.relu", lambda x: jax.nn.gelu(x)),
    "scaled GELU in squeeze-excite": ("jax.nn.relu", lambda x: nfnet.scaled_gelu(x, True)),
    "squeeze-excite without factor 2": ("jax.nn.sigmoid", lambda x: lax.logistic(x) / 2),
    "unscaled GELU": ("GELU_GAIN", 1.0),
    "padding counts in pooling": (
        "halve",
        lambda x: lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "SAME") / 4,
    ),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_reference_notices(one_device, monkeypatch, trap):
    name, replacement = TRAPS[trap]
    monkeypatch.setattr(f"models.nfnet.{name}", replacement)
    model = filled(TINY)
    difference = abs(jax.jit(lambda m, x: m(x))(model, IMAGES) - reference(model, TINY)).max()
    assert difference > 100 * TOLERANCE


def test_the_traps_block_is_otherwise_right(one_device, monkeypatch):
    monkeypatch.setattr("models.nfnet.Block.__call__", block_with(raw, activated))
    model = filled(TINY)
    found = jax.jit(lambda m, x: m(x))(model, IMAGES)
    np.testing.assert_allclose(found, reference(model, TINY), atol=TOLERANCE)


@pytest.mark.parametrize(("field", "wrong"), [("ws_eps_mode", "add_var"), ("gelu_approximate", False)])
def test_reference_notices_wrong_setting(one_device, field, wrong):
    model = filled(dataclasses.replace(TINY, **{field: wrong}))
    assert abs(evaluate(model, IMAGES) - reference(model, TINY)).max() > 100 * TOLERANCE


# Parameters, pixels of testing, and multiply-adds of one image (in units of 1e9) at so many and at 224: the paper's table 1,
# whose "#FLOPs" they are, and the released code's "+" models.
@pytest.mark.parametrize(
    ("name", "parameters", "pixels", "giga_macs", "giga_macs_224"),
    [
        ("nfnet-f0", 71_489_284, 256, 12.38, 9.49),
        ("nfnet-f1", 132_634_256, 320, 35.54, 17.44),
        ("nfnet-f2", 193_779_228, 352, 62.59, 25.39),
        ("nfnet-f3", 254_924_200, 416, 114.76, 33.34),
        ("nfnet-f4", 316_069_172, 512, 215.24, 41.29),
        ("nfnet-f5", 377_214_144, 544, 289.76, 49.24),
        ("nfnet-f6", 438_359_116, 576, 377.28, 57.19),
        ("nfnet-f7", 499_504_088, 608, 478.78, 65.14),
        ("nfnet-f0plus", 118_824_516, 256, 19.52, 14.96),
        ("nfnet-f1plus", 220_357_008, 320, 55.45, 27.21),
        ("nfnet-f3plus", 423_421_992, 416, 177.99, 51.72),
        ("nfnet-f4plus", 524_954_484, 512, 333.39, 63.97),
        ("nfnet-f7plus", 829_551_960, 608, 740.16, 100.74),
    ],
)
def test_size_and_flops_are_the_published_ones(one_device, name, parameters, pixels, giga_macs, giga_macs_224):
    model = EXPERIMENTS[name]().model
    leaves = named_leaves(abstract(model))
    assert sum(leaf.size for leaf in leaves.values()) == parameters
    assert round(train_flops(model, pixels) / 6e9, 2) == giga_macs
    assert round(train_flops(model, 224) / 6e9, 2) == giga_macs_224


def test_expected_variances_of_f0_are_the_released_models():
    squares = [1.0, 1.04, 1.04, 1.08, 1.04, 1.08, 1.12, 1.16, 1.20, 1.24, 1.04, 1.08]
    np.testing.assert_allclose(
        [plan.expected_variance for plan in plan_blocks(EXPERIMENTS["nfnet-f0"]().model)], squares
    )


def test_parameter_names_shapes_and_ranks(one_device):
    leaves = named_leaves(abstract(TINY))
    conv, dense = ("kernel", "gain", "bias"), ("kernel", "bias")
    expected = {f"stem/conv_{i}/{p}" for i in range(4) for p in conv} | {f"final_conv/{p}" for p in conv}
    expected |= {f"head/{p}" for p in dense}
    for s, depth in enumerate(TINY.depths):
        for b in range(depth):
            block = f"stages/stage_{s}/block_{b}"
            convs = ["reduce", "spatial_0", "spatial_1", "expand"] + (["shortcut"] if b == 0 else [])
            expected |= {f"{block}/{c}/{p}" for c in convs for p in conv} | {f"{block}/skip_gain"}
            expected |= {f"{block}/{d}/{p}" for d in ("squeeze", "excite") for p in dense}
    assert set(leaves) == expected
    assert {n.rsplit("/", 1)[-1]: leaf.ndim for n, leaf in leaves.items() if "kernel" not in n} == {
        "gain": 1,
        "bias": 1,
        "skip_gain": 0,
    }
    assert leaves["stages/stage_1/block_0/spatial_0/kernel"].shape == (3, 3, 4, 8)
    assert all(leaf.dtype == jnp.float32 for leaf in leaves.values())


def test_at_initialisation_blocks_only_pass_their_shortcut_on(one_device):
    model = initialised()
    identity = "stages/stage_1/block_1/"  # a block whose shortcut has no parameters
    other = changed(model, lambda name, x: x + 1 if name.startswith(identity) and "skip_gain" not in name else x)
    np.testing.assert_array_equal(evaluate(model, IMAGES), evaluate(other, IMAGES))


def test_initial_kernels_have_variance_one_over_fan_in(one_device):
    for name, leaf in named_leaves(initialised()).items():
        if name.endswith("kernel"):
            expected = 0.01**2 if name == "head/kernel" else 1 / math.prod(leaf.shape[:-1])
            assert abs(np.mean(leaf**2) / expected - 1) < 6 / math.sqrt(leaf.size), name


def test_evaluation_is_deterministic_and_ignores_drop_rates(one_device):
    model, noisy = filled(TINY), filled(dataclasses.replace(TINY, dropout=0.5, stochastic_depth=0.5))
    expected = evaluate(model, IMAGES)
    np.testing.assert_array_equal(evaluate(model, IMAGES), expected)
    np.testing.assert_array_equal(evaluate(noisy, IMAGES), expected)
    np.testing.assert_array_equal(train(model, IMAGES, jax.random.key(1)), expected)  # rates of 0: no difference
    first = train(noisy, IMAGES, jax.random.key(1))
    np.testing.assert_array_equal(train(noisy, IMAGES, jax.random.key(1)), first)
    assert abs(train(noisy, IMAGES, jax.random.key(2)) - first).max() > 0.1


def test_stochastic_depth_drops_whole_images_at_each_blocks_rate_without_rescaling(one_device):
    """With one block's branch switched on, an image's logits are either those with the branch or those without."""
    model, num_images = filled(dataclasses.replace(TINY, stochastic_depth=0.5)), 1024
    blocks = [f"stage_{s}/block_{b}" for s, depth in enumerate(TINY.depths) for b in range(depth)]
    image = IMAGES[:1, :9, :9]

    def only(block):
        others = [f"stages/{other}/skip_gain" for other in blocks if other != block]
        return changed(model, lambda name, x: 0 * x if name in others else x)

    without = evaluate(only(None), image)
    for i, block in enumerate(blocks):
        with_branch = evaluate(only(block), image)
        out = train(only(block), np.repeat(image, num_images, axis=0), jax.random.key(i))
        kept, dropped = (abs(np.asarray(out - logits)).max(axis=1) < 1e-5 for logits in (with_branch, without))
        assert (kept ^ dropped).all(), block
        rate = 0.5 * i / len(blocks)
        assert abs(dropped.mean() - rate) <= 4 * math.sqrt(rate * (1 - rate) / num_images), block


def test_dropout_drops_at_the_rate_and_keeps_the_mean(one_device):
    out = np.asarray(nfnet.dropout(jnp.ones((200, 300)), jax.random.key(0), 0.3))
    np.testing.assert_allclose(np.unique(out), [0, 1 / 0.7], rtol=1e-6)
    assert abs((out == 0).mean() - 0.3) < 4 * math.sqrt(0.3 * 0.7 / out.size)


def test_bfloat16_stays_near_float32_and_returns_float32(one_device):
    model = filled(TINY)
    exact, rounded = evaluate(model, IMAGES), jax.jit(lambda m, x: m(x, dtype=jnp.bfloat16))(model, IMAGES)
    assert rounded.dtype == jnp.float32
    assert 0 < abs(rounded - exact).max() < 0.05 * exact.std()


NOISY = dataclasses.replace(TINY, dropout=0.2, stochastic_depth=0.5)
BATCH = np.random.default_rng(2).normal(size=(8, 33, 33, 3)).astype(np.float32)


def test_every_parameter_has_a_gradient(one_device):
    grads, _ = train_gradient(filled(NOISY), jnp.asarray(BATCH))
    for name, grad in named_leaves(grads).items():
        assert np.isfinite(grad).all(), name
        assert abs(grad).max() > 0, name


def test_eight_devices_agree_with_one(one_device):
    grads, logits = train_gradient(filled(NOISY), jnp.asarray(BATCH))
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        model = filled(NOISY)
        grads_8, logits_8 = train_gradient(model, jax.device_put(BATCH, Rules().spec("batch", None, None, None)))
        assert jax.typeof(logits_8).sharding.spec == Rules().spec("batch", None)
    np.testing.assert_allclose(logits_8, logits, atol=1e-5)
    parameters, grads, grads_8 = named_leaves(model), named_leaves(grads), named_leaves(grads_8)
    divided = [name for name, leaf in parameters.items() if not leaf.is_fully_replicated]
    assert "stages/stage_0/block_0/spatial_0/kernel" in divided
    assert "head/kernel" in divided
    for name, grad in grads.items():
        assert grads_8[name].sharding == parameters[name].sharding
        np.testing.assert_allclose(grads_8[name], grad, atol=1e-5 * abs(np.asarray(grad)).max(), err_msg=name)
