"""Shape and mask checks, dtype widening and safe arithmetic that all losses share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxkd._messages import shorten


def as_floating(name: str, array: ArrayLike) -> Array:
    """Returns the argument as an array; raises `TypeError` if it is not floating-point."""
    refuse_outputs(name, array)
    array = jnp.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating-point, got {array.dtype}")
    return array


def refuse_outputs(name: str, array: Any) -> None:
    """Raises `TypeError` for the outputs of a model, a tuple that JAX would make one array of."""
    if hasattr(array, "logits"):
        raise TypeError(f"{name} are the outputs of a model, expected an array: pass .logits")


def upcast(name: str, array: ArrayLike) -> Array:
    """Casts an array to float32, or keeps float64; raises `TypeError` if it is not floating-point.

    In bfloat16 a softmax over many classes loses most of its mass, so every loss computes in
    float32 at least.
    """
    array = as_floating(name, array)
    return array if array.dtype == jnp.float64 else array.astype(jnp.float32)


def upcast_pair(names: Sequence[str], first: ArrayLike, second: ArrayLike) -> tuple[Array, Array]:
    """Casts two arrays to one dtype, float32 or wider. Their shapes may differ."""
    first = upcast(names[0], first)
    second = upcast(names[1], second)
    dtype = widest_dtype(first, second)
    return first.astype(dtype), second.astype(dtype)


def widest_dtype(*arrays: Array) -> jnp.dtype:
    """Returns the dtype of the array with the largest items."""
    return max((array.dtype for array in arrays), key=lambda dtype: dtype.itemsize)


def check_shape(condition: bool, message: str) -> None:
    """Raises `ValueError(message)` unless a condition on shapes holds."""
    if not condition:
        raise ValueError(message)


def check_positive(name: str, value: ArrayLike) -> ArrayLike:
    """Returns a hyper-parameter that must be a positive, finite scalar.

    Raises `ValueError` if it is not, or `TypeError` if it is no number. A traced value that is not
    becomes NaN, and so does the loss.
    """
    _check_scalar(name, value)
    return _check_range(name, value, lambda x: (x > 0) & (x < math.inf), "positive and finite")


def check_fraction(
    name: str, value: ArrayLike, *, inclusive: bool = True, scalar: bool = True
) -> ArrayLike:
    """Returns a hyper-parameter that must be in [0, 1], or in (0, 1), as `check_positive` does."""
    if scalar:
        _check_scalar(name, value)
    if inclusive:
        return _check_range(name, value, lambda x: (x >= 0) & (x <= 1), "in [0, 1]")
    return _check_range(name, value, lambda x: (x > 0) & (x < 1), "in (0, 1)")


def check_number(name: str, value: float) -> float:
    """Returns a hyper-parameter that must be a finite Python number, which chooses the formula."""
    known = None if isinstance(value, jax.core.Tracer) else np.asarray(value)
    if known is None or known.ndim or known.dtype.kind not in "iuf" or not np.isfinite(known):
        raise TypeError(
            f"{name} must be a finite Python number, got {shorten(repr(value), 80)}: close over it "
            "in a function under jit"
        )
    return float(known)


def check_weights(kind: str, weights: ArrayLike | Sequence[float], dtype: jnp.dtype) -> Array:
    """Returns the weights of classes or teachers as an array.

    Raises `ValueError` if a weight is negative or NaN, or all are 0. Traced weights are not
    checked.
    """
    known = untraced(weights)
    if not isinstance(known, jax.core.Tracer):
        if not np.all(known >= 0) or (known.size and not known.any()):
            raise ValueError(
                f"weights of {kind} must be at least 0, and one of them more, "
                f"got {shorten(weights, 80)}; a weight of 0 leaves one out"
            )
    return jnp.asarray(known, dtype)


def check_term_weight(
    name: str, value: ArrayLike, shape: tuple[int, ...], dtype: jnp.dtype
) -> Array:
    """Returns the weight of a loss term as an array: a scalar, or one weight per example."""
    value = jnp.asarray(value, dtype)
    check_shape(
        value.shape in ((), shape),
        f"{name} {value.shape} must be a scalar or one weight per example {shape}",
    )
    return value


def exclude_unused(used: ArrayLike, *arrays: Array) -> tuple[Array, ...]:
    """Replaces the examples that a term does not use by zeros, such as those of weight 0.

    The term and its gradient are then finite, whatever these examples hold. To mask the term alone
    would leave 0 · NaN in the gradient.

    Args:
        used: Booleans, a scalar or `[...]`, one per example.
        *arrays: `[...]` or `[..., C]`.

    Returns:
        The arrays, as they are if it is known that all examples are used.
    """
    if not isinstance(used, jax.core.Tracer) and np.all(used):
        return arrays
    return tuple(zero_masked(jnp.asarray(used), array) for array in arrays)


def untraced(value: ArrayLike | Sequence[Any]) -> Any:
    """Returns a value as NumPy's array, whose comparisons are known under `jit`, unless traced."""
    # A sequence may hold traced numbers among others.
    is_traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(value))
    return jnp.asarray(value) if is_traced else np.asarray(value)


