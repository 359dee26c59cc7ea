"""Stages whose steps are the same program share it, and no others do."""

import dataclasses
import os
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkd import distill
from jaxkd.distill import _compile
from small_plans import (
    PLACEMENTS,
    TRAIN,
    add_noise,
    get_losses,
    hard_loss,
    make_model,
    make_stage,
    soft_loss,
    train,
)


def get_groups(*plan):
    """Returns the names of the stages of each program."""
    return [[stage.name for stage in group] for group in distill.group_by_program(plan)]


@pytest.fixture
def lowered(monkeypatch):
    """The names of the stages that were lowered for their digest."""
    names = []
    lower_step = _compile.lower_step

    def record_and_lower(stage, *args):
        names.append(stage.name)
        return lower_step(stage, *args)

    monkeypatch.setattr(_compile, "lower_step", record_and_lower)
    return names


def scale_loss(factor):
    return lambda *args: factor * hard_loss(*args)


# Sharing


def test_equal_optimizers_share_a_program(lowered):
    rates = {"first": 1e-3, "second": 1e-3, "other": 1e-2}
    stages = [make_stage(name, tx=optax.adam(rate)) for name, rate in rates.items()]
    assert stages[0].tx != stages[1].tx, "optax compares its optimizers by identity"
    # Adam's own arithmetic fails under strict promotion.
    with jax.numpy_dtype_promotion("standard"):
        assert get_groups(*stages) == [["first", "second"], ["other"]]
    assert lowered == ["first", "second", "other"]


def test_equal_losses_and_augmentations_share_a_program():
    stages = [
        make_stage(name, loss=scale_loss(2.0), augment=lambda key, x: add_noise(key, x))
        for name in ("first", "second")
    ]
    assert get_groups(*stages) == [["first", "second"]]


def make_student(name, teacher, **options):
    return make_stage(name, teachers=(teacher,), loss=soft_loss, **options)


def test_students_of_different_assistants_share_a_program_if_logits_are_cached():
    teachers = [make_stage("wide", 16), make_stage("narrow", 8)]
    cached = [make_student(f"from_{t.name}", t.name, cache_teachers=True) for t in teachers]
    assert get_groups(*teachers, *cached)[2:] == [["from_wide", "from_narrow"]]
    live = [make_student(f"from_{t.name}", t.name) for t in teachers]
    assert get_groups(*teachers, *live)[2:] == [["from_wide"], ["from_narrow"]]


def test_students_of_live_teachers_of_one_architecture_share_a_program():
    teachers = [make_stage("first", 8), make_stage("second", 8)]
    students = [make_student(f"from_{t.name}", t.name) for t in teachers]
    assert get_groups(*teachers, *students) == [["first", "second"], ["from_first", "from_second"]]


def test_pretrained_models_are_not_grouped():
    model = make_model()
    pretrained = distill.Pretrained(
        "pretrained", model, model.init(jax.random.key(0), TRAIN["inputs"])
    )
    student = make_student("student", "pretrained")
    assert get_groups(pretrained, student) == [["student"]]


# Not sharing


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 13},
        {"batch_size": 8},
        {"augment": add_noise},
        {"augment": add_noise, "views": 2},
        {"model": make_model(5)},
        {"data": TRAIN | {"more": np.zeros(45)}},
        {"data": TRAIN | {"inputs": TRAIN["inputs"][:, :4]}},
        {"data": TRAIN | {"labels": TRAIN["labels"].astype(np.int8)}},
        {"init_loss": lambda key: jnp.ones(3)},
        {"loss": scale_loss(2.0)},
        {"tx": optax.sgd(0.2, momentum=0.9)},
    ],
    ids=lambda options: " ".join(options),
)
def test_stages_that_differ_in_their_step_do_not_share(options):
    assert get_groups(make_stage("first"), make_stage("other", **options)) == [["first"], ["other"]]


def test_number_of_steps_separates_stages_that_read_the_progress():
    def loss(student, teachers, batch, context):
        return context.progress * hard_loss(student, teachers, batch, context)

    stages = [make_stage(f"{steps}_steps", loss=loss, steps=steps) for steps in (12, 13, 12)]
    stages[2] = dataclasses.replace(stages[2], name="12_again")
    assert get_groups(*stages) == [["12_steps", "12_again"], ["13_steps"]]


