"""Losses on the relations between the examples of a batch: similarities, distances, angles, correlations.

A relation belongs to several examples. Each loss is split into one value per example so that the mean over the examples
that count is the batch's loss. Student and teacher may differ in all but their number of examples: only relations are
compared, so no projection is needed. Features of less than 32 bits are widened first, and products are taken in full
precision.
"""

import math

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from jaxkd.losses._arrays import (
    check_positive,
    check_shape,
    examples_mask,
    flat,
    inverse,
    normalize,
    only,
    safe_divide,
    safe_sqrt,
    wide_pair,
)
from jaxkd.losses.logits import kl_divergence, temperature_softmax

_LEAST_SIMILARITY = 1e-7


def similarity_preserving_loss(
    student_features: ArrayLike, teacher_features: ArrayLike, *, where: ArrayLike | None = None
) -> Array:
    """Squared difference of the rows of student's and teacher's similarity matrices.

    (1/b) Σ_j (G_ij / ‖G_i‖ − H_ij / ‖H_i‖)² with G = S Sᵀ, H = T Tᵀ and b examples

    The mean over the examples is the paper's ‖·‖²_F / b². Rows have the L2 norm 1; torchdistill passes the axis in the
    place of the norm's order, which makes it an L1 norm. A zero vector has a zero row and gets no gradient from it.

    Args:
        student_features: `[B, ...]`, floating-point.
        teacher_features: `[B, ...]`, of any other sizes.
        where: `[B]`, the examples that count (True); the result is as if the others were sliced away.

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
    student, teacher, where = _features(student_features, teacher_features, where)
    gap = normalize(_gram(student)) - normalize(_gram(teacher))
    return jnp.square(gap).sum(-1) / _count(where, gap)


def relational_distance_loss(
    student_features: ArrayLike, teacher_features: ArrayLike, *, where: ArrayLike | None = None
) -> Array:
    """Huber loss between student's and teacher's distances of examples, each relative to their mean.

    (1/b) Σ_j huber(‖s_i − s_j‖ / μ_s − ‖t_i − t_j‖ / μ_t), μ the mean over all i ≠ j

    A pair belongs to its first example i. The mean over the examples is the mean over all b² pairs of the authors'
    code, to which their weight of 25 belongs; the paper's formula is the sum over them. A duplicate is at distance 0
    with gradient 0, and where all examples are equal so is every relative distance.

    Args:
        student_features: `[B, ...]`, floating-point.
        teacher_features: `[B, ...]`, of any other sizes.
        where: `[B]`, the examples that count (True); the result is as if the others were sliced away.

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
    student, teacher, where = _features(student_features, teacher_features, where)
    losses = optax.huber_loss(_relative_distances(student, where), _relative_distances(teacher, where))
    return losses.sum(-1) / _count(where, losses)


def relational_angle_loss(
    student_features: ArrayLike, teacher_features: ArrayLike, *, where: ArrayLike | None = None
) -> Array:
    """Huber loss between the cosines of the angles that triplets of examples span.

    (1/b²) Σ_i Σ_k huber(cos ∠(s_i, s_v, s_k) − cos ∠(t_i, t_v, t_k)) for the vertex v

    A triplet belongs to its vertex. The mean over the examples is the mean over all b³ triplets of the authors' code,
    to which their weight of 50 belongs; the paper's formula is the sum over them. An angle with a side of length 0
    has the cosine 0 and no gradient; a short side has a gradient that is as large as the side is short. Takes memory
    for b² differences of features and b³ cosines.

    Args:
        student_features: `[B, ...]`, floating-point.
        teacher_features: `[B, ...]`, of any other sizes.
        where: `[B]`, the examples that count (True); the result is as if the others were sliced away.

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
    student, teacher, where = _features(student_features, teacher_features, where)
    losses = optax.huber_loss(_angles(student, where), _angles(teacher, where))
    return losses.sum((-2, -1)) / jnp.square(_count(where, losses))


def probabilistic_transfer_loss(
    student_features: ArrayLike, teacher_features: ArrayLike, *, where: ArrayLike | None = None
) -> Array:
    """Kullback–Leibler divergence between the probabilities of picking one example as the neighbour of another.

    Σ_{j≠i} p_ij log(p_ij / q_ij) with p_ij = k_ij / Σ_{l≠i} k_il, k_ij = (1 + cos(t_i, t_j)) / 2, q of s likewise

    The mean over the examples is the paper's sum over them divided by b. The authors' code keeps j = i, takes the mean
    over all b² pairs, and adds 1e-7 to both sides of the quotient; here no similarity is less than 1e-7, so that the
    divergence stays finite. A zero vector has the cosine 0 with all others; one example alone gives 0.

    Args:
        student_features: `[B, ...]`, floating-point.
        teacher_features: `[B, ...]`, of any other sizes.
        where: `[B]`, the examples that count (True); the result is as if the others were sliced away.

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
    student, teacher, where = _features(student_features, teacher_features, where)
    others = _pairs(where) & ~jnp.eye(len(where), dtype=bool)
    # The softmax of log-similarities is the similarities divided by their sum.
    return kl_divergence(_log_similarities(student), _log_similarities(teacher), temperature=1.0, where=others)


