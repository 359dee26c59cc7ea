"""The training loop: evaluations, checkpoints, and the same bits after any interruption."""

import itertools
import math
import tracemalloc
import types

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from jaxkd import distill, losses, runs, transfer
from jaxkd.distill import _loop, _metric_buffer
from small_plans import (
    VALIDATION,
    add_noise,
    get_variables,
    hard_loss,
    make_stage,
    soft_loss,
    train,
    train_with_kill,
)

STEPS = 12
NUM_STAGES = 4
OPTIONS = {"evaluations": 4}
"""An evaluation follows every third step, so that a checkpoint may hold losses since the last."""
NO_SAVES = {"save_every": 1e9}
"""Saves at the end of a stage and on Ctrl-C alone, however slow the machine is."""


def make_chain():
    """Makes a plan with every way to learn: labels, live and cached teachers, another's weights."""
    options = {"dropout": 0.1, "steps": STEPS}
    return [
        make_stage("teacher", 32, **options),
        make_stage(
            "assistant", 8, teachers=("teacher",), loss=soft_loss, augment=add_noise, **options
        ),
        make_stage(
            "student",
            teachers=("teacher", "assistant"),
            loss=soft_loss,
            cache_teachers=True,
            **options,
        ),
        make_stage("longer", start="student", teachers=("assistant",), loss=soft_loss, **options),
    ]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return train(tmp_path_factory.mktemp("unbroken"), make_chain(), **OPTIONS)


def assert_same_training(trained, run, unbroken):
    expected, expected_run = unbroken
    chex.assert_trees_all_equal(get_variables(trained), get_variables(expected))
    assert run.metrics() == expected_run.metrics()


@pytest.mark.parametrize("number", [STEPS + 5, 3 * STEPS + 4])
def test_killed_plan_resumes_with_the_same_bits(unbroken, tmp_path, monkeypatch, number):
    trained, run, saves = train_with_kill(monkeypatch, tmp_path, make_chain, number, **OPTIONS)
    assert_same_training(trained, run, unbroken)
    assert len(saves) == len(set(saves)) == NUM_STAGES * STEPS, "a saved step was taken again"


def test_number_of_evaluations_does_not_change_the_bits(unbroken, tmp_path):
    trained, run = unbroken
    more, more_run = train(tmp_path, make_chain(), evaluations=5)
    chex.assert_trees_all_equal(get_variables(more), get_variables(trained))
    records = {(r["stage"], r["step"]): r for r in run.metrics()}
    more_records = {(r["stage"], r["step"]): r for r in more_run.metrics()}
    assert sorted(step for name, step in records if name == "student") == [3, 6, 9, 12]
    assert sorted(step for name, step in more_records if name == "student") == [3, 5, 8, 10, 12]
    for step in (3, 12):
        validation_loss = more_records["student", step]["validation_loss"]
        assert validation_loss == records["student", step]["validation_loss"]


def test_there_is_at_most_one_evaluation_per_step(tmp_path):
    _, run = train(tmp_path, [make_stage("alone", steps=2)], evaluations=9)
    assert [record["step"] for record in run.metrics()] == [1, 2]


def call_before_each_step(monkeypatch, call):
    make_multi_step = distill.MeshPlacement.make_multi_step

    def make(self, make_step):
        multi_step = make_multi_step(self, make_step)

        def call_and_step(*args):
            call()
            return multi_step(*args)

        return call_and_step

    monkeypatch.setattr(distill.MeshPlacement, "make_multi_step", make)


