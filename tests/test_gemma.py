"""Gemma 1, 2 and 3 equal a float64 numpy model written from the papers' formulas, one document at a time."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published_gemma import MODELS

import models.blocks
import models.gemma
from configs import EXPERIMENTS
from configs.parameters import COUNTS, parameter_lines
from configs.schema import GemmaConfig
from models import attention_blocks
from models.decode import Draw, generate
from models.gemma import Gemma, decays, train_flops
from models.params import Init, named_leaves
from sharding.rules import Rules
from trainer.tasks import make_task

CONFIGS = MODELS  # two of them have padding rows
BROKEN = 3e-4  # a trap moves some logit by more than this; rounding alone moves none by 1e-5
TOKENS = np.random.default_rng(1).integers(0, 48, (4, 24)).astype(np.int32)
DOCUMENTS = [(24,), (14, 10), (1, 23), (11, 2, 11)]
POSITIONS = np.stack([np.concatenate([np.arange(n) for n in row]) for row in DOCUMENTS]).astype(np.int32)


def shapes_of(config: GemmaConfig) -> Gemma:
    return jax.eval_shape(lambda key: Gemma(config, Init(key, Rules().spec)), jax.random.key(0))


def fan_in(name: str) -> int:
    """Inputs of one output of a TINY kernel; for the table, D."""
    return 48 if name.endswith("out/kernel") else 56 if name.endswith("down/kernel") else 40


def values_of(config: GemmaConfig) -> dict[str, np.ndarray]:
    """Random parameters by name; norm weights of either sign, kernels a little larger than at the start of training."""
    rng = np.random.default_rng(0)
    shapes = {name: leaf.shape for name, leaf in named_leaves(shapes_of(config)).items()}
    stds = {n: 0.3 if n.endswith("norm") else (1.3 if n.endswith("kernel") else 1) * fan_in(n) ** -0.5 for n in shapes}
    return {name: (stds[name] * rng.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()}


def with_values(config: GemmaConfig, values: dict[str, np.ndarray]) -> Gemma:
    """The model with these parameters, laid out for the current mesh; nothing is initialised first."""
    model = shapes_of(config)
    mesh = jax.sharding.get_mesh()
    leaves = named_leaves(model)
    assert leaves.keys() == values.keys()
    placed = [
        jax.device_put(values[name], jax.sharding.NamedSharding(mesh, leaf.sharding.spec))
        for name, leaf in leaves.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(model), placed)


def run(model, tokens=TOKENS, positions=POSITIONS, dtype=jnp.float32):
    # A fresh function each time, so that a monkeypatched trap is traced and not served from jit's cache.
    batch = jax.sharding.NamedSharding(jax.sharding.get_mesh(), Rules().spec("batch", "seq"))
    tokens, positions = jax.device_put(tokens, batch), jax.device_put(positions, batch)
    return np.asarray(jax.jit(lambda m, t, p: m(t, p, dtype=dtype))(model, tokens, positions))[..., :48]


# --- the oracle: float64, no batch, no packing, one head and one layer after the other ---


def oracle(config: GemmaConfig, values: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """Logits (T V) of one document."""
    table = values["embedding/table"].astype(np.float64)[:48]
    x = table[tokens] * np.sqrt(40)
    for i in range(config.depth):
        kind = config.pattern[i % len(config.pattern)]
        w = layer_values(config, values, i)
        o = oracle_attention(config, kind, w, oracle_norm(x, w["attention_norm"]))
        x = x + (oracle_norm(o, w["attention_post_norm"]) if config.post_norm else o)
        h = oracle_norm(x, w["mlp_norm"])
        a = h @ w["mlp/up/kernel"][:, 0]
        gelu = 0.5 * a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3)))
        y = (gelu * (h @ w["mlp/up/kernel"][:, 1])) @ w["mlp/down/kernel"]
        x = x + (oracle_norm(y, w["mlp_post_norm"]) if config.post_norm else y)
    logits = oracle_norm(x, values["final_norm"]) @ table.T
    return config.logits_soft_cap * np.tanh(logits / config.logits_soft_cap) if config.logits_soft_cap else logits


def layer_values(config: GemmaConfig, values: dict[str, np.ndarray], i: int) -> dict[str, np.ndarray]:
    group, place = divmod(i, len(config.pattern))
    scanned = group < config.depth // len(config.pattern)
    prefix = f"layers/{'groups' if scanned else 'tail'}/{config.pattern[place]}_{place}/"
    own = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
    return {name: (value[group] if scanned else value).astype(np.float64) for name, value in own.items()}


def oracle_norm(x, w):
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * (1 + w)


def oracle_attention(config, kind, w, h):
    length, half = len(h), config.head_dim // 2
    local = kind == "local"
    base = config.rope_base_local if local else config.rope_base_global
    divisor = 1 if local else config.rope_divisor_global
    scale = config.query_scale or 1 / np.sqrt(config.head_dim)
    turn = np.exp(1j * np.outer(np.arange(length) / divisor, base ** (-np.arange(half) / half)))

    def rotate(z):  # features j and j + H/2 are the two parts of one complex number
        z = (z[:, :half] + 1j * z[:, half:]) * turn
        return np.concatenate([z.real, z.imag], -1)

    out = np.zeros((length, config.width))
    for n in range(config.num_heads):
        kv = n // (config.num_heads // config.num_kv_heads)
        q, k, v = (
            h @ w["attention/q/kernel"][:, n],
            h @ w["attention/k/kernel"][:, kv],
            h @ w["attention/v/kernel"][:, kv],
        )
        if config.qk_norm:
            q, k = oracle_norm(q, w["attention/q_norm"]), oracle_norm(k, w["attention/k_norm"])
        q, k = rotate(q) * scale, rotate(k)
        for t in range(length):
            first = max(0, t - config.window + 1) if local else 0
            s = k[first : t + 1] @ q[t]
            if config.attention_soft_cap:
                s = config.attention_soft_cap * np.tanh(s / config.attention_soft_cap)
            p = np.exp(s - s.max())
            out[t] += (p / p.sum()) @ v[first : t + 1] @ w["attention/out/kernel"][n]
    return out


@functools.cache
def expected(family: str) -> np.ndarray:
    """The oracle's logits of TOKENS (B T V), each document on its own."""
    config = CONFIGS[family]
    values = values_of(config)
    ends = [np.cumsum((0, *row)) for row in DOCUMENTS]
    rows = [
        [oracle(config, values, row[a:b]) for a, b in itertools.pairwise(end)]
        for row, end in zip(TOKENS, ends, strict=True)
    ]
    return np.stack([np.concatenate(row) for row in rows])


