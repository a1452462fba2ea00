"""finetune.learns: what is not named stays bit by bit as it was, and what is named has the whole model's gradient."""

import jax
import numpy as np
import pytest
from runs import finish, saved_arrays, train_command

from configs.overrides import resolve
from configs.schema import ConfigError
from models.params import named_leaves
from sharding.rules import Rules
from trainer.frozen import check_learns
from trainer.tasks import make_task

SMALL = "--model.stem_widths 8,8,8,16 --model.widths 32,32 --model.depths 1,1 --model.head_width 32"
TEXT = "--model.width 32 --model.rnn_width 48 --model.mlp_width 80 --model.num_heads 2 --model.window 16 --model.depth 3 --data.sequence_length 32"


def gradient(words: str, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    name, *rest = words.split()
    task = make_task(resolve(name, rest).config)

    def loss(model):
        return task.loss(task.prepare(model) if task.prepare else model, batch, jax.random.key(1))[0]

    model = jax.jit(lambda: task.init(jax.random.key(0), Rules().spec))()
    return {name: np.asarray(leaf) for name, leaf in named_leaves(jax.jit(jax.grad(loss))(model)).items()}


def images() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "images": rng.normal(size=(3, 16, 16, 1)).astype(np.float32),
        "labels": np.array([1, 5, 7], np.int32),
        "weights": np.ones(3, np.float32),
    }


def tokens() -> dict[str, np.ndarray]:
    rng, shape = np.random.default_rng(0), (2, 32)
    ids = rng.integers(256, size=(2, *shape)).astype(np.int32)
    places = np.broadcast_to(np.arange(32, dtype=np.int32), shape)
    return {"tokens": ids[0], "targets": ids[1], "segment_pos": places, "weights": np.ones(shape, np.float32)}


@pytest.mark.parametrize(
    ("words", "batch", "learns"),
    [
        (f"nfnet-tiny {SMALL}", images(), "head,final_conv"),
        (f"griffin-tiny {TEXT}", tokens(), "final_norm"),
    ],
)
def test_what_learns_has_the_gradient_of_the_whole_and_the_rest_none(one_device, words, batch, learns):
    whole, part = gradient(words, batch), gradient(f"{words} --finetune.learns {learns}", batch)
    named = [name for name in whole if name.split("/")[0] in learns.split(",")]
    assert 0 < len(named) < len(whole)
    for name, leaf in whole.items():
        if name in named:
            assert np.abs(leaf).max() > 0
            np.testing.assert_allclose(part[name], leaf, rtol=1e-5, atol=1e-7)
        else:
            assert not part[name].any()


@pytest.mark.multiprocess
def test_a_run_leaves_the_rest_bit_by_bit_as_it_was(tmp_path):
    words = [
        *SMALL.split(),
        "--trainer.steps",
        "3",
        "--checkpoint.every",
        "1",
        "--eval.every",
        "0",
        "--optimizer.warmup_steps",
        "0",
    ]
    code, _, err = finish(train_command("nfnet-tiny", tmp_path / "run", *words, "--finetune.learns", "head"))
    assert code == 0, err
    before, after = (saved_arrays(tmp_path / "run", step) for step in (1, 3))
    model = {name: leaf for name, leaf in before.items() if name.startswith("model/")}
    changed = {name for name, leaf in model.items() if not np.array_equal(leaf, after[name])}
    assert changed == {"model/head/kernel", "model/head/bias"}
    # Decay would have moved the others too, and their moments are not kept.
    assert not [name for name in before if name.startswith("opt_state/") and "stem" in name]


def test_a_place_that_is_not_there_is_told_with_the_nearest():
    model = {"head": {"kernel": 0}, "stem": {"kernel": 0}}
    check_learns(("head/kernel", "stem"), model)
    with pytest.raises(ConfigError, match=r"finetune.learns=heat has no parameter in 'heat', perhaps head"):
        check_learns(("heat",), model)
    with pytest.raises(ConfigError, match=r"contradicts finetune\.lora_rank=4"):
        resolve("griffin-tiny", ["--finetune.learns", "embedding", "--finetune.lora_rank", "4"])
