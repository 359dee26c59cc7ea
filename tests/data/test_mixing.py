"""Tests of mixup and CutMix: values, weights, dtypes, labels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import data

KEY = jax.random.key(0)
IMAGES = np.random.default_rng(0).integers(0, 256, (16, 12, 10, 3), np.uint8)


def test_mixup_blends_with_the_partner():
    mixed = data.mixup(KEY, jnp.asarray(IMAGES))
    assert mixed.inputs.dtype == jnp.uint8
    weight = np.asarray(mixed.mix.weight, np.float64)[:, None, None, None]
    blended = weight * IMAGES + (1 - weight) * IMAGES[mixed.mix.partner]
    np.testing.assert_allclose(mixed.inputs, blended, atol=0.51)
    assert sorted(mixed.mix.partner.tolist()) == [*range(16)]


def test_cutmix_pastes_a_rectangle_of_the_partner():
    mixed = data.cutmix(KEY, jnp.asarray(IMAGES))
    for i, (image, partner) in enumerate(zip(mixed.inputs, mixed.mix.partner, strict=True)):
        image = np.asarray(image)
        is_pasted = (image == IMAGES[partner]).all(-1) & (image != IMAGES[i]).any(-1)
        is_own = (image == IMAGES[i]).all(-1)
        assert (is_pasted | is_own).all()
        if partner != i:
            rows, columns = is_pasted.any(1), is_pasted.any(0)
            np.testing.assert_array_equal(is_pasted, rows[:, None] & columns[None])
            assert mixed.mix.weight[i] == pytest.approx(1 - is_pasted.mean(), abs=1e-6)


@pytest.mark.parametrize("mix", [data.mixup, data.cutmix])
def test_weights_follow_the_beta_distribution(mix):
    images = jnp.zeros((4000, 8, 8, 1))
    weights = np.asarray(mix(KEY, images, alpha=1.0).mix.weight)
    assert (weights >= 0).all() and (weights <= 1).all()
    # That of CutMix is larger, as rectangles are cut at the border.
    low, high = (0.48, 0.52) if mix is data.mixup else (0.5, 0.75)
    assert low < weights.mean() < high
    small = np.asarray(data.mixup(KEY, images, alpha=0.1).mix.weight)
    assert ((small < 0.05) | (small > 0.95)).mean() > 0.7


@pytest.mark.parametrize("mix", [data.mixup, data.cutmix])
def test_key_decides(mix):
    first, second = mix(KEY, jnp.asarray(IMAGES)), mix(KEY, jnp.asarray(IMAGES))
    other = mix(jax.random.key(1), jnp.asarray(IMAGES))
    np.testing.assert_array_equal(first.inputs, second.inputs)
    assert (first.inputs != other.inputs).any()


def test_labels_are_mixed_with_the_same_weights():
    mixed = data.mixup(KEY, jnp.asarray(IMAGES))
    labels = jnp.arange(16) % 5
    targets = data.mix_labels(labels, mixed.mix, 5)
    np.testing.assert_allclose(targets.sum(1), 1, atol=1e-6)
    expected = np.zeros((16, 5))
    for i, (partner, weight) in enumerate(zip(*mixed.mix, strict=True)):
        expected[i, labels[i]] += weight
        expected[i, labels[partner]] += 1 - weight
    np.testing.assert_allclose(targets, expected, atol=1e-6)


@pytest.mark.parametrize("mix", [data.mixup, data.cutmix])
def test_bad_arguments(mix):
    with pytest.raises(ValueError, match="alpha is 0.* must be above 0"):
        mix(KEY, jnp.zeros((2, 4, 4, 1)), alpha=0.0)
    with pytest.raises(ValueError, match="expected .B, H, W, C."):
        mix(KEY, jnp.zeros((2, 4)))
    with pytest.raises(TypeError, match="got a dict: of a dict of inputs, mix each in an augment"):
        mix(KEY, {"image": jnp.zeros((2, 4, 4, 1))})


def test_labels_that_cannot_be_mixed():
    with pytest.raises(TypeError, match="context.mix is None unless the stage has an augment"):
        data.mix_labels(jnp.arange(2), None, 3)
    mix = data.Mix(jnp.array([0, 1, 2]), jnp.ones(3))
    targets = np.asarray(data.mix_labels(jnp.array([2, -1, 3]), mix, 3))
    np.testing.assert_array_equal(targets, [[0, 0, 1], [0, 0, 0], [np.nan] * 3])


def test_views_cannot_mix():
    images = jnp.zeros((4, 8, 8, 1))
    with pytest.raises(ValueError, match="mixup and cutmix mix the examples of a batch, but views"):
        data.views.augment_views(data.mixup, KEY, images, jnp.arange(4), 0)
