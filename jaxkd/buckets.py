"""How wide a batch of sentences has to be.

Tokens are integers of which 0 is padding, on the right. Each width is a shape of its own, and compiled once.
"""

import functools
from collections.abc import Iterator, Sequence

import numpy as np
from jax.typing import ArrayLike


def token_lengths(tokens: ArrayLike) -> np.ndarray:
    """How many places of the last axis each example needs.

    Args:
        tokens: `[N, ..., S]`, integers; 0 is padding.

    Returns:
        `[N]`, int64: the place of the last token that is not 0, counted from 1; the largest over other axes.

    Raises:
        ValueError: If there is no axis beside the examples'.
        TypeError: If the tokens are not integers.

    Example:
        >>> import numpy as np
        >>> token_lengths(np.array([[5, 7, 0, 0], [5, 7, 9, 0]])).tolist()
        [2, 3]
    """
    tokens = np.asarray(tokens)
    if not np.issubdtype(tokens.dtype, np.integer):
        raise TypeError(f"tokens must be integers, of which 0 is padding, got {tokens.dtype}")
    if tokens.ndim < 2:
        raise ValueError(f"tokens must be [N, ..., S], got the shape {tokens.shape}")
    places = (tokens != 0) * np.arange(1, tokens.shape[-1] + 1)
    return places.reshape(len(tokens), -1).max(1, initial=0)


def bucket_widths(tokens: ArrayLike, *, count: int, multiple: int = 8) -> tuple[int, ...]:
    """Widths to which batches are cut, chosen so that examples of these lengths are padded least.

    Args:
        tokens: `[N, ..., S]`, as for `token_lengths`.
        count: How many widths at most; each is compiled.
        multiple: What all but the last are rounded up to.

    Returns:
        Widths in rising order; the last is S.

    Raises:
        ValueError: If `count` or `multiple` is not positive, or there is no example.

    Example:
        >>> import numpy as np
        >>> lengths = np.array([3, 7, 7, 8, 15, 20, 40])
        >>> bucket_widths((np.arange(40) < lengths[:, None]).astype(np.int32), count=3)
        (8, 24, 40)
    """
    lengths, longest = token_lengths(tokens), np.shape(tokens)[-1]
    if count < 1 or multiple < 1 or not len(lengths):
        raise ValueError(f"widths need examples, count >= 1 and multiple >= 1: {np.shape(tokens)}, {count}, {multiple}")
    rounded = np.minimum(-(-np.maximum(lengths, 1) // multiple) * multiple, longest)
    widths = np.unique([*rounded, longest]).tolist()
    needed = np.searchsorted(np.sort(rounded), widths, side="right").tolist()  # how many examples each width holds

    @functools.cache
    def least(last: int, count: int) -> tuple[int, tuple[int, ...]]:
        """Tokens of all examples that a width holds, with padding, and the widths that make it so few."""
        ways: list[tuple[int, tuple[int, ...]]] = [(widths[last] * needed[last], (widths[last],))]
        for before in range(last if count > 1 else 0):
            tokens, narrower = least(before, count - 1)
            ways.append((tokens + widths[last] * (needed[last] - needed[before]), (*narrower, widths[last])))
        return min(ways)

    return least(len(widths) - 1, count)[1]


def by_length(inputs: np.ndarray, size: int, widths: Sequence[int] | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Goes through inputs in batches, those of tokens by their length and cut to what they need.

    Args:
        inputs: `[N, ...]`.
        size: Of a batch; the last one may be smaller.
        widths: In rising order, for tokens `[N, ..., S]`; `None`: inputs of other kinds, as they come.

    Yields:
        The rows of a batch, and the batch.

    Example:
        >>> import numpy as np
        >>> for rows, batch in by_length(np.array([[5, 7, 9, 0], [5, 0, 0, 0], [5, 7, 0, 0]]), 2, (2, 4)):
        ...     print(rows, batch.shape)
        [1 2] (2, 2)
        [0] (1, 4)
    """
    lengths = None if widths is None else token_lengths(inputs)
    order = np.arange(len(inputs)) if lengths is None else np.argsort(lengths, kind="stable")
    for start in range(0, len(inputs), size):
        rows = order[start : start + size]
        batch = inputs[rows]
        if widths is not None and lengths is not None:
            batch = batch[..., : narrowest(widths, lengths[rows].max())]
        yield rows, batch


def narrowest(widths: Sequence[int], length: int) -> int:
    """The least of the widths, in rising order, that holds a length; the last one if none does."""
    return next((width for width in widths if width >= length), widths[-1])
