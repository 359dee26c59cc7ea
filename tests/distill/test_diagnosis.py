"""Unsound labels, tokens, inputs, teachers and weights: found, named, and never trained on."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkd import distill, losses, models, runs
from jaxkd.distill import _diagnosis
from jaxkd.models import LSTMClassifier
from small_plans import (
    PLACEMENTS,
    TRAIN,
    VALIDATION,
    get_losses,
    hard_loss,
    make_model,
    make_stage,
    make_trained,
    run_error,
    soft_loss,
    train,
)

NUM_CLASSES = 3


def with_labels(*changes, examples=TRAIN):
    """Replaces the label of an example for each pair of its index and the new label."""
    labels = examples["labels"].copy()
    for index, label in changes:
        labels[index] = label
    return {**examples, "labels": labels}


def with_input(value, examples=TRAIN):
    inputs = examples["inputs"].copy()
    inputs[7, 2] = value
    return {**examples, "inputs": inputs}


def optax_loss(student, teachers, batch, context):
    return optax.softmax_cross_entropy_with_integer_labels(student.logits, batch["labels"])


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_labels_from_1_are_refused_before_the_first_step(tmp_path, placement):
    stage = make_stage("wrong", data={**TRAIN, "labels": TRAIN["labels"] + 1})
    placement = PLACEMENTS[placement]()
    message = run_error(tmp_path, [stage], placement=placement, seeds=(0, 1))
    assert message.startswith("wrong, seed 0: ")
    assert " of 45 labels are 3, which is not in [0, 3), the classes of the model" in message
    assert "number the classes from 0" in message
    assert not (tmp_path / "metrics.jsonl").exists() or not runs.open_run(tmp_path, {}).metrics()


@pytest.mark.parametrize(
    ("label", "loss"), [(-1, hard_loss), (-100, hard_loss), (7, hard_loss), (-1, optax_loss)]
)
def test_a_single_label_that_the_loss_reads_is_refused(tmp_path, label, loss):
    """Optax reads −1 as the last class, with a loss that looks sound."""
    message = run_error(tmp_path, [make_stage("wrong", data=with_labels((3, label)), loss=loss)])
    assert f"1 of 45 labels are {label}, which is not in" in message


def where_loss(student, teachers, batch, context):
    labels = batch["labels"]
    return losses.hard_cross_entropy(student.logits, labels, where=labels >= 0)


def alpha_loss(student, teachers, batch, context):
    labels = batch["labels"]
    alpha = jnp.where(labels >= 0, 0.5, 1.0)
    return losses.distillation_loss(student.logits, student.logits, labels, alpha=alpha)


def unlabelled_loss(student, teachers, batch, context):
    return jnp.square(student.logits).mean(-1)


@pytest.mark.parametrize("loss", [where_loss, alpha_loss, unlabelled_loss])
def test_labels_that_the_loss_masks_are_no_fault(tmp_path, loss):
    data = with_labels((3, -100), (4, -1))
    _, run = train(tmp_path, [make_stage("right", data=data, loss=loss)])
    assert np.isfinite([record["loss"] for record in run.metrics()]).all()


@pytest.mark.parametrize("batch_size", [1, 16])
def test_a_label_among_masked_ones_is_found(tmp_path, batch_size):
    data = with_labels((3, -100), (4, 3), (5, -1))
    stage = make_stage("wrong", data=data, loss=where_loss, batch_size=batch_size)
    message = run_error(tmp_path, [stage])
    assert "3 of 45 labels are from -100 to 3" in message


def test_labels_of_the_validation_split_are_checked_first(tmp_path):
    validation = with_labels((3, -1), examples=VALIDATION)
    message = run_error(tmp_path, [make_stage("first")], validation=validation)
    assert "'first' cannot be scored on the validation split: 1 of 20 labels are -1" in message
    assert not (tmp_path / "checkpoints").exists()


def test_a_teacher_of_other_classes_has_no_accuracy(tmp_path):
    class Narrow(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return models.Outputs(nn.Dense(2)(x), {"hidden": x})

    model = models.from_linen(Narrow())
    teacher = distill.Pretrained("narrow", model, model.init(jax.random.key(0), TRAIN["inputs"]))
    trained, _ = train(tmp_path, [teacher, make_stage("student")])
    assert np.isnan(trained["narrow"][0].validation_accuracy)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_inputs_that_are_not_finite_are_named(tmp_path, value):
    message = run_error(tmp_path, [make_stage("wrong", data=with_input(value))])
    assert "1 of 45 examples (the first is number 7) of its 'inputs' hold NaN" in message
    assert "learning rate" not in message


def make_teacher(scale):
    variables = make_model().init(jax.random.key(0), TRAIN["inputs"])
    scaled = jax.tree.map(lambda leaf: (leaf + 1) * scale, variables)
    return distill.Pretrained("big", make_model(), scaled)


@pytest.mark.parametrize(
    ("scale", "cause", "cached"),
    [
        (np.nan, "the weights of its teacher 'big' hold NaN or infinity", False),
        (1e30, "have logits of its teacher 'big' that are NaN or infinite", False),
        (1e30, "have logits of its teacher 'big' that are NaN or infinite", True),
    ],
)
def test_unsound_teachers_are_named(tmp_path, scale, cause, cached):
    student = make_stage(
        "student", teachers=("big",), loss=soft_loss, tx=optax.sgd(0.1), cache_teachers=cached
    )
    message = run_error(tmp_path, [make_teacher(scale), student])
    assert message.startswith("student, seed 0: the loss is nan in step 1: ") and cause in message


def test_weights_that_are_not_finite_are_no_start(tmp_path):
    message = run_error(tmp_path, [make_teacher(np.nan), make_stage("second", start="big")])
    assert "'second' cannot start from 'big': 39 of its weights are NaN or infinite" in message


def test_weights_of_another_dtype_are_no_start(tmp_path):
    def to_bfloat16(source, fresh):
        return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), source)

    stage = make_stage("second", start="big", transfer=to_bfloat16)
    message = run_error(tmp_path, [make_teacher(1.0), stage])
    assert "is bfloat16[4] there and float32[4] in the stage, and 3 more differ" in message


def test_a_number_of_the_data_out_of_range_is_shown(tmp_path):
    def loss(student, teachers, batch, context):
        return losses.distillation_loss(
            student.logits,
            student.logits,
            batch["labels"],
            temperature=batch["temperature"],
        )

    stage = make_stage("wrong", loss=loss, data={**TRAIN, "temperature": -4.0})
    message = run_error(tmp_path, [stage])
    assert "in step 1, before any weight has changed" in message
    assert "'temperature' is -4.0" in message


def test_pixels_beyond_the_scale_of_a_model_are_shown(tmp_path):
    model = models.with_input_normalization(make_model(), 0.5, 0.25, max_value=1.0)
    data = {**TRAIN, "inputs": np.abs(TRAIN["inputs"]) * 100}
    validation = {**VALIDATION, "inputs": np.abs(VALIDATION["inputs"]) * 100}
    stage = make_stage("wrong", model=model, data=data)
    message = run_error(tmp_path, [stage], validation=validation)
    assert "before any weight has changed" in message and "'inputs' are from 0." in message


def test_a_network_that_ends_in_softmax_is_named(tmp_path):
    def apply(variables, inputs, *, train, key=None):
        outputs, batch_stats = make_model().apply(variables, inputs, train=train, key=key)
        return outputs._replace(logits=jax.nn.softmax(outputs.logits)), batch_stats

    model = make_model()._replace(apply=apply)
    with pytest.warns(UserWarning, match="are probabilities, each row sums to 1: return the logi"):
        train(tmp_path, [make_stage("first", model=model, steps=1)])


def test_a_loss_reads_names_that_the_batch_holds(tmp_path):
    def loss(student, teachers, batch, context):
        return losses.hard_cross_entropy(student.logits, batch["label"])

    with pytest.raises(KeyError, match="the loss reads 'label', but its batch holds inputs, labe"):
        train(tmp_path, [make_stage("first", loss=loss)])


def test_a_loss_that_is_nan_by_itself_is_no_divergence(tmp_path):
    def nan_loss(student, teachers, batch, context):
        return jnp.log(-jnp.square(student.logits[:, 0]) - 1)

    message = run_error(tmp_path, [make_stage("wrong", loss=nan_loss)])
    assert "the loss is nan in step 1, before any weight has changed" in message
    assert "'inputs' are from " in message
    assert "learning rate" not in message


def test_a_validation_loss_alone_that_is_not_finite_is_no_divergence(tmp_path):
    validation = with_input(np.nan, examples=VALIDATION)
    message = run_error(tmp_path, [make_stage("first")], validation=validation)
    assert "first, seed 0: the validation loss is nan after step 2" in message
    assert "in the validation split 1 of 20 examples (the first is number 7)" in message
    assert "diverged" not in message


@pytest.mark.filterwarnings("ignore:.*is another scale meant")
def test_a_validation_loss_that_overflows_first_is_a_divergence(tmp_path):
    """Weights and training loss are finite, but huge."""
    validation = {**VALIDATION, "inputs": VALIDATION["inputs"] * np.float32(1e10)}
    message = run_error(
        tmp_path, [make_stage("first", tx=optax.sgd(1e7))], validation=validation, evaluations=4
    )
    assert "the validation loss is " in message and "the training loss is " in message
    assert message.endswith("training has diverged; try a smaller learning rate")


def test_unknown_tokens_of_the_validation_split_are_no_divergence(tmp_path):
    stage, data = make_text_stage(10)
    validation = {"inputs": np.full((2, 4), 11, np.int32), "labels": data["labels"][:2]}
    message = run_error(tmp_path, [stage], validation=validation)
    assert "look for unknown ones among the tokens of its inputs, from 11 to 11" in message
    assert "diverged" not in message


def test_a_model_that_gives_nan_in_evaluation_alone_is_named(tmp_path):
    model = make_model()

    def apply(variables, inputs, *, train, key=None):
        outputs, statistics = model.apply(variables, inputs, train=train, key=key)
        return outputs._replace(logits=outputs.logits + (0 if train else jnp.inf)), statistics

    stage = make_stage("first", model=models.Model(model.init, apply))
    message = run_error(tmp_path, [stage])
    assert "why the model gives NaN with train=False" in message


def make_text_stage(token):
    tokens = np.full((12, 4), 3, np.int32)
    tokens[5, 1] = token
    model = models.from_linen(LSTMClassifier(11, embedding=4, hidden=(4,), dense=4))
    data = {"inputs": tokens, "labels": np.zeros(12, np.int32)}
    return make_stage("text", model=model, data=data, batch_size=4), data


def test_tokens_outside_of_the_vocabulary_are_refused_before_the_first_step(tmp_path):
    stage, data = make_text_stage(11)
    validation = {name: array[:2] for name, array in data.items()}
    message = run_error(tmp_path, [stage], validation=validation)
    assert "tokens of its inputs, from 3 to 11, outside of the vocabulary" in message


def test_negative_tokens_are_refused_in_every_split(tmp_path):
    """An embedding reads the row of another token for them."""
    (stage, unsound), (right, sound) = make_text_stage(-1), make_text_stage(3)
    refused = "token ids must be at least 0, got -1 in inputs: pad with 0"
    message = run_error(tmp_path, [stage], validation=sound)
    assert message.startswith(f"stage 'text': {refused}")
    message = run_error(tmp_path, [right], validation=unsound)
    assert message.startswith(f"the validation split: {refused}")
    with pytest.raises(ValueError, match=f"the test set: {refused}"):
        distill.evaluate_plan([right], {"text": make_trained()}, unsound, reference="text")


def test_the_last_token_of_the_vocabulary_is_no_fault(tmp_path):
    stage, data = make_text_stage(10)
    validation = {name: array[:2] for name, array in data.items()}
    _, run = train(tmp_path, [stage], validation=validation)
    assert np.isfinite(get_losses(run, stage.name)).all()


def test_suspects_leave_the_training_as_it_is(tmp_path):
    """The loss of masked labels is tried before the first step, which changes no bit."""
    right, _ = train(tmp_path / "right", [make_stage("a", loss=where_loss, dropout=0.1)])
    data = with_labels((3, -100))
    masked = {**TRAIN, "labels": data["labels"]}
    assert _diagnosis.find_unknown_labels(masked["labels"], NUM_CLASSES).tolist() == [3]
    first, _ = train(tmp_path / "first", [make_stage("a", data=masked, loss=unlabelled_loss)])
    second, _ = train(tmp_path / "second", [make_stage("a", loss=unlabelled_loss)])
    jax.tree.map(np.testing.assert_array_equal, first["a"][0].variables, second["a"][0].variables)
    assert right["a"][0].validation_accuracy > 0


def test_labels_of_tokens_are_found_by_example():
    labels = np.array([[0, 1], [1, -100], [2, 5], [-100, 7]])
    assert _diagnosis.find_unknown_labels(labels, NUM_CLASSES).tolist() == [1, 2, 3]
    replaced = _diagnosis.replace_unknown_labels(np.array([-1, -100, 1, 9]), NUM_CLASSES)
    assert replaced.tolist() == [2, 0, 1, 2]


def evaluation_error(stage, variables, test):
    trained = {stage.name: [distill.TrainedModel(variables, 0.0, 0.5)]}
    with pytest.raises(ValueError, match=f"the logits of '{stage.name}' are NaN for") as caught:
        distill.evaluate_plan([stage], trained, test, reference=stage.name)
    assert len(str(caught.value)) <= 300 and "diverged" not in str(caught.value)
    return str(caught.value)


def test_nan_in_a_test_set_is_told_from_nan_in_the_weights():
    stage = make_stage("first")
    variables = make_trained()[0].variables
    message = evaluation_error(stage, variables, with_input(np.nan, VALIDATION))
    assert "1 of 20 examples (the first is number 7) of its 'inputs' hold NaN" in message
    unsound = jax.tree.map(lambda leaf: leaf * np.nan, variables)
    assert "of its weights are NaN or infinite" in evaluation_error(stage, unsound, VALIDATION)


def test_unknown_tokens_of_a_test_set_are_named():
    stage, data = make_text_stage(11)
    variables = stage.model.init(jax.random.key(0), data["inputs"])
    message = evaluation_error(stage, variables, data)
    assert "the tokens of its inputs, from 3 to 11, outside of the vocabulary" in message


@pytest.mark.parametrize(
    "augment",
    [
        lambda key, x: x + np.random.default_rng().normal(size=x.shape).astype(np.float32),
        lambda key, x: x * np.random.default_rng().random(),
        lambda key, x: jax.jit(lambda x: x * np.random.default_rng().random())(x),
    ],
)
def test_an_augmentation_that_draws_with_numpy_is_refused(tmp_path, augment):
    message = run_error(tmp_path, [make_stage("first", augment=augment)])
    assert message.startswith("the augment of stage 'first' draws numbers outside of JAX")


def test_augmentations_with_constants_and_keys_are_fine(tmp_path):
    scale, key = np.full(5, 2.0, np.float32), jax.random.key(3)

    def augment(own, x):
        return x * scale[None] + jax.random.normal(key, x.shape) + jax.random.normal(own, x.shape)

    train(tmp_path, [make_stage("first", augment=augment, steps=1)])


def test_an_augmentation_with_its_arguments_exchanged_is_named(tmp_path):
    message = run_error(tmp_path, [make_stage("first", augment=lambda x, key: x)])
    assert "returns a key: it is called as augment(key, inputs)" in message


@pytest.mark.parametrize("value", [2**40, -(2**40)])
def test_integers_beyond_32_bits_are_refused(tmp_path, value):
    number = np.arange(len(TRAIN["labels"])) + value
    message = run_error(tmp_path, [make_stage("first", data=TRAIN | {"number": number})])
    assert "as 'number', of which JAX keeps 32 bits: number them from 0" in message
    small = TRAIN | {"number": number - value, "labels": TRAIN["labels"].astype(np.int64)}
    train(tmp_path, [make_stage("first", data=small, steps=1)])
