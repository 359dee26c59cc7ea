"""Stages on records that are read one after another: in order, and resumed with the same bits."""

import threading

import chex
import numpy as np
import pytest

from jaxkd import data
from jaxkd.data import sequential
from jaxkd.data.bucketing import LengthBuckets
from jaxkd.distill import _batches, _stream
from jaxkd.runs import RunError
from small_plans import (
    PLACEMENTS,
    TRAIN,
    get_variables,
    make_stage,
    soft_loss,
    train,
    train_with_kill,
)

COUNT = len(TRAIN["inputs"])


class Source:
    """The training examples in order, and the positions that were read."""

    def __init__(self, examples=TRAIN, *, has_state=True):
        self.examples, self.has_state = examples, has_state
        self.reads = []

    def __iter__(self):
        return (StatefulIterator if self.has_state else Iterator)(self)


class Iterator:
    def __init__(self, source):
        self.source, self.position = source, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.position == COUNT:
            raise StopIteration
        self.source.reads.append(self.position)
        self.position += 1
        return {name: a[self.position - 1] for name, a in self.source.examples.items()}


class StatefulIterator(Iterator):
    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


@pytest.fixture(autouse=True)
def small_sample(monkeypatch):
    """Most records are read by the iterator of the training."""
    monkeypatch.setattr(sequential, "SAMPLE_SIZE", 4)


def make_records(source=None):
    return data.SequentialRecords(source or Source(), count=COUNT)


@pytest.mark.parametrize("placement", ["one device", "mesh of 8"])
def test_trains_as_on_arrays_in_the_order_of_the_source(tmp_path, monkeypatch, placement):
    options = {"batch_norm": True, "dropout": 0.5, "steps": 7}
    make_placement = PLACEMENTS[placement]
    streamed, run = train(
        tmp_path / "1",
        [make_stage("s", data=make_records(), **options)],
        placement=make_placement(),
    )
    in_order = _batches.make_sequential_order
    monkeypatch.setattr(
        _batches, "make_order", lambda key, n, size: lambda step: in_order(size)(step) % n
    )
    trained, array_run = train(
        tmp_path / "2", [make_stage("s", **options)], placement=make_placement()
    )
    chex.assert_trees_all_equal(get_variables(streamed), get_variables(trained))
    assert run.metrics() == array_run.metrics()


@pytest.mark.parametrize("number", [2, 6])
@pytest.mark.parametrize("has_state", [True, False])
def test_goes_on_with_the_records_of_an_unbroken_run(tmp_path, monkeypatch, number, has_state):
    unbroken, _ = train(tmp_path / "unbroken", [make_stage("s", data=make_records())])
    sources = []

    def make_plan():
        sources.append(Source(has_state=has_state))
        return [make_stage("s", data=make_records(sources[-1]))]

    resumed, _, saves = train_with_kill(monkeypatch, tmp_path / "killed", make_plan, number)
    chex.assert_trees_all_equal(get_variables(unbroken), get_variables(resumed))
    step = saves[number - 1][1]
    read_again = step * 16 % COUNT if not has_state else 0
    # The sample, the first record for shapes, and what remains.
    assert len(sources[1].reads) <= 16 * (12 - step) + read_again + 8


@pytest.mark.thorough
def test_a_late_batch_is_read_again_for_the_cause_of_a_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(_stream, "STEPS_BETWEEN_STATES", 2)
    inputs = TRAIN["inputs"].copy()
    inputs[40] = np.nan
    is_armed = False

    class LateSource(Source):
        def __iter__(self):
            self.examples = {**TRAIN, "inputs": inputs if is_armed else TRAIN["inputs"]}
            return super().__iter__()

    records = make_records(LateSource())
    assert np.isfinite(records.sample["inputs"]).all()
    is_armed = True
    # Row 40 of the first epoch is in the third batch of 16.
    with pytest.raises(RunError, match="in step 3: of its batch, 1 of 16 examples"):
        train(tmp_path, [make_stage("s", data=records)])
    assert not [thread for thread in threading.enumerate() if "jaxkd-read" in thread.name]


def test_other_records_do_not_resume(tmp_path):
    train(tmp_path, [make_stage("s", data=make_records())])
    changed = Source({**TRAIN, "inputs": TRAIN["inputs"] + 1})
    with pytest.raises(RunError, match="its training data changed"):
        train(tmp_path, [make_stage("s", data=make_records(changed))])


@pytest.mark.parametrize(
    ("examples", "options", "message"),
    [
        ({}, {"views": 2}, "'s' are sequential, but views needs a number for each of them"),
        ({}, {"cache_teachers": True}, "'s' are sequential, but cache_teachers needs a number"),
        ({"labels": TRAIN["labels"]}, {}, "'s' are sequential, so that all of its arrays must be"),
    ],
)
def test_refuses_what_needs_the_numbers_of_records(tmp_path, examples, options, message):
    teacher = make_stage("t")
    if "views" in options:
        options |= {"augment": lambda key, x: x}
    if options:
        options |= {"teachers": ("t",), "loss": soft_loss}
    stage = make_stage("s", data={**make_records(), **examples}, **options)
    with pytest.raises(ValueError, match=message):
        train(tmp_path, [teacher, stage])


def test_refuses_buckets(tmp_path):
    with pytest.raises(ValueError, match="'s' are streamed, but buckets need the length"):
        train(tmp_path, [make_stage("s", data=make_records())], buckets=LengthBuckets((8,)))
