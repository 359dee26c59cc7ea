"""What every source loads: images and labels in three splits, checked alike and cut alike."""

from typing import NamedTuple

import jax
import numpy as np

from jaxkd.data.errors import DataError

# Seeds of the cuts. They are part of what a dataset is: changing one changes every result.
_VALIDATION_SEED = 0
_TEST_SEED = 1


class Split(NamedTuple):
    """Images and their classes.

    Attributes:
        images: uint8 `[N, H, W, C]`, C is 1 or 3.
        labels: int32 `[N]`.
    """

    images: np.ndarray
    labels: np.ndarray


class Dataset(NamedTuple):
    """An image classification set.

    Attributes:
        train: What students and teachers learn from.
        validation: A tenth of the source's training images, for choosing.
        test: What results are reported on, never chosen by.
        class_names: Name of each class, by label.
    """

    train: Split
    validation: Split
    test: Split
    class_names: tuple[str, ...]


def make_dataset(name: str, train: Split, test: Split, class_names: tuple[str, ...]) -> Dataset:
    """Checks what a source read and cuts a tenth of its training images off for validation.

    Args:
        name: The dataset's name, for errors.
        train: All training images; at least two.
        test: Test images.
        class_names: Name of each class, by label.

    Returns:
        The dataset. The cut is the same each time, and within a split the source's order is kept.

    Raises:
        DataError: If a split is empty, its images are not uint8 `[N, H, W, 1 or 3]`, or a label has no class.
    """
    for split_name, split, least in (("train", train, 2), ("test", test, 1)):
        _check_size(f"{name}: {split_name}", split, least)
        _check_images(f"{name}: {split_name}", split.images)
        _check_labels(f"{name}: {split_name}", split.labels, len(class_names))
    train, validation = cut(train, max(1, len(train.labels) // 10), key=fixed_key(_VALIDATION_SEED))
    return Dataset(train, validation, test, class_names)


def cut(split: Split, count: int, *, key: jax.Array) -> tuple[Split, Split]:
    """Cuts `count` examples, drawn by `key`, off a split.

    Args:
        split: What to cut.
        count: How many examples the second part gets.
        key: Decides which.

    Returns:
        The rest and the part cut off, both in the order of `split`.
    """
    rest, part = cut_rows(len(split.labels), count, key=key)
    return Split(split.images[rest], split.labels[rest]), Split(split.images[part], split.labels[part])


def cut_rows(total: int, count: int, *, key: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """Cuts `count` of the numbers below `total`, drawn by `key`, off the others; both in rising order."""
    order = np.asarray(jax.random.permutation(key, total))
    return np.sort(order[count:]), np.sort(order[:count])


def cut_test(train: Split) -> tuple[Split, Split]:
    """Cuts a fifth off a training set that came without anything to test on."""
    return cut(train, len(train.labels) // 5, key=fixed_key(_TEST_SEED))


def fixed_key(seed: int) -> jax.Array:
    """A key that is the same whatever the user's settings."""
    # Named, because a user may have made another generator the default.
    return jax.random.key(seed, impl="threefry2x32")


def _check_size(where: str, split: Split, least: int) -> None:
    count = len(split.images)
    if count != len(split.labels):
        raise DataError(f"{where} has {count} images but {len(split.labels)} labels")
    if count < least:
        raise DataError(f"{where} has {count} images, at least {least} are needed: choose another dataset")


def _check_images(where: str, images: np.ndarray) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise DataError(
            f"{where} has images {images.dtype} {list(images.shape)}, expected uint8 [N, H, W, 1 or 3]: "
            "convert them to grey or RGB of 8 bits"
        )


def _check_labels(where: str, labels: np.ndarray, num_classes: int) -> None:
    bad = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if bad.size:
        raise DataError(
            f"{where} has label {labels[bad[0]]} at index {bad[0]}, outside 0..{num_classes - 1}: "
            "choose a dataset whose splits are all labelled"
        )
