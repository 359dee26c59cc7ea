"""A plan whose teachers answer once teaches what one teaches whose teachers run along."""

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkd import distill, losses, models, runs
from jaxkd.distill import Stage, placement


class Net(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(3)(nn.relu(nn.Dense(self.width)(x.astype(jnp.float32))))


def examples(seed, count):
    inputs = np.random.default_rng(seed).normal(size=(count, 5)).astype(np.float32)
    return {"inputs": inputs, "labels": inputs[:, :3].argmax(-1).astype(np.int32)}


TRAIN, VALIDATION = examples(0, 44), examples(1, 20)


def hard(student, teachers, batch, context):
    return losses.hard_cross_entropy(student.logits, batch["labels"])


def soft(student, teachers, batch, context):
    return losses.kl_divergence(student.logits, teachers[0].logits, temperature=2.0)


def noisy(key, inputs):
    return inputs + jax.random.normal(key, inputs.shape)


def plan(**more):
    values = {"tx": optax.sgd(0.3), "steps": 12, "batch_size": 16}
    teacher = Stage("teacher", models.from_linen(Net(16)), TRAIN, hard, **values)
    student = Stage(
        "student", models.from_linen(Net(4)), TRAIN, soft, teachers=("teacher",), **values | more
    )
    return [teacher, student, dataclasses.replace(student, name="other")]


def train(folder, stages, seeds=(0, 1), **more):
    run = runs.open_run(folder, {})
    trained = distill.run_plan(stages, seeds, run, validation=VALIDATION, **more)
    return {name: [one.variables for one in trained[name]] for name in ("student", "other")}


def sharded(count):
    return distill.MeshPlacement(distill.make_mesh(devices=jax.devices()[:count]))


def population():
    return distill.VectorizedPlacement(distill.make_mesh(devices=jax.devices()[:2]), 4)


@pytest.fixture
def asked(monkeypatch):
    """How many examples a teacher of 16 units was asked about, each time."""
    counts, make = [], placement.make_predict

    def make_predict(model, **more):
        predict = make(model, **more)

        def counted(variables, inputs):
            if variables["params"]["Dense_0"]["kernel"].shape[0] == 16 and len(inputs) != len(
                VALIDATION["inputs"]
            ):
                counts.append(len(inputs))
            return predict(variables, inputs)

        return counted

    monkeypatch.setattr(placement, "make_predict", make_predict)
    return counts


@pytest.mark.parametrize(
    "make_placement", [None, lambda: sharded(8), distill.PmapPlacement, population]
)
@pytest.mark.parametrize(
    "shown", [{}, {"augment": noisy, "views": 2}, {"augment": noisy, "views": 9}]
)
def test_an_answer_given_once_is_that_of_a_teacher_who_runs_along(tmp_path, shown, make_placement):
    live = train(tmp_path / "live", plan(**shown))
    cached = train(
        tmp_path / "cached",
        plan(cache_teachers=True, **shown),
        placement=make_placement and make_placement(),
    )
    chex.assert_trees_all_close(cached, live, rtol=1e-4, atol=1e-5)


def test_views_come_again_epoch_by_epoch(tmp_path):
    # 16 of 44 examples a step: the third batch ends one epoch and begins the next.
    one, two, many, anew = (
        train(tmp_path / str(views), plan(augment=noisy, views=views), (0,))
        for views in (1, 2, 9, None)
    )
    for first, second in ((one, two), (two, many), (many, anew)):
        with pytest.raises(AssertionError):
            chex.assert_trees_all_close(first, second, rtol=1e-3)
    within_two_epochs = [
        train(tmp_path / f"short{v}", plan(augment=noisy, views=v, steps=5), (0,)) for v in (2, 9)
    ]
    chex.assert_trees_all_equal(*within_two_epochs)


def test_teachers_answer_once_for_all_that_they_teach_and_for_all_runs(tmp_path, asked):
    shown = {"cache_teachers": True, "augment": noisy, "views": 3}
    first = train(tmp_path / "first", plan(**shown), teacher_cache=tmp_path / "cache")
    assert asked == 2 * 3 * [44], "two seeds, three views, and not again for the other student"
    again = train(tmp_path / "again", plan(**shown), teacher_cache=tmp_path / "cache")
    assert asked == 2 * 3 * [44]
    chex.assert_trees_all_equal(again, first)
    other = plan(**shown)
    other[0] = dataclasses.replace(
        other[0],
        model=models.with_input_normalization(other[0].model, np.zeros(5), np.full(5, 2.0)),
    )
    train(tmp_path / "other", other, teacher_cache=tmp_path / "cache")
    assert asked == 2 * 2 * 3 * [44], "another model with weights of the same names"
    asked[:] = 2 * 3 * [44]
    train(tmp_path / "fewer", plan(**shown | {"views": 2}), teacher_cache=tmp_path / "cache")
    assert asked == 2 * (3 + 2) * [44]


def test_a_run_that_goes_on_reads_the_answers(tmp_path, asked, monkeypatch):
    expected = train(tmp_path / "whole", plan(cache_teachers=True), (0,))
    append, asked[:] = runs.Run.append_metrics, []

    def dying(self, record):
        append(self, record)
        if (record["stage"], record["step"]) == ("student", 5):
            raise SystemExit("killed")

    monkeypatch.setattr(runs.Run, "append_metrics", dying)
    with pytest.raises(SystemExit):
        train(tmp_path / "killed", plan(cache_teachers=True), (0,), save_every=0)
    monkeypatch.setattr(runs.Run, "append_metrics", append)
    chex.assert_trees_all_equal(
        train(tmp_path / "killed", plan(cache_teachers=True), (0,), save_every=0), expected
    )
    assert asked == [44]


def test_the_largest_logits_are_all_if_there_are_no_others(tmp_path):
    whole, all_three, one = (
        train(tmp_path / str(k), plan(cache_teachers=True, cache_top_k=k), (0,))
        for k in (None, 3, 1)
    )
    chex.assert_trees_all_equal(all_three, whole)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(one, whole, rtol=1e-3)


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ({"views": 3}, "has views=3: it needs an augment"),
        ({"views": 0, "augment": noisy}, "at least one view"),
        ({"cache_teachers": True, "augment": noisy}, "give the number of views"),
        ({"cache_top_k": 3}, "cache_top_k=3: it needs cache_teachers"),
        ({"cache_teachers": True, "cache_top_k": 0}, "at least one"),
    ],
)
def test_contradictions_are_refused(more, error):
    with pytest.raises(ValueError, match=error):
        plan(**more)
