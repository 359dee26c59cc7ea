import warnings

import chex
import jax
import numpy as np
import pytest

from jaxkd.data import DataError, Split, dataset


def numbered(count, num_classes=2, shape=(4, 4, 3)):
    images = np.broadcast_to(np.arange(count, dtype=np.uint8).reshape(-1, 1, 1, 1), (count, *shape))
    return Split(images, np.arange(count, dtype=np.int32) % num_classes)


def make(train, test=None):
    return dataset.make_dataset("set", train, test or numbered(3), ("a", "b"))


@pytest.mark.parametrize(
    ("count", "validation"), [(3, 1), (9, 1), (10, 1), (19, 1), (20, 2), (200, 20)]
)
def test_validation_is_a_tenth_and_at_least_one(count, validation):
    result = make(numbered(count))
    assert (len(result.train.labels), len(result.validation.labels)) == (
        count - validation,
        validation,
    )


def test_held_out_examples_keep_order_and_labels():
    result = make(numbered(200))
    train = result.train.images[:, 0, 0, 0]
    validation = result.validation.images[:, 0, 0, 0]
    assert (np.diff(train.astype(int)) > 0).all() and (np.diff(validation.astype(int)) > 0).all()
    assert sorted([*train, *validation]) == list(range(200))
    np.testing.assert_array_equal(result.train.labels, train % 2)
    np.testing.assert_array_equal(result.validation.labels, validation % 2)


def test_validation_set_is_fixed():
    # Recorded with jax 0.12; another value changes every result with a validation set.
    assert make(numbered(50)).validation.images[:, 0, 0, 0].tolist() == [0, 1, 19, 36, 40]


