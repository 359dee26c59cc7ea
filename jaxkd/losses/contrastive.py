"""Contrastive representation distillation (CRD): pairs from one example against pairs from two.

A critic h estimates the probability that a student's and a teacher's embedding belong to the same
example, where each such pair comes with N pairs that do not:

h(s, t) = e^{s·t / τ} / (e^{s·t / τ} + Z N / M)

s and t are scaled to length 1 first, M is the number of examples that negatives are drawn from, and
Z is 1 in the paper. `contrastive_loss` takes the other examples of the batch as negatives. The
other functions keep an embedding of every example of the dataset in a `ContrastiveBank`. A bank is
a value, which is passed in and returned with changes: a custom training loop has to carry it along,
and the stages of a plan cannot hold one.

Embeddings of student and teacher must have the same size. Project both with `features.project`,
whose parameters are trained with the student.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxkd.losses._arrays import (
    check_example_mask,
    check_fraction,
    check_positive,
    check_shape,
    normalize,
    upcast_pair,
    zero_masked,
)


class ContrastiveBank(NamedTuple):
    """Embeddings of every example by student and teacher, and the constants Z of the critic."""

    student: Array
    """`[M, D]`, rows of length 1."""
    teacher: Array
    """`[M, D]`, rows of length 1."""
    student_log_constant: Array
    """log Z for the student's embeddings against the bank's teacher rows, a scalar."""
    teacher_log_constant: Array
    """log Z for the teacher's embeddings against the bank's student rows, a scalar."""


def contrastive_loss(
    student_embeddings: ArrayLike,
    teacher_embeddings: ArrayLike,
    *,
    temperature: ArrayLike = 0.07,
    labels: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Computes the CRD loss of student embeddings against the teacher embeddings of the batch.

    −log h(s_i, t_i) − Σ_j log(1 − h(s_i, t_j)) over the N negatives j of i, with Z = 1 and M
    examples in the batch

    The mean over the examples is the negative of the paper's objective. The student is the anchor.
    Anchoring at the teacher as well, as the authors' code does with its bank, uses the same pairs
    again and doubles the mean (exactly so without `labels`). An example without negatives has the
    value 0.

    Args:
        student_embeddings: `[B, D]`, floating-point; a zero vector is orthogonal to all others.
        teacher_embeddings: The same shape.
        temperature: τ > 0, a scalar; 0.07 in the authors' code.
        labels: `[B]`, integers of at least 0; negatives are then only the examples of other labels.
            A traced one below 0 makes the value of its example NaN. By default all other examples
            are negatives.
        where: The examples that count (True) `[B]`; the result is as if the others were sliced
            away, and 0 for them.

    Returns:
        One value per example `[B]`, in float32 or wider.

    Raises:
        ValueError: If shapes disagree or the temperature is not a positive scalar.
        TypeError: If the embeddings are not floating-point or the labels are not integers.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student, teacher = jnp.eye(2), jnp.array([[3.0, 0.0], [3.0, 4.0]])
        >>> print(losses.contrastive_loss(student, teacher, temperature=0.5))
        [2.099 1.195]

    References:
        Tian et al., Contrastive Representation Distillation, https://arxiv.org/abs/1910.10699
    """
    temperature = check_positive("temperature", temperature)
    student, teacher, where = _unit_embeddings(student_embeddings, teacher_embeddings, where)
    negative = ~jnp.eye(len(where), dtype=bool)
    if labels is not None:
        labels = _check_labels(labels, where.shape)
        negative = labels[:, None] != labels[None, :]
    negative &= where[:, None] & where[None, :]
    num_negatives = negative.sum(1).astype(student.dtype)
    ratio = num_negatives / jnp.maximum(where.sum(), 1).astype(student.dtype)
    scores = _pair_scores(student, teacher, temperature)
    # h is the sigmoid of these log-odds: −log h and −log(1 − h) are softplus, which does not
    # overflow at small temperatures.
    log_odds = scores - jnp.log(jnp.where(ratio > 0, ratio, 1))[:, None]
    positive_terms = jax.nn.softplus(-jnp.diagonal(log_odds))
    negative_terms = jnp.where(negative, jax.nn.softplus(log_odds), 0).sum(1)
    values = jnp.where(ratio > 0, positive_terms + negative_terms, 0)
    if labels is None:
        return values
    return jnp.where(where & (labels < 0), jnp.nan, values)


