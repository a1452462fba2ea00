"""Pathfinder: are the two discs of an image on the same dashed curve? (arXiv 1805.08315; with 32 and 128 pixels a side it is
Pathfinder and Path-X of Long Range Arena, arXiv 2011.04006.)

An image is a function of its key alone. All images of a batch grow at the same time, a dash a step; what is random in one is a
hash of its key and of the decision's number, so that it does not matter which others grow beside it.

Procedure and figures are those of the authors' generator, with these differences: lines have a closed form instead of being
drawn large and made smaller; dashes keep away from all others, also from those drawn last; all curves are equally bright.
"""

from dataclasses import dataclass

import numpy as np

from data.order import mixed

PADDING = 1  # pixels at the edge that stay empty
TRIES = 3  # of a dash that would touch another one
DISTRACTOR_TRIES = 40  # of places and angles for a short curve; where none has room the image has one fewer
SLACK = 0.3  # pixels by which what two dashes keep free may overlap: soft edges of the authors' drawings do
PIXELS_AT_ONCE = 2**20  # of attempts that grow side by side
GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment


@dataclass(frozen=True)
class Recipe:
    """Lengths in pixels."""

    seed_distance: int  # between the beginnings of both curves, and half of theirs to the edge
    disc: float  # radius
    dash: int  # length
    thickness: float
    margins: tuple[int, ...]  # what dashes keep free around them, and half of a gap; one of these an image
    continuity: float  # from one dash to the next a curve turns by at most pi/2 over this
    distractors: int  # dashes of all short curves together
    contrast: float


RECIPES = {  # by side
    32: Recipe(7, 1.5, 2, 0.5, (1,), 1.0, 20, 1.5),
    64: Recipe(12, 2.5, 5, 1.0, (1,), 1.8, 22, 0.8),
    128: Recipe(20, 3.0, 5, 1.5, (2, 3), 1.8, 35, 0.9),
}


@dataclass(frozen=True)
class Images:
    """n images and what is on them. Places are (row, column) in pixels."""

    pixels: np.ndarray  # uint8 [n, side, side]
    labels: np.ndarray  # int32 [n]: 1 if both discs are on one curve
    discs: np.ndarray  # float64 [n, 2, 2]: their centres
    dashes: np.ndarray  # float64 [n, curves, contour_length, 2, 2]: tail and head; NaN where a curve has no more


def draw_images(keys: np.ndarray, side: int, contour_length: int) -> Images:
    """An image for each key, uint64 [n]."""
    margins = RECIPES[side].margins
    chosen = (uniform(keys, 0) * len(margins)).astype(int)
    parts, order = [], []
    for i, margin in enumerate(margins):
        if (rows := np.flatnonzero(chosen == i)).size:
            parts.append(with_margin(keys[rows], side, contour_length, margin))
            order.append(rows)
    back = np.argsort(np.concatenate(order))
    return Images(*(np.concatenate([getattr(part, name) for part in parts])[back] for name in Images.__annotations__))


