"""Losses with several teachers: averaged distributions, weighted sums, and weights."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxkd.losses._arrays import (
    check_positive,
    check_shape,
    check_weights,
    untraced,
    upcast,
    weigh,
    widest_dtype,
)
from jaxkd.losses._softmax import check_logits, check_logits_pair, log_add_exp, safe_log, softmax
from jaxkd.losses.labels import hard_cross_entropy


def ensemble_logits(
    teacher_logits: ArrayLike,
    *,
    temperature: ArrayLike,
    weights: ArrayLike | Sequence[float] | None = None,
    axis: int = -1,
) -> Array:
    """Combines teachers into the logits of one, whose softened probabilities are their average.

    T log Σ_k w_k softmax(t_k / T), so that softmax(ensemble / T) = Σ_k w_k softmax(t_k / T)

    Pass the result to any loss on logits, at the same temperature. Probabilities are averaged, not
    logits: the mean of the logits is the geometric mean of the distributions, in which one teacher
    with a low probability vetoes a class.

    Args:
        teacher_logits: `[K, ..., C]`, floating-point, one entry for each teacher.
        temperature: T > 0, a scalar; the same as that of the loss.
        weights: w, at least 0, `[K]` or one for each teacher and example `[K, ...]`; they are
            divided by their sum. By default all teachers have the same weight. A teacher of weight
            0 has no effect, even if its logits are NaN.
        axis: The class axis.

    Returns:
        Logits `[..., C]`, in float32 or wider; −inf where every teacher has −inf, and for all
        classes of an example without a teacher of weight above 0.

    Raises:
        ValueError: If there is no axis of teachers, the temperature is not a positive scalar, or
            the weights are negative, all 0 or of another shape.
        TypeError: If the logits are not floating-point.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd import losses
        >>> teachers = jnp.log(jnp.array([[[0.8, 0.2]], [[0.4, 0.6]]]))
        >>> print(jax.nn.softmax(losses.ensemble_logits(teachers, temperature=1.0)))
        [[0.6 0.4]]

    References:
        Hinton et al., Distilling the Knowledge in a Neural Network, https://arxiv.org/abs/1503.02531
    """
    temperature = check_positive("temperature", temperature)
    check_shape(
        jnp.ndim(teacher_logits) >= 2,
        f"teacher_logits must be [K, ..., C], got {jnp.shape(teacher_logits)}",
    )
    logits = check_logits("teacher_logits", teacher_logits)
    axis = axis % logits.ndim
    check_shape(axis > 0, "axis 0 is the axis of teachers; pass another axis for the classes")
    shape_without_classes = logits.shape[:axis] + logits.shape[axis + 1 :]
    known_weights = untraced(np.ones(logits.shape[0]) if weights is None else weights)
    weights = check_weights("teachers", known_weights, logits.dtype)
    weights = _expand_weights(weights, shape_without_classes)
    if isinstance(known_weights, jax.core.Tracer) or not np.all(known_weights):
        logits = jnp.where(jnp.expand_dims(weights != 0, axis), logits, 0)
    # The softmax of log-weights is the weights divided by their sum.
    log_weights = jnp.expand_dims(softmax(safe_log(weights), 0).log_probabilities, axis)
    # Once a teacher is taken out of `logits`, the class axis is one further to the front.
    weighted = [
        softmax(teacher, axis - 1, temperature=temperature).log_probabilities + log_weight
        for teacher, log_weight in zip(logits, log_weights, strict=True)
    ]
    averaged = log_add_exp(*weighted)
    # A traced temperature times −inf would have a NaN gradient.
    possible = averaged != -jnp.inf
    return jnp.where(possible, temperature * jnp.where(possible, averaged, 0), -jnp.inf)


def weighted_sum(terms: Sequence[ArrayLike], *, weights: ArrayLike | Sequence[float]) -> Array:
    """Adds up losses with weights, such as those of several teachers or of several kinds.

    Σ_k w_k L_k

    `losses.weighted_sum([large_loss, medium_loss], weights=(0.7, 0.3))` learns from two teachers.
    The weights are not normalised: those of different kinds of losses need not add up to 1.

    Args:
        terms: K arrays of one shape `[...]`, floating-point, each with one value per example.
        weights: w, `[K]`, or one for each term and example `[K, ...]`, such as the result of
            `teacher_weights`. A term of weight 0 for all examples is left out with its gradient. A
            term of weight 0 for some examples, or of a traced weight 0, adds nothing to the sum,
            but its own gradient must be finite: mask its inputs.

    Returns:
        One value per example `[...]`, in float32 or wider.

    Raises:
        ValueError: If the terms' shapes differ or the weights' shape is neither `[K]` nor
            `[K, ...]`.
        TypeError: If a term is not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> terms = [jnp.array([1.0, 2.0]), jnp.array([3.0, 0.0])]
        >>> print(losses.weighted_sum(terms, weights=(0.7, 0.3)))
        [1.6 1.4]

    References:
        You et al., Learning from Multiple Teacher Networks, https://doi.org/10.1145/3097983.3098135
    """
    shapes = [jnp.shape(term) for term in terms]
    check_shape(
        len(set(shapes)) == 1,
        f"the terms of a sum must have the same shape, one value per example; got {shapes}",
    )
    widened = [upcast("a term", term) for term in terms]
    dtype = widest_dtype(*widened)
    known_weights = untraced(weights)
    weights = _expand_weights(jnp.asarray(known_weights, dtype), (len(widened), *shapes[0]))
    if not isinstance(known_weights, jax.core.Tracer):
        # Zeros in place of a term without weight, so that nothing is differentiated through it: a
        # gradient of 0 times a NaN inside of the term would be NaN.
        used = known_weights.reshape(len(widened), -1).any(1)
        widened = [t if u else jnp.zeros_like(t) for t, u in zip(widened, used, strict=True)]
    stacked = jnp.stack([term.astype(dtype) for term in widened])
    # A term of weight 0 is left out even where it is infinite, where 0 · inf would be NaN.
    return weigh(weights, stacked).sum(0)


def teacher_weights(teacher_logits: ArrayLike, labels: ArrayLike) -> Array:
    """Computes each teacher's weight for each example from its cross-entropy with the label.

    w_k = (1 − exp(CE_k) / Σ_j exp(CE_j)) / (K − 1)

    Pass the result to `weighted_sum` or `ensemble_logits`. A single teacher has weight 1.

    Args:
        teacher_logits: `[K, ..., C]`, floating-point.
        labels: `[...]`, integers in [0, C).

    Returns:
        Weights `[K, ...]`, at least 0, with sum 1 over the teachers.

    Raises:
        ValueError: If shapes disagree.
        TypeError: If the logits are not floating-point or the labels are not integers.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> teachers = jnp.log(jnp.array([[[0.8, 0.2]], [[0.4, 0.6]]]))
        >>> print(losses.teacher_weights(teachers, jnp.array([0])))
        [[0.667]
         [0.333]]

    References:
        Zhang et al., Confidence-Aware Multi-Teacher Knowledge Distillation,
        https://arxiv.org/abs/2201.00007
    """
    logits = check_logits("teacher_logits", teacher_logits)
    check_shape(logits.ndim >= 2, f"teacher_logits must be [K, ..., C], got {logits.shape}")
    if logits.shape[0] == 1:
        return jnp.ones_like(hard_cross_entropy(logits[0], labels))[None]
    entropies = jnp.stack([hard_cross_entropy(teacher, labels) for teacher in logits])
    # A teacher that rules the label out, with infinite cross-entropy, gets weight 0 instead of NaN.
    entropies = jnp.minimum(entropies, jnp.finfo(entropies.dtype).max)
    return (1 - jax.nn.softmax(entropies, axis=0)) / (logits.shape[0] - 1)


def example_weights(
    student_logits: ArrayLike, teacher_logits: ArrayLike, labels: ArrayLike
) -> Array:
    """Computes weights for soft targets, larger where the student is worse than the teacher.

    1 − exp(−CE(label, s) / CE(label, t))

    Multiply a soft loss by the weights, as the paper does with `soft_cross_entropy`, and stop their
    gradient (`jax.lax.stop_gradient`): the weights themselves are not to be minimised.

    Args:
        student_logits: `[..., C]`, floating-point.
        teacher_logits: The same shape.
        labels: `[...]`, integers in [0, C).

    Returns:
        Weights `[...]` in [0, 1]; 1 where the teacher's cross-entropy is 0, and 0 where it is
        infinite.

    Raises:
        ValueError: If shapes disagree.
        TypeError: If the logits are not floating-point or the labels are not integers.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student = jnp.log(jnp.array([[0.25, 0.75]]))
        >>> teacher = jnp.log(jnp.array([[0.5, 0.5]]))
        >>> print(losses.example_weights(student, teacher, jnp.array([0])))
        [0.865]

    References:
        Zhou et al., Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff
        Perspective, https://arxiv.org/abs/2102.00650
    """
    student, teacher = check_logits_pair(student_logits, teacher_logits)
    student_entropy = hard_cross_entropy(student, labels)
    teacher_entropy = hard_cross_entropy(teacher, labels)
    # At 0 the quotient is undefined, and at infinity it would be NaN for an infinite student.
    regular = (teacher_entropy != 0) & (teacher_entropy != jnp.inf)
    weights = -jnp.expm1(-student_entropy / jnp.where(regular, teacher_entropy, 1))
    return jnp.where(regular, weights, jnp.where(teacher_entropy == 0, 1, 0))


def _expand_weights(weights: Array, shape: tuple[int, ...]) -> Array:
    """Broadcasts weights `[K]` or `[K, ...]` to `[K, ...]`."""
    check_shape(
        weights.shape in (shape[:1], shape),
        f"weights {weights.shape} must have one entry for each of the {shape[0]}, or one for each "
        f"and example {shape}",
    )
    return jnp.broadcast_to(
        weights.reshape(weights.shape + (1,) * (len(shape) - weights.ndim)), shape
    )
