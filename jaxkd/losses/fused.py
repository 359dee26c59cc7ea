"""Fused losses of language models: last layer and divergence without the logits of all tokens.

At 8,192 tokens and a vocabulary of 128,256, one float32 array of logits takes 4 GB, and a loss with
its gradient holds several. Here the tokens are processed in chunks, whose logits are computed, used
and dropped. The gradient computes the logits again, for all tokens and a part of the vocabulary at
a time, so that it neither holds nor rounds a sum over chunks of the size of a kernel.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

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
from jaxkd.losses._softmax import expectation, log_add_exp, log_sum_exp

CHUNK_LOGITS = 3 * 2**23
"""Default number of logits in a chunk: 100 MB in float32, which keeps a large accelerator busy."""


def fused_linear_kl_divergence(
    student_states: ArrayLike,
    student_kernel: ArrayLike,
    teacher_states: ArrayLike,
    teacher_kernel: ArrayLike,
    *,
    temperature: ArrayLike = 2.0,
    where: ArrayLike | None = None,
    chunk_size: int | None = None,
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
        student_kernel: `[Ds, V]`, the unembedding, in the dtype of its states.
        teacher_states: `[..., Dt]`, with the same leading axes.
        teacher_kernel: `[Dt, V]`, in the dtype of its states.
        temperature: T > 0, a scalar.
        where: Booleans `[...]`, True for a token that counts.
        chunk_size: Tokens in a chunk; by default as many as have 25 million logits.

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
    return _fused_divergence(_Divergence.from_beta(0), operands, temperature, where, chunk_size)


def fused_linear_reverse_kl_divergence(
    student_states: ArrayLike,
    student_kernel: ArrayLike,
    teacher_states: ArrayLike,
    teacher_kernel: ArrayLike,
    *,
    temperature: ArrayLike = 2.0,
    where: ArrayLike | None = None,
    chunk_size: int | None = None,
) -> Array:
    """Computes `reverse_kl_divergence` of the logits `states @ kernel`, in chunks of tokens.

    T² KL(softmax(h_s W_s / T) ‖ softmax(h_t W_t / T))

    Args:
        student_states: `[..., Ds]`, the hidden states before the unembedding, floating-point.
        student_kernel: `[Ds, V]`, the unembedding, in the dtype of its states.
        teacher_states: `[..., Dt]`, with the same leading axes.
        teacher_kernel: `[Dt, V]`, in the dtype of its states.
        temperature: T > 0, a scalar.
        where: Booleans `[...]`, True for a token that counts.
        chunk_size: Tokens in a chunk; by default as many as have 25 million logits.

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
    return _fused_divergence(_Divergence.from_beta(1), operands, temperature, where, chunk_size)