@pytest.mark.parametrize(("views", "expected"), [(2, 1), (3, 2)])
def test_number_of_views_separates_stages(views, expected):
    options = {"augment": add_noise, "cache_teachers": True}
    stages = [make_student(f"{i}", "teacher", views=v, **options) for i, v in enumerate((2, views))]
    assert len(get_groups(make_stage("teacher", 16), *stages)) == 1 + expected


LARGE = np.zeros(10_000, np.float32)
LARGE_CHANGED = np.where(np.arange(10_000) == 9_999, np.float32(1), LARGE)
CONSTANTS = {
    "numbers": (1.0, 2.0),
    "NumPy scalars": (np.float32(1), np.float32(2)),
    "NumPy arrays": (np.array([1, 2], np.float32), np.array([1, 3], np.float32)),
    "JAX arrays": (jnp.array([1.0, 2.0]), jnp.array([1.0, 3.0])),
    "large NumPy arrays": (LARGE, LARGE_CHANGED),
    "large JAX arrays": (jnp.asarray(LARGE), jnp.asarray(LARGE_CHANGED)),
}


def make_stages_that_close_over(constants):
    """Makes a stage for each constant, whose loss multiplies by its sum in the compiled step."""

    def make_loss(constant):
        return lambda *args: jnp.sum(constant, dtype=jnp.float32) * hard_loss(*args)

    losses = map(make_loss, constants)
    return [make_stage(f"s{i}", loss=loss) for i, loss in enumerate(losses)]


@pytest.mark.parametrize("kind", CONSTANTS)
def test_losses_that_close_over_different_constants_do_not_share(kind):
    first, second = CONSTANTS[kind]
    stages = make_stages_that_close_over((first, second, first))
    assert get_groups(*stages) == [["s0", "s2"], ["s1"]]


HOISTED = """
import sys
sys.path.insert(0, sys.argv[1])
import jax.numpy as jnp
from small_plans import hard_loss, make_stage
from jaxkd import distill

def make_loss(constant):
    return lambda student, *args: hard_loss(student, *args) + (student.logits @ constant).sum(-1)

constants = jnp.zeros((3, 5000)), jnp.zeros((3, 5000)).at[2, 4999].set(1)
plan = [make_stage(f"s{i}", loss=make_loss(constant)) for i, constant in enumerate(constants)]
print([len(group) for group in distill.group_by_program(plan)])
"""


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="JAX 0.7 fails under this option")
def test_constants_that_jax_makes_arguments_are_not_overlooked():
    # JAX reads the option when it starts.
    command = [sys.executable, "-c", HOISTED, os.path.dirname(__file__)]
    environment = os.environ | {"JAX_USE_SIMPLIFIED_JAXPR_CONSTANTS": "1"}
    completed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert completed.stdout == "[1, 1]\n"


def test_losses_that_close_over_different_keys_do_not_share():
    def make_loss(key):
        return lambda *args: jax.random.uniform(key) * hard_loss(*args)

    stages = [make_stage(f"s{seed}", loss=make_loss(jax.random.key(seed))) for seed in (0, 1)]
    assert get_groups(*stages) == [["s0"], ["s1"]]


def test_losses_that_call_different_functions_of_the_host_do_not_share():
    def make_loss(factor):
        def loss(student, teachers, batch, context):
            values = hard_loss(student, teachers, batch, context)
            shape = jax.ShapeDtypeStruct(values.shape, values.dtype)
            factors = jax.pure_callback(lambda x: np.full_like(x, factor), shape, batch["labels"])
            return factors * values

        return loss

    stages = [make_stage(f"s{factor}", loss=make_loss(factor)) for factor in (2, 3)]
    assert get_groups(*stages) == [["s2"], ["s3"]]


# Scalars


def scale_by_example(student, teachers, batch, context):
    return batch["scale"] * hard_loss(student, teachers, batch, context)


def test_stages_that_differ_in_name_and_data_are_not_lowered(lowered):
    first = make_stage("first", data=TRAIN | {"scale": np.float32(1)}, loss=scale_by_example)
    others = [
        dataclasses.replace(first, name=f"times_{scale}", data=TRAIN | {"scale": np.float32(scale)})
        for scale in (2, 3)
    ]
    assert get_groups(first, *others) == [["first", "times_2", "times_3"]]
    assert get_groups(first, make_stage("unlike", 5)) == [["first"], ["unlike"]]
    assert lowered == []


