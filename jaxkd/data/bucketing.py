"""Batches of texts of similar length, cut to a few bucket lengths.

Tokens are integers, padded with 0 on the right. Each bucket length is a shape of its own, which is
compiled once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from jaxkd.data.errors import warn


def check_one_array(inputs: Any) -> None:
    """Raises `ValueError` if inputs are a dict of arrays, which have no one length."""
    if isinstance(inputs, Mapping):
        raise ValueError(
            "buckets cut one array of tokens, but the inputs are a dict of arrays: leave the "
            "buckets out, or pass the tokens alone"
        )


def warn_of_padding(tokens: np.ndarray) -> None:
    """Warns if most examples seem to be padded on the left, or with another token than 0.

    Args:
        tokens: `[N, ..., S]`, integers.
    """
    if tokens.ndim < 2 or tokens.shape[-1] < 2 or not tokens.size:
        return
    rows = tokens.reshape(-1, tokens.shape[-1])
    # One row that ends in padding is enough, since the longest text may have none.
    if (rows[:, -1] == 0).any():
        return
    values, counts = np.unique(rows[rows[:, -1] == rows[:, -2], -1], return_counts=True)
    if len(counts) and counts.max() > len(rows) / 2:
        warn(
            f"most examples end in several tokens {values[counts.argmax()]}, read as text: "
            "pad with 0 if they are padding"
        )
    elif (rows[:, 0] == 0).mean() > 0.5:
        warn("most examples begin with 0, as padded on the left: pad them on the right")


def token_lengths(tokens: ArrayLike) -> np.ndarray:
    """Returns the length of each example without its padding.

    Args:
        tokens: `[N, ..., S]`, integers. 0 is padding.

    Returns:
        `[N]`, int64. The position of the last nonzero token, counted from 1, and the maximum over
        the axes in between.

    Raises:
        ValueError: If the tokens are a dict, or have no axis besides that of the examples.
        ValueError: If a token is negative, such as -100, which others use for padding.
        TypeError: If the tokens are not integers.

    Example:
        >>> import numpy as np
        >>> token_lengths(np.array([[5, 7, 0, 0], [5, 7, 9, 0]])).tolist()
        [2, 3]
    """
    check_one_array(tokens)
    tokens = np.asarray(tokens)
    if not np.issubdtype(tokens.dtype, np.integer):
        raise TypeError(f"tokens must be integers, with 0 as padding, got {tokens.dtype}")
    if tokens.ndim < 2:
        raise ValueError(f"tokens must have the shape [N, ..., S], got {tokens.shape}")
    if tokens.size and tokens.min() < 0:
        raise ValueError(f"tokens must be at least 0, which is padding, got {tokens.min()}")
    positions = (tokens != 0) * np.arange(1, tokens.shape[-1] + 1)
    return positions.max(tuple(range(1, tokens.ndim)), initial=0)


@dataclasses.dataclass(frozen=True)
class LengthBuckets:
    """The lengths to which batches of tokens are cut.

    Attributes:
        lengths: The bucket lengths in rising order. The last one holds every example.
        predict_batch_size: Number of examples in a batch of predictions. It is small because the
            attention maps of hundreds of texts would not fit a processor's caches.
    """

    lengths: tuple[int, ...]
    predict_batch_size: int = 64

    def __post_init__(self) -> None:
        """Raises `ValueError` if the lengths are not positive and in rising order."""
        lengths = (0, *self.lengths)
        if len(lengths) == 1 or any(a >= b for a, b in zip(lengths, lengths[1:], strict=False)):
            raise ValueError(
                f"bucket lengths must be positive and in rising order, got {self.lengths}"
            )

    @classmethod
    def fit(cls, tokens: ArrayLike, *, count: int, multiple: int = 8) -> LengthBuckets:
        """Chooses the bucket lengths that need the least padding.

        Args:
            tokens: `[N, ..., S]`, as for `token_lengths`, of all splits that meet the buckets.
            count: Largest number of buckets. Each is compiled.
            multiple: All lengths but the last are rounded up to a multiple of this.

        Returns:
            The buckets. The last length is S. A warning says if most examples seem to be padded on
            the left, or with another token than 0.

        Raises:
            ValueError: If `count` or `multiple` is not positive, or there is no example.

        Example:
            >>> import numpy as np
            >>> lengths = np.array([3, 7, 7, 8, 15, 20, 40])
            >>> tokens = (np.arange(40) < lengths[:, None]).astype(np.int32)
            >>> LengthBuckets.fit(tokens, count=3).lengths
            (8, 24, 40)
        """
        needed = token_lengths(tokens)
        warn_of_padding(np.asarray(tokens))
        longest = np.shape(tokens)[-1]
        if count < 1 or multiple < 1 or not len(needed):
            raise ValueError(
                "buckets need at least one example, count >= 1 and multiple >= 1, got tokens of "
                f"shape {np.shape(tokens)}, count={count}, multiple={multiple}"
            )
        # A text of padding alone has length 0, but a bucket has at least one token.
        rounded = np.minimum(-(-np.maximum(needed, 1) // multiple) * multiple, longest)
        candidates = np.unique([*rounded, longest]).tolist()
        # Number of examples that fit into each candidate length.
        num_fitting = np.searchsorted(np.sort(rounded), candidates, side="right").tolist()

        # Dynamic programming over the last bucket and the number of buckets up to it.
        @functools.cache
        def cheapest(last: int, count: int) -> tuple[int, tuple[int, ...]]:
            """Returns the least number of tokens, padding included, and its bucket lengths."""
            alone = (candidates[last] * num_fitting[last], (candidates[last],))
            options: list[tuple[int, tuple[int, ...]]] = [alone]
            for previous in range(last if count > 1 else 0):
                tokens, shorter = cheapest(previous, count - 1)
                added = candidates[last] * (num_fitting[last] - num_fitting[previous])
                options.append((tokens + added, (*shorter, candidates[last])))
            return min(options)

        return cls(cheapest(len(candidates) - 1, count)[1])

    def choose(self, length: int) -> int:
        """Returns the shortest bucket length that holds a length.

        Raises:
            ValueError: If none does, so that tokens would be cut off.
        """
        if length > self.lengths[-1]:
            raise ValueError(
                f"texts have up to {length} tokens, but the last bucket has {self.lengths[-1]}: "
                "fit the buckets on all splits, padded to one length"
            )
        return next(bucket for bucket in self.lengths if bucket >= length)

    def batches(
        self, tokens: np.ndarray, batch_size: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Iterates over all examples in batches, sorted by length and cut to their bucket.

        Args:
            tokens: `[N, ..., S]`, as for `token_lengths`.
            batch_size: Number of examples in a batch. The last batch may be smaller.

        Yields:
            The row indices of a batch, and the batch.

        Raises:
            ValueError: At the first batch, if an example is longer than the last bucket.

        Example:
            >>> import numpy as np
            >>> tokens = np.array([[5, 7, 9, 0], [5, 0, 0, 0], [5, 7, 0, 0]])
            >>> for rows, batch in LengthBuckets((2, 4)).batches(tokens, 2):
            ...     print(rows, batch.shape)
            [1 2] (2, 2)
            [0] (1, 4)
        """
        lengths = token_lengths(tokens)
        self.choose(lengths.max(initial=0))
        # Stable, so that the batches, and with them the rounding, are the same on every machine.
        order = np.argsort(lengths, kind="stable")
        for start in range(0, len(tokens), batch_size):
            rows = order[start : start + batch_size]
            yield rows, tokens[rows][..., : self.choose(lengths[rows].max())]
