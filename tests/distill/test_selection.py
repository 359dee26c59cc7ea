"""Tests of averages of the weights, of the best evaluation, and of trainings that end early."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkd import distill, losses, models, runs
from small_plans import (
    PLACEMENTS,
    TRAIN,
    VALIDATION,
    make_model,
    make_stage,
    soft_loss,
    train,
    train_with_kill,
)

DECAY = 0.9


def from_average(student, teachers, batch, context):
    return soft_loss(student, teachers, batch, context) + losses.hard_cross_entropy(
        student.logits, batch["labels"]
    )


def make_averaged(**options):
    defaults = {"ema_decay": DECAY, "loss": from_average, "teachers": (distill.AVERAGE,)}
    return make_stage("averaged", batch_norm=True, dropout=0.2, **defaults | options)


def scripted_scores(values):
    """Makes scores that follow a list, whatever the weights. Resumed trainings go on in it."""

    def make_score(model):
        def score(variables, examples):
            return {"error": values[int(variables["params"]["step"])], "loss": 0.0}

        return score

    return make_score


def scripted_rates(model):
    return lambda variables, examples: {"step": variables["params"]["step"]}


def count_steps():
    """Makes a model whose parameter counts the steps, under plain descent at rate 1."""

    def init(key, inputs):
        return {"params": {"step": jnp.zeros(())}, "batch_stats": {}}

    def apply(variables, inputs, *, train, key=None):
        logits = jnp.zeros((len(inputs), 3)) + variables["params"]["step"]
        return models.Outputs(logits, {}), {}

    return models.Model(init, apply)


COUNTER = count_steps()


def make_counter(name="counter", **options):
    def loss(student, teachers, batch, context):
        return -student.logits[:, 0]

    return distill.Stage(name, COUNTER, TRAIN, loss, optax.sgd(1.0), batch_size=4, **options)


def train_counter(folder, values, seeds=(0,), names=("counter",), *, placement=None, **best):
    best = distill.Best("error", largest=False, **best)
    plan = [make_counter(name, steps=len(values) - 1, best=best) for name in names]
    return train(
        folder,
        plan,
        seeds,
        make_score=scripted_scores(values),
        evaluations=len(values) - 1,
        placement=placement,
    )


def assert_equal(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


# Average


def test_average_follows_its_formula(tmp_path):
    plan = [make_counter(steps=4, ema_decay=0.25)]
    trained, _ = train(tmp_path, plan, make_score=scripted_rates)
    average = 0.0
    for step in range(4):
        decay = min(0.25, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * (step + 1)
    assert trained["counter"][0].variables["params"]["step"] == pytest.approx(average, rel=1e-6)


def test_average_is_held_in_float32():
    variables = {"params": {"w": jnp.ones(3, jnp.bfloat16)}, "batch_stats": {"n": jnp.arange(3)}}
    tx = optax.sgd(0.1)
    state = distill.init_train_state(variables, tx, has_average=True)
    assert state.average["params"]["w"].dtype == jnp.float32
    assert state.average_variables["params"]["w"].dtype == jnp.bfloat16
    assert state.average_variables["batch_stats"]["n"].dtype == variables["batch_stats"]["n"].dtype


@pytest.mark.parametrize("number", [3, 9])
def test_resumed_training_repeats_the_average(monkeypatch, tmp_path, number):
    best = distill.Best("loss", patience=2)
    trained, run = train(tmp_path / "unbroken", [make_averaged(best=best)])
    resumed, other, _ = train_with_kill(
        monkeypatch, tmp_path / "killed", lambda: [make_averaged(best=best)], number
    )
    assert_equal(resumed["averaged"][0].variables, trained["averaged"][0].variables)
    assert other.metrics() == run.metrics()


@pytest.mark.thorough
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_average_on_every_placement(tmp_path, placement):
    stage = make_averaged(batch_size=16, loss=from_average)
    stage = make_stage(
        "averaged", loss=from_average, teachers=(distill.AVERAGE,), ema_decay=DECAY, batch_size=16
    )
    trained, _ = train(tmp_path / "here", [stage], placement=PLACEMENTS[placement]())
    expected, _ = train(tmp_path / "alone", [stage])
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5),
        trained["averaged"][0].variables,
        expected["averaged"][0].variables,
    )


def test_the_average_teaches_what_it_was_before_the_step():
    def loss(student, teachers, batch, context):
        return (teachers[0].logits - student.logits)[:, 0]

    step = distill.make_train_step(COUNTER, optax.sgd(1.0), loss, teachers=[COUNTER], ema_decay=0.5)
    variables = {"params": {"step": jnp.ones(())}, "batch_stats": {}}
    state = distill.init_train_state(variables, optax.sgd(1.0), has_average=True)
    differences = []
    for _ in range(3):
        state, metrics = step(state, {"inputs": TRAIN["inputs"]}, (None,), jax.random.key(0))
        differences.append(float(metrics["loss"]))
    # Rates of the average: 0.1, 2/11, 0.25; the weights are 1, 2, 3 before the steps.
    averages = [1.0, 0.1 * 1 + 0.9 * 2]
    averages.append(2 / 11 * averages[1] + 9 / 11 * 3)
    np.testing.assert_allclose(differences, np.array(averages) - [1, 2, 3], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"ema_decay": 1.0}, ValueError, "has ema_decay=1.0: it must be between 0 and 1"),
        ({"ema_decay": True}, TypeError, "must be a number between 0 and 1, got True"),
        ({"ema_decay": None}, ValueError, "learns from its own average: it needs an ema_decay"),
        ({"cache_teachers": True}, ValueError, "its teachers cannot be cached"),
        ({"best": "accuracy"}, TypeError, "must be such as Best"),
        ({"best": distill.Best("rmse")}, ValueError, "write largest=True or largest=False"),
        ({"best": distill.Best(3)}, TypeError, "needs the name of a score"),
        ({"best": distill.Best(patience=0)}, ValueError, "whole number of at least 1, or None"),
        ({"best": distill.Best(patience=1.5)}, ValueError, "whole number of at least 1, or None"),
    ],
)
def test_unfit_options(options, error, match):
    with pytest.raises(error, match=match):
        make_averaged(**options)


def test_state_and_step_agree_on_the_average():
    tx = optax.sgd(1.0)
    step = distill.make_train_step(COUNTER, tx, make_counter(steps=1).loss, ema_decay=0.5)
    state = distill.init_train_state(COUNTER.init(None, None), tx)
    with pytest.raises(ValueError, match="needs init_train_state\\(has_average=True\\)"):
        step(state, {"inputs": TRAIN["inputs"]}, (), jax.random.key(0))


# Best evaluation


def test_the_best_evaluation_is_returned(tmp_path, capsys):
    #                                      step: 0  1  2  3  4  5
    trained, run = train_counter(tmp_path, [0.0, 5, 2, 3, 2, 4])
    (model,) = trained["counter"]
    assert (model.step, model.scores["error"]) == (2, 2.0)
    assert model.variables["params"]["step"] == 2
    assert [record["step"] for record in run.metrics()] == [1, 2, 3, 4, 5]
    assert "after 2 steps, the best of 5, and" in capsys.readouterr().out
    again, _ = train_counter(tmp_path, [0.0, 5, 2, 3, 2, 4])
    assert_equal(again["counter"][0], model)


@pytest.mark.parametrize("placement", [None, "vectorized"])
def test_patience_ends_a_training(tmp_path, capsys, placement):
    values = [0.0, 5, 2, 3, 4, 1, 0]
    options = {"patience": 2, "placement": placement and PLACEMENTS[placement]()}
    trained, run = train_counter(tmp_path, values, **options)
    assert trained["counter"][0].step == 2
    assert [record["step"] for record in run.metrics()] == [1, 2, 3, 4]
    assert runs.checkpoints.load(run.checkpoint_folder(0, "counter")).step == 4
    assert "after 2 steps, the best of 4 (ended early), and" in capsys.readouterr().out
    again, run = train_counter(tmp_path, values, **options)
    assert_equal(again["counter"][0].variables, trained["counter"][0].variables)
    assert len(run.metrics()) == 4


def test_students_of_a_group_end_at_their_own_steps(tmp_path):
    """One that ended early is as if it had trained alone."""

    def make_plan():
        return [
            make_stage(name, best=distill.Best("loss", patience=patience), tx=optax.sgd(rate))
            for name, patience, rate in (("patient", 9, 0.1), ("hasty", 1, 0.1))
        ]

    # All inputs of another class than their labels, so that the loss soon rises.
    wrong = {**VALIDATION, "labels": (VALIDATION["labels"] + 1) % 3}
    options = {"validation": wrong, "evaluations": 12}
    trained, run = train(
        tmp_path / "group", make_plan(), placement=PLACEMENTS["vectorized"](), **options
    )
    alone, _ = train(tmp_path / "alone", make_plan(), **options)
    last = {r["stage"]: r["step"] for r in run.metrics()}
    assert last["hasty"] < last["patient"]
    for name in ("patient", "hasty"):
        assert trained[name][0].step == alone[name][0].step
        jax.tree.map(
            lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5),
            trained[name][0].variables,
            alone[name][0].variables,
        )
    again, _ = train(
        tmp_path / "group", make_plan(), placement=PLACEMENTS["vectorized"](), **options
    )
    assert_equal(again["hasty"][0].variables, trained["hasty"][0].variables)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_kill_changes_neither_best_nor_end(monkeypatch, tmp_path, number):
    values = [0.0, 5, 2, 3, 4, 1, 0]
    best = distill.Best("error", largest=False, patience=2)
    trained, run, _ = train_with_kill(
        monkeypatch,
        tmp_path,
        lambda: [make_counter(steps=6, best=best)],
        number,
        make_score=scripted_scores(values),
        evaluations=6,
    )
    model = trained["counter"][0]
    assert (model.step, float(model.variables["params"]["step"])) == (2, 2.0)
    assert [record["step"] for record in run.metrics()] == [1, 2, 3, 4]


def test_another_patience_is_another_training(tmp_path):
    values = [0.0, 5, 2, 3, 4, 1, 0]
    train_counter(tmp_path, values, patience=2)
    with pytest.raises(runs.RunError, match=r"best.*patience 2"):
        train_counter(tmp_path, values, patience=3)


def test_a_longer_training_is_evaluated_at_other_steps(tmp_path):
    stage = make_stage("first", best=distill.Best("loss"))
    train(tmp_path, [stage], config={"steps": 12}, grow=True)
    longer = make_stage("first", best=distill.Best("loss"), steps=24)
    trained, _ = train(tmp_path, [longer], config={"steps": 24}, grow=True)
    fresh, _ = train(tmp_path / "fresh", [longer])
    assert_equal(trained["first"][0].variables, fresh["first"][0].variables)


def test_an_unknown_score_is_named_before_the_first_step(tmp_path):
    stage = make_stage("first", best=distill.Best("f1", largest=True), steps=10**6)
    with pytest.raises(ValueError, match="by 'f1', but its scores are loss, accuracy"):
        train(tmp_path, [stage])
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_a_student_of_the_best_learns_from_it(tmp_path):
    stage = make_stage("teacher", best=distill.Best("loss"))
    student = make_stage("student", loss=soft_loss, teachers=("teacher",))
    trained, _ = train(tmp_path, [stage, student])
    pretrained = distill.Pretrained("teacher", make_model(), trained["teacher"][0].variables)
    again, _ = train(tmp_path / "again", [pretrained, student])
    assert_equal(again["student"][0].variables, trained["student"][0].variables)