def with_margin(keys: np.ndarray, side: int, contour_length: int, margin: int) -> Images:
    canvas = Canvas(keys, side, contour_length, margin)
    missing, done = np.arange(len(keys)), 0
    while missing.size:  # few attempts at both curves find room for all dashes: of an image the first that does counts
        attempts = max(PIXELS_AT_ONCE // (len(missing) * side**2), 1)
        tried = hashed(np.repeat(keys[missing], attempts), 1 + done + np.tile(np.arange(attempts), len(missing)))
        grown = two_curves(Canvas(tried, side, contour_length, margin))
        rows, first = np.unique(grown.images // attempts, return_index=True)
        canvas.put(missing[rows], grown.taken(first))
        missing, done = np.delete(missing, rows), done + attempts
    for curve in range(2, canvas.shapes.shape[1]):
        missing = np.arange(len(keys))
        for number in range(DISTRACTOR_TRIES):
            grown = distractor(canvas.taken(missing), curve, -1 - (curve * DISTRACTOR_TRIES + number))
            rows = np.searchsorted(canvas.images[missing], grown.images)
            canvas.put(missing[rows], grown)
            missing = np.delete(missing, rows)
    rows, first, labels = np.arange(len(keys)), below(keys, -1, 2), below(keys, -2, 2).astype(np.int32)
    last = np.where(labels == 1, first, 1 - first)
    dashes = canvas.dashes()
    discs = np.stack([dashes[rows, first, 0, 0], dashes[rows, last, -1, 1]], axis=1)
    away = np.indices((side, side)) - discs[..., None, None]
    away = np.hypot(away[:, :, 0], away[:, :, 1]).min(axis=1)
    light = np.maximum(canvas.picture(), np.clip(canvas.recipe.disc + 0.5 - away, 0, 1))
    return Images(np.rint(255 * light).astype(np.uint8), labels, discs, dashes)


class Canvas:
    """n images on which curves grow. A pixel belongs to the dash that keeps it free of others: `owner` has that dash's number
    from 1, 0 where there is none, and -1 at and beyond the edges.

    A dash is one of a few shapes around a pixel: its tail in a first dash, which has any angle of whole degrees, and its head
    in those that follow.
    """

    def __init__(self, keys: np.ndarray, side: int, contour_length: int, margin: int):
        self.side, self.margin, self.recipe = side, margin, RECIPES[side]
        self.ring = circle(self.recipe.dash + margin)  # heads around a pivot [k, 2]
        self.near = within(margin)  # [p, 2]
        self.short = max(contour_length // 3, 1)  # dashes of a distractor
        # Shapes [s]: by degrees from a tail, then by places in the ring, back from a head.
        self.shape_angles = np.concatenate([np.deg2rad(np.arange(-180, 180)), np.arctan2(*self.ring.T)])
        back = np.where(np.arange(len(self.shape_angles)) < 360, 0, self.recipe.dash)
        self.shape_tails = -back[:, None] * direction(self.shape_angles)  # from the pixel [s, 2]
        reach = int(np.ceil(self.recipe.dash + self.recipe.thickness / 2 + margin))
        self.window = np.stack(np.meshgrid(*[np.arange(-reach, reach + 1)] * 2, indexing="ij"), axis=-1)  # [w, w, 2]
        distance = distances(self.window, self.shape_tails, self.shape_angles, self.recipe.dash)
        self.keeps = distance <= self.recipe.thickness / 2 + margin - SLACK  # [s, w, w]
        self.light = np.clip(self.recipe.contrast * (self.recipe.thickness / 2 + 0.5 - distance), 0, 1)
        self.edge = 3 * reach  # no pixel that is looked at is as far outside
        self.images, self.keys = np.arange(len(keys)), keys  # which of those given these are
        self.owner = np.full((len(keys), side + 2 * self.edge, side + 2 * self.edge), -1, np.int16)
        inner = slice(self.edge + PADDING, self.edge + side - PADDING)
        self.owner[:, inner, inner] = 0
        curves = 2 + self.recipe.distractors // self.short
        self.places = np.zeros((len(keys), curves, contour_length, 2), np.int16)  # pixels of dashes
        self.shapes = np.full((len(keys), curves, contour_length), -1, np.int16)  # -1 where there is none
        self.pivots = np.zeros((len(keys), curves, 2), int)  # of curves' last dashes: their tail less the margin

    def taken(self, rows: np.ndarray) -> "Canvas":
        """A canvas with copies of these images, by numbers or where true."""
        other = object.__new__(Canvas)
        other.__dict__ |= self.__dict__
        for name in ("images", "keys", "owner", "places", "shapes", "pivots"):
            setattr(other, name, getattr(self, name)[rows])
        return other

    def put(self, rows: np.ndarray, other: "Canvas") -> None:
        """Replaces what these images show by what those of the other canvas do."""
        self.owner[rows], self.places[rows], self.shapes[rows] = other.owner, other.places, other.shapes

    def around(self, places: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, ...]:
        """Index of the pixels at places [n, ..., 2] plus offsets [..., 2]."""
        at = places + offsets + self.edge
        return np.arange(len(places)).reshape(-1, *(1,) * (at.ndim - 2)), at[..., 0], at[..., 1]

    def number(self, curve: int, place: int) -> int:
        return 1 + curve * self.shapes.shape[2] + place

    def room(self, pixel: np.ndarray, shape: np.ndarray, before: int = 0) -> np.ndarray:
        """bool [n]: whether all that dashes of these shapes [n] at pixels [n, 2] would keep free is nobody's, or that of the
        dash with number `before`."""
        owner = self.owner[self.around(pixel[:, None, None], self.window)]
        return ~((owner != 0) & (owner != before) & self.keeps[shape]).any(axis=(1, 2))

    def drawn(self, curve: int, place: int, pixel: np.ndarray, shape: np.ndarray, pivot: np.ndarray, room: np.ndarray):
        """The images [n] where there is room, with a curve's next dash."""
        grown, pixel, shape = self.taken(room), pixel[room], shape[room]
        index = grown.around(pixel[:, None, None], self.window)
        owner = grown.owner[index]
        grown.owner[index] = np.where(self.keeps[shape] & (owner == 0), self.number(curve, place), owner)
        grown.places[:, curve, place], grown.shapes[:, curve, place] = pixel, shape
        grown.pivots[:, curve] = pivot[room]
        return grown

    def begin(self, curve: int, pixel: np.ndarray, shape: np.ndarray) -> "Canvas":
        """Draws a curve's first dash; returns the images that had room for it."""
        pivot = rounded(pixel - self.margin * direction(self.shape_angles[shape]))
        return self.drawn(curve, 0, pixel, shape, pivot, self.room(pixel, shape))

    def extend(self, curve: int, place: int, draws: int) -> "Canvas":
        """Draws a curve's next dash; returns the images that had room for it. TRIES random numbers from `draws` on are used.

        The head is one of the pixels on a circle around the pivot, likelier the straighter the curve goes on from there, and
        none near a pixel that another dash keeps free.
        """
        own, last = self.number(curve, place) - 1, self.shape_angles[self.shapes[:, curve, place - 1]]
        pivot = self.pivots[:, curve] + rounded((self.recipe.dash + 2 * self.margin) * direction(last))
        turn = np.abs((self.shape_angles[None, 360:] - last[:, None] + np.pi) % (2 * np.pi) - np.pi)
        owner = self.owner[self.around(pivot[:, None, None], self.ring[:, None] + self.near)]  # [n, k, p]
        blocked = ((owner != 0) & (owner != own)).any(axis=-1)
        weight = np.where(blocked, 0, np.cos(np.minimum(self.recipe.continuity * turn, np.pi / 2)) ** 2)
        total = np.cumsum(weight, axis=1)
        shape, room = np.full(len(pivot), 360), np.zeros(len(pivot), bool)
        for number in range(draws, draws + TRIES):
            head = np.argmax(total > (uniform(self.keys, number) * total[:, -1])[:, None], axis=1)
            shape = np.where(room, shape, 360 + head)
            room = self.room(pivot + self.ring[shape - 360], shape, own) & (total[:, -1] > 1e-4)
        return self.drawn(curve, place, pivot + self.ring[shape - 360], shape, pivot, room)

    def picture(self) -> np.ndarray:
        """float64 [n, side, side], from 0 to 1: the light of all dashes."""
        light = np.zeros(self.owner.shape)
        for curve in range(self.shapes.shape[1]):
            for place in range(self.shapes.shape[2]):
                shape = self.shapes[:, curve, place]
                index = self.around(self.places[:, curve, place][:, None, None], self.window)
                cover = np.where(shape[:, None, None] < 0, 0, self.light[shape])
                light[index] = np.maximum(light[index], cover)
        inner = slice(self.edge, self.edge + self.side)
        return light[:, inner, inner]

    def dashes(self) -> np.ndarray:
        """Tails and heads of all dashes, float64 [n, curves, contour_length, 2, 2]; NaN where there is none."""
        tails = self.places + self.shape_tails[self.shapes]
        ends = np.stack([tails, tails + self.recipe.dash * direction(self.shape_angles[self.shapes])], axis=-2)
        return np.where(self.shapes[..., None, None] < 0, np.nan, ends)


def distances(window: np.ndarray, tails: np.ndarray, angles: np.ndarray, length: int) -> np.ndarray:
    """Of each pixel of the window [w, w, 2] from the dashes of this length with tails [s, 2] and angles [s]: [s, w, w]."""
    y, x = np.moveaxis(window - tails[:, None, None], -1, 0)
    sine, cosine = np.sin(angles)[:, None, None], np.cos(angles)[:, None, None]
    along = np.clip(y * sine + x * cosine, 0, length)
    return np.hypot(y - along * sine, x - along * cosine)


def two_curves(canvas: Canvas) -> Canvas:
    """Curves 0 and 1, dash by dash in turn; the images with room for both. The first one begins far from the edge, the second
    one at a fixed distance from there."""
    low = 2 * canvas.recipe.seed_distance
    pixel = np.stack([low + below(canvas.keys, number, canvas.side - 2 * low) for number in (1, 2)], axis=1)
    canvas = canvas.begin(0, pixel, below(canvas.keys, 3, 360))
    towards = direction(np.deg2rad(below(canvas.keys, 4, 360)))
    pixel = canvas.places[:, 0, 0] + rounded(canvas.recipe.seed_distance * towards)
    canvas = canvas.begin(1, pixel, below(canvas.keys, 5, 360))
    for place in range(1, canvas.shapes.shape[2]):
        for curve in (0, 1):
            canvas = canvas.extend(curve, place, 6 + TRIES * (2 * place + curve))
    return canvas


def distractor(canvas: Canvas, curve: int, number: int) -> Canvas:
    """A short curve by the numbered words of each key; the images with room for it."""
    canvas.keys = hashed(canvas.keys, number)
    pixel = np.stack([below(canvas.keys, axis, canvas.side) for axis in (1, 2)], axis=1)
    canvas = canvas.begin(curve, pixel, below(canvas.keys, 0, 360))
    for place in range(1, canvas.short):
        canvas = canvas.extend(curve, place, 3 + TRIES * place)
    return canvas


def hashed(keys: np.ndarray, number: int | np.ndarray) -> np.ndarray:
    """uint64 [n]: a word for each key, another one for each number."""
    return mixed(keys + np.atleast_1d(number).astype(np.int64).view(np.uint64) * np.uint64(GOLDEN))


def uniform(keys: np.ndarray, number: int) -> np.ndarray:
    """float64 [n] in [0, 1)."""
    return (hashed(keys, number) >> np.uint64(11)) * 2.0**-53


def below(keys: np.ndarray, number: int, limit: int) -> np.ndarray:
    """Whole numbers [n] below `limit`."""
    return (uniform(keys, number) * limit).astype(int)


def direction(angle: np.ndarray) -> np.ndarray:
    """(row, column) [n, 2] of length 1."""
    return np.stack([np.sin(angle), np.cos(angle)], axis=-1)


def rounded(place: np.ndarray) -> np.ndarray:
    return np.rint(place).astype(int)


def within(radius: int) -> np.ndarray:
    """Pixels [p, 2] at most `radius` from (0, 0)."""
    square = np.stack(np.meshgrid(*[np.arange(-radius, radius + 1)] * 2, indexing="ij"), axis=-1).reshape(-1, 2)
    return square[np.hypot(*square.T) <= radius]


def circle(radius: int) -> np.ndarray:
    """Pixels [k, 2] around (0, 0), about one for each unit of a circle's length."""
    angle = np.arange(0, 2 * np.pi, 1 / radius)
    return np.unique(rounded(radius * direction(angle)), axis=0)
