"""A small labelled subset of a large set."""

import jax
import numpy as np

from jaxkd.data.errors import DataError


def balanced_subset(labels: np.ndarray, count: int, key: jax.Array) -> np.ndarray:
    """Draws `count` examples, the same number of each class as far as the classes reach.

    Args:
        labels: Integers `[N]`.
        count: How many examples, 1 to N.
        key: Decides which, and which classes get one more where `count` is not divisible.

    Returns:
        Their indices, int32 `[count]`, ascending. Classes differ by at most one, but for those that are used up.

    Raises:
        DataError: If `count` is below 1 or above N.

    Example:
        >>> import jax, numpy as np
        >>> labels = np.array([0, 0, 0, 0, 1, 1, 1, 2])
        >>> np.bincount(labels[balanced_subset(labels, 5, jax.random.key(0))]).tolist()
        [2, 2, 1]
    """
    if not 1 <= count <= len(labels):
        bounds = f"at most {len(labels)}" if count > 0 else f"from 1 to {len(labels)}"
        raise DataError(f"{count} labelled images asked for, but the training set has {len(labels)}: choose {bounds}")
    shuffled = np.asarray(jax.random.permutation(key, len(labels)))
    # Every class deals out its examples in rounds; the first `count` dealt are taken.
    rounds = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        members = labels[shuffled] == label
        rounds[members] = np.arange(members.sum())
    dealt = shuffled[np.argsort(rounds, kind="stable")]
    return np.sort(dealt[:count]).astype(np.int32)