def correlation_congruence_loss(
    student_features: ArrayLike,
    teacher_features: ArrayLike,
    *,
    gamma: ArrayLike = 0.4,
    order: int = 2,
    where: ArrayLike | None = None,
) -> Array:
    """Squared difference of student's and teacher's correlations, by a Gaussian kernel of the directions of features.

    (1/b) Σ_j (K(s_i, s_j) − K(t_i, t_j))² with K(x, y) = e^(−2γ) Σ_{p=0..P} (2γ)^p / p! · cos(x, y)^p

    K is the Taylor expansion of exp(−γ ‖x − y‖²) for x and y of length 1. The mean over the examples is the paper's
    mean over all b² pairs. RepDistiller's `Correlation` is another loss: products of the absolute student-teacher
    differences of neighbouring examples. A zero vector has the cosine 0 with all others and gets no gradient.

    Args:
        student_features: `[B, ...]`, floating-point.
        teacher_features: `[B, ...]`, of any other sizes.
        gamma: γ > 0, a scalar.
        order: P ≥ 1, the highest power of the expansion.
        where: `[B]`, the examples that count (True); the result is as if the others were sliced away.

    Returns:
        One value per example `[B]`, in float32 or wider; 0 for examples that do not count.

    Raises:
        ValueError: If the numbers of examples differ, `where` is not one boolean for each, `gamma` is not a positive
            scalar or `order` is less than 1.
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
    check_positive("gamma", gamma)
    if order < 1:
        raise ValueError(f"order is the highest power of the expansion and must be at least 1, got {order}")
    student, teacher, where = _features(student_features, teacher_features, where)
    rate = 2 * jnp.asarray(gamma, student.dtype)
    student, teacher = _gram(normalize(student)), _gram(normalize(teacher))
    # The power 0 is the same constant on both sides.
    series = sum(rate**p / math.factorial(p) * (student**p - teacher**p) for p in range(1, order + 1))
    gap = jnp.exp(-rate) * series
    return jnp.square(gap).sum(-1) / _count(where, gap)


def linear_cka(student_features: ArrayLike, teacher_features: ArrayLike, *, where: ArrayLike | None = None) -> Array:
    """Linear centred kernel alignment: how alike the similarity structures of two sets of features are.

    Σ_ij K_ij L_ij / (‖K‖_F ‖L‖_F) with K = S Sᵀ, L = T Tᵀ of features whose mean over the examples is subtracted

    It is 1 for features that are equal up to a rotation, a scale and a shift. Features that are the same in all
    examples, one example alone among them, have no structure: 0. A small batch overestimates it.

    Args:
        student_features: `[B, ...]`, floating-point.
        teacher_features: `[B, ...]`, of any other sizes.
        where: `[B]`, the examples that count (True); the result is as if the others were sliced away.

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
    student, teacher, where = _features(student_features, teacher_features, where)
    return (_structure(student, where) * _structure(teacher, where)).sum().clip(0, 1)


