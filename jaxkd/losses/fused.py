"""Distillation of language models without the logits of all tokens: the last layer and the loss in one walk.

At 8,192 tokens and a vocabulary of 128,256, one float32 array of logits is 4 GB, and a loss with its gradient holds
several. Here the tokens pass in chunks: logits of one chunk are made, used and dropped, in the gradient made once more.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxkd.losses._arrays import check_positive, check_shape, check_share, only
from jaxkd.losses._softmax import expectation, log_softmax, log_sum_exp

CHUNK_LOGITS = 2**26
"""Logits of a chunk where none is given: 256 MB in float32, enough to keep a large accelerator busy."""


def fused_linear_kl_divergence(
    student_states: ArrayLike,
    student_kernel: ArrayLike,
    teacher_states: ArrayLike,
    teacher_kernel: ArrayLike,
    *,
    temperature: ArrayLike,
    where: ArrayLike | None = None,
    chunk_size: int | None = None,
) -> Array:
    """`kl_divergence` of `student_states @ student_kernel` and `teacher_states @ teacher_kernel`, in chunks of tokens.

    T² KL(softmax(h_t W_t / T) ‖ softmax(h_s W_s / T))

    Value and gradients, to states and kernels of the student and of the teacher, are those of the two matrix products
    followed by the loss; the gradient costs the products once more. Products take the states' dtype and accumulate in
    float32, the rest is float32. The gradient is a rule of its own: there is no forward mode and no second derivative.

    Args:
        student_states: `[..., Ds]`, the hidden states before the unembedding, floating-point.
        student_kernel: `[Ds, V]`, the unembedding; of its states' dtype.
        teacher_states: `[..., Dt]`, with the same leading axes.
        teacher_kernel: `[Dt, V]`, likewise.
        temperature: T > 0, a scalar.
        where: Booleans `[...]`, True for a token that counts.
        chunk_size: Tokens at a time; by default as many as have 2²⁶ logits.

    Returns:
        One value per token `[...]`, float32, and 0 for one that does not count, whatever its states hold.

    Raises:
        ValueError: If shapes disagree, or the temperature or the chunk is not positive.
        TypeError: If an array is not floating-point, or states and kernel differ in dtype.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd import losses
        >>> states, kernel = jnp.ones((2, 5, 4)), jax.random.normal(jax.random.key(0), (4, 9))
        >>> losses.fused_linear_kl_divergence(states, kernel, states, 2 * kernel, temperature=2.0).shape
        (2, 5)

    References:
        Hsu et al., Liger Kernel: Efficient Triton Kernels for LLM Training, https://arxiv.org/abs/2410.10989
    """
    operands = student_states, student_kernel, teacher_states, teacher_kernel
    return _fused(_Divergence(0.0), operands, temperature, where, chunk_size)


def fused_linear_reverse_kl_divergence(
    student_states: ArrayLike,
    student_kernel: ArrayLike,
    teacher_states: ArrayLike,
    teacher_kernel: ArrayLike,
    *,
    temperature: ArrayLike,
    where: ArrayLike | None = None,
    chunk_size: int | None = None,
) -> Array:
    """`reverse_kl_divergence` of the logits of a linear last layer, in chunks of tokens.

    T² KL(softmax(h_s W_s / T) ‖ softmax(h_t W_t / T))

    Args:
        student_states: `[..., Ds]`, the hidden states before the unembedding, floating-point.
        student_kernel: `[Ds, V]`, the unembedding; of its states' dtype.
        teacher_states: `[..., Dt]`, with the same leading axes.
        teacher_kernel: `[Dt, V]`, likewise.
        temperature: T > 0, a scalar.
        where: Booleans `[...]`, True for a token that counts.
        chunk_size: Tokens at a time; by default as many as have 2²⁶ logits.

    Returns:
        One value per token `[...]`, float32, as `fused_linear_kl_divergence` does.

    Raises:
        ValueError: If shapes disagree, or the temperature or the chunk is not positive.
        TypeError: If an array is not floating-point, or states and kernel differ in dtype.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd import losses
        >>> states, kernel = jnp.ones((2, 5, 4)), jax.random.normal(jax.random.key(0), (4, 9))
        >>> losses.fused_linear_reverse_kl_divergence(states, kernel, states, 2 * kernel, temperature=2.0).shape
        (2, 5)

    References:
        Gu et al., MiniLLM: Knowledge Distillation of Large Language Models, https://arxiv.org/abs/2306.08543
    """
    operands = student_states, student_kernel, teacher_states, teacher_kernel
    return _fused(_Divergence(1.0), operands, temperature, where, chunk_size)


def fused_linear_jensen_shannon_divergence(
    student_states: ArrayLike,
    student_kernel: ArrayLike,
    teacher_states: ArrayLike,
    teacher_kernel: ArrayLike,
    *,
    temperature: ArrayLike,
    beta: float,
    where: ArrayLike | None = None,
    chunk_size: int | None = None,
) -> Array:
    """`jensen_shannon_divergence` of the logits of a linear last layer, in chunks of tokens.

    T² (β KL(p ‖ m) + (1 − β) KL(q ‖ m)) with m = β p + (1 − β) q, p = softmax(h_t W_t / T), q = softmax(h_s W_s / T)

    β has the direction that it has there: 0 stands for the forward KL, 1 for the reverse.

    Args:
        student_states: `[..., Ds]`, the hidden states before the unembedding, floating-point.
        student_kernel: `[Ds, V]`, the unembedding; of its states' dtype.
        teacher_states: `[..., Dt]`, with the same leading axes.
        teacher_kernel: `[Dt, V]`, likewise.
        temperature: T > 0, a scalar.
        beta: β in [0, 1], a Python number.
        where: Booleans `[...]`, True for a token that counts.
        chunk_size: Tokens at a time; by default as many as have 2²⁶ logits.

    Returns:
        One value per token `[...]`, float32, as `fused_linear_kl_divergence` does.

    Raises:
        ValueError: If shapes disagree, the temperature or the chunk is not positive, or `beta` leaves [0, 1].
        TypeError: If an array is not floating-point, states and kernel differ in dtype, or `beta` is traced.

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
        raise TypeError("beta decides which program is built: hand in a Python number, not a traced one")
    check_share("beta", beta)
    operands = student_states, student_kernel, teacher_states, teacher_kernel
    return _fused(_Divergence(float(beta)), operands, temperature, where, chunk_size)


