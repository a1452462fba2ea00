"""Log-likelihoods and continuations for evaluation tasks, against float64 softmaxes and argmaxes of single rows."""

import functools
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import SMALL, finish, train_command
from test_bad_input import refused

from configs import EXPERIMENTS
from configs.overrides import resolve
from configs.schema import MeshConfig
from configs.store import to_json
from data.tokenizers import ByteTokenizer, SentencePieceTokenizer, train_sentencepiece
from launch import harness
from launch.cli import main
from launch.scoring import Scorer, open_scorer, split, windows
from sharding.mesh import make_mesh, one_device_mesh
from sharding.rules import rules_for
from trainer.tasks import make_task

T = 64  # of SMALL's rows
BOS = ByteTokenizer.bos_id
LONG = "".join(chr(97 + i * i % 23) for i in range(150))


class Latin(ByteTokenizer):
    """Each byte a character: what a random model writes is no UTF-8."""

    def encode(self, text):
        return np.frombuffer(text.encode("latin-1"), np.uint8).astype(np.int32)

    def decode(self, ids):
        return bytes(i for i in map(int, ids) if i < 256).decode("latin-1")


def random_model(config, mesh):
    with jax.set_mesh(mesh):
        return jax.jit(lambda key: make_task(config).init(key, rules_for(mesh).spec))(jax.random.key(3))


@functools.cache
def reference(name: str):
    """(config, function from tokens with BOS, at most T, to their float64 log p (n V)), one row at a time."""
    config, mesh = resolve(name, SMALL[name].split()).config, one_device_mesh()
    model = random_model(config, mesh)
    program = jax.jit(lambda model, tokens, positions: model(tokens, positions, dtype=jnp.float32))

    def log_p(tokens) -> np.ndarray:
        with jax.set_mesh(mesh):
            row = np.full((1, T), 7, np.int32)  # what follows a text is not seen from it
            row[0, : len(tokens)] = tokens
            logits = np.asarray(program(model, row, np.arange(T, dtype=np.int32)[None]), np.float64)[0]
        logits = logits[: len(tokens), : config.model.vocab_size]
        top = logits.max(-1, keepdims=True)
        return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))

    return config, log_p


def by_hand(log_p, context: bytes, targets: bytes) -> tuple[float, bool]:
    """Of targets after BOS and context, in one row."""
    rows = log_p([BOS, *context, *targets[:-1]])[len(context) :]
    likeliest = rows.argmax(-1).tolist() == list(targets)
    return rows[np.arange(len(targets)), list(targets)].sum(), likeliest


@pytest.fixture(scope="module", params=["griffin-tiny on one device", "gemma-tiny on eight"])
def scorer(request):
    name, _, devices = request.param.partition(" on ")
    config, log_p = reference(name)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)) if devices == "eight" else one_device_mesh()
    return Scorer(config, random_model(config, mesh), Latin(), mesh), log_p


def greedy(log_p, text: bytes, count: int) -> bytes:
    for _ in range(count):
        text += bytes([log_p([BOS, *text])[-1, :256].argmax()])  # never BOS: it is no text
    return text


def test_log_likelihoods_are_the_float64_softmaxs(scorer):
    scorer, log_p = scorer
    likely = greedy(log_p, b"one", 1)[3:].decode("latin-1")
    requests = [("a question: ", "no"), ("", "é"), (LONG[:40], "yes"), ("a", ""), ("one", "tw"), ("q", "r")]
    found = scorer.loglikelihood([*requests, *[("one", chr(byte)) for byte in range(97, 123)]])
    expected = [(b"a question:", b" no"), (b"", b"\xe9"), (LONG[:40].encode(), b"yes")]
    for (value, is_greedy), (context, targets) in zip(found, expected, strict=False):
        exact, likeliest = by_hand(log_p, context, targets)
        np.testing.assert_allclose(value, exact, atol=2e-4)
        assert is_greedy == likeliest
    assert found[3] == (0.0, True)
    np.testing.assert_allclose(found[4][0], by_hand(log_p, b"one", b"tw")[0], atol=2e-4)
    rows = log_p([BOS, *b"one"])[-1]
    np.testing.assert_allclose([value for value, _ in found[6:]], rows[97:123], atol=2e-4)
    assert scorer.loglikelihood([("one", likely)])[0][1]
    assert not scorer.loglikelihood([("one", chr(ord(likely) ^ 1))])[0][1]


def test_a_context_longer_than_a_row_is_cut_on_the_left_and_bos_stays(scorer):
    scorer, log_p = scorer
    (found,) = scorer.loglikelihood([(LONG, "end")])
    exact = by_hand(log_p, (LONG.encode() + b"end")[-T:-3], b"end")
    np.testing.assert_allclose(found[0], exact[0], atol=2e-4)


