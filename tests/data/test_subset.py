import jax
import numpy as np
import pytest

from jaxkd.data import DataError, balanced_subset, few_labels

LABELS = (
    np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 3], [100, 60, 50, 4])).astype(np.int32)
)


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (4, [1, 1, 1, 1]),
        (16, [4, 4, 4, 4]),
        (40, [12, 12, 12, 4]),
        (154, [50, 50, 50, 4]),
        (174, [60, 60, 50, 4]),
        (214, [100, 60, 50, 4]),
    ],
)
def test_classes_are_balanced_as_far_as_they_suffice(count, expected):
    indices = balanced_subset(LABELS, count, jax.random.key(0))
    np.testing.assert_array_equal(np.bincount(LABELS[indices], minlength=4), expected)


@pytest.mark.parametrize("count", range(1, 17))
def test_classes_differ_by_at_most_one(count):
    counts = np.bincount(LABELS[balanced_subset(LABELS, count, jax.random.key(1))], minlength=4)
    assert counts.sum() == count and counts.max() - counts.min() <= 1


def test_indices_are_sorted_unique_int32():
    indices = balanced_subset(LABELS, 150, jax.random.key(0))
    assert indices.dtype == np.int32 and indices.shape == (150,) and (np.diff(indices) > 0).all()


def test_key_draws_examples_and_the_class_of_the_remainder():
    draws = [balanced_subset(LABELS, 40, jax.random.key(seed)).tolist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    classes = {
        int(LABELS[balanced_subset(LABELS, 1, jax.random.key(seed))[0]]) for seed in range(40)
    }
    assert classes == {0, 1, 2, 3}


def test_examples_of_a_class_are_equally_likely():
    labels = np.repeat([0, 1], 10)
    drawn = np.zeros(20)
    for seed in range(200):
        drawn[balanced_subset(labels, 6, jax.random.key(seed))] += 1
    assert drawn.min() > 30 and drawn.max() < 90  # 60 expected, deviation 6.5


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (
            1000,
            "^1000 labelled images asked for, but the training set has 214: choose at most 214$",
        ),
        (215, "choose at most 214"),
        (0, "^0 labelled images asked for, but the training set has 214: choose from 1 to 214$"),
        (-1, "choose from 1 to 214"),
    ],
)
def test_count_out_of_range(count, message):
    with pytest.raises(DataError, match=message):
        balanced_subset(LABELS, count, jax.random.key(0))


@pytest.mark.parametrize(
    ("labels", "got"),
    [
        (np.where(LABELS == 2, -100, LABELS), r"int32 \[214\] with -100"),
        (np.where(LABELS == 2, -1, LABELS), r"int32 \[214\] with -1"),
        (LABELS.astype(np.float32), r"float32 \[214\]"),
        (LABELS[:, None], r"int32 \[214, 1\]"),
        (np.eye(4, dtype=np.int32)[LABELS], r"int32 \[214, 4\]"),
        (LABELS == 1, r"bool \[214\]"),
        (LABELS.astype(str), r"<U11 \[214\]"),
    ],
)
def test_labels_that_are_no_classes(labels, got):
    message = rf"^labels must be integers from 0, \[N\], got {got}: pass one class per example$"
    with pytest.raises(DataError, match=message):
        balanced_subset(labels, 10, jax.random.key(0))


def test_labels_may_be_a_list_or_an_array_of_jax():
    expected = balanced_subset(LABELS, 10, jax.random.key(0))
    for labels in (LABELS.tolist(), jax.numpy.asarray(LABELS), LABELS.astype(np.uint8)):
        np.testing.assert_array_equal(balanced_subset(labels, 10, jax.random.key(0)), expected)


def test_fewer_labels_than_classes_are_said():
    with pytest.warns(UserWarning, match="3 labels are fewer than the 4 classes"):
        few_labels({"inputs": LABELS, "labels": LABELS}, 3)
    few_labels({"inputs": LABELS, "labels": LABELS}, 4)
