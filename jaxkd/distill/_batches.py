"""The order of examples, and the arrays that are on the devices."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import Array

from jaxkd.data.bucketing import LengthBuckets, token_lengths
from jaxkd.data.sequential import find_sequential
from jaxkd.distill.step import Purpose

BATCHES_PER_POOL = 32
"""Number of batches that are drawn together and then sorted by length."""

SelectFn = Callable[[int], np.ndarray]
"""`step -> indices`, int [batch_size]: the examples of a step's batch."""


def make_order(key: Array, num_examples: int, batch_size: int) -> SelectFn:
    """Makes the function that selects the examples of a step.

    The epochs are permutations, one after another. A batch may span two epochs, so that no epoch is
    cut short and all batches have one size. The batch depends on the step alone, not on the steps
    before it.

    Args:
        key: The PRNG key of the training.
        num_examples: Number of examples.
        batch_size: Number of examples in a batch.

    Returns:
        `step -> indices`, int [batch_size].

    Example:
        >>> import jax
        >>> select = make_order(jax.random.key(0), num_examples=4, batch_size=2)
        >>> sorted(select(0).tolist() + select(1).tolist())
        [0, 1, 2, 3]
    """

    # Two entries, because a batch may span two epochs.
    @functools.lru_cache(maxsize=2)
    def permute(epoch: int) -> np.ndarray:
        epoch_key = jax.random.fold_in(jax.random.fold_in(key, Purpose.ORDER), epoch)
        return np.asarray(jax.random.permutation(epoch_key, num_examples))

    def select(step: int) -> np.ndarray:
        positions = np.arange(step * batch_size, (step + 1) * batch_size)
        epochs = positions // num_examples
        parts = []
        # A batch that is larger than the data set spans several epochs.
        for epoch in np.unique(epochs).tolist():
            parts.append(permute(epoch)[positions[epochs == epoch] % num_examples])
        return np.concatenate(parts)

    return select


def make_sequential_order(batch_size: int) -> SelectFn:
    """Makes the function that selects the examples of a step in the order of their source.

    Args:
        batch_size: Number of examples in a batch.

    Returns:
        `step -> rows`, int [batch_size]. They go on over the end of an epoch.
    """
    return lambda step: np.arange(step * batch_size, (step + 1) * batch_size)


def make_bucketed_order(
    key: Array, lengths: np.ndarray, batch_size: int, *, keep_epochs: bool = False
) -> SelectFn:
    """Makes the function that selects the examples of a step, with similar lengths in a batch.

    The epochs are those of `make_order`. Every `BATCHES_PER_POOL` batches, or every epoch if it is
    shorter, the examples are sorted by length and the order of the batches is drawn. The batch
    depends on the step alone.

    Args:
        key: The PRNG key of the training.
        lengths: `[N]`, the length of each example.
        batch_size: Number of examples in a batch.
        keep_epochs: Whether examples keep their epoch, by which the step counts their views. A
            pool that spans two epochs would otherwise mix them.

    Returns:
        `step -> indices`, int [batch_size].

    Example:
        >>> import jax, numpy as np
        >>> select = make_bucketed_order(jax.random.key(0), np.array([9, 1, 8, 2]), batch_size=2)
        >>> sorted(sorted(select(step).tolist()) for step in (0, 1))
        [[0, 2], [1, 3]]
    """
    select_unsorted = make_order(key, len(lengths), batch_size)
    # A pool of more than an epoch would hold an example twice in a batch.
    pool_size = max(1, min(BATCHES_PER_POOL, len(lengths) // batch_size))

    @functools.lru_cache(maxsize=2)
    def sort_pool(pool: int) -> np.ndarray:
        steps = range(pool * pool_size, (pool + 1) * pool_size)
        indices = np.concatenate([select_unsorted(step) for step in steps])
        epochs = np.zeros_like(indices)
        if keep_epochs:
            epochs = (pool * len(indices) + np.arange(len(indices))) // len(lengths)
        # A stable sort keeps equal lengths in the drawn order, and the bits equal everywhere.
        by_length = indices[np.lexsort((lengths[indices], epochs))]
        batches = by_length.reshape(pool_size, batch_size)
        shuffle_key = jax.random.fold_in(jax.random.fold_in(key, Purpose.BUCKET), pool)
        # Without a new order, every pool would go from short to long examples.
        order = np.asarray(jax.random.permutation(shuffle_key, pool_size))
        # By the sum of the epochs: a batch that spans two epochs stays between them.
        batch_epochs = epochs.reshape(pool_size, batch_size).sum(axis=1)
        return batches[order[np.argsort(batch_epochs[order], kind="stable")]]

    return lambda step: sort_pool(step // pool_size)[step % pool_size]


def count_examples(inputs: Any) -> int:
    """Returns the number of examples of an array, or of a dict of arrays."""
    return len(jax.tree.leaves(inputs)[0])


class BatchSelector:
    """Selects the batches of a group of students that train together."""

    def __init__(
        self,
        keys: list[Array],
        inputs: list[Any],
        batch_size: int,
        buckets: LengthBuckets | None,
        *,
        has_views: bool = False,
    ) -> None:
        """Makes the order of examples of each student.

        Args:
            keys: The PRNG key of each student.
            inputs: The inputs of each student, `[N, ...]`, an array or a dict of arrays.
            batch_size: Number of examples in a batch.
            buckets: The lengths to which batches of tokens are cut; `None` for other inputs.
            has_views: Whether the examples have views, which the epochs show in turn.

        Raises:
            ValueError: If there are buckets, but the inputs are dicts.
        """
        self._buckets = buckets
        if buckets is None:
            self._lengths = []
            self._select_fns = [
                make_sequential_order(batch_size)
                if find_sequential(arrays) is not None
                else make_order(key, count_examples(arrays), batch_size)
                for key, arrays in zip(keys, inputs, strict=True)
            ]
        else:
            self._lengths = [token_lengths(array) for array in inputs]
            self._select_fns = [
                make_bucketed_order(key, lengths, batch_size, keep_epochs=has_views)
                for key, lengths in zip(keys, self._lengths, strict=True)
            ]

    def choose_length(self, student: int, rows: np.ndarray) -> int | None:
        """Returns the bucket length of a batch of some examples of a student."""
        if self._buckets is None:
            return None
        return self._buckets.choose(int(self._lengths[student][rows].max()))

    def select(self, step: int) -> tuple[int | None, np.ndarray]:
        """Returns the bucket length of a step's batches, and their indices `[P, B]`.

        All students of a group share a bucket: the shortest that holds the longest example.
        """
        indices = np.stack([select(step) for select in self._select_fns])
        if self._buckets is None:
            return None, indices
        longest = 0
        for lengths, rows in zip(self._lengths, indices, strict=True):
            longest = max(longest, int(lengths[rows].max()))
        return self._buckets.choose(longest), indices


class DeviceArrays:
    """Keeps arrays on the devices, so that trainings which share an array put it there once."""

    def __init__(self, put: Callable[[Any], Array]) -> None:
        """Makes an empty collection; `put` puts an array onto the devices."""
        self._put = put
        # The host arrays are kept as well: an id is unique only while its object is alive.
        self._arrays: dict[tuple[int, int | None], tuple[Any, Array]] = {}

    def get(self, array: Any, length: int | None = None) -> Array:
        """Returns an array on the devices, with its last axis cut to `length` if that is given."""
        key = (id(array), length)
        if key not in self._arrays:
            cut = array if length is None else array[..., :length]
            self._arrays[key] = array, self._put(cut)
        return self._arrays[key][1]
