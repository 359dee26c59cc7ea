"""Inputs of another kind, shape or scale than a model takes: refused or said before training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import data, distill, evaluate, models
from jaxkd.distill import _input_checks
from small_plans import TRAIN, VALIDATION, make_model, make_stage, make_trained, run_error, train


@pytest.mark.parametrize(
    "inputs",
    [np.full((2, 3), -1.0), np.full((2, 3), -1, np.int16), np.full(2, -1), np.ones((0, 3), int)],
)
def test_negative_numbers_that_may_be_no_tokens_are_no_fault(inputs):
    _input_checks.check_tokens({"tokens": np.zeros((2, 3), int), "others": inputs}, "the test set")


def to_uint8(inputs):
    """Makes bytes of inputs, on the scale 0 to 255."""
    return np.clip(255 * inputs, 0, 255).astype(np.uint8)


def with_bytes(examples):
    return {**examples, "inputs": to_uint8(examples["inputs"])}


def divide(key, inputs):
    """An augmentation that the validation split does not pass."""
    return inputs.astype(jnp.float32) / 255


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
        distill.evaluate_plan(
            plan, {"first": make_trained()}, with_bytes(VALIDATION), reference="first"
        )


def test_dtypes_are_those_that_the_model_gets(tmp_path):
    """An augmentation may divide bytes, or leave them as they are."""
    stage = make_stage("first", data=with_bytes(TRAIN), augment=divide)
    message = run_error(tmp_path, [stage], validation=with_bytes(VALIDATION))
    assert "trains on inputs in float32 (after augment), but" in message and "in uint8" in message
    _input_checks.check_inputs([stage], VALIDATION, "test set")
    flip = make_stage("flip", data=with_bytes(TRAIN), augment=lambda key, x: x[:, ::-1])
    _input_checks.check_inputs([flip], with_bytes(VALIDATION), "test set")
    double = {**TRAIN, "inputs": TRAIN["inputs"].astype(np.float64)}
    _input_checks.check_inputs(
        [make_stage("double", data=double, augment=divide)], VALIDATION, "test set"
    )


def make_images(largest, smallest=0.0):
    images = np.random.default_rng(0).uniform(smallest, largest, (8, 4, 4, 1)).astype(np.float32)
    images[0, 0, 0, 0] = largest
    return {"inputs": images, "labels": np.arange(8, dtype=np.int32) % 3}


@pytest.mark.parametrize(("largest", "other"), [(1.0, 255.0), (255.0, 1.0)])
def test_images_of_another_scale_are_refused(largest, other):
    stage = make_stage("first", data=make_images(largest))
    message = rf"'first' trains on images in \[0, {largest:.0f}\], but those of the test set are in"
    with pytest.raises(ValueError, match=message):
        _input_checks.check_inputs([stage], make_images(other), "test set")


@pytest.mark.parametrize(("largest", "smallest"), [(1.2, 0.0), (9.0, 0.0), (255.0, -3.0)])
def test_inputs_that_may_have_one_scale_are_no_fault(largest, smallest):
    stage = make_stage("first", data=make_images(1.0))
    _input_checks.check_inputs([stage], make_images(largest, smallest), "test set")


@pytest.mark.parametrize(("smallest", "other"), [(-1.0, 0.0), (0.0, -1.0)])
def test_images_from_minus_1_to_1_have_a_scale_of_their_own(smallest, other):
    stage = make_stage("first", data=make_images(1.0, smallest))
    _input_checks.check_inputs([stage], make_images(1.0, smallest), "test set")
    with pytest.warns(
        UserWarning, match=rf"in \[{smallest:.0f}, 1\], but those of the test set are"
    ):
        _input_checks.check_inputs([stage], make_images(1.0, other), "test set")
    with pytest.raises(
        ValueError, match=rf"in \[{smallest:.0f}, 1\], but .* in \[0, 255\]: prepare"
    ):
        _input_checks.check_inputs([stage], make_images(255.0), "test set")


def test_images_that_may_be_standardised_or_resized_have_no_scale():
    for smallest, largest in ((-2.1, 2.6), (-0.02, 1.0), (-1.0, 1.5)):
        stage = make_stage("first", data=make_images(largest, smallest))
        _input_checks.check_inputs([stage], make_images(255.0), "test set")


def check_shapes(shape, other, dtype=np.float32, **options):
    """Compares inputs of a stage with those of a test set. Shapes leave out the examples."""
    data = {"inputs": np.zeros((4, *shape), dtype), "labels": np.zeros(4, np.int32)}
    stage = make_stage("first", data=data, **options)
    _input_checks.check_inputs([stage], {"inputs": np.zeros((2, *other), dtype)}, "test set")


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
        _input_checks.check_inputs([stage], {"inputs": {"x" * 200: np.zeros((4, 3))}}, "test set")
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
    _input_checks.check_inputs([make_stage("first", data=train)], test, "test set")
    test["inputs"]["mask"] = np.ones((4, 7))
    with pytest.raises(ValueError, match="inputs/mask of shape"):
        _input_checks.check_inputs([make_stage("first", data=train)], test, "test set")


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
    _input_checks.check_inputs([stage], {"inputs": np.ones((2, 5), other)}, "test set")
    # Other arrays have dtypes of their own, and it is not known on what a teacher was trained.
    labels = VALIDATION["labels"].astype(np.float32)
    _input_checks.check_inputs([make_stage("a")], {**VALIDATION, "labels": labels}, "test set")
    teacher = distill.Pretrained("big", make_model(), make_trained()[0].variables)
    _input_checks.check_inputs([teacher], with_bytes(VALIDATION), "test set")


def test_each_array_of_a_dict_has_its_dtype():
    def join(images, tokens):
        return {"inputs": {"images": images, "tokens": tokens}}

    images, tokens = TRAIN["inputs"], np.ones((45, 2), np.int32)
    stage = make_stage("first", data={**TRAIN, **join(images, tokens)})
    _input_checks.check_inputs([stage], join(images, tokens.astype(np.int64)), "test set")
    with pytest.raises(ValueError, match="inputs/images in float32.* test set are in uint8"):
        _input_checks.check_inputs([stage], join(to_uint8(images), tokens), "test set")
    with pytest.raises(ValueError, match="inputs/tokens in int32.* test set are in float64"):
        _input_checks.check_inputs([stage], join(images, tokens / 2), "test set")


def test_a_score_of_the_user_may_prepare_its_inputs(tmp_path):
    def make_score(model):
        return lambda variables, examples: evaluate.Score(0.5, 0.5)

    options = {"validation": with_bytes(VALIDATION), "make_score": make_score}
    trained, _ = train(tmp_path, [make_stage("first", steps=1)], **options)
    assert trained["first"][0].validation_accuracy == 0.5


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


def normalize(max_value=None):
    """Returns a model of images that normalises its inputs."""
    network = models.CNN(features=(2,), hidden=4, num_classes=3)
    return models.with_input_normalization(
        models.from_linen(network), 0.5, 0.25, max_value=max_value
    )


@pytest.mark.parametrize(("largest", "max_value"), [(1.0, 255.0), (255.0, 1.0)])
def test_a_model_of_another_scale_is_refused(tmp_path, largest, max_value):
    images = make_images(largest)
    stage = make_stage("first", model=normalize(max_value), data=images)
    message = run_error(tmp_path, [stage], validation=images)
    assert f"'first' trains on images in [0, {largest:.0f}], but its model takes pixels up to" in (
        message
    )
    assert f"max_value={largest}" in message
    with pytest.raises(ValueError, match=r"'first' gets for the test set images in"):
        _input_checks.check_inputs([stage], images, "test set")


def test_pixels_below_0_are_refused_by_a_model_of_pixels(tmp_path):
    """Images / 127.5 - 1 look right, but are half as bright and twice as strong to the model."""
    images = make_images(1.0, -1.0)
    stage = make_stage("first", model=normalize(1.0), data=images)
    message = run_error(tmp_path, [stage], validation=images)
    assert "trains on images from -0.995 to 1, but its model takes pixels from 0 to 1" in message
    _input_checks.check_stage_inputs(
        make_stage("first", model=normalize(1.0), data=make_images(1.1, -0.1)), 0
    )


def test_a_layer_without_units_is_refused_before_training(tmp_path):
    network = models.CNN(features=(2,), hidden=0, num_classes=3)
    stage = make_stage("first", model=models.from_linen(network), data=make_images(1.0))
    message = run_error(tmp_path, [stage], validation=make_images(1.0))
    assert message.endswith(": give each of its layers at least one unit")


@pytest.mark.parametrize("kind", ["array", "dict"])
def test_a_split_of_training_examples_is_said(kind):
    def make(rows):
        inputs = TRAIN["inputs"][rows]
        return {**TRAIN, "inputs": inputs if kind == "array" else {"x": inputs, "y": 0 * inputs}}

    stage = make_stage("first", data=make(slice(None)))
    with pytest.warns(UserWarning, match="24 of 24 examples of the test set are also among those"):
        _input_checks.check_inputs([stage], make(slice(24)), "test set")
    # A few are normal, and small sets say little.
    few = {**VALIDATION, "inputs": np.concatenate([VALIDATION["inputs"], TRAIN["inputs"][:8]])}
    _input_checks.check_inputs([make_stage("first")], few, "test set")
    _input_checks.check_inputs([stage], make(slice(8)), "test set")


@pytest.mark.parametrize(
    ("images", "max_value"),
    [
        (make_images(1.0), 1.0),
        (make_images(255.0), 255.0),
        (make_images(2.0), 255.0),
        ({"inputs": np.zeros((8, 4, 4, 1), np.float32)}, 255.0),
    ],
    ids=["unit", "bytes", "dark", "black"],
)
def test_a_model_of_the_same_scale_is_not(images, max_value):
    stage = make_stage("first", model=normalize(max_value), data={**make_images(1.0), **images})
    _input_checks.check_stage_inputs(stage, 0)


def test_predictions_of_images_of_another_scale_are_warned_of():
    model = models.with_class_order(normalize(255.0), [2, 0, 1])
    images = make_images(1.0)["inputs"]
    variables = model.init(jax.random.key(0), images)
    predict = evaluate.make_predict(model)
    with pytest.warns(UserWarning, match=r"images in \[0, 1\], but its model takes"):
        predict(variables, images)
    predict(variables, 255 * images)
    both = models.join({"first": normalize(255.0), "second": normalize(255.0)})
    assert both.max_value == 255
    assert models.join({"first": normalize(255.0), "second": normalize(1.0)}).max_value is None


def test_pixels_lost_by_a_division_are_said(tmp_path):
    """Photographs / 255 as integers are black with a few white dots."""
    images = (make_images(255.0)["inputs"] / 255).astype(np.uint8)
    lost = {"inputs": images, "labels": np.arange(8, dtype=np.int32) % 3}
    assert set(images.ravel()) == {0, 1}
    stage = make_stage("first", model=normalize(), data=lost)
    with pytest.warns(UserWarning, match="is above 1, though they are uint8") as caught:
        train(tmp_path, [stage], validation=lost)
    named = {str(warning.message).split(" is above")[0] for warning in caught}
    assert named == {
        "no pixel of the images that stages train on",
        "no pixel of the images of the validation split",
    }
    with pytest.warns(UserWarning, match="no pixel of the images is above 1"):
        data.channel_statistics(images)


@pytest.mark.parametrize("count", [0, 19])
def test_a_validation_split_of_unequal_lengths_is_refused_before_training(tmp_path, count):
    validation = {**VALIDATION, "labels": VALIDATION["labels"][:count]}
    message = run_error(tmp_path, [make_stage("first")], validation=validation)
    assert "the validation split needs arrays of the same length, at least 1, got the" in message
    assert not (tmp_path / "checkpoints").exists()


def test_stored_weights_of_8_bits_are_named(tmp_path):
    stored = models.quantize_weights(make_trained()[0].variables)
    message = run_error(tmp_path, [distill.Pretrained("small", make_model(), stored)])
    assert "are stored in 8 bits: pass models.dequantize_weights(variables)" in message


def test_a_model_of_one_output_is_named(tmp_path):
    network = models.from_linen(models.CNN(features=(2,), hidden=4, num_classes=1))
    message = run_error(
        tmp_path,
        [make_stage("first", model=network, data=make_images(1.0))],
        validation=make_images(1.0),
    )
    assert "its model has one output, whose softmax is always 1: for a sigmoid pass" in message
