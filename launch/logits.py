"""`podwright logits RUN --tokens F.npy --out G.npy`: float32 logits of given tokens, for checking conversions."""

import os
import pathlib
from collections.abc import Iterator

import numpy as np

from configs.schema import Config, ConfigError, NFNetConfig


def main(argv: list[str]) -> int:
    from launch.cli import Parser

    parser = Parser(prog="podwright logits")
    parser.add_argument("run", help="folder of a text run")
    parser.add_argument("--tokens", required=True, help="token ids, B x T or one row of T; each row starts a document")
    parser.add_argument("--out", required=True, help="where the logits go: float32, B x T x vocabulary")
    options = parser.parse_args(argv)
    write_logits(options.run, pathlib.Path(options.tokens).expanduser(), pathlib.Path(options.out).expanduser())
    return 0


def write_logits(run: str, tokens_file: pathlib.Path, out: pathlib.Path) -> None:
    """Raises ConfigError for tokens the model hasn't got, StorageError for files that can't be read or are there already."""
    from trainer.evaluate import read_config
    from trainer.storage import StorageError, reason

    config = read_config(run)
    if isinstance(config.model, NFNetConfig):
        raise ConfigError(f"{run} is a model of images: only text runs have logits of tokens")
    if getattr(config.model, "pooling", "none") != "none":
        raise ConfigError(f"{run} classifies whole rows: only text runs have logits of tokens")
    if out.exists():
        raise StorageError(f"{out} exists already: give --out a new file")
    try:
        given = np.load(tokens_file)
    except (OSError, ValueError) as error:
        raise StorageError(f"{tokens_file} cannot be read as a numpy array: {reason(error)}") from None
    tokens = checked_tokens(given, config.model.vocab_size, tokens_file)
    partial = out.with_name(f".{out.name}.partial")
    try:
        # Row by row into the file: logits of many long rows would not fit into memory.
        file = np.lib.format.open_memmap(partial, "w+", np.float32, (*tokens.shape, config.model.vocab_size))
        for first, rows in logits(run, config, tokens):
            file[first : first + len(rows)] = rows
        file.flush()
        os.replace(partial, out)
    except OSError as error:
        raise StorageError(f"{out} cannot be written: {reason(error)}") from None
    print(f"{out}: float32 logits, {' x '.join(map(str, file.shape))}")


def checked_tokens(given: np.ndarray, vocab_size: int, origin: object) -> np.ndarray:
    """Tokens (B T), int32. Raises ConfigError."""
    if given.dtype.kind not in "iu" or given.ndim not in (1, 2) or not given.size:
        raise ConfigError(f"{origin} holds {given.dtype} {given.shape}: whole numbers, T or B x T of them, are allowed")
    low, high = int(given.min()), int(given.max())
    if low < 0 or high >= vocab_size:
        raise ConfigError(
            f"{origin} holds ids from {low} to {high}: 0 to {vocab_size - 1} are allowed (model.vocab_size={vocab_size})"
        )
    return np.atleast_2d(given).astype(np.int32)


def logits(run: str | pathlib.Path, config: Config, tokens: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, logits (b T V) of as many rows as the devices take at once), for tokens (B T)."""
    import jax
    import jax.numpy as jnp

    from sharding.mesh import make_mesh, simulate_devices
    from sharding.rules import Rules
    from trainer.evaluate import load_model, place_batch

    simulate_devices(config.mesh)
    mesh = make_mesh(config.mesh)
    size = Rules().size("batch", mesh)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), (size, tokens.shape[1]))
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        model, _ = load_model(run, config, mesh)
        program = jax.jit(lambda model, batch: model(batch["tokens"], batch["positions"], dtype=jnp.float32))
        for first in range(0, len(tokens), size):
            rows = tokens[first : first + size]
            padded = np.pad(rows, [(0, size - len(rows)), (0, 0)])
            batch = place_batch({"tokens": padded, "positions": positions}, mesh, Rules().spec)
            yield first, np.asarray(program(model, batch))[: len(rows), :, : model.embedding.vocab_size]


def image_logits(run: str | pathlib.Path, config: Config, images: np.ndarray) -> np.ndarray:
    """(B classes), float32, for images (B H W C), on one device."""
    import jax

    from sharding.mesh import one_device_mesh
    from trainer.evaluate import load_model

    mesh = one_device_mesh()
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        model, _ = load_model(run, config, mesh)
        return np.asarray(jax.jit(lambda model, images: model(images))(model, images))
