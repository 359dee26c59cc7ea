"""Rows of results hold every value, survive JSON and summarize the seeds."""

import json

import jax
import numpy as np
import pytest

from jaxkd import evaluate
from jaxkd.models import CNN, from_linen, with_input_normalization
from jaxkd.runs import ResultRow, summarize
from jaxkd.runs.results import COLUMNS, TIMINGS, format_mean_and_std, rows_without_timings

KEYS = (
    "name accuracy accuracy_mean accuracy_std accuracy_interval agreement ece parameters bytes "
    "flops latency_ms latency_p95_ms throughput_batch throughput_latency_ms "
    "throughput_latency_p95_ms seconds"
).split()


@pytest.fixture(scope="module")
def small():
    model = with_input_normalization(from_linen(CNN(features=(4,), hidden=8)), [0.5] * 3, [0.2] * 3)
    images = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), np.uint8)
    return model, model.init(jax.random.key(0), images), images


def test_a_row_holds_every_key_as_json(small):
    model, variables, images = small
    labels = np.arange(7)
    teacher = 9 * np.eye(7, 10)
    logits = [9 * np.eye(7, 10), 9 * np.eye(7, 10)[[0, 1, 2, 3, 4, 0, 0]]]
    row = summarize(
        "student",
        model,
        [variables] * 2,
        logits,
        images,
        labels,
        reference_logits=[teacher, logits[1]],
        seconds=[1, 2.5],
        throughput_batch=4,
        repeats=2,
    )
    values = row.to_json()
    assert list(values) == KEYS
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert ResultRow.from_json(values) == row
    assert values["accuracy"] == [1.0, 5 / 7]
    assert values["accuracy_mean"] == row.accuracy_mean == pytest.approx(6 / 7)
    assert values["accuracy_std"] == row.accuracy_std == pytest.approx((2 / 7) / 2**0.5)
    assert row.accuracy_interval == pytest.approx(evaluate.accuracy_interval(6, 7))
    assert row.agreement == 1.0 and row.throughput_batch == 4 and row.seconds == (1.0, 2.5)
    metrics = [evaluate.classification_metrics(seed_logits, labels) for seed_logits in logits]
    assert row.ece == pytest.approx(np.mean([seed.ece for seed in metrics]))
    assert (row.parameters, row.bytes) == (498, 498 * 4)


def test_one_seed_has_no_deviation_and_reruns_differ_in_timings_alone(small):
    model, variables, images = small
    arguments = "student", model, [variables], [9 * np.eye(7, 10)], images, np.zeros(7, int)
    first, second = (summarize(*arguments, seconds=[time], repeats=1) for time in (1.0, 2.0))
    assert first.accuracy_std is None and first.agreement is None and first.throughput_batch == 7
    assert set(TIMINGS) < set(first.to_json()) and first.seconds != second.seconds
    assert rows_without_timings([first]) == rows_without_timings([second])
    assert set(rows_without_timings([first])["student"]) == set(KEYS) - set(TIMINGS)


def test_a_row_needs_an_entry_of_each_kind_per_seed(small):
    model, variables, images = small
    logits = [9 * np.eye(7, 10)] * 2
    with pytest.raises(ValueError, match=r"student: .* one entry per seed, got \[1, 2, 2, 2\]"):
        summarize("student", model, [variables], logits, images, np.arange(7), seconds=[1, 2])
    with pytest.raises(ValueError, match="one entry per seed"):
        summarize("student", model, [], [], images, np.arange(7), seconds=[])


@pytest.mark.parametrize(
    "counts",
    [{"throughput_batch": 0}, {"throughput_batch": -1}, {"repeats": 2.5}, {"repeats": 0}],
)
def test_the_counts_of_a_timing_are_whole_numbers(small, counts):
    model, variables, images = small
    arguments = "student", model, [variables], [9 * np.eye(7, 10)], images, np.arange(7)
    ((name, value),) = counts.items()
    with pytest.raises(ValueError, match=f"{name} must be a whole number .* 1, got {value}$"):
        summarize(*arguments, seconds=[1], **counts)


def test_a_row_without_an_accuracy_has_no_mean():
    row = ResultRow("translator", extra={"bleu": [30.1, 30.5]})
    assert row.accuracy_mean is None and row.accuracy_std is None
    assert row.to_json()["bleu"] == [30.1, 30.5]
    assert ResultRow.from_json(json.loads(json.dumps(row.to_json()))) == row
    assert ResultRow.from_json({"name": "translator", "bleu": [30.1, 30.5]}) == row


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("student", "a row of results needs a name, got 'student'"),
        ({"accuracy": [0.5]}, "needs a name"),
        ({"name": None}, "needs a name"),
        ({"name": "student", "accuracy": None}, "accuracy must be a list of numbers, got None"),
        ({"name": "student", "seconds": 3.0}, "seconds must be a list of numbers, got 3.0"),
        ({"name": "student", "accuracy_interval": ["low"]}, "accuracy_interval must be a list"),
        ({"name": "student", "accuracy": [10**400]}, "accuracy must be a list of numbers, got"),
        ({"name": "student", "flops": float("nan")}, "flops must be a finite number, got nan"),
        ({"name": "student", "ece": "low"}, "ece must be a finite number, got 'low'"),
        ({"name": "student", "bytes": [1]}, r"bytes must be a finite number, got \[1\]"),
    ],
)
def test_damaged_rows_are_refused(row, message):
    with pytest.raises(ValueError, match=message):
        ResultRow.from_json(row)


def test_columns_have_one_title_and_one_priority_each():
    assert len({column.title for column in COLUMNS}) == len(COLUMNS)
    assert sorted(column.priority for column in COLUMNS) == list(range(len(COLUMNS)))
    row = ResultRow("student")
    assert [column.cell(row) for column in COLUMNS] == ["student", *[""] * (len(COLUMNS) - 1)]


def test_mean_and_deviation_as_text():
    assert format_mean_and_std([]) == ""
    assert format_mean_and_std([0.864], scale=100) == "86.4"
    assert format_mean_and_std([1.0, 2.0, 3.0]) == "2.0 ± 1.0"
