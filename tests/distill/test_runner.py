"""Plans run: what is learnt, what is measured, and what does not depend on the rest of the plan."""

import concurrent.futures
import dataclasses
import shutil
import warnings

import chex
import jax
import numpy as np
import optax
import pytest

from jaxkd import distill, evaluate, models, runs
from jaxkd._cpu_flags import CONVOLUTION_FLAG
from jaxkd.distill import placement, runner
from jaxkd.distill._loop import TrainingLoop
from jaxkd.distill.teacher_cache import TeacherCache
from jaxkd.runs import checkpoints
from small_plans import (
    TRAIN,
    VALIDATION,
    add_noise,
    get_variables,
    hard_loss,
    make_model,
    make_stage,
    make_trained,
    soft_loss,
    train,
)


def make_chain():
    """Makes a plan with every way to learn: labels, live and cached teachers, another's weights."""
    options = {"dropout": 0.1, "steps": 40}
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
def trained_chain(tmp_path_factory):
    return train(tmp_path_factory.mktemp("chain"), make_chain(), (0, 1))


def test_plan_trains_and_evaluates_every_stage(trained_chain):
    trained, run = trained_chain
    assert list(trained) == ["teacher", "assistant", "student", "longer"]
    rows = distill.evaluate_plan(make_chain(), trained, VALIDATION, reference="teacher")
    assert [row.name for row in rows] == list(trained)
    for row in rows:
        assert list(row.accuracy) == [model.validation_accuracy for model in trained[row.name]]
        assert row.accuracy_mean > 0.6
    assert rows[0].agreement is None and rows[2].agreement > 0.6
    records = run.metrics()
    steps = [r["step"] for r in records if (r["stage"], r["seed"]) == ("student", 1)]
    assert steps == list(range(4, 41, 4))
    assert all(np.isfinite(r["loss"]) for r in records)


def test_seeds_differ_and_repeat(trained_chain, tmp_path):
    trained, run = trained_chain
    repeated, repeated_run = train(tmp_path, make_chain(), (0, 1))
    chex.assert_trees_all_equal(get_variables(repeated), get_variables(trained))
    assert repeated_run.metrics() == run.metrics()
    kernels = [model.variables["params"]["Dense_0"]["kernel"] for model in trained["student"]]
    assert (kernels[0] != kernels[1]).any()


def test_finished_stages_are_not_trained_again(trained_chain, monkeypatch):
    trained, run = trained_chain

    def fail(*args):
        raise AssertionError("a step was taken")

    monkeypatch.setattr(TrainingLoop, "_take_steps", fail)
    restored, _ = train(run.folder, make_chain(), (0, 1))
    chex.assert_trees_all_equal(get_variables(restored), get_variables(trained))
    seconds, expected_seconds = (
        {name: [model.seconds for model in seeds] for name, seeds in models.items()}
        for models in (restored, trained)
    )
    assert seconds == expected_seconds


def test_other_stages_and_seeds_do_not_change_the_bits(trained_chain, tmp_path):
    plan = [make_stage("another", dropout=0.1, steps=40), *make_chain()[:1]]
    trained, _ = train(tmp_path, plan, (1,))
    expected = trained_chain[0]["teacher"][1].variables
    chex.assert_trees_all_equal(trained["teacher"][0].variables, expected)


def test_each_seed_may_have_examples_of_its_own(tmp_path):
    def select(seed):
        return {name: array[seed : 44 + seed : 2] for name, array in TRAIN.items()}

    trained, _ = train(tmp_path / "both", [make_stage("first", data=select)], (0, 1))
    for seed in (0, 1):
        plan = [make_stage("first", data=select(seed))]
        alone, _ = train(tmp_path / str(seed), plan, (seed,))
        chex.assert_trees_all_equal(alone["first"][0].variables, trained["first"][seed].variables)


