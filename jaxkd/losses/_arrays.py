"""What every loss does around its formula: check shapes, widen dtypes, and keep arithmetic finite at its edges."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike


def floating(name: str, array: ArrayLike) -> Array:
    """The array; `TypeError` if it is not floating-point."""
    array = jnp.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating-point, got {array.dtype}")
    return array


def wide(name: str, array: ArrayLike) -> Array:
    """The array in float32, or in float64 if it came in that; `TypeError` if it is not floating-point."""
    array = floating(name, array)
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
    number = _number(name, value)
    if number is not None and not 0 < number < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")


def check_share(name: str, value: ArrayLike, *, ends: bool = True) -> None:
    """Raises `ValueError` unless a hyper-parameter is a scalar from 0 to 1, `ends` included or not."""
    number = _number(name, value)
    if number is not None and not (0 <= number <= 1 if ends else 0 < number < 1):
        raise ValueError(f"{name} must lie in {'[0, 1]' if ends else '(0, 1)'}, got {value}")


def check_weights(of: str, weights: ArrayLike | Sequence[float], dtype: jnp.dtype) -> Array:
    """Weights of classes or teachers as an array; `ValueError` if one is negative, as far as it is known."""
    if not isinstance(weights, jax.core.Tracer) and not np.all(np.asarray(weights) >= 0):
        raise ValueError(f"weights of {of} must be at least 0, got {weights}; 0 leaves one out")
    return jnp.asarray(weights, dtype)


def check_weight(name: str, value: ArrayLike, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """A weight of a term as an array: a scalar, or one for each example."""
    value = jnp.asarray(value, dtype)
    check_shape(value.shape in ((), shape), f"{name} {value.shape} must be a scalar or one weight per example {shape}")
    return value


def mask_of(where: ArrayLike | None, shape: tuple[int, ...]) -> Array:
    """The entries that count, as booleans of the full shape; all of them for `None`."""
    where = jnp.asarray(True if where is None else where)
    if where.dtype != bool:
        raise TypeError(f"where must be booleans, True for what counts, got {where.dtype}: take mask != 0")
    fits = where.ndim <= len(shape) and all(n in (1, m) for n, m in zip(where.shape[::-1], shape[::-1], strict=False))
    check_shape(fits, f"where {where.shape} must be of a shape that can be broadcast to {shape}")
    return jnp.broadcast_to(where, shape)


def full_mask(what: str, where: ArrayLike | None, shape: tuple[int, ...]) -> Array:
    """The entries that count, given by as many booleans as there are; all of them for `None`."""
    if where is not None:
        check_shape(jnp.shape(where) == shape, f"where {jnp.shape(where)} must have one entry for each {what}, {shape}")
    return mask_of(where, shape)


def examples_mask(where: ArrayLike | None, batch: int) -> Array:
    """The examples that count, as booleans `[B]`; all of them for `None`."""
    return full_mask("example", where, (batch,))


def only(where: Array, array: Array) -> Array:
    """The array with the examples that do not count replaced by zeros, so that nothing of theirs gets any further."""
    return jnp.where(where.reshape(where.shape + (1,) * (array.ndim - where.ndim)), array, jnp.zeros((), array.dtype))


def flat(array: Array) -> Array:
    """`[B, ...]` as `[B, D]`."""
    return array.reshape(array.shape[0], math.prod(array.shape[1:]))


def safe_sqrt(x: Array) -> Array:
    """Square root of x ≥ 0 whose gradient at 0 is 0 instead of infinite."""
    nonzero = x != 0
    return jnp.where(nonzero, jnp.sqrt(jnp.where(nonzero, x, 1)), 0)


def safe_divide(numerator: Array, denominator: Array) -> Array:
    """The quotient, and 0 with gradient 0 where the denominator is 0."""
    nonzero = denominator != 0
    return jnp.where(nonzero, numerator / jnp.where(nonzero, denominator, 1), 0)


def inverse(size: Array) -> Array:
    """1 / x for x ≥ 0, and 0 with gradient 0 where x is as good as 0: at most 1e-31 in float32."""
    # Multiplied by it, a vector costs one division in all; CPUs take their time over those.
    counts = size > jnp.finfo(size.dtype).tiny / jnp.finfo(size.dtype).eps
    return jnp.where(counts, 1 / jnp.where(counts, size, 1), 0)


def normalize(x: Array, axis: int | tuple[int, ...] = -1) -> Array:
    """Vectors scaled to length 1; one that is as good as 0 becomes zero and gets no gradient.

    Scaled by the largest entry first, so that squares neither overflow nor vanish.
    """
    x = x * inverse(jax.lax.stop_gradient(jnp.abs(x).max(axis, keepdims=True, initial=0)))
    return x * inverse(safe_sqrt(jnp.sum(jnp.square(x), axis, keepdims=True)))


def _number(name: str, value: ArrayLike) -> float | None:
    """A hyper-parameter's value, or `None` while it is traced."""
    if jnp.ndim(value):
        raise ValueError(f"{name} must be a scalar, got shape {jnp.shape(value)}")
    # Before it becomes an array: inside jit every array is a tracer, whose value is not known.
    return None if isinstance(value, jax.core.Tracer) else float(np.asarray(value))
