"""Images decoded, resized, cropped, changed and mixed as arXiv 2102.06171 says."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pictures import encoded, picture
from PIL import Image, ImageEnhance, ImageOps

from data.augment import OPS, TABLES, crop_and_flip, distorted_box, operate, rand_augment
from data.image_decoding import BadImage, cubic, decoded, for_evaluation, normalised, resized
from data.mixing import cut_mix, mix_up

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_images_are_decoded_as_pillow_decodes_them(kind):
    content = encoded(picture(3), kind)
    assert np.array_equal(decoded(content), np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))


def test_a_changed_byte_of_a_png_is_found():
    content = bytearray(encoded(picture(1), "PNG"))
    content[len(content) // 2] ^= 255
    with pytest.raises(BadImage, match="damaged or cut off"):
        decoded(bytes(content))


def test_grey_cmyk_and_transparent_images_become_rgb():
    grey = encoded(picture(1)[..., 0])
    assert decoded(grey).shape == (48, 40, 3)
    out = io.BytesIO()
    Image.fromarray(picture(1)).convert("CMYK").save(out, "JPEG")
    assert np.abs(decoded(out.getvalue()).astype(int) - picture(1)).mean() < 5
    assert decoded(encoded(np.dstack([picture(1), picture(2)[..., :1]]), "PNG")).shape == (48, 40, 3)


@pytest.mark.parametrize("content", [b"", b"no image", encoded(picture(1))[:400], encoded(picture(1), "PNG")[:300]])
def test_what_cannot_be_decoded_is_told(content):
    with pytest.raises(BadImage):
        decoded(content)


@pytest.mark.parametrize(("old", "new"), [((48, 40), (32, 32)), ((7, 90), (33, 21)), ((20, 20), (50, 61))])
def test_resizing_is_that_of_jax(old, new):
    """Keys's cubic without antialiasing, as in TensorFlow; another implementation of it."""
    image = RNG.integers(0, 256, (*old, 3)).astype(np.uint8)
    expected = jax.image.resize(jnp.asarray(image, jnp.float32), (*new, 3), "cubic", antialias=False)
    np.testing.assert_allclose(resized(image, *new), expected, atol=2e-3)


def test_cubic_weights_are_those_of_the_paper():
    """Half-way between pixels: -1/16, 9/16, 9/16, -1/16."""
    weights = cubic(8, 4).toarray()[1]  # its centre lies between pixels 2 and 3
    np.testing.assert_allclose(weights, [0, -1 / 16, 9 / 16, 9 / 16, -1 / 16, 0, 0, 0], atol=1e-6)


def test_evaluation_squashes_both_sides_and_cuts_the_centre():
    image = picture(2, 90, 60)
    whole = jax.image.resize(jnp.asarray(image, jnp.float32), (64, 64, 3), "cubic", antialias=False)
    np.testing.assert_allclose(for_evaluation(image, 32), whole[16:48, 16:48], atol=2e-3)


def test_normalisation_is_imagenets():
    image = np.full((1, 1, 3), 255.0)
    np.testing.assert_allclose(
        normalised(image)[0, 0], [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225], rtol=1e-6
    )


def test_distorted_boxes_have_the_areas_and_aspects_asked_for():
    rng = np.random.default_rng(1)
    boxes = np.array([distorted_box(300, 400, 224, rng) for _ in range(4000)])
    top, left, height, width = boxes.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 300).all()
    assert (left + width <= 400).all()
    area, aspect = height * width / 120_000, width / height
    assert area.min() >= 0.1
    assert area.max() > 0.9
    assert aspect.min() > 0.74
    assert aspect.max() < 1.35
    # A height is drawn evenly among those that give an allowed area, so that small areas are the more frequent.
    assert 0.35 < area.mean() < 0.5
    assert abs((left + width / 2).mean() - 200) < 6
    assert abs((top + height / 2).mean() - 150) < 5


def test_an_image_too_long_for_a_box_gives_its_centre():
    assert distorted_box(2, 4000, 224, np.random.default_rng(0))[2:] == (1, 1)


