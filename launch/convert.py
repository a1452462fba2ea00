"""`podwright import` and `podwright export`: runs from other people's checkpoints, and the other way."""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping

import numpy as np
from etils import epath

from configs import EXPERIMENTS
from configs.overrides import Resolved, override, resolve
from configs.schema import Config, ConfigError, TextData
from configs.suggestions import perhaps
from data.tokenizers import read_model
from models.convert.families import FAMILIES, Family, family_of
from models.convert.hugging_face import without_head
from models.convert.layout import LanguageModel, their_shapes, to_ours, to_theirs
from models.convert.safetensors_files import holds_safetensors, read_safetensors, write_safetensors
from models.convert.tensors import ConversionError, Tensor, check_tensors, first_of, resized
from trainer.array_folder import is_orbax, read_arrays, write_tree
from trainer.evaluate import read_config
from trainer.imported import abstract_arrays, write_first_state
from trainer.lora import merged_tensors
from trainer.saved import SavedSteps
from trainer.storage import StorageError, folder_of, reason

DTYPES = ("float32", "bfloat16")
FORMATS = ("flax", "hf")
TOLERANCE = 1e-3  # of logits in float32: rounding of deep models stays below, every known mistake is far above
OPTIONS = {"to": "RUN", "dtype": "DTYPE", "verify": ""}
USAGE = """\
podwright import SRC --to RUN [--config NAME] [--dtype float32|bfloat16] [--verify] [--section.field VALUE]
SRC: a folder in DeepMind's Flax layout, or safetensors of Hugging Face (a file, or a folder with config.json)
--config NAME   what the model is, where SRC does not say; and how the run is to train
--dtype DTYPE   of the stored parameters, float32 if not given; they are restored as float32
--verify        compare our logits with those of the package that SRC was made for"""


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint that has been opened, not read. Tensors have the names of its family's tables."""

    path: pathlib.Path
    format: str
    family: Family
    tensors: dict[str, Tensor]


def import_main(argv: list[str]) -> int:
    if not argv or "-h" in argv or "--help" in argv:
        print(USAGE)
        return 0
    if argv[0].startswith("--"):
        raise ConfigError("podwright import needs the checkpoint first: podwright import SRC --to RUN")
    source = open_source(pathlib.Path(argv[0]).expanduser())
    name, rest = taken_config(argv[1:])
    resolved = starting_point(source, name, [*found_tokenizer(source.path, rest), *rest])
    options = resolved.options
    if "to" not in options:
        raise ConfigError("podwright import needs --to RUN, a new folder")
    dtype = chosen_dtype(options.get("dtype", DTYPES[0]))
    run = pathlib.Path(options["to"]).expanduser()
    import_run(source, resolved.config, run, dtype, "verify" in options)
    return 0


def import_run(source: Source, config: Config, run: pathlib.Path, dtype: np.dtype, verify: bool) -> None:
    """Raises ConversionError where the tensors aren't those of the config, StorageError for a `run` that exists."""
    config, source = fitted(config, source)
    model = language_model(config)
    shapes = {
        name.removeprefix("model/"): leaf.shape
        for name, leaf in abstract_arrays(config).items()
        if name.startswith("model/")
    }
    layout = source.family.layouts[source.format](model)
    expected = their_shapes(model, layout, shapes)
    check_tensors(str(source.path), source.tensors, expected)
    ours = to_ours(model, layout, shapes, source.tensors)
    with whole_or_none(run) as partial:
        write_first_state(partial, config, {name: tensor.cast(dtype) for name, tensor in ours.items()})
        if verify:
            print(compare(source, config, partial))
    parameters = sum(int(np.prod(shape)) for shape in shapes.values())
    number = len(source.family.released(source.format, model, source.tensors))
    print(f"{run}: {number} tensors, {parameters:,} parameters, as step 0 of {config.name}")
    if isinstance(config.data, TextData) and not config.data.tokenizer.endswith(".model"):
        print(
            f"no tokenizer.model lies beside {source.path}: import with --data.tokenizer FILE.model to sample or train"
        )
    print(f"continue with: podwright train {run} --run {run} --data.corpus FOLDER")