def init_bank(key: Array, num_examples: int, features: int) -> ContrastiveBank:
    """Initialises a bank with random directions and Z = 1.

    Args:
        key: A random key.
        num_examples: M, the number of examples in the dataset.
        features: D, the size of an embedding; 128 in the authors' code.

    Returns:
        The bank, in float32.

    Example:
        >>> import jax
        >>> from jaxkd import losses
        >>> print(losses.init_bank(jax.random.key(0), 50_000, 128).student.shape)
        (50000, 128)
    """
    student, teacher = normalize(jax.random.normal(key, (2, num_examples, features), jnp.float32))
    return ContrastiveBank(student, teacher, jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))


def draw_negatives(
    key: Array,
    index: ArrayLike,
    *,
    num_examples: int,
    negatives: int,
    labels: ArrayLike | None = None,
) -> Array:
    """Draws the negatives of each example: any other examples, or examples of other labels.

    They are drawn uniformly and with replacement. The authors' code may draw the example itself,
    unless it draws by labels.

    Args:
        key: A random key.
        index: `[B]`, integers in [0, M): the batch's positions in the dataset.
        num_examples: M, at least 2.
        negatives: N, at least 1; 16,384 in the authors' code.
        labels: `[M]`, integers of at least 0, of the whole dataset. By default all other examples
            may be drawn.

    Returns:
        Indices `[B, N]`, int32; M, which is out of range, where all examples have the same label.

    Raises:
        ValueError: If shapes disagree, M < 2 or N < 1.
        TypeError: If the index or the labels are not integers.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd import losses
        >>> labels = jnp.array([0, 1, 0, 0])
        >>> print(losses.draw_negatives(
        ...     jax.random.key(0), jnp.array([0, 2]), num_examples=4, negatives=3, labels=labels
        ... ))
        [[1 1 1]
         [1 1 1]]

    References:
        Tian et al., Contrastive Representation Distillation, https://arxiv.org/abs/1910.10699
    """
    index = _check_integers("index", index, (jnp.size(index),))
    if num_examples < 2 or negatives < 1:
        raise ValueError(
            "num_examples must be at least 2 and negatives at least 1, "
            f"got {num_examples} and {negatives}"
        )
    if labels is None:
        order = jnp.arange(num_examples, dtype=jnp.int32)
        excluded_start = index
        num_excluded = jnp.ones_like(index)
    else:
        labels = _check_labels(labels, (num_examples,))
        order = jnp.argsort(labels).astype(jnp.int32)
        own_labels = labels[index]
        start, stop = (
            jnp.searchsorted(labels[order], own_labels, side=side) for side in ("left", "right")
        )
        excluded_start = start.astype(jnp.int32)
        num_excluded = (stop - start).astype(jnp.int32)
    # In the order of labels the excluded examples are consecutive: a position is drawn among the
    # rest, and moved past the excluded ones if it is not before them. Nothing is rejected.
    num_allowed = num_examples - num_excluded
    position = jax.random.randint(key, (len(index), negatives), 0, num_allowed[:, None], jnp.int32)
    position += jnp.where(position >= excluded_start[:, None], num_excluded[:, None], 0)
    return order.at[position].get(mode="fill", fill_value=num_examples)


