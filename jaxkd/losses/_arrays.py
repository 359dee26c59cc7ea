"""What every loss does around its formula: check shapes, widen dtypes, and keep arithmetic finite at its edges."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike


def wide(name: str, array: ArrayLike) -> Array:
    """The array in float32, or in float64 if it came in that; `TypeError` if it is not floating-point."""
    array = jnp.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating-point, got {array.dtype}")
    return array if array.dtype == jnp.float64 else array.astype(jnp.float32)


def wide_pair(names: Sequence[str], first: ArrayLike, second: ArrayLike) -> tuple[Array, Array]:
    """Two arrays widened to one dtype; their shapes may differ."""
    first, second = wide(names[0], first), wide(names[1], second)
    dtype = max(first.dtype, second.dtype, key=lambda dtype: dtype.itemsize)
    return first.astype(dtype), second.astype(dtype)


def check_shape(holds: bool, message: str) -> None:
    """Raises `ValueError(message)` unless a fact about shapes holds."""
    if not holds:
        raise ValueError(message)


def check_positive(name: str, value: ArrayLike) -> None:
    """Raises `ValueError` unless a hyper-parameter is a positive scalar; of a traced one only the shape is known."""
    if jnp.ndim(value):
        raise ValueError(f"{name} must be a scalar, got shape {jnp.shape(value)}")
    # Before it becomes an array: inside jit every array is a tracer, whose value is not known.
    if not isinstance(value, jax.core.Tracer) and not np.asarray(value) > 0:
        raise ValueError(f"{name} must be positive, got {value}")


def check_share(name: str, value: ArrayLike, *, ends: bool = True) -> None:
    """Raises `ValueError` unless a hyper-parameter is a scalar from 0 to 1, `ends` included or not."""
    if jnp.ndim(value):
        raise ValueError(f"{name} must be a scalar, got shape {jnp.shape(value)}")
    if isinstance(value, jax.core.Tracer):
        return
    if not (0 <= np.asarray(value) <= 1 if ends else 0 < np.asarray(value) < 1):
        raise ValueError(f"{name} must lie in {'[0, 1]' if ends else '(0, 1)'}, got {value}")


def examples_mask(where: ArrayLike | None, batch: int) -> Array:
    """The examples that count, as booleans `[B]`; all of them for `None`."""
    if where is None:
        return jnp.ones(batch, bool)
    where = jnp.asarray(where)
    if where.shape != (batch,) or where.dtype != bool:
        raise ValueError(
            f"where must be booleans, one for each of the {batch} examples, got {where.dtype} {where.shape}"
        )
    return where


def only(where: Array, array: Array) -> Array:
    """The array with the examples that do not count replaced by zeros, so that nothing of theirs gets any further."""
    return jnp.where(where.reshape(where.shape + (1,) * (array.ndim - where.ndim)), array, jnp.zeros((), array.dtype))


def flat(array: Array) -> Array:
    """`[B, ...]` as `[B, D]`."""
    return array.reshape(array.shape[0], -1)


def safe_sqrt(x: Array) -> Array:
    """Square root of x ≥ 0 whose gradient at 0 is 0 instead of infinite."""
    nonzero = x != 0
    return jnp.where(nonzero, jnp.sqrt(jnp.where(nonzero, x, 1)), 0)


def safe_divide(numerator: Array, denominator: Array) -> Array:
    """The quotient, and 0 with gradient 0 where the denominator is 0."""
    nonzero = denominator != 0
    return jnp.where(nonzero, numerator / jnp.where(nonzero, denominator, 1), 0)


def normalize(x: Array, axis: int | tuple[int, ...] = -1) -> Array:
    """Vectors scaled to length 1; a zero vector stays zero and gets no gradient.

    Scaled by the largest entry first, so that squares neither overflow nor vanish.
    """
    largest = jax.lax.stop_gradient(jnp.abs(x).max(axis, keepdims=True))
    x = safe_divide(x, largest)
    return safe_divide(x, safe_sqrt(jnp.sum(jnp.square(x), axis, keepdims=True)))
