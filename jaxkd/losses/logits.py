"""Losses on logits alone: divergences of softened distributions and squared distances.

Sums run over the classes only; the caller averages over the examples. Logits narrower than 32 bits
are widened first. Divergences are multiplied by `temperature**2`, so that their gradients keep
their size as the temperature changes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxkd.losses._arrays import (
    align_classes,
    check_fraction,
    check_positive,
    check_weights,
    safe_reciprocal,
    safe_sqrt,
)
from jaxkd.losses._softmax import (
    Softmax,
    check_classes,
    check_logits,
    check_logits_pair,
    divergence,
    expectation,
    log_add_exp,
    safe_log,
    soften,
    softmax,
)


def temperature_softmax(logits: ArrayLike, *, temperature: ArrayLike, axis: int = -1) -> Array:
    """Computes class probabilities that are softened by a temperature.

    softmax(z / T)

    Args:
        logits: `[..., C]`, floating-point. A class at −inf gets probability 0.
        temperature: T > 0, a scalar; the distribution tends to uniform as it grows.
        axis: The class axis.

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
    temperature = check_positive("temperature", temperature)
    logits = check_logits("logits", logits)
    check_classes("logits", logits.shape, axis)
    return softmax(logits, axis, temperature=temperature).probabilities


def soft_cross_entropy(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: ArrayLike = 2.0,
    axis: int = -1,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> Array:
    """Computes the cross-entropy of the softened student under the softened teacher, times T².

    −T² Σ_c softmax(t / T)_c log softmax(s / T)_c

    It exceeds `kl_divergence` by T² times the teacher's entropy, which has no gradient in the
    student.

    Args:
        student_logits: `[..., C]`, floating-point.
        teacher_logits: The same shape. A class at −inf contributes nothing.
        temperature: T > 0, a scalar.
        axis: The class axis.
        where: The classes that count (True), `[C]` along `axis` or broadcast against the logits;
            the result is as if the others were sliced away, and 0 where no class counts.
        weights: The weight of each class, at least 0, `[C]` along `axis` or broadcast against the
            logits; such as inverse to the classes' frequencies. The teacher's probabilities are
            multiplied by the weights and normalised again.

    Returns:
        One value per example: the logits' shape without `axis`, in float32 or wider.

    Raises:
        ValueError: If the shapes differ, the temperature is not a positive scalar or a weight is
            negative.
        TypeError: If the logits are not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student, teacher = jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 1.0]])
        >>> print(losses.soft_cross_entropy(student, teacher, temperature=2.0))
        [3.358]

    References:
        Hinton et al., Distilling the Knowledge in a Neural Network, https://arxiv.org/abs/1503.02531
        Weights: Zhang et al., Balanced Knowledge Distillation for Long-tailed Learning,
        https://arxiv.org/abs/2104.10510
    """
    student, teacher, scale = soften(student_logits, teacher_logits, temperature, axis, where)
    targets = _reweight(teacher, weights, axis).probabilities
    return -scale * expectation(targets, student.log_probabilities, axis)


def kl_divergence(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: ArrayLike = 2.0,
    axis: int = -1,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> Array:
    """Computes the Kullback–Leibler divergence KL(teacher ‖ student) at a temperature, times T².

    T² Σ_c p_c (log p_c − log q_c) with p = softmax(t / T), q = softmax(s / T)

    As T grows it tends to half the squared distance of the centred logits, divided by the number
    of classes. PyTorch's `KLDivLoss` with `reduction="mean"` also divides by the number of classes;
    with `"batchmean"` it is the mean of these values, without the factor T².

    Args:
        student_logits: `[..., C]`, floating-point.
        teacher_logits: The same shape. A class at −inf contributes nothing.
        temperature: T > 0, a scalar.
        axis: The class axis.
        where: The classes that count (True), `[C]` along `axis` or broadcast against the logits;
            the result is as if the others were sliced away, and 0 where no class counts.
        weights: The weight of each class, at least 0, `[C]` along `axis` or broadcast against the
            logits; such as inverse to the classes' frequencies. The teacher's probabilities are
            multiplied by the weights and normalised again.

    Returns:
        One value per example: the logits' shape without `axis`, in float32 or wider; infinite where
        the student rules out a class, by −inf, that the teacher does not.

    Raises:
        ValueError: If the shapes differ, the temperature is not a positive scalar or a weight is
            negative.
        TypeError: If the logits are not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student, teacher = jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 1.0]])
        >>> print(losses.kl_divergence(student, teacher, temperature=2.0))
        [1.029]

    References:
        Hinton et al., Distilling the Knowledge in a Neural Network, https://arxiv.org/abs/1503.02531
        Weights: Zhang et al., Balanced Knowledge Distillation for Long-tailed Learning,
        https://arxiv.org/abs/2104.10510
    """
    student, teacher, scale = soften(student_logits, teacher_logits, temperature, axis, where)
    return scale * divergence(_reweight(teacher, weights, axis), student, axis)


def reverse_kl_divergence(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: ArrayLike = 2.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    """Computes the reverse Kullback–Leibler divergence KL(student ‖ teacher), times T².

    T² Σ_c q_c (log q_c − log p_c) with p = softmax(t / T), q = softmax(s / T)

    It penalises a student for probability on classes that the teacher considers unlikely, rather
    than for classes that the student misses. MiniLLM estimates the divergence of whole sequences by
    policy gradients; this is the divergence of a single distribution.

    Args:
        student_logits: `[..., C]`, floating-point.
        teacher_logits: The same shape.
        temperature: T > 0, a scalar.
        axis: The class axis.
        where: The classes that count (True), `[C]` along `axis` or broadcast against the logits;
            the result is as if the others were sliced away, and 0 where no class counts.

    Returns:
        One value per example: the logits' shape without `axis`, in float32 or wider; infinite where
        the teacher rules out a class, by −inf, that the student does not.

    Raises:
        ValueError: If the shapes differ or the temperature is not a positive scalar.
        TypeError: If the logits are not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student, teacher = jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 1.0]])
        >>> print(losses.reverse_kl_divergence(student, teacher, temperature=2.0))
        [1.091]

    References:
        Gu et al., MiniLLM: Knowledge Distillation of Large Language Models,
        https://arxiv.org/abs/2306.08543
    """
    student, teacher, scale = soften(student_logits, teacher_logits, temperature, axis, where)
    return scale * divergence(student, teacher, axis)


def jensen_shannon_divergence(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: ArrayLike = 2.0,
    beta: ArrayLike,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    """Computes the generalised Jensen–Shannon divergence at a temperature, times T².

    T² (β KL(p ‖ m) + (1 − β) KL(q ‖ m)) with m = β p + (1 − β) q, p = softmax(t / T),
    q = softmax(s / T)

    β is the teacher's share of the mixture m, which is a mixture of probabilities. Near β = 0 the
    divergence is β times the forward KL, and near β = 1 it is 1 − β times the reverse KL. At β = 0
    and β = 1, where that vanishes, the function returns `kl_divergence` and `reverse_kl_divergence`
    instead, as TRL and Liger-Kernel do.

    Args:
        student_logits: `[..., C]`, floating-point.
        teacher_logits: The same shape. A class at −inf contributes nothing.
        temperature: T > 0, a scalar.
        beta: β in [0, 1], a scalar; 0.5 is the symmetric divergence, at most T² log 2.
        axis: The class axis.
        where: The classes that count (True), `[C]` along `axis` or broadcast against the logits;
            the result is as if the others were sliced away, and 0 where no class counts.

    Returns:
        One value per example: the logits' shape without `axis`, in float32 or wider. For 0 < β < 1
        it is finite whatever classes student and teacher rule out.

    Raises:
        ValueError: If the shapes differ, the temperature is not a positive scalar or `beta` is not
            in [0, 1].
        TypeError: If the logits are not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student, teacher = jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 1.0]])
        >>> print(losses.jensen_shannon_divergence(student, teacher, temperature=2.0, beta=0.5))
        [0.259]

    References:
        Agarwal et al., On-Policy Distillation of Language Models, https://arxiv.org/abs/2306.13649
    """
    beta = check_fraction("beta", beta)
    student, teacher, scale = soften(student_logits, teacher_logits, temperature, axis, where)
    beta = jnp.asarray(beta, student.log_probabilities.dtype)
    # In log space, since log(β p + (1 − β) q) has a NaN gradient where both probabilities are 0.
    mixture = log_add_exp(
        teacher.log_probabilities + jnp.log(beta), student.log_probabilities + jnp.log1p(-beta)
    )
    forward, reverse = (
        expectation(softened.probabilities, softened.log_probabilities - mixture, axis)
        for softened in (teacher, student)
    )
    # At β = 0 the mixture is q, so `forward` is KL(p ‖ q), and at β = 1 `reverse` is KL(q ‖ p): a
    # factor of 1 instead of 0 makes it the result. β may be traced, hence `jnp.where`.
    return scale * (
        jnp.where(beta == 0, 1, beta) * forward + jnp.where(beta == 1, 1, 1 - beta) * reverse
    )


def logit_mse_loss(student_logits: ArrayLike, teacher_logits: ArrayLike) -> Array:
    """Computes the mean squared difference of the logits.

    Σ_c (s_c − t_c)² / C

    Unlike a divergence it changes when a constant is added to all logits. The paper takes half the
    sum, which is C / 2 times this.

    Args:
        student_logits: `[..., C]`, finite, floating-point.
        teacher_logits: The same shape.

    Returns:
        One value per example `[...]`, in float32 or wider.

    Raises:
        ValueError: If the shapes differ.
        TypeError: If the logits are not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> print(losses.logit_mse_loss(jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 1.0]])))
        [2.5]

    References:
        Ba and Caruana, Do Deep Nets Really Need to be Deep?, https://arxiv.org/abs/1312.6184
    """
    student, teacher = check_logits_pair(student_logits, teacher_logits)
    return jnp.square(student - teacher).mean(-1)


def standardize_logits(logits: ArrayLike, *, axis: int = -1) -> Array:
    """Shifts and scales logits to mean 0 and standard deviation 1 over the classes.

    (z − mean(z)) / std(z)

    Apply it to the logits of student and teacher before any loss on logits; the temperature of that
    loss is then the paper's base temperature. The deviation is the paper's, over C classes; its
    code divides by C − 1 and adds 1e-7.

    Args:
        logits: `[..., C]`, floating-point. A class at −inf stays at −inf and is left out of mean
            and deviation.
        axis: The class axis.

    Returns:
        The logits' shape, in float32 or wider; 0, without a gradient, where all are equal.

    Raises:
        ValueError: If there is no class axis.
        TypeError: If the logits are not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> print(losses.standardize_logits(jnp.array([[1.0, 2.0, 3.0]])))
        [[-1.225  0.     1.225]]

    References:
        Sun et al., Logit Standardization in Knowledge Distillation,
        https://arxiv.org/abs/2403.01427
    """
    logits = check_logits("logits", logits)
    possible = logits != -jnp.inf
    count = jnp.maximum(possible.astype(logits.dtype).sum(axis, keepdims=True), 1)
    finite = jnp.where(possible, logits, 0)
    # Scaling by the largest logit first keeps the squares from overflowing and underflowing.
    largest = jax.lax.stop_gradient(jnp.abs(finite).max(axis, keepdims=True))
    finite = finite * safe_reciprocal(largest)
    centred = jnp.where(possible, finite - finite.sum(axis, keepdims=True) / count, 0)
    deviation = safe_sqrt(jnp.square(centred).sum(axis, keepdims=True) / count)
    # Equal logits differ from their rounded mean by an ulp, which the division would scale up to 1.
    rounding = 4 * jnp.finfo(logits.dtype).eps
    deviation = jnp.where(deviation <= rounding, 0, deviation)
    return jnp.where(possible, centred * safe_reciprocal(deviation), -jnp.inf)


def _reweight(teacher: Softmax, weights: ArrayLike | None, axis: int) -> Softmax:
    """Multiplies the teacher's probabilities by class weights and normalises them again."""
    if weights is None:
        return teacher
    log_probabilities = teacher.log_probabilities
    weights = check_weights("classes", weights, log_probabilities.dtype)
    weights = align_classes(weights, log_probabilities.ndim, axis)
    try:
        weights = jnp.broadcast_to(weights, log_probabilities.shape)
    except ValueError:
        raise ValueError(
            f"weights {weights.shape} do not broadcast against logits {log_probabilities.shape}"
        ) from None
    # The softmax of log p + log w is p · w, divided by its sum. What has no weight may be NaN.
    weighted = jnp.where(weights != 0, log_probabilities + safe_log(weights), -jnp.inf)
    return softmax(weighted, axis)
