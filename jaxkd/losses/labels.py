"""Losses on integer labels, alone or together with a teacher's logits.

Sums run over the classes only; the caller averages over the examples. `decoupled_loss` (DKD) and
`normalized_loss` (NKD) treat the true class apart from the other classes.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxkd.losses._arrays import (
    check_fraction,
    check_mask,
    check_shape,
    check_term_weight,
    check_weights,
    exclude_unused,
    untraced,
    weigh,
    zero_masked,
)
from jaxkd.losses._labels import non_target_mask, take_at_labels, target_against_rest
from jaxkd.losses._softmax import (
    check_labels,
    check_logits,
    check_logits_pair,
    divergence,
    expectation,
    soften,
    softmax,
)
from jaxkd.losses.logits import soft_cross_entropy


def hard_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Computes the cross-entropy with integer labels.

    −w_label log softmax(z)_label

    Args:
        logits: `[..., C]`, floating-point.
        labels: `[...]`, integers in [0, C).
        weights: w, at least 0, one for each class `[C]`; by default all 1. An example whose class
            has weight 0 is left out: its logits affect neither value nor gradient. PyTorch's
            `weight` with a mean also divides by the sum of the weights of the batch's labels.
        where: Booleans `[...]`, the examples that count (True), such as `labels != -100`; the
            others are 0, whatever their logits and labels.

    Returns:
        One value per example `[...]`, in float32 or wider; NaN where the label of an example that
        counts is out of range.

    Raises:
        ValueError: If the labels' shape is not that of the logits without their last axis, a weight
            is negative, there is not one weight for each class, or `where` is not one boolean for
            each example.
        TypeError: If the logits are not floating-point, the labels are not integers or `where` is
            not boolean.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> print(losses.hard_cross_entropy(jnp.array([[2.0, 1.0, 0.1]]), jnp.array([0])))
        [0.417]
    """
    logits = check_logits("logits", logits)
    labels = check_labels(labels, logits.shape)
    if where is not None:
        where = check_mask("example", where, labels.shape)
        logits, labels = zero_masked(where, logits), zero_masked(where, labels)
    if weights is None:
        values = -take_at_labels(softmax(logits).log_probabilities, labels)
    else:
        weights = check_weights("classes", weights, logits.dtype)
        check_shape(
            weights.shape == logits.shape[-1:],
            f"weights {weights.shape} must have one entry for each class, {logits.shape[-1:]}; "
            "to weight examples, multiply the result",
        )
        # A label out of range has no weight. 1 keeps the NaN of its value, where 0 would hide it.
        in_range = (labels >= 0) & (labels < logits.shape[-1])
        weights = jnp.where(in_range, jnp.take(weights, labels, mode="clip"), 1)
        (logits,) = exclude_unused(weights != 0, logits)
        values = weigh(weights, -take_at_labels(softmax(logits).log_probabilities, labels))
    return values if where is None else zero_masked(where, values)


def label_smoothing_loss(
    logits: ArrayLike, labels: ArrayLike, *, smoothing: ArrayLike = 0.1
) -> Array:
    """Computes the cross-entropy with labels that are mixed with the uniform distribution.

    (1 − ε) CE(label, z) + ε CE(uniform, z)

    It equals `distillation_loss` with α = ε, T = 1 and a teacher with uniform probabilities; the
    paper calls this a virtual teacher. PyTorch's `label_smoothing` is the same.

    Args:
        logits: `[..., C]`, finite, floating-point.
        labels: `[...]`, integers in [0, C).
        smoothing: ε in [0, 1], a scalar; 0.1 in the paper that introduced it.

    Returns:
        One value per example `[...]`, in float32 or wider.

    Raises:
        ValueError: If shapes disagree or `smoothing` is not in [0, 1].
        TypeError: If the logits are not floating-point or the labels are not integers.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> logits = jnp.array([[2.0, 1.0, 0.1]])
        >>> print(losses.label_smoothing_loss(logits, jnp.array([0]), smoothing=0.1))
        [0.514]

    References:
        Szegedy et al., Rethinking the Inception Architecture for Computer Vision,
        https://arxiv.org/abs/1512.00567
        Yuan et al., Revisiting Knowledge Distillation via Label Smoothing Regularization,
        https://arxiv.org/abs/1909.11723
    """
    smoothing = check_fraction("smoothing", smoothing)
    logits = check_logits("logits", logits)
    smoothing = jnp.asarray(smoothing, logits.dtype)
    hard = hard_cross_entropy(logits, labels)
    uniform = -softmax(logits).log_probabilities.mean(-1)
    # At ε = 0 a class may be at −inf, and at ε = 1 a label may be a placeholder.
    return weigh(1 - smoothing, hard) + weigh(smoothing, uniform)


