"""Stages on records that are read batch by batch train as those on arrays, bit for bit."""

import threading

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import data, distill
from jaxkd.data.bucketing import LengthBuckets
from jaxkd.distill import _stream
from jaxkd.runs import RunError
from small_plans import (
    PLACEMENTS,
    TRAIN,
    VALIDATION,
    add_noise,
    get_variables,
    hard_loss,
    make_stage,
    mesh_placement,
    soft_loss,
    train,
    train_with_kill,
)


class Source:
    """Examples as records, which keeps the numbers of those that were read."""

    def __init__(self, examples=TRAIN):
        self.examples = examples
        self.reads = []

    def __len__(self):
        return len(self.examples["inputs"])

    def __iter__(self):
        raise AssertionError("all records would be read")

    def __getitem__(self, index):
        self.reads.append(index)
        return {name: array[index] for name, array in self.examples.items()}


class LoopPlacement(distill.MeshPlacement):
    """Takes several steps in one loop, as on an accelerator."""

    steps_per_call = 8


def loop_placement():
    return LoopPlacement(distill.make_mesh(devices=jax.devices()[:2]))


MESHES = {
    "one device": lambda: mesh_placement(1),
    "mesh of 8": lambda: mesh_placement(8),
    "loop": loop_placement,
}


def make_plan(examples, **options):
    teacher = make_stage("teacher", 8, data=examples)
    student = make_stage("student", data=examples, teachers=("teacher",), loss=soft_loss, **options)
    return [teacher, student]


@pytest.mark.parametrize(
    ("placement", "options"),
    [
        ("one device", {"augment": add_noise, "views": 2, "cache_teachers": True}),
        ("one device", {"batch_norm": True, "augment": add_noise}),
        ("mesh of 8", {"batch_norm": True, "dropout": 0.5}),
        ("mesh of 8", {"batch_size": 15, "cache_teachers": True, "cache_top_k": 2}),
        ("loop", {"augment": add_noise, "views": 2, "cache_teachers": True}),
    ],
)
@pytest.mark.thorough
def test_trains_the_bits_of_arrays(tmp_path, placement, options):
    trained, metrics = [], []
    # Labels in memory, and a number that all batches share, beside the inputs of records.
    records = data.Records(Source(), lambda record: {"inputs": record["inputs"]})
    mixed = {**records, "labels": TRAIN["labels"], "scale": 2.0}
    for examples in ({**TRAIN, "scale": 2.0}, mixed, Source()):
        folder = tmp_path / str(len(trained))
        plan = make_plan(examples, **options)
        models, run = train(folder, plan, placement=MESHES[placement](), evaluations=5)
        trained.append(get_variables(models))
        metrics.append(run.metrics())
    for other, other_metrics in zip(trained[1:], metrics[1:], strict=True):
        chex.assert_trees_all_equal(trained[0], other)
        assert metrics[0] == other_metrics


def test_loop_of_an_accelerator_takes_few_large_batches(tmp_path, monkeypatch):
    models, _ = train(tmp_path / "1", [make_stage("s")], placement=loop_placement())
    monkeypatch.setattr(_stream, "MAX_CALL_BYTES", 16 * 24 * 2)
    plan = [make_stage("s", data=Source())]
    streamed, _ = train(tmp_path / "2", plan, placement=loop_placement())
    chex.assert_trees_all_equal(get_variables(models), get_variables(streamed))


def test_goes_on_with_the_batches_of_an_unbroken_run(tmp_path, monkeypatch):
    unbroken = Source()
    # Several threads would read in an order of their own.
    records = data.Records(unbroken, threads=1)
    trained, _ = train(tmp_path / "unbroken", [make_stage("s", data=records)])
    sources = []

    def make_plan():
        sources.append(Source())
        return [make_stage("s", data=data.Records(sources[-1], threads=1))]

    # The third of ten evaluations, at step 4 of 12, in the middle of an epoch.
    resumed, _, saves = train_with_kill(monkeypatch, tmp_path / "killed", make_plan, 4)
    assert saves[3][1] == 4
    chex.assert_trees_all_equal(get_variables(trained), get_variables(resumed))
    steps = 16 * (12 - 4)
    assert sources[1].reads[-steps:] == unbroken.reads[-steps:]


