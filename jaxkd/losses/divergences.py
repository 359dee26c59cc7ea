"""Divergences between softened distributions beyond Kullback–Leibler and Jensen–Shannon.

Sums run over the classes only; the caller averages over the examples. p stands for the teacher and
q for the student. Logits narrower than 32 bits are widened first.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxkd.losses._arrays import check_fraction, check_number, check_positive, safe_divide
from jaxkd.losses._softmax import (
    Softmax,
    check_classes,
    check_logits_pair,
    divergence,
    expectation,
    log_add_exp,
    log_sum_exp,
    soften,
    softmax,
)


def skewed_kl_divergence(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: ArrayLike = 2.0,
    skew: ArrayLike = 0.1,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    """Computes the skewed divergence KL(p ‖ λ p + (1 − λ) q) at a temperature, times T² (DistiLLM).

    T² Σ_c p_c (log p_c − log m_c) with m = λ p + (1 − λ) q, p = softmax(t / T), q = softmax(s / T)

    Where the student misses a class of the teacher, the gradient stays bounded, unlike that of
    `kl_divergence`, which it equals at λ = 0. The authors' code takes T = 1 and leaves out the
    teacher's entropy, which has no gradient in the student.

    Args:
        student_logits: `[..., C]`, floating-point.
        teacher_logits: The same shape. A class at −inf contributes nothing.
        temperature: T > 0, a scalar.
        skew: λ in [0, 1], a scalar, the teacher's share of the mixture.
        axis: The class axis.
        where: The classes that count (True), `[C]` along `axis` or broadcast against the logits;
            the result is as if the others were sliced away, and 0 where no class counts.

    Returns:
        One value per example: the logits' shape without `axis`, in float32 or wider. For λ > 0 it
        is finite whatever classes the student rules out.

    Raises:
        ValueError: If the shapes differ, the temperature is not a positive scalar or `skew` is not
            in [0, 1].
        TypeError: If the logits are not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student, teacher = jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 1.0]])
        >>> print(losses.skewed_kl_divergence(student, teacher))
        [0.831]

    References:
        Ko et al., DistiLLM: Towards Streamlined Distillation for Large Language Models,
        https://arxiv.org/abs/2402.03898
    """
    student, teacher, scale = soften(student_logits, teacher_logits, temperature, axis, where)
    return scale * divergence(teacher, _mix(teacher, student, skew), axis)


def skewed_reverse_kl_divergence(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: ArrayLike = 2.0,
    skew: ArrayLike = 0.1,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    """Computes the skewed divergence KL(q ‖ (1 − λ) p + λ q) at a temperature, times T² (DistiLLM).

    T² Σ_c q_c (log q_c − log m_c) with m = (1 − λ) p + λ q, p = softmax(t / T), q = softmax(s / T)

    At λ = 0 it is `reverse_kl_divergence`. The authors' code takes T = 1.

    Args:
        student_logits: `[..., C]`, floating-point.
        teacher_logits: The same shape.
        temperature: T > 0, a scalar.
        skew: λ in [0, 1], a scalar, the student's share of the mixture.
        axis: The class axis.
        where: The classes that count (True), `[C]` along `axis` or broadcast against the logits;
            the result is as if the others were sliced away, and 0 where no class counts.

    Returns:
        One value per example: the logits' shape without `axis`, in float32 or wider. For λ > 0 it
        is finite whatever classes the teacher rules out.

    Raises:
        ValueError: If the shapes differ, the temperature is not a positive scalar or `skew` is not
            in [0, 1].
        TypeError: If the logits are not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student, teacher = jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 1.0]])
        >>> print(losses.skewed_reverse_kl_divergence(student, teacher))
        [0.859]

    References:
        Ko et al., DistiLLM: Towards Streamlined Distillation for Large Language Models,
        https://arxiv.org/abs/2402.03898
    """
    student, teacher, scale = soften(student_logits, teacher_logits, temperature, axis, where)
    return scale * divergence(student, _mix(student, teacher, skew), axis)


def adaptive_kl_divergence(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: ArrayLike = 2.0,
    head: ArrayLike = 0.5,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    """Computes forward and reverse KL, weighted by where the two distributions differ (AKL).

    T² (g_h KL(p ‖ q) + g_t KL(q ‖ p)) / (g_h + g_t), where g_h and g_t are the sums of
    abs(p_c − q_c) over the head and the tail

    The head is the teacher's most likely classes, up to the probability `head`, and at least one.
    The forward divergence fits the head first, the reverse one the tail. The weights have no
    gradient.

    Args:
        student_logits: `[..., C]`, floating-point.
        teacher_logits: The same shape.
        temperature: T > 0, a scalar; 1 in the authors' code.
        head: Probability of the head, in [0, 1], a scalar.
        axis: The class axis.
        where: The classes that count (True), `[C]` along `axis` or broadcast against the logits;
            the result is as if the others were sliced away, and 0 where no class counts.

    Returns:
        One value per example: the logits' shape without `axis`, in float32 or wider; infinite where
        one of the two rules out a class, by −inf, that the other does not.

    Raises:
        ValueError: If the shapes differ, the temperature is not a positive scalar or `head` is not
            in [0, 1].
        TypeError: If the logits are not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student, teacher = jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 1.0]])
        >>> print(losses.adaptive_kl_divergence(student, teacher))
        [1.061]

    References:
        Wu et al., Rethinking Kullback–Leibler Divergence in Knowledge Distillation for Large
        Language Models, https://arxiv.org/abs/2404.02657
    """
    head = check_fraction("head", head)
    student, teacher, scale = soften(student_logits, teacher_logits, temperature, axis, where)
    p, q = (
        jax.lax.stop_gradient(jnp.moveaxis(softened.probabilities, axis, -1))
        for softened in (teacher, student)
    )
    order = jnp.argsort(p, axis=-1, descending=True)
    sorted_p = jnp.take_along_axis(p, order, -1)
    gaps = jnp.abs(sorted_p - jnp.take_along_axis(q, order, -1))
    # The sum of all probabilities may round to more than 1.
    in_head = jnp.cumsum(sorted_p, -1) <= jnp.asarray(head, p.dtype) + 1e-6
    in_head = in_head.at[..., 0].set(True)
    head_gap = jnp.where(in_head, gaps, 0).sum(-1)
    head_share = safe_divide(head_gap, gaps.sum(-1))
    forward, reverse = divergence(teacher, student, axis), divergence(student, teacher, axis)
    # Where a share is 0, an infinite divergence counts nothing.
    terms = (
        jnp.where(share != 0, share * jnp.where(share != 0, values, 0), 0)
        for share, values in ((head_share, forward), (1 - head_share, reverse))
    )
    return scale * sum(terms)


def alpha_beta_divergence(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: ArrayLike = 2.0,
    alpha: float,
    beta: float,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    """Computes the α-β divergence of the softened distributions, times T² (ABKD).

    −T² / (α β) Σ_c (p_c^α q_c^β − α / (α + β) p_c^(α + β) − β / (α + β) q_c^(α + β)) with
    p = softmax(t / T), q = softmax(s / T)

    α = 1, β = 0 is `kl_divergence`, α = 0, β = 1 `reverse_kl_divergence`, and α = β = 1 half the
    squared distance. A smaller α + β looks more at classes of low probability, and a larger β more
    at those of which the student is sure. The authors' code takes T = 1, and α = 0.2, β = 0.7 for
    language models.

    Args:
        student_logits: `[..., C]`, floating-point.
        teacher_logits: The same shape.
        temperature: T > 0, a scalar.
        alpha: α of at least 0, a Python number.
        beta: β of at least 0, a Python number. One of the two is above 0.
        axis: The class axis.
        where: The classes that count (True), `[C]` along `axis` or broadcast against the logits;
            the result is as if the others were sliced away, and 0 where no class counts.

    Returns:
        One value per example: the logits' shape without `axis`, in float32 or wider; where α or β
        is 0, infinite where one distribution rules out a class that the other does not.

    Raises:
        ValueError: If the shapes differ, the temperature is not a positive scalar, or α or β is
            negative or both are 0.
        TypeError: If the logits are not floating-point, or α or β is no Python number.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student, teacher = jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 1.0]])
        >>> print(losses.alpha_beta_divergence(student, teacher, alpha=0.2, beta=0.7))
        [1.151]

    References:
        Wang et al., ABKD: Pursuing a Proper Allocation of the Probability Mass in Knowledge
        Distillation via α-β-Divergence, https://arxiv.org/abs/2505.04560
    """
    alpha, beta = check_number("alpha", alpha), check_number("beta", beta)
    if min(alpha, beta) < 0 or alpha + beta == 0:
        raise ValueError(
            f"alpha and beta must be at least 0, and one of them more, got {alpha} and {beta}"
        )
    student, teacher, scale = soften(student_logits, teacher_logits, temperature, axis, where)
    if not beta:
        return scale * _power_divergence(teacher, student, alpha, axis)
    if not alpha:
        return scale * _power_divergence(student, teacher, beta, axis)
    log_p, log_q = teacher.log_probabilities, student.log_probabilities
    total = alpha + beta
    product = _power(log_p, alpha) * _power(log_q, beta)
    powers = alpha / total * _power(log_p, total) + beta / total * _power(log_q, total)
    return scale * (powers - product).sum(axis) / (alpha * beta)


def renyi_divergence(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: ArrayLike = 2.0,
    order: ArrayLike,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    """Computes the Rényi divergence of the teacher from the student, times T².

    T² / (α − 1) log Σ_c p_c^α q_c^(1 − α) with p = softmax(t / T), q = softmax(s / T)

    At α = 1 it is `kl_divergence`. Close to 1, rounding is divided by α − 1. A larger order looks
    more at the classes that the student misses most.

    Args:
        student_logits: `[..., C]`, floating-point.
        teacher_logits: The same shape. A class at −inf contributes nothing.
        temperature: T > 0, a scalar.
        order: α > 0, a scalar.
        axis: The class axis.
        where: The classes that count (True), `[C]` along `axis` or broadcast against the logits;
            the result is as if the others were sliced away, and 0 where no class counts.

    Returns:
        One value per example: the logits' shape without `axis`, in float32 or wider; for α of at
        least 1, infinite where the student rules out a class, by −inf, that the teacher does not.

    Raises:
        ValueError: If the shapes differ, or the temperature or `order` is not a positive scalar.
        TypeError: If the logits are not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student, teacher = jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 1.0]])
        >>> print(losses.renyi_divergence(student, teacher, order=2.0))
        [1.706]

    References:
        van Erven and Harremoës, Rényi Divergence and Kullback–Leibler Divergence,
        https://arxiv.org/abs/1206.2459
    """
    order = check_positive("order", order)
    student, teacher, scale = soften(student_logits, teacher_logits, temperature, axis, where)
    order = jnp.asarray(order, scale.dtype)
    possible = teacher.probabilities > 0
    log_p = jnp.where(possible, teacher.log_probabilities, 0)
    log_q = jnp.where(possible, student.log_probabilities, 0)
    # The order may be traced, and 0 · inf would be NaN at 1.
    is_limit = order == 1
    safe_order = jnp.where(is_limit, 2, order)
    is_missed = log_q == -jnp.inf
    finite_log_q = jnp.where(is_missed, 0, log_q)
    exponents = safe_order * log_p + (1 - safe_order) * finite_log_q
    exponents = jnp.where(is_missed, jnp.where(safe_order > 1, jnp.inf, -jnp.inf), exponents)
    exponents = jnp.where(possible, exponents, -jnp.inf)
    is_infinite = (exponents == jnp.inf).any(axis)
    logs = log_sum_exp(jnp.where(exponents == jnp.inf, 0, exponents), axis)
    # No class counts, or the two have none in common.
    is_empty = ~possible.any(axis)
    values = jnp.where(is_infinite, jnp.inf, logs / (safe_order - 1))
    limit = divergence(teacher, student, axis)
    return scale * jnp.where(is_empty, 0, jnp.where(is_limit, limit, values))


def total_variation_distance(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: ArrayLike = 2.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    """Computes the total variation distance of the softened distributions, times T.

    T / 2 Σ_c abs(p_c − q_c) with p = softmax(t / T), q = softmax(s / T)

    It is at most T, and bounds the probability with which student and teacher decide differently.
    The factor is T instead of T², since the distance is of the first order in the logits: its
    gradients keep their size as T grows. The code of f-distill and DistiLLM takes T = 1.

    Args:
        student_logits: `[..., C]`, floating-point.
        teacher_logits: The same shape.
        temperature: T > 0, a scalar.
        axis: The class axis.
        where: The classes that count (True), `[C]` along `axis` or broadcast against the logits;
            the result is as if the others were sliced away, and 0 where no class counts.

    Returns:
        One value per example: the logits' shape without `axis`, in float32 or wider.

    Raises:
        ValueError: If the shapes differ or the temperature is not a positive scalar.
        TypeError: If the logits are not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student, teacher = jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 1.0]])
        >>> print(losses.total_variation_distance(student, teacher))
        [0.707]

    References:
        Wen et al., f-Divergence Minimization for Sequence-Level Knowledge Distillation,
        https://arxiv.org/abs/2307.15190
    """
    student, teacher, scale = soften(student_logits, teacher_logits, temperature, axis, where)
    gaps = jnp.abs(teacher.probabilities - student.probabilities)
    return jnp.sqrt(scale) / 2 * gaps.sum(axis)


def transformed_teacher_loss(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: ArrayLike = 2.0,
    weighted: bool = False,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    """Computes KL(softened teacher ‖ student at T = 1) (TTM), which may be weighted (WTTM).

    w Σ_c p_c (log p_c − log q_c) with p = softmax(t / T), q = softmax(s), and w = 1, or
    w = Σ_c softmax(t)_c^(1 / T) if weighted

    Without a temperature the student is drawn to distributions of a higher entropy. The weight is
    larger for examples of which the teacher is less sure, from 1 to C^(1 − 1 / T) for T ≥ 1. There
    is no factor T²: papers choose the weight of the term by task. The authors' γ is 1 / T.

    Args:
        student_logits: `[..., C]`, floating-point.
        teacher_logits: The same shape. A class at −inf contributes nothing.
        temperature: T > 0, a scalar, of the teacher alone.
        weighted: Whether examples are weighted.
        axis: The class axis.
        where: The classes that count (True), `[C]` along `axis` or broadcast against the logits;
            the result is as if the others were sliced away, and 0 where no class counts.

    Returns:
        One value per example: the logits' shape without `axis`, in float32 or wider; infinite where
        the student rules out a class, by −inf, that the teacher does not.

    Raises:
        ValueError: If the shapes differ or the temperature is not a positive scalar.
        TypeError: If the logits are not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student, teacher = jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 1.0]])
        >>> print(losses.transformed_teacher_loss(student, teacher))
        [0.462]
        >>> print(losses.transformed_teacher_loss(student, teacher, weighted=True))
        [0.593]

    References:
        Zheng and Yang, Knowledge Distillation Based on Transformed Teacher Matching,
        https://arxiv.org/abs/2402.11148
    """
    temperature = check_positive("temperature", temperature)
    student, teacher = check_logits_pair(student_logits, teacher_logits)
    check_classes("student_logits", student.shape, axis)
    softened = softmax(teacher, axis, where, temperature)
    values = divergence(softened, softmax(student, axis, where), axis)
    if not weighted:
        return values
    log_p = softmax(teacher, axis, where).log_probabilities
    # −inf / T has a NaN gradient in T.
    possible = log_p != -jnp.inf
    powers = jnp.where(possible, log_p, 0) / jnp.asarray(temperature, log_p.dtype)
    return jnp.exp(log_sum_exp(jnp.where(possible, powers, -jnp.inf), axis)) * values


def _mix(first: Softmax, second: Softmax, share: ArrayLike) -> Softmax:
    """Returns the mixture of two distributions, of which the first one has a share."""
    dtype = first.log_probabilities.dtype
    share = jnp.asarray(check_fraction("skew", share), dtype)
    # In log space, since log(λ p + (1 − λ) q) has a NaN gradient where both are 0.
    logs = log_add_exp(
        first.log_probabilities + jnp.log(share), second.log_probabilities + jnp.log1p(-share)
    )
    return Softmax(jnp.exp(logs), logs)


def _power(log_probabilities: Array, exponent: float) -> Array:
    """Returns p^a for a > 0, with the gradient 0 where p is 0."""
    possible = log_probabilities != -jnp.inf
    powers = jnp.exp(exponent * jnp.where(possible, log_probabilities, 0))
    return jnp.where(possible, powers, 0)


def _power_divergence(p: Softmax, q: Softmax, alpha: float, axis: int) -> Array:
    """Computes 1 / α² Σ (p^α (α log p / q − 1) + q^α), the limit of the α-β divergence at β = 0."""
    powers = _power(p.log_probabilities, alpha)
    ratios = expectation(powers, p.log_probabilities - q.log_probabilities, axis)
    others = (_power(q.log_probabilities, alpha) - powers).sum(axis)
    return ratios / alpha + others / alpha**2
