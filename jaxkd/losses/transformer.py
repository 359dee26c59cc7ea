"""Losses on hidden states, attention and values of transformers, and maps between their layers.

The losses on hidden states compare one state at a time and return one value per state; the caller
averages over the tokens that are not padding. Arrays narrower than 32 bits are widened first.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxkd.losses._arrays import (
    broadcast_mask,
    check_mask,
    check_shape,
    normalize,
    safe_divide,
    upcast_pair,
    zero_masked,
)
from jaxkd.losses._softmax import scores_divergence


def hidden_cosine_loss(student_states: ArrayLike, teacher_states: ArrayLike) -> Array:
    """Computes one minus the cosine of the angle between hidden states.

    1 − s · t / (‖s‖ ‖t‖)

    Twice this is PKD's squared distance of states of length 1, which its code also divides by D. A
    zero vector has no direction: the value is 1, with no gradient for either side.

    Args:
        student_states: `[..., D]`, floating-point. Project them first if D is not the teacher's.
        teacher_states: The same shape.

    Returns:
        One value per state `[...]`, in float32 or wider, between 0 and 2.

    Raises:
        ValueError: If the shapes differ.
        TypeError: If the states are not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> print(losses.hidden_cosine_loss(jnp.array([[3.0, 4.0]]), jnp.array([[2.0, 0.0]])))
        [0.400]

    References:
        Sanh et al., DistilBERT, a distilled version of BERT, https://arxiv.org/abs/1910.01108
        Sun et al., Patient Knowledge Distillation for BERT Model Compression,
        https://arxiv.org/abs/1908.09355
    """
    student, teacher = _check_states(student_states, teacher_states)
    student = normalize(student)
    teacher = normalize(teacher)
    # Half the squared distance of unit vectors is 1 − cos, without its cancellation near 0.
    values = jnp.square(student - teacher).sum(-1) / 2
    # A zero vector stays 0, and half its squared distance from a unit vector is 1/2.
    return jnp.where(student.any(-1) & teacher.any(-1), values, 1)


def hidden_mse_loss(student_states: ArrayLike, teacher_states: ArrayLike) -> Array:
    """Computes the mean squared difference of hidden states.

    (1/D) Σ_d (s_d − t_d)²

    TinyBERT projects narrower student states first, with one projection for all layers:
    `hidden_mse_loss(features.project(params, s), t)`. PKD compares the states of the first token,
    scaled to length 1: `2 * hidden_cosine_loss(s, t)`.

    Args:
        student_states: `[..., D]`, floating-point. Project them first if D is not the teacher's.
        teacher_states: The same shape.

    Returns:
        One value per state `[...]`, in float32 or wider.

    Raises:
        ValueError: If the shapes differ.
        TypeError: If the states are not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> print(losses.hidden_mse_loss(jnp.array([[3.0, 4.0]]), jnp.array([[2.0, 2.0]])))
        [2.500]

    References:
        Jiao et al., TinyBERT: Distilling BERT for Natural Language Understanding,
        https://arxiv.org/abs/1909.10351
    """
    student, teacher = _check_states(student_states, teacher_states)
    return jnp.square(student - teacher).mean(-1)


def attention_map_loss(
    student_maps: ArrayLike, teacher_maps: ArrayLike, *, where: ArrayLike | None = None
) -> Array:
    """Computes the mean squared difference of attention maps, over heads, queries and keys.

    (1/HNM) Σ_h Σ_n Σ_m (s_hnm − t_hnm)²

    TinyBERT's maps are the scores before the softmax, without the mask that is added to them; its
    code sets scores below −100 to 0 on each side instead, and counts them in the mean. Entries that
    do not count may be −inf or NaN.

    Args:
        student_maps: `[..., H, N, M]`, floating-point: heads, queries, keys.
        teacher_maps: The same shape.
        where: Booleans, the entries that count (True), broadcast against the maps, such as
            `[..., 1, 1, M]` for keys that are not padding.

    Returns:
        One value per example `[...]`, in float32 or wider; 0 where nothing counts.

    Raises:
        ValueError: If the shapes differ or `where` cannot be broadcast to them.
        TypeError: If the maps are not floating-point or `where` is not boolean.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student = jnp.array([[[[1.0, -jnp.inf]]]])
        >>> teacher = jnp.array([[[[3.0, -jnp.inf]]]])
        >>> print(losses.attention_map_loss(student, teacher, where=jnp.array([True, False])))
        [4.000]

    References:
        Jiao et al., TinyBERT: Distilling BERT for Natural Language Understanding,
        https://arxiv.org/abs/1909.10351
    """
    student, teacher = _check_maps("maps", student_maps, teacher_maps)
    where = broadcast_mask(where, student.shape)
    # Both sides are masked before the difference: −inf − (−inf) is NaN, whose gradient a mask of
    # the result would not stop.
    difference = jnp.where(where, student, 0) - jnp.where(where, teacher, 0)
    axes = (-3, -2, -1)
    count = where.sum(axes).astype(difference.dtype)
    return safe_divide(jnp.square(difference).sum(axes), count)


def attention_divergence_loss(
    student_weights: ArrayLike, teacher_weights: ArrayLike, *, where: ArrayLike | None = None
) -> Array:
    """Computes KL(teacher ‖ student) of attention weights, averaged over heads and queries.

    (1/HN) Σ_h Σ_n Σ_m t_hnm log(t_hnm / s_hnm)

    A key to which the teacher gives weight 0 contributes nothing. A student weight of 0 is replaced
    by the smallest normal number of the widened dtype, so that the loss stays finite where a weight
    underflows.

    Args:
        student_weights: `[..., H, N, M]`, floating-point, non-negative, with sum 1 over M: heads,
            queries, keys. Padded keys must have weight 0 on both sides, as after a masked softmax.
        teacher_weights: The same shape.
        where: `[..., N]`, booleans, the queries that count (True); other queries have no effect.

    Returns:
        One value per example `[...]`, in float32 or wider; 0 where nothing counts.

    Raises:
        ValueError: If the shapes differ or `where` has another shape than `[..., N]`.
        TypeError: If the weights are not floating-point or `where` is not boolean.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student, teacher = jnp.array([[[[0.5, 0.5]]]]), jnp.array([[[[1.0, 0.0]]]])
        >>> print(losses.attention_divergence_loss(student, teacher))
        [0.693]

    References:
        Wang et al., MiniLM: Deep Self-Attention Distillation, https://arxiv.org/abs/2002.10957
    """
    student, teacher = _check_maps("weights", student_weights, teacher_weights)
    where = check_mask("token", where, student.shape[:-3] + student.shape[-2:-1])
    counted = where[..., None, :, None] & (teacher != 0)
    # Entries that do not count are set to 1 before the logarithm, which keeps its gradient finite.
    student = jnp.maximum(jnp.where(counted, student, 1), jnp.finfo(student.dtype).tiny)
    teacher = jnp.where(counted, teacher, 1)
    divergence = jnp.where(counted, teacher * (jnp.log(teacher) - jnp.log(student)), 0).sum(-1)
    return _average_queries(divergence, where)


def value_relation_loss(
    student_values: ArrayLike, teacher_values: ArrayLike, *, where: ArrayLike | None = None
) -> Array:
    """Computes KL(teacher ‖ student) of the relations between values (MiniLM).

    (1/HS) Σ_h Σ_i KL(R^t_hi ‖ R^s_hi) with R_hi = softmax_j(v_hi · v_hj / √d)

    Head sizes d may differ, so that a narrower student needs no projection; the numbers of heads
    must be equal. MiniLMv2 splits both sides into the same number of relation heads,
    `values.reshape(..., S, heads, -1)`, and applies the same loss to queries and to keys.

    Args:
        student_values: `[..., S, H, d]`, floating-point: tokens, heads, features.
        teacher_values: `[..., S, H, d']`.
        where: `[..., S]`, booleans, the tokens that count (True), as queries and as keys; other
            tokens have no effect.

    Returns:
        One value per example `[...]`, in float32 or wider; 0 where no token counts.

    Raises:
        ValueError: If the shapes differ in more than the last axis, or `where` has another shape
            than `[..., S]`.
        TypeError: If the values are not floating-point or `where` is not boolean.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student, teacher = jnp.array([[[[1.0]], [[0.0]]]]), jnp.array([[[[2.0]], [[0.0]]]])
        >>> print(losses.value_relation_loss(student, teacher))
        [0.121]

    References:
        Wang et al., MiniLM: Deep Self-Attention Distillation, https://arxiv.org/abs/2002.10957
        Wang et al., MiniLMv2: Multi-Head Self-Attention Relation Distillation,
        https://arxiv.org/abs/2012.15828
    """
    student, teacher = upcast_pair(
        ("student_values", "teacher_values"), student_values, teacher_values
    )
    check_shape(
        student.ndim >= 3 and student.shape[:-1] == teacher.shape[:-1],
        f"student_values {student.shape} and teacher_values {teacher.shape} must both be "
        "[..., S, H, d] and differ only in d; reshape both to one number of heads first",
    )
    where = check_mask("token", where, student.shape[:-2])
    student = _relation_scores(zero_masked(where, student))
    teacher = _relation_scores(zero_masked(where, teacher))
    # The softmax of R is over the keys that count.
    divergence = scores_divergence(student, teacher, where[..., None, None, :])
    return _average_queries(divergence, where)


def uniform_layers(student_layers: int, teacher_layers: int) -> tuple[int, ...]:
    """Returns teacher layers at even steps, including the last one: TinyBERT's map.

    Student layer i learns from teacher layer ⌊(i + 1) T / S⌋ − 1, both counted from 0. For T a
    multiple of S this is the paper's g(m) = m T / S, counted from 1. The student's last layer
    learns from the teacher's last.

    Args:
        student_layers: S, at least 1.
        teacher_layers: T, at least S.

    Returns:
        S indices of teacher layers, counted from 0.

    Raises:
        ValueError: If not 1 ≤ S ≤ T.

    Example:
        >>> from jaxkd import losses
        >>> losses.uniform_layers(4, 12)
        (2, 5, 8, 11)

    References:
        Jiao et al., TinyBERT: Distilling BERT for Natural Language Understanding,
        https://arxiv.org/abs/1909.10351
    """
    _check_depths(student_layers, teacher_layers)
    return tuple((i + 1) * teacher_layers // student_layers - 1 for i in range(student_layers))


def skip_layers(student_layers: int, teacher_layers: int) -> tuple[int, ...]:
    """Returns S − 1 teacher layers at even steps: PKD-skip.

    Student layer i < S − 1 learns from teacher layer ⌊(i + 1) T / S⌋ − 1, both counted from 0. The
    student's last layer has no entry: it learns from the teacher's logits. The paper's
    {2, 4, 6, 8, 10} for 6 of 12 are counted from 1.

    Args:
        student_layers: S, at least 1.
        teacher_layers: T, at least S.

    Returns:
        S − 1 indices of teacher layers, counted from 0.

    Raises:
        ValueError: If not 1 ≤ S ≤ T.

    Example:
        >>> from jaxkd import losses
        >>> losses.skip_layers(6, 12)
        (1, 3, 5, 7, 9)

    References:
        Sun et al., Patient Knowledge Distillation for BERT Model Compression,
        https://arxiv.org/abs/1908.09355
    """
    return uniform_layers(student_layers, teacher_layers)[:-1]


def last_layers(student_layers: int, teacher_layers: int) -> tuple[int, ...]:
    """Returns the S − 1 teacher layers that precede the last one: PKD-last.

    Student layer i < S − 1 learns from teacher layer T − S + i, both counted from 0. The student's
    last layer has no entry: it learns from the teacher's logits. The paper's {7, 8, 9, 10, 11} for
    6 of 12 are counted from 1.

    Args:
        student_layers: S, at least 1.
        teacher_layers: T, at least S.

    Returns:
        S − 1 indices of teacher layers, counted from 0.

    Raises:
        ValueError: If not 1 ≤ S ≤ T.

    Example:
        >>> from jaxkd import losses
        >>> losses.last_layers(6, 12)
        (6, 7, 8, 9, 10)

    References:
        Sun et al., Patient Knowledge Distillation for BERT Model Compression,
        https://arxiv.org/abs/1908.09355
    """
    _check_depths(student_layers, teacher_layers)
    return tuple(range(teacher_layers - student_layers, teacher_layers - 1))


def custom_layers(
    layers: Sequence[int], student_layers: int, teacher_layers: int
) -> tuple[int, ...]:
    """Checks a custom map from student layers to teacher layers.

    The example lists the 6 of a teacher's 12 layers from which DistilBERT is initialised.

    Args:
        layers: The i-th entry is the teacher layer, counted from 0, from which student layer i
            learns. They may be in any order, and the student's last layers may be left out.
        student_layers: S.
        teacher_layers: T.

    Returns:
        The layers as a tuple of integers.

    Raises:
        ValueError: If there are no entries or more than S, or an entry is not in [0, T).
        TypeError: If an entry is not an integer.

    Example:
        >>> from jaxkd import losses
        >>> losses.custom_layers([0, 2, 4, 7, 9, 11], 6, 12)
        (0, 2, 4, 7, 9, 11)
    """
    # `operator.index` takes NumPy integers as well, and refuses 0.5 where `int` would return 0.
    layers = tuple(operator.index(layer) for layer in layers)
    if not 1 <= len(layers) <= student_layers:
        raise ValueError(
            f"layers {layers} must have one teacher layer for each of 1 to {student_layers} "
            f"student layers, got {len(layers)}"
        )
    out_of_range = [layer for layer in layers if not 0 <= layer < teacher_layers]
    if out_of_range:
        raise ValueError(
            f"teacher layers are counted from 0 and end at {teacher_layers - 1}, got {out_of_range}"
        )
    return layers


def layers_loss(
    loss: Callable[[Array, Array], Array],
    student_states: Sequence[Array] | Array,
    teacher_states: Sequence[Array] | Array,
    *,
    layers: Sequence[int],
) -> Array:
    """Averages a loss over pairs of a student layer and the teacher layer that it learns from.

    (1/n) Σ_i loss(student_states[i], teacher_states[layers[i]]) with n = len(layers)

    The papers take the sum, which is n times this. The map counts transformer layers only: where
    the states begin with the embeddings, drop these.

    Args:
        loss: Maps a student's and a teacher's state to values of one shape, such as
            `hidden_mse_loss`.
        student_states: One state per layer, a sequence of arrays or one array stacked along axis 0.
            States beyond the length of the map are not used.
        teacher_states: The same for the teacher.
        layers: The teacher layer, counted from 0, that each student layer learns from, such as the
            result of `uniform_layers`.

    Returns:
        Values of the shape that `loss` returns.

    Raises:
        ValueError: If the map is empty, longer than the student or points outside the teacher.
        TypeError: If an entry of the map is not an integer.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student = jnp.ones((2, 1, 3))
        >>> teacher = jnp.arange(4.0)[:, None, None] * jnp.ones((4, 1, 3))
        >>> layers = losses.uniform_layers(2, 4)
        >>> print(losses.layers_loss(losses.hidden_mse_loss, student, teacher, layers=layers))
        [2.000]
    """
    layers = custom_layers(layers, len(student_states), len(teacher_states))
    values = [loss(student_states[i], teacher_states[layer]) for i, layer in enumerate(layers)]
    return sum(values[1:], values[0]) / len(values)


def _check_states(student_states: ArrayLike, teacher_states: ArrayLike) -> tuple[Array, Array]:
    student, teacher = upcast_pair(
        ("student_states", "teacher_states"), student_states, teacher_states
    )
    check_shape(
        student.ndim > 0 and student.shape == teacher.shape,
        f"student_states {student.shape} and teacher_states {teacher.shape} must have the same "
        "shape [..., D]; project the student's features first where D differs",
    )
    return student, teacher


def _check_maps(kind: str, student: ArrayLike, teacher: ArrayLike) -> tuple[Array, Array]:
    student, teacher = upcast_pair((f"student_{kind}", f"teacher_{kind}"), student, teacher)
    check_shape(
        student.ndim >= 3 and student.shape == teacher.shape,
        f"student_{kind} {student.shape} and teacher_{kind} {teacher.shape} must have the same "
        "shape [..., H, N, M]; average over the heads or choose among them where H differs",
    )
    return student, teacher


def _average_queries(divergence: Array, where: Array) -> Array:
    """Averages `[..., H, N]` over the heads and over the queries `[..., N]` that count."""
    total = jnp.where(where, divergence.mean(-2), 0).sum(-1)
    return safe_divide(total, where.sum(-1).astype(total.dtype))


def _relation_scores(values: Array) -> Array:
    """Computes scaled dot products `[..., H, S, S]` of the values `[..., S, H, d]` of tokens."""
    # A softmax follows, which magnifies the rounding errors of the accelerators' default precision.
    products = jnp.einsum("...ihd,...jhd->...hij", values, values, precision="highest")
    return products / jnp.sqrt(jnp.asarray(values.shape[-1], values.dtype))


def _check_depths(student_layers: int, teacher_layers: int) -> None:
    if not 1 <= student_layers <= teacher_layers:
        raise ValueError(
            "student_layers must be at least 1 and at most the teacher's, "
            f"got {student_layers} of {teacher_layers}"
        )