# --- parity ---


@pytest.fixture
def build(one_device):
    """Family -> the model the oracle's logits belong to, with some config fields changed."""

    def make(family, **changes):
        config = CONFIGS[family]
        return with_values(dataclasses.replace(config, **changes), values_of(config))

    return make


@pytest.mark.parametrize("family", CONFIGS)
def test_logits_of_packed_documents_equal_the_oracle(build, family):
    ours = run(build(family))
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, expected(family), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("gemma3 4b", dict(rope_base_local=1e6, rope_base_global=1e4)),
        ("gemma3 4b", dict(rope_base_global=1e4)),
        ("gemma3 4b", dict(rope_divisor_global=1.0)),
        ("gemma3 4b", dict(window=6)),
        ("gemma3 4b", dict(query_scale=10**-0.5)),
        ("gemma2 27b", dict(query_scale=0.0)),
        ("gemma2 27b", dict(attention_soft_cap=0.0)),
        ("gemma2 27b", dict(logits_soft_cap=0.0)),
    ],
    ids=lambda x: x if isinstance(x, str) else " ".join(x),
)
def test_each_field_changes_the_logits(build, family, change):
    assert np.abs(run(build(family, **change)) - expected(family)).max() > BROKEN


def post_norm_after_residual(block, x, segment_pos):
    x = NORM(x + block.attention(NORM(x, block.attention_norm[...]), segment_pos), block.attention_post_norm[...])
    return NORM(x + block.mlp(NORM(x, block.mlp_norm[...])), block.mlp_post_norm[...])