@pytest.mark.parametrize(
    ("seeds", "message"),
    [
        ((0, 2**32), r"seeds must be integers from 0 to 4294967295, got 4294967296"),
        ((-1, 2**32 - 1), r"seeds must be integers .*, got -1"),
        ((0, 1.0), r"got 1\.0"),
        ((False,), r"got False"),
        (("0",), r"got '0'"),
        ((3, 1, 3, np.int64(1)), r"seeds must differ, but 1, 3 are repeated"),
        (range(10**12), r"there are more than 10,000 seeds"),
    ],
)
def test_seeds_that_do_not_give_trainings_of_their_own_are_refused(tmp_path, seeds, message):
    with pytest.raises(ValueError, match=message):
        train(tmp_path, [make_stage("first", steps=1)], seeds)
    assert not (tmp_path / "checkpoints").exists()


def test_largest_and_numpy_seeds_are_trained_and_recorded(tmp_path):
    trained, run = train(tmp_path, [make_stage("first", steps=1)], (np.int64(0), 2**32 - 1))
    kernels = [model.variables["params"]["Dense_0"]["kernel"] for model in trained["first"]]
    assert (kernels[0] != kernels[1]).any()
    assert {record["seed"] for record in run.metrics()} == {0, 2**32 - 1}


def test_reference_or_model_that_is_missing_is_named(trained_chain):
    trained, _ = trained_chain
    message = r"reference 'techer' is not in the plan, which has teacher, assistant, "
    with pytest.raises(ValueError, match=message):
        distill.evaluate_plan(make_chain(), trained, VALIDATION, reference="techer")
    fewer = {name: trained[name] for name in ("teacher", "assistant")}
    empty = {name: [] for name in trained}
    with pytest.raises(ValueError, match="trained has no seed of teacher, assistant"):
        distill.evaluate_plan(make_chain(), empty, VALIDATION, reference="teacher")
    with pytest.raises(ValueError, match="trained lacks student, longer of the plan"):
        distill.evaluate_plan(make_chain(), fewer, VALIDATION, reference="teacher")


