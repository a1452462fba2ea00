"""`podwright sample RUN --prompt TEXT`: continue prompts with a run's newest checkpoint."""

import argparse
import math
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from configs.schema import TokenizedData
    from data.tokenizers import Tokenizer


def main(argv: list[str]) -> int:
    from launch.cli import Parser

    parser = Parser(prog="podwright sample")
    parser.add_argument("run", help="folder of a text run")
    parser.add_argument("--prompt", action="append", default=[], help="text to continue; give it again for another")
    parser.add_argument("--prompt-file", action="append", default=[], help="a file whose whole text is a prompt")
    parser.add_argument("--tokens", type=int, default=200, help="tokens to draw for each prompt")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    parser.add_argument("--top-k", type=int, help="draw among the k likeliest tokens")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw among the likeliest that have this probability")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    check(options)
    prompts = [*options.prompt, *(read_prompt(file) for file in options.prompt_file)] or [""]
    for prompt in prompts:
        check_text(prompt)
    sampler = Sampler(options, prompts)
    if len(prompts) == 1:
        print(prompts[0], end="", flush=True)
        for (piece,) in sampler:
            print(piece, end="", flush=True)
        print()
    else:
        texts = ["".join(pieces) for pieces in zip(*sampler, strict=True)]
        for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True), start=1):
            print(f"--- prompt {number} of {len(prompts)} ---\n{prompt}{text}")
    print(sampler.figures, file=sys.stderr)
    return 0


def check(options: argparse.Namespace) -> None:
    """Raise ConfigError for an option out of range."""
    from configs.schema import ConfigError

    limits = {
        "tokens": (options.tokens >= 1, "tokens must be at least 1"),
        "temperature": (0 <= options.temperature < math.inf, "0 or more is allowed"),
        "top-k": (options.top_k is None or options.top_k >= 1, "1 or more is allowed"),
        "top-p": (0 < options.top_p <= 1, "above 0 and at most 1 is allowed"),
        "seed": (0 <= options.seed < 2**32, "0 to 4294967295 is allowed"),
    }
    for name, (holds, allowed) in limits.items():
        if not holds:
            value = getattr(options, name.replace("-", "_"))
            raise ConfigError(f"--{name} {value:g} is out of range: {allowed}")


def read_prompt(file: str) -> str:
    from configs.schema import ConfigError

    try:
        with open(file, encoding="utf-8", newline="") as opened:
            return opened.read()
    except OSError as error:
        raise ConfigError(f"--prompt-file {file} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--prompt-file {file} is not UTF-8 text: see its byte {error.start}") from None


def check_text(prompt: str) -> None:
    from configs.schema import ConfigError

    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # bytes of a command line that are not UTF-8 become lone surrogates
        raise ConfigError(f"--prompt {prompt!r} is not UTF-8 text: see its character {error.start}") from None


