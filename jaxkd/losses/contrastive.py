"""Contrastive representation distillation (CRD): tell a student–teacher pair of one example from pairs of two.

A critic h says how likely a student's and a teacher's embedding belong to one example, among N pairs that do not:

h(s, t) = e^{s·t / τ} / (e^{s·t / τ} + Z N / M)

s and t are scaled to length 1 first, M is the number of examples that negatives are drawn from, and Z is 1 in the
paper. `contrastive_loss` draws negatives from the batch. The others keep an embedding of every example of the dataset
in a `ContrastiveBank`, a value that is passed in and comes out anew: a training loop of one's own carries it along; the
stages of a plan have no place for it.

Embeddings of student and teacher must have one size: `features.project` makes it so, with parameters for each of them
that are trained with the student.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxkd.losses._arrays import check_positive, check_shape, check_share, examples_mask, normalize, only, wide_pair


class ContrastiveBank(NamedTuple):
    """An embedding of every example for student and teacher, and the constants that scale the critic's scores."""

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
    temperature: ArrayLike,
    labels: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """The student's embedding of an example against the teacher's of all examples in the batch.

    −log h(s_i, t_i) − Σ_j log(1 − h(s_i, t_j)) over the N negatives j of i, with Z = 1 and M examples in the batch

    The mean over the examples is the paper's objective with its sign turned. The student is the anchor; anchoring at
    the teacher as well, as the authors' code does with its bank, takes the same pairs again and doubles the mean (to
    the letter without `labels`). An example without negatives has the value 0.

    Args:
        student_embeddings: `[B, D]`, floating-point; a zero vector is at a right angle to all others.
        teacher_embeddings: The same shape.
        temperature: τ > 0, a scalar; 0.07 in the authors' code.
        labels: `[B]`, integers; negatives are then the examples of other labels only. All others if not given.
        where: The examples that count (True) `[B]`; the result is as if the others were sliced away, and 0 for them.

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
    check_positive("temperature", temperature)
    student, teacher, counts = _units(student_embeddings, teacher_embeddings, where)
    negative = ~jnp.eye(len(counts), dtype=bool)
    if labels is not None:
        labels = _integers("labels", labels, counts.shape)
        negative = labels[:, None] != labels[None, :]
    negative &= counts[:, None] & counts[None, :]
    ratio = negative.sum(1).astype(student.dtype) / jnp.maximum(counts.sum(), 1).astype(student.dtype)
    log_odds = _scores(student, teacher, temperature) - jnp.log(jnp.where(ratio > 0, ratio, 1))[:, None]
    values = jax.nn.softplus(-jnp.diagonal(log_odds)) + jnp.where(negative, jax.nn.softplus(log_odds), 0).sum(1)
    return jnp.where(ratio > 0, values, 0)


def init_bank(key: Array, num_examples: int, features: int) -> ContrastiveBank:
    """A bank of random directions, with Z = 1.

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
    key: Array, index: ArrayLike, *, num_examples: int, negatives: int, labels: ArrayLike | None = None
) -> Array:
    """Draws examples to tell each example from: any others, or others of other labels.

    Uniform, and with replacement. The authors' code leaves the example itself among the draws unless it goes by labels.

    Args:
        key: A random key.
        index: `[B]`, integers in [0, M): which examples of the dataset the batch holds.
        num_examples: M, at least 2.
        negatives: N, at least 1; 16,384 in the authors' code.
        labels: `[M]`, integers, of the whole dataset; all other examples may be drawn if not given.

    Returns:
        Indices `[B, N]`, int32; M, which is out of range, for an example whose label is everyone's.

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
    index = _integers("index", index, (jnp.size(index),))
    if num_examples < 2 or negatives < 1:
        raise ValueError(f"num_examples must be at least 2 and negatives at least 1, got {num_examples}, {negatives}")
    if labels is None:
        order, first, size = jnp.arange(num_examples, dtype=jnp.int32), index, jnp.ones_like(index)
    else:
        labels = _integers("labels", labels, (num_examples,))
        order, own = jnp.argsort(labels).astype(jnp.int32), labels[index]
        first, last = (jnp.searchsorted(labels[order], own, side=side) for side in ("left", "right"))
        first, size = first.astype(jnp.int32), (last - first).astype(jnp.int32)
    # In order of label the excluded examples are one run: draw from as many as are left, then step over the run.
    drawn = jax.random.randint(key, (len(index), negatives), 0, (num_examples - size)[:, None], jnp.int32)
    drawn += jnp.where(drawn >= first[:, None], size[:, None], 0)
    return order.at[drawn].get(mode="fill", fill_value=num_examples)


def contrastive_bank_loss(
    bank: ContrastiveBank,
    student_embeddings: ArrayLike,
    teacher_embeddings: ArrayLike,
    index: ArrayLike,
    negatives: ArrayLike,
    *,
    temperature: ArrayLike,
    where: ArrayLike | None = None,
) -> Array:
    """The embeddings of an example against those that the bank keeps of it and of its negatives.

    L(s_i, bank.teacher) + L(t_i, bank.student), L(a, rows) = −log h(a, rows_i) − Σ_j log(1 − h(a, rows_j))

    As in the authors' code both networks are anchors, and the positive is the bank's row of the example, from before
    `update_bank`, not the other network's embedding of now: the first term trains the student, the second the
    projection of the teacher. The code also has a Z of its own, see `calibrate_bank`.

    Args:
        bank: From `init_bank`, `calibrate_bank` or `update_bank`.
        student_embeddings: `[B, D]`, floating-point.
        teacher_embeddings: The same shape.
        index: `[B]`, integers in [0, M): which examples of the dataset the batch holds.
        negatives: `[B, N]`, integers in [0, M), from `draw_negatives`.
        temperature: τ > 0, a scalar; 0.07 in the authors' code.
        where: The examples that count (True) `[B]`; the result is 0 for the others, whatever they hold.

    Returns:
        One value per example `[B]`, in float32 or wider; NaN where an index or a negative is out of range.

    Raises:
        ValueError: If shapes disagree or the temperature is not a positive scalar.
        TypeError: If the embeddings are not floating-point or the indices are not integers.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd import losses
        >>> bank = losses.init_bank(jax.random.key(0), 4, 2)._replace(student=jnp.eye(4, 2), teacher=jnp.eye(4, 2))
        >>> embeddings, index, negatives = jnp.eye(1, 2), jnp.array([0]), jnp.array([[1, 2]])
        >>> print(losses.contrastive_bank_loss(bank, embeddings, embeddings, index, negatives, temperature=0.5))
        [4.526]

    References:
        Tian et al., Contrastive Representation Distillation, https://arxiv.org/abs/1910.10699
    """
    check_positive("temperature", temperature)
    student, teacher, counts = _units(student_embeddings, teacher_embeddings, where)
    chosen = only(counts, _chosen(bank, student, index, negatives))

    def anchored(anchors, rows, log_constant):
        scores = _chosen_scores(anchors, rows, chosen, temperature)
        log_ratio = jnp.log(jnp.asarray((chosen.shape[1] - 1) / rows.shape[0], scores.dtype))
        log_odds = scores - log_constant.astype(scores.dtype) - log_ratio
        return jax.nn.softplus(-log_odds[:, 0]) + jax.nn.softplus(log_odds[:, 1:]).sum(1)

    by_student = anchored(student, bank.teacher, bank.student_log_constant)
    return only(counts, by_student + anchored(teacher, bank.student, bank.teacher_log_constant))


def calibrate_bank(
    bank: ContrastiveBank,
    student_embeddings: ArrayLike,
    teacher_embeddings: ArrayLike,
    index: ArrayLike,
    negatives: ArrayLike,
    *,
    temperature: ArrayLike,
) -> ContrastiveBank:
    """The bank with constants Z at which the critic's scores average to 1 / M over a batch.

    Z = M mean e^{s·t / τ} over the batch's examples and their negatives, one constant for each kind of anchor

    The authors' code does so once, in its first step, and keeps Z; the paper's formula has none. At Z = 1 a pair at a
    right angle already counts as a likely match, M / (M + N), and all N negatives have to be pushed to the far side
    of the sphere; after calibration the chance that the critic starts from is near 1 / (1 + N).

    Args:
        bank: From `init_bank`.
        student_embeddings: `[B, D]`, floating-point.
        teacher_embeddings: The same shape.
        index: `[B]`, integers in [0, M).
        negatives: `[B, N]`, integers in [0, M), from `draw_negatives`.
        temperature: τ > 0, a scalar; that of the loss.

    Returns:
        The bank with new constants; they are NaN if an index or a negative is out of range.

    Raises:
        ValueError: If shapes disagree or the temperature is not a positive scalar.
        TypeError: If the embeddings are not floating-point or the indices are not integers.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd import losses
        >>> bank = losses.init_bank(jax.random.key(0), 4, 2)._replace(student=jnp.eye(4, 2), teacher=jnp.eye(4, 2))
        >>> embeddings, index, negatives = jnp.eye(1, 2), jnp.array([0]), jnp.array([[1, 2]])
        >>> bank = losses.calibrate_bank(bank, embeddings, embeddings, index, negatives, temperature=0.5)
        >>> print(jnp.exp(bank.student_log_constant))
        12.519

    References:
        Tian et al., Contrastive Representation Distillation, https://arxiv.org/abs/1910.10699
    """
    check_positive("temperature", temperature)
    student, teacher, _ = _units(student_embeddings, teacher_embeddings, None)
    chosen = _chosen(bank, student, index, negatives)

    def constant(anchors, rows):
        total = jax.nn.logsumexp(_chosen_scores(anchors, rows, chosen, temperature))
        return total + jnp.log(jnp.asarray(rows.shape[0] / chosen.size, total.dtype))

    return bank._replace(
        student_log_constant=constant(student, bank.teacher).astype(bank.student_log_constant.dtype),
        teacher_log_constant=constant(teacher, bank.student).astype(bank.teacher_log_constant.dtype),
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
    """The bank with the batch's rows moved towards its embeddings.

    row_i ← normalize(m row_i + (1 − m) a_i), with a scaled to length 1

    Args:
        bank: It is left as it is.
        student_embeddings: `[B, D]`, floating-point.
        teacher_embeddings: The same shape.
        index: `[B]`, integers. Of examples with one index the last counts; one out of [0, M) changes nothing.
        momentum: m in [0, 1], a scalar; 0.5 in the authors' code.
        where: The examples that count (True) `[B]`; the others change nothing.

    Returns:
        The new bank, of the same dtypes.

    Raises:
        ValueError: If shapes disagree or the momentum leaves [0, 1].
        TypeError: If the embeddings are not floating-point or the index is not of integers.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd import losses
        >>> bank = losses.init_bank(jax.random.key(0), 2, 2)._replace(student=jnp.eye(2))
        >>> new = losses.update_bank(bank, jnp.array([[2.0, 0.0]]), jnp.array([[0.0, 2.0]]), jnp.array([1]))
        >>> print(new.student)
        [[1.    0.   ]
         [0.707 0.707]]

    References:
        Tian et al., Contrastive Representation Distillation, https://arxiv.org/abs/1910.10699
    """
    student, teacher, counts = _units(student_embeddings, teacher_embeddings, where)
    _check_size(bank, student)
    check_share("momentum", momentum)
    momentum, index = jnp.asarray(momentum, student.dtype), _integers("index", index, counts.shape)
    num_examples = bank.student.shape[0]
    counts &= (index >= 0) & (index < num_examples)
    followed = jnp.triu((index[:, None] == index[None, :]) & counts[None, :], 1).any(1)
    # Each row is written once at most, so that the result is the same on every device; what is out of range is dropped.
    slots = jnp.where(counts & ~followed, index, num_examples + jnp.arange(len(index), dtype=jnp.int32))

    def moved(rows, embeddings):
        old = rows.at[index].get(mode="clip").astype(embeddings.dtype)
        new = normalize(momentum * old + (1 - momentum) * embeddings)
        return rows.at[slots].set(new.astype(rows.dtype), mode="drop", unique_indices=True)

    return bank._replace(student=moved(bank.student, student), teacher=moved(bank.teacher, teacher))


def _units(
    student_embeddings: ArrayLike, teacher_embeddings: ArrayLike, where: ArrayLike | None
) -> tuple[Array, Array, Array]:
    """The embeddings scaled to length 1, or to 0 where they do not count, and which count."""
    names = "student_embeddings", "teacher_embeddings"
    student, teacher = wide_pair(names, student_embeddings, teacher_embeddings)
    check_shape(
        student.ndim == 2 and student.shape == teacher.shape,
        f"student_embeddings {student.shape} and teacher_embeddings {teacher.shape} must both be [B, D]; flatten them, "
        "and project them to one size first",
    )
    counts = examples_mask(where, student.shape[0])
    return normalize(only(counts, student)), normalize(only(counts, teacher)), counts


def _scores(anchors: Array, rows: Array, temperature: ArrayLike) -> Array:
    """s·t / τ for every pair, `[B, M]`."""
    anchors, rows = wide_pair(("anchors", "rows"), anchors, rows)
    # A small temperature magnifies what the accelerators' default of fewer bits leaves out.
    products = jnp.matmul(anchors, rows.T, precision=jax.lax.Precision.HIGHEST)
    return products / jnp.asarray(temperature, products.dtype)


def _chosen_scores(anchors: Array, rows: Array, chosen: Array, temperature: ArrayLike) -> Array:
    """s·t / τ for the chosen pairs `[B, 1 + N]`, NaN out of range."""
    # All pairs first: their B M numbers are fewer than the B N D of the chosen rows.
    scores = _scores(anchors, rows, temperature)
    in_range = jnp.where(chosen < 0, rows.shape[0], chosen)
    return jnp.take_along_axis(scores, in_range, 1, mode="fill", fill_value=jnp.nan)


def _chosen(bank: ContrastiveBank, embeddings: Array, index: ArrayLike, negatives: ArrayLike) -> Array:
    """The bank's rows that a batch is held against, `[B, 1 + N]`: its own first, then the negatives."""
    _check_size(bank, embeddings)
    batch = embeddings.shape[0]
    check_shape(
        jnp.ndim(negatives) == 2 and jnp.shape(negatives)[1] > 0,
        f"negatives must be [B, N] with N at least 1, got {jnp.shape(negatives)}",
    )
    negatives = _integers("negatives", negatives, (batch, jnp.shape(negatives)[1]))
    return jnp.concatenate([_integers("index", index, (batch,))[:, None], negatives], axis=1)


def _integers(name: str, array: ArrayLike, shape: tuple[int, ...]) -> Array:
    """Integers as int32; an error if they are none or not of the shape."""
    array = jnp.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name} must be integers, got {array.dtype}")
    check_shape(array.shape == shape, f"{name} must be of shape {shape}, got {array.shape}")
    return array.astype(jnp.int32)


def _check_size(bank: ContrastiveBank, embeddings: Array) -> None:
    check_shape(
        bank.student.shape == bank.teacher.shape and bank.student.shape[1:] == embeddings.shape[1:],
        f"the bank holds rows {bank.student.shape} and {bank.teacher.shape}, the embeddings are {embeddings.shape}; "
        "call init_bank with the embeddings' size",
    )
