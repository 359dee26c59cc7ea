"""Losses on a part of a teacher's logits: the largest ones, or classes that are drawn.

The teacher's part is small enough to store for every token of a text.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxkd.losses._arrays import check_positive, check_shape
from jaxkd.losses._labels import take_classes
from jaxkd.losses._softmax import (
    Softmax,
    check_logits,
    divergence,
    expectation,
    log_sum_exp,
    softmax,
)
from jaxkd.losses.logits import jensen_shannon_divergence


class TopK(NamedTuple):
    """The largest logits, and the total weight of the others.

    Attributes:
        values: `[..., k]`, float32, in falling order.
        indices: `[..., k]`, int32, their classes.
        rest: `[...]`, float32, the log-sum-exp of all other logits; −inf if there are none.
    """

    values: Array
    indices: Array
    rest: Array


def top_k(logits: ArrayLike, *, k: int) -> TopK:
    """Keeps the k largest logits and the log-sum-exp of the others.

    rest = log Σ_c exp(t_c) over the classes that are not kept

    This stores 2k + 1 numbers in place of C.

    Args:
        logits: `[..., C]`, floating-point. Of equal logits, the first count as larger.
        k: Number of logits to keep, from 1 to C.

    Returns:
        The logits in the form that `expand_top_k` takes.

    Raises:
        ValueError: If the logits have no axis of classes, or `k` is out of range.
        TypeError: If the logits are not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> kept = losses.top_k(jnp.log(jnp.array([0.1, 0.6, 0.1, 0.2])), k=2)
        >>> kept.indices.tolist()
        [1, 3]
        >>> [round(float(jnp.exp(value)), 3) for value in (*kept.values, kept.rest)]
        [0.6, 0.2, 0.2]

    References:
        Without the rest, the student's teacher is biased: Anshumann et al., Sparse Logit Sampling,
        https://arxiv.org/abs/2503.16870
    """
    logits = jnp.asarray(logits)
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(f"logits must be floating-point, got {logits.dtype}")
    if not logits.ndim or not 1 <= k <= logits.shape[-1]:
        raise ValueError(
            "k must be from 1 to the number of classes, "
            f"got k={k} for logits of the shape {logits.shape}"
        )
    logits = logits.astype(jnp.float32)
    values, indices = jax.lax.top_k(logits, k)
    # By index, not by a comparison with the smallest kept logit: a class that ties with it but was
    # not kept belongs to the rest.
    masked = jnp.put_along_axis(logits, indices, jnp.float32(-jnp.inf), axis=-1, inplace=False)
    return TopK(values, indices, jax.nn.logsumexp(masked, axis=-1))


def expand_top_k(kept: TopK, *, num_classes: int) -> Array:
    """Returns logits for all classes. The classes that were not kept share their weight evenly.

    log(exp(rest) / (C − k)) for each class that was not kept

    At temperature 1, the softmax gives every kept class its original probability. At a higher
    temperature it does not: an even distribution is flatter than the original one, so the classes
    that were not kept get more weight than they had, and a higher temperature needs a larger k. A
    class at −inf that was not kept gets a share as well. With k = C, the result equals the original
    logits bit for bit.

    Args:
        kept: The result of `top_k`.
        num_classes: C.

    Returns:
        `[..., C]`, float32; NaN for an example of which a traced index is no class.

    Raises:
        ValueError: If there are fewer classes than kept logits, or an index is no class.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd import losses
        >>> kept = losses.top_k(jnp.log(jnp.array([0.05, 0.6, 0.15, 0.2])), k=2)
        >>> print(jax.nn.softmax(losses.expand_top_k(kept, num_classes=4)).round(3))
        [0.1 0.6 0.1 0.2]

    References:
        Wu et al., TinyViT: Fast Pretraining Distillation for Small Vision Transformers,
        https://arxiv.org/abs/2207.10666
    """
    num_others = num_classes - kept.values.shape[-1]
    if num_others < 0:
        raise ValueError(
            f"{kept.values.shape[-1]} logits of each example were kept, "
            f"but num_classes is {num_classes}"
        )
    indices = _check_indices(kept.indices, num_classes)
    # With k = C no class takes a share. `math.log(0)` would raise an error all the same.
    share = jnp.asarray(kept.rest)[..., None] - math.log(max(num_others, 1))
    shares = jnp.broadcast_to(share, (*share.shape[:-1], num_classes))
    logits = jnp.put_along_axis(shares, indices, kept.values, axis=-1, inplace=False)
    is_class = (indices >= 0) & (indices < num_classes)
    return jnp.where(is_class.all(-1, keepdims=True), logits, jnp.nan)


def _check_indices(indices: ArrayLike, num_classes: int) -> Array:
    """Returns the indices; raises `ValueError` if one that is known is no class."""
    if not isinstance(indices, jax.core.Tracer):
        known = np.asarray(indices)
        if known.size and not 0 <= known.min() <= known.max() < num_classes:
            raise ValueError(
                f"kept logits have indices from {known.min()} to {known.max()}, which are not all "
                f"in [0, {num_classes}): pass the number of classes of the model that made them"
            )
    return jnp.asarray(indices)


def sparse_soft_cross_entropy(
    student_logits: ArrayLike, kept: TopK, *, temperature: ArrayLike = 2.0
) -> Array:
    """Computes the cross-entropy with a teacher of which the largest logits are known, times T².

    −T² (Σ_i p_i log q_i + p_rest log q_rest)

    The sum runs over the kept classes i; all others count as one class, whose probability the
    student may divide among them as it likes. With k = C it is `soft_cross_entropy`. No array of
    the teacher has all classes.

    Args:
        student_logits: `[..., C]`, floating-point.
        kept: From `top_k` of the teacher's logits, `[..., k]`.
        temperature: T > 0, a scalar. At another temperature than 1, the teacher's share of the rest
            is that of equal logits, as in `expand_top_k`, and too large.

    Returns:
        One value per example `[...]`, in float32 or wider; NaN where a traced index is no class.

    Raises:
        ValueError: If the shapes disagree, an index is no class or the temperature is not a
            positive scalar.
        TypeError: If the logits are not floating-point, or `kept` is no `TopK`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> teacher = jnp.log(jnp.array([[0.1, 0.6, 0.1, 0.2]]))
        >>> kept = losses.top_k(teacher, k=2)
        >>> print(losses.sparse_soft_cross_entropy(jnp.zeros((1, 4)), kept, temperature=1.0))
        [1.248]

    References:
        Anshumann et al., Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs,
        https://arxiv.org/abs/2503.16870
    """
    teacher, student, scale = _soften_kept(student_logits, kept, temperature)
    return -scale * expectation(teacher.probabilities, student.log_probabilities)


def sparse_kl_divergence(
    student_logits: ArrayLike, kept: TopK, *, temperature: ArrayLike = 2.0
) -> Array:
    """Computes KL(teacher ‖ student) with a teacher of which the largest logits are known.

    T² (Σ_i p_i log(p_i / q_i) + p_rest log(p_rest / q_rest))

    The sum runs over the kept classes i; all others count as one class. At T = 1 it is at most
    `kl_divergence`, which it equals with k = C. Without the rest, as in most code, the student
    would be drawn to give the kept classes all probability.

    Args:
        student_logits: `[..., C]`, floating-point.
        kept: From `top_k` of the teacher's logits, `[..., k]`.
        temperature: T > 0, a scalar, as for `sparse_soft_cross_entropy`.

    Returns:
        One value per example `[...]`, in float32 or wider; NaN where a traced index is no class.

    Raises:
        ValueError: If the shapes disagree, an index is no class or the temperature is not a
            positive scalar.
        TypeError: If the logits are not floating-point, or `kept` is no `TopK`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> teacher = jnp.log(jnp.array([[0.1, 0.6, 0.1, 0.2]]))
        >>> kept = losses.top_k(teacher, k=2)
        >>> print(losses.sparse_kl_divergence(jnp.zeros((1, 4)), kept, temperature=1.0))
        [0.297]

    References:
        Anshumann et al., Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs,
        https://arxiv.org/abs/2503.16870
    """
    teacher, student, scale = _soften_kept(student_logits, kept, temperature)
    return scale * divergence(teacher, student)


def sparse_jensen_shannon_divergence(
    student_logits: ArrayLike, kept: TopK, *, temperature: ArrayLike = 2.0, beta: ArrayLike
) -> Array:
    """Computes the Jensen–Shannon divergence from a teacher of which the largest logits are known.

    T² (β KL(p ‖ m) + (1 − β) KL(q ‖ m)) with m = β p + (1 − β) q, over the kept classes and the
    rest as one class

    β is that of `jensen_shannon_divergence`, which it equals with k = C.

    Args:
        student_logits: `[..., C]`, floating-point.
        kept: From `top_k` of the teacher's logits, `[..., k]`.
        temperature: T > 0, a scalar, as for `sparse_soft_cross_entropy`.
        beta: β in [0, 1], a scalar.

    Returns:
        One value per example `[...]`, in float32 or wider; NaN where a traced index is no class.

    Raises:
        ValueError: If the shapes disagree, an index is no class, the temperature is not a positive
            scalar or `beta` is not in [0, 1].
        TypeError: If the logits are not floating-point, or `kept` is no `TopK`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> teacher = jnp.log(jnp.array([[0.1, 0.6, 0.1, 0.2]]))
        >>> kept = losses.top_k(teacher, k=2)
        >>> student = jnp.zeros((1, 4))
        >>> print(losses.sparse_jensen_shannon_divergence(student, kept, temperature=1.0, beta=0.5))
        [0.072]

    References:
        Agarwal et al., On-Policy Distillation of Language Models, https://arxiv.org/abs/2306.13649
    """
    teacher, student, _ = _soften_kept(student_logits, kept, temperature)
    # The softmax of log-probabilities at T = 1 are these probabilities.
    values = jensen_shannon_divergence(
        student.log_probabilities, teacher.log_probabilities, temperature=1.0, beta=beta
    )
    return jnp.square(jnp.asarray(temperature, values.dtype)) * values


class SampledClasses(NamedTuple):
    """Classes that were drawn from a teacher, and their weights.

    Attributes:
        indices: `[..., n]`, int32. A class may occur several times.
        weights: `[..., n]`, float32, of which the expected sum is 1.
    """

    indices: Array
    weights: Array


def sample_classes(
    key: Array, logits: ArrayLike, *, count: int, proposal_temperature: ArrayLike = 1.0
) -> SampledClasses:
    """Draws classes from a teacher's distribution, as targets without bias (RS-KD).

    weight = p_c / (n r_c) with p = softmax(t), r = softmax(t / τ)

    The largest logits alone are a biased target. Sampled classes have the expectation of the whole
    distribution, value and gradient of `sampled_cross_entropy` included, with 2n numbers in place
    of C.

    Args:
        key: A random key.
        logits: `[..., C]`, floating-point, of the teacher. Divide them by a temperature beforehand,
            and the student's as well.
        count: n, the number of draws, with replacement.
        proposal_temperature: τ > 0 of the distribution that is drawn from. At 1 all weights are
            1 / n; above, improbable classes are drawn more often.

    Returns:
        The classes and weights.

    Raises:
        ValueError: If `count` is below 1, the logits have no axis of classes or τ is not a positive
            scalar.
        TypeError: If the logits are not floating-point.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd import losses
        >>> sampled = losses.sample_classes(jax.random.key(0), jnp.zeros((2, 50)), count=10)
        >>> sampled.indices.shape, float(sampled.weights.sum(-1)[0].round(3))
        ((2, 10), 1.0)

    References:
        Anshumann et al., Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs,
        https://arxiv.org/abs/2503.16870
    """
    temperature = check_positive("proposal_temperature", proposal_temperature)
    if count < 1:
        raise ValueError(f"count is {count}: draw at least one class")
    logits = check_logits("logits", logits)
    proposal = softmax(logits, temperature=temperature).log_probabilities
    shape = (count, *logits.shape[:-1])
    indices = jnp.moveaxis(jax.random.categorical(key, proposal, shape=shape), 0, -1)
    target = softmax(logits).log_probabilities
    ratios = jnp.exp(
        jnp.take_along_axis(target, indices, -1) - jnp.take_along_axis(proposal, indices, -1)
    )
    return SampledClasses(indices.astype(jnp.int32), (ratios / count).astype(jnp.float32))


def sampled_cross_entropy(student_logits: ArrayLike, sampled: SampledClasses) -> Array:
    """Computes the cross-entropy with classes that were drawn from a teacher.

    −Σ_i w_i log softmax(s)_i

    Its expectation over the draws is `soft_cross_entropy` at T = 1.

    Args:
        student_logits: `[..., C]`, floating-point.
        sampled: From `sample_classes` of the teacher's logits, `[..., n]`.

    Returns:
        One value per example `[...]`, in float32 or wider; NaN where a traced index is no class.

    Raises:
        ValueError: If the shapes disagree or an index is no class.
        TypeError: If the logits are not floating-point.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd import losses
        >>> sampled = losses.SampledClasses(jnp.array([[0, 1]]), jnp.array([[0.5, 0.5]]))
        >>> print(losses.sampled_cross_entropy(jnp.log(jnp.array([[0.5, 0.25, 0.25]])), sampled))
        [1.04]

    References:
        Anshumann et al., Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs,
        https://arxiv.org/abs/2503.16870
    """
    student = check_logits("student_logits", student_logits)
    indices = _check_indices(sampled.indices, student.shape[-1])
    check_shape(
        indices.shape[:-1] == student.shape[:-1] and indices.shape == jnp.shape(sampled.weights),
        f"sampled indices {indices.shape} and weights {jnp.shape(sampled.weights)} must have the "
        f"axes of student_logits {student.shape} before the classes",
    )
    weights = jnp.asarray(sampled.weights, student.dtype)
    logs = take_classes(softmax(student).log_probabilities, indices)
    return -jnp.sum(weights * jnp.where(weights != 0, logs, 0), -1)


def _soften_kept(
    student_logits: ArrayLike, kept: TopK, temperature: ArrayLike
) -> tuple[Softmax, Softmax, Array]:
    """Returns the distributions of teacher and student over the kept classes and the rest.

    They are `[..., k + 1]`, followed by T².
    """
    check_is_kept(kept)
    known_temperature = check_positive("temperature", temperature)
    student = check_logits("student_logits", student_logits)
    kept = check_kept(kept, "student_logits", student.shape[:-1], student.shape[-1])
    temperature = jnp.asarray(known_temperature, student.dtype)
    student_logs = softmax(student, temperature=known_temperature).log_probabilities
    others = jnp.put_along_axis(
        student_logs, kept.indices, jnp.asarray(-jnp.inf, student.dtype), axis=-1, inplace=False
    )
    rest_logs = log_sum_exp(others)[..., None]
    logs = jnp.concatenate([take_classes(student_logs, kept.indices), rest_logs], -1)
    # Of the softmax of log-probabilities, the normalisation is theirs but for rounding.
    student_softmax = Softmax(jnp.exp(logs), logs)
    teacher = soften_kept(kept, student.shape[-1], temperature)
    return teacher, student_softmax, jnp.square(temperature)


def check_is_kept(kept: TopK) -> None:
    """Raises `TypeError` if the teacher's part is no `TopK`."""
    if not isinstance(kept, TopK):
        raise TypeError(
            f"kept is a {type(kept).__name__}: pass losses.top_k(teacher_logits, k=...)"
        )