def test_folder_of_the_teacher_cache_is_checked_before_the_first_step(tmp_path):
    student = make_stage("student", teachers=("teacher",), loss=soft_loss, cache_teachers=True)
    plan = [make_stage("teacher", 8), student]
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"Not a directory: '.*file/x'"):
        train(tmp_path / "run", plan, teacher_cache=tmp_path / "file" / "x")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_teacher_cache_that_several_processes_do_not_use_is_said(tmp_path, monkeypatch):
    cache = TeacherCache({}, {}, tmp_path / "cache")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.warns(UserWarning, match="cache is not used, because several processes"):
        runner._check_cache(TeacherCache({}, {}, tmp_path / "cache"), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    monkeypatch.undo()
    runner._check_cache(cache, tmp_path / "cache")
    assert (tmp_path / "cache").is_dir()


def test_folder_that_is_deleted_ends_the_run(tmp_path):
    run = runs.open_run(tmp_path / "run", {})

    def make_score(model):
        def score(variables, examples):
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
            return evaluate.Score(1.0, 0.5)

        return score

    with pytest.raises(runs.RunError, match=r"run was deleted, or its \.lock, while this run"):
        distill.run_plan(
            [make_stage("first")], [0], run, validation=VALIDATION, make_score=make_score
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("fails", [False, True])
def test_folder_that_is_deleted_within_a_save_ends_the_run(tmp_path, monkeypatch, fails):
    save = checkpoints.save

    def delete_and_save(*args, **kwargs):
        shutil.rmtree(tmp_path / "run")
        if fails:
            raise FileNotFoundError("what orbax says of it")
        save(*args, **kwargs)

    monkeypatch.setattr(checkpoints, "save", delete_and_save)
    with pytest.raises(runs.RunError, match="run was deleted, or its"):
        train(tmp_path / "run", [make_stage("first", steps=1)])


def test_plan_without_evaluations_is_refused(tmp_path):
    with pytest.raises(ValueError, match="evaluations must be an integer of at least 1"):
        train(tmp_path, make_chain(), evaluations=0)


def test_trained_models_of_another_width_are_named():
    stage = make_stage("first", model=make_model(width=8))
    message = "the trained model 'first' cannot be used: .* is .4. in its variables and .8. in its"
    with pytest.raises(ValueError, match=message):
        distill.evaluate_plan([stage], {"first": make_trained()}, VALIDATION, reference="first")


def test_weights_of_numpy_in_float64_are_measured_without_a_warning():
    variables = jax.tree.map(np.float64, make_trained()[0].variables)
    trained = {"first": [distill.TrainedModel(variables, 0.0, 0.5)]}
    (row,) = distill.evaluate_plan(
        [make_stage("first")], trained, VALIDATION, reference="first", repeats=2
    )
    assert row.flops


def test_checkpoints_of_earlier_steps_are_kept(tmp_path):
    trained, run = train(tmp_path, [make_stage("first")], save_every=0, evaluations=3, keep=3)
    folder = run.checkpoint_folder(0, "first")
    steps = sorted(int(path.name) for path in folder.iterdir() if path.is_dir())
    assert len(steps) == 3 and steps[-1] == 12
    saved = [checkpoints.load(folder, step=step).tree["params"] for step in steps]
    chex.assert_trees_all_equal(saved[-1], trained["first"][0].variables["params"])
    assert not np.array_equal(*(jax.tree.leaves(params)[0] for params in saved[:2]))
    with pytest.raises(ValueError, match="has no checkpoint of step 99, only those of 12, "):
        checkpoints.load(folder, step=99)
    with pytest.raises(ValueError, match="keep must be an integer of at least 1, got 0"):
        train(tmp_path, [make_stage("first")], keep=0)


@pytest.mark.parametrize("max_students", [1, 4])
def test_plan_without_seeds_trains_nothing(tmp_path, max_students):
    mesh = distill.make_mesh(devices=jax.devices()[:1])
    options = {"placement": distill.VectorizedPlacement(mesh, max_students)}
    trained, run = train(tmp_path, [make_stage("first")], (), **options)
    assert trained == {"first": []} and run.metrics() == []


@pytest.mark.filterwarnings("ignore:.*as if nothing was learnt")
def test_score_function_of_the_user_is_recorded(tmp_path):
    def make_score(model):
        return lambda variables, examples: evaluate.Score(float(len(examples["labels"])), 0.25)

    trained, run = train(tmp_path, [make_stage("first", steps=2)], make_score=make_score)
    assert trained["first"][0].validation_accuracy == 0.25
    assert run.metrics()[-1]["validation_loss"] == len(VALIDATION["labels"])


def test_pretrained_models_teach_and_are_started_from(tmp_path):
    model = make_model(dropout=0.1)
    variables = model.init(jax.random.key(5), TRAIN["inputs"][:1])
    pretrained = distill.Pretrained("pretrained", model, variables)
    before = jax.tree.map(np.array, variables)
    student = make_stage(
        "student",
        dropout=0.1,
        teachers=("pretrained",),
        loss=soft_loss,
        start="pretrained",
        steps=2,
    )
    plan = [student, pretrained]
    trained, _ = train(tmp_path, plan, (0, 1))
    assert [len(trained[name]) for name in ("student", "pretrained")] == [2, 2]
    chex.assert_trees_all_equal(trained["pretrained"][1].variables, before)
    # A student that starts from its teacher's weights has nothing to learn but dropout's noise.
    rows = distill.evaluate_plan(plan, trained, VALIDATION, reference="pretrained")
    assert [row.name for row in rows] == ["student", "pretrained"]
    assert rows[0].agreement > 0.8 and rows[1].agreement is None
    # A model that all seeds share is measured once.
    assert [len(row.accuracy) for row in rows] == [2, 1] and rows[1].accuracy_std is None

    changed = jax.tree.map(lambda leaf: leaf + 1, variables)
    with pytest.raises(runs.RunError, match="holds another training"):
        train(tmp_path, [student, pretrained._replace(variables=changed)])


def test_cached_teacher_predicts_once_for_all_stages_and_seeds(tmp_path, monkeypatch):
    counts = []
    make_predict = placement.make_predict

    def make_counting_predict(model, **options):
        predict = make_predict(model, **options)

        def count_and_predict(variables, inputs):
            counts.append(len(inputs))
            return predict(variables, inputs)

        return count_and_predict

    monkeypatch.setattr(placement, "make_predict", make_counting_predict)
    model = make_model()
    variables = model.init(jax.random.key(5), TRAIN["inputs"][:1])
    options = {"teachers": ("pretrained",), "loss": soft_loss, "steps": 1, "cache_teachers": True}
    plan = [
        distill.Pretrained("pretrained", model, variables),
        make_stage("first", **options),
        make_stage("second", **options),
    ]
    train(tmp_path, plan, (0, 1))
    assert counts.count(len(TRAIN["inputs"])) == 1


def test_cached_teachers_train_the_same_student(tmp_path):
    teacher = make_stage("teacher", 32, dropout=0.1)
    live = make_stage("student", dropout=0.1, teachers=("teacher",), loss=soft_loss)
    cached = dataclasses.replace(live, cache_teachers=True)
    variables = []
    for student in (live, cached):
        trained, _ = train(tmp_path / str(student.cache_teachers), [teacher, student])
        variables.append(trained["student"][0].variables)
    chex.assert_trees_all_close(*variables, rtol=1e-4, atol=1e-5)


TEXT_LABELS = np.array(["cat"] * len(VALIDATION["labels"]))
SPLITS = [
    ({"inputs": VALIDATION["inputs"]}, "has no 'labels', it holds inputs: pass inputs and labels"),
    ({"labels": VALIDATION["labels"]}, "has no 'inputs', it holds labels"),
    ({}, "has no 'inputs', it holds nothing"),
    ({**VALIDATION, "labels": TEXT_LABELS}, "has values of dtype <U3 as 'labels'"),
    ({**VALIDATION, "labels": TEXT_LABELS.tolist()}, "has values of dtype <U3 as 'labels'"),
]


@pytest.mark.parametrize(("split", "message"), SPLITS)
def test_splits_without_labels_are_refused(tmp_path, split, message):
    plan = [make_stage("first")]
    with pytest.raises(ValueError, match=f"the validation split {message}"):
        train(tmp_path, plan, validation=split)
    trained = {"first": []}
    with pytest.raises(ValueError, match=f"the test set {message}"):
        distill.evaluate_plan(plan, trained, split, reference="first")


@pytest.mark.parametrize("save_every", [float("nan"), -1])
def test_impossible_times_between_checkpoints_are_refused(tmp_path, save_every):
    message = f"save_every must be at least 0 seconds, got {save_every}"
    with pytest.raises(ValueError, match=message):
        train(tmp_path, [make_stage("first")], save_every=save_every)


IMAGES = {"inputs": np.zeros((4, 10, 10, 1), np.float32), "labels": np.zeros(4, np.int32)}


def make_cnn_stage():
    # The first layer is a product of patches, and the second a convolution.
    model = models.from_linen(models.CNN((4, 4), hidden=2, num_classes=2))
    return make_stage("first", model=model, data=IMAGES, steps=1, batch_size=2)


@pytest.mark.parametrize("is_missing", [True, False])
def test_a_missing_flag_for_convolutions_is_named(tmp_path, monkeypatch, is_missing):
    monkeypatch.setattr(runner, "lacks_convolution_flag", lambda version: is_missing)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(tmp_path, [make_cnn_stage()], validation=IMAGES)
    messages = [str(warning.message) for warning in caught]
    named = [text for text in messages if CONVOLUTION_FLAG in text]
    assert len(named) == is_missing
    assert all(
        "slow at gradients of convolutions on a CPU: set XLA_FLAGS=" in text for text in named
    )


def test_a_plan_without_convolutions_needs_no_flag(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "lacks_convolution_flag", lambda version: True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(tmp_path, [make_stage("first", steps=1)])
    assert not [warning for warning in caught if CONVOLUTION_FLAG in str(warning.message)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"placement": distill.PmapPlacement}, "or PmapPlacement.., got the class PmapPlacement"),
        ({"placement": distill.make_mesh()}, "such as MeshPlacement.make_mesh... .*, got Mesh"),
        ({"placement": 0}, "got 0"),
        ({"buckets": (4, 8)}, r"such as LengthBuckets\(\(16, 64\)\), got \(4, 8\)"),
    ],
)
def test_a_placement_or_buckets_of_another_type_are_refused(tmp_path, options, message):
    with pytest.raises(TypeError, match=message):
        train(tmp_path, [make_stage("a")], **options)
    assert not (tmp_path / "checkpoints").exists()