def linear_cka_loss(
    student_features: ArrayLike, teacher_features: ArrayLike, *, where: ArrayLike | None = None
) -> Array:
    """One minus the linear centred kernel alignment, split over the examples.

    (b/2) Σ_j (K_ij / ‖K‖_F − L_ij / ‖L‖_F)² with K and L of `linear_cka`

    The mean over the examples is 1 − CKA; each value is 0 where the structures are equal. Features that are the same in
    all examples give 1 with no gradient.

    Args:
        student_features: `[B, ...]`, floating-point.
        teacher_features: `[B, ...]`, of any other sizes.
        where: `[B]`, the examples that count (True); the result is as if the others were sliced away.

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
    student, teacher, where = _features(student_features, teacher_features, where)
    student, teacher = _structure(student, where), _structure(teacher, where)
    values = jnp.square(student - teacher).sum(-1) * _count(where, student) / 2
    return only(where, jnp.where(student.any() & teacher.any(), values, 1))


def dist_inter_loss(
    student_logits: ArrayLike, teacher_logits: ArrayLike, *, temperature: ArrayLike, where: ArrayLike | None = None
) -> Array:
    """One minus the correlation, over the classes, of student's and teacher's softened probabilities, times T².

    T² (1 − pearson(softmax(s / T), softmax(t / T)))

    The factor T² is that of the authors' code, to which their weights belong, and of every soft term here. Unlike a
    divergence a correlation keeps its size as T grows, so that the factor makes this term stronger. Uniform
    probabilities, and those of a single class, have no correlation: T² with no gradient.

    Args:
        student_logits: `[B, C]`, floating-point. A class at −inf has probability 0.
        teacher_logits: The same shape.
        temperature: T > 0, a scalar.
        where: The examples that count (True) `[B]`; 0 for the others, whatever they hold.

    Returns:
        One value per example `[B]`, in float32 or wider, between 0 and 2 T².

    Raises:
        ValueError: If the shapes differ or the temperature is not a positive scalar.
        TypeError: If the logits are not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student, teacher = jnp.log(jnp.array([[1.0, 2.0, 3.0]])), jnp.log(jnp.array([[1.0, 3.0, 2.0]]))
        >>> print(losses.dist_inter_loss(student, teacher, temperature=1.0))
        [0.500]

    References:
        Huang et al., Knowledge Distillation from A Stronger Teacher, https://arxiv.org/abs/2205.10536
    """
    logits = _logits(student_logits, teacher_logits)
    where = examples_mask(where, len(logits[0]))
    softened = (temperature_softmax(only(where, z), temperature=temperature) for z in logits)
    shifted = (p - p[:, :1] for p in softened)  # exactly 0 where all are equal
    deviations = (p - p.mean(1, keepdims=True) for p in shifted)
    (student, varies), (teacher, also) = (_unit(p, 1) for p in deviations)
    values = jnp.where(varies & also, jnp.square(student - teacher).sum(1, keepdims=True) / 2, 1)[:, 0]
    return only(where, jnp.square(jnp.asarray(temperature, values.dtype)) * values)


def dist_intra_loss(
    student_logits: ArrayLike, teacher_logits: ArrayLike, *, temperature: ArrayLike, where: ArrayLike | None = None
) -> Array:
    """One minus the correlation, over the examples, of each class' softened probabilities, times T².

    (T² b / 2C) Σ_c (u_ic − v_ic)² with u, v the softened probabilities, in each class centred and scaled to length 1

    The mean over the examples is the paper's mean over classes, T² (1/C) Σ_c (1 − pearson_c). The factor T² is that of
    `dist_inter_loss`. A class whose probability is the same in all examples, as each is where one example stands alone,
    has the correlation 0 with no gradient. The authors' code adds 1e-8 to the product of the lengths, which draws the
    correlation of improbable classes to 0 as well; here it does not depend on how probable a class is.

    Args:
        student_logits: `[B, C]`, floating-point. A class at −inf has probability 0. Pixels count as examples: reshape.
        teacher_logits: The same shape.
        temperature: T > 0, a scalar.
        where: `[B]`, the examples that count (True); the result is as if the others were sliced away.

    Returns:
        One value per example `[B]`, in float32 or wider; 0 for examples that do not count.

    Raises:
        ValueError: If the shapes differ, the temperature is not a positive scalar or `where` is not one boolean for
            each example.
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
    logits = _logits(student_logits, teacher_logits)
    where = examples_mask(where, len(logits[0]))
    softened = (temperature_softmax(only(where, z), temperature=temperature) for z in logits)
    # Over the class's mean, so that squares of improbable classes do not vanish.
    means = ((p, jax.lax.stop_gradient(p.sum(0, keepdims=True)) / _count(where, p)) for p in softened)
    (student, varies), (teacher, also) = (_unit(_centred(p * inverse(mean), where), 0) for p, mean in means)
    values = jnp.where(varies & also, jnp.square(student - teacher) * _count(where, student) / 2, 1).mean(1)
    return only(where, jnp.square(jnp.asarray(temperature, values.dtype)) * values)