def contrastive_bank_loss(
    bank: ContrastiveBank,
    student_embeddings: ArrayLike,
    teacher_embeddings: ArrayLike,
    index: ArrayLike,
    negatives: ArrayLike,
    *,
    temperature: ArrayLike = 0.07,
    where: ArrayLike | None = None,
) -> Array:
    """Computes the CRD loss against the bank's rows of each example and of its negatives.

    L(s_i, bank.teacher) + L(t_i, bank.student),
    L(a, rows) = −log h(a, rows_i) − Σ_j log(1 − h(a, rows_j))

    As in the authors' code both networks are anchors, and the positive is the bank's row of the
    example from before `update_bank`, not the current embedding of the other network. The first
    term trains the student, the second the projection of the teacher. The code's Z is not 1, see
    `calibrate_bank`.

    Args:
        bank: From `init_bank`, `calibrate_bank` or `update_bank`.
        student_embeddings: `[B, D]`, floating-point.
        teacher_embeddings: The same shape.
        index: `[B]`, integers in [0, M): the batch's positions in the dataset.
        negatives: `[B, N]`, integers in [0, M), from `draw_negatives`.
        temperature: τ > 0, a scalar; 0.07 in the authors' code.
        where: The examples that count (True) `[B]`; the result is 0 for the others, whatever their
            values.

    Returns:
        One value per example `[B]`, in float32 or wider; NaN where an index or a negative is out of
        range.

    Raises:
        ValueError: If shapes disagree or the temperature is not a positive scalar.
        TypeError: If the embeddings are not floating-point or the indices are not integers.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd import losses
        >>> rows = jnp.eye(4, 2)
        >>> bank = losses.init_bank(jax.random.key(0), 4, 2)._replace(student=rows, teacher=rows)
        >>> embeddings, index, negatives = jnp.eye(1, 2), jnp.array([0]), jnp.array([[1, 2]])
        >>> print(losses.contrastive_bank_loss(
        ...     bank, embeddings, embeddings, index, negatives, temperature=0.5
        ... ))
        [4.526]

    References:
        Tian et al., Contrastive Representation Distillation, https://arxiv.org/abs/1910.10699
    """
    temperature = check_positive("temperature", temperature)
    student, teacher, where = _unit_embeddings(student_embeddings, teacher_embeddings, where)
    # Indices of masked examples may be out of range: the NaN of their scores would reach the
    # gradient of the temperature.
    candidates = zero_masked(where, _candidate_rows(bank, student, index, negatives))
    num_negatives = candidates.shape[1] - 1

    def anchored_loss(anchors: Array, rows: Array, log_constant: Array) -> Array:
        scores = _candidate_scores(anchors, rows, candidates, temperature)
        log_ratio = jnp.log(jnp.asarray(num_negatives / rows.shape[0], scores.dtype))
        log_odds = scores - log_constant.astype(scores.dtype) - log_ratio
        # The positive is column 0. As in `contrastive_loss`, softplus gives −log h and −log(1 − h).
        return jax.nn.softplus(-log_odds[:, 0]) + jax.nn.softplus(log_odds[:, 1:]).sum(1)

    student_loss = anchored_loss(student, bank.teacher, bank.student_log_constant)
    teacher_loss = anchored_loss(teacher, bank.student, bank.teacher_log_constant)
    return zero_masked(where, student_loss + teacher_loss)


def calibrate_bank(
    bank: ContrastiveBank,
    student_embeddings: ArrayLike,
    teacher_embeddings: ArrayLike,
    index: ArrayLike,
    negatives: ArrayLike,
    *,
    temperature: ArrayLike,
) -> ContrastiveBank:
    """Sets the constants Z so that the critic's scores average to 1 / M over a batch.

    Z = M mean e^{s·t / τ} over the batch's examples and their negatives, one constant for each kind
    of anchor

    The authors' code does so once, in its first step, and keeps Z; the paper's formula has no Z. At
    Z = 1 an orthogonal pair already counts as a likely match, with probability M / (M + N), and all
    N negatives have to be pushed to the far side of the sphere. After calibration the critic starts
    from a probability near 1 / (1 + N).

    Args:
        bank: From `init_bank`.
        student_embeddings: `[B, D]`, floating-point.
        teacher_embeddings: The same shape.
        index: `[B]`, integers in [0, M).
        negatives: `[B, N]`, integers in [0, M), from `draw_negatives`.
        temperature: τ > 0, a scalar; the same as that of the loss.

    Returns:
        The bank with new constants; they are NaN if an index or a negative is out of range.

    Raises:
        ValueError: If shapes disagree or the temperature is not a positive scalar.
        TypeError: If the embeddings are not floating-point or the indices are not integers.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd import losses
        >>> rows = jnp.eye(4, 2)
        >>> bank = losses.init_bank(jax.random.key(0), 4, 2)._replace(student=rows, teacher=rows)
        >>> embeddings, index, negatives = jnp.eye(1, 2), jnp.array([0]), jnp.array([[1, 2]])
        >>> bank = losses.calibrate_bank(
        ...     bank, embeddings, embeddings, index, negatives, temperature=0.5
        ... )
        >>> print(jnp.exp(bank.student_log_constant))
        12.519

    References:
        Tian et al., Contrastive Representation Distillation, https://arxiv.org/abs/1910.10699
    """
    temperature = check_positive("temperature", temperature)
    student, teacher, _ = _unit_embeddings(student_embeddings, teacher_embeddings, None)
    candidates = _candidate_rows(bank, student, index, negatives)

    def log_constant(anchors: Array, rows: Array) -> Array:
        # In log space, because e^{1/τ} overflows in float32 for τ below about 0.011.
        total = jax.nn.logsumexp(_candidate_scores(anchors, rows, candidates, temperature))
        return total + jnp.log(jnp.asarray(rows.shape[0] / candidates.size, total.dtype))

    student_log_constant = log_constant(student, bank.teacher)
    teacher_log_constant = log_constant(teacher, bank.student)
    return bank._replace(
        student_log_constant=student_log_constant.astype(bank.student_log_constant.dtype),
        teacher_log_constant=teacher_log_constant.astype(bank.teacher_log_constant.dtype),
    )


