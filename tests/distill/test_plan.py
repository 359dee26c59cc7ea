"""Plans are data, checked before anything is trained."""

import dataclasses

import numpy as np
import optax
import pytest

from jaxkd import losses
from jaxkd.distill import plan
from jaxkd.models import Model


def stage(name, **more):
    model = Model(lambda key, inputs: {}, lambda variables, inputs, *, train, key=None: None)
    values = {
        "model": model,
        "data": {"inputs": np.zeros((3, 2))},
        "loss": losses.hard_cross_entropy,
        "tx": optax.sgd(0.1),
        "steps": 1,
    }
    return plan.Stage(name, **values | more)


def test_order_puts_teachers_first_wherever_they_stand():
    chain = [
        stage("student", teachers=("assistant",)),
        stage("assistant", teachers=("teacher",)),
        stage("copy", start="student"),
        stage("teacher"),
    ]
    assert [one.name for one in plan.order(chain)] == ["teacher", "assistant", "student", "copy"]


def test_inconsistent_plans_are_told():
    with pytest.raises(ValueError, match=r"different names, got \['a', 'a'\]"):
        plan.order([stage("a"), stage("a")])
    with pytest.raises(ValueError, match=r"'a' learns from \['b'\], but the plan has only \['a'\]"):
        plan.order([stage("a", teachers=("b",))])
    with pytest.raises(ValueError, match="in a cycle: a -> b -> a|in a cycle: b -> a -> b"):
        plan.order([stage("a", teachers=("b",)), stage("b", start="a")])


@pytest.mark.parametrize(
    "wrong",
    [
        {"data": {}},
        {"data": {"inputs": np.zeros((0, 2))}},
        {"data": {"inputs": np.zeros((3, 2)), "labels": np.zeros(2)}},
        {"data": {"labels": np.zeros(2)}},
        {"steps": 0},
        {"batch_size": 0},
    ],
)
def test_impossible_stages_are_told(wrong):
    with pytest.raises(ValueError, match="stage 'a' needs"):
        stage("a", **wrong)


def test_cache_that_would_go_stale_is_refused():
    """Trap 18: logits of whole images do not fit crops of them."""
    cached = stage("a", cache_teachers=True)
    with pytest.raises(ValueError, match="drop augment or cache_teachers"):
        dataclasses.replace(cached, augment=lambda key, inputs: inputs)


@pytest.mark.parametrize("name", ["", "a/b", "../a", ".hidden", "x[/b]"])
def test_names_that_are_no_folders_are_refused(name):
    with pytest.raises(ValueError, match="a stage's name is also a folder's name"):
        stage(name)


def test_seeds_may_learn_from_different_examples():
    one = stage("a", data=lambda seed: {"inputs": np.full((3, 2), seed)})
    assert one.examples(7)["inputs"][0, 0] == 7
    with pytest.raises(ValueError, match="stage 'a' needs"):
        stage("a", data=lambda seed: {}).examples(0)
