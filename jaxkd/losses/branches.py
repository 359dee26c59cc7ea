"""A loss on the logits of exit branches, for teachers of another architecture (OFA-KD).

A branch of the student maps the features of a stage to logits, which share no architecture with the
teacher's features and can be compared with its logits.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxkd.losses._arrays import check_positive
from jaxkd.losses._softmax import check_labels, check_logits_pair, expectation, softmax


def enhanced_target_loss(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    labels: ArrayLike,
    *,
    exponent: ArrayLike,
    temperature: ArrayLike = 1.0,
) -> Array:
    """Computes the cross-entropy with teacher probabilities that an exponent modulates (OFA-KD).

    −((1 + p_label)^ε − 1) log q_label − Σ_{c ≠ label} p_c^ε log q_c with p = softmax(t / T),
    q = softmax(s / T)

    An exponent above 1 raises the weight of the label, the more the surer the teacher is, and
    lowers that of unlikely classes. At ε = 1 it is `soft_cross_entropy` without its T². This is the
    loss of the authors' code, which adds it up over the student's logits and the branches of four
    stages, beside the cross-entropy with the label. The default temperature is the code's.

    Args:
        student_logits: `[..., C]`, floating-point, of the student or of one of its branches.
        teacher_logits: The same shape.
        labels: Integers `[...]`.
        exponent: ε > 0, a scalar; in the authors' code 1 by default, and 1.5 in its example.
        temperature: T > 0, a scalar.

    Returns:
        One value per example `[...]`, in float32 or wider.

    Raises:
        ValueError: If the shapes differ, there is one class, or the exponent or the temperature is
            not a positive scalar.
        TypeError: If the logits are not floating-point or the labels not integers.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> logits = jnp.zeros((1, 2))
        >>> value = losses.enhanced_target_loss(logits, logits, jnp.array([0]), exponent=2.0)
        >>> print(value / jnp.log(2.0))  # (1.5² − 1) + 0.5²
        [1.5]

    References:
        Hao et al., One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge
        Distillation, https://arxiv.org/abs/2310.19444
    """
    exponent = check_positive("exponent", exponent)
    temperature = check_positive("temperature", temperature)
    student, teacher = check_logits_pair(student_logits, teacher_logits)
    labels = check_labels(labels, student.shape)
    q, p = (softmax(logits, temperature=temperature) for logits in (student, teacher))
    exponent = jnp.asarray(exponent, student.dtype)
    # In logarithms, whose gradient does not become infinite at a probability of 0.
    possible = p.log_probabilities != -jnp.inf
    logs = jnp.where(possible, p.log_probabilities, 0)
    powers = jnp.where(possible, jnp.exp(exponent * logs), 0)
    is_label = jax.nn.one_hot(labels, student.shape[-1], dtype=bool)
    label_weights = jnp.expm1(exponent * jnp.log1p(p.probabilities))
    return -expectation(jnp.where(is_label, label_weights, powers), q.log_probabilities)
