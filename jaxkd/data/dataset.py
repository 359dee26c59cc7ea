"""Images and labels in three splits, with the checks and the cuts that all sources share."""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxkd._images import take_some
from jaxkd._messages import list_some
from jaxkd.data.errors import DataError, warn
from jaxkd.data.records import is_streamed, select_rows

# Seeds of the held-out sets. They are part of a dataset: another seed changes every result.
_VALIDATION_SEED = 0
_TEST_SEED = 1

MIN_EXAMPLES = 20
"""Of fewer examples than this it is not said that some are equal."""
MAX_EQUAL_SHARE = 0.01
"""Largest share of equal examples of which nothing is said: public datasets have a few."""

MAX_GREY_DIFFERENCE = 0.9
"""Largest difference of the shares of grey images of two sets of which nothing is said."""


class Split(NamedTuple):
    """Images and their classes.

    Attributes:
        images: uint8 `[N, H, W, C]`, C is 1 or 3: an array, or a column of `data.Records` that is
            read by its rows.
        labels: int32 `[N]`.
    """

    images: Any
    labels: np.ndarray

    @property
    def examples(self) -> dict[str, Any]:
        """The images and labels as a plan takes them: `{"inputs": ..., "labels": ...}`."""
        return {"inputs": self.images, "labels": self.labels}


class Dataset(NamedTuple):
    """An image classification dataset.

    Attributes:
        train: The examples that teachers and students are trained on.
        validation: The examples for choosing between models.
        test: The examples that results are reported on; nothing is chosen by them.
        class_names: Name of each class, by label.
    """

    train: Split
    validation: Split
    test: Split
    class_names: tuple[str, ...]


