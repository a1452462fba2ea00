"""Which of somebody else's tensors is which of our arrays, as a table of rows, and the conversions that follow from it.

A family's tables are in a file of its own. Nothing here is ever a whole model: tensors are read as their writer asks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from configs.schema import GemmaConfig, GriffinConfig, NFNetConfig
from models.convert.tensors import Tensor, resized, rows_of

Arrays = tuple[np.ndarray, ...]
LanguageModel = GriffinConfig | GemmaConfig
Model = LanguageModel | NFNetConfig
TABLE = "embedding/table"


@dataclass(frozen=True)
class Row:
    """One of our arrays as somebody else's tensors (one, or one a branch): views there, and back up to a reshape."""

    theirs: tuple[str, ...]
    there: Callable[[np.ndarray], Arrays] = lambda x: (x,)
    back: Callable[[Arrays], np.ndarray] = lambda parts: parts[0]


@dataclass(frozen=True)
class Place:
    """Where one layer's array stands in our checkpoint: the array's name, and its layer if layers are stacked."""

    name: str
    layer: int | None
    row: Row
    theirs: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """`outer` and `blocks` map our names to rows; `prefix` writes what stands before a block's names.

    `listed`: instead of these, every place, for a model whose layers do not repeat a pattern.
    `table_rows`: of their table, where it does not have ours; the rows that one has more than the other are padding.
    """

    name: str
    outer: dict[str, Row] = field(default_factory=dict)
    blocks: dict[str, dict[str, Row]] = field(default_factory=dict)  # by kind of block
    prefix: Callable[[int], str] = str
    table_rows: int | None = None
    listed: Sequence[Place] = ()

    @property
    def table(self) -> str:
        return self.outer[TABLE].theirs[0]


def places(config: Model, layout: Layout) -> Sequence[Place]:
    """Every array of every layer, in the order of the layers; then those outside the layers."""
    if isinstance(config, NFNetConfig):
        return layout.listed
    period, groups = len(config.pattern), config.depth // len(config.pattern)
    found = []
    for i in range(config.depth):
        kind = config.pattern[i % period]
        stacked = i < groups * period
        block = f"layers/{'groups' if stacked else 'tail'}/{kind}_{i % period}"
        for name, row in layout.blocks[kind].items():
            theirs = tuple(layout.prefix(i) + part for part in row.theirs)
            found.append(Place(f"{block}/{name}", i // period if stacked else None, row, theirs))
    return found + [Place(name, None, row, row.theirs) for name, row in layout.outer.items()]


def layer_shape(place: Place, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    return shapes[place.name] if place.layer is None else shapes[place.name][1:]


def their_shapes(config: Model, layout: Layout, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Name to shape of every tensor that the layout has for a model with these `shapes` of ours."""
    found: dict[str, tuple[int, ...]] = {}
    for place in places(config, layout):
        nothing = np.broadcast_to(np.float32(0), layer_shape(place, shapes))  # no memory: only its views' shapes count
        found |= {name: view.shape for name, view in zip(place.theirs, place.row.there(nothing), strict=True)}
    if layout.table_rows is not None:
        found[layout.table] = (layout.table_rows, *found[layout.table][1:])
    return found


def to_ours(
    config: Model, layout: Layout, shapes: Mapping[str, tuple[int, ...]], source: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Our arrays, layers stacked, out of a checkpoint whose tensors have been checked."""
    layers: dict[str, list[Place]] = {}
    for place in places(config, layout):
        layers.setdefault(place.name, []).append(place)

    def tensor(name: str, found: list[Place]) -> Tensor:
        shape, dtype = shapes[name], source[found[0].theirs[0]].dtype
        if found[0].layer is not None:

            def read(first: int, end: int) -> np.ndarray:
                parts = [tuple(source[t].whole() for t in place.theirs) for place in found[first:end]]
                return np.stack([found[0].row.back(part).reshape(shape[1:]) for part in parts])

            return Tensor(shape, dtype, read)
        (place,) = found
        if name in layout.outer:  # the same array there and here: the table is too big to be read at once
            return resized(source[place.theirs[0]], shape[0])
        parts = tuple(source[t] for t in place.theirs)

        def whole() -> np.ndarray:
            return place.row.back(tuple(part.whole() for part in parts)).reshape(shape)

        return Tensor(shape, dtype, lambda a, b: rows_of(whole(), a, b))

    return {name: tensor(name, found) for name, found in layers.items()}


def to_theirs(config: Model, layout: Layout, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The layout's tensors out of our checkpoint, in the order of the layers."""
    shapes = their_shapes(config, layout, {name: tensor.shape for name, tensor in ours.items()})

    def tensor(place: Place, part: int) -> Tensor:
        array = ours[place.name]
        if place.name in layout.outer:
            return resized(array, shapes[place.theirs[0]][0])

        def read(first: int, end: int) -> np.ndarray:
            layer = array.whole() if place.layer is None else array.read(place.layer, place.layer + 1)[0]
            return rows_of(place.row.there(layer)[part], first, end)

        return Tensor(shapes[place.theirs[part]], array.dtype, read)

    every = places(config, layout)
    return {name: tensor(place, part) for place in every for part, name in enumerate(place.theirs)}