class _Divergence(NamedTuple):
    """The generalised Jensen–Shannon divergence of log-probabilities `[N, V]`, whose ends are the two KL."""

    beta: float

    def __call__(self, student: Array, teacher: Array) -> Array:
        if self.beta == 0:
            return expectation(teacher, teacher - student)
        if self.beta == 1:
            return expectation(student, student - teacher)
        mixture = self._mixture(student, teacher)
        forward, reverse = expectation(teacher, teacher - mixture), expectation(student, student - mixture)
        return self.beta * forward + (1 - self.beta) * reverse

    def pull(self, student: Array, teacher: Array) -> Array:
        """Its gradient `[N, V]` to the student's logits."""
        if self.beta == 0:
            return jnp.exp(student) - jnp.exp(teacher)
        reference = teacher if self.beta == 1 else self._mixture(student, teacher)
        slope = student - reference
        pulled = jnp.exp(student) * (slope - expectation(student, slope)[:, None])
        return pulled if self.beta == 1 else (1 - self.beta) * pulled

    @property
    def mirrored(self) -> "_Divergence":
        """The same with student and teacher exchanged."""
        return _Divergence(1 - self.beta)

    def _mixture(self, student: Array, teacher: Array) -> Array:
        shares = jnp.log(jnp.array([self.beta, 1 - self.beta], student.dtype))
        return log_sum_exp(jnp.stack([teacher + shares[0], student + shares[1]]), 0)