def fused_linear_jensen_shannon_divergence(
    student_states: ArrayLike,
    student_kernel: ArrayLike,
    teacher_states: ArrayLike,
    teacher_kernel: ArrayLike,
    *,
    temperature: ArrayLike = 2.0,
    beta: float,
    where: ArrayLike | None = None,
    chunk_size: int | None = None,
) -> Array:
    """Computes `jensen_shannon_divergence` of the logits `states @ kernel`, in chunks of tokens.

    T² (β KL(p ‖ m) + (1 − β) KL(q ‖ m)) with m = β p + (1 − β) q, p = softmax(h_t W_t / T),
    q = softmax(h_s W_s / T)

    β has the same meaning as in that function: 0 gives the forward KL and 1 the reverse KL.

    Args:
        student_states: `[..., Ds]`, the hidden states before the unembedding, floating-point.
        student_kernel: `[Ds, V]`, the unembedding, in the dtype of its states.
        teacher_states: `[..., Dt]`, with the same leading axes.
        teacher_kernel: `[Dt, V]`, in the dtype of its states.
        temperature: T > 0, a scalar.
        beta: β in [0, 1], a Python number.
        where: Booleans `[...]`, True for a token that counts.
        chunk_size: Tokens in a chunk; by default as many as have 25 million logits.

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
    if isinstance(beta, jax.core.Tracer):
        raise TypeError(
            "beta selects the program that is compiled, so it must be a Python number, not a "
            "traced one"
        )
    check_fraction("beta", beta)
    operands = student_states, student_kernel, teacher_states, teacher_kernel
    divergence = _Divergence.from_beta(float(beta))
    return _fused_divergence(divergence, operands, temperature, where, chunk_size)


class _Divergence(NamedTuple):
    """β KL(p ‖ m) + (1 − β) KL(q ‖ m) of log-probabilities `[N, V]`, or the KL at β = 0 or 1.

    A tuple of floats, since `jax.custom_vjp` needs a hashable static argument.
    """

    teacher_share: float
    student_share: float

    @classmethod
    def from_beta(cls, beta: float) -> _Divergence:
        return cls(beta, 1 - beta)

    def __call__(self, student: Array, teacher: Array) -> Array:
        if self.teacher_share == 0:
            return expectation(jnp.exp(teacher), teacher - student)
        if self.student_share == 0:
            return expectation(jnp.exp(student), student - teacher)
        mixture = self._mixture(student, teacher)
        forward, reverse = (
            expectation(jnp.exp(logs), logs - mixture) for logs in (teacher, student)
        )
        return self.teacher_share * forward + self.student_share * reverse

    def for_side(self, side: int) -> _Divergence:
        """Returns the divergence with its arguments swapped for side 1, the teacher.

        The gradient with respect to the teacher is then computed like that for the student.
        """
        return _Divergence(self.student_share, self.teacher_share) if side else self

    def derivative(self, student: Array, teacher: Array) -> Array:
        """Computes the derivative `[N, V]` by the student's probabilities.

        It is defined up to a constant per token, and not for the forward KL.
        """
        if self.student_share == 0:
            return student - teacher
        return self.student_share * (student - self._mixture(student, teacher))

    def mean_derivative(self, student: Array, teacher: Array) -> Array:
        """Computes the mean `[N]` of the derivative under the student's distribution.

        The gradient of the softmax subtracts it. The forward KL does not need it.
        """
        if self.teacher_share == 0:
            return jnp.zeros_like(student[:, 0])
        return expectation(jnp.exp(student), self.derivative(student, teacher))

    def logit_gradient(self, student: Array, teacher: Array, mean_derivative: Array) -> Array:
        """Computes the gradient `[N, V]` with respect to the student's logits."""
        if self.teacher_share == 0:
            return jnp.exp(student) - jnp.exp(teacher)
        return jnp.exp(student) * (self.derivative(student, teacher) - mean_derivative[:, None])

    def _mixture(self, student: Array, teacher: Array) -> Array:
        log_shares = jnp.log(jnp.array([self.teacher_share, self.student_share], student.dtype))
        return log_add_exp(teacher + log_shares[0], student + log_shares[1])