def _features(student: ArrayLike, teacher: ArrayLike, where: ArrayLike | None) -> tuple[Array, Array, Array]:
    """Two `[B, D]`, zero in the examples that do not count, and which do."""
    student, teacher = wide_pair(("student_features", "teacher_features"), student, teacher)
    check_shape(
        student.ndim > 0 and teacher.ndim > 0 and len(student) == len(teacher),
        f"student_features {student.shape} and teacher_features {teacher.shape} must have the same number of examples "
        "along axis 0",
    )
    where = examples_mask(where, len(student))
    # Before the arithmetic: a mask after it would stop NaN in the value but not in the gradient.
    return flat(only(where, student)), flat(only(where, teacher)), where


def _logits(student_logits: ArrayLike, teacher_logits: ArrayLike) -> tuple[Array, Array]:
    student, teacher = wide_pair(("student_logits", "teacher_logits"), student_logits, teacher_logits)
    check_shape(
        student.ndim == 2 and student.shape == teacher.shape,
        f"student_logits {student.shape} and teacher_logits {teacher.shape} must have one shape [B, C]; "
        "reshape pixels or tokens to examples, slice or project the larger set of classes first",
    )
    return student, teacher


def _count(where: Array, like: Array) -> Array:
    """The number of examples that count, at least 1, in the dtype of an array."""
    return jnp.maximum(where.sum(), 1).astype(like.dtype)


def _pairs(where: Array) -> Array:
    return where[:, None] & where[None]


def _gram(x: Array) -> Array:
    return jnp.matmul(x, x.T, precision="highest")


def _differences(x: Array, where: Array) -> Array:
    """x_j − x_i at [i, j], `[B, B, D]`. Unlike distances from a Gram matrix they are exactly 0 for duplicates."""
    return only(_pairs(where), x[None] - x[:, None])


def _relative_distances(x: Array, where: Array) -> Array:
    """Distances divided by their mean over the pairs of different examples."""
    distances = safe_sqrt(jnp.square(_differences(x, where)).sum(-1))
    count = _count(where, x)
    return count * (count - 1) * safe_divide(distances, distances.sum())


def _angles(x: Array, where: Array) -> Array:
    """Cosines of the angles between x_i and x_k seen from x_v, at [v, i, k]."""
    directions = normalize(_differences(x, where))
    return jnp.einsum("vid,vkd->vik", directions, directions, precision="highest")


def _log_similarities(x: Array) -> Array:
    return jnp.log(jnp.maximum((1 + _gram(normalize(x))) / 2, _LEAST_SIMILARITY))


def _centred(x: Array, where: Array) -> Array:
    """Rows minus their mean over those that count, exactly 0 in columns where these are all equal."""
    if not len(x):
        return x
    # The mean of equal numbers is off by a rounding error, which normalisation would make the signal.
    x = only(where, x - jnp.take(x, where.argmax()[None], axis=0))
    return only(where, x - x.sum(0, keepdims=True) / _count(where, x))


def _unit(x: Array, axis: int) -> tuple[Array, Array]:
    """Vectors of no extreme size scaled to length 1, and which of them are not 0."""
    length = safe_sqrt(jnp.square(x).sum(axis, keepdims=True))
    return x * inverse(length), length != 0


def _structure(x: Array, where: Array) -> Array:
    """Gram matrix of the centred features, of Frobenius norm 1, or 0 if they do not vary."""
    return normalize(_gram(_centred(x, where)), axis=(0, 1))
