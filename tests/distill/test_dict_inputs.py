"""Models of several inputs: a dict of arrays in steps, plans and evaluation."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkd import distill, evaluate, models
from jaxkd.data.bucketing import LengthBuckets
from small_plans import PLACEMENTS, TRAIN, VALIDATION, hard_loss, make_stage, soft_loss, train


class TwoInputs(nn.Module):
    """Takes two arrays, whose concatenation `Joined` takes as one."""

    @nn.compact
    def __call__(self, inputs):
        x = jnp.concatenate([inputs["left"], inputs["right"]], -1)
        return nn.Dense(3, name="logits")(x)


class Joined(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="logits")(x)


TWO = models.from_linen(TwoInputs(), train_argument=None)
ONE = models.from_linen(Joined(), train_argument=None)


def split(examples):
    inputs = examples["inputs"]
    return {**examples, "inputs": {"left": inputs[:, :2], "right": inputs[:, 2:]}}


def make_plan(model, data, **options):
    options = {"model": model, "data": data, "tx": optax.sgd(0.1)} | options
    return [
        make_stage("teacher", **options),
        make_stage("student", teachers=("teacher",), loss=soft_loss, **options),
    ]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_plan_trains_a_dict_as_it_trains_one_array(tmp_path, placement):
    options = {"placement": PLACEMENTS[placement](), "seeds": (0, 1)}
    expected, _ = train(tmp_path / "one", make_plan(ONE, TRAIN), validation=VALIDATION, **options)
    actual, run = train(
        tmp_path / "two", make_plan(TWO, split(TRAIN)), validation=split(VALIDATION), **options
    )
    for name, trained in expected.items():
        for model, other in zip(trained, actual[name], strict=True):
            chex.assert_trees_all_close(other.variables, model.variables, rtol=1e-5, atol=1e-6)
            assert other.validation_accuracy == model.validation_accuracy
    assert run.metrics()[-1]["epoch"] == 12 * 16 / 45


def test_a_step_augments_a_dict():
    def scale(key, inputs):
        return jax.tree.map(lambda array: 2 * array, inputs)

    tx = optax.sgd(0.1)
    batch = split(TRAIN)
    losses = []
    for augment, inputs in ((scale, batch["inputs"]), (None, scale(None, batch["inputs"]))):
        step = distill.make_train_step(TWO, tx, hard_loss, augment=augment)
        variables = TWO.init(jax.random.key(0), inputs)
        state = distill.init_train_state(variables, tx)
        _, metrics = step(state, {**batch, "inputs": inputs}, (), jax.random.key(1))
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_evaluation_takes_a_dict(tmp_path):
    plan = make_plan(TWO, split(TRAIN), steps=2)
    trained, _ = train(tmp_path, plan, validation=split(VALIDATION))
    rows = distill.evaluate_plan(
        plan, trained, split(VALIDATION), reference="teacher", repeats=1, throughput_batch=8
    )
    assert [row.throughput_batch for row in rows] == [8, 8] and rows[0].flops
    variables = trained["teacher"][0].variables
    logits = evaluate.make_predict(TWO, batch_size=7)(variables, split(VALIDATION)["inputs"])
    expected = evaluate.make_predict(ONE)(variables, VALIDATION["inputs"])
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)


def test_what_takes_one_array_says_so(tmp_path):
    with pytest.raises(ValueError, match="'teacher' has a dict of inputs, but views and cache_te"):
        make_plan(TWO, split(TRAIN), cache_teachers=True)
    message = "buckets cut one array of tokens, but the inputs are a dict of arrays"
    with pytest.raises(ValueError, match=message):
        evaluate.make_predict(TWO, buckets=LengthBuckets((2,)))({}, split(TRAIN)["inputs"])
    with pytest.raises(ValueError, match=r"got the lengths \{'inputs/left': 45, 'inputs/right': 3"):
        data = {"inputs": {"left": TRAIN["inputs"], "right": TRAIN["inputs"][:3]}}
        make_stage("uneven", data=data)