def test_half_of_the_crops_are_flipped():
    image = np.zeros((40, 40, 3), np.uint8)
    image[:, 20:] = 255
    crops = [crop_and_flip(image, 16, np.random.default_rng(i)) for i in range(600)]
    brighter = [crop[:, 8:].mean() - crop[:, :8].mean() for crop in crops]
    right, left = sum(b > 1 for b in brighter), sum(b < -1 for b in brighter)
    assert abs(right - left) < 5 * np.sqrt(right + left)


BASE = picture(7, 64, 64)


def blend(a, b, factor):
    return np.clip(a + factor * (b.astype(float) - a), 0, 255)


def by_hand(name, m, image):
    """What the published table says, in numpy where it can be, else by Pillow."""
    i, pil = image.astype(int), Image.fromarray(image)
    factor = 1.8 * m + 0.1
    return {
        "autocontrast": lambda: np.asarray(ImageOps.autocontrast(pil)),
        "equalize": lambda: np.asarray(ImageOps.equalize(pil)),
        "invert": lambda: 255 - i,
        "posterize": lambda: i & ~((1 << (8 - int(4 * m))) - 1),
        "solarize": lambda: np.where(i < int(256 * m), i, 255 - i),
        "solarize_add": lambda: np.where(i < 128, np.minimum(i + int(110 * m), 255), i),
        "color": lambda: np.asarray(ImageEnhance.Color(pil).enhance(factor)),
        "contrast": lambda: blend(np.full_like(i, 64 * 64 // 256), i, factor),
        "brightness": lambda: np.clip(factor * i, 0, 255),
        "sharpness": lambda: np.asarray(ImageEnhance.Sharpness(pil).enhance(factor)),
    }[name]()


@pytest.mark.parametrize("magnitude", [5, 10])
@pytest.mark.parametrize("name", [*TABLES, "color", "sharpness"])
def test_colour_operations_are_those_of_the_table(name, magnitude):
    m = magnitude / 10
    changed = operate(BASE, [name], m, np.random.default_rng(0))
    assert np.abs(changed.astype(float) - by_hand(name, m, BASE)).max() <= 1


@pytest.mark.parametrize("magnitude", [5, 10])
def test_moves_are_those_of_the_table_in_either_direction(magnitude):
    """A cross on grey: where its arms end up tells angle, shear and shift."""
    m = magnitude / 10
    canvas = np.full((301, 301, 3), 128, np.uint8)
    canvas[140:161, 150], canvas[150, 140:161] = 255, 0
    canvas[100, 150] = (255, 0, 0)  # 50 above the centre
    found = {name: set() for name in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")}
    for name, places in found.items():
        for seed in range(12):
            changed = operate(canvas, [name], m, np.random.default_rng(seed))
            red = np.argwhere((changed[..., 0] > 200) & (changed[..., 1] < 50))
            if len(red):
                places.add(tuple(red.mean(axis=0).round().astype(int)))
    angle = np.deg2rad(30 * m)
    away, up = round(50 * np.sin(angle)), round(50 * np.cos(angle))
    assert {(150 - up, 150 - away), (150 - up, 150 + away)} == found["rotate"]
    shift = 100 * m
    assert {(100, 150 - shift), (100, 150 + shift)} == found["translate_x"]
    assert {place for place in {(100 - shift, 150), (100 + shift, 150)} if place[0] >= 0} == found["translate_y"]
    # x' such that x = x' + 0.3 m y': the pixel at (x, y) comes from 0.3 m y further on.
    assert {(100, round(150 - 0.3 * m * 100.5)), (100, round(150 + 0.3 * m * 100.5))} == found["shear_x"]
    assert {(round(100 - 0.3 * m * 150.5), 150), (round(100 + 0.3 * m * 150.5), 150)} == found["shear_y"]


def sampled(image, x, y):
    """Pixels (H W 3) at places (H W), the nearest one, and grey where there is none."""
    column, row = np.floor(x).astype(int), np.floor(y).astype(int)
    inside = (column >= 0) & (column < image.shape[1]) & (row >= 0) & (row < image.shape[0])
    return np.where(inside[..., None], image[np.where(inside, row, 0), np.where(inside, column, 0)], 128)


@pytest.mark.parametrize("magnitude", [5, 10])
@pytest.mark.parametrize("name", ["rotate", "shear_x", "shear_y", "translate_x", "translate_y"])
def test_moves_take_the_nearest_pixel_of_where_the_table_says(name, magnitude):
    """Every pixel, beside the table's maps from new places to old ones; those between two pixels may be either."""
    image = RNG.integers(0, 256, (90, 120, 3)).astype(np.uint8)
    y, x = np.mgrid[:90, :120] + 0.5
    fits = []
    for sign in (1, -1):
        m = sign * magnitude / 10
        angle = np.deg2rad(30 * m)
        left, top = x - 60, y - 45
        places = {
            "rotate": (
                60 + left * np.cos(angle) - top * np.sin(angle),
                45 + left * np.sin(angle) + top * np.cos(angle),
            ),
            "shear_x": (x + 0.3 * m * y, y),
            "shear_y": (x, y + 0.3 * m * x),
            "translate_x": (x + 100 * m, y),
            "translate_y": (x, y + 100 * m),
        }
        fits.append(sampled(image, *places[name]))
    seen = set()
    for seed in range(8):
        changed = operate(image, [name], magnitude / 10, np.random.default_rng(seed))
        agree = [(changed == fit).all(axis=-1).mean() for fit in fits]
        assert max(agree) > 0.99
        seen.add(int(np.argmax(agree)))
    assert seen == {0, 1} or np.array_equal(*fits)  # moved out of sight either way


def test_operations_one_after_the_other_are_each_applied():
    """Tables in a row become one, and neither that nor what comes between changes a pixel."""
    chains = [
        ["autocontrast", "posterize", "equalize", "invert"],
        ["solarize_add", "rotate", "equalize", "autocontrast", "shear_x", "brightness"],
        ["equalize", "contrast", "color", "solarize", "cutout", "autocontrast"],
    ]
    for chain in chains:
        rng, alone = np.random.default_rng(1), BASE
        for name in chain:
            alone = operate(alone, [name], 0.7, rng)
        assert np.array_equal(operate(BASE, chain, 0.7, np.random.default_rng(1)), alone)


def test_cutout_is_a_square_of_twice_the_magnitude():
    for seed in range(20):
        changed = operate(np.zeros((301, 301, 3), np.uint8), ["cutout"], 0.5, np.random.default_rng(seed))
        rows, columns = np.nonzero(changed[..., 0])
        assert rows.max() - rows.min() + 1 == min(40, rows.max() + 1, 301 - rows.min())
        assert columns.max() - columns.min() + 1 == min(40, columns.max() + 1, 301 - columns.min())


def test_each_operation_is_drawn_as_often(monkeypatch):
    assert len(OPS) == 16
    drawn = []
    monkeypatch.setattr("data.augment.operate", lambda image, names, m, rng: drawn.extend(names))
    for seed in range(4000):
        rand_augment(picture(1, 8, 8), 4, 5.0, np.random.default_rng(seed))
    counts = np.array([drawn.count(name) for name in OPS])
    assert counts.sum() == 16_000
    assert counts.min() > 850
    monkeypatch.undo()
    image = picture(1, 32, 32)
    kinds = {rand_augment(image, 1, 5.0, np.random.default_rng(seed)).tobytes() for seed in range(200)}
    assert len(kinds) >= 16
    assert np.array_equal(rand_augment(image, 0, 5.0, np.random.default_rng(0)), image)


def test_mixed_shares_are_the_true_ones():
    black, white = np.zeros((31, 50, 3)), np.full((31, 50, 3), 255.0)
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(500):
        mixed, share = cut_mix(white, black, rng)
        assert mixed.mean() == pytest.approx(255 * share)
        shares.append(share)
    assert 0.25 < np.mean(shares) < 0.45  # half the area before borders cut it
    shares = []
    for _ in range(2000):
        mixed, share = mix_up(white, black, 0.2, rng)
        assert mixed == pytest.approx(255 * share)
        shares.append(share)
    assert np.mean(shares) == pytest.approx(0.5, abs=0.05)
    assert np.var(shares) == pytest.approx(0.25 / 1.4, rel=0.1)  # of Beta(0.2, 0.2)