def test_evaluation_refuses_buckets_of_another_type(trained_chain):
    with pytest.raises(TypeError, match="buckets must be such as LengthBuckets"):
        distill.evaluate_plan([make_stage("a")], {}, VALIDATION, reference="a", buckets=(4, 8))


def test_models_of_other_numbers_of_seeds_are_not_compared(tmp_path):
    plan = [make_stage("first", steps=1), make_stage("second", steps=1)]
    trained, _ = train(tmp_path, plan, (0, 1))
    trained["second"] = trained["second"][:1]
    with pytest.raises(ValueError, match="for the same seeds, first has 2, second has 1: pass"):
        distill.evaluate_plan(plan, trained, VALIDATION, reference="first", repeats=1)


def test_two_threads_do_not_train_in_one_folder(tmp_path):
    """One would rewrite the metrics of the other, and delete its unfinished checkpoints."""
    messages = []

    def make_score(model):
        with concurrent.futures.ThreadPoolExecutor(1) as executor:
            other = executor.submit(train, tmp_path, [make_stage("first", steps=1)])
            with pytest.raises(
                runs.RunError, match="in use by another run_plan of this process: w"
            ):
                other.result()
        messages.append("refused")
        return lambda variables, examples: evaluate.Score(1.0, 0.25)

    for count in (1, 2):  # The folder is free again.
        train(tmp_path, [make_stage("first", steps=1)], make_score=make_score)
        assert len(messages) == count