def update_bank(
    bank: ContrastiveBank,
    student_embeddings: ArrayLike,
    teacher_embeddings: ArrayLike,
    index: ArrayLike,
    *,
    momentum: ArrayLike = 0.5,
    where: ArrayLike | None = None,
) -> ContrastiveBank:
    """Moves the bank's rows of a batch towards the embeddings of the batch.

    row_i ← normalize(m row_i + (1 − m) a_i), with a scaled to length 1

    Args:
        bank: The bank, which is not modified.
        student_embeddings: `[B, D]`, floating-point.
        teacher_embeddings: The same shape.
        index: `[B]`, integers. Of examples with the same index the last one counts; an index out of
            [0, M) changes nothing.
        momentum: m in [0, 1], a scalar; 0.5 in the authors' code.
        where: The examples that count (True) `[B]`; the others change nothing.

    Returns:
        The new bank, of the same dtypes.

    Raises:
        ValueError: If shapes disagree or the momentum is not in [0, 1].
        TypeError: If the embeddings are not floating-point or the index does not contain integers.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd import losses
        >>> bank = losses.init_bank(jax.random.key(0), 2, 2)._replace(student=jnp.eye(2))
        >>> student, teacher = jnp.array([[2.0, 0.0]]), jnp.array([[0.0, 2.0]])
        >>> print(losses.update_bank(bank, student, teacher, jnp.array([1])).student)
        [[1.    0.   ]
         [0.707 0.707]]

    References:
        Tian et al., Contrastive Representation Distillation, https://arxiv.org/abs/1910.10699
    """
    student, teacher, where = _unit_embeddings(student_embeddings, teacher_embeddings, where)
    _check_embedding_size(bank, student)
    momentum = check_fraction("momentum", momentum)
    momentum = jnp.asarray(momentum, student.dtype)
    index = _check_integers("index", index, where.shape)
    num_examples = bank.student.shape[0]
    where &= (index >= 0) & (index < num_examples)
    same_index = (index[:, None] == index[None, :]) & where[None, :]
    has_later_duplicate = jnp.triu(same_index, 1).any(1)
    # A scatter with duplicate indices has no defined order. Here every row is written at most once,
    # so the result is the same on every device: the other examples get distinct indices out of
    # range, which `mode="drop"` ignores.
    targets = jnp.where(
        where & ~has_later_duplicate,
        index,
        num_examples + jnp.arange(len(index), dtype=jnp.int32),
    )

    def move_rows(rows: Array, embeddings: Array) -> Array:
        old = rows.at[index].get(mode="clip").astype(embeddings.dtype)
        new = normalize(momentum * old + (1 - momentum) * embeddings)
        return rows.at[targets].set(new.astype(rows.dtype), mode="drop", unique_indices=True)

    return bank._replace(
        student=move_rows(bank.student, student), teacher=move_rows(bank.teacher, teacher)
    )


