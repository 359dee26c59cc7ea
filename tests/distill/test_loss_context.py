"""A loss gets the user's arrays as they are, and the same context on every placement.

The losses here return what they are given, so that the recorded loss of a step shows it.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkd import distill, models
from small_plans import PLACEMENTS, TRAIN, add_noise, get_losses, make_stage, train, train_with_kill

NUM_EXAMPLES = 45
STEPS = 9
BATCH_SIZE = 16
VIEWS = 2
FIELDS = ("step", "progress", "key", "view", "params")

# The losses have no gradient, so that no weight changes.
pytestmark = pytest.mark.filterwarnings("ignore:.*as if nothing was learnt")


def return_field(student, teachers, batch, context):
    """Returns the field of the context that `batch["field"]` selects, as one number an example."""
    draw = jax.random.randint(context.key, (), 0, 2**16)  # a sum of 16 draws is exact in float32
    numbers = (context.step, context.progress, draw, context.view, context.params.sum())
    fields = jnp.stack([jnp.broadcast_to(n, BATCH_SIZE).astype(jnp.float32) for n in numbers])
    return fields[batch["field"]] + 0 * student.logits.sum(-1)


def make_field_plan():
    """Makes a stage for each field. They share a program."""
    first = make_stage(
        "step",
        loss=return_field,
        steps=STEPS,
        augment=add_noise,
        views=VIEWS,
        init_loss=lambda key: jnp.array([3.0, 4.0]),
        loss_tx=optax.sgd(0.5),
    )
    return [
        dataclasses.replace(first, name=name, data=TRAIN | {"field": np.int32(i)})
        for i, name in enumerate(FIELDS)
    ]


def train_fields(folder, placement):
    _, run = train(folder, make_field_plan(), evaluations=STEPS, placement=placement)
    return {name: get_losses(run, name) for name in FIELDS}


@pytest.fixture(scope="module")
def fields_on_one_device(tmp_path_factory):
    return train_fields(tmp_path_factory.mktemp("fields"), PLACEMENTS["one device"]())


@pytest.mark.thorough
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_context_is_the_same_on_every_placement(fields_on_one_device, tmp_path, placement):
    if placement == "one device":
        fields = fields_on_one_device
    else:
        fields = train_fields(tmp_path, PLACEMENTS[placement]())
    assert fields["step"] == list(range(STEPS))
    np.testing.assert_allclose(fields["progress"], np.arange(STEPS) / STEPS, rtol=1e-6)
    assert len(set(fields["key"])) == STEPS
    assert fields["key"] == fields_on_one_device["key"]
    # The third batch of 16 ends the first epoch of 45 examples and begins the second.
    views = np.arange(STEPS * BATCH_SIZE) // NUM_EXAMPLES % VIEWS
    assert fields["view"] == views.reshape(STEPS, BATCH_SIZE).mean(1).tolist()
    # The gradient of the sum is 1 for both parameters, and the learning rate 0.5.
    assert fields["params"] == [7.0 - step for step in range(STEPS)]


@pytest.mark.thorough
def test_context_is_the_same_after_a_restart(fields_on_one_device, tmp_path, monkeypatch):
    number = FIELDS.index("key") * STEPS + 4
    options = {"evaluations": STEPS}
    _, run, saves = train_with_kill(monkeypatch, tmp_path, make_field_plan, number, **options)
    assert len(saves) == len(FIELDS) * STEPS
    assert {name: get_losses(run, name) for name in FIELDS} == fields_on_one_device


# The user's arrays

NUMBERS = np.arange(NUM_EXAMPLES)
USER_ARRAYS = {
    "number": NUMBERS.astype(np.int32),
    "index": (NUMBERS + 1000).astype(np.int32),
    "view": (NUMBERS + 2000).astype(np.int32),
    "examples": (NUMBERS + 3000).astype(np.float32),
    "teacher_logits": np.stack([NUMBERS + 4000, NUMBERS + 5000], axis=1).astype(np.float32),
    "num_examples": np.float32(6000),
    "view_key": np.int32(7000),
}
"""Arrays and scalars by names that the library uses for what it knows about a batch itself."""


class ShowInputs(nn.Module):
    """A student whose features are its inputs."""

    @nn.compact
    def __call__(self, x, train):
        return models.Outputs(nn.Dense(3)(x), {"inputs": x})


def predict_inputs(variables, inputs, *, train, key=None):
    """Applies a teacher whose logits are its first inputs, scaled."""
    return models.Outputs(variables["params"] * inputs[:, :3], {}), {}


def count_differences(student, teachers, batch, context):
    """Returns the number of differences between what the loss gets and what it should get."""
    assert set(batch) == {"inputs", "labels", *USER_ARRAYS}
    number = batch["number"]
    logits = 2 * student.features["inputs"][:, :3]
    differences = (
        (batch["index"] != number + 1000),
        (batch["view"] != number + 2000),
        (batch["examples"] != number.astype(jnp.float32) + 3000),
        (batch["teacher_logits"] != number[:, None].astype(jnp.float32) + jnp.array([[4e3, 5e3]])),
        jnp.broadcast_to(batch["num_examples"] != 6000, number.shape),
        jnp.broadcast_to(batch["view_key"] != 7000, number.shape),
        # The teacher's logits, cached or not, are those of the view that the student sees.
        (jnp.abs(teachers[0].logits - logits) > 1e-4),
    )
    counts = [d.reshape(BATCH_SIZE, -1).sum(-1).astype(jnp.float32) for d in differences]
    return sum(counts) + 0 * student.logits.sum(-1)


def make_user_array_plan():
    teacher = models.Model(lambda key, inputs: {"params": jnp.float32(1)}, predict_inputs)
    pretrained = distill.Pretrained("teacher", teacher, {"params": jnp.float32(2)})
    live = make_stage(
        "live",
        model=models.from_linen(ShowInputs()),
        data=TRAIN | USER_ARRAYS,
        loss=count_differences,
        teachers=("teacher",),
        steps=6,
    )
    options = {
        "live": {},
        "live_with_views": {"augment": add_noise, "views": VIEWS},
        "cached": {"cache_teachers": True},
        "cached_with_views": {"augment": add_noise, "views": VIEWS, "cache_teachers": True},
    }
    return [
        pretrained,
        *(dataclasses.replace(live, name=name, **more) for name, more in options.items()),
    ]


@pytest.mark.thorough
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_arrays_of_the_user_reach_the_loss_unchanged(tmp_path, placement):
    plan = make_user_array_plan()
    _, run = train(tmp_path, plan, evaluations=6, placement=PLACEMENTS[placement]())
    for stage in plan[1:]:
        assert get_losses(run, stage.name) == [0.0] * 6, stage.name