def check_kept(kept: TopK, name: str, examples: tuple[int, ...], num_classes: int) -> TopK:
    """Returns kept logits as arrays; raises `ValueError` unless they fit the student's logits.

    Args:
        kept: From `top_k`.
        name: What the student's argument is called in messages.
        examples: The student's axes before the classes.
        num_classes: C.
    """
    indices = _check_indices(kept.indices, num_classes)
    check_shape(
        jnp.shape(kept.values) == indices.shape
        and jnp.shape(kept.rest) == indices.shape[:-1] == examples,
        f"kept logits {jnp.shape(kept.values)} must have the axes of {name} before the last, "
        f"{examples}",
    )
    check_shape(
        num_classes >= indices.shape[-1],
        f"more logits were kept than the student's {num_classes} classes",
    )
    return TopK(jnp.asarray(kept.values), indices, jnp.asarray(kept.rest))


def soften_kept(kept: TopK, num_classes: int, temperature: Array) -> Softmax:
    """Returns the teacher's distribution `[..., k + 1]` over the kept classes and the rest."""
    dtype = temperature.dtype
    num_others = num_classes - kept.indices.shape[-1]
    # The logits of the rest are taken as equal, so that each of them is log(exp(rest) / n).
    rest = kept.rest.astype(dtype) - math.log(max(num_others, 1))
    teacher = jnp.concatenate([kept.values.astype(dtype), rest[..., None]], -1)
    is_kept = jnp.arange(teacher.shape[-1]) < kept.indices.shape[-1]
    count = jnp.where(is_kept, 1, max(num_others, 1))
    possible = teacher != -jnp.inf
    finite = jnp.where(possible, teacher, 0) / temperature
    finite = finite + jnp.broadcast_to(jnp.log(count.astype(finite.dtype)), finite.shape)
    return softmax(jnp.where(possible, finite, -jnp.inf))
