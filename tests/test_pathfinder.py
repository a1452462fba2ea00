"""Pathfinder: images are their dashes and discs, drawn as published, and labels say which curve the discs are on."""

import functools

import numpy as np
import pytest

from data.pathfinder import RECIPES, draw_images


@functools.cache
def easy():
    return draw_images(np.arange(1, 257, dtype=np.uint64) << np.uint64(40), 32, 6)


def ends_of(curve: np.ndarray) -> np.ndarray:
    drawn = curve[~np.isnan(curve[:, 0, 0])]
    return np.array([drawn[0, 0], drawn[-1, 1]])


def test_both_discs_are_on_one_curve_if_and_only_if_the_label_says_so():
    """Each curve is followed from dash to dash: over a gap of 2 pixels that are rounded twice."""
    images = easy()
    for dashes, discs, label in zip(images.dashes, images.discs, images.labels, strict=True):
        for curve in dashes:
            curve = curve[~np.isnan(curve[:, 0, 0])]
            gaps = np.hypot(*(curve[1:, 0] - curve[:-1, 1]).T)
            np.testing.assert_allclose(gaps, 2, atol=1.5)
            np.testing.assert_allclose(np.hypot(*(curve[:, 1] - curve[:, 0]).T), 2)
        ends = [ends_of(curve) for curve in dashes[:2]]
        on = [[np.abs(curve - disc).max(axis=1).min() < 1e-9 for curve in ends] for disc in discs]
        assert [sum(one) for one in on] == [1, 1]
        assert (on[0] == on[1]) == label


def test_an_image_is_its_dashes_and_discs():
    """Drawn again, pixel by pixel, from where the dashes are said to be."""
    images, recipe = easy(), RECIPES[32]
    for number in range(4):
        light = np.zeros((32, 32))
        for place in np.ndindex(32, 32):
            for tail, head in images.dashes[number].reshape(-1, 2, 2):
                if not np.isnan(tail[0]):
                    along = np.clip((place - tail) @ (head - tail) / 4, 0, 1)
                    away = np.linalg.norm(place - tail - along * (head - tail))
                    light[place] = max(light[place], recipe.contrast * (recipe.thickness / 2 + 0.5 - away))
            for disc in images.discs[number]:
                light[place] = max(light[place], recipe.disc + 0.5 - np.linalg.norm(place - disc))
        np.testing.assert_allclose(images.pixels[number], 255 * np.clip(light, 0, 1), atol=0.51)


def test_no_two_dashes_touch_and_an_easy_image_has_ten_short_curves():
    images = easy()
    for dashes in images.dashes:
        assert np.isfinite(dashes[:, :, 0, 0]).sum(axis=1).tolist() == [6, 6, *[2] * 10]
        dashes = dashes.reshape(-1, 2, 2)
        dashes = dashes[~np.isnan(dashes[:, 0, 0])]
        share = np.linspace(0, 1, 9)[:, None]
        points = dashes[:, None, 0] * (1 - share) + dashes[:, None, 1] * share  # [dashes, 9, 2]
        apart = np.linalg.norm(points[:, None, :, None] - points[None, :, None], axis=-1).min(axis=(2, 3))
        np.fill_diagonal(apart, 9)
        assert apart.min() > 0.5
        assert dashes.min() >= 0.5
        assert dashes.max() <= 30.5


def test_labels_are_even_and_curves_begin_where_they_are_published_to():
    images = easy()
    assert abs(images.labels.sum() - 128) < 4 * 8  # standard deviations of 256 coins
    first, second = images.dashes[:, 0, 0, 0], images.dashes[:, 1, 0, 0]
    assert first.min() >= 14
    assert first.max() <= 17  # twice the distance of 7 from the edge
    np.testing.assert_allclose(np.hypot(*(second - first).T), 7, atol=0.71)
    turns = np.diff(np.arctan2(*np.moveaxis(images.dashes[:, :2, :, 1] - images.dashes[:, :2, :, 0], -1, 0)), axis=-1)
    turns = np.abs((turns + np.pi) % (2 * np.pi) - np.pi)
    assert turns.max() < np.pi / 2  # continuity 1
    assert np.cos(turns).mean() > 0.7  # of cos^2 without obstacles 0.85, of a uniform turn 0.64


def test_an_image_does_not_depend_on_those_that_are_drawn_beside_it():
    keys = np.arange(1, 257, dtype=np.uint64)[[100, 3, 50]] << np.uint64(40)
    np.testing.assert_array_equal(draw_images(keys, 32, 6).pixels, easy().pixels[[100, 3, 50]])


@pytest.mark.slow
@pytest.mark.parametrize("side", [32, 128])
def test_published_sizes_have_all_their_dashes(side):
    images = draw_images(np.arange(1, 3, dtype=np.uint64) << np.uint64(33), side, 14)
    assert np.isfinite(images.dashes[:, :2]).all()
    assert images.dashes.shape[1] == 2 + {32: 20, 128: 35}[side] // 4
