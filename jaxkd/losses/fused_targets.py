"""Fused losses of language models with labels, or with a teacher's largest logits.

Like those of `fused`, they take the states before the last layer and never hold all logits.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxkd.losses._arrays import (
    check_fraction,
    check_mask,
    check_positive,
    check_term_weight,
    exclude_unused,
    untraced,
    weigh,
    zero_masked,
)
from jaxkd.losses._fused_chunks import check_axis, evaluate_terms
from jaxkd.losses._fused_terms import ClassLogProbabilities, Divergence, Vocabulary
from jaxkd.losses._softmax import Softmax, check_labels, divergence
from jaxkd.losses.fused import check_beta, check_model, check_models
from jaxkd.losses.heads import LinearHead
from jaxkd.losses.sparse import TopK, check_is_kept, check_kept, soften_kept


def fused_linear_cross_entropy(
    states: ArrayLike,
    head: ArrayLike | LinearHead,
    labels: ArrayLike,
    *,
    where: ArrayLike | None = None,
    chunk_size: int | None = None,
    axis_name: str | None = None,
) -> Array:
    """Computes `hard_cross_entropy` of the logits `states @ kernel`, in chunks of tokens.

    −log softmax(h W)_label

    Args:
        states: `[..., D]`, the hidden states before the last layer, floating-point.
        head: `[D, V]`, the kernel of the last layer, in the dtype of the states, or a `LinearHead`.
        labels: `[...]`, integers in [0, V); any integer, such as −100, where a token does not
            count.
        where: Booleans `[...]`, True for a token that counts, such as `labels != -100`.
        chunk_size: Tokens in a chunk; by default as many as have 25 million logits.
        axis_name: The axis of a mesh that shards the classes of the head, inside `shard_map`.

    Returns:
        One value per token `[...]`, float32, and 0 for a token that does not count, whatever its
        states; NaN where the label of a token that counts is out of range.

    Raises:
        ValueError: If shapes disagree or the chunk size is not positive.
        TypeError: If the states are not floating-point, they and the kernel differ in dtype, or the
            labels are not integers.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> states, kernel = jnp.array([[1.0, 2.0], [0.0, 0.0]]), jnp.eye(2)
        >>> labels = jnp.array([1, -100])
        >>> print(losses.fused_linear_cross_entropy(states, kernel, labels, where=labels != -100))
        [0.313 0.   ]

    References:
        Hsu et al., Liger Kernel: Efficient Triton Kernels for LLM Training,
        https://arxiv.org/abs/2410.10989
    """
    own_states, own_head = check_model("", states, head)
    labels = check_labels(labels, (*own_states.shape[:-1], own_head.num_classes))
    where = check_mask("token", where, labels.shape)
    (logs,) = evaluate_terms(
        [ClassLogProbabilities(is_softened=False, has_rest=False)],
        [own_states],
        [own_head],
        [labels[..., None]],
        temperature=1.0,
        where=where,
        chunk_size=chunk_size,
        axis_name=axis_name,
    )
    return zero_masked(where, -logs[..., 0])


def fused_linear_distillation_loss(
    student_states: ArrayLike,
    student_head: ArrayLike | LinearHead,
    teacher_states: ArrayLike,
    teacher_head: ArrayLike | LinearHead,
    labels: ArrayLike,
    *,
    temperature: ArrayLike = 2.0,
    alpha: ArrayLike = 0.5,
    beta: float = 0.0,
    where: ArrayLike | None = None,
    chunk_size: int | None = None,
    axis_name: str | None = None,
) -> Array:
    """Mixes a divergence from the teacher and the cross-entropy with labels, in chunks of tokens.

    α T² D_β(softmax(h_t W_t / T), softmax(h_s W_s / T)) + (1 − α) CE(label, softmax(h_s W_s))

    D_β is the divergence of `jensen_shannon_divergence`. At its default, β = 0, it is the forward
    KL, where `distillation_loss` has the cross-entropy with the teacher: the values are smaller by
    α T² times the teacher's entropy, and the student's gradient is the same. The logits of both
    terms are computed once.

    Args:
        student_states: `[..., Ds]`, the hidden states before the last layer, floating-point.
        student_head: `[Ds, V]`, the kernel of the last layer, in the dtype of its states, or a
            `LinearHead`.
        teacher_states: `[..., Dt]`, with the same leading axes.
        teacher_head: `[Dt, V]`, in the dtype of its states, or a `LinearHead`.
        labels: `[...]`, integers in [0, V); any integer, such as −100, where a token does not count
            or `alpha` is 1.
        temperature: T > 0, a scalar, of the first term alone.
        alpha: Weight of the teacher's term in [0, 1]; a number, or one per token `[...]`. Where it
            is 0, the teacher's states have no effect, even if they are NaN.
        beta: β in [0, 1], a Python number; 1 gives the reverse KL.
        where: Booleans `[...]`, True for a token that counts.
        chunk_size: Tokens in a chunk; by default as many as have 25 million logits.
        axis_name: The axis of a mesh that shards the classes of both heads, inside `shard_map`.

    Returns:
        One value per token `[...]`, float32, and 0 for a token that does not count, whatever its
        states; NaN where a label that has weight is out of range.

    Raises:
        ValueError: If shapes disagree, the temperature or the chunk size is not positive, or
            `alpha` or `beta` is not in [0, 1].
        TypeError: If states are not floating-point, states and kernel differ in dtype, the labels
            are not integers, or `beta` is traced.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student, teacher = jnp.array([[2.0, 1.0, 0.1]]), jnp.array([[3.0, 1.0, 0.2]])
        >>> print(losses.fused_linear_distillation_loss(
        ...     student, jnp.eye(3), teacher, jnp.eye(3), jnp.array([0]), temperature=2.0
        ... ).round(3))
        [0.265]

    References:
        Hinton et al., Distilling the Knowledge in a Neural Network, https://arxiv.org/abs/1503.02531
    """
    temperature = check_positive("temperature", temperature)
    soft_term = Divergence.from_beta(check_beta(beta))
    states, heads = check_models(student_states, student_head, teacher_states, teacher_head)
    tokens = states[0].shape[:-1]
    labels = check_labels(labels, (*tokens, heads[0].num_classes))
    where = check_mask("token", where, tokens)
    alpha = check_fraction("alpha", alpha, scalar=False)
    # At α = 0 the teacher's states may be NaN.
    (teacher,) = exclude_unused(untraced(alpha) > 0, states[1])
    soft, logs = evaluate_terms(
        [soft_term, ClassLogProbabilities(is_softened=False, has_rest=False)],
        [states[0], teacher],
        heads,
        [None, labels[..., None]],
        temperature=temperature,
        where=where,
        chunk_size=chunk_size,
        axis_name=axis_name,
    )
    weight = check_term_weight("alpha", alpha, tokens, soft.dtype)
    scale = jnp.square(jnp.asarray(temperature, soft.dtype))
    values = weigh(weight, scale * soft) + weigh(1 - weight, -logs[..., 0])
    return zero_masked(where, values)


def fused_linear_sparse_kl_divergence(
    student_states: ArrayLike,
    student_head: ArrayLike | LinearHead,
    kept: TopK,
    *,
    temperature: ArrayLike = 2.0,
    where: ArrayLike | None = None,
    chunk_size: int | None = None,
    axis_name: str | None = None,
) -> Array:
    """Computes `sparse_kl_divergence` of the logits `states @ kernel`, in chunks of tokens.

    T² (Σ_i p_i log(p_i / q_i) + p_rest log(p_rest / q_rest)) with q = softmax(h_s W_s / T)

    The sum runs over the classes of which the teacher's logits were kept. Neither model's logits of
    all classes are held for more than a chunk of tokens, the teacher's not at all.

    Args:
        student_states: `[..., D]`, the hidden states before the last layer, floating-point.
        student_head: `[D, V]`, the kernel of the last layer, in the dtype of its states, or a
            `LinearHead`.
        kept: From `top_k` of the teacher's logits, `[..., k]`.
        temperature: T > 0, a scalar, as for `sparse_soft_cross_entropy`.
        where: Booleans `[...]`, True for a token that counts.
        chunk_size: Tokens in a chunk; by default as many as have 25 million logits.
        axis_name: The axis of a mesh that shards the classes of the head, inside `shard_map`.

    Returns:
        One value per token `[...]`, float32, and 0 for a token that does not count, whatever its
        states; NaN where a traced index is no class.

    Raises:
        ValueError: If shapes disagree, an index is no class, or the temperature or the chunk size
            is not positive.
        TypeError: If the states are not floating-point, they and the kernel differ in dtype, or
            `kept` is no `TopK`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> kept = losses.top_k(jnp.log(jnp.array([[0.1, 0.6, 0.1, 0.2]])), k=2)
        >>> states, kernel = jnp.zeros((1, 3)), jnp.ones((3, 4))
        >>> print(losses.fused_linear_sparse_kl_divergence(states, kernel, kept, temperature=1.0))
        [0.297]

    References:
        Anshumann et al., Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs,
        https://arxiv.org/abs/2503.16870
    """
    check_is_kept(kept)
    temperature = check_positive("temperature", temperature)
    states, head = check_model("student_", student_states, student_head)
    tokens = states.shape[:-1]
    where = check_mask("token", where, tokens)
    check_axis(axis_name, [head])
    num_classes = Vocabulary(axis_name).size(head.num_classes)
    kept = check_kept(kept, "student_states", tokens, num_classes)
    kept = TopK(*(zero_masked(where, array) for array in kept))
    # Stored indices may be too narrow for the number of classes, which marks what is out of range.
    indices = kept.indices if kept.indices.itemsize > 4 else kept.indices.astype(jnp.int32)
    (logs,) = evaluate_terms(
        [ClassLogProbabilities(is_softened=True, has_rest=True)],
        [states],
        [head],
        [indices],
        temperature=temperature,
        where=where,
        chunk_size=chunk_size,
        axis_name=axis_name,
    )
    temperature = jnp.asarray(temperature, logs.dtype)
    teacher = soften_kept(kept, num_classes, temperature)
    values = divergence(teacher, Softmax(jnp.exp(logs), logs))
    return zero_masked(where, jnp.square(temperature) * values)
