"""Images of folders and TensorFlow datasets that are read batch by batch."""

import numpy as np
import pytest
from PIL import Image

from jaxkd import data
from jaxkd.data import memory
from jaxkd.data.records import Column
from jaxkd.data.statistics import channel_statistics

# The images are few.
pytestmark = pytest.mark.filterwarnings("ignore:.*classes are not in the validation set")


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 3)):
        for name in ("cat", "dog"):
            folder = tmp_path / "photos" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (9, 7, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "photos"


def assert_same(streamed, loaded):
    assert streamed.class_names == loaded.class_names
    for split, expected in zip(streamed[:3], loaded[:3], strict=True):
        assert isinstance(split.images, Column)
        assert (split.images.shape, split.images.dtype) == (expected.images.shape, np.uint8)
        np.testing.assert_array_equal(split.images[:], expected.images)
        np.testing.assert_array_equal(split.labels, expected.labels)
        assert split.labels.dtype == expected.labels.dtype


def test_folder_has_the_same_splits(photos):
    streamed = data.load(photos, image_size=8, stream=True)
    assert_same(streamed, data.load(photos, image_size=8, stream=False))
    first, second = (
        data.load(photos, image_size=side, stream=True).train.images for side in (8, 6)
    )
    assert first.digest == streamed.train.images.digest != second.digest


def test_statistics_are_those_of_a_sample(photos):
    images = data.load(photos, image_size=8, stream=True).train.images
    for value, expected in zip(
        channel_statistics(images), channel_statistics(images[:]), strict=True
    ):
        np.testing.assert_array_equal(value, expected)


def test_labelled_subset_of_a_seed_stays_on_disk(photos):
    examples = data.load(photos, image_size=8, stream=True).train.examples
    labelled, partly = data.few_labels(examples, 4)
    assert isinstance(labelled(0)["inputs"], Column)
    assert labelled(0)["inputs"] is labelled(0)["inputs"] is not labelled(1)["inputs"]
    assert partly(0)["inputs"] is examples["inputs"]
    rows = np.flatnonzero(partly(0)["labelled"])
    np.testing.assert_array_equal(labelled(0)["inputs"][:], examples["inputs"][rows])


def test_damaged_file_is_named_when_it_is_read(photos):
    (photos / "train" / "dog" / "3.png").write_bytes(b"")
    images = data.load(photos, image_size=8, stream=True).train.images
    with pytest.raises(data.DataError, match=r"cannot read the image .*dog/3\.png"):
        images[:]


@pytest.mark.parametrize(("total", "is_streamed"), [(2 * 30 * 8 * 8 * 3, False), (11_000, True)])
def test_streams_what_would_take_more_than_half_of_the_memory(
    photos, monkeypatch, recwarn, total, is_streamed
):
    monkeypatch.setattr(memory, "total_memory", lambda: total)
    images = data.load(photos, image_size=8).train.images
    assert isinstance(images, Column) == is_streamed
    said = [str(w.message) for w in recwarn]
    assert any("30 images take 6 kB, more than 50% of the 11 kB" in line for line in said) == (
        is_streamed
    )
    assert isinstance(data.load(photos, image_size=8, stream=False).train.images, np.ndarray)


def test_memory_of_a_container_counts(tmp_path, monkeypatch):
    total = memory.total_memory()
    limit = tmp_path / "memory.max"
    limit.write_text("1000000\n")
    monkeypatch.setattr(memory, "_LIMITS", (str(limit), str(tmp_path / "missing")))
    assert memory.total_memory() == 1_000_000 < total
    limit.write_text("max\n")
    assert memory.total_memory() > 1_000_000