def test_interrupt_while_a_record_is_written_saves_nothing(unbroken, tmp_path, monkeypatch):
    append_metrics = runs.Run.append_metrics
    records, steps = [], []

    def append_and_interrupt(self, record):
        append_metrics(self, record)
        records.append(record)
        if len(records) == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(runs.Run, "append_metrics", append_and_interrupt)
    call_before_each_step(monkeypatch, lambda: steps.append(0))
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, make_chain(), **OPTIONS, **NO_SAVES)
    # The record is on disk but its losses are still counted: the one moment that cannot be saved.
    assert (records[-1]["stage"], records[-1]["step"]) == ("assistant", 6)
    num_interrupted = len(steps)
    resumed, run = train(tmp_path, make_chain(), **OPTIONS, **NO_SAVES)
    assert_same_training(resumed, run, unbroken)
    assert num_interrupted == STEPS + 6
    assert len(steps) - num_interrupted == (NUM_STAGES - 1) * STEPS


@pytest.mark.thorough
def test_interrupt_between_steps_loses_no_step(unbroken, tmp_path, monkeypatch):
    calls = []

    def interrupt_once():
        calls.append("interrupted" if len(calls) == STEPS + 5 else "taken")
        if calls[-1] == "interrupted":
            raise KeyboardInterrupt

    call_before_each_step(monkeypatch, interrupt_once)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, make_chain(), **OPTIONS, **NO_SAVES)
    resumed, run = train(tmp_path, make_chain(), **OPTIONS, **NO_SAVES)
    assert_same_training(resumed, run, unbroken)
    assert calls.count("taken") == NUM_STAGES * STEPS


def project_and_compare(student, teachers, batch, context):
    """Learns from the teacher's logits through a projection that is trained as well."""
    projected = jnp.tanh(student.logits @ context.params)
    return jnp.square(projected - jnp.tanh(teachers[0].logits)).mean(-1)


@pytest.mark.thorough
def test_parameters_of_a_loss_are_resumed_and_not_part_of_the_student(tmp_path, monkeypatch):
    def make_plan():
        student = make_stage(
            "student",
            dropout=0.1,
            teachers=("teacher",),
            loss=project_and_compare,
            init_loss=lambda key: jax.random.normal(key, (3, 3)),
        )
        return [make_stage("teacher", 32, dropout=0.1), student]

    trained, _ = train(tmp_path / "unbroken", make_plan())
    assert set(trained["student"][0].variables) == {"params", "batch_stats"}
    resumed, _, _ = train_with_kill(monkeypatch, tmp_path / "broken", make_plan, STEPS + 5)
    chex.assert_trees_all_equal(get_variables(resumed), get_variables(trained))


def follow_progress(student, teachers, batch, context):
    """Lowers the temperature from 4 to 1 over the training."""
    temperature = 4 - 3 * context.progress
    return losses.kl_divergence(student.logits, teachers[0].logits, temperature=temperature)


@pytest.mark.thorough
def test_temperature_that_follows_progress_trains_and_resumes(tmp_path, monkeypatch):
    def make_plan(loss=follow_progress):
        teacher = make_stage("teacher", 32, steps=STEPS)
        student = make_stage("student", 8, teachers=("teacher",), loss=loss, steps=3 * STEPS)
        return [teacher, student]

    trained, run = train(tmp_path / "unbroken", make_plan(), **OPTIONS)
    resumed, resumed_run, saves = train_with_kill(
        monkeypatch, tmp_path / "broken", make_plan, 2 * STEPS + 4, **OPTIONS
    )
    assert_same_training(resumed, resumed_run, (trained, run))
    assert len(saves) == len(set(saves)) == 4 * STEPS
    _, student = distill.evaluate_plan(
        make_plan(), trained, VALIDATION, reference="teacher", repeats=1
    )
    assert student.agreement > 0.8

    def keep_temperature(student, teachers, batch, context):
        return follow_progress(student, teachers, batch, context._replace(progress=0))

    constant, _ = train(tmp_path / "constant", make_plan(keep_temperature), **OPTIONS)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(
            constant["student"][0].variables, trained["student"][0].variables, rtol=1e-3
        )


def test_divergence_in_the_last_step_stops_the_run(tmp_path):
    stage = make_stage("diverging", tx=optax.sgd(float("nan")), steps=1)
    message = (
        "diverging, seed 0: the validation loss is nan after step 1, since 39 weights are NaN or "
        "infinite, and training has diverged; try a smaller learning rate"
    )
    with pytest.raises(runs.RunError, match=message):
        train(tmp_path, [stage])


