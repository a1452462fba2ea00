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
from models.convert.families import FAMILIES, Family, ImageFamily, TextFamily, family_of
from models.convert.haiku import holds_haiku, read_haiku, write_haiku
from models.convert.hugging_face import without_head
from models.convert.layout import LanguageModel, Model, their_shapes, to_ours, to_theirs
from models.convert.safetensors_files import holds_safetensors, read_safetensors, write_safetensors
from models.convert.tensors import ConversionError, Tensor, check_tensors, first_of, resized
from trainer.array_folder import is_orbax, read_arrays, write_tree
from trainer.evaluate import read_config
from trainer.imported import abstract_arrays, write_first_state
from trainer.lora import merged_tensors
from trainer.saved import SavedSteps
from trainer.storage import StorageError, folder_of, reason

DTYPES = ("float32", "bfloat16")
FORMATS = ("flax", "hf", "timm", "haiku")
TORCH = (".pth", ".pt", ".bin", ".tar")
# Of logits in float32: rounding of deep models stays below, every known mistake is far above.
TOLERANCE, IMAGE_TOLERANCE = 1e-3, 1e-4
OPTIONS = {"to": "RUN", "dtype": "DTYPE", "verify": ""}
USAGE = """\
podwright import SRC --to RUN [--config NAME] [--dtype float32|bfloat16] [--verify] [--section.field VALUE]
SRC: a folder in DeepMind's Flax layout, safetensors of Hugging Face or timm (a file, or a folder with config.json), or one
     of DeepMind's NFNet files (F0_haiku.npz)
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
    if verify and source.format not in source.family.peers:
        raise ConfigError(
            f"--verify has no package to compare a {source.family.title} in the {source.format} layout with"
        )
    if isinstance(source.family, TextFamily):
        config, source = fitted(config, source, source.family)
    model = model_in(config)
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
    if isinstance(source.family, ImageFamily):
        conventions = source.family.conventions[source.format]
        told = " and ".join(model.show(field) for field in conventions)
        usual = all(getattr(model, field) == value for field, value in conventions.items())
        print(f"with {told}, {'as' if usual else 'not as'} {source.format} files are meant")
    data = "--data.source" if isinstance(source.family, ImageFamily) else "--data.corpus"
    print(f"continue with: podwright train {run} --run {run} {data} FOLDER")


def open_source(path: pathlib.Path) -> Source:
    """Raises ConversionError for what is neither layout or of no family, StorageError for what cannot be read."""
    if not path.exists():
        raise StorageError(f"{path} does not exist")
    form, tensors = "hf", {}
    if holds_safetensors(path):
        tensors = read_safetensors(path)
    elif holds_haiku(path):
        form, tensors = "haiku", read_haiku(path)
    elif torch_file := next(iter(torch_files(path)), None):
        raise ConversionError(
            f"{torch_file} is a pickle of torch, which can run code: load it where you trust it and write its state dict "
            f"with safetensors.torch.save_file"
        )
    else:
        form, path = "flax", orbax_folder(path)
        # Dots join the names on disk, and one stands in "blocks.0"; some folders have "params" above everything.
        tensors = {re.sub(r"\.(?!\d)", "/", name.removeprefix("params.")): t for name, t in read_arrays(path).items()}
    family = family_of(tensors)
    if family is None:
        titles = " or ".join(family.title for family in FAMILIES.values())
        raise ConversionError(f"{path} is no {titles} in the {form} layout: it has {first_of(list(tensors))}")
    if form == "hf" and "timm" in family.layouts:
        form = "timm"
    if form not in family.layouts:
        raise ConversionError(
            f"{path} is a {family.title} in the {form} layout: {' or '.join(family.layouts)} is allowed"
        )
    named, images = family.named(form, tensors)
    if images:
        print(
            f"{path}: {len(images)} tensors of images are left out ({first_of(images, 1)}), the text model is imported"
        )
    return Source(path, form, family, named)


def torch_files(path: pathlib.Path) -> list[pathlib.Path]:
    files = [path] if path.is_file() else sorted(path.glob("*"))
    return [file for file in files if file.suffix in TORCH]


def orbax_folder(path: pathlib.Path) -> pathlib.Path:
    if path.is_dir() and not is_orbax(path):  # as downloaded: the variant's folder beside its tokenizer
        inside = [child for child in path.iterdir() if child.is_dir() and is_orbax(child)]
        path = inside[0] if len(inside) == 1 else path
    if not path.is_dir() or not is_orbax(path):
        raise ConversionError(
            f"{path} is neither an orbax folder (DeepMind's Flax layout) nor safetensors (Hugging Face, timm) nor a .npz file "
            f"(DeepMind's NFNets)"
        )
    return path


def fitted(config: Config, source: Source, family: TextFamily) -> tuple[Config, Source]:
    """The config with the vocabulary of the checkpoint's table, and the checkpoint with a table for that config."""
    tensors = source.tensors
    layout = family.layouts[source.format](config.model)
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


