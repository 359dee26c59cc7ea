"""Which examples a step sees depends on key and step alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.distill import _batches as batches


@pytest.mark.parametrize(("examples", "batch_size"), [(10, 4), (10, 5), (3, 8), (1, 2), (7, 7)])
def test_epochs_are_permutations_and_every_batch_is_full(examples, batch_size):
    select = batches.make_order(jax.random.key(0), examples, batch_size)
    seen = [select(step) for step in range(4 * examples)]
    assert {one.shape for one in seen} == {(batch_size,)}
    stream = np.concatenate(seen)
    for epoch in range(len(stream) // examples):
        assert sorted(stream[epoch * examples : (epoch + 1) * examples]) == list(range(examples))


def test_any_step_can_be_asked_for_first():
    in_turn = batches.make_order(jax.random.key(0), 100, 32)
    expected = [in_turn(step) for step in range(12)]
    for step in (11, 0, 7):
        np.testing.assert_array_equal(
            batches.make_order(jax.random.key(0), 100, 32)(step), expected[step]
        )


def test_epochs_and_keys_differ():
    select, other = (batches.make_order(jax.random.key(key), 100, 100) for key in (0, 1))
    assert (select(0) != select(1)).any() and (select(0) != other(0)).any()


def test_placer_puts_an_array_on_the_device_once():
    place, array = batches.DeviceArrays(jnp.asarray).get, np.arange(3)
    assert place(array) is place(array)
    np.testing.assert_array_equal(place(array), array)


def test_placer_cuts_the_last_axis_and_keeps_each_width():
    place, array = batches.DeviceArrays(jnp.asarray).get, np.arange(12).reshape(2, 6)
    assert place(array, 4) is place(array, 4)
    np.testing.assert_array_equal(place(array, 4), array[:, :4])
    np.testing.assert_array_equal(place(array), array)
