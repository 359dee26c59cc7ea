"""Plans are data, checked before anything is trained."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from jaxkd import losses
from jaxkd.data.dataset import Split
from jaxkd.distill import plan
from jaxkd.models import Model


def make_stage(name, **options):
    """Makes a stage whose model and data are never used."""
    model = Model(lambda key, inputs: {}, lambda variables, inputs, *, train, key=None: None)
    defaults = {
        "model": model,
        "data": {"inputs": np.zeros((3, 2))},
        "loss": lambda student, teachers, batch, context: None,
        "tx": optax.sgd(0.1),
        "steps": 1,
    }
    return plan.Stage(name, **defaults | options)


def make_dense(width):
    """Makes a model of one matrix, another object each time."""

    def init(key, inputs):
        return {"params": {"kernel": jnp.zeros((inputs.shape[-1], width))}}

    return Model(init, lambda variables, inputs, *, train, key=None: None)


def keep_inputs(key, inputs):
    return inputs


def test_masked_arrays_as_data_are_refused():
    data = {"inputs": np.ma.array(np.zeros((2, 2)), mask=np.eye(2))}
    with pytest.raises(ValueError, match="has a masked array as 'inputs', whose mask JAX does not"):
        make_stage("a", data=data)


def test_data_must_be_a_function_of_the_seed():
    with pytest.raises(TypeError, match="or a function of the seed, got a function"):
        make_stage("a", data=lambda: {"inputs": np.zeros((3, 2))})


@pytest.mark.parametrize("data", [{"inputs": [[0.0, 1.0]]}, {"labels": [0]}, {"labels": (0,)}])
@pytest.mark.parametrize("from_function", [False, True])
def test_lists_as_data_are_refused(data, from_function):
    data = {"inputs": np.zeros((1, 2)), **data}
    message = "stage 'a' has a (list|tuple) as '(inputs|labels)': make it an array with np.asarray"
    with pytest.raises(ValueError, match=message):
        make_stage("a", data=(lambda seed: data) if from_function else data).examples(0)


def test_order_puts_teachers_first_wherever_they_are_in_the_plan():
    chain = [
        make_stage("student", teachers=("assistant",)),
        make_stage("assistant", teachers=("teacher",)),
        make_stage("copy", start="student"),
        make_stage("teacher"),
    ]
    names = [stage.name for stage in plan.order(chain)]
    assert names == ["teacher", "assistant", "student", "copy"]


def test_inconsistent_plans_are_refused():
    with pytest.raises(ValueError, match=r"different names, got \['a', 'a'\]"):
        plan.order([make_stage("a"), make_stage("a")])
    with pytest.raises(ValueError, match=r"'a' learns from \['b'\], but the plan has only \['a'\]"):
        plan.order([make_stage("a", teachers=("b",))])
    with pytest.raises(ValueError, match="in a cycle: a -> b -> a|in a cycle: b -> a -> b"):
        plan.order([make_stage("a", teachers=("b",)), make_stage("b", start="a")])
    with pytest.raises(ValueError, match="'kd' and 'KD' differ in case alone"):
        plan.order([make_stage("kd"), make_stage("KD")])


@pytest.mark.parametrize(
    "options",
    [
        {"data": {}},
        {"data": {"inputs": np.zeros((0, 2))}},
        {"data": {"inputs": np.zeros((3, 2)), "labels": np.zeros(2)}},
        {"data": {"labels": np.zeros(2)}},
        {"steps": 0},
        {"batch_size": 0},
    ],
)
def test_impossible_stages_are_refused(options):
    with pytest.raises(ValueError, match="stage 'a' needs"):
        make_stage("a", **options)


def test_scalars_have_no_length():
    message = r"'a' needs `inputs` and arrays of the same length, at least 1, got .* \{\}"
    with pytest.raises(ValueError, match=message):
        make_stage("a", data={"scale": 2.0})
    stage = make_stage("a", data={"inputs": np.zeros((3, 2)), "scale": 2.0})
    assert set(stage.examples(0)) == {"inputs", "scale"}


def test_cached_logits_do_not_fit_inputs_that_are_drawn_at_every_step():
    """Trap 18: logits of whole images do not fit crops of them."""
    cached = make_stage("a", cache_teachers=True)
    with pytest.raises(ValueError, match="drop augment or cache_teachers, or set the number of"):
        dataclasses.replace(cached, augment=keep_inputs)
    assert dataclasses.replace(cached, augment=keep_inputs, views=1).views == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"views": 3}, "has views=3: views need an augment"),
        ({"views": 0, "augment": keep_inputs}, "views=0.*a number of at least 1"),
        ({"cache_top_k": 3}, "cache_top_k=3: it needs cache_teachers"),
        ({"cache_teachers": True, "cache_top_k": 0}, "cache_top_k=0.*a number of at least 1"),
        ({"transfer": lambda source, fresh: source}, "has a transfer but no start"),
        ({"key_name": {"weights": "b"}}, r"key_name with \['weights'\]: name purposes of .*'init'"),
    ],
)
def test_attributes_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_stage("a", **options)


@pytest.mark.parametrize("name", ["", "a/b", "../a", ".hidden", "x[/b]"])
def test_names_that_cannot_be_folders_are_refused(name):
    with pytest.raises(ValueError, match="a stage's name is also a folder's name"):
        make_stage(name)


def test_a_long_name_is_refused():
    assert make_stage("a" * 100).name == "a" * 100
    with pytest.raises(ValueError, match="use at most 100 characters, not the 101 of 'a") as caught:
        make_stage("a" * 101)
    assert len(str(caught.value)) <= 300


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"teachers": "teacher"},
            r"must be a tuple of names such as \('teacher',\), got 'teacher'",
        ),
        ({"teachers": (3,)}, r"teachers of stage 'a' must be a tuple of names"),
        (
            {"tx": 1e-3},
            r"tx of stage 'a' must be an optimizer such as optax.adam\(1e-3\), got 0.001",
        ),
        ({"tx": optax.sgd}, "tx of stage 'a' must be an optimizer"),
        ({"teachers": None}, "teachers of stage 'a' must be a tuple of names"),
        ({"name": 3}, "a stage's name must be text, got 3"),
        ({"steps": 2.5}, "steps of stage 'a' must be an integer, got 2.5"),
        ({"batch_size": "x"}, "batch_size of stage 'a' must be an integer, got 'x'"),
        ({"loss_tx": 1e-3}, "loss_tx of stage 'a' must be an optimizer"),
        ({"model": nn.Dense(3)}, "model of stage 'a' must be a models.Model, as .* got a Dense"),
        ({"data": None}, "data of stage 'a' must be a dict of arrays such as .*, got None"),
        ({"data": np.zeros((3, 2))}, "data of stage 'a' must be a dict .*, got a ndarray"),
        ({"data": Split(np.zeros(3), np.zeros(3))}, "got a Split: pass its .examples"),
        ({"loss": losses.hard_cross_entropy}, "loss of stage 'a' must be a function .* got a func"),
        ({"loss": None}, "loss of stage 'a' must be a function .* got None"),
        ({"steps": True}, "steps of stage 'a' must be an integer, got True"),
        ({"start": ("b",)}, r"start of stage 'a' must be a name, got \('b',\)"),
        ({"start": "b", "transfer": {}}, "transfer of stage 'a' must be a function"),
        ({"augment": "flip"}, "augment of stage 'a' must be a function .* got 'flip'"),
        ({"augment": keep_inputs, "views": "2"}, "views of stage 'a' must be an integer, got '2'"),
        (
            {"cache_teachers": True, "cache_top_k": 2.5},
            "cache_top_k of stage 'a' must be an integer, got 2.5",
        ),
        ({"init_loss": {}}, "init_loss of stage 'a' must be a function key -> loss_params"),
    ],
)
def test_attributes_of_other_types_are_refused(options, message):
    with pytest.raises(TypeError, match=message):
        make_stage(**{"name": "a"} | options)


def test_a_function_of_the_seed_must_return_a_dict():
    with pytest.raises(TypeError, match="data of stage 'a' must return a dict of arrays, got None"):
        make_stage("a", data=lambda seed: None).examples(0)


@pytest.mark.parametrize(
    ("make_plan", "message"),
    [
        (lambda stage: stage, r"a plan must be a list of stages, got a Stage: write \[stage\]"),
        (lambda stage: [stage, None], "a plan holds Stage, Pretrained and Derived, but also None"),
        (
            lambda stage: [stage, plan.Pretrained("t", nn.Dense(3), {})],
            "model of the pretrained 't' must be a models.Model",
        ),
    ],
)
def test_other_plans_are_refused(make_plan, message):
    with pytest.raises(TypeError, match=message):
        plan.order(make_plan(make_stage("a")))


@pytest.mark.parametrize(
    "labels", [np.array(["cat", "dog"]), np.array([b"cat", b"dog"]), np.array([1, "a"], object)]
)
@pytest.mark.parametrize("from_function", [False, True])
def test_text_as_data_is_refused(labels, from_function):
    data = {"inputs": np.zeros((2, 2)), "labels": labels}
    with pytest.raises(ValueError, match="stage 'a' has values of dtype .* as 'labels', but JAX"):
        make_stage("a", data=(lambda seed: data) if from_function else data).examples(0)


def test_numbers_that_only_jax_knows_are_data():
    data = {
        "inputs": jnp.zeros((2, 2), jnp.bfloat16),
        "keys": jax.random.split(jax.random.key(0), 2),
        "mask": np.zeros(2, bool),
    }
    assert make_stage("a", data=data).examples(0) is data
    with pytest.raises(ValueError, match="values of dtype .* as 'name'"):
        make_stage("a", data={**data, "name": "text"})


def test_seeds_may_learn_from_different_examples():
    stage = make_stage("a", data=lambda seed: {"inputs": np.full((3, 2), seed)})
    assert stage.examples(7)["inputs"][0, 0] == 7
    with pytest.raises(ValueError, match="stage 'a' needs"):
        make_stage("a", data=lambda seed: {}).examples(0)


def test_a_teacher_is_paired_with_its_student_alone():
    small, again, large = (make_dense(width) for width in (2, 2, 3))
    assert small != again
    stages = [
        make_stage("teacher", model=large),
        make_stage("alone", model=small),
        make_stage("other", model=large, teachers=("teacher",)),
        make_stage("distilled", model=again, teachers=("teacher",)),
        make_stage("again", model=small, teachers=("distilled",)),
        make_stage("continued", model=small, start="alone"),
    ]
    assert plan.teacher_baselines(stages) == [("teacher", "alone"), ("distilled", "alone")]
    # Variables that are known already need no examples.
    known = [dataclasses.replace(stage, data={}.__getitem__) for stage in stages]
    variables = {s.name: s.model.init(None, np.zeros((1, 2))) for s in stages}
    assert plan.teacher_baselines(known, variables) == plan.teacher_baselines(stages)
    # The first generation of born-again networks is its own baseline.
    generations = [
        make_stage("one", model=small),
        make_stage("two", model=small, teachers=("one",)),
    ]
    assert plan.teacher_baselines(generations) == []


def test_models_without_variables_are_not_taken_for_the_same_network():
    stages = [
        make_stage("teacher"),
        make_stage("alone"),
        make_stage("distilled", teachers=("teacher",)),
    ]
    assert plan.teacher_baselines(stages) == []


def test_a_batch_of_every_example_many_times_is_refused():
    data = {"inputs": np.zeros((200, 2))}
    message = "has batches of 2,001, but only 200 examples: choose a batch_size of at most 2,000"
    with pytest.raises(ValueError, match=message):
        make_stage("a", data=data, batch_size=2001)
    make_stage("a", data=data, batch_size=2000)
    with pytest.raises(ValueError, match="only 3 examples: choose a batch_size of at most 1,024"):
        make_stage("a", batch_size=1025)
    make_stage("a", batch_size=1024)
    # The examples of a function are known when it is called.
    make_stage("a", data=lambda seed: {"inputs": np.zeros((3, 2))}, batch_size=1025)