def open_source(path: pathlib.Path) -> Source:
    """Raises ConversionError for what is neither layout or of no family, StorageError for what cannot be read."""
    if not path.exists():
        raise StorageError(f"{path} does not exist")
    form, tensors = "hf", {}
    if holds_safetensors(path):
        tensors = read_safetensors(path)
    else:
        form, path = "flax", orbax_folder(path)
        # Dots join the names on disk, and one stands in "blocks.0"; some folders have "params" above everything.
        tensors = {re.sub(r"\.(?!\d)", "/", name.removeprefix("params.")): t for name, t in read_arrays(path).items()}
    family = family_of(tensors)
    if family is None:
        titles = " or ".join(family.title for family in FAMILIES.values())
        raise ConversionError(f"{path} is no {titles} in the {form} layout: it has {first_of(list(tensors))}")
    named, images = family.named(form, tensors)
    if images:
        print(
            f"{path}: {len(images)} tensors of images are left out ({first_of(images, 1)}), the text model is imported"
        )
    return Source(path, form, family, named)


def orbax_folder(path: pathlib.Path) -> pathlib.Path:
    if path.is_dir() and not is_orbax(path):  # as downloaded: the variant's folder beside its tokenizer
        inside = [child for child in path.iterdir() if child.is_dir() and is_orbax(child)]
        path = inside[0] if len(inside) == 1 else path
    if not path.is_dir() or not is_orbax(path):
        raise ConversionError(
            f"{path} is neither an orbax folder (DeepMind's Flax layout) nor safetensors (Hugging Face)"
        )
    return path


def fitted(config: Config, source: Source) -> tuple[Config, Source]:
    """The config with the vocabulary of the checkpoint's table, and the checkpoint with a table for that config."""
    family, tensors = source.family, source.tensors
    layout = family.layouts[source.format](language_model(config))
    table = tensors.get(layout.table)
    if table is None or len(table.shape) != 2:
        raise ConversionError(
            f"{source.path} is no {family.title} in the {source.format} layout: no table {layout.table}"
        )
    model = family.with_table_of(config.model, table.rows)
    rows = family.layouts[source.format](model).table_rows
    if source.format == "hf":
        tensors = without_head(str(source.path), tensors, layout.table, family.title)
    if rows is not None:
        tensors = tensors | {layout.table: resized(table, rows)}
    return dataclasses.replace(config, model=model), dataclasses.replace(source, tensors=tensors)


def language_model(config: Config) -> LanguageModel:
    assert isinstance(config.model, LanguageModel)
    return config.model


def taken_config(words: list[str]) -> tuple[str | None, list[str]]:
    """The name after --config, and the other words."""
    for i, word in enumerate(words):
        if word == "--config" and i + 1 < len(words):
            return words[i + 1], words[:i] + words[i + 2 :]
        if word.startswith("--config="):
            return word.partition("=")[2], words[:i] + words[i + 1 :]
    return None, words


def starting_point(source: Source, name: str | None, rest: list[str]) -> Resolved:
    """The config of the new run: the one named, that of the same shapes, or what SRC's config.json says."""
    family = source.family
    if name is not None:
        resolved = resolve(name, rest, OPTIONS)
        if resolved.config.model.kind != family.kind:
            raise ConfigError(
                f"--config {name} is a {resolved.config.model.kind}, but {source.path} is a {family.kind}"
            )
        return resolved
    if source.format == "flax":
        return resolve(family.known_by_shapes(str(source.path), source.tensors), rest, OPTIONS)
    folder = source.path if source.path.is_dir() else source.path.parent
    model = family.from_hf(folder / "config.json")
    known = [make() for make in EXPERIMENTS.values()]
    base = next((c for c in known if c.model == model), EXPERIMENTS[family.base]())
    named = base if base.model == model else dataclasses.replace(base, name=folder.absolute().name, model=model)
    return override(named, f"file {folder / 'config.json'}", rest, OPTIONS)


def found_tokenizer(source: pathlib.Path, rest: list[str]) -> list[str]:
    """The option for the tokenizer.model beside a checkpoint, unless the user gives one."""
    if any(word.partition("=")[0] == "--data.tokenizer" for word in rest):
        return []
    found = [folder / "tokenizer.model" for folder in (source, source.parent)]
    return next((["--data.tokenizer", str(file.absolute())] for file in found if file.is_file()), [])


def chosen_dtype(name: str) -> np.dtype:
    if name not in DTYPES:
        raise ConfigError(f"--dtype {name} is not allowed, {perhaps(name, DTYPES)}")
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else np.float32)


