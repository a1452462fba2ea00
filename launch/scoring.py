"""A run's newest checkpoint as evaluation tasks ask for it: log-likelihoods of texts, and texts that continue others.

The three methods of `Scorer` are those of lm-evaluation-harness' `LM`, on plain tuples: see `launch.harness`.
Shapes: B rows of one program, T tokens of a row.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from configs.schema import Config, ConfigError, MeshConfig, TokenizedData
from data.tokenizers import Tokenizer
from launch.sample import Spelling, run_tokenizer
from models.decode import ENDED, Draw, generate
from sharding.mesh import make_mesh, simulate_devices
from sharding.rules import rules_for
from trainer.evaluate import load_model, place_batch, read_config
from trainer.tasks import check_fits, token_scores

SHORTEST = 16  # tokens of the narrowest rows; each wider program has rows of twice as many
NEW_TOKENS = 256  # of an answer, where a task gives no limit
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the names that tasks give it


def text_config(run: str) -> Config:
    """Raises ConfigError if `run` isn't of text, StorageError if it is no run."""
    config = read_config(run)
    if not isinstance(config.data, TokenizedData):
        raise ConfigError(f"{run} was trained on {config.data.kind}: only text runs answer tasks")
    return config


def open_scorer(run: str) -> tuple["Scorer", int]:
    """A scorer and the step of the checkpoint it reads. Raises ConfigError, DataError or StorageError."""
    config = text_config(run)
    assert isinstance(config.data, TokenizedData)
    tokenizer = run_tokenizer(run, config.data)
    check_fits(config, {"needs": {"vocab_size": tokenizer.vocab_size}})
    simulate_devices(config.mesh)
    mesh = make_mesh(whole_sequences(config.mesh))
    with jax.set_mesh(mesh):
        model, step = load_model(run, config, mesh)
    return Scorer(config, model, tokenizer, mesh), step


def whole_sequences(mesh: MeshConfig) -> MeshConfig:
    """The devices that share a sequence in training have rows of their own here: a text may have any length."""
    rest = (mesh.data, mesh.sequence)
    return dataclasses.replace(mesh, data=-1 if -1 in rest else mesh.data * mesh.sequence, sequence=1)


