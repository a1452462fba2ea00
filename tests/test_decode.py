"""Griffin's state and sampling: whatever pieces a text is read in, the logits are those of one parallel forward pass."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_griffin import BLOCKS, CONFIG, GOLDEN, golden

import models.decode
from configs.schema import ConfigError, GemmaConfig, MeshConfig
from models.decode import ENDED, Draw, choose, generate, likeliest
from models.gemma import Gemma
from models.params import Init
from models.state import init_state, state_bytes, transformer_bytes
from sharding.mesh import make_mesh, one_device_mesh
from sharding.rules import Rules

SMALL = dataclasses.replace(CONFIG, window=3)  # the golden parameters, short enough to pass three windows quickly
LENGTH = 10
CAPACITY = 16
ROWS = {
    "one document": range(LENGTH),
    "begins inside a document": range(4, 4 + LENGTH),
    "packed documents": [0, 1, 2, 3, 0, 1, 0, 1, 2, 3],
    "left padding, 1 token": [-1] * 9 + [0],
    "left padding, 2 tokens": [-1] * 8 + [0, 1],
    "left padding, 3 tokens": [-1] * 7 + [0, 1, 2],
    "left padding, 7 tokens": [-1] * 3 + [*range(7)],
    "padding on both sides": [-1, -1, 0, 1, 2, 3, 4, 5, -1, -1],
}
POSITIONS = np.array([list(row) for row in ROWS.values()], np.int32)
TOKENS = np.random.default_rng(0).integers(0, 48, POSITIONS.shape, dtype=np.int32)


@pytest.fixture(scope="module")
def mesh():
    mesh = one_device_mesh()
    with jax.set_mesh(mesh):
        yield mesh


@pytest.fixture(scope="module")
def model(mesh):
    return golden(SMALL)


# Each shape runs a few times: optimising its program would take longer.
quickly = functools.partial(jax.jit, static_argnames="dtype", compiler_options={"xla_backend_optimization_level": 0})


@quickly
def parallel(model, tokens, positions, dtype=jnp.float32):
    return model(tokens, positions, dtype=dtype)


@quickly
def advance(model, state, tokens, positions, dtype=jnp.float32):
    return model(tokens, positions, dtype=dtype, state=state)


def in_pieces(model, cuts, tokens=TOKENS, positions=POSITIONS, dtype=jnp.float32):
    """Logits (B T V) and the last state, read in the pieces between `cuts`."""
    state, logits = init_state(model.config, len(tokens), dtype, Rules().spec, CAPACITY), []
    for start, end in zip([0, *cuts], [*cuts, tokens.shape[1]], strict=True):
        some, state = advance(model, state, tokens[:, start:end], positions[:, start:end], dtype)
        logits.append(np.asarray(some))
    return np.concatenate(logits, axis=1), state


def assert_equal_by_row(actual, expected, message):
    for name, ours, theirs in zip(ROWS, np.asarray(actual), np.asarray(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5, err_msg=f"{name}, {message}")


@pytest.mark.parametrize("cuts", [[cut] for cut in range(1, LENGTH)], ids=str)
def test_a_text_cut_anywhere_has_the_logits_of_one_pass(model, cuts):
    assert_equal_by_row(in_pieces(model, cuts)[0], parallel(model, TOKENS, POSITIONS), f"cut at {cuts}")


@pytest.mark.parametrize("cuts", [[*range(1, LENGTH)], [2, 4, 6, 8], [1, 2, 9], [7, 8, 9], [5, 6, 8]], ids=str)
def test_many_pieces_have_the_logits_of_one_pass_past_three_windows(model, cuts):
    assert_equal_by_row(in_pieces(model, cuts)[0], parallel(model, TOKENS, POSITIONS), f"cut at {cuts}")


def test_one_piece_longer_than_the_window_has_the_logits_without_a_state(model):
    assert_equal_by_row(in_pieces(model, [])[0], parallel(model, TOKENS, POSITIONS), "one piece")


def test_a_query_sees_as_many_keys_as_in_training_and_no_more(model):
    """The ring holds W keys: with its own a query sees W + 1, and a window wider or narrower by one is told apart."""
    exact = np.asarray(parallel(model, TOKENS, POSITIONS))[0]
    cuts = [*range(1, LENGTH)]
    for window in (2, 4):
        other = in_pieces(golden(dataclasses.replace(CONFIG, window=window)), cuts, TOKENS[:1], POSITIONS[:1])[0][0]
        first = min(window, SMALL.window) + 1  # the first query for which the two windows differ
        np.testing.assert_allclose(other[:first], exact[:first], atol=2e-5)
        assert np.abs(other[first:] - exact[first:]).max() > 1e-3


def test_pieces_in_bfloat16_stay_near_float32(model):
    exact = np.asarray(parallel(model, TOKENS, POSITIONS))
    rough, state = in_pieces(model, [*range(1, LENGTH)], dtype=jnp.bfloat16)
    assert np.std(rough - exact) / np.std(exact) < 0.03
    kinds = {leaf.dtype.name for leaf in jax.tree.leaves(state.layers)}
    assert kinds == {"bfloat16", "float32"}
    assert state.layers["tail"]["rec_0"].h.dtype == jnp.float32


def test_the_state_equals_the_references_after_two_packed_documents(mesh):
    """Final RG-LRU states, document length and the key in slot 0 of DeepMind's cache (its slots count per document)."""
    tokens, positions = (np.asarray([GOLDEN[name]], np.int32) for name in ("tokens", "segment_pos"))
    logits, state = in_pieces(golden(), [12], tokens, positions)
    np.testing.assert_allclose(logits[0], GOLDEN["logits"], atol=2e-5)
    for block, name in enumerate(BLOCKS):
        expected = GOLDEN["cache_after"][f"blocks.{block}"]
        part, layer = name.split("/")
        ours = jax.tree.map(lambda leaf, stacked=part == "groups": leaf[0] if stacked else leaf, state.layers)[part]
        if layer.startswith("rec"):
            np.testing.assert_allclose(ours[layer].h[0], expected["rg_lru_state"], atol=2e-5)
        else:
            first = len(tokens[0]) - expected["num_tokens"]  # where the second document starts
            slot = (first + CONFIG.window) % CONFIG.window  # its 9th token: the reference's slot 8 mod 8
            np.testing.assert_allclose(ours[layer].keys[0, slot, 0], expected["keys_slot0"], atol=2e-5)