def cap_after_mask(q, k, v, positions, left, soft_cap, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_blocks, "MASKED", -soft_cap)  # what the cap makes of minus infinity
        return SELF(q, k, v, positions, left, soft_cap, **options)


def interleaved_heads(q, k, v, *rest, **options):
    k, v = (jnp.concatenate([t] * (q.shape[2] // k.shape[2]), axis=2) for t in (k, v))
    return SELF(q, k, v, *rest, **options)


NORM, ROPE, SELF = models.blocks.rms_norm, models.blocks.rope, models.gemma.self_attention
GELU, MLP = jax.nn.gelu, models.blocks.GatedMLP
TRAPS = {
    "w instead of 1+w": ("gemma1 mha", models.gemma, "rms_norm", lambda x, w: NORM(x, w - 1)),
    "embedding not scaled": ("gemma1 mha", models.gemma, "embedding_scale", lambda *_: np.float32(1)),
    "scale rounded in float32": ("gemma1 mha", models.gemma, "embedding_scale", lambda *_: np.float32(6.3125)),
    "gate and up swapped": (
        "gemma1 mha",
        MLP,
        "__call__",
        lambda mlp, x: mlp.down(GELU(mlp.up(x)[:, :, 1]) * mlp.up(x)[:, :, 0]),
    ),
    "exact gelu": ("gemma1 mha", jax.nn, "gelu", lambda x: GELU(x, approximate=False)),
    "half of a head rotated": ("gemma1 mqa", models.gemma, "rope", lambda x, p, **k: ROPE(x, p, fraction=0.5, **k)),
    "documents see each other": (
        "gemma1 mqa",
        models.gemma,
        "self_attention",
        lambda q, k, v, p, *rest, **o: SELF(q, k, v, jnp.broadcast_to(jnp.arange(24)[None], p.shape), *rest, **o),
    ),
    "post norm after the residual": ("gemma2 27b", models.gemma.Block, "__call__", post_norm_after_residual),
    "cap after the mask": ("gemma2 27b", models.gemma, "self_attention", cap_after_mask),
    "heads interleaved over keys": ("gemma2 27b", models.gemma, "self_attention", interleaved_heads),
    "window counts the keys before the query": (
        "gemma2 27b",
        models.gemma,
        "self_attention",
        lambda q, k, v, p, left, *rest, **o: SELF(q, k, v, p, left if left is None else left + 1, *rest, **o),
    ),
    "qk norm missing": ("gemma3 4b", models.gemma, "rms_norm", lambda x, w: x if x.ndim == 4 else NORM(x, w)),
    "divisor in local layers": (
        "gemma3 4b",
        models.gemma,
        "rope",
        lambda x, p, base, divisor: ROPE(x, p, base=base, divisor=8.0),
    ),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_each_trap_breaks_the_parity(build, monkeypatch, trap):
    family, owner, name, wrong = TRAPS[trap]
    monkeypatch.setattr(owner, name, wrong)
    assert np.abs(run(build(family)) - expected(family)).max() > BROKEN


def test_qk_norm_comes_before_rope(build, monkeypatch):
    """The order shows only where the norm's weights differ between a rotated pair's two features."""
    normed = []
    monkeypatch.setattr(models.gemma, "rms_norm", lambda x, w: (normed.append(w), x)[1] if x.ndim == 4 else NORM(x, w))
    monkeypatch.setattr(models.gemma, "rope", lambda *a, **k: NORM(ROPE(*a, **k), normed.pop(0)))
    assert np.abs(run(build("gemma3 4b")) - expected("gemma3 4b")).max() > BROKEN


# --- what training relies on ---


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_small_norm_offsets_survive(dtype):
    """1 + w in float32: an offset of 0.003 is lost where the sum is rounded to bfloat16, whose step there is 0.0078."""
    x = jnp.asarray(np.random.default_rng(3).normal(size=(64, 512)), dtype)
    normed = np.asarray(NORM(x, jnp.full(512, 0.003)), np.float64)
    ratio = normed / oracle_norm(np.asarray(x, np.float64), 0.003)
    assert np.mean(ratio) == pytest.approx(1, abs=1e-4)  # rounding of the result alone has no bias
    assert np.abs(ratio - 1).max() < 2**-8


def test_no_token_sees_a_later_one(build):
    model = build("gemma3 4b")
    changed = TOKENS.copy()
    changed[:, 12] = (changed[:, 12] + 1) % 48
    positions = np.tile(np.arange(24, dtype=np.int32), (4, 1))
    before, after = run(model, TOKENS, positions), run(model, changed, positions)
    assert np.array_equal(before[:, :12], after[:, :12])
    assert np.abs(before[:, 12:] - after[:, 12:]).max(axis=-1).min() > 1e-3


def test_packed_documents_and_left_padding_change_nothing(build):
    model = build("gemma2 27b")
    packed = run(model)[1]
    alone = run(model, TOKENS[1:2, :14], POSITIONS[1:2, :14])[0]
    padded = np.concatenate([np.full((1, 14), -1, np.int32), POSITIONS[1:2, 14:]], axis=1)
    np.testing.assert_allclose(alone, packed[:14], atol=1e-5)
    after = run(model, TOKENS[1:2], padded)[0]
    np.testing.assert_allclose(after[14:], packed[14:], atol=1e-5)
    assert np.isfinite(after).all()  # rows of padding see no document and mean nothing, but must not spoil a gradient


def test_gradients_equal_the_oracles_and_remat_changes_none(build):
    config, values = CONFIGS["gemma3 4b"], values_of(CONFIGS["gemma3 4b"])
    weight = np.random.default_rng(2).normal(size=(24, 48)) / 24
    tokens, positions = TOKENS[:1], POSITIONS[:1]

    def loss(model, remat):
        logits = model(tokens, positions, dtype=jnp.float32, remat=remat)
        return jnp.sum(logits * jnp.asarray(weight, jnp.float32)[None])

    model = build("gemma3 4b")
    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    plain, *others = (named_leaves(gradient(model, remat)) for remat in ("none", "dots", "layer"))
    for k, name in enumerate(values):
        for again in others:
            np.testing.assert_allclose(plain[name], again[name], rtol=1e-4, atol=1e-5, err_msg=name)
        direction = np.random.default_rng(k).normal(size=values[name].shape)
        up, down = ({**values, name: values[name] + step * direction} for step in (1e-5, -1e-5))
        slope = np.sum(weight * (oracle(config, up, tokens[0]) - oracle(config, down, tokens[0]))) / 2e-5
        size = float(np.linalg.norm(plain[name]))
        assert np.sum(np.asarray(plain[name]) * direction) == pytest.approx(slope, rel=1e-3, abs=1e-4 * size), name


def test_bfloat16_stays_near_float32(build):
    for family in ("gemma2 27b", "gemma3 4b"):
        exact, rough = expected(family), run(build(family), dtype=jnp.bfloat16)
        assert rough.dtype == np.float32
        assert np.std(rough - exact) / np.std(exact) < 0.03


@pytest.mark.parametrize("family", ["gemma1 mqa", "gemma2 27b", "gemma3 4b"])
def test_eight_devices_give_the_logits_of_one(eight_devices, family):
    sharded = run(with_values(CONFIGS[family], values_of(CONFIGS[family])))
    np.testing.assert_allclose(sharded, expected(family), rtol=0, atol=1e-5)


def test_kernels_start_with_variance_one_over_fan_in(one_device):
    config = dataclasses.replace(CONFIGS["gemma3 4b"], depth=3)
    model = named_leaves(jax.jit(lambda key: Gemma(config, Init(key, Rules().spec)))(jax.random.key(0)))
    for name, leaf in model.items():
        if name.endswith("norm"):
            assert not np.any(leaf), name
        else:
            assert float(np.std(leaf)) == pytest.approx(fan_in(name) ** -0.5, rel=0.1), name


def test_matrices_decay_and_norms_and_the_table_do_not(one_device):
    names = named_leaves(shapes_of(CONFIGS["gemma3 4b"]))
    assert {name.split("/")[-1] for name in names if decays(name)} == {"kernel"}
    assert {name.split("/")[-1] for name in names if not decays(name)} == {
        "table",
        "final_norm",
        *("attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm", "q_norm", "k_norm"),
    }


# --- rows of the table that are no tokens ---


def test_padding_rows_have_no_probability_and_no_gradient(one_device):
    """The first row's log-probabilities are those of a softmax over 48 tokens, whatever the padding rows hold."""
    config, values = CONFIGS["gemma2 27b"], values_of(CONFIGS["gemma2 27b"])
    values["embedding/table"][48:] *= 100
    batch = {"tokens": TOKENS, "segment_pos": POSITIONS, "targets": np.roll(TOKENS, -1, 1), "weights": np.ones((4, 24))}
    batch = {name: jnp.asarray(x, jnp.float32 if name == "weights" else jnp.int32) for name, x in batch.items()}
    base = EXPERIMENTS["gemma2-tiny"]()
    task = make_task(dataclasses.replace(base, model=config))
    program = jax.jit(jax.value_and_grad(task.loss, has_aux=True))
    (loss, _), gradient = program(with_values(config, values), batch, jax.random.key(0))
    logits = expected("gemma2 27b")
    losses = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
    assert float(loss) == pytest.approx(losses.mean(), abs=1e-5)
    table = np.asarray(gradient.embedding.table[...])
    assert np.abs(table[:48]).min(axis=1).min() > 0
    assert not table[48:].any()


def test_padding_rows_are_masked_after_the_soft_cap(build):
    model = build("gemma2 27b")
    logits = jax.jit(lambda m: m(jnp.asarray(TOKENS), jnp.asarray(POSITIONS), dtype=jnp.float32))(model)
    assert logits.shape == (4, 24, 52)
    assert float(jnp.max(logits[..., 48:])) < -1e38


def test_padding_rows_are_never_drawn(one_device):
    """Even where the caller's vocabulary is as large as the table, at a temperature that makes all tokens alike."""
    config = dataclasses.replace(CONFIGS["gemma1 mqa"], vocab_size=4, padding_rows=48)
    model, draw = with_values(config, values_of(config)), Draw(1e6)
    drawn = generate(model, [np.zeros(3, int)] * 4, 20, dtype=jnp.float32, draw=draw, vocab_size=52)
    assert set(np.concatenate(list(drawn)).tolist()) == {0, 1, 2, 3}


# --- published sizes ---

# depth, width, heads, key-value heads, head, F; parameters of the table and of the rest, from the reports' tables (rows
# of the table as in the Flax release); GFLOP a token of training; sqrt(D) in bfloat16
PUBLISHED = {
    "gemma-2b": ((18, 2048, 8, 1, 256, 16384), 524_550_144, 1_981_884_416, 16.85, 45.25),
    "gemma-7b": ((28, 3072, 16, 16, 256, 24576), 786_825_216, 7_751_248_896, 56.86, 55.5),
    "gemma2-2b": ((26, 2304, 8, 4, 256, 9216), 590_118_912, 2_024_517_888, 17.98, 48.0),
    "gemma2-9b": ((42, 3584, 16, 8, 256, 14336), 917_962_752, 8_324_201_984, 62.85, 59.75),
    "gemma2-27b": ((46, 4608, 32, 16, 128, 36864), 1_180_237_824, 26_047_480_320, 171.46, 68.0),
    "gemma3-270m": ((18, 640, 4, 1, 256, 2048), 167_772_160, 100_326_016, 2.31, 25.25),
    "gemma3-1b": ((26, 1152, 4, 1, 256, 6912), 301_989_888, 697_896_064, 6.94, 34.0),
    "gemma3-4b": ((34, 2560, 8, 4, 256, 10240), 671_088_640, 3_209_010_688, 26.01, 50.5),
    "gemma3-12b": ((48, 3840, 16, 8, 256, 15360), 1_006_632_960, 10_759_155_456, 79.01, 62.0),
    "gemma3-27b": ((62, 5376, 32, 16, 128, 21504), 1_409_286_144, 25_599_716_096, 172.68, 73.5),
}
# Kinds of the last layers: the pattern is cut, not completed. How many layers are global.
LAST = {"gemma3-270m": ("global", 3), "gemma3-1b": ("local", 4), "gemma3-4b": ("local", 5)}
LAST |= {"gemma3-12b": ("global", 8), "gemma3-27b": ("local", 10), "gemma2-2b": ("global", 13)}


def test_every_published_size_is_there():
    gemmas = {name for name, make in EXPERIMENTS.items() if isinstance(make().model, GemmaConfig)}
    gemmas = {name for name in gemmas if not name.endswith("-chat")}
    assert gemmas == PUBLISHED.keys() | {"gemma-tiny", "gemma1-tiny", "gemma2-tiny"}
    assert all(EXPERIMENTS[name]().name == name for name in gemmas)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_the_published_parameters_and_flops(one_device, name):
    """To the last digit of the papers' tables; in closed form, and by shapes, for which nothing is allocated."""
    config, (sizes, table, rest, gigaflops, _) = EXPERIMENTS[name]().model, PUBLISHED[name]
    fields = ("depth", "width", "num_heads", "num_kv_heads", "head_dim", "mlp_width")
    assert tuple(getattr(config, field) for field in fields) == sizes
    count, shapes = COUNTS["gemma"](config), shapes_of(config)
    assert (count.embedding, count.total - count.embedding) == (table, rest)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count.total
    assert shapes.embedding.table.size == count.embedding
    length = 32_768 if name.startswith("gemma3") else 8192
    assert EXPERIMENTS[name]().data.sequence_length == length
    assert round(train_flops(config, length) / 1e9, 2) == gigaflops


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_compute_what_the_reports_say(one_device, name):
    """Everything that the number of parameters does not tell."""
    config = EXPERIMENTS[name]().model
    large = name in ("gemma3-4b", "gemma3-12b", "gemma3-27b")
    scale = {"gemma2-27b": 144, "gemma3-27b": 168}.get(name, 256)
    attention = shapes_of(config).layers.groups[f"{config.pattern[-1]}_{len(config.pattern) - 1}"].attention
    assert attention.query_scale == pytest.approx(scale**-0.5, rel=1e-12)
    assert attention.divisor == (8.0 if large else 1.0)
    assert attention.base == (1e6 if name.startswith("gemma3") else 1e4)
    assert attention.left is None
    caps = (50.0, 30.0) if name.startswith("gemma2") else (0.0, 0.0)
    assert (config.attention_soft_cap, config.logits_soft_cap) == caps
    assert config.vocab_size == (262_144 if name.startswith("gemma3") else 256_000)
    kinds = [config.pattern[i % len(config.pattern)] for i in range(config.depth)]
    assert (kinds[-1], kinds.count("global")) == LAST.get(name, ("global", kinds.count("global")))
    if "local" in kinds:
        local = shapes_of(config).layers.groups["local_0"].attention
        window = 4096 if name.startswith("gemma2") else 1024 if large else 512
        assert (local.left, local.base, local.divisor) == (window - 1, 1e4, 1.0)
        assert len(shapes_of(config).layers.tail) == config.depth % len(config.pattern)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_embedding_scale_is_rounded_in_bfloat16_alone(name):
    width, rounded = PUBLISHED[name][0][1], PUBLISHED[name][-1]
    assert float(models.gemma.embedding_scale(width, jnp.bfloat16)) == rounded
    assert float(models.gemma.embedding_scale(width, jnp.float32)) == pytest.approx(width**0.5, rel=1e-7)


def test_config_tells_the_number_of_parameters():
    for name, (_, table, rest, *_) in PUBLISHED.items():
        told = parameter_lines(EXPERIMENTS[name]())
        assert told == [f"{table + rest:,} parameters, {rest:,} without the embedding"]
