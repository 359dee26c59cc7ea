"""Softmax in log space that takes −inf for a class that is not there, in the gradient too."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxkd.losses._arrays import check_positive, check_shape, mask_of, wide, wide_pair


def logits_of(name: str, logits: ArrayLike) -> Array:
    """Logits, widened; `ValueError` if they have no axis of classes."""
    check_shape(jnp.ndim(logits) > 0, f"{name} must have an axis of classes, got a scalar")
    return wide(name, logits)


def logits_pair(student_logits: ArrayLike, teacher_logits: ArrayLike) -> tuple[Array, Array]:
    """The logits of student and teacher, of one shape and one wide dtype."""
    names = "student_logits", "teacher_logits"
    shapes = tuple(jnp.shape(logits_of(*one)) for one in zip(names, (student_logits, teacher_logits), strict=True))
    check_shape(
        shapes[0] == shapes[1],
        f"student_logits {shapes[0]} and teacher_logits {shapes[1]} must have one shape; "
        "slice or project the larger set of classes first",
    )
    return wide_pair(names, student_logits, teacher_logits)


def check_labels(labels: ArrayLike, shape: Sequence[int]) -> Array:
    """Labels `shape[:-1]`, integers, for logits of a shape."""
    labels, shape = jnp.asarray(labels), tuple(shape)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be integers, got {labels.dtype}; for distributions there is soft_cross_entropy")
    check_shape(
        labels.shape == shape[:-1],
        f"labels {labels.shape} must have the logits' shape {shape} without its last axis, {shape[:-1]}",
    )
    # Narrower ones would wrap around where they are compared with classes that they cannot count to.
    return labels if labels.dtype.itemsize > 4 else labels.astype(jnp.int32)


class Softmax(NamedTuple):
    """Probabilities and their logarithms, each for who needs it: what is not used is not computed under `jit`."""

    probabilities: Array
    logs: Array


def soften(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    temperature: ArrayLike,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> tuple[Softmax, Softmax, Array]:
    """The distributions of student and teacher at a temperature, and T²."""
    check_positive("temperature", temperature)
    student, teacher = logits_pair(student_logits, teacher_logits)
    student, teacher = (softmax(logits, axis, where, temperature) for logits in (student, teacher))
    return student, teacher, jnp.square(jnp.asarray(temperature, student.logs.dtype))


def softmax(
    logits: Array, axis: int = -1, where: ArrayLike | None = None, temperature: ArrayLike | None = None
) -> Softmax:
    """Softmax that gives 0 and −inf, and no gradient, to classes that are at −inf or masked."""
    if where is not None:
        logits = jnp.where(mask_of(where, logits.shape), logits, -jnp.inf)
    largest = jax.lax.stop_gradient(logits.max(axis, keepdims=True, initial=-jnp.inf))
    shifted = logits - jnp.where(largest != -jnp.inf, largest, 0)
    if isinstance(temperature, jax.core.Tracer):
        # Masked before the division too: after it alone, −inf would reach the temperature's gradient.
        possible = shifted != -jnp.inf
        shifted = jnp.where(possible, jnp.where(possible, shifted, 0) / temperature.astype(logits.dtype), -jnp.inf)
    elif temperature is not None:
        shifted = shifted / jnp.asarray(temperature, logits.dtype)
    weights = jnp.exp(shifted)
    total = weights.sum(axis, keepdims=True)
    total = jnp.where(total != 0, total, 1)
    return Softmax(weights / total, shifted - jnp.log(total))


def expectation(probabilities: Array, values: Array, axis: int = -1) -> Array:
    """Σ p · values in which a class of probability 0 counts for nothing, in the gradient too."""
    return jnp.sum(probabilities * jnp.where(probabilities != 0, values, 0), axis=axis)


def divergence(p: Softmax, q: Softmax, axis: int = -1) -> Array:
    """KL(p ‖ q)."""
    return expectation(p.probabilities, p.logs - q.logs, axis)


def log_of(x: Array) -> Array:
    """The logarithm of x ≥ 0, −inf without a gradient at 0."""
    return jnp.where(x > 0, jnp.log(jnp.where(x > 0, x, 1)), -jnp.inf)


def log_sum_exp(logs: Array, axis: int = -1) -> Array:
    """The logarithm of Σ exp; −inf where every term is, and without a gradient there."""
    largest = jax.lax.stop_gradient(logs.max(axis, keepdims=True, initial=-jnp.inf))
    largest = jnp.where(largest != -jnp.inf, largest, 0)
    total = jnp.exp(logs - largest).sum(axis)
    log = jnp.log(jnp.where(total != 0, total, 1)) + jnp.squeeze(largest, axis)
    return jnp.where(total != 0, log, -jnp.inf)


def log_add_exp(*logs: Array) -> Array:
    """The logarithm of a sum of exponentials; −inf where all are, and without a gradient there.

    Entry by entry, which on CPUs is faster than `log_sum_exp` over an axis along which they are stacked.
    """
    largest = jax.lax.stop_gradient(functools.reduce(jnp.maximum, logs))
    largest = jnp.where(largest != -jnp.inf, largest, 0)
    total = sum(jnp.exp(log - largest) for log in logs)
    return jnp.where(total != 0, jnp.log(jnp.where(total != 0, total, 1)) + largest, -jnp.inf)