def test_the_state_has_one_size_at_any_length_and_it_is_the_published_one(model):
    before = init_state(SMALL, 8, jnp.float32, Rules().spec, CAPACITY)
    after = in_pieces(model, [5])[1]
    assert jax.tree.map(jnp.shape, before) == jax.tree.map(jnp.shape, after)
    assert jax.tree.map(lambda leaf: leaf.dtype, before) == jax.tree.map(lambda leaf: leaf.dtype, after)
    released = dict(vocab_size=256_000, window=2048)
    for width, depth, heads, size in ((2560, 26, 10, 17.2e6), (4096, 38, 16, 26.2e6)):  # RecurrentGemma 2B and 9B
        config = dataclasses.replace(
            CONFIG, width=width, rnn_width=width, depth=depth, num_heads=heads, mlp_width=3 * width, **released
        )
        shapes = jax.eval_shape(lambda config=config: init_state(config, 3, jnp.bfloat16, Rules().spec, 8192))
        assert state_bytes(shapes) == pytest.approx(size, rel=3e-3)
    assert transformer_bytes(config, 8192, jnp.bfloat16) == 38 * 2 * 256 * 8192 * 2


def test_eight_devices_continue_as_one_does(model):
    """Sequences, channels and heads are divided; the state lies where the layers that read it do."""
    from test_griffin import with_values

    from models.params import named_leaves

    expected = parallel(model, TOKENS, POSITIONS)
    values = {name: np.asarray(leaf) for name, leaf in named_leaves(model).items()}
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        place = functools.partial(jax.device_put, device=jax.NamedSharding(mesh, Rules().spec("batch", "seq")))
        actual = in_pieces(with_values(values, SMALL), [9], place(TOKENS), place(POSITIONS))[0]
    assert_equal_by_row(actual, expected, "8 devices")


# --- sampling ---------------------------------------------------------------------------------------------------------


GREEDY = Draw()
PROMPTS = [TOKENS[row, :length] for row, length in enumerate((1, 2, 3, 9))]


