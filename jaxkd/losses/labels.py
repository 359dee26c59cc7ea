"""What a student learns from labels, alone or beside a teacher's logits.

Sums run over classes and over nothing else; the caller averages over examples. DKD and NKD treat the true class and the
others apart.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxkd.losses._arrays import check_shape, check_share, check_weight
from jaxkd.losses._softmax import (
    Softmax,
    check_labels,
    divergence,
    expectation,
    log_sum_exp,
    logits_of,
    logits_pair,
    soften,
    softmax,
)
from jaxkd.losses.logits import soft_cross_entropy


def hard_cross_entropy(logits: ArrayLike, labels: ArrayLike, *, weights: ArrayLike | None = None) -> Array:
    """Cross-entropy with integer classes.

    −w_label log softmax(z)_label

    Args:
        logits: `[..., C]`, floating-point.
        labels: `[...]`, integers in [0, C).
        weights: w, one for each class `[C]`; all 1 if not given. PyTorch's `weight` with a mean also divides by the sum
            of the weights that the batch's labels have.

    Returns:
        One value per example `[...]`, in float32 or wider; NaN where a label is out of range.

    Raises:
        ValueError: If the labels' shape is not that of the logits without their last axis, or there is not one weight
            for each class.
        TypeError: If the logits are not floating-point or the labels are not integers.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> print(losses.hard_cross_entropy(jnp.array([[2.0, 1.0, 0.1]]), jnp.array([0])))
        [0.417]
    """
    logits = logits_of("logits", logits)
    labels = check_labels(labels, logits.shape)
    value = -_at(softmax(logits).logs, labels)
    if weights is None:
        return value
    weights = jnp.asarray(weights, value.dtype)
    check_shape(
        weights.shape == logits.shape[-1:],
        f"weights {weights.shape} must have one entry for each class, {logits.shape[-1:]}; "
        "weights of examples multiply the result",
    )
    weights = jnp.take(weights, labels, mode="clip")
    return weights * jnp.where(weights != 0, value, 0)


def label_smoothing_loss(logits: ArrayLike, labels: ArrayLike, *, smoothing: ArrayLike) -> Array:
    """Cross-entropy with labels of which a share is spread evenly over all classes.

    (1 − ε) CE(label, z) + ε CE(uniform, z)

    It is `distillation_loss` with ε for α, T = 1 and a teacher that holds all classes alike, which is how the paper
    reads it: a virtual teacher. PyTorch's `label_smoothing` is the same.

    Args:
        logits: `[..., C]`, finite, floating-point.
        labels: `[...]`, integers in [0, C).
        smoothing: ε in [0, 1], a scalar.

    Returns:
        One value per example `[...]`, in float32 or wider.

    Raises:
        ValueError: If shapes disagree or `smoothing` leaves [0, 1].
        TypeError: If the logits are not floating-point or the labels are not integers.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> print(losses.label_smoothing_loss(jnp.array([[2.0, 1.0, 0.1]]), jnp.array([0]), smoothing=0.1))
        [0.514]

    References:
        Yuan et al., Revisiting Knowledge Distillation via Label Smoothing Regularization,
        https://arxiv.org/abs/1909.11723
    """
    check_share("smoothing", smoothing)
    logits = logits_of("logits", logits)
    smoothing = jnp.asarray(smoothing, logits.dtype)
    return (1 - smoothing) * hard_cross_entropy(logits, labels) - smoothing * softmax(logits).logs.mean(-1)


def virtual_teacher_logits(labels: ArrayLike, *, num_classes: int, correct: ArrayLike) -> Array:
    """Logits of a teacher made by hand, who is right with a given probability and holds all other classes alike.

    log a at the label, log((1 − a) / (C − 1)) elsewhere

    With `kl_divergence` at a high temperature (the paper takes a ≥ 0.9 and T = 20 or more) it is the paper's
    teacher-free distillation.

    Args:
        labels: `[...]`, integers in [0, C).
        num_classes: C, at least 2.
        correct: a, the probability of the true class, in (0, 1), a scalar.

    Returns:
        Logits `[..., C]`, float32.

    Raises:
        ValueError: If there are fewer than two classes or `correct` is not in (0, 1).
        TypeError: If the labels are not integers.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd import losses
        >>> print(jax.nn.softmax(losses.virtual_teacher_logits(jnp.array([1]), num_classes=3, correct=0.9)))
        [[0.05 0.9  0.05]]

    References:
        Yuan et al., Revisiting Knowledge Distillation via Label Smoothing Regularization,
        https://arxiv.org/abs/1909.11723
    """
    check_shape(num_classes >= 2, f"a virtual teacher needs two classes to choose from, got num_classes={num_classes}")
    check_share("correct", correct, ends=False)
    labels = check_labels(labels, (*jnp.shape(labels), num_classes))
    correct = jnp.asarray(correct, jnp.float32)
    others = jnp.log1p(-correct) - jnp.log(jnp.float32(num_classes - 1))
    return jnp.where(jax.nn.one_hot(labels, num_classes, dtype=bool), jnp.log(correct), others)


def distillation_loss(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    labels: ArrayLike,
    *,
    temperature: ArrayLike = 2.0,
    alpha: ArrayLike = 0.5,
) -> Array:
    """The teacher's softened targets and the true labels, mixed.

    α T² CE(softmax(t / T), softmax(s / T)) + (1 − α) CE(label, s)

    `alpha` is the weight of the soft term, as in Hinton's paper read by the classic scripts; Keras' example and
    torchdistill give that name to the weight of the hard term.

    Args:
        student_logits: `[..., C]`, floating-point.
        teacher_logits: The same shape.
        labels: `[...]`, integers in [0, C), also where `alpha` is 1.
        temperature: T > 0, a scalar.
        alpha: Weight of the soft term in [0, 1]; a number, or one per example `[...]`, such as 1 where the
            label is unknown.

    Returns:
        One value per example `[...]`, in float32 or wider.

    Raises:
        ValueError: If shapes disagree, the temperature is not a positive scalar or `alpha` leaves [0, 1].
        TypeError: If the logits are not floating-point or the labels are not integers.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student, teacher = jnp.array([[2.0, 1.0, 0.1]]), jnp.array([[3.0, 1.0, 0.2]])
        >>> print(losses.distillation_loss(student, teacher, jnp.array([0]), temperature=2.0, alpha=0.5))
        [2.106]

    References:
        Hinton et al., Distilling the Knowledge in a Neural Network, https://arxiv.org/abs/1503.02531
    """
    student, teacher = logits_pair(student_logits, teacher_logits)
    soft = soft_cross_entropy(student, teacher, temperature=temperature)
    hard = hard_cross_entropy(student, labels)
    # Before it becomes an array: inside jit every array is a tracer, whose value is not known.
    if not isinstance(alpha, jax.core.Tracer) and not np.all((np.asarray(alpha) >= 0) & (np.asarray(alpha) <= 1)):
        raise ValueError(f"alpha is the weight of the soft term and must lie in [0, 1], got {alpha}")
    alpha = check_weight("alpha", alpha, soft.shape, soft.dtype)
    # Where alpha is 1 the label may be a placeholder, even of a class that is ruled out, at an infinite loss; where it
    # is 0 the teacher need not be there.
    return alpha * jnp.where(alpha > 0, soft, 0) + (1 - alpha) * jnp.where(alpha < 1, hard, 0)


def decoupled_loss(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    labels: ArrayLike,
    *,
    temperature: ArrayLike,
    target_weight: ArrayLike = 1.0,
    non_target_weight: ArrayLike,
) -> Array:
    """Decoupled distillation, DKD: the true class against the rest, and the rest among themselves, each weighted.

    T² (α KL(b_t ‖ b_s) + β KL(r_t ‖ r_s)), where b = (p_label, 1 − p_label) and r is the softmax over the other classes

    With β = 1 − p_label of the teacher it would be `kl_divergence`. Computed in log space: the paper's code masks the
    true class by subtracting 1000 from its logit, which fails for logits that far apart.

    Args:
        student_logits: `[..., C]`, floating-point.
        teacher_logits: The same shape. A class at −inf contributes nothing.
        labels: `[...]`, integers in [0, C).
        temperature: T > 0, a scalar; the paper takes 4 on CIFAR-100 and 1 on ImageNet.
        target_weight: α, a number or one per example; 1 in the paper.
        non_target_weight: β, likewise; from 0.5 to 8 in the paper, 8 for most pairs on CIFAR-100.

    Returns:
        One value per example `[...]`, in float32 or wider. With two classes only the first term is left.

    Raises:
        ValueError: If shapes disagree or the temperature is not a positive scalar.
        TypeError: If the logits are not floating-point or the labels are not integers.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student, teacher = jnp.array([[2.0, 1.0, 0.1]]), jnp.array([[3.0, 1.0, 0.2]])
        >>> print(losses.decoupled_loss(student, teacher, jnp.array([0]), temperature=4.0, non_target_weight=8.0))
        [0.123]

    References:
        Zhao et al., Decoupled Knowledge Distillation, https://arxiv.org/abs/2203.08679
    """
    student, teacher, scale = soften(student_logits, teacher_logits, temperature)
    labels = check_labels(labels, student.logs.shape)
    others = _others(labels, student.logs.shape[-1])
    target = divergence(_binary(teacher.logs, labels, others), _binary(student.logs, labels, others))
    non_target = divergence(softmax(teacher.logs, where=others), softmax(student.logs, where=others))
    target_weight = check_weight("target_weight", target_weight, target.shape, target.dtype)
    non_target_weight = check_weight("non_target_weight", non_target_weight, target.shape, target.dtype)
    return scale * (target_weight * target + non_target_weight * non_target)


def normalized_loss(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    labels: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    gamma: ArrayLike = 1.5,
) -> Array:
    """Normalised distillation, NKD: the teacher's trust in the true class, and the other classes normalised.

    −p_label log q_label − γ T² Σ_{c ≠ label} r_t(c) log r_s(c)

    p and q are the softmax of teacher and student at T = 1, r that over the classes other than the label, at T. The
    paper adds `hard_cross_entropy` to it.

    Args:
        student_logits: `[..., C]`, floating-point.
        teacher_logits: The same shape. A class at −inf contributes nothing.
        labels: `[...]`, integers in [0, C).
        temperature: T > 0 of the other classes, a scalar; 1 in the paper.
        gamma: γ, a number or one per example; 1.5 in the paper.

    Returns:
        One value per example `[...]`, in float32 or wider. It is a cross-entropy: at its least, where the student is
        right and sure, it still holds the teacher's entropy over the other classes.

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
        Yang et al., From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss
        and Customized Soft Labels, https://arxiv.org/abs/2303.13005
    """
    student, teacher = logits_pair(student_logits, teacher_logits)
    labels = check_labels(labels, student.shape)
    others = _others(labels, student.shape[-1])
    trust, own = _at(softmax(teacher).probabilities, labels), _at(softmax(student).logs, labels)
    target = expectation(trust[..., None], own[..., None])
    student, teacher, scale = soften(student, teacher, temperature, where=others)
    gamma = check_weight("gamma", gamma, target.shape, target.dtype)
    return -target - gamma * scale * expectation(teacher.probabilities, student.logs)


def _at(values: Array, labels: Array) -> Array:
    """The values at the labels; NaN, rather than another class's, where a label is out of range."""
    in_range = jnp.where(labels < 0, values.shape[-1], labels)
    return jnp.take_along_axis(values, in_range[..., None], -1, mode="fill", fill_value=jnp.nan)[..., 0]


def _others(labels: Array, num_classes: int) -> Array:
    """The classes `[..., C]` that are not the label."""
    return ~jax.nn.one_hot(labels, num_classes, dtype=bool)


def _binary(log_probabilities: Array, labels: Array, others: Array) -> Softmax:
    """The distribution `[..., 2]` of the true class and of all others together."""
    together = log_sum_exp(jnp.where(others, log_probabilities, -jnp.inf))
    logs = jnp.stack([_at(log_probabilities, labels), together], -1)
    return Softmax(jnp.exp(logs), logs)