def make_dataset(
    name: str,
    train: Split,
    test: Split,
    class_names: tuple[str, ...],
    validation: Split | None = None,
) -> Dataset:
    """Checks the splits of a source, and holds out validation images if it has none.

    Args:
        name: The dataset's name, for error messages.
        train: All training images; at least two.
        test: Test images.
        class_names: Name of each class, by label.
        validation: Validation images. By default a tenth of the training images is held out.

    Returns:
        The dataset. Equal calls hold out the same images, and each split keeps the source's order.
        Each class keeps a training image. A warning names the classes of which no image is held
        out, or says that test images are training images or that equal images are in two classes,
        which is not looked for in images that are streamed.

    Raises:
        DataError: If a split is empty, its images are not uint8 `[N, H, W, 1 or 3]`, or a label has
            no class; or if there are only classes of one image to hold images out from.
    """
    splits = [("train", train, 2), ("test", test, 1)]
    if validation is not None:
        splits.append(("validation", validation, 1))
    for split_name, split, minimum in splits:
        _check_size(f"{name}: {split_name}", split, minimum)
        _check_images(f"{name}: {split_name}", split.images)
        _check_labels(f"{name}: {split_name}", split.labels, len(class_names))
    if validation is None:
        count = max(1, len(train.labels) // 10)
        labels = train.labels
        train, validation = hold_out(train, count, key=fixed_key(_VALIDATION_SEED))
        warn_of_lacking_classes(name, "validation", validation.labels, labels, class_names)
        given = {"test": test.labels}
    else:
        given = {"validation": validation.labels, "test": test.labels}
    warn_of_missing_classes(name, given, train.labels, class_names)
    if is_streamed(train._asdict()):
        return Dataset(train, validation, test, class_names)
    _warn_of_colours(name, train.images, test.images)
    train_hashes, test_hashes = _hash_images(train.images), _hash_images(test.images)
    if "validation" in given:
        validation_hashes = _hash_images(validation.images)
        warn_of_shared_validation(name, "images", train_hashes, validation_hashes, test_hashes)
    warn_of_equal_examples(name, "images", train_hashes, train.labels, test_hashes)
    return Dataset(train, validation, test, class_names)


def hold_out(split: Split, count: int, *, key: jax.Array) -> tuple[Split, Split]:
    """Holds out `count` examples of a split, drawn by `key`.

    Args:
        split: The examples to draw from.
        count: Number of examples to hold out.
        key: A key.

    Returns:
        The remaining and the held-out examples, both in the order of `split`. No class loses its
        last example: others are held out in its place, or fewer than `count` if there are none.

    Raises:
        DataError: If each class has only one example.
    """
    remaining, held_out = hold_out_indices(len(split.labels), count, key=key, labels=split.labels)
    return (
        Split(select_rows(split.images, remaining), split.labels[remaining]),
        Split(select_rows(split.images, held_out), split.labels[held_out]),
    )


def hold_out_indices(
    total: int, count: int, *, key: jax.Array, labels: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Draws `count` of `total` indices.

    Args:
        total: Number of examples.
        count: Number of indices to draw.
        key: A key.
        labels: `[total]`, the class of each example, of which none may lose its last one; `None`
            for examples without classes.

    Returns:
        The remaining and the drawn indices, both sorted.

    Raises:
        DataError: If each class has only one example.
    """
    order = np.asarray(jax.random.permutation(key, total))
    held_out, remaining = order[:count], order[count:]
    if labels is not None and len(lost := np.setdiff1d(labels, labels[remaining])):
        held_out, remaining = _keep_classes(held_out, remaining, labels, set(lost.tolist()))
    return np.sort(remaining), np.sort(held_out)


def _keep_classes(
    held_out: np.ndarray, remaining: np.ndarray, labels: np.ndarray, lost: set[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Exchanges the last drawn example of each lost class for the next of a class with several.

    Every other example stays where it was drawn, so that the split changes as little as possible.
    """
    returned = []
    for index in held_out[::-1].tolist():
        if (label := int(labels[index])) in lost:
            lost.discard(label)
            returned.append(index)
    counts = Counter(labels[remaining].tolist())
    taken = []
    for index in remaining.tolist():
        if len(taken) < len(returned) and counts[int(labels[index])] > 1:
            counts[int(labels[index])] -= 1
            taken.append(index)
    held_out = np.array([*np.setdiff1d(held_out, returned), *taken], np.int64)
    if not len(held_out):
        raise DataError(
            "each class has only one training example, so none can be held out: add examples, "
            "or a validation and a test set"
        )
    return held_out, np.array([*np.setdiff1d(remaining, taken), *returned], np.int64)


def warn_of_lacking_classes(
    name: str,
    split: str,
    labels: np.ndarray,
    train_labels: np.ndarray,
    class_names: Sequence[str],
) -> None:
    """Says which classes of the training examples have none in what was held out from them.

    Nothing is said of fewer than 20 training examples, of which one is held out.

    Args:
        name: The dataset's name.
        split: The name of what was held out.
        labels: Its labels.
        train_labels: The labels of the training examples before.
        class_names: Name of each class, by label.
    """
    lacking = sorted(set(train_labels.tolist()) - set(labels.tolist()))
    if lacking and len(train_labels) // 10 > 1:
        shown = list_some([class_names[label] for label in lacking], limit=30)
        warn(
            f"{name}: {len(lacking):,} of {len(class_names):,} classes are not in the {split} set, "
            f"which was held out from the training set: {shown}"
        )


def warn_of_missing_classes(
    name: str,
    labels_by_split: Mapping[str, np.ndarray],
    train_labels: np.ndarray,
    class_names: Sequence[str],
) -> None:
    """Says which classes of the training examples a given validation or test set has none of.

    One that only the training examples have may be a stray label, and is not measured. Nothing is
    said of sets of fewer than 20 examples.

    Args:
        name: The dataset's name.
        labels_by_split: Labels of the validation and test sets that were not held out.
        train_labels: Labels of the training examples.
        class_names: Name of each class, by label.
    """
    for split, labels in labels_by_split.items():
        missing = sorted(set(train_labels.tolist()) - set(labels.tolist()))
        if missing and len(labels) >= MIN_EXAMPLES:
            shown = list_some([class_names[label] for label in missing], limit=30)
            warn(
                f"{name}: {len(missing):,} of {len(class_names):,} classes are in the training "
                f"set, but not in the {split} set: {shown}"
            )


def warn_of_shared_validation(
    name: str,
    kind: str,
    train: Sequence[Hashable],
    validation: Sequence[Hashable],
    test: Sequence[Hashable],
) -> None:
    """Says how many examples of a given validation set are training or test examples.

    The bounds are those of `warn_of_equal_examples`, as for its arguments.
    """
    if len(validation) < MIN_EXAMPLES:
        return
    for other, examples, result in (
        ("training", set(train), "so that its accuracy will be too good"),
        ("test", set(test), "so that the best student is chosen by the test set"),
    ):
        num_shared = sum(example in examples for example in validation)
        if num_shared > MAX_EQUAL_SHARE * len(validation):
            warn(
                f"{name}: {num_shared:,} of {len(validation):,} validation {kind} are also "
                f"{other} {kind}, {result}: remove them from one of the two"
            )


def warn_of_equal_examples(
    name: str,
    kind: str,
    train: Sequence[Hashable],
    train_labels: np.ndarray,
    test: Sequence[Hashable],
) -> None:
    """Says how many test examples are training examples, and how many equal ones differ in class.

    Nothing is said of fewer than 20 examples, or of at most 1 % of them.

    Args:
        name: The dataset's name.
        kind: What the examples are, such as `"texts"`.
        train: The training examples, or hashes of them.
        train_labels: Their labels.
        test: The test examples, or hashes of them.
    """
    labels = train_labels.tolist()
    label_by_example = dict(zip(train, labels, strict=True))
    num_shared = sum(example in label_by_example for example in test)
    if num_shared > MAX_EQUAL_SHARE * len(test) and len(test) >= MIN_EXAMPLES:
        warn(
            f"{name}: {num_shared:,} of {len(test):,} test {kind} are also training {kind}, so "
            "that results will be too good: remove them from the training set"
        )
    in_two_classes = {
        example
        for example, label in zip(train, labels, strict=True)
        if label_by_example[example] != label
    }
    num_unclear = sum(example in in_two_classes for example in train)
    if num_unclear > MAX_EQUAL_SHARE * len(train) and len(train) >= MIN_EXAMPLES:
        warn(
            f"{name}: {num_unclear:,} of {len(train):,} training {kind} are in two classes at "
            "once: leave them in one"
        )


def _warn_of_colours(name: str, train: np.ndarray, test: np.ndarray) -> None:
    """Says if the images of only one of two sets have colours."""
    shares = [_share_of_grey(images) for images in (train, test)]
    if abs(shares[0] - shares[1]) > MAX_GREY_DIFFERENCE:
        grey, coloured = ("training", "test") if shares[0] > shares[1] else ("test", "training")
        warn(
            f"{name}: {max(shares):.0%} of the {grey} images are grey, but {min(shares):.0%} of "
            f"the {coloured} images: is one of the two sets converted?"
        )


def _share_of_grey(images: np.ndarray) -> float:
    """Returns the share of images of three equal channels, among some; 0 for one channel."""
    if images.shape[-1] != 3:
        return 0.0
    some = take_some(images)
    return float(np.mean((some[..., :1] == some).reshape(len(some), -1).all(1)))


def _hash_images(images: np.ndarray) -> list[int]:
    # 64 bits make two equal hashes of different images unlikely, and need no copy of the images.
    return [hash(image.tobytes()) for image in images]


def hold_out_test(train: Split) -> tuple[Split, Split]:
    """Holds out a fifth of a training set that has no test set."""
    return hold_out(train, len(train.labels) // 5, key=fixed_key(_TEST_SEED))


def fixed_key(seed: int) -> jax.Array:
    """Makes a threefry key, which draws the same numbers under any configuration of JAX."""
    # Without `impl`, the key would follow the user's jax_default_prng_impl.
    return jax.random.key(seed, impl="threefry2x32")


def _check_size(split_name: str, split: Split, minimum: int) -> None:
    count = len(split.images)
    if count != len(split.labels):
        raise DataError(f"{split_name} has {count} images but {len(split.labels)} labels")
    if count < minimum:
        raise DataError(
            f"{split_name} has {count} images, at least {minimum} are needed: "
            "choose another dataset"
        )


def _check_images(split_name: str, images: np.ndarray) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise DataError(
            f"{split_name} has images {images.dtype} {list(images.shape)}, "
            "expected uint8 [N, H, W, 1 or 3]: convert them to 8-bit grey or RGB"
        )


def _check_labels(split_name: str, labels: np.ndarray, num_classes: int) -> None:
    # TFDS gives the label -1 to the examples of an unlabelled test split.
    invalid = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if invalid.size:
        index = invalid[0]
        raise DataError(
            f"{split_name} has label {labels[index]} at index {index}, outside "
            f"0..{num_classes - 1}: choose a dataset whose splits are all labelled"
        )
