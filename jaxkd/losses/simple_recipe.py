"""Simple recipe distillation (SRD): batch-normalised features and a soft maximum of differences."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxkd.losses._arrays import (
    check_example_mask,
    check_positive,
    check_shape,
    upcast_pair,
    zero_masked,
)
from jaxkd.losses.features import project

VARIANCE_FLOOR = 1e-4
"""Added to each variance of the batch, as in the authors' code for ImageNet."""
SUM_FLOOR = 1e-5
"""Added to the sum whose logarithm is taken, so that equal features have a finite loss."""


def simple_recipe_loss(
    params: dict[str, Array],
    student_features: ArrayLike,
    teacher_features: ArrayLike,
    *,
    power: ArrayLike = 4.0,
    where: ArrayLike | None = None,
) -> Array:
    """Computes the logarithm of summed powers of differences of normalised features (SRD).

    log(Σ abs(norm(s W + b) − norm(t))^power + 10⁻⁵), where norm gives each channel mean 0 and
    variance 1 over the batch, and the sum is that over examples and channels

    The logarithm divides the gradient by the sum, so that a few large differences do not decide it.
    The normalisation keeps the projector from shrinking to zero. Average maps over their positions
    first, as the authors do.

    Args:
        params: From `init_projector`; they are trained with the student.
        student_features: `[B, S]`, floating-point.
        teacher_features: `[B, T]`.
        power: Exponent of the differences, above 0; 4 in the paper.
        where: `[B]`, the examples that count (True); the result is as if the others were sliced
            away.

    Returns:
        The loss of the batch, once for each example, `[B]`, in float32 or wider; 0 for examples
        that do not count.

    Raises:
        ValueError: If the shapes do not fit each other or the parameters, `power` is not a positive
            scalar, or `where` is not one boolean for each example.
        TypeError: If the features are not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> params = {"kernel": jnp.eye(1), "bias": jnp.zeros(1)}
        >>> student, teacher = jnp.array([[1.0], [3.0]]), jnp.array([[3.0], [1.0]])
        >>> print(losses.simple_recipe_loss(params, student, teacher))
        [3.466 3.466]

    References:
        Miles and Mikolajczyk, Understanding the Role of the Projector in Knowledge Distillation,
        https://arxiv.org/abs/2303.11098
    """
    power = check_positive("power", power)
    student, teacher = upcast_pair(
        ("student_features", "teacher_features"), student_features, teacher_features
    )
    check_shape(
        student.ndim == 2 == teacher.ndim and len(student) == len(teacher),
        f"student_features {student.shape} and teacher_features {teacher.shape} must be [B, S] and "
        "[B, T]; average maps over their positions",
    )
    where = check_example_mask(where, len(student))
    student, teacher = zero_masked(where, student), zero_masked(where, teacher)
    projected, teacher = upcast_pair(("student", "teacher"), project(params, student), teacher)
    check_shape(
        projected.shape == teacher.shape,
        f"student_features {student.shape} project to {projected.shape}, but teacher_features are "
        f"{teacher.shape}; call init_projector with the teacher's number of channels",
    )
    differences = jnp.abs(_normalize_batch(projected, where) - _normalize_batch(teacher, where))
    # A power has no derivative at 0 below 1, and there is none to take.
    used = zero_masked(where, differences) > 0
    powers = jnp.where(used, jnp.where(used, differences, 1) ** power, 0)
    value = jnp.log(powers.sum() + jnp.asarray(SUM_FLOOR, powers.dtype))
    return zero_masked(where, jnp.broadcast_to(value, where.shape))


def _normalize_batch(features: Array, where: Array) -> Array:
    """Gives each channel of `[B, D]` mean 0 and variance 1 over the examples that count."""
    count = jnp.maximum(where.sum(), 1).astype(features.dtype)

    def mean(values: Array) -> Array:
        masked = zero_masked(where, values)
        return jnp.broadcast_to(masked.sum(0) / count, values.shape)

    centred = features - mean(features)
    return centred / jnp.sqrt(mean(jnp.square(centred)) + VARIANCE_FLOOR)
