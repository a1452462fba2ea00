"""What a checkpoint says about the NFNet it holds, by the shapes of its tensors and timm's config.json, and the way back."""

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from configs import EXPERIMENTS
from configs.data_sections import PACKAGED
from configs.schema import Config, ConfigError, ImageData, NFNetConfig
from models.convert.nfnet import HAIKU
from models.convert.tensors import ConversionError, Tensor
from models.nfnet import plan_blocks, se_width

# What neither tensors nor config.json tell: a layout's rule for eps, and its GELU.
CONVENTIONS: Mapping[str, dict[str, Any]] = {
    "timm": {"ws_eps_mode": "add_var", "gelu_approximate": False},
    "haiku": {"ws_eps_mode": "max_nvar", "gelu_approximate": True},
}
# Arguments of timm's networks that change the arithmetic, and what they are in dm_nfnet_f0 to f6.
FIXED: Mapping[str, Any] = {
    "act_layer": "gelu",
    "attn_gain": 2.0,
    "attn_layer": "se",
    "extra_conv": True,
    "gamma_in_act": True,
    "global_pool": "avg",
    "output_stride": 32,
    "reg": False,
    "same_padding": True,
    "skipinit": True,
    "std_conv_eps": 1e-5,
    "stem_type": "deep_quad",
    "width_factor": 1.0,
}
ARGUMENTS = {  # our fields, and timm's names for them
    "num_classes": "num_classes",
    "channels": "in_chans",
    "depths": "depths",
    "widths": "channels",
    "group_width": "group_size",
    "head_width": "num_features",
    "alpha": "alpha",
    "bottleneck": "bottle_ratio",
}
WIDTHS, DEPTHS, TIMMS = (256, 512, 1536, 1536), (1, 2, 6, 3), range(7)  # timm has F0 to F6
OTHER_EPS = "differ by 13 % of their standard deviation on random weights"  # logits, of the two rules


def model_of(layout: str, source: pathlib.Path, tensors: Mapping[str, Tensor]) -> NFNetConfig:
    """The model with the shapes of these tensors, and dropout and stochastic depth of the published one it is, if any.

    Raises ConversionError for timm's networks that are not DeepMind's, and for what is no NFNet at all.
    """
    given = _timm_arguments(source) if layout == "timm" else {}
    if layout == "timm" and not any(name.endswith(".skipinit_gain") for name in tensors):
        raise _other_network(f"{source} has no skip gains")
    try:
        told = _by_shapes(layout, tensors, given)
    except KeyError as error:
        raise ConversionError(f"{source} is no NFNet in the {layout} layout: it has no {error.args[0]}") from None
    except (ConfigError, IndexError, ValueError) as error:
        raise ConversionError(f"{source} has shapes of no NFNet: {error}") from None
    base = next((c for c in published() if same_network(c.model, told)), None)
    rates = {} if base is None else {f: getattr(base.model, f) for f in ("dropout", "stochastic_depth")}
    return dataclasses.replace(told, **rates, **CONVENTIONS[layout])


def published() -> list[Config]:
    return [config for make in EXPERIMENTS.values() if isinstance((config := make()).model, NFNetConfig)]


def same_network(a: Any, b: NFNetConfig) -> bool:
    """Whether two differ in nothing but their classes, rates and conventions."""
    free = {"num_classes": 2, "dropout": 0.0, "stochastic_depth": 0.0, **CONVENTIONS["timm"]}
    return dataclasses.replace(a, **free) == dataclasses.replace(b, **free)


def _other_network(what: str) -> ConversionError:
    return ConversionError(
        f"{what}: of timm's NFNets only those named dm_nfnet_... are DeepMind's, the others have no skip gains, another "
        f"padding and the activation's constant in their weights, so that these weights would compute something else"
    )


def _timm_arguments(source: pathlib.Path) -> dict[str, Any]:
    """The `model_args` of the config.json beside a checkpoint, nothing if there is none."""
    file = (source if source.is_dir() else source.parent) / "config.json"
    if not file.exists():
        return {}
    try:
        given = json.loads(file.read_text())
        architecture, arguments = given.get("architecture", "dm_nfnet"), given.get("model_args") or {}
        arguments = dict(arguments)
    except (OSError, ValueError, AttributeError, TypeError):
        raise ConversionError(f"{file} cannot be read: timm's is an object with the key architecture") from None
    if not str(architecture).startswith("dm_nfnet"):
        raise _other_network(f"{file} says architecture={architecture!r}")
    for key, value in FIXED.items():
        if arguments.get(key, value) != value:
            raise ConversionError(f"{file} says {key}={arguments[key]!r}, but NFNet here has only {value!r}")
    return arguments