def test_a_text_longer_than_a_row_is_scored_in_several(scorer):
    scorer, log_p = scorer
    short, long = scorer.loglikelihood_rolling([(LONG[:T],), (LONG,)])
    text = LONG.encode()
    first = by_hand(log_p, b"", text[:T])[0]
    second = by_hand(log_p, text[T - 1 : T], text[T : 2 * T - 1])[0]
    third = by_hand(log_p, text[-T : 2 * T - 1], text[2 * T - 1 :])[0]
    np.testing.assert_allclose(short, first, atol=2e-3)
    np.testing.assert_allclose(long, first + second + third, atol=5e-3)
    assert scorer.loglikelihood_rolling([("",)]) == [0.0]


def test_the_scores_of_tokens_add_up_to_their_texts(scorer):
    scorer, log_p = scorer
    ids = np.frombuffer(LONG[:20].encode(), np.uint8).astype(np.int32)
    (found, likeliest), (nothing, _) = scorer.token_scores([(ids, 15), (ids, 20)])
    rows = log_p([BOS, *ids[:-1]])[15:]
    np.testing.assert_allclose(found, rows[np.arange(5), ids[15:]], atol=1e-4)
    assert (likeliest == (rows.argmax(-1) == ids[15:])).all()
    assert found.dtype == np.float32
    assert len(nothing) == 0


def test_continuations_are_greedy_and_end_where_asked(scorer):
    scorer, log_p = scorer
    free = greedy(log_p, b"ab", 8)[2:].decode("latin-1")
    other = greedy(log_p, b"longer than it", 3)[14:].decode("latin-1")
    found = scorer.generate_until(
        [
            ("ab", {"max_gen_toks": 8}),
            ("longer than it", {"max_gen_toks": 3, "until": ["never written"], "do_sample": False}),
            ("ab", {"max_gen_toks": 8, "until": [free[4], free[2:4]]}),
            ("ab", {"max_gen_toks": 8, "until": free[0]}),
        ]
    )
    assert found[0] == free
    assert found[1] == other
    assert found[2] == free[: min(free.index(free[4]), free.index(free[2:4]))]
    assert found[3] == ""


def test_a_long_prompt_leaves_room_for_its_answer(scorer):
    scorer, log_p = scorer
    (found,) = scorer.generate_until([(LONG, {"max_gen_toks": 4})])
    assert found == greedy(log_p, LONG.encode()[-(T - 4 - 1) :], 4)[-4:].decode("latin-1")


@given(st.integers(0, 60), st.integers(0, 60), st.integers(2, 20))
def test_windows_score_each_token_once(before, scored, length):
    ids, place, found = np.arange(before + scored), before, []
    for row, count in windows(ids, before, length):
        assert len(row) <= length
        assert (row == ids[place + count - len(row) : place + count]).all()
        # As many tokens before the first scored one as fit, and one at least.
        assert len(row) == min(length, place + count)
        assert len(row) > count or place == 0
        found += row[len(row) - count :].tolist()
        place += count
    assert found == list(range(before, before + scored))


def test_white_space_between_context_and_continuation_belongs_to_the_continuation():
    tokenizer = SentencePieceTokenizer(train_sentencepiece(300, ["the answer is yes and no and yes\n"] * 30))
    ids, first = split(tokenizer, "the answer is ", "yes")
    assert tokenizer.decode(ids[:first]) == "the answer is"
    assert tokenizer.decode(ids[first:]) == " yes"
    assert ids.tolist() == tokenizer.encode("the answer is yes").tolist()
    joined, start = split(tokenizer, "ye", "s")  # one token: it cannot be cut
    assert tokenizer.decode(joined[start:]).endswith("s")
    assert start < len(joined)


# --- the command ------------------------------------------------------------------------------------------------------


