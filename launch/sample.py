"""`podwright sample RUN --prompt TEXT`: continue a prompt with a run's newest checkpoint."""

import pathlib
import sys


def main(argv: list[str]) -> int:
    from launch.cli import Parser

    parser = Parser(prog="podwright sample")
    parser.add_argument("run", help="folder of a text run")
    parser.add_argument("--prompt", default="", help="text to continue")
    parser.add_argument("--tokens", type=int, default=200, help="tokens to draw")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    sys.stdout.write(options.prompt)
    for text in continuation(options.run, options.prompt, options.tokens, options.temperature, options.seed):
        sys.stdout.write(text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0


def continuation(run: str, prompt: str, num_tokens: int, temperature: float, seed: int):
    """Yields pieces of text as they are drawn. Raises ConfigError for bad options or a run that isn't of text."""
    from configs.schema import ConfigError, TextData
    from trainer.evaluate import load_model, read_config
    from trainer.run_folder import read_manifest

    config = read_config(run)
    if not isinstance(config.data, TextData):
        raise ConfigError(f"{run} was trained on {config.data.kind}: only text runs continue a prompt")
    if num_tokens < 1 or temperature < 0:
        raise ConfigError(
            f"--tokens {num_tokens} --temperature {temperature:g}: tokens must be at least 1, temperature 0 or more"
        )

    import jax
    import numpy as np

    from data.text import open_tokenizer
    from models.decode import generate
    from sharding.mesh import one_device_mesh

    # An imported run has met no data yet, and its tokenizer is a file of its own.
    met_data = (pathlib.Path(run).expanduser() / "data_manifest.json").exists()
    tokenizer = open_tokenizer(config.data, read_manifest(run) if met_data else None)
    mesh = one_device_mesh()
    with jax.set_mesh(mesh):
        model, _ = load_model(run, config, mesh)
        ids = np.concatenate([[tokenizer.bos_id], tokenizer.encode(prompt)])
        drawn: list[int] = []
        told = ""
        for token in generate(
            model,
            ids,
            num_tokens,
            context=config.data.sequence_length,
            vocab_size=tokenizer.vocab_size,
            temperature=temperature,
            seed=seed,
        ):
            drawn.append(token)
            text = tokenizer.decode(np.asarray(drawn))
            whole = text.removesuffix("\ufffd")  # the next byte may complete a character
            if len(whole) > len(told):
                yield whole[len(told) :]
                told = whole
