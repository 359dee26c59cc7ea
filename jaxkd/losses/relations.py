"""Losses on relations between the examples of a batch, such as distances and correlations.

A relation belongs to several examples. Each loss is split into one value per example so that the
mean over the examples that count is the batch's loss. Only relations are compared, so student and
teacher may differ in everything but the number of examples, and no projection is needed. Features
narrower than 32 bits are widened first, and products are computed in full precision.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from jaxkd.losses._arrays import (
    check_example_mask,
    check_positive,
    check_shape,
    flatten_examples,
    gram_matrix,
    normalize,
    safe_divide,
    safe_reciprocal,
    safe_sqrt,
    upcast_pair,
    zero_masked,
)
from jaxkd.losses._softmax import scores_divergence
from jaxkd.losses.logits import temperature_softmax

# A similarity of 0, of opposite directions, would make `probabilistic_transfer_loss` infinite.
_MIN_SIMILARITY = 1e-7


def similarity_preserving_loss(
    student_features: ArrayLike, teacher_features: ArrayLike, *, where: ArrayLike | None = None
) -> Array:
    """Computes the squared difference of the rows of the similarity matrices (SP).

    (1/b) Σ_j (G_ij / ‖G_i‖ − H_ij / ‖H_i‖)² with G = S Sᵀ, H = T Tᵀ and b examples

    The mean over the examples is the paper's ‖·‖²_F / b². Rows have the L2 norm 1; torchdistill
    passes the axis as the order of the norm, which makes it an L1 norm. A zero vector has a zero
    row and gets no gradient from it.

    Args:
        student_features: `[B, ...]`, floating-point.
        teacher_features: `[B, ...]`, of any other sizes.
        where: `[B]`, the examples that count (True); the result is as if the others were sliced
            away.

    Returns:
        One value per example `[B]`, in float32 or wider; 0 for examples that do not count.

    Raises:
        ValueError: If the numbers of examples differ or `where` is not one boolean for each.
        TypeError: If the features are not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student, teacher = jnp.array([[1.0, 0.0], [1.0, 1.0]]), jnp.array([[1.0], [1.0]])
        >>> print(losses.similarity_preserving_loss(student, teacher))
        [0.000 0.051]

    References:
        Tung and Mori, Similarity-Preserving Knowledge Distillation, https://arxiv.org/abs/1907.09682
    """
    student, teacher, where = _check_features(student_features, teacher_features, where)
    difference = normalize(gram_matrix(student)) - normalize(gram_matrix(teacher))
    return jnp.square(difference).sum(-1) / _count_examples(where, difference.dtype)


def relational_distance_loss(
    student_features: ArrayLike, teacher_features: ArrayLike, *, where: ArrayLike | None = None
) -> Array:
    """Computes the Huber loss between relative distances of examples (RKD-D).

    (1/b) Σ_j huber(‖s_i − s_j‖ / μ_s − ‖t_i − t_j‖ / μ_t), μ the mean over all i ≠ j

    A pair belongs to its first example i. The mean over the examples is the mean over all b² pairs,
    as in the authors' code, whose weight of 25 refers to it; the paper's formula is the sum over
    pairs. A duplicate has the distance 0 with gradient 0. If all examples are equal, so are all
    relative distances: 0 with gradient 0.

    Args:
        student_features: `[B, ...]`, floating-point.
        teacher_features: `[B, ...]`, of any other sizes.
        where: `[B]`, the examples that count (True); the result is as if the others were sliced
            away.

    Returns:
        One value per example `[B]`, in float32 or wider; 0 for examples that do not count.

    Raises:
        ValueError: If the numbers of examples differ or `where` is not one boolean for each.
        TypeError: If the features are not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student, teacher = jnp.array([[0.0], [1.0], [2.0]]), jnp.array([[0.0], [2.0], [2.0]])
        >>> print(losses.relational_distance_loss(student, teacher))
        [0.094 0.188 0.094]

    References:
        Park et al., Relational Knowledge Distillation, https://arxiv.org/abs/1904.05068
    """
    student, teacher, where = _check_features(student_features, teacher_features, where)
    losses = optax.huber_loss(
        _relative_distances(student, where), _relative_distances(teacher, where)
    )
    return losses.sum(-1) / _count_examples(where, losses.dtype)


def relational_angle_loss(
    student_features: ArrayLike, teacher_features: ArrayLike, *, where: ArrayLike | None = None
) -> Array:
    """Computes the Huber loss between cosines of the angles of triplets of examples (RKD-A).

    (1/b²) Σ_i Σ_k huber(cos ∠(s_i, s_v, s_k) − cos ∠(t_i, t_v, t_k)) for the vertex v

    A triplet belongs to its vertex. The mean over the examples is the mean over all b³ triplets, as
    in the authors' code, whose weight of 50 refers to it; the paper's formula is the sum over
    triplets. An angle with a side of length 0 has the cosine 0 and no gradient. The gradient grows
    as the inverse of the length of a side. Memory is needed for b² differences of features and b³
    cosines.

    Args:
        student_features: `[B, ...]`, floating-point.
        teacher_features: `[B, ...]`, of any other sizes.
        where: `[B]`, the examples that count (True); the result is as if the others were sliced
            away.

    Returns:
        One value per example `[B]`, in float32 or wider; 0 for examples that do not count.

    Raises:
        ValueError: If the numbers of examples differ or `where` is not one boolean for each.
        TypeError: If the features are not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> teacher = jnp.array([[0.0], [1.0], [2.0]])
        >>> print(losses.relational_angle_loss(student, teacher))
        [0.111 0.268 0.010]

    References:
        Park et al., Relational Knowledge Distillation, https://arxiv.org/abs/1904.05068
    """
    student, teacher, where = _check_features(student_features, teacher_features, where)
    losses = optax.huber_loss(_angle_cosines(student, where), _angle_cosines(teacher, where))
    return losses.sum((-2, -1)) / jnp.square(_count_examples(where, losses.dtype))


def probabilistic_transfer_loss(
    student_features: ArrayLike, teacher_features: ArrayLike, *, where: ArrayLike | None = None
) -> Array:
    """Computes the Kullback–Leibler divergence of neighbour probabilities in the batch (PKT).

    Σ_{j≠i} p_ij log(p_ij / q_ij) with p_ij = k_ij / Σ_{l≠i} k_il, k_ij = (1 + cos(t_i, t_j)) / 2,
    and q the same of s

    p_ij is the probability of choosing j as the neighbour of i. The mean over the examples is the
    paper's sum over them divided by b. The authors' code keeps j = i, takes the mean over all b²
    pairs, and adds 1e-7 to numerator and denominator of the quotient; here every similarity is at
    least 1e-7, so that the divergence stays finite. A zero vector has the cosine 0 with all others.
    A single example gives 0.

    Args:
        student_features: `[B, ...]`, floating-point.
        teacher_features: `[B, ...]`, of any other sizes.
        where: `[B]`, the examples that count (True); the result is as if the others were sliced
            away.

    Returns:
        One value per example `[B]`, in float32 or wider; 0 for examples that do not count.

    Raises:
        ValueError: If the numbers of examples differ or `where` is not one boolean for each.
        TypeError: If the features are not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
        >>> teacher = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> print(losses.probabilistic_transfer_loss(student, teacher))
        [0.059 0.057 0.231]

    References:
        Passalis and Tefas, Learning Deep Representations with Probabilistic Knowledge Transfer,
        https://arxiv.org/abs/1803.10837
    """
    student, teacher, where = _check_features(student_features, teacher_features, where)
    is_neighbour = _pair_mask(where) & ~jnp.eye(len(where), dtype=bool)
    # The softmax of log-similarities is the similarities divided by their sum.
    return scores_divergence(_log_similarities(student), _log_similarities(teacher), is_neighbour)


def correlation_congruence_loss(
    student_features: ArrayLike,
    teacher_features: ArrayLike,
    *,
    gamma: ArrayLike = 0.4,
    order: int = 2,
    where: ArrayLike | None = None,
) -> Array:
    """Computes the squared difference of Gaussian-kernel correlations of examples (CCKD).

    (1/b) Σ_j (K(s_i, s_j) − K(t_i, t_j))² with
    K(x, y) = e^(−2γ) Σ_{p=0..P} (2γ)^p / p! · cos(x, y)^p

    K is the Taylor expansion of exp(−γ ‖x − y‖²) for x and y of length 1. The mean over the
    examples is the paper's mean over all b² pairs. RepDistiller's `Correlation` is a different
    loss: products of the absolute student-teacher differences of neighbouring examples. A zero
    vector has the cosine 0 with all others and gets no gradient.

    Args:
        student_features: `[B, ...]`, floating-point.
        teacher_features: `[B, ...]`, of any other sizes.
        gamma: γ > 0, a scalar.
        order: P ≥ 1, the highest power of the expansion.
        where: `[B]`, the examples that count (True); the result is as if the others were sliced
            away.

    Returns:
        One value per example `[B]`, in float32 or wider; 0 for examples that do not count.

    Raises:
        ValueError: If the numbers of examples differ, `where` is not one boolean for each, `gamma`
            is not a positive scalar or `order` is less than 1.
        TypeError: If the features are not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student, teacher = jnp.array([[1.0, 0.0], [1.0, 1.0]]), jnp.array([[1.0], [1.0]])
        >>> print(losses.correlation_congruence_loss(student, teacher))
        [0.0157 0.0157]

    References:
        Peng et al., Correlation Congruence for Knowledge Distillation, https://arxiv.org/abs/1904.01802
    """
    gamma = check_positive("gamma", gamma)
    if order < 1:
        raise ValueError(
            f"order is the highest power of the expansion and must be at least 1, got {order}"
        )
    student, teacher, where = _check_features(student_features, teacher_features, where)
    rate = 2 * jnp.asarray(gamma, student.dtype)
    student_cosines = gram_matrix(normalize(student))
    teacher_cosines = gram_matrix(normalize(teacher))
    # The power 0 is the same constant on both sides.
    series = sum(
        rate**p / math.factorial(p) * (student_cosines**p - teacher_cosines**p)
        for p in range(1, order + 1)
    )
    difference = jnp.exp(-rate) * series
    return jnp.square(difference).sum(-1) / _count_examples(where, difference.dtype)


def linear_cka(
    student_features: ArrayLike, teacher_features: ArrayLike, *, where: ArrayLike | None = None
) -> Array:
    """Computes the linear centred kernel alignment (CKA), a similarity of two sets of features.

    Σ_ij K_ij L_ij / (‖K‖_F ‖L‖_F) with K = S Sᵀ, L = T Tᵀ of features whose mean over the examples
    is subtracted

    It is 1 for features that are equal up to a rotation, a scale and a shift. It is 0 if the
    features of a side are the same in all examples, as for a single example. A small batch
    overestimates it.

    Args:
        student_features: `[B, ...]`, floating-point.
        teacher_features: `[B, ...]`, of any other sizes.
        where: `[B]`, the examples that count (True); the result is as if the others were sliced
            away.

    Returns:
        A scalar in [0, 1], in float32 or wider.

    Raises:
        ValueError: If the numbers of examples differ or `where` is not one boolean for each.
        TypeError: If the features are not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student, teacher = jnp.array([[0.0], [1.0], [2.0]]), jnp.array([[0.0], [1.0], [1.0]])
        >>> print(losses.linear_cka(student, teacher))
        0.75

    References:
        Kornblith et al., Similarity of Neural Network Representations Revisited, https://arxiv.org/abs/1905.00414
    """
    student, teacher, where = _check_features(student_features, teacher_features, where)
    student = _unit_gram_matrix(student, where)
    teacher = _unit_gram_matrix(teacher, where)
    # Rounding would take the alignment of equal features above 1.
    return (student * teacher).sum().clip(0, 1)


def linear_cka_loss(
    student_features: ArrayLike, teacher_features: ArrayLike, *, where: ArrayLike | None = None
) -> Array:
    """Computes one minus the linear centred kernel alignment, split over the examples.

    (b/2) Σ_j (K_ij / ‖K‖_F − L_ij / ‖L‖_F)² with K and L of `linear_cka`

    The mean over the examples is 1 − CKA; every value is 0 where the normalised matrices are equal.
    Features that are the same in all examples give 1 with no gradient.

    Args:
        student_features: `[B, ...]`, floating-point.
        teacher_features: `[B, ...]`, of any other sizes.
        where: `[B]`, the examples that count (True); the result is as if the others were sliced
            away.

    Returns:
        One value per example `[B]`, in float32 or wider; 0 for examples that do not count.

    Raises:
        ValueError: If the numbers of examples differ or `where` is not one boolean for each.
        TypeError: If the features are not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student, teacher = jnp.array([[0.0], [1.0], [2.0]]), jnp.array([[0.0], [1.0], [1.0]])
        >>> print(losses.linear_cka_loss(student, teacher))
        [0.250 0.250 0.250]

    References:
        Kornblith et al., Similarity of Neural Network Representations Revisited, https://arxiv.org/abs/1905.00414
    """
    student, teacher, where = _check_features(student_features, teacher_features, where)
    student = _unit_gram_matrix(student, where)
    teacher = _unit_gram_matrix(teacher, where)
    # Half the squared distance of unit vectors is 1 − cos, without its cancellation near 0.
    values = jnp.square(student - teacher).sum(-1) * _count_examples(where, student.dtype) / 2
    return zero_masked(where, jnp.where(student.any() & teacher.any(), values, 1))


def dist_inter_loss(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: ArrayLike = 2.0,
    where: ArrayLike | None = None,
) -> Array:
    """Computes one minus the student–teacher correlation over the classes, times T² (DIST).

    T² (1 − pearson(softmax(s / T), softmax(t / T)))

    The factor T² is that of the authors' code, whose weights refer to it, and of every soft term in
    this package. Unlike a divergence, a correlation keeps its size as T grows, so that the factor
    strengthens this term. Uniform probabilities have no correlation: the value is T² with no
    gradient.

    Args:
        student_logits: `[B, C]`, floating-point. A class at −inf has probability 0.
        teacher_logits: The same shape.
        temperature: T > 0, a scalar.
        where: The examples that count (True) `[B]`; 0 for the others, whatever their values.

    Returns:
        One value per example `[B]`, in float32 or wider, between 0 and 2 T².

    Raises:
        ValueError: If the shapes differ or the temperature is not a positive scalar.
        TypeError: If the logits are not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student = jnp.log(jnp.array([[1.0, 2.0, 3.0]]))
        >>> teacher = jnp.log(jnp.array([[1.0, 3.0, 2.0]]))
        >>> print(losses.dist_inter_loss(student, teacher, temperature=1.0))
        [0.500]

    References:
        Huang et al., Knowledge Distillation from A Stronger Teacher, https://arxiv.org/abs/2205.10536
    """
    student, teacher, where = _soften_examples(student_logits, teacher_logits, temperature, where)
    student, student_varies = _unit_vectors(_center_classes(student), axis=1)
    teacher, teacher_varies = _unit_vectors(_center_classes(teacher), axis=1)
    distances = jnp.square(student - teacher).sum(1, keepdims=True) / 2
    values = jnp.where(student_varies & teacher_varies, distances, 1)[:, 0]
    return zero_masked(where, jnp.square(jnp.asarray(temperature, values.dtype)) * values)


def dist_intra_loss(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: ArrayLike = 2.0,
    where: ArrayLike | None = None,
) -> Array:
    """Computes one minus the student–teacher correlation over the examples, times T² (DIST).

    (T² b / 2C) Σ_c (u_ic − v_ic)² with u, v the softened probabilities, in each class centred and
    scaled to length 1

    Each class has its correlation. The mean over the examples is the paper's mean over the classes,
    T² (1/C) Σ_c (1 − pearson_c). The factor T² is that of `dist_inter_loss`. A class whose
    probability is the same in all examples, as in a batch of one, has the correlation 0 with no
    gradient. The authors' code adds 1e-8 to the product of the lengths, which draws the correlation
    of improbable classes to 0; here it does not depend on the probability of a class.

    Args:
        student_logits: `[B, C]`, floating-point. A class at −inf has probability 0. Reshape pixels
            to examples.
        teacher_logits: The same shape.
        temperature: T > 0, a scalar.
        where: `[B]`, the examples that count (True); the result is as if the others were sliced
            away.

    Returns:
        One value per example `[B]`, in float32 or wider; 0 for examples that do not count.

    Raises:
        ValueError: If the shapes differ, the temperature is not a positive scalar or `where` is not
            one boolean for each example.
        TypeError: If the logits are not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student = jnp.log(jnp.array([[0.1, 0.9], [0.2, 0.8], [0.3, 0.7]]))
        >>> teacher = jnp.log(jnp.array([[0.1, 0.9], [0.3, 0.7], [0.2, 0.8]]))
        >>> print(losses.dist_intra_loss(student, teacher, temperature=1.0))
        [0.00 0.75 0.75]

    References:
        Huang et al., Knowledge Distillation from A Stronger Teacher, https://arxiv.org/abs/2205.10536
    """
    student, teacher, where = _soften_examples(student_logits, teacher_logits, temperature, where)
    count = _count_examples(where, student.dtype)
    student, student_varies = _unit_vectors(_center_relative(student, where), axis=0)
    teacher, teacher_varies = _unit_vectors(_center_relative(teacher, where), axis=0)
    distances = jnp.square(student - teacher) * count / 2
    values = jnp.where(student_varies & teacher_varies, distances, 1).mean(1)
    return zero_masked(where, jnp.square(jnp.asarray(temperature, values.dtype)) * values)


def _check_features(
    student_features: ArrayLike, teacher_features: ArrayLike, where: ArrayLike | None
) -> tuple[Array, Array, Array]:
    """Returns features `[B, D]`, zero where they are masked, and the mask `[B]`."""
    student, teacher = upcast_pair(
        ("student_features", "teacher_features"), student_features, teacher_features
    )
    check_shape(
        student.ndim > 0 and teacher.ndim > 0 and len(student) == len(teacher),
        f"student_features {student.shape} and teacher_features {teacher.shape} must have the same "
        "number of examples along axis 0",
    )
    where = check_example_mask(where, len(student))
    # Masked before the arithmetic: a mask of the result would keep NaN out of the value but not out
    # of the gradient.
    student = flatten_examples(zero_masked(where, student))
    teacher = flatten_examples(zero_masked(where, teacher))
    return student, teacher, where


def _soften_examples(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    temperature: ArrayLike,
    where: ArrayLike | None,
) -> tuple[Array, Array, Array]:
    """Returns softened probabilities `[B, C]`, uniform where masked, and the mask `[B]`."""
    student, teacher = upcast_pair(
        ("student_logits", "teacher_logits"), student_logits, teacher_logits
    )
    check_shape(
        student.ndim == 2 and student.shape == teacher.shape,
        f"student_logits {student.shape} and teacher_logits {teacher.shape} must have the same "
        "shape [B, C]; reshape pixels or tokens to examples, slice or project the larger set of "
        "classes first",
    )
    where = check_example_mask(where, len(student))
    student = temperature_softmax(zero_masked(where, student), temperature=temperature)
    teacher = temperature_softmax(zero_masked(where, teacher), temperature=temperature)
    return student, teacher, where


def _count_examples(where: Array, dtype: jnp.dtype) -> Array:
    """Returns the number of examples that count, at least 1."""
    return jnp.maximum(where.sum(), 1).astype(dtype)


def _pair_mask(where: Array) -> Array:
    return where[:, None] & where[None]


def _pairwise_differences(x: Array, where: Array) -> Array:
    """Computes x_j − x_i at [i, j], `[B, B, D]`."""
    # Distances from a Gram matrix would take less memory, but are not exactly 0 for duplicates.
    return zero_masked(_pair_mask(where), x[None] - x[:, None])


def _relative_distances(x: Array, where: Array) -> Array:
    """Computes distances divided by their mean over the pairs of different examples."""
    distances = safe_sqrt(jnp.square(_pairwise_differences(x, where)).sum(-1))
    count = _count_examples(where, x.dtype)
    # The mean is over all pairs i ≠ j. A mean over the positive distances, as in the authors' code,
    # would jump as two examples become equal.
    return count * (count - 1) * safe_divide(distances, distances.sum())


def _angle_cosines(x: Array, where: Array) -> Array:
    """Computes the cosine of the angle at x_v between x_i and x_k, at [v, i, k]."""
    directions = normalize(_pairwise_differences(x, where))
    return jnp.einsum("vid,vkd->vik", directions, directions, precision="highest")


def _log_similarities(x: Array) -> Array:
    return jnp.log(jnp.maximum((1 + gram_matrix(normalize(x))) / 2, _MIN_SIMILARITY))


def _center_classes(p: Array) -> Array:
    """Subtracts the mean over the classes, with a result of exactly 0 where all are equal."""
    # The rounded mean of equal numbers may differ from them, and a normalisation would scale that
    # error up to length 1. Their differences from the first are exactly 0, and so is the mean.
    shifted = p - p[:, :1]
    return shifted - shifted.mean(1, keepdims=True)


def _center_relative(p: Array, where: Array) -> Array:
    """Divides the probabilities of each class by their mean, and centres them."""
    # The squares of the probabilities of an improbable class would underflow.
    mean = jax.lax.stop_gradient(p.sum(0, keepdims=True)) / _count_examples(where, p.dtype)
    return _center_examples(p * safe_reciprocal(mean), where)


def _center_examples(x: Array, where: Array) -> Array:
    """Subtracts the mean over the examples that count, exactly 0 in columns of equal numbers."""
    if not len(x):
        return x
    # As in `_center_classes`, with the first example that counts.
    x = zero_masked(where, x - jnp.take(x, where.argmax()[None], axis=0))
    return zero_masked(where, x - x.sum(0, keepdims=True) / _count_examples(where, x.dtype))


def _unit_vectors(x: Array, axis: int) -> tuple[Array, Array]:
    """Scales vectors to length 1, and returns which of them are not 0.

    Unlike `normalize` it does not guard against overflow and underflow of squares.
    """
    length = safe_sqrt(jnp.square(x).sum(axis, keepdims=True))
    return x * safe_reciprocal(length), length != 0


def _unit_gram_matrix(x: Array, where: Array) -> Array:
    """Computes the Gram matrix of centred features, of Frobenius norm 1, or 0 if they are equal."""
    return normalize(gram_matrix(_center_examples(x, where)), axis=(0, 1))
