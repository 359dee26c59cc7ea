"""Tests of what is recorded at an evaluation: terms of the loss, teachers, and own scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import distill, evaluate, losses, runs
from jaxkd.runs import redraw, report
from small_plans import (
    PLACEMENTS,
    VALIDATION,
    get_losses,
    make_model,
    make_stage,
    train,
    train_with_kill,
)


def two_terms(student, teachers, batch, context):
    ce = losses.hard_cross_entropy(student.logits, batch["labels"])
    kd = losses.kl_divergence(student.logits, teachers[0].logits, temperature=2.0)
    return 0.3 * ce + 0.7 * kd, {"ce": ce, "kd": kd}


def make_plan(**options):
    return [
        make_stage("teacher", width=6),
        make_stage("student", loss=two_terms, teachers=("teacher",), **options),
    ]


def get_records(run, stage="student"):
    return [record for record in run.metrics() if record["stage"] == stage]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return train(tmp_path_factory.mktemp("unbroken"), make_plan(), evaluations=3)


# Terms of the loss


def test_terms_add_up_to_the_loss(unbroken):
    records = get_records(unbroken[1])
    assert len(records) == 3
    for record in records:
        total = 0.3 * record["terms"]["ce"] + 0.7 * record["terms"]["kd"]
        assert record["loss"] == pytest.approx(total, rel=1e-5)
    assert all("terms" not in record for record in get_records(unbroken[1], "teacher"))


def test_terms_do_not_move_a_bit_of_the_student(unbroken, tmp_path):
    plain = make_plan()
    plain[1] = make_stage(
        "student", loss=lambda *inputs: two_terms(*inputs)[0], teachers=("teacher",)
    )
    trained, run = train(tmp_path, plain, evaluations=3)
    assert get_losses(run, "student") == get_losses(unbroken[1], "student")
    for ours, theirs in zip(
        jax.tree.leaves(trained["student"][0].variables),
        jax.tree.leaves(unbroken[0]["student"][0].variables),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("number", [16, 17], ids=["after an evaluation", "between two"])
@pytest.mark.parametrize("cached", [False, True], ids=["live", "cached"])
def test_resumed_training_repeats_the_records(monkeypatch, tmp_path, cached, number):
    plan = make_plan(cache_teachers=cached)
    _, run = train(tmp_path / "unbroken", plan, evaluations=3)
    _, resumed, _ = train_with_kill(
        monkeypatch, tmp_path / "killed", lambda: plan, number, evaluations=3
    )
    assert get_records(resumed) == get_records(run)


@pytest.mark.thorough
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_terms_on_every_placement(unbroken, tmp_path, placement):
    plan = make_plan(batch_size=16)
    _, run = train(tmp_path, plan, placement=PLACEMENTS[placement](), evaluations=3)
    for ours, expected in zip(get_records(run), get_records(unbroken[1]), strict=True):
        assert ours["terms"] == pytest.approx(expected["terms"], rel=1e-4)


@pytest.mark.parametrize(
    ("result", "error", "match"),
    [
        (lambda v: (v, {"kd": v.mean()}), ValueError, "the term 'kd' of the loss must have one"),
        (lambda v: (v, {"loss": v}), ValueError, "a name other than 'loss', got 'loss'"),
        (lambda v: (v, {3: v}), ValueError, "a name other than 'loss', got 3"),
        (lambda v: (v, v), TypeError, r"values \[B\], or \(values, {'kd'"),
        (lambda v: (v, {"n": v.astype(int)}), TypeError, "'n' of the loss must have floating"),
        (lambda v: (v, {"n": 1.0}), TypeError, "the term 'n' of the loss must be an array"),
    ],
)
def test_unsound_terms(tmp_path, result, error, match):
    def loss(student, teachers, batch, context):
        return result(losses.hard_cross_entropy(student.logits, batch["labels"]))

    with pytest.raises(error, match=match):
        train(tmp_path, [make_stage("first", loss=loss)])


# Distance from the teachers


def test_evaluations_compare_the_student_with_its_teacher(unbroken):
    trained, run = unbroken
    predict = evaluate.make_predict(make_model())
    student = predict(trained["student"][0].variables, VALIDATION["inputs"])
    predict = evaluate.make_predict(make_model(6))
    teacher = predict(trained["teacher"][0].variables, VALIDATION["inputs"])
    student, teacher = (np.float64(logits) for logits in (student, teacher))
    log_q, log_p = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (student, teacher))
    expected = {
        "kl": pytest.approx((np.exp(log_p) * (log_p - log_q)).sum(-1).mean(), rel=1e-4),
        "agreement": (student.argmax(-1) == teacher.argmax(-1)).mean(),
    }
    assert get_records(run)[-1]["teachers"] == {"teacher": expected}
    assert "teachers" not in get_records(run, "teacher")[-1]


# Scores of one's own


def make_regression_score(model):
    def score(variables, examples):
        logits = model.apply(variables, jnp.asarray(examples["inputs"]), train=False)[0].logits
        error = np.asarray(logits)[:, 0] - examples["inputs"][:, 0]
        return {"rmse": np.sqrt(np.mean(error**2)), "bias": error.mean()}

    return score


def test_own_scores_are_recorded_by_name(tmp_path, capsys):
    trained, run = train(
        tmp_path, [make_stage("first")], make_score=make_regression_score, evaluations=2
    )
    record = get_records(run, "first")[-1]
    assert {"validation_rmse", "validation_bias"} < record.keys()
    assert "validation_accuracy" not in record
    model = trained["first"][0]
    assert model.scores == {"rmse": record["validation_rmse"], "bias": record["validation_bias"]}
    assert np.isnan(model.validation_accuracy)
    assert f"rmse {model.scores['rmse']:.4g}" in capsys.readouterr().out


def test_table_and_report_have_own_scores(tmp_path):
    plan = [make_stage("first"), make_stage("second", width=6)]
    trained, run = train(tmp_path, plan, seeds=(0, 1), make_score=make_regression_score)
    rows = distill.evaluate_plan(
        plan, trained, VALIDATION, make_score=make_regression_score, repeats=1
    )
    assert rows[1].scores["rmse"] == tuple(model.scores["rmse"] for model in trained["second"])
    assert rows[0].accuracy == () and rows[0].parameters == 39
    report.report_run(run, rows, title="Regression")
    text = (tmp_path / "report.md").read_text()
    header = next(line for line in text.splitlines() if line.startswith("| name"))
    titles = [cell.strip() for cell in header.strip("|").split("|")]
    assert titles[:4] == ["name", "rmse", "bias", "parameters"]
    mean, std = np.mean(rows[0].scores["rmse"]), np.std(rows[0].scores["rmse"], ddof=1)
    assert f"{mean:.4g} ± {std:.2g}" in text
    assert "accuracy" not in text and not (tmp_path / "accuracy.png").exists()
    assert run.read_results() == rows
    redrawn = redraw.redraw_report(tmp_path)
    assert redrawn.rows == rows and (tmp_path / "report.md").read_text() == text


def test_a_term_that_is_nan_is_recorded_as_null(tmp_path):
    def loss(student, teachers, batch, context):
        values = losses.hard_cross_entropy(student.logits, batch["labels"])
        return values, {"unused": values * jnp.nan}

    _, run = train(tmp_path, [make_stage("first", loss=loss)], evaluations=1)
    assert get_records(run, "first")[0]["terms"] == {"unused": None}
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_a_score_in_place_of_make_score_is_refused_by_the_table(tmp_path, unbroken):
    with pytest.raises(TypeError, match="make_score must be a function of a model"):
        distill.evaluate_plan(
            make_plan(), unbroken[0], VALIDATION, make_score=lambda variables, examples: {"a": 1.0}
        )


def test_a_table_of_classes_needs_a_reference(unbroken):
    with pytest.raises(
        ValueError, match="pass reference=..., one of teacher, student, or a make_score"
    ):
        distill.evaluate_plan(make_plan(), unbroken[0], VALIDATION)


@pytest.mark.parametrize(
    ("score", "error", "match"),
    [
        (0.5, TypeError, "a score must return a Score or a dict such as"),
        ({}, TypeError, "a score must return a Score or a dict such as"),
        ({"rmse": np.zeros(3)}, TypeError, "numbers by name, got array"),
        ({"rmse": "0.5"}, TypeError, "numbers by name, got '0.5' as 'rmse'"),
        ({"rmse": {"mean": 0.5}}, TypeError, "numbers by name, got {'mean': 0.5} as 'rmse'"),
        ({"rmse": np.nan}, runs.RunError, "although all weights are finite: correct the score"),
        ({"rmse": float("nan"), "loss": 1.0}, runs.RunError, "rmse is nan after step 12, although"),
    ],
)
def test_unsound_own_scores(tmp_path, score, error, match):
    with pytest.raises(error, match=match):
        train(tmp_path, [make_stage("first")], make_score=lambda _: lambda *_: score, evaluations=1)


def test_an_error_in_make_score_comes_before_the_training(tmp_path):
    def make_score(model):
        raise LookupError("no such metric")

    with pytest.raises(LookupError, match="no such metric"):
        train(tmp_path, [make_stage("first", steps=10**6)], make_score=make_score)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        (
            {"make_score": lambda variables, examples: {"rmse": 1.0}},
            TypeError,
            "must be a function of a model",
        ),
        ({"make_score": lambda model: {"rmse": 1.0}}, TypeError, "make_score returned {'rmse': 1"),
        ({}, ValueError, "the best of stage 'first' is by 'rmse', but its scores are loss, accur"),
    ],
)
def test_scores_that_cannot_be_are_refused_before_the_training(tmp_path, options, error, match):
    plan = [make_stage("first", steps=10**6, best=distill.Best("rmse", largest=False))]
    with pytest.raises(error, match=match):
        train(tmp_path, plan, **options)
    assert not (tmp_path / "checkpoints").exists()


def test_a_stage_may_have_scores_where_a_pretrained_has_others(tmp_path):
    model = make_model(6)
    variables = model.init(jax.random.key(0), VALIDATION["inputs"][:1])
    plan = [distill.Pretrained("teacher", model, variables), make_plan()[1]]
    _, run = train(tmp_path, plan, evaluations=1)
    assert get_records(run)[0]["teachers"]["teacher"]["kl"] > 0
