"""Losses on token sequences: distillation with padding, next-token shift and token means."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxkd.losses._arrays import check_mask, check_shape, upcast, zero_masked
from jaxkd.losses._softmax import check_labels, check_logits_pair
from jaxkd.losses.labels import distillation_loss


def token_distillation_loss(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    labels: ArrayLike,
    *,
    where: ArrayLike,
    temperature: ArrayLike = 2.0,
    alpha: ArrayLike = 0.5,
) -> Array:
    """Computes `distillation_loss` for every token that counts.

    α T² CE(softmax(t / T), softmax(s / T)) + (1 − α) CE(label, s)

    Logits and labels of one position must belong together; for a causal model use `next_tokens`
    first. With a teacher's beam-search outputs as labels and α = 0 it is the paper's sequence-level
    distillation.

    Args:
        student_logits: `[..., S, V]`, floating-point.
        teacher_logits: The same shape. Both models must share one vocabulary: remove, or set to
            −inf, the entries that only one of them has; entries padded with 0 would take
            probability.
        labels: `[..., S]`, integers in [0, V); any integer, such as −100, where a token does not
            count.
        where: Booleans `[..., S]`, True for a token that counts, such as the attention mask.
        temperature: T > 0, a scalar.
        alpha: Weight of the soft term in [0, 1]; a number, or one per token `[..., S]`.

    Returns:
        One value per token `[..., S]`, in float32 or wider, and 0 for a token that does not count:
        its logits affect neither value nor gradient. Average them with `token_mean`.

    Raises:
        ValueError: If shapes disagree, the temperature is not a positive scalar or `alpha` is not
            in [0, 1].
        TypeError: If the logits are not floating-point, the labels are not integers or `where` is
            not boolean.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student = jnp.array([[[1.0, 2.0], [0.0, 0.0]]])
        >>> teacher = jnp.array([[[3.0, 1.0], [0.0, 0.0]]])
        >>> print(losses.token_distillation_loss(
        ...     student, teacher, jnp.array([[0, -100]]), where=jnp.array([[True, False]])
        ... ))
        [[2.336 0.   ]]

    References:
        Kim and Rush, Sequence-Level Knowledge Distillation, https://arxiv.org/abs/1606.07947
    """
    student, teacher = check_logits_pair(student_logits, teacher_logits)
    labels = check_labels(labels, student.shape)
    where = check_mask("token", where, student.shape[:-1])
    # Masking the inputs keeps NaN of padding out of the gradient. The values are masked as well,
    # since logits of 0 still have a loss.
    student, teacher, labels = (zero_masked(where, array) for array in (student, teacher, labels))
    values = distillation_loss(student, teacher, labels, temperature=temperature, alpha=alpha)
    return zero_masked(where, values)


def next_tokens(
    logits: ArrayLike, tokens: ArrayLike, *, where: ArrayLike
) -> tuple[Array, Array, Array]:
    """Pairs a causal model's logits with the tokens that they predict, the next ones.

    A position counts if neither it nor the next position is padding.

    Args:
        logits: `[..., S, V]`, of student or teacher.
        tokens: `[..., S]`, integers: the model's input.
        where: Booleans `[..., S]`, True for a token that is not padding.

    Returns:
        Logits `[..., S − 1, V]`, labels `[..., S − 1]`, and a mask `[..., S − 1]` of the positions
        that count.

    Raises:
        ValueError: If shapes disagree, or there are fewer than two positions.
        TypeError: If the tokens are not integers or `where` is not boolean.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> tokens, where = jnp.array([[5, 7, 2, 0]]), jnp.array([[True, True, True, False]])
        >>> _, labels, counted = losses.next_tokens(jnp.zeros((1, 4, 10)), tokens, where=where)
        >>> print(labels, counted)
        [[7 2 0]] [[ True  True False]]
    """
    logits = jnp.asarray(logits)
    check_shape(logits.ndim >= 2, f"logits must be [..., S, V], got {logits.shape}")
    tokens = check_labels(tokens, logits.shape)
    where = check_mask("token", where, logits.shape[:-1])
    check_shape(
        logits.shape[-2] >= 2,
        f"logits {logits.shape} must have at least two positions [..., S, V], since a causal model "
        "predicts the next token",
    )
    # Both positions must count: with padding on the left, the last padded position would otherwise
    # predict the first token.
    return logits[..., :-1, :], tokens[..., 1:], where[..., :-1] & where[..., 1:]


def token_mean(values: ArrayLike, *, where: ArrayLike, count: ArrayLike | None = None) -> Array:
    """Computes the mean over the tokens that count.

    Σ where · value / max(Σ where, 1)

    Every token has the same weight, whatever the length of its sequence. Under gradient
    accumulation, or where each device computes its own mean, pass the `count` of the whole batch
    and add up the results: a mean of means would give tokens of short batches too much weight.

    Values of padded positions do not enter the mean. If they may be NaN or infinite, mask the loss
    as well, so that they do not enter the gradient either:
    `losses.kl_divergence(student, teacher, temperature=2.0, where=where[..., None])`.

    Args:
        values: `[...]`, one value per token.
        where: Booleans `[...]`, True for a token that counts.
        count: The number of tokens that count, a scalar; by default the sum of `where`.

    Returns:
        A scalar in float32 or wider; 0 if no token counts.

    Raises:
        ValueError: If the shapes differ.
        TypeError: If the values are not floating-point or `where` is not boolean.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> values, where = jnp.array([[1.0, 2.0, 9.0]]), jnp.array([[True, True, False]])
        >>> print(losses.token_mean(values, where=where))
        1.5
    """
    values = upcast("values", values)
    where = check_mask("token", where, values.shape)
    count = jnp.asarray(where.sum() if count is None else count)
    check_shape(count.ndim == 0, f"count must be a scalar, got shape {count.shape}")
    return zero_masked(where, values).sum() / jnp.maximum(count, 1).astype(values.dtype)