def test_stages_that_differ_in_numbers_alone_are_traced_for_one_program(tmp_path):
    # Once for its digest, and once to train.
    loss = chex.assert_max_traces(lambda *args: scale_by_example(*args), n=2)
    first = make_stage("first", data=TRAIN | {"scale": np.float32(1)}, loss=loss, steps=2)
    plan = [
        dataclasses.replace(first, name=f"times_{scale}", data=TRAIN | {"scale": np.float32(scale)})
        for scale in (1, 2, 3)
    ]
    trained, _ = train(tmp_path, plan)
    kernels = [
        np.asarray(seeds[0].variables["params"]["Dense_1"]["kernel"]) for seeds in trained.values()
    ]
    assert np.abs(kernels[0] - kernels[2]).max() > 1e-4


def test_python_number_and_numpy_scalar_do_not_share():
    """A Python number takes the dtype of what it is combined with, a NumPy scalar keeps its own."""
    stages = [
        make_stage(type(scale).__name__, data=TRAIN | {"scale": scale}, loss=scale_by_example)
        for scale in (2.0, np.float32(2))
    ]
    assert get_groups(*stages) == [["float"], ["float32"]]
    changed = [
        dataclasses.replace(stages[i], name="3", data=TRAIN | {"scale": scale})
        for i, scale in enumerate((3.0, np.float32(3)))
    ]
    assert get_groups(stages[0], changed[0]) == [["float", "3"]]
    assert get_groups(stages[1], changed[1]) == [["float32", "3"]]


# Training


def count_traces(loss):
    traces = []

    def count_and_call(*args):
        traces.append(1)
        return loss(*args)

    return count_and_call, traces


def test_program_is_traced_for_its_digest_and_once_more_to_train(tmp_path):
    plan, traces = [], []
    for name in ("first", "second", "third"):
        loss, stage_traces = count_traces(hard_loss)
        plan.append(make_stage(name, loss=loss, steps=2))
        traces.append(stage_traces)
    assert get_groups(*plan) == [["first", "second", "third"]]
    for stage_traces in traces:
        assert len(stage_traces) == 1
        stage_traces.clear()
    train(tmp_path, plan)
    # The arrays of a training are placed on a mesh, which makes its trace another one.
    assert [len(stage_traces) for stage_traces in traces] == [2, 1, 1]


def test_lone_stage_is_traced_for_its_digest_and_once_more_to_train(tmp_path):
    loss = chex.assert_max_traces(lambda *args: hard_loss(*args), n=2)
    train(tmp_path, [make_stage("first", loss=loss, steps=2), make_stage("unlike", 5, steps=2)])


@pytest.mark.thorough
# The losses have no gradient, so that no weight changes.
@pytest.mark.filterwarnings("ignore:.*as if nothing was learnt")
@pytest.mark.parametrize("name", ["one device", "vectorized"])
def test_stages_of_one_plan_train_with_their_own_loss(tmp_path, name):
    def make_loss(number):
        return lambda *args: number + 0 * hard_loss(*args)

    numbers = {"first": 1.0, "second": 1.0, "other": 3.0}
    plan = [make_stage(stage, loss=make_loss(number)) for stage, number in numbers.items()]
    assert get_groups(*plan) == [["first", "second"], ["other"]]
    _, run = train(tmp_path, plan, placement=PLACEMENTS[name](), evaluations=2)
    for stage, number in numbers.items():
        assert get_losses(run, stage) == [number, number]


@pytest.mark.parametrize("cached", [False, True])
def test_a_teacher_that_the_loss_does_not_read_is_named(tmp_path, cached):
    teachers = ("first", "second")

    def of_second(student, teachers, batch, context):
        return soft_loss(student, teachers[1:], batch, context)

    plan = [make_stage("first", steps=1), make_stage("second", steps=1)]
    student = make_stage(
        "student", teachers=teachers, loss=of_second, cache_teachers=cached, steps=1
    )
    match = "stage 'student' names the teacher 'first', but its loss does not depend on it: read te"
    with pytest.warns(UserWarning, match=match) as caught:
        train(tmp_path / "one", [*plan, student])
    assert len(caught) == 1
    both = dataclasses.replace(student, loss=soft_loss)
    train(tmp_path / "both", [*plan, both])
