"""What a student learns from a teacher's logits alone: divergences of softened distributions, and squared distances.

Sums run over classes and over nothing else; the caller averages over examples. Logits of less than 32 bits are widened
first. A soft term carries its factor `temperature**2`, so that gradients keep their size as the temperature changes.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxkd.losses._arrays import check_positive, check_share, check_weights, inverse, safe_sqrt
from jaxkd.losses._softmax import (
    Softmax,
    divergence,
    expectation,
    log_add_exp,
    log_of,
    logits_of,
    logits_pair,
    soften,
    softmax,
)


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
    check_positive("temperature", temperature)
    return softmax(logits_of("logits", logits), axis, temperature=temperature).probabilities


def soft_cross_entropy(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: ArrayLike,
    axis: int = -1,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
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
        weights: How much each class matters, at least 0, broadcast against the logits; such as `[C]`, inverse to the
            classes' frequencies. The teacher's probabilities are multiplied by them and normalised again.

    Returns:
        One value per example: the logits' shape without `axis`, in float32 or wider.

    Raises:
        ValueError: If the shapes differ, the temperature is not a positive scalar or a weight is negative.
        TypeError: If the logits are not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student, teacher = jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 1.0]])
        >>> print(losses.soft_cross_entropy(student, teacher, temperature=2.0))
        [3.358]

    References:
        Hinton et al., Distilling the Knowledge in a Neural Network, https://arxiv.org/abs/1503.02531
        Weights: Zhang et al., Balanced Knowledge Distillation for Long-tailed Learning, https://arxiv.org/abs/2104.10510
    """
    student, teacher, scale = soften(student_logits, teacher_logits, temperature, axis, where)
    return -scale * expectation(_reweighted(teacher, weights, axis).probabilities, student.logs, axis)


def kl_divergence(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: ArrayLike,
    axis: int = -1,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
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
        weights: How much each class matters, at least 0, broadcast against the logits; such as `[C]`, inverse to the
            classes' frequencies. The teacher's probabilities are multiplied by them and normalised again.

    Returns:
        One value per example: the logits' shape without `axis`, in float32 or wider; infinite where the student rules
        out a class, by −inf, that the teacher does not.

    Raises:
        ValueError: If the shapes differ, the temperature is not a positive scalar or a weight is negative.
        TypeError: If the logits are not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student, teacher = jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 1.0]])
        >>> print(losses.kl_divergence(student, teacher, temperature=2.0))
        [1.029]

    References:
        Hinton et al., Distilling the Knowledge in a Neural Network, https://arxiv.org/abs/1503.02531
        Weights: Zhang et al., Balanced Knowledge Distillation for Long-tailed Learning, https://arxiv.org/abs/2104.10510
    """
    student, teacher, scale = soften(student_logits, teacher_logits, temperature, axis, where)
    return scale * divergence(_reweighted(teacher, weights, axis), student, axis)


def reverse_kl_divergence(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: ArrayLike,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    """Kullback–Leibler divergence of the teacher's softened distribution from the student's, times T².

    T² Σ_c q_c (log q_c − log p_c) with p = softmax(t / T), q = softmax(s / T)

    It punishes a student for what the teacher holds unlikely, rather than for what the student leaves out. MiniLLM
    estimates its sequence-level form by policy gradients; this is the form of one distribution.

    Args:
        student_logits: `[..., C]`, floating-point.
        teacher_logits: The same shape.
        temperature: T > 0, a scalar.
        axis: The axis of the classes.
        where: The classes that count (True), broadcast against the logits; the result is as if the others were sliced
            away, and 0 where none is left.

    Returns:
        One value per example: the logits' shape without `axis`, in float32 or wider; infinite where the teacher rules
        out a class, by −inf, that the student does not.

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
        Gu et al., MiniLLM: Knowledge Distillation of Large Language Models, https://arxiv.org/abs/2306.08543
    """
    student, teacher, scale = soften(student_logits, teacher_logits, temperature, axis, where)
    return scale * divergence(student, teacher, axis)


def jensen_shannon_divergence(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: ArrayLike,
    beta: ArrayLike,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    """Generalised Jensen–Shannon divergence of the softened distributions, times T².

    T² (β KL(p ‖ m) + (1 − β) KL(q ‖ m)) with m = β p + (1 − β) q, p = softmax(t / T), q = softmax(s / T)

    β is the teacher's share of the mixture m, which is one of probabilities. Near its ends the divergence is β times
    the forward and 1 − β times the reverse KL; at the ends themselves, where that vanishes, 0 stands for
    `kl_divergence` and 1 for `reverse_kl_divergence`, as in TRL and Liger-Kernel.

    Args:
        student_logits: `[..., C]`, floating-point.
        teacher_logits: The same shape. A class at −inf contributes nothing.
        temperature: T > 0, a scalar.
        beta: β in [0, 1], a scalar; 0.5 is the symmetric divergence, at most T² log 2.
        axis: The axis of the classes.
        where: The classes that count (True), broadcast against the logits; the result is as if the others were sliced
            away, and 0 where none is left.

    Returns:
        One value per example: the logits' shape without `axis`, in float32 or wider. For 0 < β < 1 it is finite
        whatever classes either side rules out.

    Raises:
        ValueError: If the shapes differ, the temperature is not a positive scalar or `beta` leaves [0, 1].
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
    check_share("beta", beta)
    student, teacher, scale = soften(student_logits, teacher_logits, temperature, axis, where)
    beta = jnp.asarray(beta, student.logs.dtype)
    mixture = log_add_exp(teacher.logs + jnp.log(beta), student.logs + jnp.log1p(-beta))
    forward, reverse = (expectation(side.probabilities, side.logs - mixture, axis) for side in (teacher, student))
    return scale * (jnp.where(beta == 0, 1, beta) * forward + jnp.where(beta == 1, 1, 1 - beta) * reverse)


