"""Unsound labels, tokens, inputs, teachers and weights: found, named, and never trained on."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkd import distill, evaluate, losses, models, runs
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


def run_error(folder, plan, **options):
    """Returns the message of the error in which a plan ends, and checks that it is one line."""
    with pytest.raises((runs.RunError, ValueError)) as caught:
        train(folder, plan, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) <= 300
    return message


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
    message = run_error(tmp_path, [make_stage("wrong", model=model, data=data)], validation=data)
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
        distill.evaluate_plan([right], {"text": TRAINED}, unsound, reference="text")


@pytest.mark.parametrize(
    "inputs",
    [np.full((2, 3), -1.0), np.full((2, 3), -1, np.int16), np.full(2, -1), np.ones((0, 3), int)],
)
def test_negative_numbers_that_may_be_no_tokens_are_no_fault(inputs):
    _diagnosis.check_tokens({"tokens": np.zeros((2, 3), int), "others": inputs}, "the test set")


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


def to_uint8(inputs):
    """Makes bytes of inputs, on the scale 0 to 255."""
    return np.clip(255 * inputs, 0, 255).astype(np.uint8)


def with_bytes(examples):
    return {**examples, "inputs": to_uint8(examples["inputs"])}


def divide(key, inputs):
    """An augmentation that the validation split does not pass."""
    return inputs.astype(jnp.float32) / 255


TRAINED = [distill.TrainedModel(make_model().init(jax.random.key(0), TRAIN["inputs"]), 0.0, 0.5)]


@pytest.mark.parametrize(
    ("data", "validation", "dtypes"),
    [
        (TRAIN, with_bytes(VALIDATION), ("float32", "uint8")),
        (with_bytes(TRAIN), VALIDATION, ("uint8", "float32")),
        (lambda seed: TRAIN, with_bytes(VALIDATION), ("float32", "uint8")),
    ],
)
def test_a_validation_split_of_another_kind_of_dtype_is_refused(tmp_path, data, validation, dtypes):
    """Bytes that are not divided, unlike the images of the training, give a low accuracy."""
    message = run_error(tmp_path, [make_stage("first", data=data)], validation=validation)
    assert f"'first' trains on inputs in {dtypes[0]}, but those of the validation split" in message
    assert f"are in {dtypes[1]}" in message and "prepare both alike" in message
    assert not (tmp_path / "checkpoints").exists()


def test_a_test_set_of_another_kind_of_dtype_is_refused():
    plan = [make_stage("first")]
    with pytest.raises(ValueError, match="in float32, but those of the test set are in uint8.*ali"):
        distill.evaluate_plan(plan, {"first": TRAINED}, with_bytes(VALIDATION), reference="first")


def test_dtypes_are_those_that_the_model_gets(tmp_path):
    """An augmentation may divide bytes, or leave them as they are."""
    stage = make_stage("first", data=with_bytes(TRAIN), augment=divide)
    message = run_error(tmp_path, [stage], validation=with_bytes(VALIDATION))
    assert "trains on inputs in float32 (after augment), but" in message and "in uint8" in message
    _diagnosis.check_inputs([stage], VALIDATION, "test set")
    flip = make_stage("flip", data=with_bytes(TRAIN), augment=lambda key, x: x[:, ::-1])
    _diagnosis.check_inputs([flip], with_bytes(VALIDATION), "test set")
    double = {**TRAIN, "inputs": TRAIN["inputs"].astype(np.float64)}
    _diagnosis.check_inputs(
        [make_stage("double", data=double, augment=divide)], VALIDATION, "test set"
    )


def make_images(largest, smallest=0.0):
    images = np.random.default_rng(0).uniform(smallest, largest, (8, 2, 2, 1)).astype(np.float32)
    images[0, 0, 0, 0] = largest
    return {"inputs": images, "labels": np.zeros(8, np.int32)}


@pytest.mark.parametrize(("largest", "other"), [(1.0, 255.0), (255.0, 1.0)])
def test_images_of_another_scale_are_refused(largest, other):
    stage = make_stage("first", data=make_images(largest))
    message = rf"'first' trains on images in \[0, {largest:.0f}\], but those of the test set are in"
    with pytest.raises(ValueError, match=message):
        _diagnosis.check_inputs([stage], make_images(other), "test set")


@pytest.mark.parametrize(("largest", "smallest"), [(1.2, 0.0), (9.0, 0.0), (255.0, -3.0)])
def test_inputs_that_may_have_one_scale_are_no_fault(largest, smallest):
    stage = make_stage("first", data=make_images(1.0))
    _diagnosis.check_inputs([stage], make_images(largest, smallest), "test set")


@pytest.mark.parametrize(("smallest", "other"), [(-1.0, 0.0), (0.0, -1.0)])
def test_images_from_minus_1_to_1_have_a_scale_of_their_own(smallest, other):
    stage = make_stage("first", data=make_images(1.0, smallest))
    _diagnosis.check_inputs([stage], make_images(1.0, smallest), "test set")
    with pytest.warns(
        UserWarning, match=rf"in \[{smallest:.0f}, 1\], but those of the test set are"
    ):
        _diagnosis.check_inputs([stage], make_images(1.0, other), "test set")
    with pytest.raises(
        ValueError, match=rf"in \[{smallest:.0f}, 1\], but .* in \[0, 255\]: prepare"
    ):
        _diagnosis.check_inputs([stage], make_images(255.0), "test set")


def test_images_that_may_be_standardised_or_resized_have_no_scale():
    for smallest, largest in ((-2.1, 2.6), (-0.02, 1.0), (-1.0, 1.5)):
        stage = make_stage("first", data=make_images(largest, smallest))
        _diagnosis.check_inputs([stage], make_images(255.0), "test set")


def check_shapes(shape, other, dtype=np.float32, **options):
    """Compares inputs of a stage with those of a test set. Shapes leave out the examples."""
    data = {"inputs": np.zeros((4, *shape), dtype), "labels": np.zeros(4, np.int32)}
    stage = make_stage("first", data=data, **options)
    _diagnosis.check_inputs([stage], {"inputs": np.zeros((2, *other), dtype)}, "test set")


@pytest.mark.parametrize(
    ("shape", "other", "dtype"),
    [
        ((6, 6, 3), (3, 6, 6), np.float32),
        ((6, 6, 3), (3, 6, 6), np.uint8),
        ((6, 6, 3), (6, 6, 1), np.float32),
        ((6, 6), (6, 6, 1), np.float32),
        ((8, 3), (8, 4), np.float32),
        ((5,), (6,), np.float32),
        ((2, 8), (3, 8), np.int32),
        ((8,), (1, 8), np.int32),
    ],
)
def test_inputs_of_another_shape_are_refused(shape, other, dtype):
    with pytest.raises(ValueError, match="those of the test set have .* prepare both") as caught:
        check_shapes(shape, other, dtype)
    assert f"of shape {('N', *shape)}, but" in str(caught.value)
    assert f"have {('N', *other)}: prepare" in str(caught.value) and len(str(caught.value)) <= 300


def test_inputs_of_long_names_are_refused_in_a_short_line():
    data = {"inputs": {"x" * 200: np.zeros((4, *[1] * 20))}, "labels": np.zeros(4, np.int32)}
    stage = make_stage("s" * 100, data=data)
    with pytest.raises(ValueError, match="prepare both alike, with the channels") as caught:
        _diagnosis.check_inputs([stage], {"inputs": {"x" * 200: np.zeros((4, 3))}}, "test set")
    assert len(str(caught.value)) <= 300


def test_sizes_may_differ_but_are_said():
    for shape, other in (((6, 6, 3), (3, 3, 3)), ((8, 3), (9, 3))):
        with pytest.warns(UserWarning, match="but those of the test set have .* is another size"):
            check_shapes(shape, other)
    with pytest.warns(UserWarning, match=r"of size \(6, 6\), but .* have \(3, 3\)"):
        check_shapes((6, 6, 1), (3, 3, 1), np.uint8)
    # An augmentation may cut crops.
    check_shapes((6, 6, 3), (4, 4, 3), augment=lambda key, x: x)


def test_tokens_may_have_any_length_and_so_may_their_masks():
    check_shapes((8,), (9,), np.int32)
    check_shapes((2, 8), (2, 9), np.int32)
    train, test = (
        {"inputs": {"tokens": np.ones((4, length), np.int32), "mask": np.ones((4, length))}}
        for length in (8, 9)
    )
    _diagnosis.check_inputs([make_stage("first", data=train)], test, "test set")
    test["inputs"]["mask"] = np.ones((4, 7))
    with pytest.raises(ValueError, match="inputs/mask of shape"):
        _diagnosis.check_inputs([make_stage("first", data=train)], test, "test set")


@pytest.mark.parametrize(
    ("dtype", "other"),
    [
        (np.int32, np.int64),
        (np.int32, np.uint8),
        (np.float32, np.float64),
        (np.float32, jnp.bfloat16),
        (bool, np.int32),
    ],
)
def test_dtypes_of_one_kind_are_no_fault(dtype, other):
    stage = make_stage("first", data={**TRAIN, "inputs": np.ones((45, 5), dtype)})
    _diagnosis.check_inputs([stage], {"inputs": np.ones((2, 5), other)}, "test set")
    # Other arrays have dtypes of their own.
    labels = VALIDATION["labels"].astype(np.float32)
    _diagnosis.check_inputs([make_stage("a")], {**VALIDATION, "labels": labels}, "test set")
    _diagnosis.check_inputs([make_teacher(1.0)], with_bytes(VALIDATION), "test set")


def test_each_array_of_a_dict_has_its_dtype():
    def join(images, tokens):
        return {"inputs": {"images": images, "tokens": tokens}}

    images, tokens = TRAIN["inputs"], np.ones((45, 2), np.int32)
    stage = make_stage("first", data={**TRAIN, **join(images, tokens)})
    _diagnosis.check_inputs([stage], join(images, tokens.astype(np.int64)), "test set")
    with pytest.raises(ValueError, match="inputs/images in float32.* test set are in uint8"):
        _diagnosis.check_inputs([stage], join(to_uint8(images), tokens), "test set")
    with pytest.raises(ValueError, match="inputs/tokens in int32.* test set are in float64"):
        _diagnosis.check_inputs([stage], join(images, tokens / 2), "test set")


def evaluation_error(stage, variables, test):
    trained = {stage.name: [distill.TrainedModel(variables, 0.0, 0.5)]}
    with pytest.raises(ValueError, match=f"the logits of '{stage.name}' are NaN for") as caught:
        distill.evaluate_plan([stage], trained, test, reference=stage.name)
    assert len(str(caught.value)) <= 300 and "diverged" not in str(caught.value)
    return str(caught.value)


def test_nan_in_a_test_set_is_told_from_nan_in_the_weights():
    stage = make_stage("first")
    variables = TRAINED[0].variables
    message = evaluation_error(stage, variables, with_input(np.nan, VALIDATION))
    assert "1 of 20 examples (the first is number 7) of its 'inputs' hold NaN" in message
    unsound = jax.tree.map(lambda leaf: leaf * np.nan, variables)
    assert "of its weights are NaN or infinite" in evaluation_error(stage, unsound, VALIDATION)


def test_unknown_tokens_of_a_test_set_are_named():
    stage, data = make_text_stage(11)
    variables = stage.model.init(jax.random.key(0), data["inputs"])
    message = evaluation_error(stage, variables, data)
    assert "the tokens of its inputs, from 3 to 11, outside of the vocabulary" in message


def test_a_score_of_the_user_may_prepare_its_inputs(tmp_path):
    def make_score(model):
        return lambda variables, examples: evaluate.Score(0.5, 0.5)

    options = {"validation": with_bytes(VALIDATION), "make_score": make_score}
    trained, _ = train(tmp_path, [make_stage("first", steps=1)], **options)
    assert trained["first"][0].validation_accuracy == 0.5


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


def test_numbers_of_another_scale_are_said(tmp_path):
    larger = {**VALIDATION, "inputs": VALIDATION["inputs"] * 255}
    plan = [make_stage("first", steps=1)]
    match = "train on inputs up to .*, but those of the {} are up to .*: is another scale meant"
    with pytest.warns(UserWarning, match=match.format("validation split")):
        train(tmp_path / "larger", plan, validation=larger)
    trained, _ = train(tmp_path / "same", plan)
    with pytest.warns(UserWarning, match=match.format("test set")):
        distill.evaluate_plan(plan, trained, larger, reference="first", repeats=1)
    ten = {**VALIDATION, "inputs": VALIDATION["inputs"] * 10}
    distill.evaluate_plan(plan, trained, ten, reference="first", repeats=1)


@pytest.mark.parametrize("value", [2**40, -(2**40)])
def test_integers_beyond_32_bits_are_refused(tmp_path, value):
    number = np.arange(len(TRAIN["labels"])) + value
    message = run_error(tmp_path, [make_stage("first", data=TRAIN | {"number": number})])
    assert "as 'number', of which JAX keeps 32 bits: number them from 0" in message
    small = TRAIN | {"number": number - value, "labels": TRAIN["labels"].astype(np.int64)}
    train(tmp_path, [make_stage("first", data=small, steps=1)])
