import hashlib
import lzma
from pathlib import Path

import numpy as np
import pytest

from experiments.tools import make_fashion_mnist_mini
from jaxkd import data
from jaxkd.data import embedded

ORIGINAL = Path("/usr/share/datasets/fashion-mnist")
needs_original = pytest.mark.skipif(
    not ORIGINAL.is_dir(), reason="the Debian package dataset-fashion-mnist is absent"
)


def test_splits_are_balanced():
    train, test, class_names = embedded.read_embedded()
    assert train.images.shape == (10_000, 28, 28, 1) and test.images.shape == (2_000, 28, 28, 1)
    assert train.images.dtype == np.uint8 and train.labels.dtype == np.int32
    np.testing.assert_array_equal(np.bincount(train.labels), [1000] * 10)
    np.testing.assert_array_equal(np.bincount(test.labels), [200] * 10)
    assert len(class_names) == 10 and class_names[9] == "Ankle boot"


def test_content_is_what_results_were_measured_on():
    content = lzma.decompress(embedded.FILE.read_bytes())
    assert (
        hashlib.sha256(content).hexdigest()
        == "3d5e3cea1fcaf7a24cdd039bd8a1c030443d240edc92d0b3ab892b41765fc6ec"
    )


def test_validation_set_is_what_results_were_measured_on():
    images = data.load("fashion_mnist_mini").validation.images
    assert (
        hashlib.sha256(images.tobytes()).hexdigest()
        == "46ff2f65d647149f956f55670183bbc579e9b82d4b7ecd855f7e8c711b22f8bc"
    )


def test_classes_look_like_their_names():
    train, _, class_names = embedded.read_embedded()
    brightness = {
        name: train.images[train.labels == label].mean() for label, name in enumerate(class_names)
    }
    assert max(brightness, key=brightness.__getitem__) in ("Pullover", "Coat")
    assert min(brightness, key=brightness.__getitem__) == "Sandal"


@needs_original
def test_file_is_made_again_from_the_original(monkeypatch):
    # Contents are compared, since releases of liblzma compress them differently. The fast preset
    # saves five seconds.
    monkeypatch.setattr(make_fashion_mnist_mini, "_PRESET", 0)
    content = make_fashion_mnist_mini.make(ORIGINAL)
    assert lzma.decompress(content) == lzma.decompress(embedded.FILE.read_bytes())
    assert content == make_fashion_mnist_mini.make(ORIGINAL)


@needs_original
def test_examples_are_the_first_of_each_class():
    images, labels = make_fashion_mnist_mini._first_of_each_class(ORIGINAL, "t10k", 3)
    all_labels = make_fashion_mnist_mini._read_idx(ORIGINAL / "t10k-labels-idx1-ubyte.gz", header=8)
    all_images = make_fashion_mnist_mini._read_idx(
        ORIGINAL / "t10k-images-idx3-ubyte.gz", header=16
    )
    seen = [0] * 10
    expected = []
    for index, label in enumerate(all_labels):
        seen[label] += 1
        if seen[label] <= 3:
            expected.append(index)
    np.testing.assert_array_equal(labels, all_labels[expected])
    np.testing.assert_array_equal(images, all_images.reshape(-1, 28, 28, 1)[expected])


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped", "other"])
def test_damaged_file(damage, tmp_path, monkeypatch):
    content = bytearray(embedded.FILE.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
    path = tmp_path / "file.xz"
    if damage != "missing":
        path.write_bytes(
            {"truncated": content[:1000], "flipped": content, "other": b"text"}[damage]
        )
    monkeypatch.setattr(embedded, "FILE", path)
    with pytest.raises(
        data.DataError, match="fashion_mnist_mini is damaged .*: reinstall jaxkd-distill"
    ):
        data.load("fashion_mnist_mini")


def test_licence_is_beside_the_file():
    notice = embedded.FILE.with_name("fashion_mnist_mini.LICENSE").read_text()
    assert "Copyright (c) 2017 Zalando SE, https://tech.zalando.com" in notice
    assert "Permission is hereby granted, free of charge" in notice
