"""The same training on one device, on a mesh and by pmap: equal losses, weights and statistics."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkd import distill, losses, models
from jaxkd.distill.placement import MeshPlacement, PmapPlacement, make_mesh
from jaxkd.models.layers import BatchNorm

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


def whole_batch(student, teachers, batch, context):
    """Every value depends on every example of the batch."""
    (teacher,) = teachers
    relations = losses.relational_distance_loss(
        student.features["hidden"], teacher.features["hidden"]
    )
    soft = losses.distillation_loss(
        student.logits, teacher.logits, batch["labels"], temperature=2.0, alpha=0.5
    )
    return soft + 10 * relations


def noisy(key, inputs):
    return inputs + 0.1 * jax.random.normal(key, inputs.shape)


def stepped(placement, batch_size, steps, tx):
    """The losses, and the state that a training leaves."""
    model, key = models.from_linen(Net()), jax.random.key(0)
    student, teacher = (
        model.init(jax.random.key(seed), examples()["inputs"][:1]) for seed in (1, 2)
    )
    make_step = functools.partial(
        distill.make_train_step, model, tx, whole_batch, teachers=[model], augment=noisy
    )
    indices = np.random.default_rng(1).integers(0, EXAMPLES, (steps, 1, batch_size))
    state, values = placement.make_multi_step(make_step)(
        placement.put_states([distill.init_train_state(student, tx)]),
        placement.put_examples([(examples(), distill.BatchInfo())]),
        indices,
        placement.put_teachers([(teacher,)]),
        placement.put_keys([key]),
    )
    (state,) = placement.get_states(state, 1)
    return values[:, 0], state


def trained(placement, batch_size, steps=5):
    """The losses, and what a training leaves."""
    values, state = stepped(placement, batch_size, steps, optax.sgd(0.1, momentum=0.9))
    return values, state.variables


def gradient(placement, batch_size):
    """The first step's, as one float64 vector.

    The optimizer keeps it as its state: the difference of the weights would hold the rounding of the weights as well.
    """
    zeros = functools.partial(jax.tree.map, jnp.zeros_like)
    keeping = optax.GradientTransformation(zeros, lambda found, *_: (found, found))
    _, state = stepped(placement, batch_size, 1, keeping)
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state.opt_state)]).astype(
        np.float64
    )


@functools.cache
def gradient_of_one_device(batch_size):
    return gradient(one_device(), batch_size)


def one_device():
    return MeshPlacement(make_mesh(devices=jax.devices()[:1]))


WAYS = {
    "two": lambda: MeshPlacement(make_mesh(devices=jax.devices()[:2])),
    "eight": lambda: MeshPlacement(make_mesh()),
    "four by two": lambda: MeshPlacement(make_mesh(model=2)),
    "pmap": PmapPlacement,
}


@pytest.mark.parametrize("way", WAYS)
def test_many_devices_train_as_one_does(way):
    chex.assert_trees_all_close(
        trained(WAYS[way](), 16), trained(one_device(), 16), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("way", ["eight", "four by two"])
def test_a_batch_that_the_devices_do_not_divide_is_that_of_one_device(way):
    chex.assert_trees_all_close(
        trained(WAYS[way](), 13), trained(one_device(), 13), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("way", "batch_size"),
    [("eight", 16), ("eight", 13), ("four by two", 16), ("four by two", 13), ("pmap", 16)],
)
def test_gradient_over_many_devices_is_that_of_one(way, batch_size):
    found, wanted = gradient(WAYS[way](), batch_size), gradient_of_one_device(batch_size)
    assert np.linalg.norm(found - wanted) <= 1e-6 * np.linalg.norm(wanted)


def test_pmap_refuses_a_batch_that_it_cannot_divide():
    with pytest.raises(ValueError, match="cannot divide a batch of 13 among 8 devices"):
        trained(PmapPlacement(), 13)


def test_a_loop_on_the_device_takes_the_steps_of_a_loop_outside(monkeypatch):
    monkeypatch.setattr(MeshPlacement, "steps_per_call", 4)
    looped = trained(one_device(), 16, steps=6)
    monkeypatch.undo()
    assert one_device().steps_per_call == 1
    chex.assert_trees_all_close(looped, trained(one_device(), 16, steps=6), rtol=1e-6, atol=1e-6)


def test_the_loop_on_the_device_compiles_once_for_all_numbers_of_steps(monkeypatch):
    monkeypatch.setattr(MeshPlacement, "steps_per_call", 4)
    placement, model, tx = one_device(), models.from_linen(Net()), optax.sgd(0.1)
    counted = chex.assert_max_traces(
        lambda s, t, batch, context: losses.hard_cross_entropy(s.logits, batch["labels"]), n=1
    )
    multi_step = placement.make_multi_step(
        functools.partial(distill.make_train_step, model, tx, counted)
    )
    variables = model.init(jax.random.key(0), examples()["inputs"][:1])
    state = placement.put_states([distill.init_train_state(variables, tx)])
    placed = placement.put_examples([(examples(), distill.BatchInfo())])
    for steps in (3, 1, 2):
        indices = np.zeros((steps, 1, 8), int)
        state, values = multi_step(state, placed, indices, (), jax.random.key(0))
        assert values.shape == (steps, 1)
    assert int(state.step) == 6


def test_each_device_holds_its_part_of_examples_and_teacher():
    placement = MeshPlacement(make_mesh(model=2))
    images = placement.put_array(np.arange(10, dtype=np.float32))
    assert images.shape == (16,) and {shard.data.shape for shard in images.addressable_shards} == {
        (2,)
    }
    np.testing.assert_array_equal(images, [*range(10), 9, 9, 9, 9, 9, 9])
    teacher = placement.put_teachers(
        [{"kernel": np.zeros((4, 6)), "odd": np.zeros(3), "scalar": np.zeros(())}]
    )
    shapes = {name: leaf.addressable_data(0).shape for name, leaf in teacher.items()}
    assert shapes == {"kernel": (4, 3), "odd": (3,), "scalar": ()}


def test_devices_that_fill_no_rows_are_refused():
    with pytest.raises(ValueError, match="model=3 does not divide the number of devices, 8"):
        make_mesh(model=3)


def test_own_statistics_are_of_the_whole_batch_or_else_they_differ():
    """The comparison above can fail: with Flax's own batch norm, which knows no axis, pmap is another training."""

    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Dense(3)(nn.BatchNorm(use_running_average=not train)(x))

    def train_with(placement):
        model, tx = models.from_linen(Plain()), optax.sgd(0.1)
        make_step = functools.partial(
            distill.make_train_step,
            model,
            tx,
            lambda s, t, b, context: jnp.square(s.logits).sum(-1),
        )
        variables = model.init(jax.random.key(0), examples()["inputs"][:1])
        state, _ = placement.make_multi_step(make_step)(
            placement.put_states([distill.init_train_state(variables, tx)]),
            placement.put_examples([(examples(), distill.BatchInfo())]),
            np.arange(16)[None, None],
            placement.put_teachers([()]),
            jax.random.key(0),
        )
        (state,) = placement.get_states(state, 1)
        return state.batch_stats["BatchNorm_0"]["var"]

    assert np.abs(train_with(PmapPlacement()) - train_with(one_device())).max() > 1e-3