def model_in(config: Config) -> Model:
    assert isinstance(config.model, Model)
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
    if isinstance(family, ImageFamily):
        return starting_point_of_images(source, family, name, rest)
    assert isinstance(family, TextFamily)
    if name is not None:
        resolved = resolve(name, rest, OPTIONS)
        check_kind(name, resolved.config, source)
        return resolved
    if source.format == "flax":
        return resolve(family.known_by_shapes(str(source.path), source.tensors), rest, OPTIONS)
    folder = source.path if source.path.is_dir() else source.path.parent
    model = family.from_hf(folder / "config.json")
    known = [make() for make in EXPERIMENTS.values()]
    base = next((c for c in known if c.model == model), EXPERIMENTS[family.base]())
    named = base if base.model == model else dataclasses.replace(base, name=folder.absolute().name, model=model)
    return override(named, f"file {folder / 'config.json'}", rest, OPTIONS)


def check_kind(name: str, config: Config, source: Source) -> None:
    if config.model.kind != source.family.kind:
        raise ConfigError(f"--config {name} is a {config.model.kind}, but {source.path} is a {source.family.kind}")


def starting_point_of_images(source: Source, family: ImageFamily, name: str | None, rest: list[str]) -> Resolved:
    """The tensors tell everything but the recipe, which is that of --config or of the experiment of the same shapes.

    What a layout's rules mean for the model holds with --config, too, unless the command line says otherwise.
    """
    told = family.model_of(source.format, source.path, source.tensors)
    if name is not None:
        base = resolve(name).config
        check_kind(name, base, source)
        model = dataclasses.replace(base.model, num_classes=told.num_classes, **family.conventions[source.format])
        return override(dataclasses.replace(base, model=model), f"file {source.path}", rest, OPTIONS)
    known = [made for make in EXPERIMENTS.values() if (made := make()).model.kind == family.kind]
    base = next((config for config in known if family.same_network(config.model, told)), EXPERIMENTS[family.base]())
    same = family.same_network(base.model, told)
    title = base.name if same else source.path.absolute().stem
    data = dataclasses.replace(base.data, channels=told.channels) if told.channels in (1, 3) else base.data
    config = dataclasses.replace(base, name=title, model=told, data=data)
    return override(config, f"file {source.path}", rest, OPTIONS)


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
    """What the source's own implementation says to the same inputs. Raises ConversionError if it is something else."""
    from launch.logits import image_logits, logits

    model, random = model_in(config), np.random.default_rng(0)
    theirs_of, package = source.family.peers[source.format]
    if isinstance(model, LanguageModel):
        # One whole document without padding, which is where all packages are right; past two windows of a small model.
        length = max(128, min(2 * model.window + 16, 1040))
        inputs = random.integers(model.vocab_size, size=(1, length)).astype(np.int32)
        ours = np.concatenate([rows for _, rows in logits(run, config, inputs)])
        told, limit = f"logits of {inputs.size} tokens", TOLERANCE
    else:
        # An odd side and an even one, which strides pad differently.
        inputs = random.standard_normal((2, 64, 75, model.channels)).astype(np.float32)
        ours = image_logits(run, config, inputs)
        told, limit = f"logits of {len(inputs)} images", IMAGE_TOLERANCE
    theirs = theirs_of(model, source.tensors, inputs)
    difference = float(np.abs(ours - theirs).max())
    told = f"{told} differ from {package}'s by at most {difference:.2g}"
    if not difference <= limit:
        raise ConversionError(f"{told}, more than {limit:g}: nothing was imported")
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
    if layout not in family.layouts:
        raise ConfigError(
            f"--format {layout} is not for {run}, a {family.title}: {' or '.join(family.layouts)} is allowed"
        )
    if layout == "haiku" and dtype != "float32":
        raise ConfigError(f"--dtype {dtype} is not for --format haiku: float32 is allowed")
    model = model_in(config)
    description = family.described(config) if layout in ("hf", "timm") else {}
    table = family.layouts[layout](model)
    step, ours = newest_parameters(folder_of(run), config)
    theirs = family.released(layout, model, to_theirs(model, table, ours))
    cast = {name: tensor.cast(chosen_dtype(dtype)) for name, tensor in theirs.items()}
    with whole_or_none(folder) as partial:
        if layout == "haiku":
            write_haiku(partial / f"{config.name}_haiku.npz", cast)
        elif description:
            write_safetensors(partial, cast)
            (partial / "config.json").write_text(json.dumps({**description, "dtype": dtype}, indent=2) + "\n")
        else:
            write_tree(partial / config.name, cast, flat=isinstance(family, TextFamily) and family.flat)
        header = [f"# {config.name}, step {step}", "", f"Written by `podwright export --format {layout}`.", ""]
        (partial / "README.md").write_text("\n".join([*header, *family.readme(model, layout)]) + "\n")
        tokenizer = getattr(config.data, "tokenizer", "")
        if tokenizer.endswith(".model") and ("://" in tokenizer or pathlib.Path(tokenizer).expanduser().is_file()):
            (partial / "tokenizer.model").write_bytes(read_model(tokenizer))
    print(f"{folder}: {len(cast)} tensors of step {step}, {dtype}, for {layout}")
    if isinstance(family, ImageFamily) and (warning := family.warning(model, layout)):
        print(warning)


def newest_parameters(run: epath.Path, config: Config) -> tuple[int, Mapping[str, Tensor]]:
    """Step and parameters of the newest checkpoint by our names without `model/`, opened but not read."""
    step = SavedSteps(run / "checkpoints").newest()
    if step is None:
        raise StorageError(f"{run} has no checkpoint yet")
    arrays = read_arrays(run / "checkpoints" / str(step) / "state")
    part = "ema/" if config.optimizer.averages else "model/"
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
