"""Which examples a step sees, and how they get to the device."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import Array

from jaxkd.train import Purpose

POOL = 32
"""Batches whose sentences are drawn together and then sorted by length."""


def make_order(key: Array, examples: int, batch_size: int) -> Callable[[int], np.ndarray]:
    """Makes the function that says which examples a step sees.

    The epochs are permutations, one after another; a batch may end one and begin the next, so that none is cut short
    and all are of one size. What a step sees depends on its number alone, not on the steps before it.

    Args:
        key: The training's key.
        examples: How many there are.
        batch_size: How many a step sees.

    Returns:
        `step -> indices` int [batch_size].

    Example:
        >>> import jax
        >>> select = make_order(jax.random.key(0), examples=4, batch_size=2)
        >>> sorted(select(0).tolist() + select(1).tolist())
        [0, 1, 2, 3]
    """

    @functools.lru_cache(maxsize=2)
    def epoch(number: int) -> np.ndarray:
        draw = jax.random.fold_in(jax.random.fold_in(key, Purpose.ORDER), number)
        return np.asarray(jax.random.permutation(draw, examples))

    def select(step: int) -> np.ndarray:
        places = np.arange(step * batch_size, (step + 1) * batch_size)
        epochs = places // examples
        return np.concatenate([epoch(n)[places[epochs == n] % examples] for n in np.unique(epochs).tolist()])

    return select


def make_bucketed_order(key: Array, lengths: np.ndarray, batch_size: int) -> Callable[[int], np.ndarray]:
    """Makes the function that says which examples a step sees, where those of like length are to be together.

    The epochs are those of `make_order`, one after another. Of `POOL` batches at a time, or of an epoch where that is
    shorter, the examples are sorted by length, and the batches come in an order drawn anew. What a step sees depends on
    its number alone.

    Args:
        key: The training's key.
        lengths: `[N]`, of each example.
        batch_size: How many a step sees.

    Returns:
        `step -> indices` int [batch_size].

    Example:
        >>> import jax, numpy as np
        >>> select = make_bucketed_order(jax.random.key(0), np.array([9, 1, 8, 2]), batch_size=2)
        >>> sorted(sorted(select(step).tolist()) for step in (0, 1))
        [[0, 2], [1, 3]]
    """
    draw = make_order(key, len(lengths), batch_size)
    size = max(1, min(POOL, len(lengths) // batch_size))

    @functools.lru_cache(maxsize=2)
    def pool(number: int) -> np.ndarray:
        drawn = np.concatenate([draw(step) for step in range(number * size, (number + 1) * size)])
        batches = drawn[np.argsort(lengths[drawn], kind="stable")].reshape(size, batch_size)
        shuffle = jax.random.fold_in(jax.random.fold_in(key, Purpose.BUCKET), number)
        return batches[np.asarray(jax.random.permutation(shuffle, size))]

    return lambda step: pool(step // size)[step % size]


def make_placer(put: Callable[[Any], Array]) -> Callable[..., Array]:
    """Makes a function that puts an array on the devices once, however often it is asked to.

    Args:
        put: Puts an array on the devices.

    Returns:
        `(array, width=None) -> array`, with a width the last axis cut to it. It keeps what it has placed.
    """
    placed: dict[tuple[int, int | None], tuple[Any, Array]] = {}

    def place(array: Any, width: int | None = None) -> Array:
        if (id(array), width) not in placed:
            placed[id(array), width] = array, put(array if width is None else array[..., :width])
        return placed[id(array), width][1]

    return place
