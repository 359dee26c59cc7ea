"""How wide a batch of sentences has to be.

Tokens are integers of which 0 is padding, on the right. Each width is a shape of its own, and compiled once.
"""

from collections.abc import Sequence

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
    """Widths to which batches are cut, each needed by as many examples.

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
        >>> bucket_widths(np.tril(np.ones((40, 40), np.int32)), count=4)
        (16, 24, 32, 40)
    """
    lengths, longest = token_lengths(tokens), np.shape(tokens)[-1]
    if count < 1 or multiple < 1 or not len(lengths):
        raise ValueError(f"widths need examples, count >= 1 and multiple >= 1: {np.shape(tokens)}, {count}, {multiple}")
    enough = np.quantile(lengths, np.arange(1, count) / count, method="higher")
    rounded = {min(-(-int(width) // multiple) * multiple, longest) for width in enough if width}
    return tuple(sorted(rounded | {longest}))


def narrowest(widths: Sequence[int], length: int) -> int:
    """The least of the widths, in rising order, that holds a length; the last one if none does."""
    return next((width for width in widths if width >= length), widths[-1])
