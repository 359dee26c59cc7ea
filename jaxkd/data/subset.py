"""A small labelled subset of a large dataset."""

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from jaxkd.data.errors import DataError
from jaxkd.data.records import Column, select_rows

DataFn = Callable[[int], dict[str, Any]]
"""`seed -> examples`."""


def balanced_subset(labels: ArrayLike, count: int, key: jax.Array) -> np.ndarray:
    """Draws `count` examples, the same number from each class as far as the classes suffice.

    Args:
        labels: Integers from 0, `[N]`.
        count: Number of examples, 1 to N.
        key: Draws the examples, and the classes that get one more if `count` is not divisible.

    Returns:
        Their indices, int32 `[count]`, ascending. The numbers per class differ by at most one,
        except for classes of which every example is taken.

    Raises:
        DataError: If `count` is below 1 or above N, or the labels are no integers from 0, `[N]`.

    Example:
        >>> import jax, numpy as np
        >>> labels = np.array([0, 0, 0, 0, 1, 1, 1, 2])
        >>> np.bincount(labels[balanced_subset(labels, 5, jax.random.key(0))]).tolist()
        [2, 2, 1]
    """
    labels = np.asarray(labels)
    _check_labels(labels)
    if not 1 <= count <= len(labels):
        bounds = f"at most {len(labels)}" if count > 0 else f"from 1 to {len(labels)}"
        raise DataError(
            f"{count} labelled images asked for, but the training set has {len(labels)}: "
            f"choose {bounds}"
        )
    shuffled = np.asarray(jax.random.permutation(key, len(labels)))
    # Each class deals one example a round. The first `count` dealt are taken, so a larger subset
    # of the same key contains the smaller one.
    rounds = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        is_member = labels[shuffled] == label
        rounds[is_member] = np.arange(is_member.sum())
    # Stable, so that the shuffled order decides which classes come first within a round.
    dealt = shuffled[np.argsort(rounds, kind="stable")]
    return np.sort(dealt[:count]).astype(np.int32)


def _check_labels(labels: np.ndarray) -> None:
    got = f"{labels.dtype} {list(labels.shape)}"
    is_integer = np.issubdtype(labels.dtype, np.integer)
    # Others mark the examples without a label by -1 or -100, which would be a class here.
    if is_integer and labels.size and labels.min() < 0:
        got += f" with {labels.min()}"
    elif is_integer and labels.ndim == 1:
        return
    raise DataError(f"labels must be integers from 0, [N], got {got}: pass one class per example")


def few_labels(examples: Mapping[str, Any], count: int) -> tuple[DataFn, DataFn]:
    """Keeps the labels of `count` examples, balanced over classes; each seed draws its own.

    Args:
        examples: `inputs` and `labels`, `[N, ...]` and integers from 0, `[N]`.
        count: Number of examples that keep their label.

    Returns:
        Two functions of the seed, as `distill.Stage` takes them for its data. The first returns the
        labelled examples alone. The second returns all of them, with `labelled` true for those; the
        labels of the others are 0.

    Raises:
        DataError: If there are fewer examples.

    Warns:
        UserWarning: If there are fewer labels than classes.

    Example:
        >>> import numpy as np
        >>> from jaxkd import data
        >>> examples = {"inputs": np.zeros((6, 2)), "labels": np.array([0, 0, 0, 1, 1, 1])}
        >>> labelled_only, partly_labelled = data.few_labels(examples, 2)
        >>> labelled_only(0)["labels"].tolist(), int(partly_labelled(0)["labelled"].sum())
        ([0, 1], 2)
    """
    inputs, labels = examples["inputs"], examples["labels"]
    balanced_subset(labels, count, jax.random.key(0))  # fails now for an impossible count
    num_classes = len(np.unique(labels))
    if count < num_classes:
        warnings.warn(
            f"{count} labels are fewer than the {num_classes} classes, of which some get none: "
            "keep more",
            stacklevel=2,
        )

    def draw(seed: int) -> np.ndarray:
        key = jax.random.fold_in(jax.random.key(seed), count)
        return balanced_subset(labels, count, key)

    def select(seed: int) -> Any:
        return select_rows(inputs, draw(seed))

    if isinstance(inputs, Column):
        # A plan asks several times, and each new column would read its sample again.
        select = functools.cache(select)

    def labelled_only(seed: int) -> dict[str, Any]:
        return {"inputs": select(seed), "labels": labels[draw(seed)]}

    def partly_labelled(seed: int) -> dict[str, Any]:
        labelled = np.isin(np.arange(len(labels)), draw(seed))
        # A label that is not kept must not reach the student in any way.
        return {"inputs": inputs, "labels": np.where(labelled, labels, 0), "labelled": labelled}

    return labelled_only, partly_labelled