def weigh(weight: Array, values: Array) -> Array:
    """Multiplies the values of a term by its weights; 0 where the weight is 0, even if infinite."""
    return weight * jnp.where(weight != 0, values, 0)


def broadcast_mask(where: ArrayLike | None, shape: tuple[int, ...]) -> Array:
    """Broadcasts a mask to a shape. `None` stands for a mask that is True everywhere."""
    where = jnp.asarray(True if where is None else where)
    # An additive mask of 0 and −1e9, cast to booleans, would select what it is meant to exclude.
    if where.dtype != bool:
        raise TypeError(
            f"where must be boolean, True for entries that count, got {where.dtype}: take mask != 0"
        )
    fits = where.ndim <= len(shape) and all(
        n in (1, m) for n, m in zip(where.shape[::-1], shape[::-1], strict=False)
    )
    check_shape(fits, f"where {where.shape} must have a shape that can be broadcast to {shape}")
    # The first axis might be that of the examples, if their number happens to fit.
    check_shape(
        where.ndim in (0, 1, len(shape)) or where.size == 1,
        f"where {where.shape} lacks an axis of {shape}: write where[None] for a mask that all "
        "examples share, or give it an axis of length 1 elsewhere",
    )
    return jnp.broadcast_to(where, shape)


def check_class_mask(where: Array, shape: tuple[int, ...], axis: int) -> None:
    """Raises `ValueError` if a mask of one axis may be that of the examples or of the classes.

    Who means one entry per example would leave out classes, where their numbers happen to agree.

    Args:
        where: The mask.
        shape: The shape of the logits.
        axis: The axis of the classes.
    """
    num_classes, is_first = shape[axis], axis in (0, -len(shape))
    check_shape(
        where.ndim != 1 or is_first or not 1 < where.size == shape[0] == num_classes,
        f"where {where.shape} may be a mask of the classes or of the examples of {shape}: give it "
        "the rank of the logits for classes, or weigh the values of the loss for examples",
    )


def align_classes(array: Array, ndim: int, axis: int) -> Array:
    """Puts the only axis of an array with one entry per class where the classes of logits are."""
    if array.ndim != 1:
        return array
    # Broadcasting would put it last, on another axis that may have the same length.
    return jnp.moveaxis(array.reshape((1,) * (ndim - 1) + (-1,)), -1, axis)


def check_mask(item: str, where: ArrayLike | None, shape: tuple[int, ...]) -> Array:
    """Returns a mask with one boolean for each item. `None` stands for True everywhere.

    Unlike `broadcast_mask` it broadcasts nothing.
    """
    if where is not None:
        check_shape(
            jnp.shape(where) == shape,
            f"where {jnp.shape(where)} must have one entry for each {item}, {shape}",
        )
    return broadcast_mask(where, shape)


