"""Distillation of language models without the logits of all tokens: the last layer and the loss in one walk.

At 8,192 tokens and a vocabulary of 128,256, one float32 array of logits is 4 GB, and a loss with its gradient holds
several. Here the tokens pass in chunks, whose logits are made, used and dropped. The gradient makes them once more, for
all tokens and a part of the vocabulary at a time, so that no sum over chunks of a kernel's size is held or rounded.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxkd.losses._arrays import check_positive, check_shape, check_share, floating, full_mask, only
from jaxkd.losses._softmax import expectation, log_add_exp, log_sum_exp

CHUNK_LOGITS = 3 * 2**23
"""Logits of a chunk where none is given: 100 MB in float32, enough to keep a large accelerator busy."""


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
    Call it under `jit`, since by itself every call compiles; on a mesh of explicit axes use `shard_map`.

    Args:
        student_states: `[..., Ds]`, the hidden states before the unembedding, floating-point.
        student_kernel: `[Ds, V]`, the unembedding; of its states' dtype.
        teacher_states: `[..., Dt]`, with the same leading axes.
        teacher_kernel: `[Dt, V]`, likewise.
        temperature: T > 0, a scalar.
        where: Booleans `[...]`, True for a token that counts.
        chunk_size: Tokens at a time; by default as many as have 25 million logits.

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
    return _fused(_Divergence.of(0), operands, temperature, where, chunk_size)


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
        chunk_size: Tokens at a time; by default as many as have 25 million logits.

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
    return _fused(_Divergence.of(1), operands, temperature, where, chunk_size)


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
        chunk_size: Tokens at a time; by default as many as have 25 million logits.

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
    return _fused(_Divergence.of(float(beta)), operands, temperature, where, chunk_size)


class _Divergence(NamedTuple):
    """β KL(p ‖ m) + (1 − β) KL(q ‖ m) of log-probabilities `[N, V]`, at whose ends stand the two KL."""

    teacher_share: float
    student_share: float

    @classmethod
    def of(cls, beta: float) -> "_Divergence":
        return cls(beta, 1 - beta)

    def __call__(self, student: Array, teacher: Array) -> Array:
        if self.teacher_share == 0:
            return expectation(jnp.exp(teacher), teacher - student)
        if self.student_share == 0:
            return expectation(jnp.exp(student), student - teacher)
        mixture = self._mixture(student, teacher)
        forward, reverse = (expectation(jnp.exp(side), side - mixture) for side in (teacher, student))
        return self.teacher_share * forward + self.student_share * reverse

    def seen_from(self, side: int) -> "_Divergence":
        """The same, the first argument being the student (0) or the teacher (1)."""
        return _Divergence(self.student_share, self.teacher_share) if side else self

    def slope(self, student: Array, teacher: Array) -> Array:
        """Its derivative `[N, V]` by the student's probabilities, up to a constant a token; not for forward KL."""
        if self.student_share == 0:
            return student - teacher
        return self.student_share * (student - self._mixture(student, teacher))

    def level(self, student: Array, teacher: Array) -> Array:
        """The mean `[N]` of the slope under the student, which a softmax takes off it; forward KL needs none."""
        if self.teacher_share == 0:
            return jnp.zeros_like(student[:, 0])
        return expectation(jnp.exp(student), self.slope(student, teacher))

    def pull(self, student: Array, teacher: Array, level: Array) -> Array:
        """Its gradient `[N, V]` to the student's logits."""
        if self.teacher_share == 0:
            return jnp.exp(student) - jnp.exp(teacher)
        return jnp.exp(student) * (self.slope(student, teacher) - level[:, None])

    def _mixture(self, student: Array, teacher: Array) -> Array:
        shares = jnp.log(jnp.array([self.teacher_share, self.student_share], student.dtype))
        return log_add_exp(teacher + shares[0], student + shares[1])


