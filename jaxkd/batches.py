"""Which examples a step sees, and how they get to the device."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import Array

from jaxkd.train import Purpose


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


def make_placer(put: Callable[[Any], Array]) -> Callable[[Any], Array]:
    """Makes a function that puts an array on the devices once, however often it is asked to.

    Args:
        put: Puts an array on the devices.

    Returns:
        The function. It keeps what it has placed.
    """
    placed: dict[int, tuple[Any, Array]] = {}

    def place(array: Any) -> Array:
        if id(array) not in placed:
            placed[id(array)] = (array, put(array))
        return placed[id(array)][1]

    return place