def check_example_mask(where: ArrayLike | None, batch: int) -> Array:
    """Returns a mask `[B]` of the examples that count. `None` stands for all examples."""
    return check_mask("example", where, (batch,))


def zero_masked(where: Array, array: Array) -> Array:
    """Replaces the entries of masked examples by zeros, so that not even a NaN there spreads."""
    return jnp.where(
        where.reshape(where.shape + (1,) * (array.ndim - where.ndim)),
        array,
        jnp.zeros((), array.dtype),
    )


def gram_matrix(x: Array) -> Array:
    """Computes the products of all pairs of rows of `[B, D]`, `[B, B]`."""
    return jnp.matmul(x, x.T, precision="highest")


def flatten_examples(array: Array) -> Array:
    """Reshapes `[B, ...]` to `[B, D]`."""
    # Not -1 for D, which cannot be inferred where B is 0.
    return array.reshape(array.shape[0], math.prod(array.shape[1:]))


# In the functions below the inner `jnp.where` keeps the gradient finite: `jnp.where` differentiates
# both branches, and 0 · inf of the branch that is not taken would be NaN.


def safe_sqrt(x: Array) -> Array:
    """Returns the square root of x ≥ 0, with the gradient 0 instead of infinity at 0."""
    nonzero = x != 0
    return jnp.where(nonzero, jnp.sqrt(jnp.where(nonzero, x, 1)), 0)


def safe_divide(numerator: Array, denominator: Array) -> Array:
    """Returns the quotient, and 0 with the gradient 0 where the denominator is 0."""
    nonzero = denominator != 0
    return jnp.where(nonzero, numerator / jnp.where(nonzero, denominator, 1), 0)


def safe_reciprocal(x: Array) -> Array:
    """Returns 1 / x for x ≥ 0, and 0 with the gradient 0 where x is at most 1e-31 in float32."""
    # Scaling a vector by its reciprocal length takes one division instead of one for each entry,
    # which is faster on CPUs. A vector shorter than tiny / eps has lost digits to underflow, and
    # counts as 0.
    large_enough = x > jnp.finfo(x.dtype).tiny / jnp.finfo(x.dtype).eps
    return jnp.where(large_enough, 1 / jnp.where(large_enough, x, 1), 0)


def normalize(x: Array, axis: int | tuple[int, ...] = -1) -> Array:
    """Scales vectors to length 1. Zero vectors, by `safe_reciprocal`, stay 0 with no gradient."""
    # Scaling by the largest entry first keeps the squares from overflowing and underflowing.
    largest = jax.lax.stop_gradient(jnp.abs(x).max(axis, keepdims=True, initial=0))
    x = x * safe_reciprocal(largest)
    return x * safe_reciprocal(safe_sqrt(jnp.sum(jnp.square(x), axis, keepdims=True)))


def _check_scalar(name: str, value: ArrayLike) -> None:
    if np.ndim(value):
        raise ValueError(f"{name} must be a scalar, got shape {np.shape(value)}")


def _check_range(
    name: str, value: ArrayLike, is_valid: Callable[[Any], Any], requirement: str
) -> ArrayLike:
    if isinstance(value, jax.core.Tracer):
        floating = jnp.issubdtype(value.dtype, jnp.floating)
        number = value if floating else value.astype(jnp.float32)
        return jnp.where(is_valid(number), number, jnp.asarray(jnp.nan, number.dtype))
    # NumPy, since under jit `jnp.asarray` turns even a Python number into a tracer.
    array = np.asarray(value)
    if not any(jnp.issubdtype(array.dtype, kind) for kind in (jnp.integer, jnp.floating)):
        raise TypeError(f"{name} must be a number, got {shorten(repr(value), 80)}")
    if not np.all(is_valid(array)):
        raise ValueError(f"{name} must be {requirement}, got {shorten(value, 80)}")
    return value
