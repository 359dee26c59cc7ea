"""The same training on one device, on a mesh and by pmap: equal losses, weights and statistics."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkd import losses, models, parallel, train
from jaxkd.models.layers import BatchNorm
from jaxkd.parallel import Mapped, Sharded, make_mesh

EXAMPLES = 37
"""No number of devices divides it."""


class Net(nn.Module):
    """Batch norm, and features for a loss that compares examples."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(BatchNorm(use_running_average=not train)(nn.Dense(16)(x)))
        return models.Outputs(nn.Dense(3)(x), {"hidden": x})


def examples():
    rng = np.random.default_rng(0)
    labels = np.arange(EXAMPLES, dtype=np.int32) % 3
    return {"inputs": rng.normal(size=(EXAMPLES, 5)).astype(np.float32), "labels": labels}


def whole_batch(student, teachers, batch):
    """Every value depends on every example of the batch."""
    (teacher,) = teachers
    relations = losses.relational_distance_loss(student.features["hidden"], teacher.features["hidden"])
    soft = losses.distillation_loss(student.logits, teacher.logits, batch["labels"], temperature=2.0, alpha=0.5)
    return soft + 10 * relations


def noisy(key, inputs):
    return inputs + 0.1 * jax.random.normal(key, inputs.shape)


def stepped(devices, batch_size, steps, tx):
    """The losses, and the state that a training leaves."""
    model, key = models.from_linen(Net()), jax.random.key(0)
    student, teacher = (model.init(jax.random.key(seed), examples()["inputs"][:1]) for seed in (1, 2))
    make_step = functools.partial(train.make_train_step, model, tx, whole_batch, teachers=[model], augment=noisy)
    state = devices.place(train.make_state(student, tx))
    given = {name: devices.place_examples(array) for name, array in examples().items()}
    indices = np.random.default_rng(1).integers(0, EXAMPLES, (steps, batch_size))
    advance = devices.make_advance(make_step)
    state, values = advance(state, given, indices, (devices.place_teacher(teacher),), key)
    return values, parallel.local(state)


def trained(devices, batch_size, steps=5):
    """The losses, and what a training leaves."""
    values, state = stepped(devices, batch_size, steps, optax.sgd(0.1, momentum=0.9))
    return values, state.variables


def gradient(devices, batch_size):
    """The first step's, as one float64 vector.

    The optimizer keeps it as its state: the difference of the weights would hold the rounding of the weights as well.
    """
    zeros = functools.partial(jax.tree.map, jnp.zeros_like)
    keeping = optax.GradientTransformation(zeros, lambda found, *_: (found, found))
    _, state = stepped(devices, batch_size, 1, keeping)
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state.opt_state)]).astype(np.float64)


@functools.cache
def gradient_of_one_device(batch_size):
    return gradient(one_device(), batch_size)


def one_device():
    return Sharded(make_mesh(devices=jax.devices()[:1]))


WAYS = {
    "two": lambda: Sharded(make_mesh(devices=jax.devices()[:2])),
    "eight": lambda: Sharded(make_mesh()),
    "four by two": lambda: Sharded(make_mesh(model=2)),
    "pmap": Mapped,
}


@pytest.mark.parametrize("way", WAYS)
def test_many_devices_train_as_one_does(way):
    chex.assert_trees_all_close(trained(WAYS[way](), 16), trained(one_device(), 16), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", ["eight", "four by two"])
def test_a_batch_that_the_devices_do_not_divide_is_that_of_one_device(way):
    chex.assert_trees_all_close(trained(WAYS[way](), 13), trained(one_device(), 13), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("way", "batch_size"), [("eight", 16), ("eight", 13), ("four by two", 16), ("four by two", 13), ("pmap", 16)]
)
def test_gradient_over_many_devices_is_that_of_one(way, batch_size):
    found, wanted = gradient(WAYS[way](), batch_size), gradient_of_one_device(batch_size)
    assert np.linalg.norm(found - wanted) <= 1e-6 * np.linalg.norm(wanted)


def test_pmap_refuses_a_batch_that_it_cannot_divide():
    with pytest.raises(ValueError, match="batch of 13 into equal parts for 8 devices"):
        trained(Mapped(), 13)


def test_a_loop_on_the_device_takes_the_steps_of_a_loop_outside(monkeypatch):
    monkeypatch.setattr(Sharded, "chunk", 4)
    looped = trained(one_device(), 16, steps=6)
    monkeypatch.undo()
    assert one_device().chunk == 1
    chex.assert_trees_all_close(looped, trained(one_device(), 16, steps=6), rtol=1e-6, atol=1e-6)


def test_the_loop_on_the_device_compiles_once_for_all_numbers_of_steps(monkeypatch):
    monkeypatch.setattr(Sharded, "chunk", 4)
    devices, model, tx = one_device(), models.from_linen(Net()), optax.sgd(0.1)
    counted = chex.assert_max_traces(lambda s, t, batch: losses.hard_cross_entropy(s.logits, batch["labels"]), n=1)
    advance = devices.make_advance(functools.partial(train.make_train_step, model, tx, counted))
    state = devices.place(train.make_state(model.init(jax.random.key(0), examples()["inputs"][:1]), tx))
    given = {name: devices.place_examples(array) for name, array in examples().items()}
    for steps in (3, 1, 2):
        state, values = advance(state, given, np.zeros((steps, 8), int), (), jax.random.key(0))
        assert values.shape == (steps,)
    assert int(state.step) == 6


def test_each_device_holds_its_part_of_examples_and_teacher():
    devices = Sharded(make_mesh(model=2))
    images = devices.place_examples(np.arange(10, dtype=np.float32))
    assert images.shape == (16,) and {shard.data.shape for shard in images.addressable_shards} == {(2,)}
    np.testing.assert_array_equal(images, [*range(10), 9, 9, 9, 9, 9, 9])
    teacher = devices.place_teacher({"kernel": np.zeros((4, 6)), "odd": np.zeros(3), "scalar": np.zeros(())})
    shapes = {name: leaf.addressable_data(0).shape for name, leaf in teacher.items()}
    assert shapes == {"kernel": (4, 3), "odd": (3,), "scalar": ()}


def test_devices_that_fill_no_rows_are_refused():
    with pytest.raises(ValueError, match="8 devices cannot be divided into rows of 3"):
        make_mesh(model=3)


def test_own_statistics_are_of_the_whole_batch_or_else_they_differ():
    """The comparison above can fail: with Flax's own batch norm, which knows no axis, pmap is another training."""

    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Dense(3)(nn.BatchNorm(use_running_average=not train)(x))

    def train_with(devices):
        model, tx = models.from_linen(Plain()), optax.sgd(0.1)
        step = functools.partial(train.make_train_step, model, tx, lambda s, t, b: jnp.square(s.logits).sum(-1))
        state = devices.place(train.make_state(model.init(jax.random.key(0), examples()["inputs"][:1]), tx))
        given = {name: devices.place_examples(array) for name, array in examples().items()}
        state, _ = devices.make_advance(step)(state, given, np.arange(16)[None], (), jax.random.key(0))
        return parallel.local(state).batch_stats["BatchNorm_0"]["var"]

    assert np.abs(train_with(Mapped()) - train_with(one_device())).max() > 1e-3
