"""Which of a student's weights a stage returns: the last, the best, or an average of all."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxkd._messages import list_some, shorten

LARGEST = {"accuracy": True, "loss": False}
"""Whether the best value of a score that every classifier has is the largest."""


class Best(NamedTuple):
    """Returns the weights of a stage's best evaluation, and may end its training early.

    The choice is made on the validation split, whose score is then too good an estimate: compare
    models on a test set.

    Attributes:
        score: Name of a score of the validation split, such as "accuracy", "loss" or one that
            `make_score` returns.
        largest: Whether the best value is the largest. `None` knows it of "accuracy" and "loss".
        patience: Number of evaluations without a better value after which the training ends. `None`
            takes all steps.

    Example:
        >>> from jaxkd import distill
        >>> best = distill.Best("rmse", largest=False, patience=3)
        >>> best.is_better(0.2, 0.3), best.is_better(0.3, 0.3)
        (True, False)
    """

    score: str = "accuracy"
    largest: bool | None = None
    patience: int | None = None

    def check(self, owner: str) -> None:
        """Raises `TypeError` or `ValueError` if an attribute is unfit. `owner` is for messages."""
        if not isinstance(self.score, str) or not isinstance(self.largest, (bool, type(None))):
            raise TypeError(
                f"the best of {owner} needs the name of a score, and True or False as largest, got "
                f"{shorten(repr(self), 100)}"
            )
        if self.largest is None and self.score not in LARGEST:
            raise ValueError(
                f"the best of {owner} does not say whether a large {shorten(self.score, 40)!r} is "
                "good: write largest=True or largest=False"
            )
        is_integer = isinstance(self.patience, (int, np.integer)) and self.patience is not True
        if self.patience is not None and not (is_integer and self.patience >= 1):
            raise ValueError(
                f"the patience of {owner} must be a whole number of at least 1, or None, got "
                f"{self.patience!r:.40}"
            )

    def is_better(self, value: float, other: float) -> bool:
        """Returns whether a value is better than another one. Equal values are not."""
        is_large_good = LARGEST[self.score] if self.largest is None else self.largest
        return value > other if is_large_good else value < other

    def read(self, scores: Mapping[str, float], owner: str) -> float:
        """Returns the value of the score.

        Raises:
            ValueError: If there is no such score. The message lists those that there are.
        """
        if self.score not in scores:
            raise ValueError(
                f"the best of {owner} is by {shorten(self.score, 40)!r}, but its scores are "
                f"{list_some(scores)}: name one of them"
            )
        return scores[self.score]


def start_average(variables: Mapping[str, Any]) -> Any:
    """Returns the average of a student's weights before the first step.

    Args:
        variables: `params` and `batch_stats`.

    Returns:
        A copy, in float32 where the weights have fewer bits: they could not hold small changes.
    """

    def start(leaf: Array) -> Array:
        is_narrow = jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < 4
        return jnp.array(leaf, jnp.float32 if is_narrow else leaf.dtype, copy=True)

    weights = {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}
    return jax.tree.map(start, weights)


def update_average(average: Any, variables: Mapping[str, Any], step: Array, decay: float) -> Any:
    """Returns the exponential moving average after a step.

    d · average + (1 − d) · weights with d = min(decay, (1 + step) / (10 + step)), so that the
    random weights of the start are forgotten soon.

    Args:
        average: The average before the step.
        variables: `params` and `batch_stats` after the step.
        step: Number of steps before this one, a scalar.
        decay: The largest d, in (0, 1).
    """
    count = step.astype(jnp.float32)
    rate = 1 - jnp.minimum(jnp.float32(decay), (1 + count) / (10 + count))

    def update(old: Array, new: Array) -> Array:
        if not jnp.issubdtype(old.dtype, jnp.floating):
            return new
        return old + rate.astype(old.dtype) * (new.astype(old.dtype) - old)

    return jax.tree.map(update, average, dict(variables))


def as_weights(average: Any, variables: Mapping[str, Any]) -> dict:
    """Returns an average in the dtypes of the weights, as a model takes them."""
    return jax.tree.map(lambda mean, leaf: mean.astype(leaf.dtype), average, dict(variables))
