"""Where a training starts: from fresh weights, another stage's weights, or its checkpoints."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkd import distill, models, runs, transfer
from jaxkd.distill import _stage_run
from small_plans import TRAIN, make_model, make_stage, soft_loss, train


def test_start_takes_the_weights_of_another_stage(tmp_path):
    options = {"tx": optax.sgd(0.0), "steps": 1}
    plan = [make_stage("first"), make_stage("second", start="first", **options)]
    trained, _ = train(tmp_path, plan)
    chex.assert_trees_all_equal(trained["second"][0].variables, trained["first"][0].variables)
    plan = [make_stage("first"), make_stage("wide", 8, start="first", **options)]
    message = (
        r"'wide' cannot start from 'first': "
        r".*bias.* is float32\[4\] there and float32\[8\] in the stage, and 2 more differ"
    )
    with pytest.raises(ValueError, match=message):
        train(tmp_path, plan)


def test_weights_of_another_architecture_are_transferred(tmp_path):
    def take_first_units(source, fresh):
        return jax.tree.map(
            lambda large, small: large[tuple(map(slice, small.shape))], source, fresh
        )

    large = make_stage("large", 8, steps=3)
    small = make_stage(
        "small", start="large", transfer=take_first_units, tx=optax.set_to_zero(), steps=1
    )
    trained, _ = train(tmp_path / "first", [large, small])
    kernels = {name: trained[name][0].variables["params"]["Dense_0"]["kernel"] for name in trained}
    chex.assert_trees_all_equal(kernels["small"], kernels["large"][:, :4])

    wrong = dataclasses.replace(small, name="wrong", transfer=lambda source, fresh: source)
    with pytest.raises(ValueError, match="'wrong' cannot start from 'large'"):
        train(tmp_path / "second", [large, wrong])


def make_pretrained(change=lambda variables: variables, width=4):
    model = make_model(width)
    return distill.Pretrained("big", model, change(model.init(jax.random.key(0), TRAIN["inputs"])))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda variables: variables["params"], "its variables lack the level 'params'"),
        (
            lambda variables: make_pretrained(width=8).variables,
            r"bias'\] is \[8\] in its variables and \[4\] in its model, and 2 more differ",
        ),
        (
            lambda variables: {"params": {"Dense_0": variables["params"]["Dense_0"]}},
            r"Dense_1'\]\['bias'\] is missing in its variables and \[3\] in its model, and 1 more",
        ),
        (
            lambda variables: variables | {"opt_state": {"count": 1}},
            "its variables have opt_state beside batch_stats, params",
        ),
    ],
)
@pytest.mark.parametrize("scored", [True, False])
def test_pretrained_weights_that_do_not_fit_are_refused(tmp_path, change, message, scored):
    plan = [
        make_pretrained(change),
        make_stage("student", teachers=("big",), loss=soft_loss),
    ]
    options = {} if scored else {"make_score": lambda model: print}
    with pytest.raises(ValueError, match=f"pretrained model 'big' cannot be used: .*{message}"):
        train(tmp_path, plan, **options)
    assert not (tmp_path / "checkpoints").exists()


def test_pretrained_weights_may_have_another_dtype_and_more_arrays():
    def change(variables):
        halves = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables)
        return {**halves, "batch_stats": {"unused": np.zeros(3)}}

    _stage_run.check_pretrained([make_pretrained(change)], 0, lambda model: TRAIN["inputs"])


def test_the_source_of_a_transfer_may_read_inputs_of_another_shape():
    source = make_pretrained()._replace(
        variables=make_model().init(jax.random.key(0), np.zeros((1, 9)))
    )
    student = make_stage("student", start="big", transfer=lambda source, fresh: fresh)
    _stage_run.check_pretrained([source, student], 0, lambda model: None)
    taught = dataclasses.replace(student, teachers=("big",))
    with pytest.raises(ValueError, match="'big' cannot be used"):
        _stage_run.check_pretrained([source, taught], 0, lambda model: None)


@pytest.fixture(scope="module")
def two_stages(tmp_path_factory):
    """A finished run of two stages."""
    folder = tmp_path_factory.mktemp("two_stages")
    train(folder, [make_stage("first"), make_stage("other")])
    return folder


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"steps": 50}, "steps was 12 and is 50"),
        ({"steps": 10}, "steps was 12 and is 10"),
        ({"batch_size": 8}, "batch_size"),
        ({"start": "other"}, "start was None and is 'other'"),
        # The checkpoint has no average and no best weights, which would be all that was named.
        ({"ema_decay": 0.9}, "ema_decay was None and is 0.9"),
        ({"best": distill.Best()}, "best was None and is 'accuracy of 10 evaluations"),
    ],
)
def test_checkpoints_of_another_training_are_refused(two_stages, change, difference):
    plan = [dataclasses.replace(make_stage("first"), **change), make_stage("other")]
    match = rf"first holds another training \({difference}.*name another folder"
    with pytest.raises(runs.RunError, match=match):
        train(two_stages, plan)
    assert (two_stages / "checkpoints" / "seed0" / "first" / "12.json").exists()


def test_checkpoints_of_another_architecture_are_refused(two_stages):
    with pytest.raises(runs.RunError, match=r"its arrays changed: .*delete that folder to train"):
        train(two_stages, [make_stage("first", 5), make_stage("other")])
    assert (two_stages / "checkpoints" / "seed0" / "first" / "12.json").exists()


def test_damaged_checkpoint_is_replaced_from_the_valid_one_before(tmp_path):
    plan = [make_stage("first", dropout=0.1, steps=3)]
    trained, run = train(tmp_path / "unbroken", plan)
    _, damaged_run = train(tmp_path / "damaged", plan, save_every=0)
    folder = damaged_run.checkpoint_folder(0, "first")
    assert sorted(path.name for path in folder.iterdir()) == ["2", "2.json", "3", "3.json"]
    files = [path for path in (folder / "3").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1] + b"?")
    with pytest.warns(UserWarning, match="passed over"):
        resumed, resumed_run = train(tmp_path / "damaged", plan)
    chex.assert_trees_all_equal(resumed["first"][0].variables, trained["first"][0].variables)
    assert resumed_run.metrics() == run.metrics()


def test_stages_of_a_seed_share_one_key_of_views():
    key, other_key = (_stage_run._view_key(seed) for seed in (3, 4))
    # The teacher cache finds logits in memory by the identity of their key.
    assert _stage_run._view_key(3) is key
    assert (jax.random.key_data(key) != jax.random.key_data(other_key)).any()


def test_a_transfer_that_takes_nothing_is_refused(tmp_path):
    plan = [
        make_stage("first", steps=1),
        make_stage("second", start="first", steps=1, transfer=lambda source, fresh: fresh),
    ]
    with pytest.raises(ValueError, match="transfer of stage 'second' takes nothing of 'first', it"):
        train(tmp_path, plan)


def test_a_transfer_that_returns_its_report_is_named(tmp_path):
    plan = [
        make_stage("first", steps=1),
        make_stage("second", start="first", steps=1, transfer=transfer.transfer),
    ]
    with pytest.raises(ValueError, match="returns a tuple, such as .*: return its first entry"):
        train(tmp_path, plan)


def test_a_model_without_parameters_is_no_student(tmp_path):
    def apply(variables, inputs, *, train, key=None):
        return models.Outputs(inputs[:, :3], {}), {}

    fixed = models.Model(lambda key, inputs: {"params": {}, "batch_stats": {}}, apply)
    with pytest.raises(ValueError, match="model of stage 'first' has no parameters to train: make"):
        train(tmp_path, [make_stage("first", model=fixed)])
    # As a teacher it is fine, and so is a loss with parameters of its own.
    teacher = distill.Pretrained("teacher", fixed, {"params": {}, "batch_stats": {}})
    train(tmp_path, [teacher, make_stage("second", teachers=("teacher",), loss=soft_loss, steps=1)])
