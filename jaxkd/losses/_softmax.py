"""Softmax in log space whose values and gradients stay finite beside classes at −inf."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxkd.losses._arrays import (
    align_classes,
    broadcast_mask,
    check_class_mask,
    check_positive,
    check_shape,
    refuse_outputs,
    upcast,
    upcast_pair,
)


class Softmax(NamedTuple):
    """Probabilities and log-probabilities. Under `jit` a field that is not used costs nothing."""

    probabilities: Array
    log_probabilities: Array


def check_logits(name: str, logits: ArrayLike) -> Array:
    """Widens logits; raises `ValueError` if they have no class axis."""
    refuse_outputs(name, logits)
    check_shape(jnp.ndim(logits) > 0, f"{name} must have a class axis, got a scalar")
    return upcast(name, logits)


def check_classes(name: str, shape: Sequence[int], axis: int = -1) -> None:
    """Raises `ValueError` if logits have one class: its probability is 1, whatever its logit."""
    check_shape(
        shape[axis] != 1,
        f"{name} {tuple(shape)} have one class, whose probability is always 1, so that nothing is "
        "learnt: for two classes pass jnp.concatenate([0 * z, z], -1) of a sigmoid's logit z",
    )


def check_logits_pair(student_logits: ArrayLike, teacher_logits: ArrayLike) -> tuple[Array, Array]:
    """Returns the logits of student and teacher in one dtype; raises if their shapes differ."""
    names = "student_logits", "teacher_logits"
    student = check_logits(names[0], student_logits)
    teacher = check_logits(names[1], teacher_logits)
    check_shape(
        student.shape == teacher.shape,
        f"student_logits {student.shape} and teacher_logits {teacher.shape} must have the same "
        "shape; slice or project the larger set of classes first",
    )
    return upcast_pair(names, student, teacher)


def check_labels(labels: ArrayLike, logits_shape: Sequence[int]) -> Array:
    """Returns integer labels that match the leading axes of logits, in int32 or wider."""
    if not isinstance(labels, jax.Array):
        known = np.asarray(labels)
        if known.dtype.kind in "OSU":
            raise TypeError(
                f"labels must be integers, got {known.dtype}: number the classes, such as by "
                "np.unique(labels, return_inverse=True)[1]"
            )
    labels = jnp.asarray(labels)
    shape = tuple(logits_shape)
    check_classes("logits", shape)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(
            f"labels must be integers, got {labels.dtype}: use labels.astype(int) for classes; for "
            "distributions p, soft_cross_entropy(logits, jnp.log(p), temperature=1.0)"
        )
    check_shape(
        labels.shape == shape[:-1],
        f"labels {labels.shape} must have the logits' shape {shape} without its last axis, "
        f"{shape[:-1]}",
    )
    # `jax.nn.one_hot` casts class indices to the labels' dtype: in uint8, class 257 equals label 1.
    return labels if labels.dtype.itemsize > 4 else labels.astype(jnp.int32)


def soften(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    temperature: ArrayLike,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> tuple[Softmax, Softmax, Array]:
    """Returns the softened distributions of student and teacher, and T²."""
    temperature = check_positive("temperature", temperature)
    student, teacher = check_logits_pair(student_logits, teacher_logits)
    check_classes("student_logits", student.shape, axis)
    student = softmax(student, axis, where, temperature)
    teacher = softmax(teacher, axis, where, temperature)
    return student, teacher, jnp.square(jnp.asarray(temperature, student.log_probabilities.dtype))


def softmax(
    logits: Array,
    axis: int = -1,
    where: ArrayLike | None = None,
    temperature: ArrayLike | None = None,
) -> Softmax:
    """Computes a softmax in which classes that are masked or at −inf have probability 0.

    Their log-probability is −inf and they get no gradient. If there is no other class, all
    probabilities are 0.
    """
    if where is not None:
        where = jnp.asarray(where)
        check_class_mask(where, logits.shape, axis)
        where = align_classes(where, logits.ndim, axis)
        logits = jnp.where(broadcast_mask(where, logits.shape), logits, -jnp.inf)
    # A softmax does not depend on the shift, so the gradient through it would cancel.
    largest = jax.lax.stop_gradient(logits.max(axis, keepdims=True, initial=-jnp.inf))
    # Where every class is at −inf, −inf − (−inf) would be NaN.
    shifted = logits - jnp.where(largest != -jnp.inf, largest, 0)
    # Divided after the shift: large logits over a low temperature could overflow, and the
    # difference of two infinities is NaN.
    if isinstance(temperature, jax.core.Tracer):
        # The operand is masked as well as the result, since −inf would otherwise turn the
        # gradient of the temperature into NaN.
        possible = shifted != -jnp.inf
        finite = jnp.where(possible, shifted, 0)
        shifted = jnp.where(possible, finite / temperature.astype(logits.dtype), -jnp.inf)
    elif temperature is not None:
        shifted = shifted / jnp.asarray(temperature, logits.dtype)
    exponentials = jnp.exp(shifted)
    total = exponentials.sum(axis, keepdims=True)
    # 0 only in a row of −inf: in any other, the largest class contributes exp(0) = 1.
    total = jnp.where(total != 0, total, 1)
    return Softmax(exponentials / total, shifted - jnp.log(total))


def expectation(probabilities: Array, values: Array, axis: int = -1) -> Array:
    """Computes Σ p · values. A value of probability 0 adds nothing, even if it is infinite."""
    return jnp.sum(probabilities * jnp.where(probabilities != 0, values, 0), axis=axis)


def divergence(p: Softmax, q: Softmax, axis: int = -1) -> Array:
    """Computes KL(p ‖ q)."""
    return expectation(p.probabilities, p.log_probabilities - q.log_probabilities, axis)


def scores_divergence(student: Array, teacher: Array, where: ArrayLike | None) -> Array:
    """Computes KL(softmax(teacher) ‖ softmax(student)) of scores that are no classes.

    Unlike classes, there may be one alone, such as the one token of a text.
    """
    return divergence(softmax(teacher, where=where), softmax(student, where=where))


def safe_log(x: Array) -> Array:
    """Returns the logarithm of x ≥ 0, with no gradient at 0, where it is −inf."""
    return jnp.where(x > 0, jnp.log(jnp.where(x > 0, x, 1)), -jnp.inf)


def log_sum_exp(logs: Array, axis: int = -1) -> Array:
    """Computes log Σ exp along an axis, with no gradient where every term is −inf."""
    # `jax.nn.logsumexp` has a NaN gradient there.
    largest = jax.lax.stop_gradient(logs.max(axis, keepdims=True, initial=-jnp.inf))
    largest = jnp.where(largest != -jnp.inf, largest, 0)
    total = jnp.exp(logs - largest).sum(axis)
    log = jnp.log(jnp.where(total != 0, total, 1)) + jnp.squeeze(largest, axis)
    return jnp.where(total != 0, log, -jnp.inf)


def log_add_exp(*logs: Array) -> Array:
    """Computes log Σ exp over arrays, with no gradient where every term is −inf.

    On CPUs this is faster than stacking the arrays and calling `log_sum_exp`.
    """
    largest = jax.lax.stop_gradient(functools.reduce(jnp.maximum, logs))
    largest = jnp.where(largest != -jnp.inf, largest, 0)
    total = sum(jnp.exp(log - largest) for log in logs)
    return jnp.where(total != 0, jnp.log(jnp.where(total != 0, total, 1)) + largest, -jnp.inf)