@pytest.mark.parametrize(("count", "num_classes"), [(50_000, 10), (10_000, 100), (60, 3)])
def test_split_in_which_no_class_is_lost_is_that_of_the_permutation(count, num_classes):
    labels = np.random.default_rng(0).integers(0, num_classes, count)
    key = dataset.fixed_key(0)
    order = np.asarray(jax.random.permutation(key, count))
    expected = np.sort(order[count // 10 :]), np.sort(order[: count // 10])
    split = dataset.hold_out_indices(count, count // 10, key=key, labels=labels)
    chex.assert_trees_all_equal(split, expected)


RARE = np.r_[np.repeat(np.arange(6), 4), np.arange(6, 30)]


@pytest.mark.parametrize(
    ("labels", "num_held_out"),
    [
        (RARE, 6),
        (np.repeat(np.arange(20), 2), 5),
        # Only the first class has an example to spare.
        (np.r_[0, 0, np.arange(1, 39)], 1),
        (np.array([0, 1, 0]), 1),
    ],
)
def test_no_class_loses_its_last_training_example(labels, num_held_out):
    for seed in range(20):
        key = jax.random.key(seed)
        count = max(1, len(labels) // 8)
        remaining, held_out = dataset.hold_out_indices(len(labels), count, key=key, labels=labels)
        assert set(labels[remaining]) == set(labels)
        assert sorted([*remaining, *held_out]) == list(range(len(labels)))
        assert (np.diff(remaining) > 0).all() and (np.diff(held_out) > 0).all()
        assert len(held_out) == min(num_held_out, count)


def test_examples_of_other_classes_stay_where_they_were_drawn():
    key = jax.random.key(0)
    drawn = dataset.hold_out_indices(len(RARE), 8, key=key)[1]
    held_out = dataset.hold_out_indices(len(RARE), 8, key=key, labels=RARE)[1]
    is_common = RARE[drawn] < 6
    assert is_common.any() and not is_common.all()
    assert set(drawn[is_common]) <= set(held_out) and len(held_out) == 8
    again = dataset.hold_out_indices(len(RARE), 8, key=key, labels=RARE)[1]
    np.testing.assert_array_equal(held_out, again)


def test_classes_of_one_example_cannot_be_held_out():
    with pytest.raises(DataError, match="each class has only one training example, so none can be"):
        make(numbered(2))


def test_classes_that_validation_lacks_are_said():
    train = Split(numbered(48).images, RARE.astype(np.int32))
    names = tuple(f"class {label}" for label in range(30))
    message = r"^set: 2. of 30 classes are not in the validation set, which was held .*: class 1, "
    with pytest.warns(UserWarning, match=message) as said:
        result = dataset.make_dataset("set", train, numbered(3), names)
    assert [warning.filename for warning in said] == [__file__]
    assert len(str(said[0].message)) <= 300
    assert set(result.train.labels) == set(range(30)) and len(result.validation.labels) == 4


def test_test_set_that_is_held_out_leaves_each_class_in_the_training_set():
    train = dataset.hold_out_test(Split(numbered(48).images, RARE.astype(np.int32)))[0]
    assert set(train.labels) == set(range(30))


def test_held_out_examples_do_not_depend_on_the_default_generator():
    expected = make(numbered(50)).validation, dataset.hold_out_test(numbered(50))
    with jax.default_prng_impl("rbg"):
        chex.assert_trees_all_equal(
            (make(numbered(50)).validation, dataset.hold_out_test(numbered(50))), expected
        )


def test_held_out_examples_follow_the_key():
    parts = [
        dataset.hold_out(numbered(200), 20, key=jax.random.key(seed))[1].images
        for seed in (0, 0, 1)
    ]
    assert (parts[0] == parts[1]).all() and (parts[0] != parts[2]).any()


def test_test_set_is_held_out_by_another_key():
    train, test = dataset.hold_out_test(numbered(100))
    assert (len(train.labels), len(test.labels)) == (80, 20)
    validation = dataset.hold_out(numbered(100), 20, key=jax.random.key(0))[1]
    assert not np.array_equal(test.images, validation.images)
    chex.assert_trees_all_equal(dataset.hold_out_test(numbered(100)), (train, test))


def test_grey_images_pass():
    result = make(numbered(4, shape=(4, 4, 1)), numbered(3, shape=(4, 4, 1)))
    assert result.train.images.shape == (3, 4, 4, 1)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            np.zeros((4, 4, 4, 3), np.float32),
            r"set: train has images float32 \[4, 4, 4, 3\], expected uint8",
        ),
        (
            np.zeros((4, 4, 4, 4), np.uint8),
            r"uint8 \[4, 4, 4, 4\], expected uint8 \[N, H, W, 1 or 3\]: convert",
        ),
        (np.zeros((4, 4, 4), np.uint8), r"uint8 \[4, 4, 4\], expected"),
    ],
)
def test_wrong_images(images, message):
    with pytest.raises(DataError, match=message):
        make(Split(images, np.zeros(4, np.int32)))


@pytest.mark.parametrize("label", [-1, 2])
def test_label_without_a_class(label):
    test = numbered(5)
    test.labels[[3, 4]] = label
    with pytest.raises(
        DataError, match=rf"set: test has label {label} at index 3, outside 0..1: choose"
    ):
        make(numbered(4), test)


@pytest.mark.parametrize(("train", "test", "message"), [
    (0, 3, "train has 0 images, at least 2"),
    (1, 3, "train has 1 images, at least 2"),
    (4, 0, "test has 0 images, at least 1"),
])  # fmt: skip
def test_empty_split(train, test, message):
    with pytest.raises(DataError, match=message):
        make(numbered(train), numbered(test))


def test_given_validation_images_leave_the_training_images_whole():
    result = dataset.make_dataset("set", numbered(10), numbered(3), ("a", "b"), numbered(4))
    assert [len(split.labels) for split in result[:3]] == [10, 4, 3]
    validation = numbered(4)
    validation.labels[1] = -1
    with pytest.raises(DataError, match=r"set: validation has label -1 at index 1, outside 0..1"):
        dataset.make_dataset("set", numbered(10), numbered(3), ("a", "b"), validation)


def test_images_without_labels():
    with pytest.raises(DataError, match="train has 4 images but 3 labels"):
        make(Split(numbered(4).images, numbered(3).labels))


@pytest.mark.parametrize("num_shared", [0, 1, 2, 100])
def test_test_images_that_are_training_images_are_counted(num_shared):
    train, test = numbered(100), numbered(100)
    pixels = np.arange(100, 200, dtype=np.uint8)
    pixels[:num_shared] -= 100
    images = np.broadcast_to(pixels.reshape(-1, 1, 1, 1), test.images.shape)
    # One example in a hundred is usual.
    messages = get_warnings(train, Split(images, test.labels), validation=numbered(3))
    expected = f"set: {num_shared} of 100 test images are also training images"
    assert [message.startswith(expected) for message in messages] == [True] * (num_shared > 1)


@pytest.mark.parametrize("copy", ["train", "test"])
def test_validation_images_of_another_split_are_counted(copy):
    train, test = numbered(100), numbered(100)
    pixels = np.arange(100, 200, dtype=np.uint8).reshape(-1, 1, 1, 1)
    test = Split(np.broadcast_to(pixels, test.images.shape), test.labels)
    (message,) = get_warnings(train, test, validation={"train": train, "test": test}[copy])
    name = {"train": "training"}.get(copy, copy)
    assert f"set: 100 of 100 validation images are also {name} images, so that" in message


def test_equal_images_of_two_classes_are_counted():
    train = numbered(60)
    images = train.images.copy()
    images[1] = images[0]
    test = Split(np.full((2, 4, 4, 3), 200, np.uint8), np.zeros(2, np.int32))
    (message,) = get_warnings(Split(images, train.labels), test, validation=numbered(3))
    assert message.startswith("set: 2 of 60 training images are in two classes at once")
    labels = np.r_[0, 0, train.labels[2:]].astype(np.int32)
    assert not get_warnings(Split(images, labels), test, validation=numbered(3))


def test_nothing_is_said_of_a_few_equal_images():
    assert not get_warnings(numbered(30), numbered(19), validation=numbered(3))


def get_warnings(train, test, validation):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dataset.make_dataset("set", train, test, ("a", "b"), validation)
    messages = [str(warning.message) for warning in caught]
    assert all(len(message) <= 300 for message in messages)
    return messages
