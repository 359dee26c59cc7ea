"""A model as a pair of pure functions, and the axis over which its statistics are means."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, NamedTuple

from jax import Array

if TYPE_CHECKING:
    from flax import linen


Inputs = Any
"""An array `[B, ...]`, or a dict of such arrays with one B."""


class Outputs(NamedTuple):
    """Outputs of a model for a batch.

    Attributes:
        logits: `[..., num_classes]`; `None` of a teacher of which features alone are cached.
        features: Intermediate states by name, such as `stage1` and `pre_logits`.
    """

    logits: Array
    features: dict[str, Array]


class Network(NamedTuple):
    """What a model was made from, so that a saved student can name its network.

    Attributes:
        module: The Linen module.
        mean: Mean of each channel that `with_input_normalization` subtracts, or `None`.
        std: Standard deviation of each channel, or `None`.
    """

    module: linen.Module
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


class Model(NamedTuple):
    """A pair of pure functions over variables `{"params": ..., "batch_stats": ...}`, plain dicts.

    Attributes:
        init: `(key, inputs) -> variables`.
        apply: `(variables, inputs, *, train, key=None) -> (Outputs, batch_stats)`. Only training
            updates the running statistics; a model without any returns `{}`. `key` is the source of
            randomness for dropout and other stochastic layers.
        network: What the pair was made from, if that is known. Only saving a student reads it.
        max_value: Largest value of a pixel that `apply` takes, of a model that normalises its
            inputs. Only checks read it.
    """

    init: Callable[..., dict]
    apply: Callable[..., tuple[Outputs, dict]]
    network: Network | None = None
    max_value: float | None = None


def check_outputs(result: Any, name: str) -> Outputs:
    """Returns the outputs of a module; raises `TypeError` if they are of another type."""
    if isinstance(result, Outputs):
        return result
    if not hasattr(result, "shape"):
        raise TypeError(
            f"{name} returns a {type(result).__name__}: let it return the logits alone, or "
            "`return models.Outputs(logits, features)` with the features in a dict"
        )
    return Outputs(result, {})


_BATCH_STATS_AXIS: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "batch_stats_axis", default=None
)


@contextlib.contextmanager
def cross_replica_batch_stats(axis_name: str | None) -> Generator[None]:
    """Makes `BatchNorm` of this package use the statistics of all devices while a model is traced.

    Args:
        axis_name: Name of the mapped axis over which the batch is divided. With `None`, each device
            uses the statistics of its own part of the batch.
    """
    token = _BATCH_STATS_AXIS.set(axis_name)
    try:
        yield
    finally:
        _BATCH_STATS_AXIS.reset(token)


def batch_stats_axis_name() -> str | None:
    """Returns the axis name that `cross_replica_batch_stats` has set."""
    return _BATCH_STATS_AXIS.get()