def _fused_divergence(
    divergence: _Divergence,
    operands: tuple[ArrayLike, ...],
    temperature: ArrayLike,
    where: ArrayLike | None,
    chunk_size: int | None,
) -> Array:
    temperature = check_positive("temperature", temperature)
    names = "student_states", "student_kernel", "teacher_states", "teacher_kernel"
    student, student_kernel, teacher, teacher_kernel = (
        as_floating(name, operand) for name, operand in zip(names, operands, strict=True)
    )
    _check_product("student", student, student_kernel)
    _check_product("teacher", teacher, teacher_kernel)
    tokens = student.shape[:-1]
    check_shape(
        tokens == teacher.shape[:-1],
        f"student_states {student.shape} and teacher_states {teacher.shape} must have the same "
        "leading axes",
    )
    check_shape(
        student_kernel.shape[1] == teacher_kernel.shape[1],
        f"the vocabularies of student_kernel {student_kernel.shape} and teacher_kernel "
        f"{teacher_kernel.shape} differ: slice off the padding of the larger one",
    )
    where = check_mask("token", where, tokens)
    vocabulary = student_kernel.shape[1]
    num_tokens = where.size
    chunk_size = max(1, CHUNK_LOGITS // vocabulary) if chunk_size is None else chunk_size
    check_shape(chunk_size >= 1, f"chunk_size must be at least 1, got {chunk_size}")

    student, teacher = (
        zero_masked(where, states).reshape(num_tokens, states.shape[-1])
        for states in (student, teacher)
    )
    # Not in the states' dtype: bfloat16 would round T, and T² with it.
    temperature = jnp.asarray(temperature, _accumulation_dtype(student, teacher))
    operands = _match_varying_axes(student, student_kernel, teacher, teacher_kernel, temperature)
    values = _compiled_divergence(divergence, min(chunk_size, max(num_tokens, 1)), *operands)
    return zero_masked(where, values.reshape(tokens) * jnp.square(temperature))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked_divergence(divergence: _Divergence, chunk_size: int, *operands: Array) -> Array:
    """Computes one value per token `[N]`, a chunk of tokens at a time."""
    return _evaluate_chunks(divergence, chunk_size, operands)[0]


def _evaluate_chunks(
    divergence: _Divergence,
    chunk_size: int,
    operands: tuple[Array, ...],
    gradient_sides: tuple[int, ...] = (),
) -> tuple[Array, list[Array], list[Array]]:
    """Computes the values, and what the gradient needs to process the vocabulary in parts.

    That is, for student and teacher, the logarithm of the softmax's denominator and, for the sides
    that get a gradient, the mean derivative; for the other sides it is empty. All are `[N]`.
    """
    student, student_kernel, teacher, teacher_kernel, temperature = operands
    kernels = student_kernel, teacher_kernel

    def evaluate(states: tuple[Array, Array]) -> tuple[Array, list[Array], list[Array]]:
        logits = [_logits(states[side], kernels[side], temperature) for side in (0, 1)]
        log_denominators = [log_sum_exp(side_logits) for side_logits in logits]
        logs = [logits[side] - log_denominators[side][:, None] for side in (0, 1)]
        mean_derivatives = [
            divergence.for_side(side).mean_derivative(logs[side], logs[1 - side])
            if side in gradient_sides
            else log_denominators[side][:0]
            for side in (0, 1)
        ]
        return divergence(*logs), log_denominators, mean_derivatives

    chunks = _split_chunks(student, chunk_size), _split_chunks(teacher, chunk_size)
    results = jax.lax.map(evaluate, chunks)
    return jax.tree.map(lambda result: _merge_chunks(result, len(student)), results)


def _chunked_divergence_fwd(
    divergence: _Divergence, chunk_size: int, *operands: Any
) -> tuple[Array, Any]:
    arrays = tuple(operand.value for operand in operands)
    perturbed = tuple(operand.perturbed for operand in operands)
    # The temperature's gradient is computed from those of both sides' states.
    gradient_sides = tuple(
        side for side in (0, 1) if perturbed[2 * side] or perturbed[2 * side + 1] or perturbed[4]
    )
    values, log_denominators, mean_derivatives = _evaluate_chunks(
        divergence, chunk_size, arrays, gradient_sides
    )
    # The sizes of arrays say which gradients are wanted. JAX 0.7 traces this function twice under
    # `jit` and requires the same tree structure, so booleans or `None` in its place would fail.
    temperature_flag = jnp.zeros(int(perturbed[4]))
    return values, (arrays, log_denominators, mean_derivatives, temperature_flag)


def _chunked_divergence_bwd(
    divergence: _Divergence, chunk_size: int, residuals: Any, cotangent: Any
) -> tuple[Array, ...]:
    """Computes the gradients, a part of the vocabulary at a time.

    Each part of a kernel's gradient is then a single product over all tokens.
    """
    (*operands, temperature), log_denominators, mean_derivatives, temperature_flag = residuals
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return tuple(map(jnp.zeros_like, residuals[0]))
    states = operands[::2]
    kernels = operands[1::2]
    num_tokens = len(cotangent)
    vocabulary = kernels[0].shape[1]
    # The same number of logits at a time as in the forward pass.
    part = max(1, min(vocabulary, chunk_size * vocabulary // max(num_tokens, 1)))

    def add_part(
        i: Array, gradients: dict[int, tuple[Array, Array]]
    ) -> dict[int, tuple[Array, Array]]:
        # Where the vocabulary is not a multiple of the part, the last part starts early. The
        # columns that it repeats are written again to the kernel's gradient, and are masked in the
        # states' gradient, which is a sum.
        start = jnp.minimum(i * part, vocabulary - part)
        is_new = (start + jnp.arange(part) >= i * part)[None]
        columns = [jax.lax.dynamic_slice_in_dim(kernel, start, part, 1) for kernel in kernels]
        logs = [
            _logits(states[side], columns[side], temperature) - log_denominators[side][:, None]
            for side in (0, 1)
        ]

        def add_side(
            side: int, states_gradient: Array, kernel_gradient: Array
        ) -> tuple[Array, Array]:
            logit_gradient = divergence.for_side(side).logit_gradient(
                logs[side], logs[1 - side], mean_derivatives[side]
            )
            logit_gradient = cotangent[:, None] * logit_gradient / temperature
            # In the states' dtype, so that the products of a bfloat16 model run in bfloat16.
            logit_gradient = logit_gradient.astype(states[side].dtype)
            columns_gradient = _product(states[side], logit_gradient, 0, 0)
            columns_gradient = columns_gradient.astype(kernel_gradient.dtype)
            new_gradient = jnp.where(is_new, logit_gradient, 0)
            return (
                states_gradient + _product(new_gradient, columns[side], 1, 1),
                jax.lax.dynamic_update_slice_in_dim(kernel_gradient, columns_gradient, start, 1),
            )

        return {side: add_side(side, *pair) for side, pair in gradients.items()}

    # The states' gradient is a sum over parts, which bfloat16 would round at each of them. The
    # kernel's is written part by part, so its own dtype is enough.
    gradients = {
        side: (
            jnp.zeros_like(states[side], dtype=_accumulation_dtype(states[side])),
            jnp.zeros_like(kernels[side]),
        )
        for side in (0, 1)
        # Empty for a side that gets no gradient, see `_evaluate_chunks`.
        if len(mean_derivatives[side])
    }
    gradients = jax.lax.fori_loop(0, -(-vocabulary // part), add_part, gradients)
    operand_gradients = [*gradients.get(0, (None, None)), *gradients.get(1, (None, None))]
    temperature_gradient = None
    if len(temperature_flag) and gradients:
        # The logits are h · W / T. By Euler's theorem for homogeneous functions, T ∂/∂T is minus
        # the sum of h · ∂/∂h over both sides.
        products = (
            jnp.sum(states[side] * gradients[side][0].astype(states[side].dtype)) for side in (0, 1)
        )
        total = sum(product.astype(temperature.dtype) for product in products)
        temperature_gradient = -total / temperature
    # Zeros instead of `None`, which JAX 0.7 rejects under `jit`.
    return tuple(
        jnp.zeros_like(operand) if gradient is None else gradient.astype(operand.dtype)
        for gradient, operand in zip(
            (*operand_gradients, temperature_gradient), (*operands, temperature), strict=True
        )
    )


# Symbolic zeros reveal which operands are differentiated: a fixed teacher costs no gradient.
_chunked_divergence.defvjp(_chunked_divergence_fwd, _chunked_divergence_bwd, symbolic_zeros=True)
# Without `jit`, each call of a user who does not compile would compile its loops again.
_compiled_divergence = jax.jit(_chunked_divergence, static_argnums=(0, 1))


def _logits(states: Array, kernel: Array, temperature: Array) -> Array:
    return _product(states, kernel, 1, 0).astype(temperature.dtype) / temperature


def _product(lhs: Array, rhs: Array, lhs_axis: int, rhs_axis: int) -> Array:
    """Computes the matrix product that contracts one axis of each, in float32 or wider."""
    dimension_numbers = ((lhs_axis,), (rhs_axis,)), ((), ())
    return jax.lax.dot_general(
        lhs, rhs, dimension_numbers, preferred_element_type=_accumulation_dtype(lhs)
    )


def _accumulation_dtype(*arrays: Array) -> Any:
    return jnp.float64 if any(array.dtype == jnp.float64 for array in arrays) else jnp.float32


def _match_varying_axes(*arrays: Array) -> tuple[Array, ...]:
    """Makes all arrays vary over the same mesh axes of a `shard_map`.

    A kernel that all devices share then varies as the tokens do inside `_chunked_divergence`, and
    the transpose of this conversion sums its gradient over the devices.
    """
    # Adding a zero that depends on every array works on all JAX versions, unlike `lax.pcast` and
    # `lax.pvary`. It has no gradient and is removed by the compiler.
    zeros = [jax.lax.stop_gradient(array).reshape(-1)[:0].sum() for array in arrays]
    return tuple(array + sum(zero.astype(array.dtype) for zero in zeros) for array in arrays)


def _split_chunks(array: Array, chunk_size: int) -> Array:
    """Splits `[N, ...]` into `[chunks, chunk_size, ...]`, padded with zeros.

    A chunk takes tokens at a constant stride, not consecutive ones: if the tokens are sharded over
    devices, every chunk then has tokens of all devices.
    """
    chunks = -(-len(array) // chunk_size)
    padding = chunks * chunk_size - len(array)
    padded = jnp.pad(array, ((0, padding), *((0, 0),) * (array.ndim - 1)))
    return jnp.moveaxis(padded.reshape(chunk_size, chunks, *array.shape[1:]), 1, 0)


def _merge_chunks(array: Array, length: int) -> Array:
    return jnp.moveaxis(array, 0, 1).reshape(-1, *array.shape[2:])[:length]


def _check_product(side: str, states: Array, kernel: Array) -> None:
    check_shape(
        states.ndim >= 1 and kernel.ndim == 2 and states.shape[-1] == kernel.shape[0],
        f"{side}_kernel must be [D, V] for {side}_states [..., D], got {kernel.shape} for "
        f"{states.shape}; transpose an embedding table [V, D] first",
    )
    if states.dtype != kernel.dtype:
        raise TypeError(
            f"{side}_states are {states.dtype} and {side}_kernel is {kernel.dtype}: cast one, so "
            "that the dtype of the product is explicit"
        )