class Scorer:
    """Each text starts with BOS and is cut on the left to the T = data.sequence_length tokens of the run's own rows."""

    def __init__(self, config: Config, model: Any, tokenizer: Tokenizer, mesh: Mesh):
        assert isinstance(config.data, TokenizedData)
        self.config, self.model, self.tokenizer, self.mesh = config, model, tokenizer, mesh
        self.length = config.data.sequence_length
        self.batch = rounded_up(config.data.batch_size, rules_for(mesh).size("batch", mesh))
        self._program = jax.jit(functools.partial(token_scores, config))

    def loglikelihood(self, requests: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """For each (context, continuation): log p(continuation | context) in nats, and whether each of its tokens is the
        likeliest one."""
        texts = [split(self.tokenizer, context, continuation) for context, continuation in requests]
        return [(log_p.sum(dtype=np.float64).item(), bool(all(best))) for log_p, best in self.token_scores(texts)]

    def loglikelihood_rolling(self, requests: Sequence[tuple[str]]) -> list[float]:
        """log p of each whole text in nats. One longer than a row is scored in several (see `windows`)."""
        texts = [(self.tokenizer.encode(text), 0) for (text,) in requests]
        return [log_p.sum(dtype=np.float64).item() for log_p, _ in self.token_scores(texts)]

    def token_scores(self, texts: Sequence[tuple[np.ndarray, int]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each (ids without BOS, first): of every token from ids[first] on, log p in nats, float32, and whether it is
        the likeliest."""
        rows = [window for ids, first in texts for window in windows(ids, first, self.length)]
        scores = iter(self._row_scores(rows))
        nothing = (np.zeros(0, np.float32), np.zeros(0, bool))
        found = []
        for ids, first in texts:
            parts = [next(scores) for _ in windows(ids, first, self.length)]
            log_p, likeliest = zip(nothing, *parts, strict=True)
            found.append((np.concatenate(log_p), np.concatenate(likeliest)))
        return found

    def _row_scores(self, rows: Sequence[tuple[np.ndarray, int]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of the last `count` tokens of each (ids, count). Rows of similar length share a program of one shape."""
        by_width: dict[int, list[int]] = {}
        for i, (ids, _) in enumerate(rows):
            by_width.setdefault(min(power_of_two(len(ids), SHORTEST), self.length), []).append(i)
        found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        parts = rules_for(self.mesh).size("batch", self.mesh)
        for width, members in sorted(by_width.items()):
            # As many tokens as a step of training, but no more rows than there are.
            size = min(self.batch * self.length // width, power_of_two(len(members)))
            size = rounded_up(size, parts)
            for start in range(0, len(members), size):
                chosen = members[start : start + size]
                log_p, likeliest = self._score([rows[i][0] for i in chosen], size, width)
                for row, i in enumerate(chosen):
                    ids, count = rows[i]
                    scored = slice(len(ids) - count, len(ids))
                    found[i] = log_p[row, scored], likeliest[row, scored]
        return [found[i] for i in range(len(rows))]

    def _score(self, rows: list[np.ndarray], size: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """(B T) each, of every token of every row; what follows a row's end is padding, which no token before it sees."""
        targets = np.zeros((size, width), np.int32)
        for target, ids in zip(targets, rows, strict=False):
            target[: len(ids)] = ids
        tokens = np.concatenate([np.full((size, 1), self.tokenizer.bos_id, np.int32), targets[:, :-1]], axis=1)
        positions = np.tile(np.arange(width, dtype=np.int32), (size, 1))
        batch = {"tokens": tokens, "targets": targets, "segment_pos": positions}
        with jax.set_mesh(self.mesh):
            return jax.device_get(self._program(self.model, place_batch(batch, self.mesh, rules_for(self.mesh).spec)))

    def generate_until(self, requests: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        """For each (context, options): what follows the context, up to the first of the texts in options["until"], the end
        of the document, or options["max_gen_toks"] tokens; greedily, unless options["do_sample"]."""
        prompts = [self.tokenizer.encode(context) for context, _ in requests]
        alike: dict[str, list[int]] = {}
        for i, (_, options) in enumerate(requests):
            alike.setdefault(json.dumps(options, sort_keys=True), []).append(i)
        texts = [""] * len(requests)
        for members in alike.values():
            members.sort(key=lambda i: len(prompts[i]))
            for start in range(0, len(members), self.batch):
                chosen = members[start : start + self.batch]
                answers = self._continued([prompts[i] for i in chosen], requests[chosen[0]][1], seed=chosen[0])
                for i, text in zip(chosen, answers, strict=True):
                    texts[i] = text
        return texts

    def _continued(self, prompts: list[np.ndarray], options: dict[str, Any], seed: int) -> list[str]:
        until = options.get("until") or []
        until = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        count = int(next((options[name] for name in LIMITS if options.get(name)), NEW_TOKENS))
        # Prompt and answer fit into a row, and at least half of it is for the prompt.
        room = max(self.length - count, self.length // 2) - 1
        bos = np.array([self.tokenizer.bos_id], np.int32)
        rows = [np.concatenate([bos, ids[max(len(ids) - room, 0) :]]) for ids in prompts]
        spellings = [Spelling(self.tokenizer, row) for row in rows]
        texts, running = [""] * len(rows), [True] * len(rows)
        with jax.set_mesh(self.mesh):
            drawing = generate(
                self.model,
                [*rows, *[bos] * (self.batch - len(rows))],  # always as many, so that few shapes are compiled
                count,
                dtype=jnp.dtype(self.config.trainer.compute_dtype),
                draw=chosen_draw(options),
                vocab_size=self.tokenizer.vocab_size,
                seed=seed,
                eos_id=self.tokenizer.eos_id,
            )
            for tokens in drawing:
                for i in (i for i, runs in enumerate(running) if runs):
                    ended = tokens[i] in (ENDED, self.tokenizer.eos_id)
                    texts[i] += spellings[i].rest() if ended else spellings[i].add(int(tokens[i]))
                    running[i] = not ended and not any(stop in texts[i] for stop in until)
                if not any(running):
                    break
        for i in (i for i, runs in enumerate(running) if runs):
            texts[i] += spellings[i].rest()
        return [before(text, until) for text in texts]


def split(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[np.ndarray, int]:
    """Ids of both together and where the continuation begins, as lm-evaluation-harness splits them: white space that ends
    the context counts as the continuation's, since a tokenizer joins it to the next word."""
    ids = tokenizer.encode(context + continuation)
    first = len(tokenizer.encode(context.rstrip()))
    # Where the continuation's start changes how the context's end is spelled, something must be left to score.
    return ids, max(min(first, len(ids) - 1), 0) if continuation else len(ids)


def windows(ids: np.ndarray, first: int, length: int) -> Iterator[tuple[np.ndarray, int]]:
    """Rows (ids, count) of at most `length` tokens that together score each token from ids[first] on once, as the last
    `count` of a row. Each scored token has as many before it as fit, and at least one (and BOS) if there are any."""
    while first < len(ids):
        count = min(len(ids) - first, length - (first > 0))
        first += count
        yield ids[max(first - length, 0) : first], count


def chosen_draw(options: dict[str, Any]) -> Draw:
    if not options.get("do_sample"):
        return Draw()
    return Draw(float(options.get("temperature", 1.0)), options.get("top_k"), float(options.get("top_p", 1.0)))


def before(text: str, until: list[str]) -> str:
    """The text up to the first that is in it of those in `until`."""
    return text[: min([text.index(stop) for stop in until if stop in text], default=len(text))]


def power_of_two(number: int, least: int = 1) -> int:
    """The smallest that is neither below `number` nor below `least`."""
    return max(least, 1 << max(number - 1, 0).bit_length())


def rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
