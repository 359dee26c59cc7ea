"""Tokens: the shift of a causal model, losses that pass over padding, and the mean over tokens that count."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxkd.losses._arrays import check_shape, full_mask, only, wide
from jaxkd.losses._softmax import check_labels, logits_pair
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
    """`distillation_loss` of every token that counts, word by word.

    α T² CE(softmax(t / T), softmax(s / T)) + (1 − α) CE(label, s)

    Logits and labels of one position belong together; for a causal model `next_tokens` makes them so. With the beam
    outputs of a teacher as labels and α = 0 it is the paper's distillation at the level of sequences.

    Args:
        student_logits: `[..., S, V]`, floating-point.
        teacher_logits: The same shape. Vocabularies must be one: leave out, or set to −inf, entries that the other
            lacks; entries padded with 0 would take probability.
        labels: `[..., S]`, integers in [0, V); anything, such as −100, where a token does not count.
        where: Booleans `[..., S]`, True for a token that counts, such as the attention mask.
        temperature: T > 0, a scalar.
        alpha: Weight of the soft term in [0, 1]; a number, or one per token `[..., S]`.

    Returns:
        One value per token `[..., S]`, in float32 or wider, and 0 for one that does not count: what the logits hold
        there reaches neither value nor gradient. Their mean is `token_mean`'s affair.

    Raises:
        ValueError: If shapes disagree, the temperature is not a positive scalar or `alpha` leaves [0, 1].
        TypeError: If the logits are not floating-point, the labels are not integers or `where` is not boolean.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student, teacher = jnp.array([[[1.0, 2.0], [0.0, 0.0]]]), jnp.array([[[3.0, 1.0], [0.0, 0.0]]])
        >>> print(losses.token_distillation_loss(
        ...     student, teacher, jnp.array([[0, -100]]), where=jnp.array([[True, False]])
        ... ))
        [[2.336 0.   ]]

    References:
        Kim and Rush, Sequence-Level Knowledge Distillation, https://arxiv.org/abs/1606.07947
    """
    student, teacher = logits_pair(student_logits, teacher_logits)
    labels, where = check_labels(labels, student.shape), full_mask("token", where, student.shape[:-1])
    student, teacher, labels = (only(where, array) for array in (student, teacher, labels))
    return only(where, distillation_loss(student, teacher, labels, temperature=temperature, alpha=alpha))


def next_tokens(logits: ArrayLike, tokens: ArrayLike, *, where: ArrayLike) -> tuple[Array, Array, Array]:
    """Pairs a causal model's logits with the tokens that they predict: the next ones.

    A position counts if it and the next one do: padding neither predicts nor is predicted.

    Args:
        logits: `[..., S, V]`, of student or teacher.
        tokens: `[..., S]`, integers: what the model read.
        where: Booleans `[..., S]`, True for a token that is not padding.

    Returns:
        Logits `[..., S − 1, V]`, labels `[..., S − 1]`, and the positions that count `[..., S − 1]`.

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
    tokens, where = check_labels(tokens, logits.shape), full_mask("token", where, logits.shape[:-1])
    check_shape(logits.shape[-2] >= 2, "a causal model predicts the next token: at least two positions are needed")
    return logits[..., :-1, :], tokens[..., 1:], where[..., :-1] & where[..., 1:]


def token_mean(values: ArrayLike, *, where: ArrayLike, count: ArrayLike | None = None) -> Array:
    """Mean over the tokens that count.

    Σ where · value / max(Σ where, 1)

    Every token weighs the same, whatever the length of its sequence. Under gradient accumulation, or where each device
    takes its own mean, hand in the `count` of the whole batch and add the parts up: the mean of means gives tokens of
    short batches too much weight.

    It keeps what padded positions hold out of the mean. To keep it out of the gradient as well, whatever it is, mask
    the loss too: `losses.kl_divergence(student, teacher, temperature=2.0, where=where[..., None])`.

    Args:
        values: `[...]`, one value per token.
        where: Booleans `[...]`, True for a token that counts.
        count: How many tokens count in all, a scalar, if not those of `where`.

    Returns:
        A scalar in float32 or wider; 0 if no token counts.

    Raises:
        ValueError: If the shapes differ.
        TypeError: If the values are not floating-point or `where` is not boolean.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> print(losses.token_mean(jnp.array([[1.0, 2.0, 9.0]]), where=jnp.array([[True, True, False]])))
        1.5
    """
    values = wide("values", values)
    where = full_mask("token", where, values.shape)
    count = jnp.asarray(where.sum() if count is None else count)
    check_shape(count.ndim == 0, f"count must be a scalar, got shape {count.shape}")
    return only(where, values).sum() / jnp.maximum(count, 1).astype(values.dtype)
