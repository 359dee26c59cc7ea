import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.data import crop_and_flip, random_crop, random_flip

AUGMENTATIONS = [random_crop, random_flip, crop_and_flip]
KEY = jax.random.key(3)


@pytest.fixture
def images():
    return jnp.asarray(np.random.default_rng(0).integers(1, 256, (16, 8, 6, 3), np.uint8))


def all_crops(image, padding):
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    height, width = image.shape[:2]
    offsets = itertools.product(range(2 * padding + 1), repeat=2)
    return {(top, left): padded[top : top + height, left : left + width] for top, left in offsets}


@pytest.mark.parametrize("padding", [1, 2, 4])
def test_crop_is_a_crop_of_the_padded_image(images, padding):
    cropped = random_crop(KEY, images, padding=padding)
    for image, crop in zip(np.asarray(images), np.asarray(cropped), strict=True):
        assert any(np.array_equal(crop, other) for other in all_crops(image, padding).values())


def test_crop_offsets_are_uniform():
    images = jnp.arange(1, 26, dtype=jnp.uint8).reshape(1, 5, 5, 1).repeat(900, axis=0)
    crops = np.asarray(random_crop(KEY, images, padding=1))
    counts = {
        offset: (crops == crop).all((1, 2, 3)).sum()
        for offset, crop in all_crops(np.asarray(images[0]), 1).items()
    }
    assert sum(counts.values()) == 900
    assert min(counts.values()) > 60 and max(counts.values()) < 140  # 100 expected, deviation 9.4


def test_crop_without_padding_changes_nothing(images):
    chex.assert_trees_all_equal(random_crop(KEY, images, padding=0), images)


def test_default_padding_is_four(images):
    chex.assert_trees_all_equal(random_crop(KEY, images), random_crop(KEY, images, padding=4))
    chex.assert_trees_all_equal(crop_and_flip(KEY, images), crop_and_flip(KEY, images, padding=4))


def test_flip_mirrors_columns_of_half_the_images():
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (1000, 2, 3, 1), np.uint8))
    flipped = np.asarray(random_flip(KEY, images))
    mirrored = (flipped == np.asarray(images)[:, :, ::-1]).all((1, 2, 3))
    unchanged = (flipped == np.asarray(images)).all((1, 2, 3))
    assert (mirrored | unchanged).all()
    assert 430 < mirrored.sum() < 570


def test_crop_and_flip_use_separate_keys(images):
    expected = random_flip(
        jax.random.fold_in(KEY, 1), random_crop(jax.random.fold_in(KEY, 0), images, padding=2)
    )
    chex.assert_trees_all_equal(crop_and_flip(KEY, images, padding=2), expected)


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_draw_depends_on_position_alone(augment, images):
    chex.assert_trees_all_equal(augment(KEY, images[:5]), augment(KEY, images)[:5])
    chex.assert_trees_all_equal(augment(KEY, images.at[0].set(0))[1:], augment(KEY, images)[1:])


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_draws_differ_between_examples_and_keys(augment):
    images = jnp.arange(1, 37, dtype=jnp.uint8).reshape(1, 6, 6, 1).repeat(32, axis=0)
    augmented = np.asarray(augment(KEY, images))
    assert len({image.tobytes() for image in augmented}) > 1
    assert not np.array_equal(augmented, augment(jax.random.key(4), images))


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_jit_equals_eager_and_keeps_the_dtype(augment, dtype, images):
    images = images.astype(dtype)
    augmented = jax.jit(augment)(KEY, images)
    assert augmented.dtype == dtype and augmented.shape == images.shape
    chex.assert_trees_all_equal(augmented, augment(KEY, images))


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_vmap_equals_a_loop(augment, images):
    stacked = jnp.stack([images, images[::-1]])
    keys = jax.random.split(KEY, 2)
    expected = jnp.stack([augment(key, batch) for key, batch in zip(keys, stacked, strict=True)])
    chex.assert_trees_all_equal(jax.vmap(augment)(keys, stacked), expected)


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_batch_of_wrong_rank(augment, images):
    with pytest.raises(ValueError, match=r"shape \(8, 6, 3\), expected \[B, H, W, C\]"):
        augment(KEY, images[0])


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_images_with_channels_first(augment):
    """Rows of pixels would be taken for columns, and channels for rows."""
    with pytest.raises(ValueError, match=r"\[N, C, H, W\]: pass images.transpose\(0, 2, 3, 1\)"):
        augment(KEY, jnp.zeros((2, 3, 8, 8)))


@pytest.mark.parametrize("augment", [random_crop, crop_and_flip])
def test_padding_of_more_than_an_image(augment, images):
    with pytest.raises(ValueError, match="padding is 7, more than the 8 x 6 pixels of an image"):
        augment(KEY, images, padding=7)
    assert augment(KEY, images, padding=6).shape == images.shape


@pytest.mark.parametrize("augment", [random_crop, crop_and_flip])
def test_negative_padding(augment, images):
    with pytest.raises(ValueError, match="padding is -1: it cannot be negative"):
        augment(KEY, images, padding=-1)