def virtual_teacher_logits(labels: ArrayLike, *, num_classes: int, correct: ArrayLike) -> Array:
    """Makes the logits of a teacher that gives a fixed probability to the true class.

    log a at the label, log((1 − a) / (C − 1)) elsewhere

    All other classes get the same probability. With `kl_divergence` at a high temperature (the
    paper takes a ≥ 0.9 and T = 20 or more) it is the paper's teacher-free distillation.

    Args:
        labels: `[...]`, integers in [0, C).
        num_classes: C, at least 2.
        correct: a, the probability of the true class, in (1 / C, 1), a scalar.

    Returns:
        Logits `[..., C]`, float32; NaN where a label is no class, or a traced `correct` is out of
        range.

    Raises:
        ValueError: If there are fewer than two classes or `correct` is not in (1 / C, 1).
        TypeError: If the labels are not integers.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd import losses
        >>> logits = losses.virtual_teacher_logits(jnp.array([1]), num_classes=3, correct=0.9)
        >>> print(jax.nn.softmax(logits))
        [[0.05 0.9  0.05]]

    References:
        Yuan et al., Revisiting Knowledge Distillation via Label Smoothing Regularization,
        https://arxiv.org/abs/1909.11723
    """
    check_shape(
        num_classes >= 2,
        f"a virtual teacher needs at least two classes, got num_classes={num_classes}",
    )
    correct = check_fraction("correct", correct, inclusive=False)
    if not isinstance(correct, jax.core.Tracer) and num_classes * np.asarray(correct) <= 1:
        raise ValueError(
            f"correct must be above 1 / num_classes = {1 / num_classes:.3g}, got {correct}: at or "
            "below chance the teacher does not prefer the true class; the paper takes 0.9 or more"
        )
    labels = check_labels(labels, (*jnp.shape(labels), num_classes))
    correct = jnp.asarray(correct, jnp.float32)
    correct = jnp.where(num_classes * correct > 1, correct, jnp.nan)
    incorrect_logit = jnp.log1p(-correct) - jnp.log(jnp.float32(num_classes - 1))
    is_label = jax.nn.one_hot(labels, num_classes, dtype=bool)
    logits = jnp.where(is_label, jnp.log(correct), incorrect_logit)
    return jnp.where(is_label.any(-1, keepdims=True), logits, jnp.nan)


def distillation_loss(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    labels: ArrayLike,
    *,
    temperature: ArrayLike = 2.0,
    alpha: ArrayLike = 0.5,
) -> Array:
    """Mixes the cross-entropy with softened teacher targets and that with the true labels.

    α T² CE(softmax(t / T), softmax(s / T)) + (1 − α) CE(label, s)

    `alpha` is the weight of the soft term, as in the classic scripts after Hinton's paper; Keras'
    example and torchdistill use the name for the weight of the hard term.

    Args:
        student_logits: `[..., C]`, floating-point.
        teacher_logits: The same shape.
        labels: `[...]`, integers in [0, C); any integer, such as −100, where `alpha` is 1.
        temperature: T > 0, a scalar.
        alpha: Weight of the soft term in [0, 1]; a number, or one per example `[...]`, such as 1
            where the label is unknown. Where it is 0, the teacher's logits have no effect, even if
            they are NaN.

    Returns:
        One value per example `[...]`, in float32 or wider; NaN if a traced temperature or `alpha`
        is out of range.

    Raises:
        ValueError: If shapes disagree, the temperature is not a positive scalar or `alpha` is not
            in [0, 1].
        TypeError: If the logits are not floating-point or the labels are not integers.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student, teacher = jnp.array([[2.0, 1.0, 0.1]]), jnp.array([[3.0, 1.0, 0.2]])
        >>> labels = jnp.array([0])
        >>> print(losses.distillation_loss(student, teacher, labels, temperature=2.0, alpha=0.5))
        [2.106]

    References:
        Hinton et al., Distilling the Knowledge in a Neural Network, https://arxiv.org/abs/1503.02531
    """
    student, teacher = check_logits_pair(student_logits, teacher_logits)
    labels = check_labels(labels, student.shape)
    alpha = check_fraction("alpha", alpha, scalar=False)
    weight = check_term_weight("alpha", alpha, labels.shape, student.dtype)
    # At α = 0 the teacher's logits may be NaN, and the student may rule out classes that the
    # teacher does not. At α = 1 the label may be a placeholder, even a class that is ruled out.
    known_alpha = untraced(alpha)
    soft_inputs = exclude_unused(known_alpha > 0, student, teacher)
    soft = soft_cross_entropy(*soft_inputs, temperature=temperature)
    hard = hard_cross_entropy(*exclude_unused(known_alpha < 1, student, labels))
    return weigh(weight, soft) + weigh(1 - weight, hard)