class Sampler:
    """Iterates over pieces of text, one for every prompt, as tokens are drawn; `figures` tells afterwards how it went.

    Raises ConfigError if the run isn't of text, StorageError if it is none or has no checkpoint.
    """

    def __init__(self, options: argparse.Namespace, prompts: list[str]):
        from configs.schema import ConfigError, TokenizedData
        from trainer.evaluate import read_config

        self.config = config = read_config(options.run)
        if not isinstance(config.data, TokenizedData):
            raise ConfigError(f"{options.run} was trained on {config.data.kind}: only text runs continue a prompt")
        self.options, self.prompts, self.data = options, prompts, config.data
        self.figures = ""

    def __iter__(self) -> Iterator[list[str]]:
        import jax
        import jax.numpy as jnp
        import numpy as np

        from configs.schema import ChatData
        from data.chat import end_ids, prompt_ids
        from models.decode import ENDED, Draw, generate
        from sharding.mesh import one_device_mesh
        from trainer.evaluate import load_model

        options, mesh = self.options, one_device_mesh()
        tokenizer, eos_id = run_tokenizer(options.run, self.data), None
        if isinstance(self.data, ChatData):
            template = self.data.template
            encoded = (tokenizer.encode(prompt).tolist() for prompt in self.prompts)
            ids = [np.array(prompt_ids(prompt, template, tokenizer)) for prompt in encoded]
            end = end_ids(template, tokenizer)
            eos_id = end[0] if len(end) == 1 else None  # spelled out, it is text like any other
        else:
            ids = [np.concatenate([[tokenizer.bos_id], tokenizer.encode(prompt)]) for prompt in self.prompts]
            eos_id = tokenizer.eos_id
        spellings = [Spelling(tokenizer, prompt) for prompt in ids]
        dtype = jnp.dtype(self.config.trainer.compute_dtype)
        with jax.set_mesh(mesh):
            model, _ = load_model(options.run, self.config, mesh)
            drawing = generate(
                model,
                ids,
                options.tokens,
                dtype=dtype,
                draw=Draw(options.temperature, options.top_k, options.top_p),
                vocab_size=tokenizer.vocab_size,
                seed=options.seed,
                eos_id=eos_id,
            )
            count, times = 0, []
            for tokens in drawing:
                times.append(time.monotonic())
                count += int(np.sum(tokens != ENDED))
                yield [s.add(int(t)) if t != ENDED else "" for s, t in zip(spellings, tokens, strict=True)]
            yield [spelling.rest() for spelling in spellings]
            drawn_later = count - len(ids)
            seconds = times[-1] - times[0]
            rate = f", {drawn_later / seconds:.0f} tokens/s after the first" if drawn_later else ""
            length = max(map(len, ids)) + len(times)
            self.figures = f"{count} tokens{rate}; {memory(model, dtype, length)}"


def run_tokenizer(run: str, data: "TokenizedData") -> "Tokenizer":
    """The tokenizer a run was trained with. Raises DataError when it is missing or another one by now."""
    from configs.schema import ChatData, CVData, PreparedData
    from data.chat import open_chat_tokenizer
    from data.planted import WordTokenizer
    from data.prepared import open_prepared_tokenizer
    from data.text import open_tokenizer
    from trainer.run_folder import read_manifest
    from trainer.storage import folder_of

    # An imported run has met no data yet, and its tokenizer is a file of its own.
    met_data = (folder_of(run) / "data_manifest.json").exists()
    manifest = read_manifest(run) if met_data else None
    if isinstance(data, CVData):
        return WordTokenizer()
    if isinstance(data, PreparedData):
        return open_prepared_tokenizer(data, manifest)
    return open_chat_tokenizer(data, manifest) if isinstance(data, ChatData) else open_tokenizer(data, manifest)


def memory(model: Any, dtype: Any, length: int) -> str:
    """What the model remembers of a sequence, next to a Transformer's keys and values after `length` tokens."""
    import jax

    from models.decode import open_state
    from models.state import state_bytes, transformer_bytes

    kept = state_bytes(jax.eval_shape(lambda: open_state(model, 1, dtype, length)))
    cache = transformer_bytes(model.config, length, dtype)
    always = "" if "global" in model.config.pattern else " at any length"
    return (
        f"state {kept / 1e3:,.0f} kB a sequence{always}, keys and values of a Transformer of this size "
        f"{cache / 1e3:,.0f} kB at {length:,} tokens"
    )


class Spelling:
    """Text of tokens as they come, each decoded beside the few before it: some tokens read otherwise alone."""

    def __init__(self, tokenizer, prompt):
        self.tokenizer, self.known, self.pending = tokenizer, list(prompt[-4:]), []

    def add(self, token: int) -> str:
        """The text that is now certain: nothing while the bytes of a character are incomplete."""
        self.pending.append(token)
        text = self._decode()
        if text.endswith("\ufffd") and len(self.pending) < 4:  # no character of UTF-8 is longer
            return ""
        self.known, self.pending = self.pending, []
        return text

    def rest(self) -> str:
        return self._decode()

    def _decode(self) -> str:
        return self.tokenizer.decode(self.known + self.pending)[len(self.tokenizer.decode(self.known)) :]
