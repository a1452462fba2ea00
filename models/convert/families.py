"""What import and export ask of a family: one line here, and a table and a config reader in files of its own."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from models.convert import gemma, gemma_config, griffin, griffin_config, peers
from models.convert.layout import Layout
from models.convert.tensors import Tensor

Named = tuple[dict[str, Tensor], list[str]]


@dataclass(frozen=True)
class Family:
    """`layout` below is "flax" or "hf". Names of tensors are joined by slashes in Flax's, by dots in Hugging Face's."""

    kind: str  # of the model's config
    title: str
    mark: re.Pattern[str]  # found in some tensor's name, in either layout, and in no other family's
    base: str  # the experiment whose recipe a model of unknown size is given
    layouts: Mapping[str, Callable[[Any], Layout]]  # of a model
    with_table_of: Callable[[Any, int], Any]  # (model, rows of a table) -> the model with that table
    known_by_shapes: Callable[[str, Mapping[str, Tensor]], str]  # (source, tensors in Flax's layout) -> experiment
    from_hf: Callable[..., Any]  # config.json -> model
    to_hf: Callable[[Any], dict[str, Any]]  # model -> contents of config.json
    readme: Callable[[Any, str], list[str]]  # (model, layout) -> lines
    peers: Mapping[str, tuple[Callable, str]]  # layout -> logits of the package its checkpoints are for, and its name
    named: Callable[[str, Mapping[str, Tensor]], Named] = lambda layout, tensors: (dict(tensors), [])
    released: Callable[[str, Any, Mapping[str, Tensor]], dict[str, Tensor]] = lambda layout, model, tensors: dict(
        tensors
    )
    flat: bool = False  # whether slashes of Flax's names stand in the keys of one dict instead of nesting dicts


FAMILIES = {
    family.kind: family
    for family in (
        Family(
            kind="griffin",
            title="Griffin",
            mark=re.compile(r"temporal_pre_norm"),
            base="recurrentgemma-2b",
            layouts={"flax": lambda model: griffin.FLAX, "hf": lambda model: griffin.HF},
            with_table_of=griffin_config.with_table_of,
            known_by_shapes=griffin_config.known_by_shapes,
            from_hf=griffin_config.from_hf,
            to_hf=griffin_config.to_hf,
            readme=griffin_config.readme,
            peers={
                "flax": (peers.recurrentgemma_logits, "recurrentgemma"),
                "hf": (peers.transformers_logits(griffin_config.to_hf), "transformers"),
            },
        ),
        Family(
            kind="gemma",
            title="Gemma",
            mark=re.compile(r"pre_ffw_norm|self_attn\.o_proj"),
            base="gemma-2b",
            layouts={"flax": gemma.flax, "hf": gemma.hf},
            with_table_of=gemma_config.with_table_of,
            known_by_shapes=gemma_config.known_by_shapes,
            from_hf=gemma_config.from_hf,
            to_hf=gemma_config.to_hf,
            readme=gemma_config.readme,
            peers={
                "flax": (peers.gemma_logits, "gemma"),
                "hf": (peers.transformers_logits(gemma_config.to_hf), "transformers"),
            },
            named=gemma.named,
            released=gemma.released,
            flat=True,
        ),
    )
}


def family_of(names: Mapping[str, Tensor]) -> Family | None:
    """The family whose tensors these are, by their names."""
    return next((family for family in FAMILIES.values() if any(map(family.mark.search, names))), None)