def test_reads_a_sample_and_the_batches_alone(tmp_path):
    examples = {name: np.tile(array.T, 20).T for name, array in TRAIN.items()}
    source = Source(examples)
    train(tmp_path, [make_stage("s", data=source)])
    # The sample, the first record for shapes, and that from which the network is initialised.
    assert len(source.reads) <= 256 + 12 * 16 + 4
    assert not [thread for thread in threading.enumerate() if "jaxkd-read" in thread.name]


def test_other_records_do_not_resume(tmp_path):
    train(tmp_path, [make_stage("s", data=data.Records(Source(), fingerprint="1"))])
    with pytest.raises(RunError, match="its training data changed"):
        train(tmp_path, [make_stage("s", data=data.Records(Source(), fingerprint="2"))])


def replace(name, row, value):
    array = TRAIN[name].copy()
    array[row] = value
    return {**TRAIN, name: array}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Source(replace("labels", 7, 3)), r"s, seed 0: .*3.*number the classes from 0"),
        (Source(replace("inputs", 7, np.nan)), "the loss is nan in step .: of its batch, 1 of 16"),
    ],
)
def test_finds_faults_in_records(tmp_path, source, message):
    with pytest.raises(RunError, match=message):
        train(tmp_path, [make_stage("s", data=source)])


def test_masked_labels_are_no_fault(tmp_path):
    def masked_loss(student, teachers, batch, context):
        is_known = batch["labels"] >= 0
        labels = jnp.maximum(batch["labels"], 0)
        values = hard_loss(student, teachers, {"labels": labels}, context)
        return jnp.where(is_known, values, 0.0)

    source = Source(replace("labels", 7, -1))
    train(tmp_path, [make_stage("s", data=source, loss=masked_loss)])


def test_error_of_a_reader_names_the_record_and_ends_the_threads(tmp_path):
    def convert(record):
        # Not in the sample, which is read before.
        if is_armed and record["inputs"][0] == TRAIN["inputs"][7, 0]:
            raise OSError("damaged")
        return record

    is_armed = False
    records = data.Records(Source(), convert)
    assert len(records.sample) == 2
    is_armed = True
    with pytest.raises(data.DataError, match=r"record 7 cannot be read \(OSError: damaged\)"):
        train(tmp_path, [make_stage("s", data=records)])
    assert not [thread for thread in threading.enumerate() if "jaxkd-read" in thread.name]


@pytest.mark.parametrize(
    ("placement", "options", "message"),
    [
        ("pmap", {}, "'s' are streamed, which a PmapPlacement does not do"),
        ("vectorized", {}, "'s' are streamed, which a VectorizedPlacement does not do"),
        ("one device", {"buckets": LengthBuckets((8,))}, "'s' are streamed, but buckets need"),
    ],
)
def test_refuses_what_needs_all_examples(tmp_path, placement, options, message):
    plan = [make_stage("s", data=Source())]
    with pytest.raises(ValueError, match=message):
        train(tmp_path, plan, placement=PLACEMENTS[placement](), **options)


def test_refuses_a_data_set_without_random_access():
    class IterDataset:
        def __iter__(self):
            return iter(())

    with pytest.raises(data.DataError, match="IterDataset cannot be read in any order: .*MapData"):
        make_stage("s", data=IterDataset())


def test_validation_inputs_may_be_records(tmp_path):
    plan = [make_stage("s", data=Source())]
    streamed = {**data.Records(Source(VALIDATION)), "labels": VALIDATION["labels"]}
    expected, run = train(tmp_path / "1", plan)
    trained, streamed_run = train(tmp_path / "2", plan, validation=streamed)
    assert run.metrics() == streamed_run.metrics()
    rows = [
        distill.evaluate_plan(plan, expected, test, reference="s", repeats=2)[0]
        for test in (VALIDATION, streamed)
    ]
    assert rows[0].accuracy == rows[1].accuracy
