"""Fused losses of language models: last layers and divergence without the logits of all tokens.

At 8,192 tokens and a vocabulary of 128,256, one float32 array of logits takes 4 GB, and a loss with
its gradient holds several. Here the tokens are processed in chunks, see `_fused_chunks`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxkd.losses._arrays import (
    as_floating,
    check_fraction,
    check_mask,
    check_positive,
    check_shape,
    zero_masked,
)
from jaxkd.losses._fused_chunks import CHUNK_LOGITS as CHUNK_LOGITS
from jaxkd.losses._fused_chunks import evaluate_terms
from jaxkd.losses._fused_terms import Divergence
from jaxkd.losses.heads import LinearHead, as_head


def fused_linear_kl_divergence(
    student_states: ArrayLike,
    student_kernel: ArrayLike | LinearHead,
    teacher_states: ArrayLike,
    teacher_kernel: ArrayLike | LinearHead,
    *,
    temperature: ArrayLike = 2.0,
    where: ArrayLike | None = None,
    chunk_size: int | None = None,
    axis_name: str | None = None,
    use_pallas: bool = False,
) -> Array:
    """Computes `kl_divergence` of the logits `states @ kernel`, in chunks of tokens.

    T² KL(softmax(h_t W_t / T) ‖ softmax(h_s W_s / T))

    The values and the gradients, with respect to states and kernels of student and teacher, are
    those of the two matrix products followed by the loss; the gradient costs the products once
    more. Products take the states' dtype and accumulate in float32; the rest is computed in
    float32. The gradient has a rule of its own, so that forward mode and second derivatives are not
    available. On a mesh with explicit axes use `shard_map`.

    Args:
        student_states: `[..., Ds]`, the hidden states before the unembedding, floating-point.
        student_kernel: `[Ds, V]`, the unembedding, in the dtype of its states; or a `LinearHead`,
            which may have a bias, a softcap, or the table of embeddings `[V, Ds]`.
        teacher_states: `[..., Dt]`, with the same leading axes.
        teacher_kernel: `[Dt, V]`, in the dtype of its states, or a `LinearHead`.
        temperature: T > 0, a scalar.
        where: Booleans `[...]`, True for a token that counts.
        chunk_size: Tokens in a chunk; by default as many as have 25 million logits.
        axis_name: The axis of a mesh that shards the classes of both heads, inside `shard_map`.
        use_pallas: True to compute the values on TPUs and NVIDIA GPUs by a Pallas kernel, which
            writes no logits to the device's memory. It has been tested in Pallas's interpreter
            alone, not on a device, and its speed has not been measured. The gradient uses chunks
            all the same, and so do the values elsewhere. On a mesh call it inside `shard_map`.

    Returns:
        One value per token `[...]`, float32, and 0 for a token that does not count, whatever its
        states.

    Raises:
        ValueError: If shapes disagree, or the temperature or the chunk size is not positive.
        TypeError: If an array is not floating-point, or states and kernel differ in dtype.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd import losses
        >>> states, kernel = jnp.ones((2, 5, 4)), jax.random.normal(jax.random.key(0), (4, 9))
        >>> losses.fused_linear_kl_divergence(
        ...     states, kernel, states, 2 * kernel, temperature=2.0
        ... ).shape
        (2, 5)

    References:
        Hsu et al., Liger Kernel: Efficient Triton Kernels for LLM Training,
        https://arxiv.org/abs/2410.10989
    """
    operands = student_states, student_kernel, teacher_states, teacher_kernel
    divergence = Divergence.from_beta(0)
    return _fused_divergence(
        divergence, operands, temperature, where, chunk_size, axis_name, use_pallas
    )


def fused_linear_reverse_kl_divergence(
    student_states: ArrayLike,
    student_kernel: ArrayLike | LinearHead,
    teacher_states: ArrayLike,
    teacher_kernel: ArrayLike | LinearHead,
    *,
    temperature: ArrayLike = 2.0,
    where: ArrayLike | None = None,
    chunk_size: int | None = None,
    axis_name: str | None = None,
    use_pallas: bool = False,
) -> Array:
    """Computes `reverse_kl_divergence` of the logits `states @ kernel`, in chunks of tokens.

    T² KL(softmax(h_s W_s / T) ‖ softmax(h_t W_t / T))

    Args:
        student_states: `[..., Ds]`, the hidden states before the unembedding, floating-point.
        student_kernel: `[Ds, V]`, the unembedding, in the dtype of its states; or a `LinearHead`,
            which may have a bias, a softcap, or the table of embeddings `[V, Ds]`.
        teacher_states: `[..., Dt]`, with the same leading axes.
        teacher_kernel: `[Dt, V]`, in the dtype of its states, or a `LinearHead`.
        temperature: T > 0, a scalar.
        where: Booleans `[...]`, True for a token that counts.
        chunk_size: Tokens in a chunk; by default as many as have 25 million logits.
        axis_name: The axis of a mesh that shards the classes of both heads, inside `shard_map`.
        use_pallas: As for `fused_linear_kl_divergence`.

    Returns:
        One value per token `[...]`, float32, as from `fused_linear_kl_divergence`.

    Raises:
        ValueError: If shapes disagree, or the temperature or the chunk size is not positive.
        TypeError: If an array is not floating-point, or states and kernel differ in dtype.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd import losses
        >>> states, kernel = jnp.ones((2, 5, 4)), jax.random.normal(jax.random.key(0), (4, 9))
        >>> losses.fused_linear_reverse_kl_divergence(
        ...     states, kernel, states, 2 * kernel, temperature=2.0
        ... ).shape
        (2, 5)

    References:
        Gu et al., MiniLLM: Knowledge Distillation of Large Language Models,
        https://arxiv.org/abs/2306.08543
    """
    operands = student_states, student_kernel, teacher_states, teacher_kernel
    divergence = Divergence.from_beta(1)
    return _fused_divergence(
        divergence, operands, temperature, where, chunk_size, axis_name, use_pallas
    )


def fused_linear_jensen_shannon_divergence(
    student_states: ArrayLike,
    student_kernel: ArrayLike | LinearHead,
    teacher_states: ArrayLike,
    teacher_kernel: ArrayLike | LinearHead,
    *,
    temperature: ArrayLike = 2.0,
    beta: float,
    where: ArrayLike | None = None,
    chunk_size: int | None = None,
    axis_name: str | None = None,
    use_pallas: bool = False,
) -> Array:
    """Computes `jensen_shannon_divergence` of the logits `states @ kernel`, in chunks of tokens.

    T² (β KL(p ‖ m) + (1 − β) KL(q ‖ m)) with m = β p + (1 − β) q, p = softmax(h_t W_t / T),
    q = softmax(h_s W_s / T)

    β has the same meaning as in that function: 0 gives the forward KL and 1 the reverse KL.

    Args:
        student_states: `[..., Ds]`, the hidden states before the unembedding, floating-point.
        student_kernel: `[Ds, V]`, the unembedding, in the dtype of its states; or a `LinearHead`,
            which may have a bias, a softcap, or the table of embeddings `[V, Ds]`.
        teacher_states: `[..., Dt]`, with the same leading axes.
        teacher_kernel: `[Dt, V]`, in the dtype of its states, or a `LinearHead`.
        temperature: T > 0, a scalar.
        beta: β in [0, 1], a Python number.
        where: Booleans `[...]`, True for a token that counts.
        chunk_size: Tokens in a chunk; by default as many as have 25 million logits.
        axis_name: The axis of a mesh that shards the classes of both heads, inside `shard_map`.
        use_pallas: As for `fused_linear_kl_divergence`.

    Returns:
        One value per token `[...]`, float32, as from `fused_linear_kl_divergence`.

    Raises:
        ValueError: If shapes disagree, the temperature or the chunk size is not positive, or `beta`
            is not in [0, 1].
        TypeError: If an array is not floating-point, states and kernel differ in dtype, or `beta`
            is traced.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd import losses
        >>> states, kernel = jnp.ones((2, 5, 4)), jax.random.normal(jax.random.key(0), (4, 9))
        >>> losses.fused_linear_jensen_shannon_divergence(
        ...     states, kernel, states, 2 * kernel, temperature=2.0, beta=0.5
        ... ).shape
        (2, 5)

    References:
        Agarwal et al., On-Policy Distillation of Language Models, https://arxiv.org/abs/2306.13649
    """
    operands = student_states, student_kernel, teacher_states, teacher_kernel
    divergence = Divergence.from_beta(check_beta(beta))
    return _fused_divergence(
        divergence, operands, temperature, where, chunk_size, axis_name, use_pallas
    )


def _fused_divergence(
    divergence: Divergence,
    operands: tuple[ArrayLike, ArrayLike | LinearHead, ArrayLike, ArrayLike | LinearHead],
    temperature: ArrayLike,
    where: ArrayLike | None,
    chunk_size: int | None,
    axis_name: str | None,
    use_pallas: bool,
) -> Array:
    temperature = check_positive("temperature", temperature)
    states, heads = check_models(*operands, name="kernel")
    if use_pallas:
        # Pallas takes long to import.
        from jaxkd.losses import _fused_kernel

        check_shape(
            axis_name is None,
            "the kernel takes all classes of a head: leave out use_pallas or axis_name",
        )
        _fused_kernel.check_states(states)
    where = check_mask("token", where, states[0].shape[:-1])
    (values,) = evaluate_terms(
        [divergence],
        states,
        heads,
        [None],
        temperature=temperature,
        where=where,
        chunk_size=chunk_size,
        axis_name=axis_name,
        use_pallas=use_pallas,
    )
    return zero_masked(where, jnp.square(jnp.asarray(temperature, values.dtype)) * values)


def check_beta(beta: float) -> float:
    """Returns β as a number; raises unless it is a Python number in [0, 1]."""
    if isinstance(beta, jax.core.Tracer):
        raise TypeError(
            "beta selects the program that is compiled, so it must be a Python number, not a "
            "traced one"
        )
    check_fraction("beta", beta)
    return float(beta)


def check_models(
    student_states: ArrayLike,
    student_head: ArrayLike | LinearHead,
    teacher_states: ArrayLike,
    teacher_head: ArrayLike | LinearHead,
    *,
    name: str = "head",
) -> tuple[tuple[Array, Array], tuple[LinearHead, LinearHead]]:
    """Returns the states and the heads of both models; raises if they disagree.

    Args:
        student_states: `[..., Ds]`.
        student_head: A kernel or a `LinearHead`.
        teacher_states: `[..., Dt]`.
        teacher_head: A kernel or a `LinearHead`.
        name: What the arguments of the heads are called, after "student_" and "teacher_".
    """
    student, own_head = check_model("student_", student_states, student_head, name=name)
    teacher, other_head = check_model("teacher_", teacher_states, teacher_head, name=name)
    check_shape(
        student.shape[:-1] == teacher.shape[:-1],
        f"student_states {student.shape} and teacher_states {teacher.shape} must have the same "
        "leading axes",
    )
    check_shape(
        own_head.num_classes == other_head.num_classes,
        f"the vocabularies of student_{name}, {own_head.num_classes} classes, and teacher_{name}, "
        f"{other_head.num_classes} classes, differ: slice off the padding of the larger one",
    )
    return (student, teacher), (own_head, other_head)


def check_model(
    prefix: str, states: ArrayLike, head: ArrayLike | LinearHead, *, name: str = "head"
) -> tuple[Array, LinearHead]:
    """Returns the states and the head of one model as arrays; raises if they disagree.

    The prefix, such as "student_", is that of its arguments.
    """
    states_name = f"{prefix}states"
    states = as_floating(states_name, states)
    return states, as_head(f"{prefix}{name}", states_name, head, states)