def logit_mse_loss(student_logits: ArrayLike, teacher_logits: ArrayLike) -> Array:
    """Mean squared difference of the logits themselves.

    Σ_c (s_c − t_c)² / C

    Unlike the divergences it is not blind to a constant added to all logits. The paper has half the sum, which is C / 2
    times this.

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
    student, teacher = logits_pair(student_logits, teacher_logits)
    return jnp.square(student - teacher).mean(-1)


def standardize_logits(logits: ArrayLike, *, axis: int = -1) -> Array:
    """Logits of mean 0 and standard deviation 1 over the classes, for student and teacher alike.

    (z − mean(z)) / std(z)

    A transform to put before any loss on logits; the temperature of that loss is then the paper's base temperature. The
    deviation is the paper's, over C classes; its code divides by C − 1 and adds 1e-7.

    Args:
        logits: `[..., C]`, floating-point. A class at −inf stays there and does not count.
        axis: The axis of the classes.

    Returns:
        The logits' shape, in float32 or wider; 0, without a gradient, where all are equal.

    Raises:
        ValueError: If there is no axis of classes.
        TypeError: If the logits are not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> print(losses.standardize_logits(jnp.array([[1.0, 2.0, 3.0]])))
        [[-1.225  0.     1.225]]

    References:
        Sun et al., Logit Standardization in Knowledge Distillation, https://arxiv.org/abs/2403.01427
    """
    logits = logits_of("logits", logits)
    possible = logits != -jnp.inf
    count = jnp.maximum(possible.astype(logits.dtype).sum(axis, keepdims=True), 1)
    finite = jnp.where(possible, logits, 0)
    largest = jax.lax.stop_gradient(jnp.abs(finite).max(axis, keepdims=True))
    finite = finite * inverse(largest)  # so that squares neither overflow nor vanish
    centred = jnp.where(possible, finite - finite.sum(axis, keepdims=True) / count, 0)
    deviation = safe_sqrt(jnp.square(centred).sum(axis, keepdims=True) / count)
    # Equal logits differ from their rounded mean by an ulp, which a division would blow up to 1.
    noise = 4 * jnp.finfo(logits.dtype).eps
    return jnp.where(possible, centred * inverse(jnp.where(deviation <= noise, 0, deviation)), -jnp.inf)


def _reweighted(teacher: Softmax, weights: ArrayLike | None, axis: int) -> Softmax:
    """The teacher's distribution with classes weighted, normalised again."""
    if weights is None:
        return teacher
    weights = check_weights("classes", weights, teacher.logs.dtype)
    try:
        weights = jnp.broadcast_to(weights, teacher.logs.shape)
    except ValueError:
        raise ValueError(f"weights {weights.shape} do not broadcast against logits {teacher.logs.shape}") from None
    return softmax(teacher.logs + log_of(weights), axis)
