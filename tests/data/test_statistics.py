import tracemalloc

import numpy as np
import pytest

from jaxkd.data import channel_statistics, statistics


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (7, 5, 6, 3), np.uint8)


def test_value_by_hand():
    mean, std = channel_statistics(np.array([0, 255, 255, 255], np.uint8).reshape(1, 2, 2, 1))
    np.testing.assert_allclose(mean, [0.75], rtol=1e-6)
    np.testing.assert_allclose(std, [np.sqrt(3) / 4], rtol=1e-6)


@pytest.mark.parametrize("chunk_size", [1, 100, 10**9])
def test_equals_float64_reference(images, chunk_size, monkeypatch):
    monkeypatch.setattr(statistics, "_VALUES_PER_CHUNK", chunk_size)
    mean, std = channel_statistics(images)
    scaled = images.astype(np.float64) / 255
    np.testing.assert_allclose(mean, scaled.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(std, scaled.std((0, 1, 2)), rtol=1e-6)
    assert mean.dtype == std.dtype == np.float32


@pytest.mark.parametrize("value", [0, 77, 255])
def test_constant_channel_has_deviation_one(images, value):
    images[..., 1] = value
    mean, std = channel_statistics(images)
    assert std[1] == 1 and std[0] < 0.5
    np.testing.assert_allclose(mean[1], value / 255, rtol=1e-6)


def test_faint_channel_keeps_its_deviation():
    images = np.full((1000, 32, 32, 1), 77, np.uint8)
    images[0, 0, 0, 0] = 78
    np.testing.assert_allclose(
        channel_statistics(images)[1], images.astype(np.float64).std() / 255, rtol=1e-5
    )


def test_memory_stays_below_a_hundred_megabytes():
    images = np.zeros((20_000, 32, 32, 3), np.uint8)
    tracemalloc.start()
    channel_statistics(images)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6


def test_wrong_images(images):
    with pytest.raises(TypeError, match="images are float32, expected uint8"):
        channel_statistics(images.astype(np.float32))
    with pytest.raises(ValueError, match=r"shape \(5, 6, 3\), expected \[N, H, W, C\]"):
        channel_statistics(images[0])
    with pytest.raises(ValueError, match="at least one pixel"):
        channel_statistics(images[:0])


@pytest.mark.parametrize("shape", [(8, 3, 32, 48), (8, 1, 28, 28), (8, 4, 16, 16)])
def test_channels_before_the_height_are_refused(shape):
    message = r"seem to be \[N, C, H, W\]: pass images.transpose\(0, 2, 3, 1\)"
    with pytest.raises(ValueError, match=message):
        channel_statistics(np.zeros(shape, np.uint8))


@pytest.mark.parametrize("shape", [(8, 3, 32, 1), (8, 1, 28, 9), (8, 4, 4, 4), (8, 28, 28, 13)])
def test_low_images_and_many_channels_are_taken(shape):
    assert channel_statistics(np.zeros(shape, np.uint8))[0].shape == shape[-1:]


def test_a_list_of_images_is_named():
    with pytest.raises(TypeError, match="images are a list: make one array of them by np.stack"):
        channel_statistics([np.zeros((4, 4, 1), np.uint8)])
