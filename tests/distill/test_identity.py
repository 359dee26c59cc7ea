"""A checkpoint of other data, another program or another start is refused, and no other is."""

import dataclasses
import os
import shutil
import subprocess
import sys

import chex
import jax
import numpy as np
import optax
import pytest

from jaxkd import distill, runs
from jaxkd.data.bucketing import LengthBuckets
from jaxkd.distill import _identity
from jaxkd.distill._compile import compile_stages
from jaxkd.distill.placement import single_device
from small_plans import (
    PLACEMENTS,
    TRAIN,
    VALIDATION,
    add_noise,
    get_variables,
    hard_loss,
    kill_at_save,
    make_examples,
    make_model,
    make_stage,
    soft_loss,
    train,
)

STUDENT = {"teachers": ("teacher",), "loss": soft_loss, "steps": 2}


def make_plan(cached=False, **changes):
    """Makes a teacher and a student, which changes apply to."""
    student = {**STUDENT, "cache_teachers": cached, **changes}
    return [make_stage("teacher", 8, steps=2), make_stage("student", **student)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run of a teacher and a student, and its models."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    trained, _ = train(folder, make_plan())
    return folder, trained


@pytest.fixture
def folder(finished, tmp_path):
    """A copy, which a test may change."""
    return shutil.copytree(finished[0], tmp_path / "run")


def double_loss(*args):
    return 2.0 * soft_loss(*args)


def shift_first_weights(variables):
    return jax.tree.map(lambda leaf: leaf + 1, variables)


def make_shifted_init(model):
    return model._replace(init=lambda *args: shift_first_weights(model.init(*args)))


ONE_PIXEL = np.where(np.arange(TRAIN["inputs"].size).reshape(45, 5) == 7, 0, TRAIN["inputs"])
ONE_LABEL = np.where(np.arange(45) == 7, 2 - TRAIN["labels"] // 2, TRAIN["labels"])
PROGRAM = "its model, loss, optimizer or augmentation changed"
CHANGES = {
    "one pixel": ({"data": {**TRAIN, "inputs": ONE_PIXEL}}, "its training data changed"),
    "one label": ({"data": {**TRAIN, "labels": ONE_LABEL}}, "its training data changed"),
    "more examples": ({"data": make_examples(0, 46)}, "its training data changed"),
    "the loss": ({"loss": double_loss}, PROGRAM),
    "the learning rate": ({"tx": optax.sgd(0.2, momentum=0.9)}, PROGRAM),
    "the augmentation": ({"augment": add_noise}, "augment was False and is True"),
    "dropout": ({"model": make_model(dropout=0.5)}, PROGRAM),
    "the initial weights": ({"model": make_shifted_init(make_model())}, "its initial weights or"),
    "the steps": ({"steps": 3}, "steps was 2 and is 3"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_finished_stage_that_changed_is_refused_and_kept(folder, change):
    options, message = CHANGES[change]
    before = sorted(path for path in folder.rglob("*") if ".lock" not in path.name)
    pattern = rf"student holds another training \({message}.*\): delete that folder to train"
    with pytest.raises(runs.RunError, match=pattern) as raised:
        train(folder, make_plan(**options))
    assert str(raised.value).count("\n") == 0 and len(str(raised.value)) < 300
    assert sorted(path for path in folder.rglob("*") if ".lock" not in path.name) == before


@pytest.mark.thorough
@pytest.mark.parametrize("change", ["one pixel", "the loss", "the learning rate"])
def test_a_stage_that_was_stopped_in_the_middle_is_refused(tmp_path, monkeypatch, change):
    kill_at_save(monkeypatch, 3)
    with pytest.raises(SystemExit):
        train(tmp_path, make_plan(), save_every=0)
    options, message = CHANGES[change]
    with pytest.raises(runs.RunError, match=message):
        train(tmp_path, make_plan(**options), save_every=0)
    monkeypatch.undo()
    resumed, _ = train(tmp_path, make_plan())
    assert resumed["student"]


def test_a_learning_rate_that_is_state_is_noticed(tmp_path):
    def make_stages(rate):
        return [make_stage("first", tx=optax.inject_hyperparams(optax.sgd)(rate), steps=1)]

    with jax.numpy_dtype_promotion("standard"):
        train(tmp_path, make_stages(0.1))
        with pytest.raises(runs.RunError, match="the numbers in its optimizer's state changed"):
            train(tmp_path, make_stages(0.2))


def test_other_validation_data_are_refused(folder):
    with pytest.raises(runs.RunError, match="the validation data changed"):
        train(folder, make_plan(), validation=make_examples(2, 20))


def test_wider_labels_are_the_same_data(folder, finished):
    """int64 becomes int32 on the device: the training does not change."""
    wide = {**TRAIN, "labels": np.asarray(TRAIN["labels"], np.int64)}
    assert wide["labels"].dtype != np.asarray(TRAIN["labels"]).dtype
    trained, _ = train(folder, [dataclasses.replace(s, data=wide) for s in make_plan()])
    chex.assert_trees_all_equal(get_variables(trained), get_variables(finished[1]))


@pytest.mark.thorough
def test_a_deleted_teacher_is_trained_again_and_its_student_is_refused(folder):
    plan = make_plan()
    plan[0] = dataclasses.replace(plan[0], loss=lambda *args: 2.0 * hard_loss(*args))
    with pytest.raises(runs.RunError, match=rf"teacher holds another training \({PROGRAM}"):
        train(folder, plan)
    shutil.rmtree(folder / "checkpoints" / "seed0" / "teacher")
    message = r"student holds another training \(the weights of 'teacher' changed\)"
    with pytest.raises(runs.RunError, match=message):
        train(folder, plan)
    shutil.rmtree(folder / "checkpoints" / "seed0" / "student")
    trained, run = train(folder, plan)
    expected, fresh_run = train(folder.parent / "fresh", plan)
    chex.assert_trees_all_equal(get_variables(trained), get_variables(expected))
    assert sorted(map(str, run.metrics())) == sorted(map(str, fresh_run.metrics()))


def test_a_deleted_teacher_that_did_not_change_keeps_its_student(folder, finished):
    shutil.rmtree(folder / "checkpoints" / "seed0" / "teacher")
    trained, _ = train(folder, make_plan())
    chex.assert_trees_all_equal(get_variables(trained), get_variables(finished[1]))


@pytest.mark.thorough
def test_another_network_of_a_cached_teacher_is_refused(tmp_path):
    model = make_model(8)
    variables = model.init(jax.random.key(5), TRAIN["inputs"][:1])

    def apply(variables, inputs, *, train, key=None):
        return model.apply(variables, 2.0 * inputs, train=train, key=key)

    student = make_stage("student", **STUDENT, cache_teachers=True)
    train(tmp_path, [distill.Pretrained("teacher", model, variables), student])
    doubled = distill.Pretrained("teacher", model._replace(apply=apply), variables)
    with pytest.raises(runs.RunError, match="the network of a cached teacher changed"):
        train(tmp_path, [doubled, student])


def test_each_seed_knows_its_own_data(tmp_path):
    def make_stages(change):
        def select(seed):
            labels = np.roll(TRAIN["labels"], change if seed == 1 else 0)
            return {"inputs": TRAIN["inputs"], "labels": labels}

        return [make_stage("first", data=select, steps=1)]

    train(tmp_path, make_stages(0), (0, 1))
    train(tmp_path, make_stages(1), (0,))
    with pytest.raises(runs.RunError, match="seed1/first holds another training .its training"):
        train(tmp_path, make_stages(1), (0, 1))


# Harmless changes


@pytest.mark.parametrize("name", PLACEMENTS)
def test_another_placement_is_accepted(folder, finished, name):
    trained, _ = train(folder, make_plan(), placement=PLACEMENTS[name](), save_every=3.0)
    chex.assert_trees_all_equal(get_variables(trained), get_variables(finished[1]))


@pytest.mark.thorough
def test_another_name_of_a_function_is_accepted(folder, finished):
    @jax.jit
    def some_name(logits, labels):
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)

    @jax.jit
    def another_name(logits, labels):
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)

    def make_stages(function):
        def loss(student, teachers, batch, context):
            return function(student.logits, batch["labels"])

        return [make_stage("named", loss=loss, steps=1)]

    first, _ = train(folder, make_stages(some_name))
    second, _ = train(folder, make_stages(another_name))
    chex.assert_trees_all_equal(get_variables(second), get_variables(first))


OTHER_PROCESS = """
import sys
sys.path.insert(0, sys.argv[1])
from test_identity import make_plan, train
train(sys.argv[2], make_plan(cached=True))
"""


@pytest.mark.thorough
@pytest.mark.parametrize("seed", ["1", "77"])
def test_another_process_finds_the_same_digests(tmp_path, seed):
    train(tmp_path / "run", make_plan(cached=True))
    # A copy, because this process still has the run open.
    copy = shutil.copytree(tmp_path / "run", tmp_path / "copy")
    command = [sys.executable, "-c", OTHER_PROCESS, os.path.dirname(__file__), str(copy)]
    variables = os.environ | {"PYTHONHASHSEED": seed}
    completed = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout.count("already trained") == 2


def test_a_network_that_names_the_axis_of_pmap_has_a_digest(tmp_path):
    def loss(*args):
        return hard_loss(*args) + 0.0 * jax.lax.axis_index("data").astype(np.float32)

    stages = [make_stage("first", loss=loss, steps=1)]
    first, _ = train(tmp_path, stages, placement=distill.PmapPlacement())
    second, _ = train(tmp_path, stages, placement=distill.PmapPlacement())
    chex.assert_trees_all_equal(get_variables(second), get_variables(first))


# Other environments


@pytest.fixture
def other_environment(monkeypatch):
    """Pretends that another version of JAX runs from now on."""

    def change():
        for name in ("describe_lowering", "describe_environment"):
            describe = getattr(_identity, name)
            changed = lambda describe=describe: describe() | {"jax": "0.0.1"}  # noqa: E731
            monkeypatch.setattr(_identity, name, changed)

    return change


def test_another_version_with_the_same_program_is_silent(folder, finished, other_environment):
    other_environment()
    trained, _ = train(folder, make_plan())
    chex.assert_trees_all_equal(get_variables(trained), get_variables(finished[1]))


@pytest.mark.parametrize("change", ["the loss", "the initial weights"])
def test_another_version_with_another_program_warns(folder, other_environment, change):
    other_environment()
    with pytest.warns(UserWarning, match="saved in another environment .*may go unnoticed"):
        train(folder, make_plan(**CHANGES[change][0]))


def test_a_device_that_does_not_repeat_bits_warns_of_another_start(folder, monkeypatch):
    describe = _identity.describe_environment
    monkeypatch.setattr(_identity, "describe_environment", lambda: describe() | {"platform": "gpu"})
    train(folder, make_plan())
    with pytest.warns(UserWarning, match="may go unnoticed"):
        train(folder, make_plan(**CHANGES["the initial weights"][0]))


def test_other_data_are_refused_under_another_version_as_well(folder, other_environment):
    other_environment()
    with pytest.raises(runs.RunError, match="its training data changed"):
        train(folder, make_plan(**CHANGES["one pixel"][0]))


def test_checkpoints_of_an_older_version_are_accepted_with_a_warning():
    old = {"steps": 2, "batch_size": 16, "pretrained": {"teacher": "0"}}
    new = old | {"program": "1", "data": "2", "program_environment": "", "initial_environment": ""}
    new["hyperparameters"] = "3"
    assert _identity.find_changes(old, new) == ([], True)
    changed = new | {"steps": 3, "pretrained": {"teacher": "4"}}
    assert _identity.find_changes(old, changed)[0] == [
        "steps was 2 and is 3",
        "the weights of 'teacher' changed",
    ]


# Cost


def test_an_array_that_trainings_share_is_read_once(monkeypatch):
    read = []
    fingerprint = _identity.fingerprint
    monkeypatch.setattr(
        _identity, "fingerprint", lambda arrays: read.append(1) or fingerprint(arrays)
    )
    describer = _identity.TrainingDescriber(VALIDATION)
    descriptions = [
        describer.describe({}, {**TRAIN, "scale": scale}, {}, {}) for scale in (1, 1, 2)
    ]
    # The number is read every time.
    assert len(read) == len(VALIDATION) + len(TRAIN) + 3
    assert descriptions[0] == descriptions[1] != descriptions[2]


def test_a_new_array_with_the_id_of_an_old_one_is_read(monkeypatch):
    describer = _identity.TrainingDescriber(VALIDATION)
    digests = set()
    for value in range(50):
        array = np.full(3, value)
        digests.add(describer.describe({}, {"inputs": array}, {}, {})["data"])
        del array
    assert len(digests) == 50


def test_buckets_are_part_of_the_training():
    stage = make_stage("first")
    (compiled,) = _compile_with(stage, LengthBuckets((2, 5)))
    (other,) = _compile_with(stage, LengthBuckets((3, 5)))
    assert compiled.fingerprint["buckets"] == [2, 5]
    changes, _ = _identity.find_changes(
        compiled.fingerprint | {"program_environment": ""},
        other.fingerprint | {"program_environment": "", "initial_environment": ""},
    )
    assert changes == ["buckets was [2, 5] and is [3, 5]"]


def _compile_with(stage, buckets):
    return compile_stages([stage], 0, single_device(), buckets)