def _by_shapes(layout: str, tensors: Mapping[str, Tensor], given: Mapping[str, Any]) -> NFNetConfig:
    """Raises KeyError with the name of a tensor that is not there."""

    def kernel(timm_name: str, haiku_name: str) -> tuple[int, ...]:
        """(K K I O), or (I O)."""
        if layout == "haiku":
            return tensors[f"{HAIKU}{haiku_name}/w"].shape
        out, into, *rest = tensors[f"{timm_name}.weight"].shape
        return (*rest, into, out)

    stem = [kernel(f"stem.conv{i + 1}", f"stem_conv{i}") for i in range(4)]
    depths = _depths(layout, tensors)
    firsts = [sum(depths[:stage]) for stage in range(len(depths))]
    blocks = ["nf_block" + (f"_{index}" if index else "") for index in firsts]
    spatial = [kernel(f"stages.{s}.0.conv2", f"{b}/~/conv1") for s, b in enumerate(blocks)]
    expand = [kernel(f"stages.{s}.0.conv3", f"{b}/~/conv2") for s, b in enumerate(blocks)]
    head = kernel("head.fc", "linear")
    return NFNetConfig(
        num_classes=head[-1],
        channels=stem[0][-2],
        stem_widths=tuple(shape[-1] for shape in stem),
        widths=tuple(shape[-1] for shape in expand),
        depths=depths,
        group_width=spatial[0][-2],
        head_width=head[0] if len(head) == 2 else 0,
        bottleneck=float(given.get("bottle_ratio", 0.5)),
        se_ratio=float((given.get("attn_kwargs") or {}).get("rd_ratio", 0.5)),
        alpha=float(given.get("alpha", 0.2)),
    )