def test_divergence_stops_the_run_and_keeps_finished_stages(tmp_path):
    plan = [make_stage("first"), make_stage("diverging", tx=optax.sgd(1e30))]
    message = "diverging, seed 0: the loss is (nan|inf) in step [2-9], and .*smaller learning rate"
    with pytest.raises(runs.RunError, match=message):
        train(tmp_path, plan)
    assert not (tmp_path / "checkpoints" / "seed0" / "diverging").exists()
    assert (tmp_path / "checkpoints" / "seed0" / "first" / f"{STEPS}.json").exists()


def test_lost_records_are_an_error(tmp_path):
    plan = [make_stage("first")]
    train(tmp_path, plan)
    (tmp_path / "metrics.jsonl").unlink()
    message = "lost the records of first, seed 0: delete .*first to train it again"
    with pytest.raises(runs.RunError, match=message):
        train(tmp_path, plan)


def make_loop(steps, evaluations, *, first_step=0, steps_per_call=1):
    """Makes the part of a training loop that chooses where it stops."""
    loop = object.__new__(_loop.TrainingLoop)
    loop.group = types.SimpleNamespace(steps=steps, first_step=first_step)
    loop._placement = types.SimpleNamespace(steps_per_call=steps_per_call)
    loop._evaluations = min(evaluations, steps)
    return loop


@pytest.mark.parametrize("steps_per_call", [1, 4, 32])
@pytest.mark.parametrize("steps", [1, 7, 12, 33])
@pytest.mark.parametrize("evaluations", [1, 3, 10, 12, 100])
def test_stops_are_the_evaluations_and_the_ends_of_calls(steps, evaluations, steps_per_call):
    expected = {math.ceil(steps * (i + 1) / evaluations) for i in range(evaluations)}
    stops = {*range(0, steps, steps_per_call), *expected}
    for first in range(steps):
        loop = make_loop(steps, evaluations, first_step=first, steps_per_call=steps_per_call)
        assert list(loop._stops()) == [first, *sorted(stop for stop in stops if stop > first)]
        last = max((step for step in expected if step <= first), default=0)
        assert loop._last_evaluation(first) == last
    assert loop._last_evaluation(steps) == steps


def test_billions_of_steps_and_evaluations_take_neither_time_nor_memory():
    tracemalloc.start()
    try:
        loop = make_loop(10**12, 2 * 10**9, first_step=10**11)
        assert list(itertools.islice(loop._stops(), 4)) == [10**11 + i for i in range(4)]
        every = make_loop(10, 10**18)
        assert list(every._stops()) == list(range(11))
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()


def test_metrics_that_move_to_the_host_change_no_record(unbroken, tmp_path, monkeypatch):
    monkeypatch.setattr(_metric_buffer, "METRICS_ON_DEVICE", 2)
    trained, run = train(tmp_path, make_chain(), **OPTIONS)
    assert_same_training(trained, run, unbroken)


@pytest.mark.parametrize(
    "options",
    [
        {"tx": optax.sgd(0.0)},
        {"tx": transfer.freeze(optax.sgd(0.1), "{rest...}")},
        {"loss": lambda s, t, b, c: hard_loss(jax.lax.stop_gradient(s), t, b, c)},
    ],
    ids=["rate 0", "frozen", "no gradient"],
)
def test_a_training_that_learns_nothing_is_said(tmp_path, options):
    match = "first, seed 0: all 3 evaluations have the same loss and accuracy, as if nothing was"
    with pytest.warns(UserWarning, match=match):
        train(tmp_path / "still", [make_stage("first", **options)], evaluations=3)
    train(tmp_path / "moving", [make_stage("first")], evaluations=3)
    # Nothing can be said of one evaluation.
    train(tmp_path / "one", [make_stage("first", **options)], evaluations=1)
