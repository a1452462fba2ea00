"""`podwright replay RUN --step N`: what a step saw and what it did, to find the cause of a spike."""

import re
from typing import TYPE_CHECKING

import numpy as np

from configs.schema import ConfigError, TokenizedData

if TYPE_CHECKING:
    from configs.schema import Config
    from data.dataset import Origin
    from trainer.replay import Replay

SHOWN = 120  # characters of a document


def main(argv: list[str]) -> int:
    """Raises ConfigError, DataError, StorageError."""
    from launch.cli import Parser

    parser = Parser(prog="podwright replay")
    parser.add_argument("run", help="folder of a run")
    parser.add_argument("--step", type=int, required=True, help="as the log counts them, from 1")
    parser.add_argument(
        "--quick", action="store_true", help="with the parameters of the last checkpoint before it, as they are"
    )
    parser.add_argument(
        "--documents", type=int, default=10, help="how many to list, those with the greatest losses first"
    )
    options = parser.parse_args(argv)
    from trainer.evaluate import read_config

    last = read_config(options.run).trainer.steps
    if not 1 <= options.step <= last:
        raise ConfigError(f"--step {options.step} is none of {options.run}: it has steps 1 to {last}")
    from trainer.replay import replay

    found = replay(options.run, options.step, options.quick, print)
    for line in [*of_step(found), "", *of_layers(found), "", *of_documents(found, options)]:
        print(line)
    return 0


def of_step(found: "Replay") -> list[str]:
    lines = [f"step {found.step} of {found.config.name}, parameters {origin_of_parameters(found)}"]
    for name in ("loss", "grad_norm"):
        now, then = found.metrics[name], found.logged.get(name)
        told = "not in the log" if then is None else f"logged {then:.6g}"
        if then is not None and found.exact:
            told += ", bit-identical" if then == now else f", differs by {now - then:.2g}"
        lines.append(f"{name:<12}{now:.6g} ({told})")
    return lines


def origin_of_parameters(found: "Replay") -> str:
    saved = f"of checkpoint {found.start}" if found.start else "as initialised"
    if found.start == found.step - 1:
        return saved
    return (
        f"{saved} and {found.step - 1 - found.start} steps run again" if found.exact else f"{saved}, not those it met"
    )


def of_layers(found: "Replay") -> list[str]:
    """Gradient norms by layer, with each layer's largest parameter."""
    layers: dict[str, list[tuple[float, str]]] = {}
    for name, norms in found.norms.items():
        for number, norm in enumerate(np.atleast_1d(norms)):
            layer, parameter = layer_of(name, number, found.config)
            layers.setdefault(layer, []).append((float(norm), parameter))
    total = np.sqrt(sum(norm**2 for parts in layers.values() for norm, _ in parts))
    lines = [f"gradient norm {total:.6g} by layer, before clipping"]
    width = max(map(len, layers))
    for layer, parts in sorted(layers.items(), key=lambda layer: (layer[0].startswith("layer"), layer[0])):
        norm, (most, parameter) = np.sqrt(sum(part**2 for part, _ in parts)), max(parts)
        bar = "#" * round(40 * norm / total)
        lines.append(f"  {layer:<{width}}  {norm:10.4g}  {parameter} {most:.4g}  {bar}".rstrip())
    return lines


def layer_of(name: str, number: int, config: "Config") -> tuple[str, str]:
    """('layer 7 (attn)', 'mixer/query/kernel') of `number` in a stack of parameters by its name."""
    if inside := re.match(r"(?:.*/)?(groups|tail)/([a-z]+)_(\d+)/(.*)", name):
        where, kind, place, parameter = inside.groups()
        period, depth = len(config.model.pattern), config.model.depth  # type: ignore[union-attr]
        before = number if where == "groups" else depth // period
        return f"layer {before * period + int(place):>3} ({kind})", parameter
    if inside := re.match(r"stages/(stage_\d+)/(block_\d+)/(.*)", name):
        stage, block, parameter = inside.groups()
        return f"layer {stage}, {block}", parameter
    first, _, rest = name.partition("/")
    return first, rest or first


def of_documents(found: "Replay", options) -> list[str]:
    rows = labelled(found) if found.nats.ndim == 1 else segments(found)
    rows.sort(key=lambda row: -row[0])
    tokenizer = None
    kind = "pieces of documents" if found.nats.ndim > 1 else "images" if "images" in found.batch else "rows"
    lines = [f"{len(rows)} {kind}, greatest mean losses first"]
    for loss, count, where, origin, ids in rows[: options.documents]:
        lines.append(
            f"  {loss:8.4f}  {count:>6} tokens  {where}  {origin}"
            if ids is not None
            else f"  {loss:8.4f}  {where}  {origin}"
        )
        if ids is not None and isinstance(found.config.data, TokenizedData):
            tokenizer = tokenizer or open_tokenizer(options.run, found.config)
            text = tokenizer.decode(ids)
            lines.append(f"            {text[:SHOWN]!r}")
    return lines


def labelled(found: "Replay") -> list[tuple[float, int, str, "Origin", None]]:
    labels, names = found.batch["labels"], getattr(found.config.data, "labels", ())
    told = [f"label {label}" for label in labels]
    if names:
        told = [", ".join(name for name, y in zip(names, row, strict=True) if y > 0.5) or "no label" for row in labels]
    return [
        (float(nats), 1, f"row {row}, {told[row]}", found.origins[row][0], None) for row, nats in enumerate(found.nats)
    ]


def segments(found: "Replay") -> list[tuple[float, int, str, "Origin", np.ndarray]]:
    """Mean loss over learned tokens, their number, place, origin and ids of each segment of each row."""
    ids = found.batch.get("segment_ids", np.ones_like(found.batch["tokens"]))
    rows = []
    for row, origins in enumerate(found.origins):
        for number, origin in enumerate(origins, start=1):
            here = ids[row] == number
            weights = found.batch["weights"][row] * here
            if weights.sum():
                loss = float((found.nats[row] * weights).sum() / weights.sum())
                rows.append((loss, int(weights.sum()), f"row {row}", origin, found.batch["tokens"][row][here]))
    return rows


def open_tokenizer(run: str, config):
    from launch.sample import run_tokenizer

    return run_tokenizer(run, config.data)
