"""A view of an example depends on its key, number and index alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.data import crop_and_flip
from jaxkd.data.views import Views, augment_views

KEY = jax.random.key(3)
IMAGES = np.random.default_rng(0).integers(1, 256, (10, 6, 5, 1), np.uint8)


def add_integers(key, inputs):
    return inputs + jax.random.randint(key, inputs.shape, 0, 9, inputs.dtype)


def add_noise(key, inputs):
    return inputs + 0.1 * jax.random.normal(key, inputs.shape)


VIEWS = Views(add_integers, KEY, 3)


@pytest.mark.parametrize(("augment", "dtype"), [(crop_and_flip, np.uint8), (add_noise, np.float32)])
def test_view_does_not_depend_on_the_rest_of_the_batch(augment, dtype):
    images = IMAGES.astype(dtype)
    indices = np.array([4, 0, 9, 4, 7, 2, 1])
    views = np.array([0, 1, 2, 1, 0, 2, 1])
    draw = jax.jit(functools.partial(augment_views, augment, KEY))
    batch = np.asarray(draw(images[indices], indices, views))
    assert batch.dtype == dtype and batch.shape == (7, 6, 5, 1)
    order = np.array([6, 2, 0, 5, 1, 4, 3])
    reordered = draw(images[indices[order]], indices[order], views[order])
    np.testing.assert_array_equal(reordered, batch[order])
    for i in range(7):
        row = slice(i, i + 1)
        for view in (views[row], views[i]):
            alone = draw(images[indices[row]], indices[row], view)
            np.testing.assert_array_equal(alone, batch[row])


def test_view_is_drawn_by_key_view_and_index():
    draw = jax.jit(functools.partial(augment_views, add_integers))
    drawn = draw(KEY, IMAGES[[8]], jnp.array([8]), jnp.array([2]))
    key = jax.random.fold_in(jax.random.fold_in(KEY, 2), 8)
    expected = add_integers(key, jnp.asarray(IMAGES[[8]]))
    np.testing.assert_array_equal(drawn, expected)
    for key, index, view in ((KEY, 8, 1), (KEY, 7, 2), (jax.random.key(4), 8, 2)):
        assert (draw(key, IMAGES[[8]], jnp.array([index]), jnp.array([view])) != expected).any()


def test_epochs_show_the_views_in_turn():
    assert [VIEWS.at(epoch) for epoch in range(5)] == [0, 1, 2, 0, 1]
    np.testing.assert_array_equal(VIEWS.at(np.array([2, 3, 7])), [2, 0, 1])
    assert jax.jit(VIEWS.at)(jnp.int32(3)).dtype == jnp.int32


def test_there_must_be_at_least_one_view():
    message = r"cannot be cached for views that are drawn at every step: pass views=1 or more"
    with pytest.raises(ValueError, match=message):
        Views(crop_and_flip, KEY, 0)


@pytest.mark.parametrize(
    ("indices", "views"), [([0, 1], 0), ([0, 1, 2], [0, 1]), (0, 0), ([0, 1, 2], [0])]
)
def test_there_must_be_one_index_and_view_per_example(indices, views):
    message = r"must have one entry per example of the inputs \(3, 6, 5, 1\)"
    with pytest.raises(ValueError, match=message):
        augment_views(crop_and_flip, KEY, IMAGES[:3], np.array(indices), np.array(views))


def test_rbg_keys_are_refused():
    message = r"the draws of an rbg key depend on the batch: make the key with impl='threefry2x32'"
    with pytest.raises(ValueError, match=message):
        augment_views(crop_and_flip, jax.random.key(0, impl="rbg"), IMAGES[:3], np.arange(3), 0)