def tokens_of(model, prompts, count=6, draw=GREEDY, **options):
    drawn = generate(model, prompts, count, dtype=jnp.float32, draw=draw, **dict(vocab_size=48) | options)
    return np.stack(list(drawn), axis=1)


@pytest.fixture
def short_chunks(monkeypatch):
    """Prompts of up to 9 tokens then take two chunks, and the programs compile quickly."""
    monkeypatch.setattr(models.decode, "CHUNK", 4)


def test_greedy_tokens_are_the_argmax_of_the_parallel_forward_pass(model, short_chunks):
    drawn = tokens_of(model, PROMPTS)
    for prompt, tokens in zip(PROMPTS, drawn, strict=True):
        text = np.zeros((1, 16), np.int32)  # the rest is not seen
        text[0, : len(prompt) + 6] = [*prompt, *tokens]
        logits = parallel(model, text, np.arange(16, dtype=np.int32)[None])[0]
        likely = np.argmax(logits, axis=-1)[len(prompt) - 1 :][:6]
        assert list(likely) == list(tokens)


@pytest.mark.parametrize("draw", [GREEDY, Draw(1.5, top_k=5, top_p=0.9)], ids=["greedy", "drawn"])
def test_a_row_does_not_depend_on_the_lengths_of_its_neighbours(model, short_chunks, draw):
    together = tokens_of(model, PROMPTS, draw=draw)
    for neighbours in ([TOKENS[4, :1]] * 3, [TOKENS[4]] * 3):
        # Row r draws with random numbers of row r: the neighbours alone are exchanged.
        for row in (0, 3):
            prompts = [*neighbours[:row], PROMPTS[row], *neighbours[row:]]
            assert list(tokens_of(model, prompts, draw=draw)[row]) == list(together[row])


