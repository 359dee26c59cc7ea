"""Losses on sequences that the student has sampled itself (on-policy distillation).

The divergence KL(student ‖ teacher) of whole sequences is an expectation over the student's
samples, y ~ q. Its gradient has to say which sampled tokens should become more probable, which the
gradient of the samples' own value does not: that needs a policy gradient. With logits `[B, S, V]`
of tokens `[B, S]`, their log-probabilities are `-losses.hard_cross_entropy(logits, tokens)`, after
`losses.next_tokens` for a causal model.

GKD (Agarwal et al. 2023) needs no policy gradient: it takes the samples as given, and applies
`losses.jensen_shannon_divergence` to the logits of student and teacher at each sampled token.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxkd.losses._arrays import (
    check_mask,
    check_shape,
    safe_divide,
    upcast_pair,
    zero_masked,
)


def rewards_to_go(
    student_log_probabilities: ArrayLike,
    teacher_log_probabilities: ArrayLike,
    *,
    where: ArrayLike,
    length_normalized: bool = True,
) -> Array:
    """Computes how much more probable the teacher finds the rest of a sampled sequence.

    R_t = (1/n_t) Σ_{u ≥ t} (log p_u − log q_u) over the n_t tokens that count from t on

    Args:
        student_log_probabilities: log q_t `[..., S]`, floating-point, of the sampled tokens.
        teacher_log_probabilities: log p_t, the same shape.
        where: Booleans `[..., S]`, True for a sampled token; False for the prompt and padding.
        length_normalized: Whether to divide by n_t, as the paper does so that long sequences do not
            have large rewards. Otherwise n_t is 1, and R_t the sum.

    Returns:
        One value per token `[..., S]`, in float32 or wider, without a gradient; 0 for a token that
        does not count.

    Raises:
        ValueError: If the shapes differ.
        TypeError: If the log-probabilities are not floating-point or `where` is not boolean.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student, teacher = jnp.array([[-1.0, -1.0, 0.0]]), jnp.array([[-2.0, -4.0, 0.0]])
        >>> where = jnp.array([[True, True, False]])
        >>> print(losses.rewards_to_go(student, teacher, where=where))
        [[-2. -3.  0.]]

    References:
        Gu et al., MiniLLM: Knowledge Distillation of Large Language Models,
        https://arxiv.org/abs/2306.08543
    """
    student, teacher, where = _check_log_probabilities(
        student_log_probabilities, teacher_log_probabilities, where
    )
    axis = student.ndim - 1
    rewards = jax.lax.cumsum(jax.lax.stop_gradient(teacher - student), axis=axis, reverse=True)
    if length_normalized:
        count = jax.lax.cumsum(where.astype(rewards.dtype), axis=axis, reverse=True)
        rewards = safe_divide(rewards, count)
    return zero_masked(where, rewards)


def sequence_reverse_kl_loss(
    student_log_probabilities: ArrayLike,
    teacher_log_probabilities: ArrayLike,
    *,
    where: ArrayLike,
    baseline: ArrayLike = 0.0,
    length_normalized: bool = True,
) -> Array:
    """Estimates the reverse KL divergence of sequences from the student's samples (MiniLLM).

    log q_t − log p_t, with the gradient −(R_t − b_t) ∇ log q_t, R of `rewards_to_go`

    The sum over the tokens of a sequence estimates KL(student ‖ teacher) of sequences. The gradient
    is not that of this value, but the policy gradient (REINFORCE): without `length_normalized` and
    with any baseline that does not depend on the token, its mean over the samples is the gradient
    of the divergence. It is right only for tokens that the student has sampled, with its present
    weights, from these very probabilities, not from the most probable tokens alone. The teacher
    gets no gradient.

    The paper's gradient has b_t = 1, whose expectation is 0. It also splits off a token's own
    reward, whose expectation it computes over all tokens, and its code adds that term,
    `reverse_kl_divergence` at temperature 1, to the whole reward; neither is done here. The code
    also clips and whitens the rewards over the batch, clips the steps as PPO does, and samples from
    a mixture with the teacher, with importance weights. TRL adds R_t to the advantages of GRPO.

    A baseline that lowers the variance, the mean reward of the B − 1 other samples of one prompt:
    `(rewards.sum(0, keepdims=True) - rewards) / (B - 1)`, with `rewards` from `rewards_to_go`.

    Args:
        student_log_probabilities: log q_t `[..., S]`, finite, floating-point, of the sampled
            tokens.
        teacher_log_probabilities: log p_t, the same shape; finite: take `jnp.maximum(log_p, -20)`
            where a teacher may rule out a token.
        where: Booleans `[..., S]`, True for a sampled token; False for the prompt and padding.
        baseline: b, a scalar or `[..., S]`. No gradient is taken through it.
        length_normalized: Whether R_t is the mean of the remaining rewards, as in the paper, or
            their sum.

    Returns:
        One value per token `[..., S]`, in float32 or wider, and 0 for a token that does not count.
        Average them with `token_mean`, as the authors' code does, or add them up.

    Raises:
        ValueError: If the shapes differ, or the baseline is neither a scalar nor of their shape.
        TypeError: If the log-probabilities are not floating-point or `where` is not boolean.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student, teacher = jnp.array([[-1.0, -1.0]]), jnp.array([[-2.0, -4.0]])
        >>> def total(log_q):
        ...     where = jnp.array([[True, True]])
        ...     return losses.sequence_reverse_kl_loss(log_q, teacher, where=where).sum()
        >>> print(total(student), jax.grad(total)(student))
        4.0 [[2. 3.]]

    References:
        Gu et al., MiniLLM: Knowledge Distillation of Large Language Models,
        https://arxiv.org/abs/2306.08543
    """
    rewards = rewards_to_go(
        student_log_probabilities,
        teacher_log_probabilities,
        where=where,
        length_normalized=length_normalized,
    )
    student, teacher, where = _check_log_probabilities(
        student_log_probabilities, teacher_log_probabilities, where
    )
    baseline = jnp.asarray(baseline, rewards.dtype)
    check_shape(
        baseline.shape in ((), rewards.shape),
        f"baseline {baseline.shape} must be a scalar or one number per token {rewards.shape}",
    )
    advantages = zero_masked(where, rewards - baseline)
    values = jax.lax.stop_gradient(student - teacher)
    # The difference is 0, so that it adds the policy gradient alone, and none to the advantages.
    return values - advantages * (student - jax.lax.stop_gradient(student))


def _check_log_probabilities(
    student: ArrayLike, teacher: ArrayLike, where: ArrayLike
) -> tuple[Array, Array, Array]:
    """Returns log-probabilities in one dtype, 0 for tokens that do not count, and the mask."""
    student, teacher = upcast_pair(
        ("student_log_probabilities", "teacher_log_probabilities"), student, teacher
    )
    check_shape(
        student.ndim > 0 and student.shape == teacher.shape,
        f"student_log_probabilities {student.shape} and teacher_log_probabilities "
        f"{teacher.shape} must have the same shape [..., S], one for each sampled token: take "
        "-hard_cross_entropy(logits, tokens)",
    )
    where = check_mask("token", where, student.shape)
    return zero_masked(where, student), zero_masked(where, teacher), where
