"""Losses on the scores that rank documents for a query, and on nested embeddings.

Scores are `[..., D]`: one row for each query, with one score for each of its D documents. In a
batch of queries and documents, `queries @ documents.T` scores each document for each query, so that
the documents of other queries are candidates too. A cross-encoder as the teacher and a student of
embeddings need not have the same scale of scores for `margin_mse_loss`, and `score_divergence_loss`
does not depend on a query's mean score either.

Embeddings themselves are compared by losses of other modules: `features.hint_loss` is their mean
squared difference, `transformer.hidden_cosine_loss` one minus their cosine, both after
`features.project` where the student's are narrower; `relations` and `contrastive` need no
projection or learn from the batch's other examples.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxkd.losses._arrays import (
    broadcast_mask,
    check_positive,
    check_shape,
    safe_divide,
    upcast_pair,
)
from jaxkd.losses._softmax import divergence, softmax
from jaxkd.losses.teachers import weighted_sum


def margin_mse_loss(
    student_scores: ArrayLike, teacher_scores: ArrayLike, *, where: ArrayLike | None = None
) -> Array:
    """Computes the mean squared difference of the margins of a positive over negatives (MarginMSE).

    (1/N) Σ_j ((s_0 − s_j) − (t_0 − t_j))² over the N negatives j

    Adding a constant to all scores of a query changes nothing, so student and teacher may have
    different ranges; their scales must agree. The paper and its code have one negative for each
    query, `jnp.stack([positive, negative], -1)`. sentence-transformers takes the teacher's margins
    t_0 − t_j as its labels.

    Args:
        student_scores: `[..., 1 + N]`, finite, floating-point: the positive's score first, then
            those of the negatives.
        teacher_scores: The same shape.
        where: Booleans, the documents that count (True), broadcast against the scores, such as a
            query's negatives that are not padding. Scores of others may be −inf or NaN.

    Returns:
        One value per query `[...]`, in float32 or wider; 0 where the positive or all negatives do
        not count.

    Raises:
        ValueError: If the shapes differ, there is no negative or `where` cannot be broadcast.
        TypeError: If the scores are not floating-point or `where` is not boolean.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student, teacher = jnp.array([[3.0, 1.0, 0.0]]), jnp.array([[9.0, 6.0, 4.0]])
        >>> print(losses.margin_mse_loss(student, teacher))  # ((2 − 3)² + (3 − 5)²) / 2
        [2.5]

    References:
        Hofstätter et al., Improving Efficient Neural Ranking Models with Cross-Architecture
        Knowledge Distillation, https://arxiv.org/abs/2010.02666
    """
    student, teacher, where = _check_scores(student_scores, teacher_scores, where)
    check_shape(
        student.shape[-1] >= 2,
        f"student_scores {student.shape} must have a positive and at least one negative in their "
        "last axis: pass jnp.stack([positive, negative], -1)",
    )
    # The margins are compared after the mask: −inf − (−inf) is NaN.
    student_margins = student[..., :1] - student[..., 1:]
    teacher_margins = teacher[..., :1] - teacher[..., 1:]
    counted = where[..., :1] & where[..., 1:]
    squares = jnp.where(counted, jnp.square(student_margins - teacher_margins), 0)
    return safe_divide(squares.sum(-1), counted.sum(-1).astype(squares.dtype))


def score_divergence_loss(
    student_scores: ArrayLike,
    teacher_scores: ArrayLike,
    *,
    temperature: ArrayLike = 2.0,
    where: ArrayLike | None = None,
) -> Array:
    """Computes KL(teacher ‖ student) of the softmax over the documents of a query, times T².

    T² Σ_d p_d (log p_d − log q_d) with p = softmax(t / T), q = softmax(s / T) over the documents

    The documents of a query may be those of the whole batch: `queries @ documents.T`. Unlike
    `kl_divergence` of classes, a query may have a single document, whose value is 0.
    sentence-transformers computes the same with T = 1 by default, and its mean over the queries.
    Cosines, which are between −1 and 1, need a temperature far below 1, such as 0.05, or the
    softmax is nearly uniform.

    Args:
        student_scores: `[..., D]`, floating-point.
        teacher_scores: The same shape. A document at −inf contributes nothing.
        temperature: T > 0, a scalar.
        where: Booleans, the documents that count (True), `[..., D]` or broadcast against the
            scores; the result is as if the others were not among the documents.

    Returns:
        One value per query `[...]`, in float32 or wider; 0 where no document counts.

    Raises:
        ValueError: If the shapes differ, the temperature is not a positive scalar or `where` cannot
            be broadcast.
        TypeError: If the scores are not floating-point or `where` is not boolean.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> queries, documents = jnp.eye(2), jnp.array([[2.0, 0.0], [1.0, 1.0]])
        >>> student = queries @ documents.T
        >>> teacher = jnp.array([[4.0, 0.0], [0.0, 1.0]])
        >>> print(losses.score_divergence_loss(student, teacher, temperature=1.0))
        [0.241 0.   ]

    References:
        Lin et al., Distilling Dense Representations for Ranking using Tightly-Coupled Teachers,
        https://arxiv.org/abs/2010.11386
    """
    temperature = check_positive("temperature", temperature)
    student, teacher, where = _check_scores(student_scores, teacher_scores, where)
    student, teacher = (
        softmax(scores, where=where, temperature=temperature) for scores in (student, teacher)
    )
    values = divergence(teacher, student)
    return jnp.square(jnp.asarray(temperature, values.dtype)) * values


def nested_loss(
    loss: Callable[[Array, Array], Array],
    student_embeddings: ArrayLike,
    teacher_embeddings: ArrayLike,
    *,
    dims: Sequence[int],
    weights: ArrayLike | Sequence[float] | None = None,
) -> Array:
    """Adds up a loss on embeddings over prefixes of different sizes (Matryoshka embeddings).

    Σ_m w_m loss(s[:m], t[:m]) over the sizes m

    The first m features of an embedding are then an embedding themselves. Name the full size among
    `dims`, or the last features are not trained. Both sides are cut; for a teacher whose prefixes
    mean nothing, pass a loss that ignores them, such as
    `lambda s, _: losses.similarity_preserving_loss(s, teacher)`. The paper trains a classifier on
    each prefix, with all weights 1. Prefixes are not scaled to length 1 here, as
    sentence-transformers does; `hidden_cosine_loss` does not depend on their length.

    Args:
        loss: Maps two arrays `[..., m]` to one value per example, such as `hidden_cosine_loss`.
        student_embeddings: `[..., D]`, floating-point.
        teacher_embeddings: `[..., D']`, floating-point, at least as wide as the largest prefix.
        dims: The sizes m of the prefixes, such as `(64, 128, 256)`.
        weights: w, one weight for each size; by default 1. A prefix of weight 0 is left out.

    Returns:
        One value per example, of the shape that `loss` returns.

    Raises:
        ValueError: If there is no size, a size is not in [1, D] or the number of weights is not
            that of the sizes.
        TypeError: If the embeddings are not floating-point or a size is not an integer.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student, teacher = jnp.array([[1.0, 0.0, 2.0]]), jnp.array([[1.0, 2.0, 2.0]])
        >>> print(losses.nested_loss(losses.hint_loss, student, teacher, dims=(1, 2)))  # 0 + 4 / 2
        [2.]

    References:
        Kusupati et al., Matryoshka Representation Learning, https://arxiv.org/abs/2205.13147
    """
    student, teacher = upcast_pair(
        ("student_embeddings", "teacher_embeddings"), student_embeddings, teacher_embeddings
    )
    # `operator.index` refuses 0.5, where `int` would return 0.
    dims = tuple(operator.index(size) for size in dims)
    check_shape(
        student.ndim > 0 and teacher.ndim > 0 and len(dims) > 0,
        f"student_embeddings {student.shape} and teacher_embeddings {teacher.shape} must be "
        f"[..., D], with at least one size in dims, got {dims}",
    )
    largest = min(student.shape[-1], teacher.shape[-1])
    outside = [size for size in dims if not 1 <= size <= largest]
    check_shape(
        not outside,
        f"dims must be between 1 and {largest}, the size of the narrower embeddings of "
        f"{student.shape} and {teacher.shape}, got {outside}",
    )
    terms = [loss(student[..., :size], teacher[..., :size]) for size in dims]
    return weighted_sum(terms, weights=(1.0,) * len(dims) if weights is None else weights)


def _check_scores(
    student_scores: ArrayLike, teacher_scores: ArrayLike, where: ArrayLike | None
) -> tuple[Array, Array, Array]:
    """Returns scores in one dtype, 0 where they do not count, and the mask of those that do."""
    student, teacher = upcast_pair(
        ("student_scores", "teacher_scores"), student_scores, teacher_scores
    )
    check_shape(
        student.ndim > 0 and student.shape == teacher.shape,
        f"student_scores {student.shape} and teacher_scores {teacher.shape} must have the same "
        "shape [..., D], with one score for each document of a query",
    )
    if where is not None:
        shape = jnp.shape(where)
        # In a batch there often are as many documents as queries.
        check_shape(
            len(shape) != 1 or student.ndim == 1 or shape[0] != len(student),
            f"where {shape} may be a mask of the documents or of the queries of {student.shape}: "
            "write where[None] for documents that all queries share, or weigh the values of the "
            "loss for queries",
        )
    where = broadcast_mask(where, student.shape)
    return jnp.where(where, student, 0), jnp.where(where, teacher, 0), where