def _fused(
    divergence: _Divergence,
    operands: tuple[ArrayLike, ...],
    temperature: ArrayLike,
    where: ArrayLike | None,
    chunk_size: int | None,
) -> Array:
    check_positive("temperature", temperature)
    names = "student_states", "student_kernel", "teacher_states", "teacher_kernel"
    student, student_kernel, teacher, teacher_kernel = (floating(*one) for one in zip(names, operands, strict=True))
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
    where = full_mask("token", where, tokens)
    vocabulary, total = student_kernel.shape[1], where.size
    chunk_size = max(1, CHUNK_LOGITS // vocabulary) if chunk_size is None else chunk_size
    check_shape(chunk_size >= 1, f"chunk_size must be at least 1, got {chunk_size}")

    student, teacher = (only(where, states).reshape(total, states.shape[-1]) for states in (student, teacher))
    temperature = jnp.asarray(temperature, _widest(student, teacher))
    operands = _alike(student, student_kernel, teacher, teacher_kernel, temperature)
    values = _walk(divergence, min(chunk_size, max(total, 1)), *operands)
    return only(where, values.reshape(tokens) * jnp.square(temperature))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _walk(divergence: _Divergence, chunk: int, *operands: Array) -> Array:
    """One value per token `[N]`, a chunk of tokens at a time."""
    return _look(divergence, chunk, operands)[0]


def _look(
    divergence: _Divergence, chunk: int, operands: tuple[Array, ...], sides: tuple[int, ...] = ()
) -> tuple[Array, list[Array], list[Array]]:
    """The values; and for gradients to some sides, what lets these go by parts of the vocabulary, all `[N]`.

    That is the logarithm of each softmax's denominator, and the level of each side that learns, empty for another.
    """
    student, student_kernel, teacher, teacher_kernel, temperature = operands

    def chunk_of(states: tuple[Array, Array]) -> tuple[Array, list[Array], list[Array]]:
        logits = [_logits(*one, temperature) for one in zip(states, (student_kernel, teacher_kernel), strict=True)]
        sums = [log_sum_exp(one) for one in logits]
        logs = [one - total[:, None] for one, total in zip(logits, sums, strict=True)]
        levels = [
            divergence.seen_from(side).level(logs[side], logs[1 - side]) if side in sides else sums[side][:0]
            for side in (0, 1)
        ]
        return divergence(*logs), sums, levels

    found = jax.lax.map(chunk_of, (_split(student, chunk), _split(teacher, chunk)))
    return jax.tree.map(lambda part: _join(part, len(student)), found)


def _walk_forward(divergence: _Divergence, chunk: int, *operands: Any) -> tuple[Array, Any]:
    arrays, learns = zip(*((operand.value, operand.perturbed) for operand in operands), strict=True)
    # The temperature's gradient comes by way of both sides' states.
    sides = tuple(side for side in (0, 1) if learns[2 * side] or learns[2 * side + 1] or learns[4])
    values, sums, levels = _look(divergence, chunk, arrays, sides)
    # Who learns is told by sizes: JAX 0.7 traces this twice under jit, and wants one structure of both.
    return values, (arrays, sums, levels, jnp.zeros(int(learns[4])))


def _walk_backward(divergence: _Divergence, chunk: int, residuals: Any, cotangent: Any) -> tuple[Array, ...]:
    """The gradients, a part of the vocabulary at a time: each part of a kernel's gradient is then one product."""
    (*operands, temperature), sums, levels, temperature_learns = residuals
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return tuple(map(jnp.zeros_like, residuals[0]))
    states, kernels = operands[::2], operands[1::2]
    tokens, vocabulary = len(cotangent), kernels[0].shape[1]
    part = max(1, min(vocabulary, chunk * vocabulary // max(tokens, 1)))

    def step(i: Array, gradients: dict[int, tuple[Array, Array]]) -> dict[int, tuple[Array, Array]]:
        # The last part begins early where the vocabulary is no multiple: what it repeats counts once for the states.
        start = jnp.minimum(i * part, vocabulary - part)
        fresh = (start + jnp.arange(part) >= i * part)[None]
        columns = [jax.lax.dynamic_slice_in_dim(kernel, start, part, 1) for kernel in kernels]
        logs = [_logits(states[side], columns[side], temperature) - sums[side][:, None] for side in (0, 1)]

        def moved(side: int, to_states: Array, to_kernel: Array) -> tuple[Array, Array]:
            pull = divergence.seen_from(side).pull(logs[side], logs[1 - side], levels[side])
            # In the states' dtype, so that a bf16 product stays one.
            pull = (cotangent[:, None] * pull / temperature).astype(states[side].dtype)
            to_columns = _product(states[side], pull, 0, 0).astype(to_kernel.dtype)
            return (
                to_states + _product(jnp.where(fresh, pull, 0), columns[side], 1, 1),
                jax.lax.dynamic_update_slice_in_dim(to_kernel, to_columns, start, 1),
            )

        return {side: moved(side, *pair) for side, pair in gradients.items()}

    gradients = {
        side: (jnp.zeros_like(states[side], dtype=_widest(states[side])), jnp.zeros_like(kernels[side]))
        for side in (0, 1)
        if len(levels[side])
    }
    gradients = jax.lax.fori_loop(0, -(-vocabulary // part), step, gradients)
    found = [one for side in (0, 1) for one in gradients.get(side, (None, None))]
    to_temperature = None
    if len(temperature_learns) and gradients:
        # The logits are products of states and kernels over T: by Euler, T ∂/∂T is minus the sum of h · ∂/∂h.
        drawn = (jnp.sum(states[side] * gradients[side][0].astype(states[side].dtype)) for side in (0, 1))
        to_temperature = -sum(one.astype(temperature.dtype) for one in drawn) / temperature
    # Zeros rather than None, of which JAX 0.7 makes an error under jit.
    return tuple(
        jnp.zeros_like(operand) if one is None else one.astype(operand.dtype)
        for one, operand in zip((*found, to_temperature), (*operands, temperature), strict=True)
    )


_walk.defvjp(_walk_forward, _walk_backward, symbolic_zeros=True)


def _logits(states: Array, kernel: Array, temperature: Array) -> Array:
    return _product(states, kernel, 1, 0).astype(temperature.dtype) / temperature


def _product(lhs: Array, rhs: Array, lhs_axis: int, rhs_axis: int) -> Array:
    """The matrix product that contracts an axis of each, in float32 or wider."""
    contract = ((lhs_axis,), (rhs_axis,)), ((), ())
    return jax.lax.dot_general(lhs, rhs, contract, preferred_element_type=_widest(lhs))


def _widest(*arrays: Array) -> Any:
    return jnp.float64 if any(array.dtype == jnp.float64 for array in arrays) else jnp.float32


def _alike(*arrays: Array) -> tuple[Array, ...]:
    """The arrays, each varying over the devices of a `shard_map` as all of them do.

    A kernel that all devices share then varies like the tokens do, inside, and its gradient is summed over devices.
    What is added is 0, without a gradient, and costs nothing once compiled.
    """
    zeros = [jax.lax.stop_gradient(array).reshape(-1)[:0].sum() for array in arrays]
    return tuple(array + sum(zero.astype(array.dtype) for zero in zeros) for array in arrays)


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
