"""Losses between models with different vocabularies, whose tokens and classes do not correspond.

`align_tokens` finds the positions at which both models have read the same text, and
`universal_logit_loss` compares what they predict there, whatever their tokens are:

    positions, where = losses.align_tokens(student_offsets, teacher_offsets)
    teacher_logits = jnp.take_along_axis(teacher_logits, positions[..., None], axis=-2)
    values = losses.universal_logit_loss(student_logits, teacher_logits, where=where)
    loss = losses.token_mean(values, where=where)

Offsets come from the tokenizers: with Hugging Face's, `tokenizer(texts, padding=True,
return_offsets_mapping=True)["offset_mapping"]`. Where the teacher's classes are the student's in
another order, `losses.kl_divergence` of the same logits, after its classes are put in the student's
order, compares them one by one instead.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxkd.losses._arrays import (
    check_mask,
    check_positive,
    check_shape,
    untraced,
    upcast_pair,
    zero_masked,
)
from jaxkd.losses._softmax import check_classes, check_logits, softmax


def universal_logit_loss(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    where: ArrayLike | None = None,
) -> Array:
    """Computes the Wasserstein distance between sorted probabilities of two vocabularies (ULD).

    Σ_i |p_(i) − q_(i)|, where p = softmax(t / T) and q = softmax(s / T) are in descending order,
    the shorter filled up with zeros

    It is between 0 and 2, and does not depend on which tokens are probable, only on how probable
    they are: combine it with a loss on labels, as the paper does. It is not multiplied by T², for
    its gradient shrinks with 1 / T at most. The authors' code has a temperature for each side, 1 by
    default, pairs the n-th token of the student's answer with the n-th of the teacher's, and
    averages over the tokens of each answer first; TRL pairs groups of tokens of one text. Here the
    caller pairs the positions, such as by `align_tokens`, and averages.

    Args:
        student_logits: `[..., V]`, floating-point. A class at −inf has probability 0.
        teacher_logits: `[..., V']`, of the same positions.
        temperature: T > 0, a scalar.
        where: Booleans `[...]`, True for a position that counts; logits of others may be NaN.

    Returns:
        One value per position `[...]`, in float32 or wider, and 0 where it does not count.

    Raises:
        ValueError: If shapes differ in more than the last axis, or the temperature is not a
            positive scalar.
        TypeError: If the logits are not floating-point or `where` is not boolean.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student = jnp.log(jnp.array([[0.5, 0.25, 0.25]]))
        >>> teacher = jnp.log(jnp.array([[0.1, 0.9]]))
        >>> print(losses.universal_logit_loss(student, teacher))  # 0.4 + 0.15 + 0.25
        [0.8]

    References:
        Boizard et al., Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss
        for LLMs, https://arxiv.org/abs/2402.12030
    """
    temperature = check_positive("temperature", temperature)
    names = "student_logits", "teacher_logits"
    student, teacher = (
        check_logits(name, logits)
        for name, logits in zip(names, (student_logits, teacher_logits), strict=True)
    )
    student, teacher = upcast_pair(names, student, teacher)
    for name, logits in zip(names, (student, teacher), strict=True):
        check_classes(name, logits.shape)
    check_shape(
        student.shape[:-1] == teacher.shape[:-1],
        f"student_logits {student.shape} and teacher_logits {teacher.shape} must be of the same "
        "positions and differ only in their last axis, the vocabulary: pick them by align_tokens",
    )
    where = check_mask("position", where, student.shape[:-1])
    student, teacher = (
        _sorted_probabilities(zero_masked(where, logits), temperature)
        for logits in (student, teacher)
    )
    shared = min(student.shape[-1], teacher.shape[-1])
    values = jnp.abs(student[..., :shared] - teacher[..., :shared]).sum(-1)
    # Beyond the smaller vocabulary, only one side has probabilities, and they are at least 0.
    values += student[..., shared:].sum(-1) + teacher[..., shared:].sum(-1)
    return zero_masked(where, values)


def align_tokens(student_offsets: ArrayLike, teacher_offsets: ArrayLike) -> tuple[Array, Array]:
    """Finds the positions at which two tokenizers have split off the same part of a text.

    Student position i and teacher position j correspond if their tokens end at the same character.
    Both models have read the same text then, and their logits at i and j predict what follows it.
    Within a word that the two split differently, positions correspond to none. Of several tokens
    that end at one character, such as the bytes of an emoji, the last corresponds.

    Nothing is merged. TRL groups the tokens between two such positions and multiplies their
    probabilities; the authors of ULD pair the tokens by number, whatever their text.

    Args:
        student_offsets: `[..., S, 2]`, integers: the characters of the text at which each token
            starts and ends (exclusive). Tokens of no characters, such as padding and special
            tokens, correspond to none.
        teacher_offsets: `[..., T, 2]`, of the same texts.

    Returns:
        The teacher's position for each of the student's, `[..., S]`, int32, 0 where it has none;
        and booleans `[..., S]`, True where it has one.

    Raises:
        ValueError: If the shapes disagree, or a token ends before the one in front of it: align the
            texts of a pair one by one. Traced offsets are not checked for this.
        TypeError: If the offsets are not integers.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student = jnp.array([[0, 0], [0, 5], [5, 8], [8, 11]])  # [CLS] token iza ble
        >>> teacher = jnp.array([[0, 3], [3, 5], [5, 9], [9, 11]])  # tok en izab le
        >>> positions, where = losses.align_tokens(student, teacher)
        >>> print(positions, where)
        [0 1 0 3] [False  True False  True]
    """
    student = _check_offsets("student_offsets", student_offsets)
    teacher = _check_offsets("teacher_offsets", teacher_offsets)
    check_shape(
        student.shape[:-2] == teacher.shape[:-2],
        f"student_offsets {student.shape} and teacher_offsets {teacher.shape} must be "
        "[..., tokens, 2] of the same texts",
    )
    student_ends, student_last = _last_ends(student)
    teacher_ends, teacher_last = _last_ends(teacher)
    # Ends `[..., S, 1]` against `[..., 1, T]`; at most one of the last ends of a text is equal.
    same = jnp.expand_dims(student_ends, -1) == jnp.expand_dims(teacher_ends, -2)
    same &= jnp.expand_dims(student_last, -1) & jnp.expand_dims(teacher_last, -2)
    return same.argmax(-1).astype(jnp.int32), same.any(-1)


def _sorted_probabilities(logits: Array, temperature: ArrayLike) -> Array:
    probabilities = softmax(logits, temperature=temperature).probabilities
    return jnp.sort(probabilities, axis=-1, descending=True)


def _check_offsets(name: str, offsets: ArrayLike) -> Array:
    known = untraced(offsets)
    check_shape(
        known.ndim >= 2 and known.shape[-1] == 2 and known.shape[-2] > 0,
        f"{name} {known.shape} must be [..., tokens, 2], start and end of at least one token",
    )
    if not jnp.issubdtype(known.dtype, jnp.integer):
        raise TypeError(f"{name} must be integers, the characters of a text, got {known.dtype}")
    if not isinstance(known, jax.core.Tracer):
        has_text = known[..., 1] > known[..., 0]
        furthest = np.maximum.accumulate(np.where(has_text, known[..., 1], 0), axis=-1)
        check_shape(
            not np.any(has_text & (known[..., 1] < furthest)),
            f"{name} must not decrease: a token ends before the one in front of it, as where the "
            "second text of a pair begins; align each text by itself",
        )
    # In an unsigned or narrow dtype, the largest number could be an end.
    return jnp.asarray(known).astype(jnp.int32)


def _last_ends(offsets: Array) -> tuple[Array, Array]:
    """Returns where each token ends, and whether it is the last with characters to end there."""
    has_text = offsets[..., 1] > offsets[..., 0]
    beyond = jnp.iinfo(offsets.dtype).max
    ends = jnp.where(has_text, offsets[..., 1], beyond)
    # The end of the next token with characters.
    following = jax.lax.cummin(ends, axis=ends.ndim - 1, reverse=True)[..., 1:]
    following = jnp.concatenate([following, jnp.full_like(ends[..., :1], beyond)], axis=-1)
    return ends, has_text & (following != ends)