def _unit_embeddings(
    student_embeddings: ArrayLike, teacher_embeddings: ArrayLike, where: ArrayLike | None
) -> tuple[Array, Array, Array]:
    """Returns the embeddings at length 1, or 0 where they are masked, and the mask `[B]`."""
    names = "student_embeddings", "teacher_embeddings"
    student, teacher = upcast_pair(names, student_embeddings, teacher_embeddings)
    check_shape(
        student.ndim == 2 and student.shape == teacher.shape,
        f"student_embeddings {student.shape} and teacher_embeddings {teacher.shape} must both be "
        "[B, D]; flatten them, and project them to the same size first",
    )
    where = check_example_mask(where, student.shape[0])
    return normalize(zero_masked(where, student)), normalize(zero_masked(where, teacher)), where


def _pair_scores(anchors: Array, rows: Array, temperature: ArrayLike) -> Array:
    """Computes s·t / τ for every pair of an anchor and a row, `[B, M]`."""
    anchors, rows = upcast_pair(("anchors", "rows"), anchors, rows)
    # A small temperature magnifies the rounding errors of the accelerators' default precision.
    products = jnp.matmul(anchors, rows.T, precision=jax.lax.Precision.HIGHEST)
    return products / jnp.asarray(temperature, products.dtype)


def _candidate_scores(
    anchors: Array, rows: Array, candidates: Array, temperature: ArrayLike
) -> Array:
    """Computes s·t / τ for each anchor and its candidate rows `[B, 1 + N]`; NaN out of range."""
    # The scores of all pairs, B M numbers, take less memory than gathered rows, B N D numbers.
    scores = _pair_scores(anchors, rows, temperature)
    # JAX counts negative indices from the end, which would make them valid.
    candidates = jnp.where(candidates < 0, rows.shape[0], candidates)
    return jnp.take_along_axis(scores, candidates, 1, mode="fill", fill_value=jnp.nan)


def _candidate_rows(
    bank: ContrastiveBank, embeddings: Array, index: ArrayLike, negatives: ArrayLike
) -> Array:
    """Returns the indices of the bank's rows that a batch is compared with, positives first.

    Their shape is `[B, 1 + N]`.
    """
    _check_embedding_size(bank, embeddings)
    batch = embeddings.shape[0]
    check_shape(
        jnp.ndim(negatives) == 2 and jnp.shape(negatives)[1] > 0,
        f"negatives must be [B, N] with N at least 1, got {jnp.shape(negatives)}",
    )
    negatives = _check_integers("negatives", negatives, (batch, jnp.shape(negatives)[1]))
    positives = _check_integers("index", index, (batch,))
    return jnp.concatenate([positives[:, None], negatives], axis=1)


def _check_integers(name: str, array: ArrayLike, shape: tuple[int, ...]) -> Array:
    """Casts integers to int32; raises if the array has another dtype or shape."""
    array = jnp.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name} must be integers, got {array.dtype}")
    check_shape(array.shape == shape, f"{name} must be of shape {shape}, got {array.shape}")
    return array.astype(jnp.int32)


def _check_labels(labels: ArrayLike, shape: tuple[int, ...]) -> Array:
    """Returns labels; raises `ValueError` if one that is known is negative.

    Examples without a label would count as one class, whose members are no negatives of each other.
    """
    checked = _check_integers("labels", labels, shape)
    if not isinstance(checked, jax.core.Tracer) and (np.asarray(checked) < 0).any():
        raise ValueError(
            f"labels must be at least 0, got {int(np.asarray(checked).min())}, which would count "
            "as one class: leave labels out, or give each such example a label of its own"
        )
    return checked


def _check_embedding_size(bank: ContrastiveBank, embeddings: Array) -> None:
    check_shape(
        bank.student.shape == bank.teacher.shape and bank.student.shape[1:] == embeddings.shape[1:],
        f"the bank holds rows {bank.student.shape} and {bank.teacher.shape}, the embeddings are "
        f"{embeddings.shape}; call init_bank with the embeddings' size",
    )