def _depths(layout: str, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Blocks of each stage. Haiku counts blocks through; one with a projected shortcut starts a stage."""
    if layout == "timm":
        found = {(int(m[1]), int(m[2])) for name in tensors if (m := re.match(r"stages\.(\d+)\.(\d+)\.", name))}
        stages = max((stage for stage, _ in found), default=-1) + 1
        if not stages:
            raise KeyError("stages.0.0.conv1.weight")
        return tuple(sum(stage == s for stage, _ in found) for s in range(stages))
    starts, number = [], 0
    while f"{HAIKU}{(block := 'nf_block' + (f'_{number}' if number else ''))}/skip_gain" in tensors:
        if f"{HAIKU}{block}/~/conv_shortcut/w" in tensors:
            starts.append(number)
        number += 1
    if starts[:1] != [0]:
        raise KeyError(f"{HAIKU}nf_block/~/conv_shortcut/w")
    return tuple(end - start for start, end in zip(starts, [*starts[1:], number], strict=True))


# --- the way back -----------------------------------------------------------------------------------------------------


def refuse_beyond_timm(model: NFNetConfig) -> None:
    """Raises ConfigError for a network that timm cannot be asked for."""
    last, plans = model.stem_widths[-1], list(plan_blocks(model))
    stem = (last // 8, last // 4, last // 2, last)
    inside = [int(model.bottleneck * width) for width in model.widths]
    widths = [*model.widths, *inside, *(se_width(model, width) for width in model.widths), model.head_width, last]
    cut = any(plan.mid != inside[plan.stage] for plan in plans)
    reasons = [
        (model.stem_widths != stem, f"{model.show('stem_widths')}: before {last} channels it has {stem[:3]}"),
        (any(width % 8 for width in widths), f"{model.show('widths')}: it rounds all widths to multiples of 8"),
        (cut and model.group_width % 8 > 0, f"{model.show('group_width')}: it has to be a multiple of 8"),
        (len(model.widths) > 4, f"{model.show('widths')}: it has four stages"),
    ]
    if found := [reason for holds, reason in reasons if holds]:
        raise ConfigError(f"timm cannot represent {found[0]}; --format haiku can")


def timm_arguments(model: NFNetConfig) -> dict[str, Any]:
    """The arguments with which timm.create_model builds this network. Raises ConfigError where it cannot."""
    refuse_beyond_timm(model)
    multiple = model.depths[0]
    whole = model.depths == tuple(multiple * depth for depth in DEPTHS) and multiple - 1 in TIMMS
    name, depths = (f"dm_nfnet_f{multiple - 1}", model.depths) if whole else ("dm_nfnet_f0", DEPTHS)
    usual = NFNetConfig(
        num_classes=1000,
        channels=3,
        stem_widths=(16, 32, 64, 128),
        widths=WIDTHS,
        depths=depths,
        group_width=128,
        head_width=3072,
    )
    found = {
        theirs: _listed(getattr(model, ours))
        for ours, theirs in ARGUMENTS.items()
        if getattr(model, ours) != getattr(usual, ours)
    }
    if model.stem_widths != usual.stem_widths:
        found["stem_chs"] = model.stem_widths[-1]
    if model.se_ratio != usual.se_ratio:
        found["attn_kwargs"] = {"rd_ratio": model.se_ratio}
    return {"model_name": name, **found}


def to_timm(config: Config) -> dict[str, Any]:
    """A config.json with which timm builds this network. Raises ConfigError where it cannot."""
    model = config.model
    assert isinstance(model, NFNetConfig)
    arguments = timm_arguments(model)
    architecture, _ = arguments.pop("model_name"), arguments.pop("num_classes", None)
    return {
        "architecture": architecture,
        "num_classes": model.num_classes,
        "num_features": model.head_width,
        "global_pool": "avg",
        **({"model_args": arguments} if arguments else {}),
        "pretrained_cfg": _preprocessing(config, model),
    }


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _preprocessing(config: Config, model: NFNetConfig) -> dict[str, Any]:
    data, channels = config.data, model.channels
    assert isinstance(data, ImageData)
    # Colour images have ImageNet's mean and deviation (data/image_decoding.py), or run from -1 to 1, as digits do.
    centred = data.normalise == "centred" or (data.source in PACKAGED and model.num_classes == 10)
    mean, deviation = ([0.5] * 3,) * 2 if centred else ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    return {
        "num_classes": model.num_classes,
        "input_size": [channels, data.image_size, data.image_size],
        "test_input_size": [channels, data.pixels_held_out, data.pixels_held_out],
        "pool_size": [math.ceil(data.image_size / 32)] * 2,
        "fixed_input_size": False,
        "interpolation": "bicubic",
        "crop_mode": "squash",  # as our evaluation, which resizes to 32 pixels beyond what it cuts out
        "crop_pct": data.pixels_held_out / (data.pixels_held_out + 32),
        "mean": mean[:channels],
        "std": deviation[:channels],
        "first_conv": "stem.conv1",
        "classifier": "head.fc",
    }


def readme(model: NFNetConfig, layout: str) -> list[str]:
    """Lines for whoever gets an export."""
    lines = [
        "A state dict and a config.json for `timm.create_model('local-dir:FOLDER', pretrained=True)`."
        if layout == "timm"
        else "{module: {parameter: float32 array}} as DeepMind's `F0_haiku.npz`, which is a pickle: `dill.load` reads it, "
        "with numpy 1.26 or newer.",
        f"In training, dropout was {model.dropout:g} and stochastic depth rose to {model.stochastic_depth:g}, without "
        "division by the keep rate.",
    ]
    return lines + ([warning] if (warning := other_convention(model, layout)) else [])


def other_convention(model: NFNetConfig, layout: str) -> str:
    """What to know where the model was trained by other rules than those of the layout's package; nothing otherwise."""
    changed = [model.show(field) for field, usual in CONVENTIONS[layout].items() if getattr(model, field) != usual]
    package = "timm" if layout == "timm" else "DeepMind's code"
    if not changed:
        return ""
    said = f"Trained with {' and '.join(changed)}, while {package} has "
    said += " and ".join(f"{field}={usual}" for field, usual in CONVENTIONS[layout].items())
    by = OTHER_EPS if any("ws_eps_mode" in part for part in changed) else "differ by 0.1 % of their standard deviation"
    return f"{said}: logits there {by}."