def test_a_seed_gives_the_same_tokens_again_and_another_gives_others(model, short_chunks):
    first, again, other = (tokens_of(model, PROMPTS, draw=Draw(1.5, 5, 0.9), seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_row_stops_at_eos_and_sampling_stops_with_the_last_row(model, short_chunks):
    free = tokens_of(model, PROMPTS)
    eos = int(free[0, 2])
    stopped = tokens_of(model, PROMPTS, eos_id=eos)
    for before, after in zip(free, stopped, strict=True):
        end = list(before).index(eos) + 1 if eos in before else len(before)
        end = min(end, stopped.shape[1])
        assert list(after[:end]) == list(before[:end])
        assert (after[end:] == ENDED).all()
    all_at_once = tokens_of(model, PROMPTS[:1] * 4, eos_id=eos)
    assert all_at_once.shape[1] == list(free[0]).index(eos) + 1


def test_ids_that_stand_for_nothing_are_never_drawn(model, short_chunks):
    assert tokens_of(model, PROMPTS, draw=Draw(50.0), vocab_size=5).max() < 5


def test_no_prompt_is_an_error_in_one_sentence(model):
    with pytest.raises(ConfigError, match="0 prompts to continue: at least one is needed"):
        tokens_of(model, [])


def test_a_step_compiles_once_for_all_positions(model, short_chunks):
    before = models.decode.step._cache_size()
    tokens_of(model, PROMPTS, count=5, draw=Draw(0.123))
    tokens_of(model, [TOKENS[0]] * 4, count=9, draw=Draw(0.123))
    tokens_of(model, [TOKENS[0, :1]] * 4, count=3, draw=Draw(0.123))  # nothing to prefill
    assert models.decode.step._cache_size() == before + 1


# --- Gemma ------------------------------------------------------------------------------------------------------------


GEMMAS = {
    "1, one key-value head": dict(pattern=("global",), depth=2, num_kv_heads=1, qk_norm=False, post_norm=False),
    "2, soft caps": dict(
        pattern=("local", "global"), depth=3, attention_soft_cap=5.0, logits_soft_cap=3.0, qk_norm=False
    ),
    "3, positions divided": dict(pattern=("local", "local", "global"), depth=5, rope_divisor_global=8.0),
    "3, as many key-value heads as queries": dict(pattern=("local", "global"), depth=2, num_kv_heads=4),
    "a window of one": dict(pattern=("local", "global"), depth=2, window=1),
}


@pytest.fixture(scope="module", params=GEMMAS)
def gemma(request, mesh):
    small = dict(width=32, head_dim=16, mlp_width=64, window=4, vocab_size=48)
    config = GemmaConfig(**small | GEMMAS[request.param])
    model = jax.jit(lambda key: Gemma(config, Init(key, Rules().spec)))(jax.random.key(0))
    # Norms that differ from 1 and queries that differ from keys, or a swap of the two would not be seen.
    keys = iter(jax.random.split(jax.random.key(1), 100))
    return jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(next(keys), leaf.shape), model)


@pytest.mark.parametrize("cuts", [[*range(1, LENGTH)], [4], [3, 8, 9]], ids=str)
def test_gemma_read_in_pieces_has_the_logits_of_one_pass(gemma, cuts):
    assert_equal_by_row(in_pieces(gemma, cuts)[0], parallel(gemma, TOKENS, POSITIONS), f"cut at {cuts}")


def test_gemma_draws_the_argmax_of_the_parallel_forward_pass(gemma, short_chunks):
    drawn = tokens_of(gemma, PROMPTS, count=4)
    for prompt, tokens in zip(PROMPTS, drawn, strict=True):
        text = np.zeros((1, 16), np.int32)
        text[0, : len(prompt) + 4] = [*prompt, *tokens]
        logits = parallel(gemma, text, np.arange(16, dtype=np.int32)[None])[0]
        assert list(np.argmax(logits, axis=-1)[len(prompt) - 1 :][:4]) == list(tokens)


def test_local_layers_remember_a_window_and_global_ones_everything(mesh):
    """Bytes of a bfloat16 state of Gemma 3 1B (arXiv 2503.19786): 22 local layers of 511 earlier tokens, 4 global ones."""
    config = GemmaConfig(
        width=1152, depth=26, num_heads=4, num_kv_heads=1, head_dim=256, mlp_width=6912, window=512, vocab_size=262_144
    )
    kept = jax.eval_shape(lambda: init_state(config, 3, jnp.bfloat16, Rules().spec, capacity=32_768))
    rings = (22 * 511 + 4 * 32_768) * 2 * 256 * 2
    assert state_bytes(kept) == rings + 4 * (511 + 32_768) + 4  # and the document of each slot, and of the sequence


def numpy_cut(logits, top_k, top_p):
    """Probabilities after top-k, then top-p, in float64 and one row at a time."""
    out = np.zeros(logits.shape)
    for row, values in enumerate(np.asarray(logits, np.float64)):
        order = sorted(range(len(values)), key=lambda i: -values[i])[:top_k]
        weights = np.exp(values[order] - values[order[0]])
        weights /= weights.sum()
        kept = next(n for n in range(1, len(order) + 1) if weights[:n].sum() >= top_p or n == len(order))
        out[row, order[:kept]] = weights[:kept] / weights[:kept].sum()
    return out


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(1, 1.0), (5, 1.0), (40, 1.0), (None, 0.5), (None, 0.95), (None, 1e-9), (7, 0.6)]
)
def test_top_k_and_top_p_leave_what_numpy_leaves(top_k, top_p):
    logits = np.random.default_rng(1).normal(0, 2, (6, 30)).astype(np.float32)
    kept, tokens = jax.jit(likeliest, static_argnums=1)(logits, Draw(1.0, top_k, top_p))
    probabilities = np.zeros(logits.shape)
    np.put_along_axis(probabilities, np.asarray(tokens), np.asarray(jax.nn.softmax(kept, axis=-1)), axis=1)
    np.testing.assert_allclose(probabilities, numpy_cut(logits, top_k, top_p), atol=1e-6)


def test_draws_are_as_frequent_as_the_cut_probabilities_at_a_temperature():
    logits = np.random.default_rng(2).normal(0, 2, (1, 12)).astype(np.float32)
    draw, count = Draw(1.7, 8, 0.9), 20_000
    tokens = jax.jit(choose, static_argnums=2)(np.repeat(logits, count, axis=0), jax.random.key(0), draw)
    expected = numpy_cut(logits / np.float32(1.7), 8, 0.9)[0]
    found = np.bincount(np.asarray(tokens), minlength=12) / count
    assert (found[expected == 0] == 0).all()
    np.testing.assert_allclose(found, expected, atol=5 * 0.5 / count**0.5)
