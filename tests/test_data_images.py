"""The digits: fixed split, documented range, bilinear resizing, batches of fixed shape."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import ImageData
from data import DataError, open_data
from data.images import interpolation, resized


@pytest.fixture(scope="module")
def digits():
    return open_data(ImageData(batch_size=64, image_size=16))


def test_batches_have_the_promised_fields(digits):
    batch = digits.train_batch(0)
    assert {name: (rows.shape, rows.dtype.name) for name, rows in batch.items()} == {
        "images": ((64, 16, 16, 1), "float32"),
        "labels": ((64,), "int32"),
        "weights": ((64,), "float32"),
    }
    assert batch["images"].min() >= -1
    assert batch["images"].max() <= 1
    assert set(batch["labels"]) <= set(range(10))


def test_unresized_images_are_scikit_learns_over_eight_minus_one(digits):
    from sklearn.datasets import load_digits

    data = open_data(ImageData(batch_size=64, image_size=8))
    everything = np.concatenate([split.read(np.arange(len(split)))["images"] for split in (data.train, data.held_out)])
    expected = load_digits().images / 8 - 1
    assert sorted(map(bytes, everything[..., 0].astype(np.float32))) == sorted(map(bytes, expected.astype(np.float32)))


def test_labels_stay_with_their_images():
    from sklearn.datasets import load_digits

    labels = {image.tobytes(): label for image, label in zip(load_digits().images, load_digits().target, strict=True)}
    batch = open_data(ImageData(batch_size=64, image_size=8)).train_batch(3)
    for image, label in zip(batch["images"], batch["labels"], strict=True):
        assert labels[((image[..., 0] + 1) * 8).astype(np.float64).tobytes()] == label


def test_training_and_held_out_images_share_none_and_miss_none(digits):
    assert len(digits.train) + len(digits.held_out) == 1797
    assert abs(len(digits.held_out) / 1797 - 0.2) < 0.03
    assert set(digits.held_out.labels) == set(range(10))


def test_an_epoch_shows_every_image_once(digits):
    seen = [digits.train_batch(step)["images"] for step in range(-(-digits.examples_per_epoch // 64))]
    seen = np.concatenate(seen)[: digits.examples_per_epoch]
    everything = digits.train.read(np.arange(len(digits.train)))["images"]
    assert sorted(map(bytes, seen)) == sorted(map(bytes, everything))


def test_the_manifest_is_reproducible_and_follows_what_decides_the_batches(digits):
    again = open_data(ImageData(batch_size=64, image_size=16))
    assert digits.manifest == again.manifest == json.loads(json.dumps(digits.manifest))
    assert digits.manifest["needs"] == {"num_classes": 10, "channels": 1}
    for change in ({"image_size": 17}, {"held_out": 0.3}, {"batch_size": 32}):
        other = open_data(ImageData(**{"batch_size": 64, "image_size": 16, **change}))
        assert other.manifest["hash"] != digits.manifest["hash"]


def test_the_plan_says_what_is_there(digits):
    (line,) = digits.describe()
    assert (
        line == "digits: 1,423 training and 374 held-out images, 8 by 8 resized to 16 by 16 (22.2 steps of 64 an epoch)"
    )


def test_a_split_without_an_image_is_refused():
    with pytest.raises(DataError, match="leaves 0 of them held out"):
        open_data(ImageData(held_out=1e-9))


def bilinear(image, size):
    """One pixel at a time."""
    out = np.zeros((size, size))
    for i in range(size):
        for j in range(size):
            y, x = ((k + 0.5) * n / size - 0.5 for k, n in zip((i, j), image.shape, strict=True))
            total = 0.0
            for a, row in enumerate(image):
                for b, value in enumerate(row):
                    clamped_y, clamped_x = min(max(y, 0), image.shape[0] - 1), min(max(x, 0), image.shape[1] - 1)
                    total += max(0, 1 - abs(clamped_y - a)) * max(0, 1 - abs(clamped_x - b)) * value
            out[i, j] = total
    return out


@pytest.mark.parametrize("size", [8, 9, 16, 21])
def test_resizing_agrees_with_a_loop_over_pixels(size):
    images = np.random.default_rng(0).normal(size=(2, 8, 8))
    for image, small in zip(images, resized(images, size), strict=True):
        np.testing.assert_allclose(small, bilinear(image, size), rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(old=st.integers(2, 12), new=st.integers(1, 40))
def test_resizing_averages_and_so_keeps_constants(old, new):
    weights = interpolation(old, new)
    assert weights.min() >= 0
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-12)


def test_resizing_to_the_same_size_changes_nothing():
    images = np.random.default_rng(1).normal(size=(3, 8, 8))
    np.testing.assert_array_equal(resized(images, 8), images)
