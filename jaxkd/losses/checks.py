"""Checks on the values of logits, for loops that `distill.run_plan` does not watch.

Values are known outside of `jit` only. The losses themselves check shapes and dtypes alone.
"""

from __future__ import annotations

import jax
import numpy as np
from jax.typing import ArrayLike

from jaxkd.losses._arrays import as_floating


def check_logits(logits: ArrayLike) -> None:
    """Raises an error if logits are the output of a softmax or of a sigmoid.

    A loss that takes logits would compute a second softmax of them, which is nearly uniform: the
    loss falls, but hardly anything is learnt. Check one batch of student and teacher before the
    training. `distill.run_plan`, `evaluate.score_logits` and the metrics of `evaluate` warn of the
    same. Logits that happen to lie between 0 and 1, as those of a network that has learnt nothing,
    pass if they differ by less than 0.8.

    Args:
        logits: `[..., C]`, floating-point.

    Raises:
        ValueError: If every row sums to 1 without a negative entry, or all logits are between 0
            and 1 and differ by more than 0.8.
        TypeError: If the logits are not floating-point, or traced.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd import losses
        >>> logits = jnp.array([[2.0, 1.0], [0.0, 3.0]])
        >>> losses.check_logits(logits)
        >>> losses.check_logits(jax.nn.softmax(logits))
        Traceback (most recent call last):
            ...
        ValueError: logits are probabilities, each row sums to 1: pass the logits before the
            softmax, or their logarithm
    """
    logits = as_floating("logits", logits)
    if isinstance(logits, jax.core.Tracer):
        raise TypeError(
            "the values of logits are not known under jit: call check_logits on a batch of outputs "
            "outside of it"
        )
    if not logits.size or not logits.ndim:
        return
    if are_distributions(logits):
        raise ValueError(
            "logits are probabilities, each row sums to 1: pass the logits before the softmax, or "
            "their logarithm"
        )
    if are_sigmoids(logits):
        raise ValueError(
            "logits are all between 0 and 1, as a sigmoid gives them: pass the logits before it"
        )


def are_distributions(logits: ArrayLike) -> bool:
    """Returns whether every row is a distribution over several classes, as a softmax gives it."""
    logits = np.asarray(logits, np.float32)
    if logits.shape[-1] < 2 or not logits.size or logits.min() < 0:
        return False
    # Rounded to bfloat16, the probabilities of many classes do not sum to 1 exactly.
    return bool(np.all(np.abs(logits.sum(-1) - 1) < 0.02))


def are_sigmoids(logits: ArrayLike) -> bool:
    """Returns whether all logits are between 0 and 1, and differ as those of a network do."""
    logits = np.asarray(logits, np.float32)
    # The logits of a network that has learnt little are small, and may all be positive.
    return bool(logits.min() >= 0 and logits.max() <= 1 and np.ptp(logits) > 0.8)
