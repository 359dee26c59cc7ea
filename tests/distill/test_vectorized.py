"""Students that train in one vectorised program learn what each learns alone, on any devices."""

import dataclasses

import chex
import jax
import numpy as np
import pytest

from jaxkd import distill, losses, models
from small_plans import (
    TRAIN,
    add_noise,
    assert_record_close,
    get_variables,
    make_examples,
    make_stage,
    train,
    train_with_kill,
    vectorized_placement,
)

SEEDS = range(3)
STEPS = 10


def regularized_loss(student, teachers, batch, context):
    """Reads a temperature from the data, and has parameters of its own."""
    divergence = losses.kl_divergence(
        student.logits, teachers[0].logits, temperature=batch["temperature"]
    )
    return divergence + 0.01 * (context.params**2).sum()


def make_plan(**options):
    """Makes a teacher and three students with one program. Options are those of the students."""
    network = {"dropout": 0.1, "batch_norm": True, "batch_size": 15}
    first = make_stage(
        "T1",
        data=TRAIN | {"temperature": np.float32(1)},
        loss=regularized_loss,
        teachers=("teacher",),
        init_loss=lambda key: jax.random.normal(key, (2,)),
        **network | {"steps": STEPS, "augment": add_noise} | options,
    )

    def make_data(seed):
        return make_examples(seed + 10, 45) | {"temperature": np.float32(2)}

    return [
        make_stage("teacher", 8, steps=STEPS, **network),
        first,
        dataclasses.replace(first, name="T4", data=TRAIN | {"temperature": np.float32(4)}),
        dataclasses.replace(first, name="own_data", data=make_data),
    ]


def assert_same_records(run, expected_run):
    """Compares the records of two runs, whose trainings may have taken turns differently."""

    def sort(run):
        return sorted(run.metrics(), key=lambda r: (r["stage"], r["seed"], r["step"]))

    for record, expected in zip(sort(run), sort(expected_run), strict=True):
        assert_record_close(record, expected, 1e-4)


def assert_same_training(trained, run, expected, expected_run):
    variables = get_variables(trained)
    chex.assert_trees_all_close(variables, get_variables(expected), rtol=1e-5, atol=1e-5)
    assert_same_records(run, expected_run)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return train(tmp_path_factory.mktemp("alone"), make_plan(), SEEDS)


@pytest.mark.thorough
@pytest.mark.parametrize(("max_students", "num_devices"), [(4, 1), (9, 8)])
def test_students_learn_what_each_learns_alone(alone, tmp_path, max_students, num_devices):
    placement = vectorized_placement(max_students, num_devices)
    trained, run = train(tmp_path, make_plan(), SEEDS, placement=placement)
    assert list(trained) == list(alone[0]) == ["teacher", "T1", "T4", "own_data"]
    assert_same_training(trained, run, *alone)
    kernels = {
        np.asarray(model.variables["params"]["Dense_0"]["kernel"]).tobytes()
        for seeds in trained.values()
        for model in seeds
    }
    assert len(kernels) == 12, "every student has weights of its own"


@pytest.mark.parametrize("num_devices", [1, 2])
def test_convolutions_learn_what_each_learns_alone(tmp_path, num_devices):
    """JAX 0.7 has no rule for the gradient of such convolutions inside `jax.shard_map`."""
    data = TRAIN | {"inputs": np.random.default_rng(0).random((45, 6, 6, 1), np.float32)}
    few = {name: array[:9] for name, array in data.items()}
    model = models.from_linen(models.CNN(features=(2,), hidden=4, num_classes=3))

    def train_cnn(name, placement):
        plan = [make_stage("student", model=model, data=data, steps=3)]
        options = {"validation": few, "evaluations": 1, "placement": placement}
        return get_variables(train(tmp_path / name, plan, (0, 1), **options)[0])

    trained = train_cnn("vectorized", vectorized_placement(2, num_devices))
    chex.assert_trees_all_close(trained, train_cnn("alone", None), rtol=1e-4, atol=1e-5)


@pytest.mark.thorough
def test_cached_teachers_are_those_of_each_seed(tmp_path):
    def train_plan(name, placement):
        plan = make_plan(cache_teachers=True, augment=None)
        trained, _ = train(tmp_path / name, plan, SEEDS, evaluations=2, placement=placement)
        return get_variables(trained)

    expected = train_plan("alone", None)
    trained = train_plan("vectorized", vectorized_placement(9, 2))
    chex.assert_trees_all_close(trained, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.thorough
def test_loop_on_the_device_takes_the_same_steps(alone, tmp_path, monkeypatch):
    monkeypatch.setattr(distill.VectorizedPlacement, "steps_per_call", 4)
    trained, run = train(tmp_path, make_plan(), SEEDS, placement=vectorized_placement(9, 2))
    assert_same_training(trained, run, *alone)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    return train(folder, make_plan(steps=4), SEEDS, placement=vectorized_placement(9, 1))


@pytest.mark.thorough
@pytest.mark.parametrize("number", [5, 17])
def test_killed_group_resumes_with_the_same_numbers(unbroken, tmp_path, monkeypatch, number):
    trained, run, saves = train_with_kill(
        monkeypatch,
        tmp_path,
        lambda: make_plan(steps=4),
        number,
        seeds=SEEDS,
        placement=vectorized_placement(9, 1),
    )
    # To rounding only: the students that the kill left a step behind catch up in a smaller group.
    assert_same_training(trained, run, *unbroken)
    assert len(saves) == 3 * STEPS + 9 * 4, "a saved step was taken again"


@pytest.mark.thorough
def test_students_that_finished_alone_are_not_trained_again(alone):
    folder = alone[1].folder
    trained, _ = train(folder, make_plan(), SEEDS, placement=vectorized_placement(9, 1))
    chex.assert_trees_all_equal(get_variables(trained), get_variables(alone[0]))


def test_group_needs_a_student():
    with pytest.raises(ValueError, match="max_students must be at least 1, got 0"):
        vectorized_placement(0, 1)
