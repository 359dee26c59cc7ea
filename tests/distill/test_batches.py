"""The examples of a step depend on the key and the step alone, and arrays are placed once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.data.bucketing import LengthBuckets
from jaxkd.distill import _batches
from jaxkd.distill._batches import BATCHES_PER_POOL


@pytest.mark.parametrize(("num_examples", "batch_size"), [(10, 4), (10, 5), (3, 8), (1, 2), (7, 7)])
def test_epochs_are_permutations_and_every_batch_is_full(num_examples, batch_size):
    select = _batches.make_order(jax.random.key(0), num_examples, batch_size)
    batches = [select(step) for step in range(4 * num_examples)]
    assert {indices.shape for indices in batches} == {(batch_size,)}
    stream = np.concatenate(batches)
    for start in range(0, len(stream) - num_examples + 1, num_examples):
        assert sorted(stream[start : start + num_examples]) == list(range(num_examples))


def test_batch_does_not_depend_on_the_steps_before():
    select = _batches.make_order(jax.random.key(0), 100, 32)
    expected = [select(step) for step in range(12)]
    for step in (11, 0, 7):
        select_first = _batches.make_order(jax.random.key(0), 100, 32)
        np.testing.assert_array_equal(select_first(step), expected[step])


def test_epochs_and_keys_differ():
    select, select_other = (_batches.make_order(jax.random.key(key), 100, 100) for key in (0, 1))
    assert (select(0) != select(1)).any() and (select(0) != select_other(0)).any()


# Buckets


def test_batches_of_an_epoch_hold_each_example_once_among_those_of_its_length():
    lengths = np.random.default_rng(1).integers(1, 60, 64 * BATCHES_PER_POOL)
    select = _batches.make_bucketed_order(jax.random.key(0), lengths, 32)
    batches_per_epoch = 2 * BATCHES_PER_POOL
    batches = [select(step) for step in range(2 * batches_per_epoch)]
    for epoch in range(2):
        start = epoch * batches_per_epoch
        indices = np.concatenate(batches[start : start + batches_per_epoch])
        assert sorted(indices) == list(range(len(lengths)))
    assert np.median([np.ptp(lengths[indices]) for indices in batches]) <= 3
    first_lengths = [lengths[indices[0]] for indices in batches]
    assert first_lengths != sorted(first_lengths)


def test_bucketed_batch_does_not_depend_on_the_steps_before():
    lengths = np.random.default_rng(1).integers(1, 60, 500)
    select = _batches.make_bucketed_order(jax.random.key(3), lengths, 16)
    expected = [select(step) for step in range(80)]
    for step in (79, 0, 33):
        select_first = _batches.make_bucketed_order(jax.random.key(3), lengths, 16)
        np.testing.assert_array_equal(select_first(step), expected[step])


@pytest.mark.parametrize(("num_examples", "batch_size"), [(500, 16), (64, 32), (50, 16), (5, 16)])
def test_epochs_are_kept_for_views(num_examples, batch_size):
    lengths = np.random.default_rng(1).integers(1, 60, num_examples)
    key = jax.random.key(3)
    select = _batches.make_bucketed_order(key, lengths, batch_size, keep_epochs=True)
    plain = _batches.make_bucketed_order(key, lengths, batch_size)
    num_steps = 6 * num_examples // batch_size
    stream = np.concatenate([select(step) for step in range(num_steps)])
    # As the step counts views: by the position in the stream.
    for start in range(0, len(stream) - num_examples + 1, num_examples):
        assert sorted(stream[start : start + num_examples]) == list(range(num_examples))
    # Pools within one epoch are those without views.
    pool_size = max(1, min(BATCHES_PER_POOL, num_examples // batch_size))
    for step in range(num_steps):
        first = step // pool_size * pool_size * batch_size
        if first // num_examples == (first + pool_size * batch_size - 1) // num_examples:
            np.testing.assert_array_equal(select(step), plain(step))


def test_fewer_examples_than_a_batch_are_repeated():
    select = _batches.make_bucketed_order(jax.random.key(0), np.array([3, 1]), 8)
    assert sorted(select(0)) == [0] * 4 + [1] * 4


def test_students_of_a_group_share_the_bucket_of_the_longest_example():
    short, long = (np.tile((np.arange(12) < n).astype(np.int32), (6, 1)) for n in (3, 7))
    keys = [jax.random.key(seed) for seed in (0, 1)]
    buckets = LengthBuckets((4, 8, 12))
    selector = _batches.BatchSelector(keys, [short, long], 2, buckets)
    assert selector.select(0)[0] == 8
    alone = _batches.BatchSelector(keys[:1], [short], 2, buckets)
    length, indices = alone.select(0)
    assert length == 4
    np.testing.assert_array_equal(indices[0], selector.select(0)[1][0])


def test_students_without_buckets_have_their_own_order():
    keys = [jax.random.key(seed) for seed in (0, 1)]
    inputs = np.zeros((10, 3))
    selector = _batches.BatchSelector(keys, [inputs, inputs], 4, None)
    length, indices = selector.select(5)
    assert length is None
    for key, row in zip(keys, indices, strict=True):
        np.testing.assert_array_equal(row, _batches.make_order(key, 10, 4)(5))


# Arrays on the devices


def test_array_is_put_on_the_device_once():
    arrays = _batches.DeviceArrays(jnp.asarray)
    array = np.arange(3)
    assert arrays.get(array) is arrays.get(array)
    np.testing.assert_array_equal(arrays.get(array), array)


def test_last_axis_is_cut_and_each_length_is_kept():
    arrays = _batches.DeviceArrays(jnp.asarray)
    array = np.arange(12).reshape(2, 6)
    assert arrays.get(array, 4) is arrays.get(array, 4)
    np.testing.assert_array_equal(arrays.get(array, 4), array[:, :4])
    np.testing.assert_array_equal(arrays.get(array), array)
