"""The same training on one device, on a mesh and under pmap gives equal losses and weights."""

import functools
import inspect

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkd import distill, losses, models
from jaxkd.distill import placement as placement_module
from jaxkd.distill.placement import (
    MeshPlacement,
    Placement,
    PmapPlacement,
    StreamingPlacement,
    VectorizedPlacement,
    make_mesh,
    single_device,
)
from jaxkd.models.layers import BatchNorm
from small_plans import add_noise

NUM_EXAMPLES = 37
"""No number of devices divides it."""


class Net(nn.Module):
    """Batch norm, and features for a loss that compares examples."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(BatchNorm(use_running_average=not train)(nn.Dense(16)(x)))
        return models.Outputs(nn.Dense(3)(x), {"hidden": x})


def make_examples():
    rng = np.random.default_rng(0)
    labels = np.arange(NUM_EXAMPLES, dtype=np.int32) % 3
    return {"inputs": rng.normal(size=(NUM_EXAMPLES, 5)).astype(np.float32), "labels": labels}


def whole_batch_loss(student, teachers, batch, context):
    """Returns values each of which depends on every example of the batch."""
    (teacher,) = teachers
    relations = losses.relational_distance_loss(
        student.features["hidden"], teacher.features["hidden"]
    )
    divergences = losses.distillation_loss(
        student.logits, teacher.logits, batch["labels"], temperature=2.0, alpha=0.5
    )
    return divergences + 10 * relations


def take_steps(placement, batch_size, steps, tx):
    """Returns the losses of a training and its final state."""
    model = models.from_linen(Net())
    inputs = make_examples()["inputs"][:1]
    student, teacher = (model.init(jax.random.key(seed), inputs) for seed in (1, 2))
    make_step = functools.partial(
        distill.make_train_step, model, tx, whole_batch_loss, teachers=[model], augment=add_noise
    )
    indices = np.random.default_rng(1).integers(0, NUM_EXAMPLES, (steps, 1, batch_size))
    states, metrics = placement.make_multi_step(make_step)(
        placement.put_states([distill.init_train_state(student, tx)]),
        placement.put_examples([(make_examples(), distill.BatchInfo())]),
        indices,
        placement.put_teachers([(teacher,)]),
        placement.put_keys([jax.random.key(0)]),
    )
    (state,) = placement.get_states(states, 1)
    return metrics["loss"][:, 0], state


def train(placement, batch_size, steps=5):
    """Returns the losses and variables of a training, on the host."""
    values, state = take_steps(placement, batch_size, steps, optax.sgd(0.1, momentum=0.9))
    return jax.device_get((values, state.variables))


@functools.cache
def train_on_one_device(batch_size):
    return train(single_device(), batch_size)


def compute_gradient(placement, batch_size):
    """Returns the gradient of the first step as one float64 vector.

    The optimizer keeps it as its state. The difference of the weights before and after the step
    would have the rounding of the weights as well.
    """
    zeros = functools.partial(jax.tree.map, jnp.zeros_like)
    keep_gradient = optax.GradientTransformation(zeros, lambda gradient, *_: (gradient, gradient))
    _, state = take_steps(placement, batch_size, 1, keep_gradient)
    leaves = [np.ravel(leaf) for leaf in jax.tree.leaves(state.opt_state)]
    return np.concatenate(leaves).astype(np.float64)


@functools.cache
def compute_gradient_on_one_device(batch_size):
    return compute_gradient(single_device(), batch_size)


PLACEMENTS = {
    "two": lambda: MeshPlacement(make_mesh(devices=jax.devices()[:2])),
    "eight": lambda: MeshPlacement(make_mesh()),
    "copied": lambda: MeshPlacement(make_mesh(), max_copied_bytes=2**20),
    "four by two": lambda: MeshPlacement(make_mesh(model=2)),
    "pmap": PmapPlacement,
}


def get_members(class_):
    """Returns the public methods, with their parameters, and the properties of a class."""
    members = {}
    for name in dir(class_):
        if not name.startswith("_"):
            member = inspect.getattr_static(class_, name)
            if inspect.isfunction(member):
                member = [str(p) for p in inspect.signature(member).parameters.values()]
            else:
                member = "property"
            members[name] = member
    return members


@pytest.mark.parametrize(
    ("class_", "own"),
    [
        (MeshPlacement, {"mesh", "max_copied_bytes", "find_batch_rows", "put_batches"}),
        (PmapPlacement, set()),
        (VectorizedPlacement, {"mesh", "max_students"}),
    ],
)
def test_placements_have_the_members_of_the_protocol(class_, own):
    members = get_members(class_)
    # Fields without a default are not attributes of the class.
    members |= {field: "property" for field in class_.__dataclass_fields__}
    expected = get_members(Placement)
    assert {name: members.get(name) for name in expected} == expected
    assert members.keys() - expected.keys() == own - {"max_students"}
    if class_ is MeshPlacement:
        streaming = get_members(StreamingPlacement)
        assert {name: members.get(name) for name in streaming} == streaming


@pytest.mark.parametrize(("limit", "is_copied"), [(0, False), (127, False), (128, True)])
@pytest.mark.parametrize(
    "array",
    [
        np.zeros((16, 2), np.float32),
        np.zeros((16, 2), np.float64),
        jax.random.split(jax.random.key(0), 16),
    ],
)
def test_arrays_up_to_a_size_are_copied_to_every_device(array, limit, is_copied):
    placed = MeshPlacement(make_mesh(), max_copied_bytes=limit).put_array(array)
    assert placed.is_fully_replicated == is_copied and placed.shape == array.shape


def test_on_a_cpu_nothing_is_copied_by_default():
    assert not MeshPlacement(make_mesh()).put_array(np.zeros((8, 1))).is_fully_replicated


@pytest.mark.parametrize("make_placement", [single_device, PmapPlacement])
def test_placements_name_their_limits(make_placement):
    placement = make_placement()
    assert (placement.max_students, placement.steps_per_call) == (1, 1)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_many_devices_train_like_one(placement):
    expected = train_on_one_device(16)
    trained = train(PLACEMENTS[placement](), 16)
    chex.assert_trees_all_close(trained, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.thorough
@pytest.mark.parametrize("placement", ["eight", "four by two"])
def test_number_of_devices_need_not_divide_the_batch(placement):
    expected = train_on_one_device(13)
    trained = train(PLACEMENTS[placement](), 13)
    chex.assert_trees_all_close(trained, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("placement", "batch_size"),
    [("eight", 16), ("eight", 13), ("four by two", 16), ("four by two", 13), ("pmap", 16)],
)
def test_gradient_over_many_devices_is_that_of_one(placement, batch_size):
    gradient = compute_gradient(PLACEMENTS[placement](), batch_size)
    expected = compute_gradient_on_one_device(batch_size)
    assert np.linalg.norm(gradient - expected) <= 1e-6 * np.linalg.norm(expected)


def test_pmap_refuses_a_batch_that_it_cannot_divide():
    with pytest.raises(ValueError, match="cannot divide a batch of 13 among 8 devices"):
        train(PmapPlacement(), 13)


def test_loop_on_the_device_takes_the_steps_of_a_loop_on_the_host(monkeypatch):
    monkeypatch.setattr(MeshPlacement, "steps_per_call", 4)
    trained = train(single_device(), 16)
    monkeypatch.undo()
    assert single_device().steps_per_call == 1
    chex.assert_trees_all_close(trained, train_on_one_device(16), rtol=1e-6, atol=1e-6)


def test_loop_on_the_device_compiles_once_for_all_numbers_of_steps(monkeypatch):
    monkeypatch.setattr(MeshPlacement, "steps_per_call", 4)
    placement = single_device()
    model = models.from_linen(Net())
    tx = optax.sgd(0.1)
    loss = chex.assert_max_traces(
        lambda student, teachers, batch, context: losses.hard_cross_entropy(
            student.logits, batch["labels"]
        ),
        n=1,
    )
    multi_step = placement.make_multi_step(
        functools.partial(distill.make_train_step, model, tx, loss)
    )
    variables = model.init(jax.random.key(0), make_examples()["inputs"][:1])
    state = placement.put_states([distill.init_train_state(variables, tx)])
    examples = placement.put_examples([(make_examples(), distill.BatchInfo())])
    for steps in (3, 1, 2):
        indices = np.zeros((steps, 1, 8), int)
        state, metrics = multi_step(state, examples, indices, (), jax.random.key(0))
        assert metrics["loss"].shape == (steps, 1)
    assert int(state.step) == 6


def test_each_device_holds_its_part_of_examples_and_teacher():
    placement = MeshPlacement(make_mesh(model=2))
    images = placement.put_array(np.arange(10, dtype=np.float32))
    assert images.shape == (16,)
    assert {shard.data.shape for shard in images.addressable_shards} == {(2,)}
    np.testing.assert_array_equal(images, [*range(10), 9, 9, 9, 9, 9, 9])
    teacher = placement.put_teachers(
        [{"kernel": np.zeros((4, 6)), "odd": np.zeros(3), "scalar": np.zeros(())}]
    )
    shapes = {name: leaf.addressable_data(0).shape for name, leaf in teacher.items()}
    assert shapes == {"kernel": (4, 3), "odd": (3,), "scalar": ()}


def test_mesh_needs_full_rows():
    with pytest.raises(ValueError, match="model=3 does not divide the number of devices, 8"):
        make_mesh(model=3)


def test_pmap_with_a_batch_norm_that_ignores_the_axis_is_another_training():
    """The comparisons above can fail: Flax's own batch norm sees only its device's share."""

    class FlaxNet(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Dense(3)(nn.BatchNorm(use_running_average=not train)(x))

    def square_loss(student, teachers, batch, context):
        return jnp.square(student.logits).sum(-1)

    def compute_variance(placement):
        model = models.from_linen(FlaxNet())
        tx = optax.sgd(0.1)
        make_step = functools.partial(distill.make_train_step, model, tx, square_loss)
        variables = model.init(jax.random.key(0), make_examples()["inputs"][:1])
        states, _ = placement.make_multi_step(make_step)(
            placement.put_states([distill.init_train_state(variables, tx)]),
            placement.put_examples([(make_examples(), distill.BatchInfo())]),
            np.arange(16)[None, None],
            placement.put_teachers([()]),
            jax.random.key(0),
        )
        (state,) = placement.get_states(states, 1)
        return state.batch_stats["BatchNorm_0"]["var"]

    difference = compute_variance(PmapPlacement()) - compute_variance(single_device())
    assert np.abs(difference).max() > 1e-3


def test_pmap_copies_arrays_of_one_shape_with_one_program(monkeypatch):
    traces = []
    monkeypatch.setattr(placement_module, "_get_first", lambda tree, _: traces.append(tree) or tree)
    placement_module._make_copy.cache_clear()
    for value in range(3):
        copy = PmapPlacement().put_array(np.full((3, 2), value, np.float32))
        assert (np.asarray(copy.addressable_data(0)) == value).all()
    placement_module._make_copy.cache_clear()
    assert len(traces) == 1


def test_sizes_of_a_mesh_and_of_a_group_are_checked():
    with pytest.raises(ValueError, match="at least one device: leave devices out to take all"):
        distill.make_mesh(devices=[])
    with pytest.raises(TypeError, match=r"model must be an integer.*got 1\.0"):
        distill.make_mesh(model=1.0)
    with pytest.raises(TypeError, match=r"max_students must be an integer, got 2\.5"):
        distill.VectorizedPlacement(distill.make_mesh(), 2.5)