def decoupled_loss(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    labels: ArrayLike,
    *,
    temperature: ArrayLike = 2.0,
    target_weight: ArrayLike = 1.0,
    non_target_weight: ArrayLike,
) -> Array:
    """Computes decoupled distillation (DKD), which weights target and other classes separately.

    T² (α KL(b_t ‖ b_s) + β KL(r_t ‖ r_s)), where b = (p_label, 1 − p_label) and r is the softmax
    over the other classes

    With β = 1 − p_label of the teacher it would be `kl_divergence`. It is computed in log space:
    the paper's code masks the true class by subtracting 1000 from its logit, which fails for logits
    that far apart.

    Args:
        student_logits: `[..., C]`, floating-point.
        teacher_logits: The same shape. A class at −inf contributes nothing.
        labels: `[...]`, integers in [0, C).
        temperature: T > 0, a scalar; the paper takes 4 on CIFAR-100 and 1 on ImageNet.
        target_weight: α, a number or one per example; 1 in the paper.
        non_target_weight: β, a number or one per example; from 0.5 to 8 in the paper, 8 for most
            pairs on CIFAR-100. An example of weight 0 in a term has no effect on it.

    Returns:
        One value per example `[...]`, in float32 or wider. With two classes the second term is 0.

    Raises:
        ValueError: If shapes disagree or the temperature is not a positive scalar.
        TypeError: If the logits are not floating-point or the labels are not integers.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student, teacher = jnp.array([[2.0, 1.0, 0.1]]), jnp.array([[3.0, 1.0, 0.2]])
        >>> print(losses.decoupled_loss(
        ...     student, teacher, jnp.array([0]), temperature=4.0, non_target_weight=8.0
        ... ))
        [0.123]

    References:
        Zhao et al., Decoupled Knowledge Distillation, https://arxiv.org/abs/2203.08679
    """
    student, teacher = check_logits_pair(student_logits, teacher_logits)
    labels = check_labels(labels, student.shape)

    def weighted(name: str, weight: ArrayLike, term: Callable[..., Array]) -> Array:
        weights = check_term_weight(name, weight, labels.shape, student.dtype)
        inputs = exclude_unused(untraced(weight) != 0, student, teacher, labels)
        return weigh(weights, term(*inputs, temperature))

    total = weighted("target_weight", target_weight, _target_term)
    total += weighted("non_target_weight", non_target_weight, _non_target_term)
    return jnp.square(jnp.asarray(temperature, student.dtype)) * total


def normalized_loss(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    labels: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    gamma: ArrayLike = 1.5,
) -> Array:
    """Computes normalised distillation (NKD) of the true class and of the renormalised others.

    −p_label log q_label − γ T² Σ_{c ≠ label} r_t(c) log r_s(c)

    p and q are the softmax of teacher and student at T = 1; r is the softmax over the classes other
    than the label, at T. The paper adds `hard_cross_entropy` to it.

    Args:
        student_logits: `[..., C]`, floating-point.
        teacher_logits: The same shape. A class at −inf contributes nothing.
        labels: `[...]`, integers in [0, C).
        temperature: T > 0 of the other classes, a scalar; 1 in the paper.
        gamma: γ, a number or one per example; 1.5 in the paper.

    Returns:
        One value per example `[...]`, in float32 or wider. It is a cross-entropy, so that its
        minimum is not 0: it contains the teacher's entropy over the other classes.

    Raises:
        ValueError: If shapes disagree or the temperature is not a positive scalar.
        TypeError: If the logits are not floating-point or the labels are not integers.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student, teacher = jnp.array([[2.0, 1.0, 0.1]]), jnp.array([[3.0, 1.0, 0.2]])
        >>> print(losses.normalized_loss(student, teacher, jnp.array([0])))
        [1.279]

    References:
        Yang et al., From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach
        with Normalized Loss and Customized Soft Labels, https://arxiv.org/abs/2303.13005
    """
    student, teacher = check_logits_pair(student_logits, teacher_logits)
    labels = check_labels(labels, student.shape)
    non_target = non_target_mask(labels, student.shape[-1])
    teacher_confidence = take_at_labels(softmax(teacher).probabilities, labels)
    student_log = take_at_labels(softmax(student).log_probabilities, labels)
    # Through `expectation`, since the student may rule the label out where the confidence is 0.
    target_term = expectation(teacher_confidence[..., None], student_log[..., None])
    weights = check_term_weight("gamma", gamma, target_term.shape, target_term.dtype)
    student, teacher = exclude_unused(untraced(gamma) != 0, student, teacher)
    student, teacher, scale = soften(student, teacher, temperature, where=non_target)
    non_target_term = expectation(teacher.probabilities, student.log_probabilities)
    return -target_term - weigh(weights * scale, non_target_term)


def _target_term(student: Array, teacher: Array, labels: Array, temperature: ArrayLike) -> Array:
    softened_student, softened_teacher, _ = soften(student, teacher, temperature)
    return divergence(
        target_against_rest(softened_teacher.log_probabilities, labels),
        target_against_rest(softened_student.log_probabilities, labels),
    )


def _non_target_term(
    student: Array, teacher: Array, labels: Array, temperature: ArrayLike
) -> Array:
    softened_student, softened_teacher, _ = soften(student, teacher, temperature)
    non_target = non_target_mask(labels, student.shape[-1])
    # A softmax of log-probabilities over fewer classes is the softmax of the logits over them.
    return divergence(
        softmax(softened_teacher.log_probabilities, where=non_target),
        softmax(softened_student.log_probabilities, where=non_target),
    )
