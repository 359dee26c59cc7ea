"""Convolutions in the formulation that the device at hand runs best, equal in value to XLA's own."""

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

SHORT_PATCH = 32  # numbers of a patch, such as 3×3 of three channels, at which patches take no more than the outputs
_Convolution = Callable[[Array, Array], Array]


def convolve(
    inputs: Array, kernel: Array, strides: Sequence[int], padding: str | Sequence[tuple[int, int]], **keywords: Any
) -> Array:
    """Convolves all channels with all, as `flax.linen.Conv` does; for its `conv_general_dilated=convolve`.

    Elsewhere than on a CPU it is `lax.conv_general_dilated`. On a CPU a 1×1 kernel is a matrix product, whose gradient
    by the kernel takes a fifth of the time. Other convolutions take another form where derivatives are taken. A first
    layer of few channels becomes a product of patches and weights, whose gradient takes half the time. Any other is
    kept apart from what is around it: XLA would compute normalisation and activation once more within the transposition
    that the gradient by the kernel begins with, which makes the gradients of ResNet-20 take 1.5 times as long.

    Args:
        inputs: `[B, H, W, C]`.
        kernel: `[h, w, C, K]`.
        strides: Vertical and horizontal.
        padding: "SAME", "VALID", or before and after each axis.
        **keywords: What else `lax.conv_general_dilated` takes; no dilation, one group.

    Returns:
        `[B, H', W', K]`, of the inputs' dtype.
    """

    def convolved(inputs: Array, kernel: Array) -> Array:
        return lax.conv_general_dilated(inputs, kernel, strides, padding, **keywords)

    def apart(inputs: Array, kernel: Array) -> Array:
        return _apart_in_gradients(convolved(lax.optimization_barrier(inputs), kernel))

    def multiplied(inputs: Array, kernel: Array) -> Array:
        patches = jnp.concatenate(list(_shifts(inputs, kernel.shape[:2], strides, padding)), -1)
        return jnp.matmul(patches, kernel.reshape(-1, kernel.shape[-1]), precision=keywords.get("precision"))

    if kernel.shape[:2] == (1, 1):
        on_cpu = multiplied
    else:
        short = kernel.size // kernel.shape[-1] <= SHORT_PATCH
        on_cpu = _differentiated_as(multiplied if short else apart, convolved)
    return lax.platform_dependent(inputs, kernel, cpu=on_cpu, default=convolved)


Conv = functools.partial(nn.Conv, conv_general_dilated=convolve)
"""`flax.linen.Conv` that convolves so."""


def depthwise(
    inputs: Array, kernel: Array, strides: Sequence[int], padding: str | Sequence[tuple[int, int]], **keywords: Any
) -> Array:
    """Convolves every channel with a kernel of its own; for `flax.linen.Conv(conv_general_dilated=depthwise)`.

    On a CPU, where XLA convolves group by group on one thread, it is a sum of shifted images, each times a row of
    weights, which XLA fuses: 20 to 60 times faster, with its gradients 3 to 10 times. Elsewhere it is
    `lax.conv_general_dilated`.

    Args:
        inputs: `[B, H, W, C]`.
        kernel: `[h, w, 1, C]`.
        strides: Vertical and horizontal.
        padding: "SAME", "VALID", or before and after each axis.
        **keywords: What else `lax.conv_general_dilated` takes; no dilation.

    Returns:
        `[B, H', W', C]`, of the inputs' dtype; 16-bit numbers are summed in float32.
    """

    def convolved(inputs: Array, kernel: Array) -> Array:
        return lax.conv_general_dilated(inputs, kernel, strides, padding, **keywords)

    def shifted(inputs: Array, kernel: Array) -> Array:
        return _sum_of_shifts(inputs, kernel, strides, padding)

    return lax.platform_dependent(inputs, kernel, cpu=shifted, default=convolved)


def _sum_of_shifts(
    inputs: Array, kernel: Array, strides: Sequence[int], padding: str | Sequence[tuple[int, int]]
) -> Array:
    dtype, size = jnp.float32 if inputs.dtype.itemsize < 4 else inputs.dtype, kernel.shape[:2]
    weights = (kernel[i : i + 1, j : j + 1].astype(dtype) for i, j in np.ndindex(*size))
    shifts = (shift.astype(dtype) for shift in _shifts(inputs, size, strides, padding))
    return functools.reduce(operator.add, map(operator.mul, shifts, weights)).astype(inputs.dtype)


def _shifts(
    inputs: Array, size: Sequence[int], strides: Sequence[int], padding: str | Sequence[tuple[int, int]]
) -> Iterator[Array]:
    """What each place of a kernel sees, `[B, H', W', C]`, row after row."""
    borders = lax.padtype_to_pads(inputs.shape[1:3], size, strides, padding) if isinstance(padding, str) else padding
    padded = jnp.pad(inputs, ((0, 0), *borders, (0, 0)))
    (height, width), (down, right) = padded.shape[1:3], strides
    below, beside = height - size[0] + 1, width - size[1] + 1
    for i, j in np.ndindex(*size):
        yield padded[:, i : i + below : down, j : j + beside : right]


def _differentiated_as(trained: _Convolution, convolve: _Convolution) -> _Convolution:
    """A convolution that takes another form, equal in value, where derivatives are taken."""
    function = jax.custom_jvp(convolve)
    function.defjvp(lambda primals, tangents: jax.jvp(trained, primals, tangents))
    return function


@jax.custom_jvp
def _apart_in_gradients(outputs: Array) -> Array:
    """The outputs, whose cotangent is computed once before the gradients that need it."""
    return outputs


@_apart_in_gradients.defjvp
def _apart_in_gradients_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return primals[0], lax.optimization_barrier(tangents[0])