def compare(source: Source, config: Config, run: pathlib.Path) -> str:
    """What the source's own implementation says to the same tokens. Raises ConversionError if it is something else."""
    from launch.logits import logits

    # One whole document without padding, which is where all packages are right; past two windows of a small model.
    model = language_model(config)
    length = max(128, min(2 * model.window + 16, 1040))
    tokens = np.random.default_rng(0).integers(model.vocab_size, size=(1, length)).astype(np.int32)
    theirs_of, package = source.family.peers[source.format]
    theirs = theirs_of(model, source.tensors, tokens)
    ours = np.concatenate([rows for _, rows in logits(run, config, tokens)])
    difference = float(np.abs(ours - theirs).max())
    told = f"logits of {tokens.size} tokens differ from {package}'s by at most {difference:.2g}"
    if not difference <= TOLERANCE:
        raise ConversionError(f"{told}, more than {TOLERANCE:g}: nothing was imported")
    return told


def export_main(argv: list[str]) -> int:
    from launch.cli import Parser

    parser = Parser(prog="podwright export")
    parser.add_argument("run", help="folder of a run")
    parser.add_argument("--format", required=True, choices=FORMATS, help="whose layout")
    parser.add_argument("--to", required=True, help="a new folder")
    parser.add_argument("--dtype", default=DTYPES[0], choices=DTYPES, help="of the tensors; released ones are bfloat16")
    options = parser.parse_args(argv)
    export_run(options.run, options.format, pathlib.Path(options.to).expanduser(), options.dtype)
    return 0


def export_run(run: str, layout: str, folder: pathlib.Path, dtype: str) -> None:
    """Writes the newest checkpoint of `run`. Raises ConfigError for a model that the format cannot represent."""
    config = read_config(run)
    family = FAMILIES.get(config.model.kind)
    if family is None:
        raise ConfigError(f"{run} is a {config.model.kind}: {' and '.join(FAMILIES)} can be exported")
    model = language_model(config)
    description = family.to_hf(model) if layout == "hf" else {}
    step, ours = newest_parameters(folder_of(run), config)
    theirs = family.released(layout, model, to_theirs(model, family.layouts[layout](model), ours))
    cast = {name: tensor.cast(chosen_dtype(dtype)) for name, tensor in theirs.items()}
    with whole_or_none(folder) as partial:
        if layout == "hf":
            write_safetensors(partial, cast)
            (partial / "config.json").write_text(json.dumps({**description, "dtype": dtype}, indent=2) + "\n")
        else:
            write_tree(partial / config.name, cast, flat=family.flat)
        header = [f"# {config.name}, step {step}", "", f"Written by `podwright export --format {layout}`.", ""]
        (partial / "README.md").write_text("\n".join([*header, *family.readme(model, layout)]) + "\n")
        tokenizer = getattr(config.data, "tokenizer", "")
        if tokenizer.endswith(".model") and ("://" in tokenizer or pathlib.Path(tokenizer).expanduser().is_file()):
            (partial / "tokenizer.model").write_bytes(read_model(tokenizer))
    print(f"{folder}: {len(cast)} tensors of step {step}, {dtype}, for {layout}")


def newest_parameters(run: epath.Path, config: Config) -> tuple[int, Mapping[str, Tensor]]:
    """Step and parameters of the newest checkpoint by our names without `model/`, opened but not read."""
    step = SavedSteps(run / "checkpoints").newest()
    if step is None:
        raise StorageError(f"{run} has no checkpoint yet")
    arrays = read_arrays(run / "checkpoints" / str(step) / "state")
    part = "ema/" if config.optimizer.ema else "model/"
    names = [name for name in abstract_arrays(config) if name.startswith(part)]
    found = {name.removeprefix(part): arrays[name.replace("/", ".")] for name in names}
    if config.finetune.lora_rank:
        found = merged_tensors(found, config.finetune.lora_alpha / config.finetune.lora_rank)
    return step, found


@contextlib.contextmanager
def whole_or_none(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to write in that becomes `folder` at the end, or is removed. Raises StorageError if there is one already."""
    if "://" in str(folder):
        raise ConfigError(f"--to {folder} is not a folder of this machine: cloud storage is not supported yet")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise StorageError(f"{folder} exists already: give --to a new folder")
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of an attempt that was killed
        partial.mkdir(parents=True)
        yield partial
        os.replace(partial, folder)
    except OSError as error:
        raise StorageError(f"{folder} cannot be written: {reason(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
