"""Values and gradients of terms on the logits of last layers, in chunks.

The values process the tokens in chunks, whose logits are computed, used and dropped. The gradient
computes the logits again, for all tokens and a part of the vocabulary at a time, so that it neither
holds nor rounds a sum over chunks of the size of a kernel.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxkd.losses._arrays import check_shape, zero_masked
from jaxkd.losses._fused_terms import Divergence, Term, Vocabulary, within
from jaxkd.losses.heads import LinearHead, accumulation_dtype, linear_logits, product

CHUNK_LOGITS = 3 * 2**23
"""Default number of logits in a chunk: 100 MB in float32, which keeps a large accelerator busy."""


@dataclasses.dataclass(frozen=True)
class Program:
    """What is fixed when the computation is compiled."""

    terms: tuple[Term, ...]
    chunk_size: int
    vocabulary: Vocabulary
    use_pallas: bool


class Operands(NamedTuple):
    """The arrays of one computation.

    Attributes:
        states: `[N, D]` of each model: the student, and the teacher if there is one.
        heads: The last layer of each model.
        targets: What each term takes beside the logits, `[N, k]`, or `None`.
        temperature: T, a scalar.
    """

    states: tuple[Array, ...]
    heads: tuple[LinearHead, ...]
    targets: tuple[Array | None, ...]
    temperature: Array


def evaluate_terms(
    terms: Sequence[Term],
    states: Sequence[Array],
    heads: Sequence[LinearHead],
    targets: Sequence[Array | None],
    *,
    temperature: ArrayLike,
    where: Array,
    chunk_size: int | None,
    axis_name: str | None,
    use_pallas: bool = False,
) -> tuple[Array, ...]:
    """Computes the values of each term, in the shape of the tokens.

    Args:
        terms: What to compute.
        states: `[..., D]` of each model.
        heads: The last layer of each model, from `as_head`.
        targets: `[..., k]` of each term, or `None`.
        temperature: T, from `check_positive`.
        where: Booleans `[...]`. The states of other tokens are replaced by zeros, the values not.
        chunk_size: Tokens in a chunk, or `None`.
        axis_name: The axis of a mesh that shards the vocabulary, or `None`.
        use_pallas: True for the kernel of a single divergence, where the platform has it.

    Returns:
        `[...]` or `[..., k]` of each term, without the factor T².
    """
    num_tokens = where.size
    num_classes = heads[0].num_classes
    chunk_size = max(1, CHUNK_LOGITS // max(num_classes, 1)) if chunk_size is None else chunk_size
    check_shape(chunk_size >= 1, f"chunk_size must be at least 1, got {chunk_size}")
    # Not in the states' dtype: bfloat16 would round T, and T² with it.
    temperature = jnp.asarray(temperature, accumulation_dtype(*states))
    flat_states, flat_targets = jax.tree.map(
        lambda array: zero_masked(where, array).reshape(num_tokens, array.shape[-1]),
        (tuple(states), tuple(targets)),
    )
    operands = Operands(flat_states, tuple(heads), flat_targets, temperature)
    check_axis(axis_name, heads)
    operands = _match_varying_axes(operands)
    chunk_size = min(chunk_size, max(num_tokens, 1))
    program = Program(tuple(terms), chunk_size, Vocabulary(axis_name), use_pallas)
    values = _compiled_terms(program, operands)
    return tuple(value.reshape(*where.shape, *value.shape[1:]) for value in values)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked_terms(program: Program, operands: Operands) -> tuple[Array, ...]:
    """Computes the values of each term for all tokens, a chunk of tokens at a time."""
    return _evaluate(program, operands)[0]


def _evaluate(
    program: Program, operands: Operands, sides: tuple[int, ...] = ()
) -> tuple[tuple[Array, ...], tuple[Any, ...]]:
    """Computes values and statistics of each term; the statistics for the sides with gradients."""
    in_chunks = functools.partial(_evaluate_chunks, program, sides)
    divergence = program.terms[0]
    # The grid of a Pallas kernel has at least one block.
    has_kernel = isinstance(divergence, Divergence) and len(operands.states[0]) > 0
    if not program.use_pallas or not has_kernel:
        return in_chunks(operands)
    # Pallas takes long to import.
    from jaxkd.losses import _fused_kernel

    def in_kernel(operands: Operands, on_tpu: bool) -> Any:
        states, heads, _, temperature = operands
        value, statistics = _fused_kernel.evaluate(
            divergence, states, heads, temperature, sides, on_tpu=on_tpu
        )
        return (value,), (statistics,)

    return jax.lax.platform_dependent(
        operands,
        tpu=functools.partial(in_kernel, on_tpu=True),
        cuda=functools.partial(in_kernel, on_tpu=False),
        default=in_chunks,
    )


def _evaluate_chunks(
    program: Program, sides: tuple[int, ...], operands: Operands
) -> tuple[tuple[Array, ...], tuple[Any, ...]]:
    """Does so a chunk of tokens at a time."""
    temperature = operands.temperature

    def evaluate(chunk: tuple[tuple[Array, ...], tuple[Array | None, ...]]) -> Any:
        states, targets = chunk
        logits = _all_logits(states, operands.heads, temperature.dtype)
        results = [
            term.evaluate(_soften(term, logits, temperature), target, program.vocabulary, sides)
            for term, target in zip(program.terms, targets, strict=True)
        ]
        values, statistics = zip(*results, strict=True)
        return values, statistics

    chunks = jax.tree.map(
        lambda array: _split_chunks(array, program.chunk_size), (operands.states, operands.targets)
    )
    results = jax.lax.map(evaluate, chunks)
    num_tokens = len(operands.states[0])
    return jax.tree.map(lambda result: _merge_chunks(result, num_tokens), results)


def _chunked_terms_fwd(program: Program, operands: Operands) -> tuple[tuple[Array, ...], Any]:
    def is_primal(leaf: Any) -> bool:
        return isinstance(leaf, jax.custom_derivatives.CustomVJPPrimal)

    # The sizes of arrays say which gradients are wanted. JAX 0.7 traces this function twice under
    # `jit` and requires the same tree structure, so booleans or `None` in its place would fail.
    flags = jax.tree.map(lambda leaf: jnp.zeros(int(leaf.perturbed)), operands, is_leaf=is_primal)
    operands = jax.tree.map(lambda leaf: leaf.value, operands, is_leaf=is_primal)
    values, statistics = _evaluate(program, operands, _differentiated_sides(flags))
    return values, (operands, statistics, flags)


def _differentiated_sides(flags: Operands) -> tuple[int, ...]:
    """Returns the models whose logits get a gradient: 0 for the student, 1 for the teacher."""
    # The temperature's gradient is computed from those of both sides' logits.
    return tuple(
        side
        for side, leaves in enumerate(zip(flags.states, flags.heads, strict=True))
        if any(len(flag) for flag in jax.tree.leaves((leaves, flags.temperature)))
    )


class _Gradients(NamedTuple):
    """Sums over the parts of the vocabulary so far. `None` stands for what is not wanted."""

    states: tuple[Array | None, ...]
    heads: tuple[LinearHead, ...]
    temperature: Array | None


def _chunked_terms_bwd(program: Program, residuals: Any, cotangents: Any) -> tuple[Operands]:
    """Computes the gradients, a part of the vocabulary at a time.

    Each part of a kernel's gradient is then a single product over all tokens.
    """
    operands, statistics, flags = residuals
    sides = _differentiated_sides(flags)
    is_zero = [isinstance(c, jax.custom_derivatives.SymbolicZero) for c in cotangents]
    if all(is_zero) or not sides:
        return (_zero_gradients(operands),)
    cotangents = [
        jnp.zeros(c.shape, c.dtype) if zero else c
        for c, zero in zip(cotangents, is_zero, strict=True)
    ]
    heads, temperature = operands.heads, operands.temperature
    num_tokens = len(operands.states[0])
    vocabulary = heads[0].num_classes
    # The same number of logits at a time as in the forward pass.
    part = max(1, min(vocabulary, program.chunk_size * vocabulary // max(num_tokens, 1)))

    def add_part(i: Array, gradients: _Gradients) -> _Gradients:
        # Where the vocabulary is not a multiple of the part, the last part starts early. The
        # classes that it repeats are written again to the kernel's gradient, and are masked in the
        # states' gradient, which is a sum.
        start = jnp.minimum(i * part, vocabulary - part)
        is_new = (start + jnp.arange(part) >= i * part)[None]
        parts = [_take_part(head, start, part) for head in heads]
        logits = _all_logits(operands.states, parts, temperature.dtype)

        def own_classes(indices: Array) -> tuple[Array, Array]:
            own = program.vocabulary.own_indices(indices, vocabulary)
            in_range = (indices >= 0) & (indices < program.vocabulary.size(vocabulary))
            return within(own - start.astype(own.dtype), part), in_range

        totals = {side: jnp.zeros_like(logits[side]) for side in sides}
        temperature_gradient = gradients.temperature
        for term, target, term_statistics, cotangent in zip(
            program.terms, operands.targets, statistics, cotangents, strict=True
        ):
            term_gradients = term.logit_gradients(
                _soften(term, logits, temperature),
                target,
                term_statistics,
                cotangent,
                own_classes,
                sides,
            )
            for side, gradient in term_gradients.items():
                if term.is_softened:
                    gradient = gradient / temperature
                    if temperature_gradient is not None:
                        # An excluded class of the logit −inf has the gradient 0.
                        used = is_new & (gradient != 0)
                        products = gradient * jnp.where(used, logits[side], 0)
                        temperature_gradient -= products.sum() / temperature
                totals[side] += gradient
        states, new_heads = list(gradients.states), list(gradients.heads)
        for side, total in totals.items():
            if (softcap := heads[side].softcap) is not None:
                total = total * (1 - jnp.square(logits[side] / softcap))
            states[side], new_heads[side] = _add_products(
                operands.states[side],
                parts[side],
                total,
                is_new,
                start,
                states[side],
                new_heads[side],
            )
        return _Gradients(tuple(states), tuple(new_heads), temperature_gradient)

    gradients = jax.lax.fori_loop(
        0, -(-vocabulary // part), add_part, _initial_gradients(operands, flags)
    )
    # Zeros instead of `None`, which JAX 0.7 rejects under `jit`.
    zeros = _zero_gradients(operands)
    states, heads_, temperature_gradient = jax.tree.map(
        lambda operand, zero, gradient: (
            zero if gradient is None else gradient.astype(operand.dtype)
        ),
        (operands.states, operands.heads, temperature),
        (zeros.states, zeros.heads, zeros.temperature),
        tuple(gradients),
    )
    return (Operands(states, heads_, zeros.targets, temperature_gradient),)


def _initial_gradients(operands: Operands, flags: Operands) -> _Gradients:
    # The states' gradient is a sum over parts, which bfloat16 would round at each of them. The
    # kernel's is written part by part, so its own dtype is enough.
    states = tuple(
        jnp.zeros_like(states, dtype=accumulation_dtype(states)) if len(flag) else None
        for states, flag in zip(operands.states, flags.states, strict=True)
    )
    heads, temperature = jax.tree.map(
        lambda operand, flag: jnp.zeros_like(operand) if len(flag) else None,
        (operands.heads, operands.temperature),
        (flags.heads, flags.temperature),
    )
    return _Gradients(states, heads, temperature)


def _add_products(
    states: Array,
    part: LinearHead,
    logit_gradient: Array,
    is_new: Array,
    start: Array,
    states_gradient: Array | None,
    head_gradient: LinearHead,
) -> tuple[Array | None, LinearHead]:
    """Adds the gradients of one side from that of its logits `[N, part]` before the softcap."""
    axis = part.vocabulary_axis
    kernel_gradient, bias_gradient = head_gradient.kernel, head_gradient.bias
    if bias_gradient is not None:
        own = logit_gradient.sum(0).astype(bias_gradient.dtype)
        bias_gradient = jax.lax.dynamic_update_slice_in_dim(bias_gradient, own, start, 0)
    # In the states' dtype, so that the products of a bfloat16 model run in bfloat16.
    logit_gradient = logit_gradient.astype(states.dtype)
    if kernel_gradient is not None:
        pair = (logit_gradient, states) if part.is_embedding else (states, logit_gradient)
        own = product(*pair, 0, 0).astype(kernel_gradient.dtype)
        kernel_gradient = jax.lax.dynamic_update_slice_in_dim(kernel_gradient, own, start, axis)
    if states_gradient is not None:
        new = jnp.where(is_new, logit_gradient, 0)
        states_gradient = states_gradient + product(new, part.kernel, 1, axis)
    head_gradient = dataclasses.replace(part, kernel=kernel_gradient, bias=bias_gradient)
    return states_gradient, head_gradient


def _zero_gradients(operands: Operands) -> Operands:
    def zero(operand: Array) -> Any:
        if jnp.issubdtype(operand.dtype, jnp.floating):
            return jnp.zeros_like(operand)
        return np.zeros(operand.shape, jax.dtypes.float0)

    return jax.tree.map(zero, operands)


# Symbolic zeros reveal which operands are differentiated: a fixed teacher costs no gradient.
_chunked_terms.defvjp(_chunked_terms_fwd, _chunked_terms_bwd, symbolic_zeros=True)
# Without `jit`, each call of a user who does not compile would compile its loops again.
_compiled_terms = jax.jit(_chunked_terms, static_argnums=0)


def _all_logits(
    states: Sequence[Array], heads: Sequence[LinearHead], dtype: Any
) -> tuple[Array, ...]:
    return tuple(
        linear_logits(side_states, head, dtype)
        for side_states, head in zip(states, heads, strict=True)
    )


def _soften(term: Term, logits: Sequence[Array], temperature: Array) -> Sequence[Array]:
    return [side / temperature for side in logits] if term.is_softened else logits


def _take_part(head: LinearHead, start: Array, size: int) -> LinearHead:
    """Returns a head of some of its classes."""
    take = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size)
    bias = None if head.bias is None else take(head.bias, axis=0)
    return dataclasses.replace(head, kernel=take(head.kernel, axis=head.vocabulary_axis), bias=bias)


def _match_varying_axes(operands: Operands) -> Operands:
    """Makes all arrays vary over the same mesh axes of a `shard_map`.

    A kernel that all devices share then varies as the tokens do inside `_chunked_terms`, and the
    transpose of this conversion sums its gradient over the devices.
    """
    # Adding a zero that depends on every array works on all JAX versions, unlike `lax.pcast` and
    # `lax.pvary`. It has no gradient and is removed by the compiler.
    zeros = [
        jax.lax.stop_gradient(jnp.atleast_1d(array))[:0].sum()
        for array in jax.tree.leaves(operands)
    ]
    return jax.tree.map(
        lambda array: array + sum(zero.astype(array.dtype) for zero in zeros), operands
    )


def _varying_axes(array: Array) -> frozenset[str]:
    """Returns the mesh axes of a `shard_map` over which an array varies."""
    kind = jax.typeof(array)
    # JAX 0.12 moved the attribute `vma`.
    return kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma


def check_axis(axis_name: str | None, heads: Sequence[LinearHead]) -> None:
    """Raises `ValueError` unless the kernels are sharded over the axis."""
    if axis_name is None:
        return
    check_shape(
        all(axis_name in _varying_axes(head.kernel) for head in heads),
        f"axis_name is {axis_name!r}, over which not every head is sharded: call the loss inside "
        "jax.shard_map, without check_vma=False, and shard the classes of each head in in_specs",
    )


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