def test_stages_of_one_key_name_draw_the_same_weights_order_and_dropout(tmp_path):
    def twice_the_loss(student, teachers, batch, context):
        return 2 * hard_loss(student, teachers, batch, context)

    options = {"dropout": 0.3, "augment": add_noise}
    plan = [
        make_stage("first", key_name="pair", **options),
        # Half the rate makes up for twice the loss, exactly.
        make_stage(
            "second", key_name="pair", loss=twice_the_loss, tx=optax.sgd(0.05, 0.9), **options
        ),
        make_stage("pair", **options),
        make_stage("apart", **options),
    ]
    trained, _ = train(tmp_path, plan)
    weights = get_variables(trained)
    chex.assert_trees_all_equal(weights["first"], weights["second"], weights["pair"])
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(weights["first"], weights["apart"], rtol=1e-3)


def test_each_purpose_of_a_key_name_draws_its_own_numbers(tmp_path):
    names = {"init": "a", "order": "b", "step": "c"}
    options = {"dropout": 0.3, "augment": add_noise, "steps": 6}
    plan = [
        make_stage("whole", key_name=names, **options),
        make_stage("a", key_name={"order": "b", "step": "c"}, **options),
        *(
            make_stage(f"other_{purpose}", key_name=names | {purpose: "d"}, **options)
            for purpose in names
        ),
    ]
    weights = get_variables(train(tmp_path, plan)[0])
    chex.assert_trees_all_equal(weights["whole"], weights["a"])
    for purpose in names:
        with pytest.raises(AssertionError):
            chex.assert_trees_all_close(weights["whole"], weights[f"other_{purpose}"], rtol=1e-3)


def test_another_key_name_is_another_training(tmp_path):
    train(tmp_path, [make_stage("student")])
    with pytest.raises(runs.RunError, match="key_name"):
        train(tmp_path, [make_stage("student", key_name="pair")])
