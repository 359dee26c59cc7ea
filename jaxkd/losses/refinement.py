"""Losses that correct the teacher by the labels, or compare predictions on several levels."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxkd.losses._arrays import check_shape, check_term_weight, gram_matrix
from jaxkd.losses._labels import take_at_labels, target_against_rest
from jaxkd.losses._softmax import (
    check_labels,
    check_logits_pair,
    divergence,
    soften,
    softmax,
)
from jaxkd.losses.logits import kl_divergence


def refined_logits_loss(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    labels: ArrayLike,
    *,
    temperature: ArrayLike = 2.0,
    correlation_weight: ArrayLike,
) -> Array:
    """Computes distillation without what a teacher gets wrong (refined logits, RLD).

    T² (KL((max p, 1 − max p) ‖ (q_label, 1 − q_label)) + β KL(p' ‖ q')), where p' and q' are the
    softmax over the classes of which the teacher's logit is below that of the label

    The first term gives the true class the confidence that the teacher has in its own choice. The
    second one compares only classes that the teacher ranks below the true one. It is 0 where there
    is none. The paper adds the cross-entropy with the labels; its code may take another temperature
    for the first term.

    Args:
        student_logits: `[..., C]`, finite, floating-point.
        teacher_logits: The same shape.
        labels: `[...]`, integers in [0, C).
        temperature: T > 0, a scalar.
        correlation_weight: β, a scalar or one weight per example.

    Returns:
        One value per example `[...]`, in float32 or wider; NaN where a label is out of range.

    Raises:
        ValueError: If shapes disagree or the temperature is not a positive scalar.
        TypeError: If the logits are not floating-point or the labels are not integers.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student, teacher = jnp.array([[1.0, 2.0, 0.0]]), jnp.array([[3.0, 1.0, 0.0]])
        >>> labels = jnp.array([1])  # the teacher is wrong
        >>> print(losses.refined_logits_loss(student, teacher, labels, correlation_weight=8.0))
        [0.121]

    References:
        Sun et al., Knowledge Distillation with Refined Logits, https://arxiv.org/abs/2408.07703
    """
    student, teacher = check_logits_pair(student_logits, teacher_logits)
    labels = check_labels(labels, student.shape)
    weight = check_term_weight(
        "correlation_weight", correlation_weight, labels.shape, student.dtype
    )
    softened_student, softened_teacher, scale = soften(student, teacher, temperature)
    student_logs = softened_student.log_probabilities
    teacher_logs = softened_teacher.log_probabilities
    top = jnp.argmax(teacher, -1)
    confidence = divergence(
        target_against_rest(teacher_logs, top), target_against_rest(student_logs, labels)
    )
    below = teacher < take_at_labels(teacher, labels)[..., None]
    # A softmax of log-probabilities over fewer classes is the softmax of the logits over them.
    correlation = divergence(softmax(teacher_logs, where=below), softmax(student_logs, where=below))
    return scale * (confidence + weight * correlation)


def batch_correlation_loss(
    student_logits: ArrayLike, teacher_logits: ArrayLike, *, temperature: ArrayLike = 2.0
) -> Array:
    """Compares how similar the predictions of each pair of examples are (batch level of MLKD).

    Σ_j (p_i · p_j − q_i · q_j)² with p = softmax(t / T), q = softmax(s / T)

    There is no factor T², as in the authors' code.

    Args:
        student_logits: `[B, C]`, floating-point. A class at −inf has probability 0.
        teacher_logits: The same shape.
        temperature: T > 0, a scalar.

    Returns:
        One value per example `[B]`, in float32 or wider.

    Raises:
        ValueError: If the shapes differ or are not `[B, C]`, or the temperature is not a positive
            scalar.
        TypeError: If the logits are not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student = jnp.log(jnp.array([[0.5, 0.5], [0.5, 0.5]]))
        >>> teacher = jnp.log(jnp.array([[0.9, 0.1], [0.1, 0.9]]))
        >>> print(losses.batch_correlation_loss(student, teacher, temperature=1.0))
        [0.205 0.205]

    References:
        Jin et al., Multi-Level Logit Distillation, CVPR 2023,
        https://openaccess.thecvf.com/content/CVPR2023/html/Jin_Multi-Level_Logit_Distillation_CVPR_2023_paper.html
    """
    student, teacher = _soften_batch(student_logits, teacher_logits, temperature)
    return jnp.square(gram_matrix(teacher) - gram_matrix(student)).sum(1)


def class_correlation_loss(
    student_logits: ArrayLike, teacher_logits: ArrayLike, *, temperature: ArrayLike = 2.0
) -> Array:
    """Compares how often each pair of classes is predicted together (class level of MLKD).

    (1/C) Σ_ab (Σ_i p_ia p_ib − Σ_i q_ia q_ib)² with p = softmax(t / T), q = softmax(s / T)

    The sums run over the batch, so that the loss grows with its square. All examples have the same
    value. There is no factor T², as in the authors' code.

    Args:
        student_logits: `[B, C]`, floating-point. A class at −inf has probability 0.
        teacher_logits: The same shape.
        temperature: T > 0, a scalar.

    Returns:
        One value per example `[B]`, in float32 or wider.

    Raises:
        ValueError: If the shapes differ or are not `[B, C]`, or the temperature is not a positive
            scalar.
        TypeError: If the logits are not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student = jnp.log(jnp.array([[0.5, 0.5], [0.5, 0.5]]))
        >>> teacher = jnp.log(jnp.array([[0.9, 0.1], [0.1, 0.9]]))
        >>> print(losses.class_correlation_loss(student, teacher, temperature=1.0))
        [0.205 0.205]

    References:
        Jin et al., Multi-Level Logit Distillation, CVPR 2023,
        https://openaccess.thecvf.com/content/CVPR2023/html/Jin_Multi-Level_Logit_Distillation_CVPR_2023_paper.html
    """
    student, teacher = _soften_batch(student_logits, teacher_logits, temperature)
    gaps = gram_matrix(teacher.T) - gram_matrix(student.T)
    return jnp.broadcast_to(jnp.square(gaps).sum() / student.shape[1], student.shape[:1])


def multi_level_loss(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperatures: Sequence[ArrayLike] = (2.0, 3.0, 4.0, 5.0, 6.0),
) -> Array:
    """Sums divergences of examples, batch and classes over several temperatures (MLKD).

    Σ_T (KD_T + batch_T + class_T), with `kl_divergence`, `batch_correlation_loss` and
    `class_correlation_loss` at each temperature

    The paper adds the term of a weak and of a strong view of each image, and leaves examples out of
    the terms of the strong view of which the teacher is least sure. Its code has factors of its
    own for the three terms.

    Args:
        student_logits: `[B, C]`, floating-point.
        teacher_logits: The same shape.
        temperatures: The temperatures, each above 0.

    Returns:
        One value per example `[B]`, in float32 or wider.

    Raises:
        ValueError: If the shapes differ or are not `[B, C]`, there is no temperature, or one is not
            a positive scalar.
        TypeError: If the logits are not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student, teacher = jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 1.0]])
        >>> print(losses.multi_level_loss(student, teacher, temperatures=(2.0,)))
        [1.163]

    References:
        Jin et al., Multi-Level Logit Distillation, CVPR 2023,
        https://openaccess.thecvf.com/content/CVPR2023/html/Jin_Multi-Level_Logit_Distillation_CVPR_2023_paper.html
    """
    check_shape(len(temperatures) > 0, "there are no temperatures: pass at least one")
    terms = [
        loss(student_logits, teacher_logits, temperature=temperature)
        for temperature in temperatures
        for loss in (kl_divergence, batch_correlation_loss, class_correlation_loss)
    ]
    return jnp.stack(terms).sum(0)


def _soften_batch(
    student_logits: ArrayLike, teacher_logits: ArrayLike, temperature: ArrayLike
) -> tuple[Array, Array]:
    """Returns the softened probabilities `[B, C]` of student and teacher."""
    student, teacher, _ = soften(student_logits, teacher_logits, temperature)
    check_shape(
        student.probabilities.ndim == 2,
        f"logits must be [B, C], got {student.probabilities.shape}: reshape the others to examples",
    )
    return student.probabilities, teacher.probabilities
