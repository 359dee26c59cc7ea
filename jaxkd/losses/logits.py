"""Losses on logits: soft and hard cross-entropy, the Kullback–Leibler divergence, and their mixture.

Sums run over classes and over nothing else; the caller averages over examples. Logits of less than 32 bits are widened
first. A soft term carries its factor `temperature**2`, so that gradients keep their size as the temperature changes.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike


def temperature_softmax(logits: ArrayLike, *, temperature: ArrayLike, axis: int = -1) -> Array:
    """Class probabilities, softened by a temperature.

    softmax(z / T)

    Args:
        logits: `[..., C]`, floating-point. A class at −inf gets probability 0.
        temperature: T > 0, a scalar; the distribution tends to uniform as it grows.
        axis: The axis of the classes.

    Returns:
        Probabilities of the logits' shape, in float32 or wider.

    Raises:
        ValueError: If the temperature is not a positive scalar.
        TypeError: If the logits are not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> print(losses.temperature_softmax(jnp.array([2.0, 1.0, 0.1]), temperature=2.0))
        [0.502 0.304 0.194]

    References:
        Hinton et al., Distilling the Knowledge in a Neural Network, https://arxiv.org/abs/1503.02531
    """
    logits = _wide("logits", logits)
    return jnp.exp(_log_softmax(logits / _temperature(temperature, logits.dtype), axis))


def soft_cross_entropy(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: ArrayLike,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    """Cross-entropy of the student's softened distribution under the teacher's, times T².

    −T² Σ_c softmax(t / T)_c log softmax(s / T)_c

    It exceeds `kl_divergence` by T² times the teacher's entropy, which has no gradient in the student.

    Args:
        student_logits: `[..., C]`, floating-point.
        teacher_logits: The same shape. A class at −inf contributes nothing.
        temperature: T > 0, a scalar.
        axis: The axis of the classes.
        where: The classes that count (True), broadcast against the logits; the result is as if the others were sliced
            away, and 0 where none is left.

    Returns:
        One value per example: the logits' shape without `axis`, in float32 or wider.

    Raises:
        ValueError: If the shapes differ or the temperature is not a positive scalar.
        TypeError: If the logits are not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student, teacher = jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 1.0]])
        >>> print(losses.soft_cross_entropy(student, teacher, temperature=2.0))
        [3.358]

    References:
        Hinton et al., Distilling the Knowledge in a Neural Network, https://arxiv.org/abs/1503.02531
    """
    student_log, teacher_log, scale = _soften(student_logits, teacher_logits, temperature, axis, where)
    return -scale * _expectation(teacher_log, student_log, axis)


def kl_divergence(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: ArrayLike,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    """Kullback–Leibler divergence of the student's softened distribution from the teacher's, times T².

    T² Σ_c p_c (log p_c − log q_c) with p = softmax(t / T), q = softmax(s / T)

    As T grows it tends to half the squared distance of the centred logits, divided by the number of classes. PyTorch's
    `KLDivLoss` with `reduction="mean"` also divides by the number of classes; its `"batchmean"` is the mean of these
    values, T² apart.

    Args:
        student_logits: `[..., C]`, floating-point.
        teacher_logits: The same shape. A class at −inf contributes nothing.
        temperature: T > 0, a scalar.
        axis: The axis of the classes.
        where: The classes that count (True), broadcast against the logits; the result is as if the others were sliced
            away, and 0 where none is left.

    Returns:
        One value per example: the logits' shape without `axis`, in float32 or wider; infinite where the student rules
        out a class, by −inf, that the teacher does not.

    Raises:
        ValueError: If the shapes differ or the temperature is not a positive scalar.
        TypeError: If the logits are not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student, teacher = jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 1.0]])
        >>> print(losses.kl_divergence(student, teacher, temperature=2.0))
        [1.029]

    References:
        Hinton et al., Distilling the Knowledge in a Neural Network, https://arxiv.org/abs/1503.02531
    """
    student_log, teacher_log, scale = _soften(student_logits, teacher_logits, temperature, axis, where)
    return scale * _expectation(teacher_log, teacher_log - student_log, axis)


def hard_cross_entropy(logits: ArrayLike, labels: ArrayLike) -> Array:
    """Cross-entropy with integer classes.

    −log softmax(z)_label

    Args:
        logits: `[..., C]`, floating-point.
        labels: `[...]`, integers in [0, C).

    Returns:
        One value per example `[...]`, in float32 or wider; NaN where a label is out of range.

    Raises:
        ValueError: If the labels' shape is not that of the logits without their last axis.
        TypeError: If the logits are not floating-point or the labels are not integers.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> print(losses.hard_cross_entropy(jnp.array([[2.0, 1.0, 0.1]]), jnp.array([0])))
        [0.417]
    """
    logits, labels = _wide("logits", logits), jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be integers, got {labels.dtype}; for distributions there is soft_cross_entropy")
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels {labels.shape} must have the logits' shape {logits.shape} without its last axis, "
            f"{logits.shape[:-1]}"
        )
    in_range = jnp.where(labels < 0, logits.shape[-1], labels)
    chosen = jnp.take_along_axis(_log_softmax(logits, -1), in_range[..., None], -1, mode="fill", fill_value=jnp.nan)
    return -chosen[..., 0]


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
    soft = soft_cross_entropy(student_logits, teacher_logits, temperature=temperature)
    hard = hard_cross_entropy(student_logits, labels)
    # Before it becomes an array: inside jit every array is a tracer, whose value is not known.
    if not isinstance(alpha, jax.core.Tracer) and not np.all((np.asarray(alpha) >= 0) & (np.asarray(alpha) <= 1)):
        raise ValueError(f"alpha is the weight of the soft term and must lie in [0, 1], got {alpha}")
    alpha = jnp.asarray(alpha, soft.dtype)
    if alpha.shape not in ((), soft.shape):
        raise ValueError(f"alpha {alpha.shape} must be a scalar or one weight per example {soft.shape}")
    # Where alpha is 1 the label may be a placeholder, even of a class that is ruled out, at an infinite loss.
    return alpha * soft + (1 - alpha) * jnp.where(alpha < 1, hard, 0)


def _soften(
    student_logits: ArrayLike, teacher_logits: ArrayLike, temperature: ArrayLike, axis: int, where: ArrayLike | None
) -> tuple[Array, Array, Array]:
    """Log-probabilities of student and teacher at a temperature, and T²."""
    student, teacher = _wide("student_logits", student_logits), _wide("teacher_logits", teacher_logits)
    if student.shape != teacher.shape:
        raise ValueError(
            f"student_logits {student.shape} and teacher_logits {teacher.shape} must have one shape; "
            "slice or project the larger set of classes first"
        )
    dtype = max(student.dtype, teacher.dtype, key=lambda dtype: dtype.itemsize)
    temperature = _temperature(temperature, dtype)
    student, teacher = student.astype(dtype) / temperature, teacher.astype(dtype) / temperature
    return _log_softmax(student, axis, where), _log_softmax(teacher, axis, where), jnp.square(temperature)


def _expectation(log_probabilities: Array, values: Array, axis: int) -> Array:
    """Σ p · values in which a class of probability 0 counts for nothing, in the gradient too."""
    possible = log_probabilities > -jnp.inf
    values = jnp.where(possible, values, 0)
    return jnp.sum(jnp.where(possible, jnp.exp(log_probabilities), 0) * values, axis=axis)


def _log_softmax(logits: Array, axis: int, where: ArrayLike | None = None) -> Array:
    """Log-softmax that gives −inf, and no gradient, to classes that are at −inf or masked."""
    possible = logits > -jnp.inf
    if where is not None:
        possible &= jnp.broadcast_to(jnp.asarray(where, bool), logits.shape)
    # Masked before the arithmetic: a mask after it would stop NaN in the value but not in the gradient.
    finite = jnp.where(possible, logits, jnp.finfo(logits.dtype).min)
    shifted = jnp.where(possible, finite - jax.lax.stop_gradient(finite.max(axis, keepdims=True)), 0)
    total = jnp.where(possible, jnp.exp(shifted), 0).sum(axis, keepdims=True)
    return jnp.where(possible, shifted - jnp.log(jnp.where(total > 0, total, 1)), -jnp.inf)


def _wide(name: str, logits: ArrayLike) -> Array:
    logits = jnp.asarray(logits)
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating-point, got {logits.dtype}")
    if logits.ndim == 0:
        raise ValueError(f"{name} must have an axis of classes, got a scalar")
    return logits if logits.dtype == jnp.float64 else logits.astype(jnp.float32)


def _temperature(temperature: ArrayLike, dtype: jnp.dtype) -> Array:
    if jnp.ndim(temperature):
        raise ValueError(f"temperature must be a scalar, got shape {jnp.shape(temperature)}")
    # Before it becomes an array: inside jit every array is a tracer, whose value is not known.
    if not isinstance(temperature, jax.core.Tracer) and not np.asarray(temperature) > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    return jnp.asarray(temperature, dtype)