def test_mistakes_are_one_sentence(tmp_path, capsys, monkeypatch):
    for name in ("nfnet-tiny", "griffin-tiny"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(to_json(EXPERIMENTS[name]()))
    text, images = str(tmp_path / "griffin-tiny"), str(tmp_path / "nfnet-tiny")
    said = refused(capsys, ["eval", images, "--tasks", "piqa"], code=2)
    assert said == f"{images} was trained on images: only text runs answer tasks"
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    said = refused(capsys, ["eval", text, "--tasks", "piqa"], code=2)
    assert said == "--tasks needs EleutherAI's lm_eval, which is not installed: pip install 'podwright[eval]'"
    for words, message in (
        (["--tasks", ","], "--tasks is empty"),
        (["--tasks", "piqa", "--batches", "3"], "--batches counts held-out batches"),
        (["--tasks-folder", "somewhere"], "--tasks-folder needs --tasks"),
    ):
        assert refused(capsys, ["eval", text, *words], code=2).startswith(message)


def test_scores_never_replace_others(tmp_path):
    files = [harness.write_new(tmp_path, "scores-8", {"number": i}) for i in range(3)]
    assert [file.name for file in files] == ["scores-8.json", "scores-8-2.json", "scores-8-3.json"]
    assert [json.loads(file.read_text())["number"] for file in files] == [0, 1, 2]


# --- with the harness itself (extra `eval`) ----------------------------------------------------------------------------

QUESTIONS = [
    {"question": f"x_{i} =", "choices": [f"{i}", f"{i + 1} ", "x", "é(", "import os"][: 2 + i % 4], "label": i % 2}
    for i in range(11)
]
CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 1.0}}
"""
ROLLING = """
task: tiny_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: byte_perplexity}}, {{metric: bits_per_byte}}]
metadata: {{version: 1.0}}
"""
WRITTEN = """
task: tiny_written
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 3}}
metric_list: [{{metric: exact_match}}]
metadata: {{version: 1.0}}
"""


@pytest.mark.parity
def test_the_harness_computes_what_the_log_likelihoods_say(tmp_path, capsys, monkeypatch):
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm_eval is not installed: pip install -e '.[test,eval]'")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "corpus").mkdir()
    for i in range(40):
        (tmp_path / "corpus" / f"{i}.py").write_text("".join(f"x_{i} = {i * j}\n" for j in range(60)))
    run = tmp_path / "run"
    options = ["--data.corpus", str(tmp_path / "corpus"), "--trainer.steps", "3"]
    code, out, err = finish(train_command("griffin-tiny", run, *options))
    assert code == 0, out + err
    (tmp_path / "tasks").mkdir()
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    for name, task in (("choice", CHOICE), ("text", ROLLING), ("written", WRITTEN)):
        (tmp_path / "tasks" / f"{name}.yaml").write_text(task.format(file=file))
    words = ["eval", str(run), "--tasks-folder", str(tmp_path / "tasks"), "--tasks"]
    assert main([*words, "tiny_choice,tiny_text,tiny_written"]) == 0
    said = capsys.readouterr().out
    assert "tiny_choice" in said
    assert said.strip().endswith(str(run / "scores-3.json"))
    kept = json.loads((run / "scores-3.json").read_text())
    assert kept["step"] == 3
    found = kept["results"]

    scorer, _ = open_scorer(str(run))
    right, right_by_length = [], []
    for question in QUESTIONS:
        pairs = [(question["question"], f" {choice}") for choice in question["choices"]]
        values = np.array([value for value, _ in scorer.loglikelihood(pairs)])
        right.append(values.argmax() == question["label"])
        lengths = [len(choice) for choice in question["choices"]]
        right_by_length.append((values / lengths).argmax() == question["label"])
    assert 0 < sum(right) < len(QUESTIONS)  # or the test could not fail
    assert found["tiny_choice"]["acc,none"] == pytest.approx(np.mean(right))
    assert found["tiny_choice"]["acc_norm,none"] == pytest.approx(np.mean(right_by_length))
    texts = [question["question"] for question in QUESTIONS]
    nats = -sum(scorer.loglikelihood_rolling([(text,) for text in texts]))
    perplexity = np.exp(nats / sum(len(text.encode()) for text in texts))
    assert found["tiny_text"]["byte_perplexity,none"] == pytest.approx(perplexity, rel=1e-6)
    asked = [(text, {"until": ["\n"], "max_gen_toks": 3}) for text in texts]
    exact = [a == question["choices"][0] for a, question in zip(scorer.generate_until(asked), QUESTIONS, strict=True)]
    assert found["tiny_written"]["exact_match,none"] == pytest.approx(np.mean(exact))

    said = refused(capsys, [*words, "tiny_choise"], code=2)
    assert said.startswith(
        f"--tasks tiny_choise is no task of lm_eval or of {tmp_path / 'tasks'}, perhaps tiny_choice;"
    )
    file.unlink()
    assert refused(capsys, [*words, "tiny_choice"], code=3).startswith("task tiny_choice cannot be loaded: ")
    said = refused(capsys, ["eval", str(run), "--tasks", "piqa", "--tasks-folder", str(tmp_path / "no")], code=2)
    assert said == f"--tasks-folder {tmp_path / 'no'} is no folder: give one that holds YAML files of tasks"
