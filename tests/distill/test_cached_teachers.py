"""A plan with cached teachers trains the students that it trains with live teachers."""

import dataclasses

import chex
import flax.linen as nn
import jax
import numpy as np
import pytest

from jaxkd import distill, losses, models
from jaxkd.distill import placement as placement_module
from small_plans import (
    PLACEMENTS,
    TRAIN,
    get_variables,
    kill_at_save,
    make_stage,
    soft_loss,
    train,
)


def add_much_noise(key, inputs):
    return inputs + jax.random.normal(key, inputs.shape)


def make_plan(**options):
    """Makes a teacher and two students. Options are those of the students."""
    student = make_stage("student", teachers=("teacher",), loss=soft_loss, **options)
    return [make_stage("teacher", 16), student, dataclasses.replace(student, name="other")]


def train_students(folder, plan, seeds=(0,), **options):
    """Returns the variables of the students."""
    trained, _ = train(folder, plan, seeds, evaluations=2, **options)
    variables = get_variables(trained)
    return {name: variables[name] for name in ("student", "other")}


VIEWS = {
    "no views": {},
    "two views": {"augment": add_much_noise, "views": 2},
    "nine views": {"augment": add_much_noise, "views": 9},
}


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """The students of live teachers, on one device, by the name of their views."""
    folder = tmp_path_factory.mktemp("live")
    return {
        name: train_students(folder / name, make_plan(**options), (0, 1))
        for name, options in VIEWS.items()
    }


@pytest.mark.thorough
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("views", VIEWS)
def test_cached_teachers_train_the_students_of_live_teachers(live, tmp_path, views, placement):
    plan = make_plan(cache_teachers=True, **VIEWS[views])
    cached = train_students(tmp_path, plan, (0, 1), placement=PLACEMENTS[placement]())
    chex.assert_trees_all_close(cached, live[views], rtol=1e-4, atol=1e-5)


@pytest.mark.thorough
def test_views_are_shown_in_turn_epoch_by_epoch(tmp_path):
    # 16 of 45 examples a step: the third batch ends one epoch and begins the next.
    by_views = {
        views: train_students(tmp_path / str(views), make_plan(augment=add_much_noise, views=views))
        for views in (1, 2, 9, None)
    }
    for views, more_views in ((1, 2), (2, 9), (9, None)):
        with pytest.raises(AssertionError):
            chex.assert_trees_all_close(by_views[views], by_views[more_views], rtol=1e-3)
    within_two_epochs = [
        train_students(
            tmp_path / f"short_{views}", make_plan(augment=add_much_noise, views=views, steps=5)
        )
        for views in (2, 9)
    ]
    chex.assert_trees_all_equal(*within_two_epochs)


@pytest.fixture
def counts(monkeypatch):
    """The number of examples of each call in which a teacher of 16 units predicts TRAIN."""
    counts = []
    make_predict = placement_module.make_predict

    def make_counting_predict(model, **options):
        predict = make_predict(model, **options)

        def count_and_predict(variables, inputs):
            is_teacher = variables["params"]["Dense_0"]["kernel"].shape[-1] == 16
            if is_teacher and len(inputs) == len(TRAIN["inputs"]):
                counts.append(len(inputs))
            return predict(variables, inputs)

        return count_and_predict

    monkeypatch.setattr(placement_module, "make_predict", make_counting_predict)
    return counts


@pytest.mark.thorough
def test_teachers_predict_once_for_all_students_and_runs(tmp_path, counts):
    options = {"cache_teachers": True, "augment": add_much_noise, "views": 3, "steps": 4}
    cache = {"teacher_cache": tmp_path / "cache"}
    first = train_students(tmp_path / "first", make_plan(**options), (0, 1), **cache)
    assert counts == 2 * 3 * [45], "two seeds and three views, but not again for the other student"
    again = train_students(tmp_path / "again", make_plan(**options), (0, 1), **cache)
    assert counts == 2 * 3 * [45]
    chex.assert_trees_all_equal(again, first)

    plan = make_plan(**options)
    normalized = models.with_input_normalization(
        plan[0].model, np.zeros(5), np.full(5, 0.5), max_value=10.0
    )
    plan[0] = dataclasses.replace(plan[0], model=normalized)
    train_students(tmp_path / "normalized", plan, (0, 1), **cache)
    assert counts == 2 * 2 * 3 * [45], "another model with weights of the same names"

    counts.clear()
    train_students(tmp_path / "fewer", make_plan(**options | {"views": 2}), (0, 1), **cache)
    assert counts == 2 * 2 * [45]


@pytest.mark.thorough
def test_resumed_run_reads_the_logits(tmp_path, counts, monkeypatch):
    plan = make_plan(cache_teachers=True)
    expected = train_students(tmp_path / "unbroken", plan)
    counts.clear()
    kill_at_save(monkeypatch, 12 + 5)
    with pytest.raises(SystemExit):
        train(tmp_path / "killed", plan, save_every=0)
    resumed = train_students(tmp_path / "killed", plan)
    chex.assert_trees_all_equal(resumed, expected)
    assert counts == [45]


@pytest.mark.thorough
def test_all_of_the_largest_logits_give_the_same_bits(tmp_path):
    all_logits, three_of_three, one_of_three = (
        train_students(tmp_path / str(k), make_plan(cache_teachers=True, cache_top_k=k, steps=6))
        for k in (None, 3, 1)
    )
    chex.assert_trees_all_equal(three_of_three, all_logits)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(one_of_three, all_logits, rtol=1e-3)


@pytest.mark.parametrize("cache_top_k", [None, 5])
def test_largest_logits_have_the_classes_of_their_teacher(tmp_path, cache_top_k):
    """The teacher has two classes more than the student."""

    class Wide(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(5)(x)

    def loss(student, teachers, batch, context):
        assert teachers[0].logits.shape == (16, 5)
        return losses.kl_divergence(student.logits, teachers[0].logits[:, :3])

    model = models.from_linen(Wide(), train_argument=None)
    teacher = distill.Pretrained("wide", model, model.init(jax.random.key(0), TRAIN["inputs"]))
    student = make_stage("student", teachers=("wide",), loss=loss, steps=2)
    live, _ = train(tmp_path / "live", [teacher, student])
    cached = dataclasses.replace(student, cache_teachers=True, cache_top_k=cache_top_k)
    trained, _ = train(tmp_path / "cached", [teacher, cached])
    chex.assert_trees_all_close(get_variables(trained), get_variables(live), rtol=1e-5, atol=1e-6)
