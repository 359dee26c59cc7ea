"""Pallas kernels of the fused divergences: the values without any logits in the device's memory.

A program of the kernel takes a block of tokens, and goes through the vocabulary in blocks of
classes. It keeps, for student and teacher, the largest logit so far, Σ exp and the expected
difference of the logits (an online softmax), which give the forward and the reverse KL in one pass.
The Jensen–Shannon divergence needs the denominators beforehand, and takes a second pass.

On TPUs the blocks are steps of a grid that is run in order. On GPUs, where it is not, they are
steps of a loop, which reads blocks of features as well. The gradient is that of `_fused_chunks`,
from what the kernel returns.

The speed of these kernels has not been measured on any device, and the sizes of blocks are
estimates from the memory near the cores. So they are used only on request.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton

from jaxkd.losses._arrays import check_shape
from jaxkd.losses._fused_terms import Divergence, DivergenceStatistics
from jaxkd.losses._softmax import log_add_exp
from jaxkd.losses.heads import LinearHead

# Bytes of the features of one token, student and teacher together, up to which a block on a TPU has
# so many tokens and classes. Both are read twice over, within about 12 MB.
TPU_BLOCKS = ((8_192, 512, 256), (16_384, 256, 128), (32_768, 64, 128))
# Tokens, classes and features of a block on a GPU.
GPU_BLOCKS = 64, 64, 64

# Below any logit. With −inf, the first update of a class at −inf would be NaN.
_LOWEST = -1e30


class _Inputs(NamedTuple):
    """The arrays of a kernel, or its references to them, or their blocks.

    Attributes:
        temperature: `[1, 1]`.
        states: `[N, D]` of student and teacher.
        heads: Of both, with biases `[1, V]`.
        log_denominators: `[N, 1]` of both, if the kernel takes them.
    """

    temperature: Any
    states: tuple[Any, ...]
    heads: tuple[LinearHead, ...]
    log_denominators: tuple[Any, ...]


class _Softmax(NamedTuple):
    """Sums of one model over the classes so far, `[tokens, 1]`.

    Attributes:
        largest: The largest logit.
        total: Σ exp(logit − largest).
        difference: Σ exp(logit − largest) (logit − logit of the other model).
    """

    largest: Array
    total: Array
    difference: Array


def evaluate(
    divergence: Divergence,
    states: Sequence[Array],
    heads: Sequence[LinearHead],
    temperature: Array,
    sides: Sequence[int],
    *,
    on_tpu: bool,
    interpret: bool = False,
) -> tuple[Array, DivergenceStatistics]:
    """Computes what `Divergence.evaluate` does, for all tokens.

    Args:
        divergence: The divergence.
        states: `[N, D]` of student and teacher, float32 or narrower.
        heads: Of both.
        temperature: T, a scalar.
        sides: The models that get a gradient.
        on_tpu: True for the kernel of TPUs, False for that of GPUs.
        interpret: True to run the kernel on a CPU, for tests.

    Returns:
        The values `[N]`, and the statistics.
    """
    call = functools.partial(_call_on_tpu if on_tpu else _call_on_gpu, interpret=interpret)
    # Blocks have two axes.
    with_rows = tuple(
        head if head.bias is None else dataclasses.replace(head, bias=head.bias[None])
        for head in heads
    )
    inputs = _Inputs(temperature.reshape(1, 1), tuple(states), with_rows, ())
    sums = call(_update_softmaxes, (_LOWEST, 0.0, 0.0) * 2, inputs)
    softmaxes = _Softmax(*sums[:3]), _Softmax(*sums[3:])
    log_denominators = [softmax.largest + jnp.log(softmax.total) for softmax in softmaxes]
    shares = divergence.student_share, divergence.teacher_share
    if 0 in shares:
        # KL(student ‖ teacher) and KL(teacher ‖ student), of which one counts.
        divergences = [
            softmaxes[side].difference / softmaxes[side].total
            - log_denominators[side]
            + log_denominators[1 - side]
            for side in (0, 1)
        ]
        shares = float(divergence.student_share == 0), float(divergence.teacher_share == 0)
    else:
        update = functools.partial(_update_mixture, divergence)
        inputs = inputs._replace(log_denominators=tuple(log_denominators))
        divergences = call(update, (0.0, 0.0), inputs)
    parts = [
        share * part[:, 0] if share else jnp.zeros_like(part[:, 0])
        for share, part in zip(shares, divergences, strict=True)
    ]
    # The mean derivative of a side is its part of the value.
    mean_derivatives = [parts[side] if side in sides else parts[side][:0] for side in (0, 1)]
    statistics = DivergenceStatistics([log[:, 0] for log in log_denominators], mean_derivatives)
    return parts[0] + parts[1], statistics


# An update takes the sums so far, the logits `[tokens, classes]` of both models, −inf beyond the
# last class, and the inputs' `log_denominators`.
_Update = Callable[[tuple[Array, ...], list[Array], tuple[Array, ...]], tuple[Array, ...]]


def _update_softmaxes(
    sums: tuple[Array, ...], logits: list[Array], log_denominators: tuple[Array, ...]
) -> tuple[Array, ...]:
    def update(softmax: _Softmax, own: Array, other: Array) -> _Softmax:
        largest = jnp.maximum(softmax.largest, own.max(1, keepdims=True))
        scale = jnp.exp(softmax.largest - largest)
        weights = jnp.exp(own - largest)
        differences = weights * jnp.where(weights != 0, own - other, 0.0)
        return _Softmax(
            largest,
            scale * softmax.total + weights.sum(1, keepdims=True),
            scale * softmax.difference + differences.sum(1, keepdims=True),
        )

    student, teacher = logits
    return (
        *update(_Softmax(*sums[:3]), student, teacher),
        *update(_Softmax(*sums[3:]), teacher, student),
    )


def _update_mixture(
    divergence: Divergence,
    sums: tuple[Array, ...],
    logits: list[Array],
    log_denominators: tuple[Array, ...],
) -> tuple[Array, ...]:
    """Adds to KL(q ‖ m) and KL(p ‖ m), q of the student and p of the teacher."""
    logs = [own - log for own, log in zip(logits, log_denominators, strict=True)]
    shares = divergence.student_share, divergence.teacher_share
    # As Python numbers: a kernel cannot hold arrays of its own.
    mixture = log_add_exp(*(own + math.log(share) for own, share in zip(logs, shares, strict=True)))
    probabilities = [jnp.exp(own) for own in logs]
    return tuple(
        total + (p * jnp.where(p != 0, own - mixture, 0.0)).sum(1, keepdims=True)
        for total, p, own in zip(sums, probabilities, logs, strict=True)
    )


def _finish_logits(logits: Array, head: LinearHead, bias: Array | None, temperature: Any) -> Array:
    """Returns softened logits from a product of states and kernel."""
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)
    if head.softcap is not None:
        logits = head.softcap * jnp.tanh(logits / head.softcap)
    return logits / temperature


def _mask_classes(logits: Array, start: Array, num_classes: int) -> Array:
    classes = start + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    return jnp.where(classes < num_classes, logits, -jnp.inf)


def _call_on_tpu(
    update: _Update, start: tuple[float, ...], inputs: _Inputs, *, interpret: bool
) -> tuple[Array, ...]:
    """Runs an update over all classes; returns its sums `[N, 1]`."""
    num_tokens, num_classes = len(inputs.states[0]), inputs.heads[0].num_classes
    tokens, classes = _tpu_blocks(inputs.states)
    blocks_of_classes = pl.cdiv(num_classes, classes)

    def of_tokens(array: Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
        return pl.BlockSpec((tokens, array.shape[1]), lambda i, j: (i, 0))

    def of_head(head: LinearHead) -> LinearHead:
        features = head.kernel.shape[1 - head.vocabulary_axis]
        blocks: dict[str, Any] = {}
        if head.is_embedding:
            blocks["kernel"] = pl.BlockSpec((classes, features), lambda i, j: (j, 0))
        else:
            blocks["kernel"] = pl.BlockSpec((features, classes), lambda i, j: (0, j))
        if head.bias is not None:
            blocks["bias"] = pl.BlockSpec((1, classes), lambda i, j: (0, j))
        return dataclasses.replace(head, **blocks)

    specs = _Inputs(
        pl.BlockSpec((1, 1), lambda i, j: (0, 0)),
        jax.tree.map(of_tokens, inputs.states),
        tuple(of_head(head) for head in inputs.heads),
        jax.tree.map(of_tokens, inputs.log_denominators),
    )

    def kernel(inputs: _Inputs, *refs: Any) -> None:
        outputs, sums = refs[: len(start)], refs[len(start) :]
        j = pl.program_id(1)

        @pl.when(j == 0)
        def _start() -> None:
            for total, value in zip(sums, start, strict=True):
                total[...] = jnp.full(total.shape, value, jnp.float32)

        block = jax.tree.map(lambda ref: ref[...], inputs)
        logits = []
        for states, head in zip(block.states, block.heads, strict=True):
            dimensions = (((1,), (1 - head.vocabulary_axis,)), ((), ()))
            products = jax.lax.dot_general(
                states, head.kernel, dimensions, preferred_element_type=jnp.float32
            )
            own = _finish_logits(products, head, head.bias, block.temperature)
            logits.append(_mask_classes(own, j * classes, num_classes))
        updated = update(tuple(total[...] for total in sums), logits, block.log_denominators)
        for total, value in zip(sums, updated, strict=True):
            total[...] = value

        @pl.when(j == blocks_of_classes - 1)
        def _end() -> None:
            for output, total in zip(outputs, sums, strict=True):
                output[...] = total[...]

    output = _shape_like(inputs.states[0], (num_tokens, 1))
    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(num_tokens, tokens), blocks_of_classes),
        in_specs=[specs],
        out_specs=[of_tokens(output)] * len(start),
        out_shape=[output] * len(start),
        scratch_shapes=[pltpu.VMEM((tokens, 1), jnp.float32)] * len(start),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
    )(inputs)


def _call_on_gpu(
    update: _Update, start: tuple[float, ...], inputs: _Inputs, *, interpret: bool
) -> tuple[Array, ...]:
    """Runs an update over all classes; returns its sums `[N, 1]`."""
    num_tokens, num_classes = len(inputs.states[0]), inputs.heads[0].num_classes
    tokens, classes, features = GPU_BLOCKS

    def load(ref: Any, starts: tuple[Any, Any], sizes: tuple[int, int]) -> Array:
        """Reads a block `sizes` of a matrix, and zeros beyond its ends."""
        index = tuple(pl.ds(first, size) for first, size in zip(starts, sizes, strict=True))
        rows, columns = (
            first + jax.lax.broadcasted_iota(jnp.int32, sizes, axis) < length
            for axis, (first, length) in enumerate(zip(starts, ref.shape, strict=True))
        )
        return triton.load(ref.at[index], mask=rows & columns, other=0.0)

    def kernel(inputs: _Inputs, *outputs: Any) -> None:
        first_token = pl.program_id(0) * tokens
        temperature = inputs.temperature[...]
        log_denominators = tuple(
            load(ref, (first_token, 0), (tokens, 1)) for ref in inputs.log_denominators
        )

        def logits_of(states: Any, head: LinearHead, first_class: Array) -> Array:
            axis = head.vocabulary_axis

            def add_features(k: Array, products: Array) -> Array:
                starts, sizes = (k * features, first_class), (features, classes)
                if head.is_embedding:
                    starts, sizes = starts[::-1], sizes[::-1]
                lhs = load(states, (first_token, k * features), (tokens, features))
                rhs = load(head.kernel, starts, sizes)
                return products + jax.lax.dot_general(
                    lhs, rhs, (((1,), (1 - axis,)), ((), ())), preferred_element_type=jnp.float32
                )

            products = jax.lax.fori_loop(
                0,
                pl.cdiv(states.shape[1], features),
                add_features,
                jnp.zeros((tokens, classes), jnp.float32),
            )
            bias = None
            if head.bias is not None:
                bias = load(head.bias, (0, first_class), (1, classes))
            own = _finish_logits(products, head, bias, temperature)
            return _mask_classes(own, first_class, num_classes)

        def add_classes(j: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
            logits = [
                logits_of(states, head, j * classes)
                for states, head in zip(inputs.states, inputs.heads, strict=True)
            ]
            return update(sums, logits, log_denominators)

        sums = jax.lax.fori_loop(
            0,
            pl.cdiv(num_classes, classes),
            add_classes,
            tuple(jnp.full((tokens, 1), value, jnp.float32) for value in start),
        )
        is_token = first_token + jax.lax.broadcasted_iota(jnp.int32, (tokens, 1), 0) < num_tokens
        for output, value in zip(outputs, sums, strict=True):
            triton.store(output.at[pl.ds(first_token, tokens), pl.ds(0, 1)], value, mask=is_token)

    output = _shape_like(inputs.states[0], (num_tokens, 1))
    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(num_tokens, tokens),),
        out_shape=[output] * len(start),
        compiler_params=triton.CompilerParams(num_warps=4),
        interpret=interpret,
    )(inputs)


def check_states(states: Sequence[Array]) -> None:
    """Raises an error of one line for states that the kernels do not take."""
    for array in states:
        if array.dtype == jnp.float64:
            raise TypeError(
                "the kernel computes in float32: cast the states, or leave out use_pallas"
            )
    _tpu_blocks(states)


def _tpu_blocks(states: Sequence[Array]) -> tuple[int, int]:
    """Returns how many tokens and classes a block on a TPU has."""
    row = sum(array.shape[1] * array.dtype.itemsize for array in states)
    check_shape(
        row <= TPU_BLOCKS[-1][0],
        f"the features of a token take {row} bytes in student and teacher together, and the kernel "
        f"takes at most {TPU_BLOCKS[-1][0]}: leave out use_pallas",
    )
    return next((tokens, classes) for limit, tokens, classes in TPU_BLOCKS if row <= limit)


def _shape_like(array: Array, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """Returns a float32 shape that varies over the same axes of a `shard_map` as an array."""
    kind = jax.typeof(array)
    # JAX 0.12 moved the attribute `vma`.
    if hasattr(kind, "manual_axis_type"):
        axes = {"manual_axis_type": kind.manual_axis_type}
    else:
        axes = {"vma": kind.vma}
    return jax.ShapeDtypeStruct(shape, jnp.float32, **axes)