def _fused(
    divergence: _Divergence,
    operands: tuple[ArrayLike, ...],
    temperature: ArrayLike,
    where: ArrayLike | None,
    chunk_size: int | None,
) -> Array:
    check_positive("temperature", temperature)
    names = "student_states", "student_kernel", "teacher_states", "teacher_kernel"
    student, student_kernel, teacher, teacher_kernel = (_floating(*one) for one in zip(names, operands, strict=True))
    _check_product("student", student, student_kernel)
    _check_product("teacher", teacher, teacher_kernel)
    tokens = student.shape[:-1]
    check_shape(
        tokens == teacher.shape[:-1],
        f"student_states {student.shape} and teacher_states {teacher.shape} must have the same leading axes",
    )
    check_shape(
        student_kernel.shape[1] == teacher_kernel.shape[1],
        f"the vocabularies of student_kernel {student_kernel.shape} and teacher_kernel {teacher_kernel.shape} differ: "
        "slice the larger one's padding off",
    )
    count = jnp.ones(tokens, bool) if where is None else jnp.asarray(where)
    check_shape(count.shape == tokens and count.dtype == bool, f"where must be booleans {tokens}, got {count.shape}")
    vocabulary, total = student_kernel.shape[1], count.size
    chunk_size = max(1, CHUNK_LOGITS // vocabulary) if chunk_size is None else chunk_size
    check_shape(chunk_size >= 1, f"chunk_size must be at least 1, got {chunk_size}")

    # The temperature divides the states, which are the smaller factor, and so stays outside the rule of the gradient.
    student, teacher = (
        only(count, states).reshape(total, states.shape[-1]) / jnp.asarray(temperature, states.dtype)
        for states in (student, teacher)
    )
    values = _walk(divergence, min(chunk_size, max(total, 1)), student, student_kernel, teacher, teacher_kernel)
    return only(count, values.reshape(tokens) * jnp.square(jnp.asarray(temperature, values.dtype)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _walk(divergence: _Divergence, chunk: int, *operands: Array) -> Array:
    """One value per token `[N]`, a chunk of tokens at a time."""
    student, student_kernel, teacher, teacher_kernel = operands

    def values(states: tuple[Array, Array]) -> Array:
        return divergence(_log_probabilities(states[0], student_kernel), _log_probabilities(states[1], teacher_kernel))

    return _join(jax.lax.map(values, (_split(student, chunk), _split(teacher, chunk))), len(student))


def _walk_forward(divergence: _Divergence, chunk: int, *operands: Any) -> tuple[Array, Any]:
    arrays = tuple(operand.value for operand in operands)
    learns = tuple(operand.perturbed for operand in operands)
    return _walk(divergence, chunk, *arrays), (arrays, learns)


def _walk_backward(divergence: _Divergence, chunk: int, residuals: Any, cotangent: Any) -> tuple[Array | None, ...]:
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return (None,) * 4
    (student, student_kernel, teacher, teacher_kernel), learns = residuals
    student_learns, teacher_learns = any(learns[:2]), any(learns[2:])

    def step(sums: tuple[Array, ...], part: tuple[Array, ...]) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        student, teacher, weights = part
        student_log = _log_probabilities(student, student_kernel)
        teacher_log = _log_probabilities(teacher, teacher_kernel)
        sides = []
        if student_learns:
            sides.append((divergence.pull(student_log, teacher_log), student, student_kernel))
        if teacher_learns:
            sides.append((divergence.mirrored.pull(teacher_log, student_log), teacher, teacher_kernel))
        # In the states' dtype, so that a bf16 product stays one.
        pulls = [((weights[:, None] * pull).astype(states.dtype), states, kernel) for pull, states, kernel in sides]
        sums = tuple(
            total + _product(states, pull, ((0,), (0,))) for total, (pull, states, _) in zip(sums, pulls, strict=True)
        )
        return sums, tuple(_product(pull, kernel, ((1,), (1,))).astype(states.dtype) for pull, states, kernel in pulls)

    learning = [kernel for kernel, one in ((student_kernel, student_learns), (teacher_kernel, teacher_learns)) if one]
    sums = tuple(jnp.zeros(kernel.shape, _accumulator(kernel.dtype)) for kernel in learning)
    parts = _split(student, chunk), _split(teacher, chunk), _split(cotangent, chunk)
    sums, states = jax.lax.scan(step, sums, parts)
    found = [
        gradient
        for total, part, kernel in zip(sums, states, learning, strict=True)
        for gradient in (_join(part, len(student)), total.astype(kernel.dtype))
    ]
    nothing = [None, None]
    return (*(found[:2] if student_learns else nothing), *(found[-2:] if teacher_learns else nothing))


_walk.defvjp(_walk_forward, _walk_backward, symbolic_zeros=True)


def _log_probabilities(states: Array, kernel: Array) -> Array:
    return log_softmax(_product(states, kernel, ((1,), (0,))))


def _product(lhs: Array, rhs: Array, contract: tuple[tuple[int, ...], tuple[int, ...]]) -> Array:
    return jax.lax.dot_general(lhs, rhs, (contract, ((), ())), preferred_element_type=_accumulator(lhs.dtype))


def _accumulator(dtype: Any) -> Any:
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def _split(array: Array, chunk: int) -> Array:
    """`[N, ...]` as `[chunks, chunk, ...]`, filled up with zeros.

    A chunk takes every so many-th token rather than a run of them: tokens sharded over devices are then spread over
    all devices in every chunk.
    """
    chunks = -(-len(array) // chunk)
    padded = jnp.pad(array, ((0, chunks * chunk - len(array)), *((0, 0),) * (array.ndim - 1)))
    return jnp.moveaxis(padded.reshape(chunk, chunks, *array.shape[1:]), 1, 0)


def _join(array: Array, length: int) -> Array:
    return jnp.moveaxis(array, 0, 1).reshape(-1, *array.shape[2:])[:length]


def _floating(name: str, array: ArrayLike) -> Array:
    array = jnp.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating-point, got {array.dtype}")
    return array


def _check_product(side: str, states: Array, kernel: Array) -> None:
    check_shape(
        states.ndim >= 1 and kernel.ndim == 2 and states.shape[-1] == kernel.shape[0],
        f"{side}_kernel must be [D, V] for {side}_states [..., D], got {kernel.shape} for {states.shape}; "
        "an embedding table [V, D] is transposed first",
    )
    if states.dtype != kernel.dtype:
        raise TypeError(
            f"{side}_states are {states.dtype} and {side}_kernel is {kernel.dtype}: cast one, so that it is plain in "
            "which the product is taken"
        )
