"""What import and export ask of a family: one line here, and a table and a config reader in files of its own."""

import pathlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from models.convert import gemma, gemma_config, griffin, griffin_config, nfnet, nfnet_config, peers
from models.convert.layout import Layout
from models.convert.tensors import Tensor

Named = tuple[dict[str, Tensor], list[str]]


@dataclass(frozen=True, kw_only=True)
class Family:
    """Layouts are "flax" and "hf", "timm" and "haiku". Names of tensors are joined by slashes in Flax's and Haiku's, by dots
    in the others."""

    kind: str  # of the model's config
    title: str
    mark: re.Pattern[str]  # found in some tensor's name, in either layout, and in no other family's
    base: str  # the experiment whose recipe a model of unknown size is given
    layouts: Mapping[str, Callable[[Any], Layout]]  # of a model
    described: Callable[[Any], dict[str, Any]]  # config -> contents of the config.json beside safetensors
    readme: Callable[[Any, str], list[str]]  # (model, layout) -> lines
    peers: Mapping[str, tuple[Callable, str]]  # layout -> logits of the package its checkpoints are for, and its name
    named: Callable[[str, Mapping[str, Tensor]], Named] = lambda layout, tensors: (dict(tensors), [])
    released: Callable[[str, Any, Mapping[str, Tensor]], dict[str, Tensor]] = lambda layout, model, tensors: dict(
        tensors
    )


@dataclass(frozen=True, kw_only=True)
class TextFamily(Family):
    with_table_of: Callable[[Any, int], Any]  # (model, rows of a table) -> the model with that table
    known_by_shapes: Callable[[str, Mapping[str, Tensor]], str]  # (source, tensors in Flax's layout) -> experiment
    from_hf: Callable[..., Any]  # config.json -> model
    flat: bool = False  # whether slashes of Flax's names stand in the keys of one dict instead of nesting dicts


@dataclass(frozen=True, kw_only=True)
class ImageFamily(Family):
    model_of: Callable[[str, pathlib.Path, Mapping[str, Tensor]], Any]  # (layout, source, tensors) -> model
    same_network: Callable[[Any, Any], bool]  # whether two models differ in classes, rates and conventions alone
    conventions: Mapping[str, dict[str, Any]]  # layout -> fields of the model that follow from it
    warning: Callable[[Any, str], str]  # (model, layout) -> what to know of an export, or nothing


FAMILIES: dict[str, Family] = {
    family.kind: family
    for family in (
        TextFamily(
            kind="griffin",
            title="Griffin",
            mark=re.compile(r"temporal_pre_norm"),
            base="recurrentgemma-2b",
            layouts={"flax": lambda model: griffin.FLAX, "hf": lambda model: griffin.HF},
            with_table_of=griffin_config.with_table_of,
            known_by_shapes=griffin_config.known_by_shapes,
            from_hf=griffin_config.from_hf,
            described=lambda config: griffin_config.to_hf(config.model),
            readme=griffin_config.readme,
            peers={
                "flax": (peers.recurrentgemma_logits, "recurrentgemma"),
                "hf": (peers.transformers_logits(griffin_config.to_hf), "transformers"),
            },
        ),
        TextFamily(
            kind="gemma",
            title="Gemma",
            mark=re.compile(r"pre_ffw_norm|self_attn\.o_proj"),
            base="gemma-2b",
            layouts={"flax": gemma.flax, "hf": gemma.hf},
            with_table_of=gemma_config.with_table_of,
            known_by_shapes=gemma_config.known_by_shapes,
            from_hf=gemma_config.from_hf,
            described=lambda config: gemma_config.to_hf(config.model),
            readme=gemma_config.readme,
            peers={
                "flax": (peers.gemma_logits, "gemma"),
                "hf": (peers.transformers_logits(gemma_config.to_hf), "transformers"),
            },
            named=gemma.named,
            released=gemma.released,
            flat=True,
        ),
        ImageFamily(
            kind="nfnet",
            title="NFNet",
            mark=re.compile(r"nf_block|^stages\.0\.0\.conv1\.gain$|\.skipinit_gain$"),
            base="nfnet-f0",
            layouts={"timm": nfnet.timm, "haiku": nfnet.haiku},
            described=nfnet_config.to_timm,
            readme=nfnet_config.readme,
            peers={"timm": (peers.timm_logits, "timm")},
            model_of=nfnet_config.model_of,
            same_network=nfnet_config.same_network,
            conventions=nfnet_config.CONVENTIONS,
            warning=nfnet_config.other_convention,
        ),
    )
}


def family_of(names: Mapping[str, Tensor]) -> Family | None:
    """The family whose tensors these are, by their names."""
    return next((family for family in FAMILIES.values() if any(map(family.mark.search, names))), None)
